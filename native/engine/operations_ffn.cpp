#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "engine/operations.h"

namespace shoal {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr long kHiddenTiles = 2;  // 32 rows of gate and of up at a time
constexpr long kMaxExpertTiles = 8;
constexpr long kOwnChoices = 8;

PackedMatrix expert_of(const PackedMatrix& first, long expert) {
    PackedMatrix matrix = first;
    matrix.data += expert * first.bytes();
    return matrix;
}

}  // namespace

// The published routings, on one token's router scores. Ties go to the smaller index.
void FeedForward::route(const float* scores, int32_t* experts_out, float* weights_out) const {
    std::vector<float> probability(experts), choice(experts);
    if (sigmoid) {
        for (long e = 0; e < experts; ++e) probability[e] = 1.0f / (1.0f + std::exp(-scores[e]));
    } else {
        const float top = *std::max_element(scores, scores + experts);
        float total = 0;
        for (long e = 0; e < experts; ++e) total += probability[e] = std::exp(scores[e] - top);
        for (long e = 0; e < experts; ++e) probability[e] /= total;
    }
    for (long e = 0; e < experts; ++e) choice[e] = probability[e] + (bias ? bias[e] : 0.0f);
    if (groups > 1) {
        const long size = experts / groups;
        std::vector<float> value(groups);
        for (long g = 0; g < groups; ++g) {
            float best = kNever, second = kNever;
            for (long e = g * size; e < (g + 1) * size; ++e) {
                if (choice[e] > best)
                    second = best, best = choice[e];
                else if (choice[e] > second)
                    second = choice[e];
            }
            value[g] = top_two ? best + second : best;
        }
        for (long g = 0; g < groups; ++g) {
            const long ahead = std::count_if(value.begin(), value.end(), [&](float v) { return v > value[g]; }) +
                               std::count(value.begin(), value.begin() + g, value[g]);
            if (ahead >= groups_kept) std::fill(choice.begin() + g * size, choice.begin() + (g + 1) * size, kNever);
        }
    }
    float total = 0;
    for (long k = 0; k < active; ++k) {
        const long e = std::max_element(choice.begin(), choice.end()) - choice.begin();
        experts_out[k] = int32_t(e);
        weights_out[k] = probability[e];
        total += probability[e];
        choice[e] = kNever;
    }
    const float factor = normalise ? scaling / (total + 1e-20f) : scaling;
    for (long k = 0; k < active; ++k) weights_out[k] *= factor;
}

void FeedForward::last_routing(long tokens, int32_t* experts_out, float* weights_out, float* scores_out) const {
    std::copy_n(slots[0].chosen.begin(), tokens * active, experts_out);
    std::copy_n(slots[0].weight.begin(), tokens * active, weights_out);
    std::copy_n(const_cast<Scratch&>(logits).array<float>(0), tokens * experts, scores_out);
}

// In slots tokens keep their order: a token's experts add up in the same order always.
void FeedForward::group_slots(const Slots& picks, Slots& s, long tokens) const {
    s.offset.assign(experts + 1, 0);
    s.used.clear();
    for (long i = 0; i < tokens * active; ++i) ++s.offset[picks.chosen[i] + 1];
    s.quant_row.assign(experts + 1, 0);
    for (long e = 0; e < experts; ++e) {
        const long count = s.offset[e + 1];
        s.quant_row[e + 1] = s.quant_row[e] + round_up(count, 4);
        if (count > 0) s.used.push_back(int32_t(e));
        s.offset[e + 1] += s.offset[e];
    }
    s.token.resize(tokens * active);
    s.factor.resize(tokens * active);
    std::vector<long> at(s.offset.begin(), s.offset.end() - 1);
    for (long i = 0; i < tokens * active; ++i) {
        const long slot = at[picks.chosen[i]]++;
        s.token[slot] = int32_t(i / active);
        s.factor[slot] = picks.weight[i];
    }
}

template <class Add>
void FeedForward::hidden_chunk(const Worker& worker, const PackedMatrix& g, const PackedMatrix& u, const Prepared& x,
                               long first, long last, float* out, long stride, Add add) const {
    float* up_rows = worker.engine.scratch(worker.member, 4).array<float>(x.tokens * stride);
    multiply(worker.ops, g, x, first, last, out, stride, false);
    multiply(worker.ops, u, x, first, last, up_rows, stride, false);
    const long from = first * kTileRows, cols = std::min(last * kTileRows, g.rows) - from;
    add(out, up_rows, from, from + cols);
    worker.ops.silu_mul(out + from, stride, up_rows + from, stride, out + from, stride, x.tokens, cols);
}

