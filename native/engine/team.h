// A persistent team of threads that walks a list of stages together: inside a stage work is handed out by an atomic
// counter, between stages everybody meets at a barrier. The calling thread is member 0.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace shoal {

class Team {
  public:
    explicit Team(int size);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }
    // Runs job(member) on every member and returns when all have finished.
    void run(const std::function<void(int)>& job);
    // Members meet here.
    void barrier();

  private:
    void work(int member);

    int size_;
    std::vector<std::thread> threads_;
    const std::function<void(int)>* job_ = nullptr;
    bool quit_ = false;
    // Each on its own cache line: whoever spins on one must not slow down those who write another.
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<int> running_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
};

}  // namespace shoal
