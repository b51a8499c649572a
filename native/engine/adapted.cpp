#include "engine/adapted.h"

#include <algorithm>
#include <utility>

namespace shoal {

void Adapted::set(size_t adapter, std::vector<LowRank> stack) {
    if (of_.size() <= adapter) of_.resize(adapter + 1);
    of_[adapter] = std::move(stack);
    measure();
}

void Adapted::clear(size_t adapter) {
    if (adapter < of_.size()) of_[adapter].clear();
    measure();
}

void Adapted::measure() {
    width_ = 0;
    for (const auto& stack : of_)
        for (const LowRank& one : stack) width_ = std::max(width_, one.rank);
}

namespace {

// Calls `work(low-rank pair, first, last)` for runs of neighbouring rows of one adapter.
template <class Work>
void by_adapter(const Worker& worker, const Adapted& adapted, long first, long last, long index, Work work) {
    const int32_t* adapter = worker.step.adapter;
    while (first < last) {
        long end = first + 1;
        while (end < last && adapter[end] == adapter[first]) ++end;
        if (const LowRank* found = adapted.find(adapter[first], index)) work(*found, first, end);
        first = end;
    }
}

}  // namespace

void shrink(const Worker& worker, const Adapted& adapted, const float* x, long x_stride, long first, long last,
            float* low, long low_stride, long index) {
    by_adapter(worker, adapted, first, last, index, [&](const LowRank& pair, long from, long to) {
        worker.ops.lora_shrink(x + from * x_stride, x_stride, to - from, adapted.cols, pair.a, pair.rank, pair.scale,
                               low + from * low_stride, low_stride);
    });
}

void expand(const Worker& worker, const Adapted& adapted, const float* low, long low_stride, long from, long to,
            float* y, long y_stride, long index) {
    by_adapter(worker, adapted, 0, worker.step.tokens, index, [&](const LowRank& pair, long first, long last) {
        worker.ops.lora_expand(low + first * low_stride, low_stride, last - first, pair.rank, pair.b + from,
                               adapted.rows, to - from, y + first * y_stride + from, y_stride);
    });
}

}  // namespace shoal
