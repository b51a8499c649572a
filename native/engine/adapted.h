// What low-rank adapters (LoRA) add to a matrix beside its packed weights: y += scale * B (A x), for the rows of a step
// that belong to an adapter. Rows of several adapters and of none share a step.
#pragma once
#include <vector>

#include "engine/engine.h"

namespace shoal {

struct LowRank {
    const uint16_t* a = nullptr;  // bf16 [rank, cols]
    const uint16_t* b = nullptr;  // bf16 [rank, rows]: B transposed
    long rank = 0;                // 0: nothing is added
    float scale = 0;
};

// All adapters' additions to one matrix, or to each of a stack.
class Adapted {
  public:
    long rows = 0, cols = 0, count = 1;  // of the matrix, and how many of them
    void set(size_t adapter, std::vector<LowRank> stack);
    void clear(size_t adapter);
    bool any() const { return width_ > 0; }
    long width() const { return width_; }  // the largest rank
    // Null where the adapter (-1: none) adds nothing to the stack's matrix.
    const LowRank* find(int32_t adapter, long index = 0) const {
        if (adapter < 0 || size_t(adapter) >= of_.size() || of_[adapter].empty()) return nullptr;
        const LowRank& found = of_[adapter][index];
        return found.rank ? &found : nullptr;
    }

  private:
    void measure();
    std::vector<std::vector<LowRank>> of_;  // [adapters], empty or [count]
    long width_ = 0;
};

// low[t] = scale * A x[t] for rows [first, last) of the step, `stride` apart in both; neighbours of one adapter go
// together. `index` is the matrix in its stack.
void shrink(const Worker& worker, const Adapted& adapted, const float* x, long x_stride, long first, long last,
            float* low, long low_stride, long index = 0);
// y[t][from, to) += B low[t] for every row of the step; y points to column 0.
void expand(const Worker& worker, const Adapted& adapted, const float* low, long low_stride, long from, long to,
            float* y, long y_stride, long index = 0);

// Rows [rows, width] that `fill(low, first, last)` makes: by every member for itself in a step of few tokens, else
// shared out, with a barrier behind. `slot` is the member's own memory, `shared` the operation's, reserved before.
template <class Fill>
const float* low_rows(const Worker& worker, Scratch& shared, int slot, long rows, long width, Fill fill) {
    if (worker.step.tokens <= kPrivateTokens) {
        float* low = worker.engine.scratch(worker.member, slot).array<float>(rows * width);
        fill(low, 0L, rows);
        return low;
    }
    float* low = shared.array<float>(0);
    const long members = worker.engine.threads();
    fill(low, rows * worker.member / members, rows * (worker.member + 1) / members);
    worker.barrier();
    return low;
}

}  // namespace shoal
