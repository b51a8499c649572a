#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/operations.h"
#include "engine/pack.h"

namespace shoal {
namespace {

constexpr size_t kNearBytes = size_t{1} << 17;
constexpr long kMostHeadRows = 128;

// Rows that meet a head's matrix at a time. Up to 16 share one reading of it. Of more, every member takes its own part
// and all heads: attention shares out sequences in the same way and finds in its cache what was made here.
long head_rows(const Step& step, long members) {
    if (step.tokens <= 16 || step.adapter) return step.tokens;
    return std::clamp(round_up((step.tokens + members - 1) / members, 4), 16L, kMostHeadRows);
}

}  // namespace

void Embed::run(const Worker& worker) {
    float* x = worker.engine.buffer(out, worker.step.tokens);
    long first, last;
    while (worker.next(0, worker.step.tokens, 1, first, last)) {
        unpack_row(table, worker.step.token[first], x + first * table.cols);
    }
}

void LookAhead::run(const Worker& worker) {
    const long cols = table.cols;
    const float* from = worker.engine.buffer(states, 0);
    float* x = worker.engine.buffer(out, worker.step.tokens);
    long first, last;
    while (worker.next(0, worker.step.tokens, 1, first, last)) {
        float* embedded = x + first * 2 * cols;
        float* state = embedded + cols;
        unpack_row(table, worker.step.token[first], embedded);
        worker.ops.rms_norm(embedded, cols, embed_norm, eps, embedded, cols, 1, cols);
        worker.ops.rms_norm(from + worker.step.source[first] * cols, cols, final_norm, eps, state, cols, 1, cols);
        worker.ops.rms_norm(state, cols, state_norm, eps, state, cols, 1, cols);
    }
}

void RopeTable::run(const Worker& worker) {
    const long half = long(inverse_frequency.size());
    float* cos_TR = worker.engine.buffer(cosines, worker.step.tokens);
    float* sin_TR = worker.engine.buffer(sines, worker.step.tokens);
    long first, last;
    while (worker.next(0, worker.step.tokens, 8, first, last)) {
        for (long t = first; t < last; ++t) {
            for (long i = 0; i < half; ++i) {
                const float angle = float(worker.step.position[t]) * inverse_frequency[i];
                cos_TR[t * half + i] = std::cos(angle) * factor;
                sin_TR[t * half + i] = std::sin(angle) * factor;
            }
        }
    }
}

bool Linear::quantised() const {
    return std::any_of(parts.begin(), parts.end(), [](const Part& part) { return part.weight.quantised(); });
}

void Linear::reserve(Engine& engine, const Step& step) {
    reserve_input(engine, step, shared, input, quantised());
    if (step.adapter) low.array<float>(step.tokens * low_width());
}

long Linear::low_width() const {
    long width = 0;
    for (const Part& part : parts) width += part.adapted.width();
    return width;
}

// Every part's low-rank products side by side, [T, low_width()]; null if there are none.
const float* Linear::shrink_parts(const Worker& worker, const Prepared& x) {
    const long width = worker.step.adapter ? low_width() : 0;
    if (!width) return nullptr;
    return low_rows(worker, low, 8, x.tokens, width, [&](float* rows, long first, long last) {
        for (const Part& part : parts) {
            shrink(worker, part.adapted, x.rows, x.stride, first, last, rows, width);
            rows += part.adapted.width();
        }
    });
}

void Linear::run(const Worker& worker) {
    long tiles = 0;
    for (const Part& part : parts) tiles += part.weight.tiles();
    const Prepared x = prepare(worker, shared, input, quantised(), 0);
    if (moments && worker.member == 0) add_moments(x.rows, x.stride, x.tokens, x.cols, moments);
    const float* lows = shrink_parts(worker, x);
    const long low_stride = lows ? low_width() : 0;
    long first, last;
    while (worker.next(1, tiles, worker.grain(tiles), first, last)) {
        long base = 0, low_from = 0;
        for (const Part& part : parts) {
            const long from = std::max(first - base, 0L), to = std::min(last - base, part.weight.tiles());
            const float* low_rows = lows ? lows + low_from : nullptr;
            base += part.weight.tiles();
            low_from += part.adapted.width();
            if (from >= to) continue;
            const long stride = worker.engine.buffer_cols(part.out);
            const long row = from * kTileRows, end = std::min(to * kTileRows, part.weight.rows);
            float* y = worker.engine.buffer(part.out, worker.step.tokens);
            multiply(worker.ops, part.weight, x, from, to, y, stride, add_to);
            if (low_rows) expand(worker, part.adapted, low_rows, low_stride, row, end, y, stride);
            if (!part.bias) continue;
            for (long t = 0; t < x.tokens; ++t)
                for (long i = row; i < end; ++i) y[t * stride + i] += part.bias[i];
        }
    }
}

void HeadLinear::multiply_rows(const Worker& worker, long head, long first_row, long last_row) const {
    const long tokens = last_row - first_row, cols = weights[head].cols;
    const long in_stride = worker.engine.buffer_cols(in), out_stride = worker.engine.buffer_cols(out);
    const float* rows =
        worker.engine.buffer(in, worker.step.tokens) + first_row * in_stride + in_first + head * in_step;
    float* y = worker.engine.buffer(out, worker.step.tokens) + first_row * out_stride + out_first + head * out_step;
    Prepared prepared{rows, in_stride, {}, lanes_for(tokens), tokens, cols};
    if (weights[head].quantised())
        prepared.quant = quantise_rows(worker, worker.engine.quant(worker.member), rows, in_stride, tokens, cols,
                                       prepared.lanes, wide);
    multiply(worker.ops, weights[head], prepared, 0, weights[head].tiles(), y, out_stride, false);
}

void HeadLinear::run(const Worker& worker) {
    const Step& step = worker.step;
    const long heads = long(weights.size()), block = head_rows(step, worker.engine.threads());
    long first, last;
    while (worker.next(0, (step.tokens + block - 1) / block * heads, 1, first, last)) {
        const long head = first % heads, from = first / heads * block, to = std::min(from + block, step.tokens);
        for (long s = 0, end; s < step.sequences; s = end + 1) {  // runs of sequences that are not expanded
            for (end = s; end < step.sequences && !step.is_expanded(end);) ++end;
            const long first_row = std::max<long>(from, step.first_row[s]);
            const long last_row = std::min<long>(to, step.first_row[end]);
            if (first_row < last_row) multiply_rows(worker, head, first_row, last_row);
        }
        if (!step.adapter || !adapted.any()) continue;  // with adapters the block is the whole step
        const long in_stride = worker.engine.buffer_cols(in), out_stride = worker.engine.buffer_cols(out);
        const float* rows = worker.engine.buffer(in, step.tokens) + in_first + head * in_step;
        float* out_rows = worker.engine.buffer(out, step.tokens) + out_first + head * out_step;
        float* low = worker.engine.scratch(worker.member, 8).array<float>(step.tokens * adapted.width());
        shrink(worker, adapted, rows, in_stride, 0, step.tokens, low, adapted.width(), head);
        expand(worker, adapted, low, adapted.width(), 0, weights[head].rows, out_rows, out_stride, head);
    }
}

void Head::run(const Worker& worker) {
    if (worker.step.outputs == 0) return;
    const long cols = weight.cols, rows = worker.step.outputs;
    const float* x = worker.engine.buffer(input.buffer, worker.step.tokens);
    float* picked = worker.engine.scratch(worker.member, 1).array<float>(rows * cols);
    // Every member prepares all rows: they are few next to the vocabulary.
    for (long i = 0; i < rows; ++i) {
        const float* row = x + worker.step.output_row[i] * cols;
        worker.ops.rms_norm(row, cols, input.norm, input.eps, picked + i * cols, cols, 1, cols);
    }
    if (moments && worker.member == 0) add_moments(picked, cols, rows, cols, moments);
    Prepared prepared{picked, cols, {}, lanes_for(rows), rows, cols};
    if (weight.quantised())
        prepared.quant = quantise_rows(worker, worker.engine.quant(worker.member), picked, cols, rows, cols,
                                       prepared.lanes, input.wide);
    // Many rows pass over a piece several times: it stays in the second cache.
    const long fitting = std::max(1L, long(kNearBytes / weight.tile_bytes()));
    const long grain = std::min(worker.grain(weight.tiles()), rows > kPrivateTokens ? fitting : weight.tiles());
    long first, last;
    while (worker.next(0, weight.tiles(), grain, first, last))
        multiply(worker.ops, weight, prepared, first, last, worker.step.logits, weight.rows, false);
}

}  // namespace shoal
