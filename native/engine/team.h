// A persistent team of threads that walks a list of stages together: inside a stage work is handed out by an atomic
// counter, between stages everybody meets at a barrier. The calling thread is member 0.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
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
    // Members meet here; spins first, since stages last microseconds.
    void barrier();

  private:
    void work(int member);

    int size_;
    std::vector<std::thread> threads_;
    const std::function<void(int)>* job_ = nullptr;
    std::atomic<uint64_t> round_{0};
    std::atomic<int> running_{0};
    std::atomic<int> arrived_{0};
    std::atomic<uint32_t> phase_{0};
    std::atomic<bool> quit_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
};

}  // namespace shoal