void FeedForward::down_tiles(const Worker& worker, const Slots* s, long first, long last, float* x,
                             const Prepared& dense, const WideRows& routed, const float* low) {
    const long stride = worker.engine.buffer_cols(input.buffer);
    const long from = first * kTileRows, to = std::min(last * kTileRows, stride), cols = to - from;
    const Adapted &of_dense = adapted_dense.down, &of_experts = adapted_experts.down;
    if (has_dense) multiply(worker.ops, down, dense, first, last, x, stride, true);
    if (low) {
        if (of_dense.any()) expand(worker, of_dense, low, of_dense.width(), from, to, x, stride);
        low += worker.step.tokens * of_dense.width();
    }
    if (!s) return;
    const long width = expert_down.cols;
    long most = 0;
    for (const long e : s->used) most = std::max(most, s->count(e));
    float* product = worker.engine.scratch(worker.member, 5).array<float>(most * cols);
    for (size_t index = 0; index < s->used.size(); ++index) {
        const long e = s->used[index], count = s->count(e);
        const float* rows = hidden.array<float>(0) + s->offset[e] * width;
        const Prepared h{rows, width, routed.from_row(s->quant_row[e], width), lanes_for(count), count, width};
        multiply(worker.ops, expert_of(expert_down, e), h, first, last, product - from, cols, false);
        if (low && of_experts.any())
            expand_slots(worker, *s, of_experts, e, low, of_experts.width(), from, to, product - from, cols);
        for (long i = 0; i < count; ++i) {
            float* row = x + s->token[s->offset[e] + i] * stride + from;
            const float factor = s->factor[s->offset[e] + i];
            for (long c = 0; c < cols; ++c) row[c] += factor * product[i * cols + c];
        }
    }
}

bool FeedForward::quantises_input() const {
    return (has_dense && gate.quantised()) || (experts && expert_gate.quantised());
}

void FeedForward::reserve(Engine& engine, const Step& step) {
    reserve_input(engine, step, shared, input, quantises_input());
    const long tokens = step.tokens;
    if (has_dense) {
        dense_hidden.array<float>(tokens * gate.rows);
        if (down.quantised()) dense_quant.reserve(tokens, gate.rows, input.wide);
    }
    if (step.adapter) {
        const Mlp &d = adapted_dense, &e = adapted_experts;
        low_in.array<float>(tokens * (d.gate.width() + d.up.width()));
        low_experts_in.array<float>(tokens * active * (e.gate.width() + e.up.width()));
        low_out.array<float>(tokens * (d.down.width() + active * e.down.width()));
    }
    if (!experts) return;
    logits.array<float>(tokens * experts);
    hidden.array<float>(tokens * active * expert_gate.rows);
    slots.resize(engine.threads());
    for (Slots& s : slots) {
        s.chosen.resize(tokens * active);
        s.weight.resize(tokens * active);
    }
    if (!pieces_done) pieces_done = std::make_unique<std::atomic<long>[]>(experts);
    for (long e = 0; e < experts; ++e) pieces_done[e].store(0, std::memory_order_relaxed);
    // Every used expert may pad its rows to a multiple of four.
    const long rows = tokens * active + 4 * std::min(experts, tokens * active);
    if (expert_down.quantised()) hidden_quant.reserve(rows, expert_gate.rows, wide_experts);
}

