// Attention in MLA's expanded form: latents become each head's keys and values again, a page at a time, and the pieces
// of a prompt meet those. A head's page stays in the nearest caches while all queries of the piece pass over it.
//
// Keys are those of the cache, rounded as the cache rounds them, and pages are folded in order: no bit depends on how a
// prompt was cut into pieces.
#include <algorithm>
#include <cstring>

#include "engine/operations.h"
#include "engine/pack.h"

namespace shoal {
namespace {

constexpr int kLatentStage = 3, kHeadStage = 4;  // behind those of the absorbed form

}  // namespace

void Attention::reserve_expanded(const Step& step) {
    Expansion& e = expansion;
    e.sequences.clear();
    e.first_page.assign(1, 0);
    for (long s = 0; s < step.sequences && !e.keys.empty(); ++s) {
        if (!step.is_expanded(s) || step.first_row[s] == step.first_row[s + 1]) continue;
        const long keys = step.position[step.first_row[s + 1] - 1] + 1;
        e.sequences.push_back(s);
        e.first_page.push_back(e.first_page.back() + (keys + kPageTokens - 1) / kPageTokens);
    }
    const long rows = e.first_page.back() * kPageTokens;
    if (rows == 0) return;
    e.memory->rows.array<float>(rows * e.row_width());
    if (e.quantised()) e.memory->latents.reserve(rows, e.latent(), e.wide);
}

// Page `page` of the index-th expanded sequence, from the cache to the memory of the expansion.
void Attention::read_latents(const Worker& worker, long index, long page) const {
    const Expansion& e = expansion;
    const Step& step = worker.step;
    const long s = e.sequences[index], latent = e.latent(), width = latent + e.rope, kept = e.row_width();
    const long keys = step.position[step.first_row[s + 1] - 1] + 1, at = (e.first_page[index] + page) * kPageTokens;
    const long count = std::min(kPageTokens, keys - page * kPageTokens);
    const CacheType type = worker.engine.cache_type();
    const uint8_t* cached = worker.engine.cache_page(step.pages[s * step.max_pages + page], layer);
    if (type == CacheType::int8) cached = widen(worker, 5, cached, count, width);
    float* rows = worker.engine.scratch(worker.member, 4).array<float>(kPageTokens * width);
    for (long i = 0; i < count * width; ++i)
        rows[i] = type == CacheType::f32 ? reinterpret_cast<const float*>(cached)[i]
                                         : bf16_to_float(reinterpret_cast<const uint16_t*>(cached)[i]);
    float* out = e.memory->rows.array<float>(0) + at * kept;
    for (long t = 0; t < count; ++t)
        std::memcpy(out + t * kept, rows + t * width + (width - kept), kept * sizeof(float));
    if (!e.quantised()) return;
    const WideRows into = e.memory->latents.reserve(e.first_page.back() * kPageTokens, latent, e.wide);
    for (long t = 0; t < count; t += 4)
        quantise_block(worker, into, at + t, rows + t * width, width, std::min(4L, count - t), latent, 4);
}

// Keys [count, H + R] and values [count, V] of one head, from row `at` of the expansion's memory.
void Attention::expand_page(const Worker& worker, long head, long at, long count, uint8_t* keys_out,
                            uint8_t* values_out) const {
    const Expansion& e = expansion;
    const PackedMatrix &to_key = e.keys[head], &to_value = e.values[head];
    const bool bf16 = worker.engine.cache_type() != CacheType::f32;
    const long nope = to_key.rows, width = nope + e.rope, values = to_value.rows, size = bf16 ? 2 : 4;
    const float* rows = e.memory->rows.array<float>(0) + at * e.row_width();
    Prepared x{rows, e.row_width(), {}, 4, count, e.latent()};
    if (e.quantised())
        x.quant =
            e.memory->latents.reserve(e.first_page.back() * kPageTokens, e.latent(), e.wide).from_row(at, e.latent());
    float* product = worker.engine.scratch(worker.member, 0).array<float>(kPageTokens * std::max(nope, values));
    multiply(worker.ops, to_key, x, 0, to_key.tiles(), product, nope, false);
    store_rows(worker, bf16, product, nope, 1.0f, keys_out, width, count, nope);
    const float* rotary_keys = rows + e.row_width() - e.rope;
    store_rows(worker, bf16, rotary_keys, e.row_width(), 1.0f, keys_out + nope * size, width, count, e.rope);
    multiply(worker.ops, to_value, x, 0, to_value.tiles(), product, values, false);
    store_rows(worker, bf16, product, values, 1.0f, values_out, values, count, values);
}

void Attention::attend_expanded(const Worker& worker, long index, long head) const {
    const Expansion& e = expansion;
    const Step& step = worker.step;
    const long s = e.sequences[index], first_row = step.first_row[s], rows = step.first_row[s + 1] - first_row;
    const long blocks = (rows + 15) / 16, nope = e.keys[head].rows, width = nope + e.rope, values = e.values[head].rows;
    const long start = step.position[first_row], state = kLaneState + 16 * values;
    const bool bf16 = worker.engine.cache_type() != CacheType::f32;
    const long size = bf16 ? 2 : 4, heads_width = worker.engine.buffer_cols(rotary);
    const float* q = worker.engine.buffer(rotary, step.tokens) + first_row * heads_width + head * width;
    uint8_t* queries = worker.engine.scratch(worker.member, 2).bytes(blocks * 16 * width * size);
    float* states = worker.engine.scratch(worker.member, 3).array<float>(blocks * state);
    uint8_t* line = worker.engine.scratch(worker.member, 4).bytes(width * size);
    if (rows % 16 != 0) std::memset(queries + rows / 16 * 16 * width * size, 0, 16 * width * size);
    for (long row = 0; row < rows; ++row) {
        store_rows(worker, bf16, q + row * heads_width, 0, scale, line, 0, 1, width);
        pack_lane(line, width, bf16, row % 16, 16, queries + row / 16 * 16 * width * size);
    }
    for (long b = 0; b < blocks; ++b) clear_state(states + b * state, 16, values);
    uint8_t* page_keys = worker.engine.scratch(worker.member, 5).bytes(kPageTokens * width * size);
    uint8_t* page_values = worker.engine.scratch(worker.member, 6).bytes(kPageTokens * values * size);
    for (long page = 0; page < e.first_page[index + 1] - e.first_page[index]; ++page) {
        const long first_key = page * kPageTokens, count = std::min(kPageTokens, start + rows - first_key);
        expand_page(worker, head, (e.first_page[index] + page) * kPageTokens, count, page_keys, page_values);
        for (long b = std::max(0L, first_key - start) / 16; b < blocks; ++b) {
            const long used = std::min(16L, rows - b * 16), seen = start + b * 16 + used - first_key;
            int32_t last_key[16];
            for (long lane = 0; lane < 16; ++lane) last_key[lane] = lane < used ? int32_t(start + b * 16 + lane) : -1;
            const AttendRun run{bf16,
                                queries + b * 16 * width * size,
                                int(used),
                                16,
                                page_keys,
                                page_values,
                                width,
                                values,
                                width,
                                values,
                                std::min(count, seen),
                                first_key,
                                last_key};
            float* own = states + b * state;
            worker.ops.attend(&run, own, own + 16, own + kLaneState);
        }
    }
    const long out_width = worker.engine.buffer_cols(e.out);
    float* y = worker.engine.buffer(e.out, step.tokens) + first_row * out_width + head * values;
    for (long row = 0; row < rows; ++row) {
        const float* own = states + row / 16 * state;
        const float inverse = 1.0f / own[16 + row % 16];
        for (long i = 0; i < values; ++i) y[row * out_width + i] = own[kLaneState + row % 16 * values + i] * inverse;
    }
}

void Attention::run_expanded(const Worker& worker) {
    const Expansion& e = expansion;
    long first, last;
    while (worker.next(kLatentStage, e.first_page.back(), 1, first, last)) {
        const long index = std::upper_bound(e.first_page.begin(), e.first_page.end(), first) - e.first_page.begin() - 1;
        read_latents(worker, index, first - e.first_page[index]);
    }
    worker.barrier();
    while (worker.next(kHeadStage, long(e.sequences.size()) * heads, 1, first, last))
        attend_expanded(worker, first / heads, first % heads);
}

}  // namespace shoal
