#include "engine/engine.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "engine/pack.h"
#include "shoal/dispatch.h"

namespace shoal {

Scratch::~Scratch() { std::free(data_); }

uint8_t* Scratch::bytes(size_t size) {
    if (size > size_) {
        std::free(data_);
        const size_t whole = (size + 4095) / 4096 * 4096;
        data_ = static_cast<uint8_t*>(std::aligned_alloc(4096, whole));
        size_ = data_ ? whole : 0;
        if (!data_) throw std::bad_alloc();
    }
    return data_;
}

namespace {

QuantRows skip_rows(const QuantRows& rows, long row, long cols) {
    if (!rows.codes) return rows;
    const long groups = round_up(cols, kBlockCols) / kGroup;
    return {rows.codes + row * groups * kGroup, rows.scales + row * groups, rows.sums + row * groups};
}

}  // namespace

WideRows WideRows::from_row(long row, long cols) const {
    return {skip_rows(high, row, cols), skip_rows(low, row, cols)};
}

WideRows QuantBuffer::reserve(long rows, long cols, bool wide) {
    // A lone row's two layers are neighbours, as rows are: see multiply.
    const size_t values = size_t(rows == 1 ? 1 : round_up(rows, 4)) * round_up(cols, kBlockCols);
    const size_t layers = wide ? 2 : 1, groups = values / kGroup;
    const QuantRows high{codes.array<int8_t>(values * layers), scales.array<float>(groups * layers),
                         sums.array<int32_t>(groups * layers)};
    if (!wide) return {high, {}};
    return {high, {high.codes + values, high.scales + groups, high.sums + groups}};
}

void Worker::barrier() const { engine.barrier(); }

bool Worker::next(int stage, long total, long grain, long& first, long& last) const {
    constexpr long kNeighbours = 8;  // more would cost a large team more than the help is worth
    const long members = engine.threads();
    for (long i = 0; i < std::min(members, kNeighbours); ++i) {
        const long owner = (member + i) % members, begin = total * owner / members, end = total * (owner + 1) / members;
        std::atomic<long>& taken = shares[owner].taken[stage];
        if (begin + taken.load(std::memory_order_relaxed) >= end) continue;
        first = begin + taken.fetch_add(grain, std::memory_order_relaxed);
        last = std::min(first + grain, end);
        if (first < end) return true;
    }
    return false;
}

long Worker::grain(long total, long at_least) const {
    const long members = engine.threads();
    return members == 1 ? std::max(total, 1L) : std::max(at_least, total / (members * 8));
}

Engine::Engine(int threads) : team_(threads), scratch_(threads * kScratchSlots), quant_(threads * 2) {}

long Engine::add_buffer(long cols) {
    buffers_.push_back({cols, std::make_unique<Scratch>()});
    return long(buffers_.size()) - 1;
}

float* Engine::buffer(long id, long tokens) {
    return buffers_[id].memory->array<float>(size_t(tokens) * buffers_[id].cols);
}

void Engine::set_cache(long layers, long page_bytes, CacheType type, long pages) {
    cache_layers_ = layers;
    cache_type_ = type;
    page_bytes_ = size_t(round_up(page_bytes, 64));
    cache_bytes_ = page_bytes_ * layers * pages;
    cache_.bytes(cache_bytes_);
}

void store_cache_row(CacheType type, void* at, const float* values, long width) {
    if (type == CacheType::f32) {
        std::memcpy(at, values, width * sizeof(float));
        return;
    }
    if (type == CacheType::bf16) return ops().narrow_rows(values, 0, 1.0f, static_cast<uint16_t*>(at), 0, 1, width);
    auto* codes = static_cast<int8_t*>(at);
    uint8_t* scales = static_cast<uint8_t*>(at) + round_up(width, 4);
    for (long first = 0; first < width; first += kCacheGroup) {
        const long last = std::min(first + kCacheGroup, width);
        float largest = 0, faults = 0;  // faults becomes NaN if a value is not finite, and with it the scale
        for (long i = first; i < last; ++i) {
            largest = std::max(largest, std::fabs(values[i]));
            faults += values[i] * 0.0f;
        }
        const bool zeros = faults != 0 || largest < 1e-36f;  // 127 / largest would overflow
        const float scale = largest / 127.0f + faults, inverse = zeros ? 0.0f : 127.0f / largest;
        for (long i = first; i < last; ++i) codes[i] = zeros ? 0 : int8_t(std::nearbyint(values[i] * inverse));
        std::memcpy(scales + first / kCacheGroup * 4, &scale, 4);
    }
}

uint8_t* Engine::cache_page(long page, long layer) const {
    return const_cast<Scratch&>(cache_).bytes(0) + (size_t(page) * cache_layers_ + layer) * page_bytes_;
}

void Engine::add(size_t program, std::unique_ptr<Operation> operation) {
    if (programs_.size() <= program) programs_.resize(program + 1);
    programs_[program].operations.push_back(std::move(operation));
}

void Engine::run(size_t program, const Step& step) {
    auto& [operations, shares] = programs_.at(program);
    const size_t members = size_t(threads());
    if (shares.size() != operations.size() * members) shares = std::vector<Shares>(operations.size() * members);
    for (Shares& share : shares)
        for (auto& taken : share.taken) taken.store(0, std::memory_order_relaxed);
    // Buffers grow here, before the team starts: their addresses must not move under a running step.
    for (size_t id = 0; id < buffers_.size(); ++id) buffer(long(id), step.tokens);
    for (auto& operation : operations) operation->reserve(*this, step);
    const Ops& table = shoal::ops();
    team_.run([&](int member) {
        for (size_t i = 0; i < operations.size(); ++i) {
            operations[i]->run({*this, step, table, member, &shares[i * members]});
            if (operations[i]->barrier_after) team_.barrier();
        }
    });
}

namespace {

// One token in 16 bits: both layers meet the weights in one pass, as if they were two tokens. The sums are those of two
// passes, in their order.
void multiply_wide_row(const Ops& ops, const PackedMatrix& w, const Prepared& x, long first, long last, float* y,
                       bool add_to) {
    constexpr long kTiles = 16, kWidth = kTiles * kTileRows;
    float both[2 * kWidth];
    for (long tile = first; tile < last; tile += kTiles) {
        const long end = std::min(tile + kTiles, last), rows = std::min(w.rows, end * kTileRows) - tile * kTileRows;
        ops.matmul_q(int32_t(w.packing), w.data + tile * w.tile_bytes(), end - tile, w.cols, rows, &x.quant.high, 2, 1,
                     both, kWidth, false);
        float* out = y + (tile - first) * kTileRows;
        for (long i = 0; i < rows; ++i) out[i] = (add_to ? out[i] + both[i] : both[i]) + both[kWidth + i];
    }
}

}  // namespace

void multiply(const Ops& ops, const PackedMatrix& w, const Prepared& x, long first, long last, float* y, long y_stride,
              bool add_to) {
    const uint8_t* tiles = w.data + first * w.tile_bytes();
    const long rows = std::min(w.rows, last * kTileRows) - first * kTileRows, count = last - first;
    y += first * kTileRows;
    if (!w.quantised()) {
        ops.matmul_f(int32_t(w.packing), tiles, count, w.cols, rows, x.rows, x.stride, x.tokens, y, y_stride, add_to);
        return;
    }
    const long row_codes = w.blocks() * kBlockCols;
    if (x.tokens == 1 && x.lanes == 1 && x.quant.low.codes == x.quant.high.codes + row_codes)
        return multiply_wide_row(ops, w, x, first, last, y, add_to);
    ops.matmul_q(int32_t(w.packing), tiles, count, w.cols, rows, &x.quant.high, x.tokens, x.lanes, y, y_stride, add_to);
    if (x.quant.low.codes)
        ops.matmul_q(int32_t(w.packing), tiles, count, w.cols, rows, &x.quant.low, x.tokens, x.lanes, y, y_stride,
                     true);
}

void quantise_block(const Worker& worker, const WideRows& into, long at, const float* const* rows, long count,
                    long cols, long lanes) {
    auto put = [&](const QuantRows& layer, const float* const* from, float* rest) {
        const QuantRows to = skip_rows(layer, at, cols);
        worker.ops.quantize_rows(from, count, cols, lanes, const_cast<int8_t*>(to.codes), const_cast<float*>(to.scales),
                                 const_cast<int32_t*>(to.sums), rest);
    };
    if (!into.low.codes) return put(into.high, rows, nullptr);
    float* rest = worker.engine.scratch(worker.member, 7).array<float>(count * cols);
    put(into.high, rows, rest);
    const float* left[4];
    for (long i = 0; i < count; ++i) left[i] = rest + i * cols;
    put(into.low, left, nullptr);
}

void quantise_block(const Worker& worker, const WideRows& into, long at, const float* rows, long stride, long count,
                    long cols, long lanes) {
    const float* pointers[4];
    for (long i = 0; i < count; ++i) pointers[i] = rows + i * stride;
    quantise_block(worker, into, at, pointers, count, cols, lanes);
}

void add_moments(const float* rows, long stride, long count, long cols, float* out) {
    for (long t = 0; t < count; ++t)
        for (long i = 0; i < cols; ++i) out[i] += rows[t * stride + i] * rows[t * stride + i];
    out[cols] += float(count);
}

WideRows quantise_rows(const Worker& worker, QuantBuffer& into, const float* rows, long stride, long tokens, long cols,
                       long lanes, bool wide) {
    const WideRows out = into.reserve(tokens, cols, wide);
    for (long t = 0; t < tokens; t += lanes)
        quantise_block(worker, out, t, rows + t * stride, stride, std::min(lanes, tokens - t), cols, lanes);
    return out;
}

void reserve_input(Engine& engine, const Step& step, SharedInput& shared, const Input& input, bool quantised) {
    if (step.tokens <= kPrivateTokens) return;
    const long cols = engine.buffer_cols(input.buffer);
    if (input.norm) shared.rows.array<float>(step.tokens * cols);
    if (quantised) shared.quant.reserve(step.tokens, cols, input.wide);
}

Prepared prepare(const Worker& worker, SharedInput& shared, const Input& input, bool quantised, int stage) {
    const long tokens = worker.step.tokens, cols = worker.engine.buffer_cols(input.buffer);
    const float* x = worker.engine.buffer(input.buffer, tokens);
    Prepared out{x, cols, {}, lanes_for(tokens), tokens, cols};
    if (tokens <= kPrivateTokens) {
        if (input.norm) {
            float* rows = worker.engine.scratch(worker.member, 0).array<float>(tokens * cols);
            worker.ops.rms_norm(x, cols, input.norm, input.eps, rows, cols, tokens, cols);
            out.rows = rows;
        }
        if (quantised)
            out.quant = quantise_rows(worker, worker.engine.quant(worker.member), out.rows, cols, tokens, cols,
                                      out.lanes, input.wide);
        return out;
    }
    if (!input.norm && !quantised) return out;
    float* rows = input.norm ? shared.rows.array<float>(tokens * cols) : nullptr;
    const WideRows quant = quantised ? shared.quant.reserve(tokens, cols, input.wide) : WideRows{};
    long first, last;
    while (worker.next(stage, (tokens + 3) / 4, 1, first, last)) {
        const long t = first * 4, n = std::min(4L, tokens - t);
        const float* from = x + t * cols;
        if (rows) {
            worker.ops.rms_norm(from, cols, input.norm, input.eps, rows + t * cols, cols, n, cols);
            from = rows + t * cols;
        }
        if (!quantised) continue;
        quantise_block(worker, quant, t, from, cols, n, cols, 4);
    }
    worker.barrier();
    if (rows) out.rows = rows;
    out.quant = quant;
    return out;
}

}  // namespace shoal