void FeedForward::run(const Worker& worker) {
    const long tokens = worker.step.tokens, cols = worker.engine.buffer_cols(input.buffer);
    const Prepared x = prepare(worker, shared, input, quantises_input(), 0);
    float* dense_rows = dense_hidden.array<float>(0);
    const long dense_width = has_dense ? gate.rows : 0, router_tiles = experts ? router.tiles() : 0;
    const long pieces = has_dense ? (gate.tiles() + kHiddenTiles - 1) / kHiddenTiles : 0;
    const float* dense_low = shrink_dense(worker, x);
    auto add = [&](float* gate_rows, float* up_rows, long from, long to) {
        if (!dense_low) return;
        const auto& [g, u, d] = adapted_dense;
        const long stride = g.width() + u.width();
        expand(worker, g, dense_low, stride, from, to, gate_rows, dense_width);
        expand(worker, u, dense_low + g.width(), stride, from, to, up_rows, dense_width);
    };
    long first, last;
    while (worker.next(1, router_tiles + pieces, 1, first, last)) {
        if (first < router_tiles) {
            multiply(worker.ops, router, x, first, first + 1, logits.array<float>(0), experts, false);
            continue;
        }
        const long tile = (first - router_tiles) * kHiddenTiles;
        hidden_chunk(worker, gate, up, x, tile, std::min(tile + kHiddenTiles, gate.tiles()), dense_rows, dense_width,
                     add);
    }
    worker.barrier();
    if (worker.member == 0 && moments) add_moments(x.rows, x.stride, tokens, cols, moments);
    if (worker.member == 0 && hidden_moments && has_dense)
        add_moments(dense_rows, dense_width, tokens, dense_width, hidden_moments);
    Prepared dense{dense_rows, dense_width, {}, lanes_for(tokens), tokens, dense_width};
    auto quantise_dense = [&] {
        if (has_dense && down.quantised())
            dense.quant = quantise_dense_hidden(worker, dense_rows, dense_width, dense.lanes);
    };
    // Of many tokens before the experts, which wait for each other anyway; of few after them, in the place of x.
    if (tokens > kPrivateTokens) quantise_dense();
    WideRows routed{};
    Slots* s = experts ? &slots[worker.member] : nullptr;
    if (s) {
        choose_experts(worker, *s);
        routed = run_experts(worker, *s, x);
    }
    if (tokens <= kPrivateTokens) quantise_dense();
    const float* low = shrink_hidden(worker, s);
    const long tiles = (cols + kTileRows - 1) / kTileRows;
    float* out = worker.engine.buffer(input.buffer, tokens);
    const long grain = std::clamp(tiles / (2 * worker.engine.threads()), 1L, kMaxExpertTiles);
    while (worker.next(7, tiles, grain, first, last)) down_tiles(worker, s, first, last, out, dense, routed, low);
}

// Every member sorts the slots for itself, and chooses for itself if the tokens are few: it takes less than to wait.
void FeedForward::choose_experts(const Worker& worker, Slots& s) {
    const long tokens = worker.step.tokens;
    const float* scores = logits.array<float>(0);
    long first, last;
    Slots& picks = tokens > kOwnChoices ? slots[0] : s;
    auto choose = [&](long from, long to) {
        for (long t = from; t < to; ++t)
            route(scores + t * experts, &picks.chosen[t * active], &picks.weight[t * active]);
    };
    if (tokens > kOwnChoices) {
        while (worker.next(2, tokens, 8, first, last)) choose(first, last);
        worker.barrier();
    } else {
        choose(0, tokens);
    }
    group_slots(picks, s, tokens);
    if (worker.member == 0) expert_reads += s.used.size();
}

// The always-used MLP's hidden rows in int8, complete after the next barrier.
WideRows FeedForward::quantise_dense_hidden(const Worker& worker, const float* rows, long width, long lanes) {
    const long tokens = worker.step.tokens;
    if (tokens <= kPrivateTokens)
        return quantise_rows(worker, worker.engine.quant(worker.member), rows, width, tokens, width, lanes, input.wide);
    const WideRows out = dense_quant.reserve(tokens, width, input.wide);
    long first, last;
    while (worker.next(6, (tokens + 3) / 4, 1, first, last)) {
        const long t = first * 4;
        quantise_block(worker, out, t, rows + t * width, width, std::min(4L, tokens - t), width, lanes);
    }
    if (!experts) worker.barrier();  // else run_experts has one before they are needed
    return out;
}

// One expert's hidden rows in int8.
void FeedForward::quantise_expert(const Worker& worker, const Slots& s, long expert, const WideRows& into,
                                  const float* rows, long width) const {
    const long count = s.count(expert);
    for (long i = 0; i < count; i += 4)
        quantise_block(worker, into, s.quant_row[expert] + i, rows + (s.offset[expert] + i) * width, width,
                       std::min(4L, count - i), width, lanes_for(count));
}

