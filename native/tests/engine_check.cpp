// The executor on two tiny random models, without Python: for sanitizers and for emulators. Every result must be the
// same to the last bit whatever the number of threads, the chunks in which tokens come, and the sequences beside them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "engine/operations.h"
#include "engine/pack.h"
#include "shoal/dispatch.h"

namespace {

using shoal::PackedMatrix;
using shoal::Packing;
using Logits = std::vector<float>;

constexpr long kVocabulary = 67, kHidden = 80, kPages = 10;

struct Setup {
    bool mla;
    Packing packing;
    shoal::CacheType cache;
    bool wide;
    int threads;
    bool adapted = false;   // text 0 runs with adapter 0, text 1 with adapter 1, text 2 with none
    bool expanded = false;  // MLA: text 0 meets keys and values, whoever runs beside it latents
};

// Owns the weights that the plan points into.
class Model {
  public:
    explicit Model(const Setup& setup) : setup_(setup), engine_(setup.threads) {
        hidden_ = engine_.add_buffer(kHidden);
        const long rope = setup.mla ? 6 : 16;
        cosines_ = engine_.add_buffer(rope / 2);
        sines_ = engine_.add_buffer(rope / 2);
        const PackedMatrix table = matrix(kVocabulary, kHidden, 1.0f);
        auto& embed = add<shoal::Embed>(false);
        embed.table = table;
        embed.out = hidden_;
        auto& tables = add<shoal::RopeTable>();
        for (long i = 0; i < rope / 2; ++i) tables.inverse_frequency.push_back(1.0f / float(1 << i));
        tables.cosines = cosines_;
        tables.sines = sines_;
        for (long layer = 0; layer < 2; ++layer) {
            setup.mla ? mla_layer(layer) : gqa_layer(layer);
            feed_forward(setup.mla && layer == 1);
        }
        auto& head = add<shoal::Head>(false);
        head.input = input();
        head.weight = table;
        look_ahead(table);
        const long row = setup.mla ? shoal::cache_row_bytes(setup.cache, kLatent + 6)
                                   : 2 * 2 * shoal::cache_row_bytes(setup.cache, 16);
        engine_.set_cache(2, shoal::kPageTokens * row, setup.cache, kPages);
    }

    struct Slice {
        long first, last;  // tokens of the text
        std::vector<int32_t> pages;
        int text;
    };

    // Logits after every token of the slices, whose texts are fixed by their number.
    Logits run(const std::vector<Slice>& slices, size_t program = 0) {
        std::vector<int32_t> token, position, first_row{0}, pages, rows, adapter;
        std::vector<uint8_t> expanded;
        for (const Slice& slice : slices) {
            adapter.insert(adapter.end(), slice.last - slice.first, slice.text < 2 ? slice.text : -1);
            expanded.push_back(setup_.expanded && slice.text == 0);
            for (long t = slice.first; t < slice.last; ++t) {
                token.push_back(int32_t((t * t * 7 + t * 13 + slice.text * 31) % kVocabulary));
                position.push_back(int32_t(t));
                rows.push_back(int32_t(rows.size()));
            }
            first_row.push_back(int32_t(token.size()));
            pages.insert(pages.end(), slice.pages.begin(), slice.pages.end());
        }
        Logits logits(token.size() * kVocabulary);
        shoal::Step step;
        step.tokens = step.outputs = long(token.size());
        step.token = token.data();
        step.position = position.data();
        step.sequences = long(slices.size());
        step.first_row = first_row.data();
        step.pages = pages.data();
        step.max_pages = long(slices[0].pages.size());
        step.output_row = rows.data();
        step.logits = logits.data();
        step.source = rows.data();
        step.adapter = setup_.adapted && program == 0 ? adapter.data() : nullptr;
        step.expanded = expanded.data();
        engine_.run(program, step);
        return logits;
    }

  private:
    static constexpr long kHeads = 3, kNope = 10, kLatent = 22, kValue = 9;

