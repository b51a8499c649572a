#include "engine/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "engine/team.h"
#include "shoal/cpu.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace shoal {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
using Vector16 = uint64_t __attribute__((vector_size(16)));
using Vector32 = uint64_t __attribute__((vector_size(32)));
using Vector64 = uint64_t __attribute__((vector_size(64)));
constexpr int kInFlight = 8;  // sums that do not wait for each other

// Sums a block of memory, read as kStreams streams side by side: some memory systems are faster with more than one.
template <class Vector, int kStreams>
[[gnu::always_inline]] inline uint64_t sum_streams(const void* memory, size_t bytes) {
    constexpr int kEach = kInFlight / kStreams;
    const Vector* vectors = static_cast<const Vector*>(memory);
    const size_t stream = bytes / sizeof(Vector) / kStreams;  // whole: a block is a number of huge pages
    Vector sums[kInFlight] = {};
    for (size_t i = 0; i < stream; i += kEach)
        for (int s = 0; s < kStreams; ++s)
            for (int k = 0; k < kEach; ++k) sums[s * kEach + k] += vectors[s * stream + i + k];
    for (int k = 1; k < kInFlight; ++k) sums[0] += sums[k];
    uint64_t total = 0;
    for (size_t k = 0; k < sizeof(Vector) / sizeof(uint64_t); ++k) total += sums[0][k];
    return total;
}

template <class Vector>
[[gnu::always_inline]] inline uint64_t sum_block(const void* memory, size_t bytes, int streams) {
    if (streams == 1) return sum_streams<Vector, 1>(memory, bytes);
    return streams == 2 ? sum_streams<Vector, 2>(memory, bytes) : sum_streams<Vector, 4>(memory, bytes);
}

// Narrow loads do not reach what wide ones do, so the reader is as wide as the kernels can be on this machine. The code
// with wide instructions stays inside its function, which has internal linkage.
using Sum = uint64_t (*)(const void*, size_t, int);
uint64_t sum_baseline(const void* memory, size_t bytes, int streams) {
    return sum_block<Vector16>(memory, bytes, streams);
}
#if defined(__x86_64__)
[[gnu::target("avx2")]] uint64_t sum_avx2(const void* memory, size_t bytes, int streams) {
    return sum_block<Vector32>(memory, bytes, streams);
}
[[gnu::target("avx512f")]] uint64_t sum_avx512(const void* memory, size_t bytes, int streams) {
    return sum_block<Vector64>(memory, bytes, streams);
}
Sum widest_sum() { return cpu_has_avx512() ? sum_avx512 : cpu_has_avx2() ? sum_avx2 : sum_baseline; }
#else
Sum widest_sum() { return sum_baseline; }
#endif

}  // namespace

double read_bandwidth(int threads, size_t bytes, int passes) {
    Team team(threads);
    const size_t part = std::max(bytes / team.size() / kHugePage, size_t{1}) * kHugePage;
    const size_t whole = part * team.size();
    const std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(kHugePage, whole), &std::free);
    if (!memory) throw std::bad_alloc();
#if defined(__linux__)
    madvise(memory.get(), whole, MADV_HUGEPAGE);  // with small pages this would measure the page walk
#endif
    uint8_t* first = static_cast<uint8_t*>(memory.get());
    team.run([&](int member) {  // written first, and by its reader: untouched pages would all be one page of zeros
        std::memset(first + member * part, member + 1, part);
    });
    const Sum sum = widest_sum();
    std::atomic<uint64_t> sink{0};
    double best = 0;
    for (int pass = 0; pass < passes; ++pass) {
        const int streams = 1 << pass % 3;
        const auto start = std::chrono::steady_clock::now();
        team.run([&](int member) { sink += sum(first + member * part, part, streams); });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        best = std::max(best, whole / seconds.count());
    }
    return sink.load() == 0 ? 0.0 : best;  // looked at, so that the compiler keeps the reading
}

}  // namespace shoal