// One expert's rows out of those of all tokens, which stand four by four, in memory of this member. Nothing looks at
// the products of the rows that fill up the last four, but their sums must not overflow.
WideRows FeedForward::gather_expert(const Worker& worker, const Slots& s, long expert, const WideRows& from,
                                    long cols) const {
    const long count = s.count(expert), lanes = lanes_for(count), groups = round_up(cols, kBlockCols) / kGroup;
    const WideRows out = worker.engine.quant(worker.member, 1).reserve(count, cols, wide_experts);
    auto copy = [&](const QuantRows& all, const QuantRows& some) {
        for (long i = 0; i < count; ++i) {
            const long token = s.token[s.offset[expert] + i], at = token / 4 * 4 * groups, from_lane = token % 4;
            const long to = i / lanes * lanes * groups, lane = i % lanes;
            const int8_t* codes = all.codes + at * kGroup + from_lane * 4;
            int8_t* to_codes = const_cast<int8_t*>(some.codes) + to * kGroup + lane * 4;
            for (long word = 0; word < groups * kGroup / 4; ++word)
                std::memcpy(to_codes + word * lanes * 4, codes + word * 16, 4);
            for (long g = 0; g < groups; ++g) {
                const_cast<float*>(some.scales)[to + g * lanes + lane] = all.scales[at + g * 4 + from_lane];
                const_cast<int32_t*>(some.sums)[to + g * lanes + lane] = all.sums[at + g * 4 + from_lane];
            }
        }
        for (long i = count; i < round_up(count, lanes); ++i)
            for (long g = 0; g < groups; ++g)
                const_cast<int32_t*>(some.sums)[(i / lanes * groups + g) * lanes + i % lanes] = 0;
    };
    copy(from.high, out.high);
    if (wide_experts) copy(from.low, out.low);
    return out;
}

// What each used expert met and made; its hidden rows must be complete.
void FeedForward::count_experts(const Slots& s, const Prepared& x) const {
    const long width = expert_gate.rows;
    const float* rows = const_cast<Scratch&>(hidden).array<float>(0);
    for (const long e : s.used) {
        for (long slot = s.offset[e]; slot < s.offset[e + 1]; ++slot)
            add_moments(x.rows + s.token[slot] * x.stride, x.stride, 1, x.cols, expert_moments + e * (x.cols + 1));
        add_moments(rows + s.offset[e] * width, width, s.count(e), width, expert_hidden_moments + e * (width + 1));
    }
}

// Gate and up of every used expert on its tokens; returns the hidden rows in int8 for the down projection.
WideRows FeedForward::run_experts(const Worker& worker, const Slots& s, const Prepared& x) {
    const long cols = x.cols, width = expert_gate.rows, tokens = worker.step.tokens, count_used = long(s.used.size());
    const bool quantised = expert_gate.quantised(), one = tokens == 1;
    float* rows = hidden.array<float>(0);
    const bool own_out = one || !expert_down.quantised();  // a lone token's few rows every member quantises for itself
    const WideRows out = own_out ? WideRows{} : hidden_quant.reserve(s.quant_row[experts], width, wide_experts);
    long first, last, gathered = -1;
    WideRows in{};
    const float* low = shrink_experts(worker, s, x);
    const long pieces = (expert_gate.tiles() + kHiddenTiles - 1) / kHiddenTiles;
    const long grain = one ? 1 : std::min(pieces, kMaxExpertTiles / kHiddenTiles);
    while (worker.next(4, count_used * pieces, grain, first, last)) {
        for (long piece = first, end; piece < last; piece = end) {  // those of one expert together
            end = std::min(last, piece / pieces * pieces + pieces);
            const long e = s.used[piece / pieces], tile = piece % pieces * kHiddenTiles, count = s.count(e);
            Prepared part{x.rows, x.stride, {x.quant.high, wide_experts ? x.quant.low : QuantRows{}}, 1, count, cols};
            if (!one && quantised) {
                if (gathered != e) in = gather_expert(worker, s, e, x.quant, cols);
                gathered = e;
                part.quant = in;
                part.lanes = lanes_for(count);
            } else if (!one) {  // float weights meet the rows themselves, gathered
                float* copy = worker.engine.scratch(worker.member, 6).array<float>(count * cols);
                for (long i = 0; i < count; ++i)
                    std::memcpy(copy + i * cols, x.rows + s.token[s.offset[e] + i] * x.stride, cols * sizeof(float));
                part.rows = copy;
                part.stride = cols;
            }
            auto add = [&](float* gate_rows, float* up_rows, long from, long to) {
                if (!low) return;
                const auto& [g, u, d] = adapted_experts;
                const long stride = g.width() + u.width();
                expand_slots(worker, s, g, e, low, stride, from, to, gate_rows, width);
                expand_slots(worker, s, u, e, low + g.width(), stride, from, to, up_rows, width);
            };
            hidden_chunk(worker, expert_of(expert_gate, e), expert_of(expert_up, e), part, tile,
                         std::min(tile + (end - piece) * kHiddenTiles, expert_gate.tiles()), rows + s.offset[e] * width,
                         width, add);
            if (!own_out && pieces_done[e].fetch_add(end - piece, std::memory_order_acq_rel) + end - piece == pieces)
                quantise_expert(worker, s, e, out, rows, width);
        }
    }
    worker.barrier();
    if (expert_moments && worker.member == 0) count_experts(s, x);
    if (!one || !expert_down.quantised()) return out;
    const WideRows own = worker.engine.quant(worker.member, 1).reserve(s.quant_row[experts], width, wide_experts);
    for (const long e : s.used) quantise_expert(worker, s, e, own, rows, width);
    return own;
}