    template <class Op>
    Op& add(bool barrier = true) {
        auto op = std::make_unique<Op>();
        Op& out = *op;
        op->barrier_after = barrier;
        engine_.add(program_, std::move(op));
        return out;
    }

    shoal::Input input() { return {hidden_, ones(kHidden), 1e-5f, setup_.wide}; }

    float random() {
        seed_ = seed_ * 1664525u + 1013904223u;
        return float(seed_ >> 8) / 8388608.0f - 1.0f;
    }

    const float* ones(long count) {
        floats_.push_back(std::make_unique<std::vector<float>>(count));
        for (float& value : *floats_.back()) value = 1.0f + 0.1f * random();
        return floats_.back()->data();
    }

    // `count` equal matrices after one another.
    PackedMatrix matrix(long rows, long cols, float spread, long count = 1, Packing packing = Packing(-1)) {
        PackedMatrix out{packing == Packing(-1) ? setup_.packing : packing, rows, cols, nullptr};
        bytes_.push_back(std::make_unique<std::vector<uint8_t>>(out.bytes() * count));
        std::vector<float> values(rows * cols);
        for (long i = 0; i < count; ++i) {
            for (float& value : values) value = spread * random();
            const shoal::SourceRows source{shoal::Source::f32, reinterpret_cast<const uint8_t*>(values.data()),
                                           cols * 4};
            shoal::pack_rows(source, rows, cols, out.packing, bytes_.back()->data() + i * out.bytes(), 2);
        }
        out.data = bytes_.back()->data();
        return out;
    }

    // Two adapters of ranks 0 to 2, in blocks of their exact size.
    void adapt(shoal::Adapted& at, const PackedMatrix& weight, long count = 1) {
        at.rows = weight.rows, at.cols = weight.cols, at.count = count;
        for (long adapter = 0; setup_.adapted && adapter < 2; ++adapter) {
            std::vector<shoal::LowRank> stack;
            for (long i = 0; i < count; ++i) {
                const long rank = (i + adapter + 1) % 3;
                stack.push_back({halves(rank * at.cols), halves(rank * at.rows), rank, 0.7f});
            }
            at.set(size_t(adapter), std::move(stack));
        }
    }

    const uint16_t* halves(long count) {
        halves_.push_back(std::make_unique<uint16_t[]>(size_t(count)));
        for (long i = 0; i < count; ++i) halves_.back()[i] = shoal::float_to_bf16(0.2f * random());
        return halves_.back().get();
    }

    void linear(long in, const float* norm, std::vector<std::pair<PackedMatrix, long>> parts, bool add_to) {
        auto& op = add<shoal::Linear>();
        op.input = {in, norm, 1e-5f, setup_.wide};
        op.add_to = add_to;
        for (const auto& [weight, out] : parts) op.parts.push_back({weight, add_to ? ones(weight.rows) : nullptr, out});
        for (auto& part : op.parts)
            if (program_ == 0) adapt(part.adapted, part.weight);
    }

    void heads(long in, long in_step, PackedMatrix weight, long out, long out_step) {
        auto& op = add<shoal::HeadLinear>();
        for (long n = 0; n < kHeads; ++n, weight.data += weight.bytes()) op.weights.push_back(weight);
        adapt(op.adapted, op.weights[0], kHeads);
        op.in = in, op.in_first = 0, op.in_step = in_step, op.wide = setup_.wide;
        op.out = out, op.out_first = 0, op.out_step = out_step;
    }

