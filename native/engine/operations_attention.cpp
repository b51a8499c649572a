#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/operations.h"
#include "engine/pack.h"

namespace shoal {
namespace {

// Rotates pairs (x0, x1), (x2, x3) … or (x0, x_half) …; the result keeps the pairs' places.
void rotate(float* x, const float* cosines, const float* sines, long half, bool interleave) {
    for (long i = 0; i < half; ++i) {
        float& a = interleave ? x[2 * i] : x[i];
        float& b = interleave ? x[2 * i + 1] : x[i + half];
        const float first = a, second = b;
        a = first * cosines[i] - second * sines[i];
        b = second * cosines[i] + first * sines[i];
    }
}

void fold(float* state, const float* part, long lanes, long width) {
    float *top = state, *total = state + 16, *rows = state + kLaneState;
    const float *top2 = part, *total2 = part + 16, *rows2 = part + kLaneState;
    for (long lane = 0; lane < lanes; ++lane) {
        const float highest = std::max(top[lane], top2[lane]);
        const float keep = std::exp(top[lane] - highest), gain = std::exp(top2[lane] - highest);
        top[lane] = highest;
        total[lane] = total[lane] * keep + total2[lane] * gain;
        for (long i = 0; i < width; ++i)
            rows[lane * width + i] = rows[lane * width + i] * keep + rows2[lane * width + i] * gain;
    }
}

struct Place {
    uint8_t* page;
    long slot;
};

Place place_of(const Worker& worker, long row, long layer) {
    const Step& step = worker.step;
    const long position = step.position[row];
    const long page = step.pages[step.sequence_of(row) * step.max_pages + position / kPageTokens];
    return {worker.engine.cache_page(page, layer), position % kPageTokens};
}

}  // namespace

void clear_state(float* state, long lanes, long width) {
    std::fill(state, state + 16, -1e30f);
    std::fill(state + 16, state + kLaneState + lanes * width, 0.0f);
}

void store_rows(const Worker& worker, bool bf16, const float* rows, long stride, float factor, void* out,
                long out_stride, long count, long width) {
    if (bf16)
        return worker.ops.narrow_rows(rows, stride, factor, static_cast<uint16_t*>(out), out_stride, count, width);
    for (long row = 0; row < count; ++row)
        for (long i = 0; i < width; ++i)
            static_cast<float*>(out)[row * out_stride + i] = rows[row * stride + i] * factor;
}

namespace {

template <class Unit>
void spread(const Unit* line, long count, long lane, long lanes, void* packed) {
    for (long k = 0; k < count; ++k) static_cast<Unit*>(packed)[k * lanes + lane] = line[k];
}

}  // namespace

void pack_lane(const void* line, long width, bool bf16, long lane, long lanes, void* packed) {
    if (lanes == 8) return spread(static_cast<const uint64_t*>(line), width / 4, lane, lanes, packed);
    spread(static_cast<const uint32_t*>(line), bf16 ? width / 2 : width, lane, lanes, packed);
}

void CacheMla::run(const Worker& worker) {
    const long tokens = worker.step.tokens, half = rope / 2, width = latent + rope;
    const float* cos_TR = worker.engine.buffer(cosines, tokens);
    const float* sin_TR = worker.engine.buffer(sines, tokens);
    float* q = worker.engine.buffer(query, tokens);
    float* c = worker.engine.buffer(compressed, tokens);
    const CacheType type = worker.engine.cache_type();
    long first, last;
    while (worker.next(0, tokens, 1, first, last)) {
        const float *cosine = cos_TR + first * half, *sine = sin_TR + first * half;
        for (long n = 0; n < heads; ++n)
            rotate(q + first * heads * (nope + rope) + n * (nope + rope) + nope, cosine, sine, half, interleave);
        float* row = c + first * width;
        worker.ops.rms_norm(row, width, norm, eps, row, width, 1, latent);
        rotate(row + latent, cosine, sine, half, interleave);
        const Place place = place_of(worker, first, layer);
        store_cache_row(type, place.page + place.slot * cache_row_bytes(type, width), row, width);
    }
}

void CacheGqa::run(const Worker& worker) {
    const long tokens = worker.step.tokens, half = head_dim / 2;
    const float* cos_TR = worker.engine.buffer(cosines, tokens);
    const float* sin_TR = worker.engine.buffer(sines, tokens);
    float* q = worker.engine.buffer(query, tokens);
    float* k = worker.engine.buffer(key, tokens);
    float* v = worker.engine.buffer(value, tokens);
    const CacheType type = worker.engine.cache_type();
    const long bytes = cache_row_bytes(type, head_dim), head_page = kPageTokens * bytes, group = heads / kv_heads;
    long first, last;
    // A key head with its queries at a time, so that a lone token's are shared out too.
    while (worker.next(0, tokens * kv_heads, tokens == 1 ? 1 : kv_heads, first, last)) {
        for (long unit = first; unit < last; ++unit) {
            const long row = unit / kv_heads, n = unit % kv_heads;
            const float *cosine = cos_TR + row * half, *sine = sin_TR + row * half;
            float* q_rows = q + (row * kv_heads + n) * group * head_dim;
            float* k_row = k + unit * head_dim;
            if (query_norm) worker.ops.rms_norm(q_rows, head_dim, query_norm, eps, q_rows, head_dim, group, head_dim);
            if (key_norm) worker.ops.rms_norm(k_row, head_dim, key_norm, eps, k_row, head_dim, 1, head_dim);
            for (long i = 0; i < group; ++i) rotate(q_rows + i * head_dim, cosine, sine, half, interleave);
            rotate(k_row, cosine, sine, half, interleave);
            const Place place = place_of(worker, row, layer);
            uint8_t* at = place.page + n * head_page + place.slot * bytes;
            store_cache_row(type, at, k_row, head_dim);
            store_cache_row(type, at + kv_heads * head_page, v + unit * head_dim, head_dim);
        }
    }
}

void Attention::reserve(Engine& engine, const Step& step) {
    work.clear();
    chunk_start.assign(1, 0);
    const long group = heads / kv_heads;
    for (long s = 0; s < step.sequences; ++s) {
        if (step.is_expanded(s)) continue;
        const long lanes = (step.first_row[s + 1] - step.first_row[s]) * group;
        for (long n = 0; n < kv_heads; ++n) {
            for (long first = 0; first < lanes; first += 16) {
                const long count = std::min(16L, lanes - first);
                const long keys = step.position[step.first_row[s] + (first + count - 1) / group] + 1;
                work.push_back({s, n, first, count, keys});
                chunk_start.push_back(chunk_start.back() + (keys + kChunk - 1) / kChunk);
            }
        }
    }
    split = long(work.size()) < 4 * engine.threads();
    if (split) partial.array<float>(chunk_start.back() * (kLaneState + 16 * value_width));
    reserve_expanded(step);
}

void Attention::load_queries(const Worker& worker, const Block& block, void* packed, int32_t* last_key) const {
    const Step& step = worker.step;
    const long group = heads / kv_heads, own_width = rotary < 0 ? key_width : query_step;
    const float* q = worker.engine.buffer(query, step.tokens);
    const float* r = rotary < 0 ? nullptr : worker.engine.buffer(rotary, step.tokens);
    const long q_stride = worker.engine.buffer_cols(query), r_stride = r ? worker.engine.buffer_cols(rotary) : 0;
    const bool bf16 = worker.engine.cache_type() != CacheType::f32;
    const long lanes = query_lanes(bf16, block.lanes, key_width), size = bf16 ? 2 : 4;
    uint8_t* line = worker.engine.scratch(worker.member, 4).bytes(key_width * size);
    if (block.lanes < lanes) std::memset(packed, 0, key_width * lanes * size);
    std::fill(last_key + block.lanes, last_key + 16, -1);
    for (long lane = 0; lane < block.lanes; ++lane) {
        const long flat = block.first_lane + lane;
        const long row = step.first_row[block.sequence] + flat / group, head = block.kv_head * group + flat % group;
        last_key[lane] = step.position[row];
        store_rows(worker, bf16, q + row * q_stride + head * query_step, 0, scale, line, 0, 1, own_width);
        if (r)
            store_rows(worker, bf16, r + row * r_stride + rotary_first + head * rotary_step, 0, scale,
                       line + own_width * size, 0, 1, key_width - own_width);
        pack_lane(line, key_width, bf16, lane, lanes, packed);
    }
}

void Attention::attend_chunk(const Worker& worker, const Block& block, const void* queries, const int32_t* last_key,
                             long chunk, float* state) const {
    const Step& step = worker.step;
    const CacheType type = worker.engine.cache_type();
    const long key_bytes = cache_row_bytes(type, key_width), value_bytes = cache_row_bytes(type, value_width);
    clear_state(state, block.lanes, value_width);
    for (long first = chunk * kChunk; first < std::min(block.keys, (chunk + 1) * kChunk); first += kPageTokens) {
        const long page = step.pages[block.sequence * step.max_pages + first / kPageTokens];
        const long count = std::min(kPageTokens, block.keys - first);
        const uint8_t* k = worker.engine.cache_page(page, layer);
        const uint8_t* v = k;
        if (!shared_values) {
            v = k + kPageTokens * (kv_heads * key_bytes + block.kv_head * value_bytes);
            k += kPageTokens * block.kv_head * key_bytes;
        }
        if (type == CacheType::int8) {  // the block in bf16, in memory that stays in the nearest cache
            const bool same = k == v;
            k = widen(worker, 5, k, count, key_width);
            v = same ? k : widen(worker, 6, v, count, value_width);
        }
        const AttendRun run{type != CacheType::f32,
                            queries,
                            int(block.lanes),
                            query_lanes(type != CacheType::f32, block.lanes, key_width),
                            k,
                            v,
                            key_width,
                            shared_values ? key_width : value_width,
                            key_width,
                            value_width,
                            count,
                            first,
                            last_key};
        worker.ops.attend(&run, state, state + 16, state + kLaneState);
    }
}

const uint8_t* Attention::widen(const Worker& worker, int slot, const uint8_t* rows, long count, long width) const {
    auto* out = worker.engine.scratch(worker.member, slot).array<uint16_t>(kPageTokens * width);
    worker.ops.widen_rows(rows, cache_row_bytes(CacheType::int8, width), round_up(width, 4), count, width, out);
    return reinterpret_cast<const uint8_t*>(out);
}

void Attention::finish(const Worker& worker, const Block& block, const float* total, const float* rows) const {
    const Step& step = worker.step;
    const long group = heads / kv_heads, stride = worker.engine.buffer_cols(out);
    float* y = worker.engine.buffer(out, step.tokens);
    for (long lane = 0; lane < block.lanes; ++lane) {
        const long flat = block.first_lane + lane;
        const long row = step.first_row[block.sequence] + flat / group, head = block.kv_head * group + flat % group;
        const float inverse = 1.0f / total[lane];
        for (long i = 0; i < value_width; ++i)
            y[row * stride + head * value_width + i] = rows[lane * value_width + i] * inverse;
    }
}

void Attention::run(const Worker& worker) {
    if (!expansion.sequences.empty()) run_expanded(worker);
    run_absorbed(worker);
}

void Attention::run_absorbed(const Worker& worker) {
    const long state = kLaneState + 16 * value_width, blocks = long(work.size());
    alignas(64) int32_t last_key[16];
    float* packed = worker.engine.scratch(worker.member, 2).array<float>(key_width * 16);
    long first, last;
    if (!split) {
        float* merged = worker.engine.scratch(worker.member, 3).array<float>(2 * state);
        while (worker.next(0, blocks, 1, first, last)) {
            const Block& block = work[blocks - 1 - first];  // the longest first
            load_queries(worker, block, packed, last_key);
            attend_chunk(worker, block, packed, last_key, 0, merged);
            for (long chunk = 1; chunk * kChunk < block.keys; ++chunk) {
                attend_chunk(worker, block, packed, last_key, chunk, merged + state);
                fold(merged, merged + state, block.lanes, value_width);
            }
            finish(worker, block, merged + 16, merged + kLaneState);
        }
        return;
    }
    float* parts = partial.array<float>(0);
    while (worker.next(1, chunk_start.back(), 1, first, last)) {
        const long index = std::upper_bound(chunk_start.begin(), chunk_start.end(), first) - chunk_start.begin() - 1;
        load_queries(worker, work[index], packed, last_key);
        float* part = parts + first * state;
        attend_chunk(worker, work[index], packed, last_key, first - chunk_start[index], part);
        if (chunk_start[index + 1] - chunk_start[index] == 1) finish(worker, work[index], part + 16, part + kLaneState);
    }
    if (chunk_start.back() == blocks) return;  // every block was one chunk
    worker.barrier();
    while (worker.next(2, blocks, 1, first, last)) {
        if (chunk_start[first + 1] - chunk_start[first] == 1) continue;
        float* merged = parts + chunk_start[first] * state;
        for (long chunk = chunk_start[first] + 1; chunk < chunk_start[first + 1]; ++chunk)
            fold(merged, parts + chunk * state, work[first].lanes, value_width);
        finish(worker, work[first], merged + 16, merged + kLaneState);
    }
}

}  // namespace shoal