// ---- what adapters add

const float* FeedForward::shrink_dense(const Worker& worker, const Prepared& x) {
    const auto& [g, u, d] = adapted_dense;
    if (!worker.step.adapter || !adapted_dense.any_in()) return nullptr;
    const long stride = g.width() + u.width();
    return low_rows(worker, low_in, 8, x.tokens, stride, [&](float* low, long first, long last) {
        shrink(worker, g, x.rows, x.stride, first, last, low, stride);
        shrink(worker, u, x.rows, x.stride, first, last, low + g.width(), stride);
    });
}

// Slots [first, last) of all experts, whose rows `row(slot)` finds.
template <class Row>
void FeedForward::shrink_slots(const Worker& worker, const Slots& s, const Adapted& adapted, long first, long last,
                               Row row, float* low, long stride) const {
    for (const long e : s.used) {
        for (long slot = std::max(first, s.offset[e]); slot < std::min(last, s.offset[e + 1]); ++slot) {
            if (const LowRank* pair = adapted.find(worker.step.adapter[s.token[slot]], e))
                worker.ops.lora_shrink(row(slot), 0, 1, adapted.cols, pair->a, pair->rank, pair->scale,
                                       low + slot * stride, stride);
        }
    }
}

// One expert's slots; y holds their rows after one another.
void FeedForward::expand_slots(const Worker& worker, const Slots& s, const Adapted& adapted, long expert,
                               const float* low, long low_stride, long from, long to, float* y, long stride) const {
    for (long slot = s.offset[expert]; slot < s.offset[expert + 1]; ++slot) {
        if (const LowRank* pair = adapted.find(worker.step.adapter[s.token[slot]], expert))
            worker.ops.lora_expand(low + slot * low_stride, low_stride, 1, pair->rank, pair->b + from, adapted.rows,
                                   to - from, y + (slot - s.offset[expert]) * stride + from, stride);
    }
}

const float* FeedForward::shrink_experts(const Worker& worker, const Slots& s, const Prepared& x) {
    const auto& [g, u, d] = adapted_experts;
    if (!worker.step.adapter || !adapted_experts.any_in()) return nullptr;
    const long stride = g.width() + u.width();
    auto row = [&](long slot) { return x.rows + s.token[slot] * x.stride; };
    return low_rows(worker, low_experts_in, 9, x.tokens * active, stride, [&](float* low, long first, long last) {
        shrink_slots(worker, s, g, first, last, row, low, stride);
        shrink_slots(worker, s, u, first, last, row, low + g.width(), stride);
    });
}

// Both hidden parts are complete when this is called.
const float* FeedForward::shrink_hidden(const Worker& worker, const Slots* s) {
    const Adapted &of_dense = adapted_dense.down, &of_experts = adapted_experts.down;
    if (!worker.step.adapter || !(of_dense.any() || of_experts.any())) return nullptr;
    const long tokens = worker.step.tokens, slots_from = tokens * of_dense.width();
    const long count = s ? tokens * active : 0, members = worker.engine.threads();
    const float *dense_rows = dense_hidden.array<float>(0), *rows = hidden.array<float>(0);
    auto row = [&](long slot) { return rows + slot * of_experts.cols; };
    auto fill = [&](float* low, long member, long of) {
        shrink(worker, of_dense, dense_rows, of_dense.cols, tokens * member / of, tokens * (member + 1) / of, low,
               of_dense.width());
        if (s)
            shrink_slots(worker, *s, of_experts, count * member / of, count * (member + 1) / of, row, low + slots_from,
                         of_experts.width());
    };
    if (tokens <= kPrivateTokens) {
        float* low = worker.engine.scratch(worker.member, 10).array<float>(slots_from + count * of_experts.width());
        fill(low, 0, 1);
        return low;
    }
    float* low = low_out.array<float>(0);
    fill(low, worker.member, members);
    worker.barrier();
    return low;
}

}  // namespace shoal