    void mla_layer(long layer) {
        const long rope = 6, head = kNope + rope;
        const long query = engine_.add_buffer(kHeads * head), compressed = engine_.add_buffer(kLatent + rope);
        const long absorbed = engine_.add_buffer(kHeads * kLatent), weighted = engine_.add_buffer(kHeads * kLatent);
        const long values = engine_.add_buffer(kHeads * kValue);
        linear(hidden_, ones(kHidden),
               {{matrix(kHeads * head, kHidden, 0.3f), query}, {matrix(kLatent + rope, kHidden, 0.2f), compressed}},
               false);
        auto& cache = add<shoal::CacheMla>(false);
        cache.layer = layer, cache.query = query, cache.heads = kHeads, cache.nope = kNope, cache.rope = rope;
        cache.latent = kLatent, cache.compressed = compressed, cache.norm = ones(kLatent), cache.eps = 1e-6f;
        cache.cosines = cosines_, cache.sines = sines_, cache.interleave = true;
        heads(query, head, matrix(kLatent, kNope, 0.4f, kHeads), absorbed, kLatent);
        auto& op = attention(layer, absorbed, kLatent, query, kNope, head, 1, kLatent + rope, kLatent, weighted);
        const PackedMatrix to_values = matrix(kValue, kLatent, 0.4f, kHeads);
        if (setup_.expanded) {
            PackedMatrix key = matrix(kNope, kLatent, 0.4f, kHeads), value = to_values;
            for (long n = 0; n < kHeads; ++n, key.data += key.bytes(), value.data += value.bytes()) {
                op.expansion.keys.push_back(key);
                op.expansion.values.push_back(value);
            }
            op.expansion.rope = rope, op.expansion.out = values, op.expansion.wide = setup_.wide;
            op.expansion.memory = &expansion_memory_;
        }
        heads(weighted, kLatent, to_values, values, kValue);
        linear(values, nullptr, {{matrix(kHidden, kHeads * kValue, 0.3f), hidden_}}, true);
    }

    void gqa_layer(long layer) {
        const long width = 16, kv_heads = 2, heads = 4;
        const long query = engine_.add_buffer(heads * width), attended = engine_.add_buffer(heads * width);
        const long key = engine_.add_buffer(kv_heads * width), value = engine_.add_buffer(kv_heads * width);
        linear(hidden_, ones(kHidden),
               {{matrix(heads * width, kHidden, 0.3f), query},
                {matrix(kv_heads * width, kHidden, 0.3f), key},
                {matrix(kv_heads * width, kHidden, 0.3f), value}},
               false);
        auto& cache = add<shoal::CacheGqa>();
        cache.layer = layer, cache.query = query, cache.key = key, cache.value = value;
        cache.heads = heads, cache.kv_heads = kv_heads, cache.head_dim = width;
        cache.query_norm = layer ? ones(width) : nullptr, cache.key_norm = layer ? ones(width) : nullptr;
        cache.eps = 1e-6f, cache.cosines = cosines_, cache.sines = sines_, cache.interleave = false;
        attention(layer, query, width, -1, 0, 0, kv_heads, width, width, attended);
        linear(attended, nullptr, {{matrix(kHidden, heads * width, 0.3f), hidden_}}, true);
    }

    shoal::Attention& attention(long layer, long query, long query_step, long rotary, long rotary_first,
                                long rotary_step, long kv_heads, long key_width, long value_width, long out) {
        auto& op = add<shoal::Attention>();
        op.layer = layer, op.query = query, op.query_step = query_step;
        op.rotary = rotary, op.rotary_first = rotary_first, op.rotary_step = rotary_step;
        op.heads = setup_.mla ? kHeads : 4, op.kv_heads = kv_heads;
        op.key_width = key_width, op.value_width = value_width;
        op.shared_values = setup_.mla, op.scale = 0.3f, op.out = out;
        return op;
    }

