#include "engine/team.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace shoal {
namespace {

// Long enough to bridge the gap between two decode steps, short enough not to burn an idle machine.
constexpr int kSpinsBeforeSleep = 20000;
constexpr int kSpinsBeforeYield = 4000;

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// One turn of a wait that spins first and then lets others run.
inline void wait_once(int& spins) {
    if (spins == kSpinsBeforeYield) return std::this_thread::yield();
    ++spins;
    relax();
}

}  // namespace

Team::Team(int size) : size_(size < 1 ? 1 : size) {
    for (int member = 1; member < size_; ++member) threads_.emplace_back([this, member] { work(member); });
}

Team::~Team() {
    {
        std::lock_guard lock(mutex_);
        quit_ = true;
        ++round_;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void Team::run(const std::function<void(int)>& job) {
    if (size_ > 1) {
        std::lock_guard lock(mutex_);
        job_ = &job;
        running_ = size_ - 1;
        ++round_;
    }
    if (size_ > 1) wake_.notify_all();
    job(0);
    for (int spins = 0; running_.load(std::memory_order_acquire) != 0;) wait_once(spins);
}

void Team::work(int member) {
    uint64_t seen = 0;
    for (;;) {
        for (int spins = 0; round_.load(std::memory_order_acquire) == seen && spins < kSpinsBeforeSleep; ++spins)
            relax();
        if (round_.load(std::memory_order_acquire) == seen) {
            std::unique_lock lock(mutex_);
            wake_.wait(lock, [&] { return round_.load() != seen; });
        }
        seen = round_.load(std::memory_order_acquire);
        if (quit_) return;
        (*job_)(member);
        running_.fetch_sub(1, std::memory_order_release);
    }
}

void Team::barrier() {
    if (size_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase;) wait_once(spins);
}

}  // namespace shoal
