#include "engine/team.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace shoal {
namespace {

// Some 50 and 400 microseconds. A stage's members finish within a few of each other unless another process has taken a
// core; then only a sleeping waiter frees its own core for the member that was put off. The longer wait bridges the gap
// between two decode steps.
constexpr int kSpinsInStep = 2500, kSpinsBetweenSteps = 20000;

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Returns once `value` is no longer `old`: spins first, since stages last microseconds, then sleeps.
template <class T>
void wait_while(const std::atomic<T>& value, T old, int max_spins) {
    for (int spins = 0; spins < max_spins; ++spins) {
        if (value.load(std::memory_order_acquire) != old) return;
        relax();
    }
    value.wait(old, std::memory_order_acquire);
}

}  // namespace

Team::Team(int size) : size_(size < 1 ? 1 : size) {
    for (int member = 1; member < size_; ++member) threads_.emplace_back([this, member] { work(member); });
}

Team::~Team() {
    quit_ = true;
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void Team::run(const std::function<void(int)>& job) {
    if (size_ == 1) return job(0);
    job_ = &job;
    running_.store(size_ - 1, std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    job(0);
    for (int left; (left = running_.load(std::memory_order_acquire)) != 0;) wait_while(running_, left, kSpinsInStep);
}

void Team::work(int member) {
    for (uint32_t seen = 0;; ++seen) {
        wait_while(round_, seen, kSpinsBetweenSteps);
        if (quit_) return;
        (*job_)(member);
        running_.fetch_sub(1, std::memory_order_release);
        running_.notify_one();
    }
}

void Team::barrier() {
    if (size_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        phase_.notify_all();
        return;
    }
    wait_while(phase_, phase, kSpinsInStep);
}

}  // namespace shoal