    void feed_forward(bool experts) {
        auto& op = add<shoal::FeedForward>();
        op.input = input();
        op.has_dense = true;
        op.gate = matrix(40, kHidden, 0.3f), op.up = matrix(40, kHidden, 0.3f), op.down = matrix(kHidden, 40, 0.3f);
        adapt(op.adapted_dense.gate, op.gate), adapt(op.adapted_dense.up, op.up);
        adapt(op.adapted_dense.down, op.down);
        if (!experts) return;
        op.wide_experts = setup_.wide;
        op.router = matrix(8, kHidden, 0.3f, 1, Packing::f32);
        op.bias = ones(8);
        op.expert_gate = matrix(24, kHidden, 0.3f, 8), op.expert_up = matrix(24, kHidden, 0.3f, 8);
        op.expert_down = matrix(kHidden, 24, 0.3f, 8);
        adapt(op.adapted_experts.gate, op.expert_gate, 8), adapt(op.adapted_experts.up, op.expert_up, 8);
        adapt(op.adapted_experts.down, op.expert_down, 8);
        op.experts = 8, op.active = 3, op.groups = 4, op.groups_kept = 2;
        op.sigmoid = op.top_two = op.normalise = true;
        op.scaling = 2.5f;
    }

    // Program 1: an embedding and the last step's states, through one matrix to logits.
    void look_ahead(const PackedMatrix& table) {
        program_ = 1;
        const long both = engine_.add_buffer(2 * kHidden), next = engine_.add_buffer(kHidden);
        auto& op = add<shoal::LookAhead>();
        op.table = table;
        op.embed_norm = ones(kHidden), op.final_norm = ones(kHidden), op.state_norm = ones(kHidden);
        op.eps = 1e-5f, op.states = hidden_, op.out = both;
        linear(both, nullptr, {{matrix(kHidden, 2 * kHidden, 0.2f), next}}, false);
        auto& head = add<shoal::Head>(false);
        head.input = {next, ones(kHidden), 1e-5f, setup_.wide};
        head.weight = table;
    }

    Setup setup_;
    shoal::Expansion::Memory expansion_memory_;
    shoal::Engine engine_;
    long hidden_, cosines_, sines_;
    uint32_t seed_ = 1;
    size_t program_ = 0;
    std::vector<std::unique_ptr<std::vector<float>>> floats_;
    std::vector<std::unique_ptr<std::vector<uint8_t>>> bytes_;
    std::vector<std::unique_ptr<uint16_t[]>> halves_;
};

constexpr long kTokens = 270;  // five pages, the last of them in a second chunk of attention

const std::vector<int32_t> kOwn = {4, 1, 3, 9, 7}, kOther = {0, 5, 2, 6, 8};

// Logits of text 0 in one step, and those that look ahead from it.
Logits whole(Model& model) {
    Logits logits = model.run({{0, kTokens, kOwn, 0}});
    const Logits next = model.run({{0, kTokens, kOwn, 0}}, 1);
    logits.insert(logits.end(), next.begin(), next.end());
    return logits;
}

// The same in pieces of these sizes in turn, if wanted beside another text that is a few tokens ahead (0: none).
Logits pieces(Model& model, const std::vector<long>& sizes, int company) {
    Logits out, ahead_of_it;
    size_t turn = 0;
    long other = 0;
    for (long at = 0; at < kTokens;) {
        const long n = std::min(sizes[turn++ % sizes.size()], kTokens - at), ahead = std::min(n + 1, kTokens - other);
        std::vector<Model::Slice> slices{{at, at + n, kOwn, 0}};
        if (company && ahead > 0) slices.insert(slices.begin(), {other, other + ahead, kOther, company});
        const Logits logits = model.run(slices);
        const Logits next = model.run(slices, 1);
        out.insert(out.end(), logits.end() - n * kVocabulary, logits.end());
        ahead_of_it.insert(ahead_of_it.end(), next.end() - n * kVocabulary, next.end());
        at += n;
        other += company ? ahead : 0;
    }
    out.insert(out.end(), ahead_of_it.begin(), ahead_of_it.end());
    return out;
}

bool same(const Logits& a, const Logits& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

bool alive(const Logits& logits) {
    const bool finite = std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); });
    return finite && *std::max_element(logits.begin(), logits.end()) > 0.5f;
}

int check(Setup setup, const char* isa) {
    int failed = 0;
    Logits truth;
    for (const int threads : {1, 3}) {
        setup.threads = threads;
        Model model(setup);
        const auto expect = [&](const char* what, bool ok) {
            if (!ok)
                std::fprintf(stderr, "%s, %s%s, packing %d, %d threads: %s\n", isa, setup.mla ? "MLA" : "GQA",
                             setup.expanded ? " expanded" : "", int(setup.packing), threads, what);
            failed += !ok;
        };
        const Logits all = whole(model);
        if (threads == 1) truth = all;
        expect("logits are not finite, or nothing happens", alive(all));
        expect("threads change the result", same(all, truth));
        expect("chunks change the result", same(pieces(model, {1, 1, 2, 3, 1, 50, 1, 7, 198, 1}, 0), truth));
        expect("company changes the result", same(pieces(model, {1, 4, 120, 2}, 1), truth));
        if (!setup.adapted) continue;
        expect("company without an adapter changes the result", same(pieces(model, {1, 4, 120, 2}, 2), truth));
        if (threads > 1) continue;
        setup.adapted = false;
        expect("an adapter adds nothing", !same(whole(*std::make_unique<Model>(setup)), truth));
        setup.adapted = true;
    }
    return failed;
}

// Rows of the int8 cache, there and back: zeros, tiny values and one huge one; a fault shows in its own group alone.
int check_cache_rows(const shoal::Ops& ops) {
    constexpr long width = 150;
    std::vector<float> values(width);
    for (long i = 0; i < width; ++i) values[i] = float(i % 50 - 25);
    values[3] = 1e-40f, values[10] = 2000.0f;
    std::fill(values.begin() + 64, values.begin() + 128, 3e-39f);
    int failed = 0;
    for (const float fault : {0.0f, NAN, -INFINITY}) {
        values[149] = fault;
        std::vector<uint8_t> row(shoal::cache_row_bytes(shoal::CacheType::int8, width));
        shoal::store_cache_row(shoal::CacheType::int8, row.data(), values.data(), width);
        std::vector<uint16_t> wide(width);
        ops.widen_rows(row.data(), long(row.size()), shoal::round_up(width, 4), 1, width, wide.data());
        for (long i = 0; i < width; ++i) {
            const float value = shoal::bf16_to_float(wide[i]);
            const float top = i < 64 ? 2000.0f : 25.0f;  // half a step of the code, and bf16's rounding
            const bool near = std::fabs(value - values[i]) <= top / 250.0f + std::fabs(values[i]) / 256.0f;
            failed += i < 128 || std::isfinite(fault) ? !near : !std::isnan(value);
        }
    }
    if (failed) std::fprintf(stderr, "%s: %d values of int8 cache rows are wrong\n", ops.isa, failed);
    return failed;
}

}  // namespace

int main() {
    using shoal::CacheType;
    int passed = 0, failed = 0;
    for (const shoal::Ops* ops : shoal::available_isas()) {
        shoal::select_isa(ops->isa);
        ++(check_cache_rows(*ops) ? failed : passed);
        for (const bool mla : {false, true}) {
            for (Setup setup :
                 {Setup{mla, Packing::f32, CacheType::f32, false, 1},
                  Setup{mla, Packing::bf16, CacheType::bf16, false, 1},
                  Setup{mla, Packing::q8, CacheType::bf16, true, 1}, Setup{mla, Packing::q4, CacheType::int8, false, 1},
                  Setup{mla, Packing::q4m, CacheType::f32, true, 1},
                  Setup{mla, mla ? Packing::q8 : Packing::f32, CacheType::bf16, mla, 1, true}}) {
                for (setup.expanded = false;; setup.expanded = true) {
                    ++(check(setup, ops->isa) ? failed : passed);
                    if (!mla || setup.adapted || setup.expanded) break;
                }
            }
        }
        std::printf("%-8s executor %s\n", ops->isa, failed ? "FAILED" : "ok");
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
