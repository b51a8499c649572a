// The operations that a plan may hold. Each is plain data plus run(); operations_*.cpp hold the bodies.
#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "engine/adapted.h"
#include "engine/engine.h"

namespace shoal {

// x[t] = row token[t] of the table.
struct Embed final : Operation {
    PackedMatrix table;
    long out;
    void run(const Worker& worker) override;
};

// out[t] = [norm(row token[t] of the table); norm(norm(states[source[t]]))]: what an MTP layer starts from. The states
// are the main network's before its final norm.
struct LookAhead final : Operation {
    PackedMatrix table;
    const float *embed_norm, *final_norm, *state_norm;
    float eps;
    long states, out;
    void run(const Worker& worker) override;
};

// Cosines and sines of the step's positions, [T, R / 2] each, used by every layer.
struct RopeTable final : Operation {
    std::vector<float> inverse_frequency;  // [R / 2]
    float factor = 1;                      // multiplies both (YaRN's attention factor)
    long cosines, sines;
    void run(const Worker& worker) override;
};

// outs[i] (+)= norm(x) W_i^T + bias_i, and what adapters add.
struct Linear final : Operation {
    Input input;
    struct Part {
        PackedMatrix weight;
        const float* bias;
        long out;
        Adapted adapted = {};
    };
    std::vector<Part> parts;
    bool add_to = false;
    float* moments = nullptr;  // add_moments of the input rows, if wanted
    SharedInput shared;
    Scratch low;  // of every part, after one another
    bool quantised() const;
    void reserve(Engine& engine, const Step& step) override;
    void run(const Worker& worker) override;

  private:
    long low_width() const;
    const float* shrink_parts(const Worker& worker, const Prepared& x);
};

// Per head n: out[t][out_first + n * out_step ...] = x[t][in_first + n * in_step ...] W_n^T, for the rows of sequences
// that are not expanded.
struct HeadLinear final : Operation {
    std::vector<PackedMatrix> weights;
    long in, in_first, in_step, out, out_first, out_step;
    Adapted adapted;  // by head
    bool wide = false;
    void run(const Worker& worker) override;

  private:
    void multiply_rows(const Worker& worker, long head, long first_row, long last_row) const;
};

// Rotates queries and keys, normalises what wants it, and puts keys and values (or the latent) into the cache.
struct CacheMla final : Operation {
    long layer, query, heads, nope, rope, latent, compressed;  // compressed [T, C + R]: latent and rotary key
    const float* norm;
    float eps;
    long cosines, sines;
    bool interleave;
    void run(const Worker& worker) override;
};
struct CacheGqa final : Operation {
    long layer, query, key, value, heads, kv_heads, head_dim;
    const float *query_norm, *key_norm;  // null where the family has none
    float eps;
    long cosines, sines;
    bool interleave;
    void run(const Worker& worker) override;
};

// How a latent cache becomes keys and values again (MLA's expanded form): for long pieces of a prompt that costs less
// than meeting the latents themselves, which are several times as wide.
struct Expansion {
    struct Memory {           // one for all layers
        Scratch rows;         // rotary keys, behind the latents themselves if the matrices meet them in f32
        QuantBuffer latents;  // [pages * 64, C]
    };
    std::vector<PackedMatrix> keys, values;  // of each head, [H, C] and [V, C]; none: never expanded
    long rope = 0, out = 0;                  // out [T, N * V]
    bool wide = false;
    Memory* memory = nullptr;
    std::vector<long> sequences;   // of the step
    std::vector<long> first_page;  // of each, and the end, in pages of `memory`
    bool quantised() const { return keys[0].quantised() || values[0].quantised(); }
    long latent() const { return keys[0].cols; }
    long row_width() const { return quantised() ? rope : latent() + rope; }
};

// softmax(q k^T) v over the cache. MLA: heads share one key row of C + R whose first C are the values; queries come in
// two parts, the absorbed one [T, N, C] and the rotary one inside [T, N, H + R]. GQA: N / kv_heads queries share a key.
struct Attention final : Operation {
    long layer, query, query_step, rotary, rotary_first, rotary_step;  // rotary < 0: none
    long heads, kv_heads, key_width, value_width;                      // key_width includes the rotary part
    bool shared_values;
    float scale;
    long out;
    Expansion expansion;
    void reserve(Engine& engine, const Step& step) override;
    void run(const Worker& worker) override;

  private:
    void run_absorbed(const Worker& worker);
    // operations_expanded.cpp
    void reserve_expanded(const Step& step);
    void run_expanded(const Worker& worker);
    void read_latents(const Worker& worker, long index, long page) const;
    void expand_page(const Worker& worker, long head, long at, long count, uint8_t* keys_out,
                     uint8_t* values_out) const;
    void attend_expanded(const Worker& worker, long index, long head) const;
    struct Block {
        long sequence, kv_head, first_lane, lanes, keys;
    };
    Scratch partial;
    std::vector<Block> work;
    std::vector<long> chunk_start;  // of each block, in chunks
    bool split = false;             // few blocks: their chunks are shared out
    void load_queries(const Worker& worker, const Block& block, void* packed, int32_t* last_key) const;
    void attend_chunk(const Worker& worker, const Block& block, const void* queries, const int32_t* last_key,
                      long chunk, float* state) const;
    const uint8_t* widen(const Worker& worker, int slot, const uint8_t* rows, long count, long width) const;
    void finish(const Worker& worker, const Block& block, const float* total, const float* rows) const;
};

// x += down(silu(gate(norm(x))) * up(norm(x))) for an always-used MLP (dense layer or shared experts) and routed
// experts.
struct FeedForward final : Operation {
    Input input;
    bool has_dense = false;
    PackedMatrix gate, up, down;  // dense or shared
    long experts = 0, active = 0, groups = 1, groups_kept = 1;
    bool sigmoid = false, top_two = false, normalise = false;
    float scaling = 1;
    bool wide_experts = false;  // input.wide for the routed experts
    PackedMatrix router;
    const float* bias = nullptr;
    PackedMatrix expert_gate, expert_up, expert_down;  // of expert 0; the others follow at bytes() each
    // add_moments of what the matrices met, if wanted: the input [1, D + 1], the always-used MLP's hidden rows
    // [1, F + 1], and by expert those of its own tokens [E, D + 1] and [E, F + 1].
    float *moments = nullptr, *hidden_moments = nullptr;
    float *expert_moments = nullptr, *expert_hidden_moments = nullptr;

    struct Mlp {
        Adapted gate, up, down;
        bool any_in() const { return gate.any() || up.any(); }
    };
    Mlp adapted_dense, adapted_experts;  // what adapters add to the always-used MLP and to each expert

    SharedInput shared;
    Scratch logits, hidden, dense_hidden;
    Scratch low_in, low_experts_in, low_out;
    QuantBuffer hidden_quant, dense_quant;
    std::unique_ptr<std::atomic<long>[]> pieces_done;  // [experts]: who makes an expert's last one quantises its rows
    // Slots are (token, expert) pairs sorted by expert.
    struct Slots {
        std::vector<int32_t> chosen;  // [T, K]
        std::vector<float> weight;    // [T, K]
        std::vector<int32_t> token;   // of each slot
        std::vector<float> factor;
        std::vector<long> offset;     // [experts + 1] into slots
        std::vector<long> quant_row;  // [experts + 1] into padded rows
        std::vector<int32_t> used;    // experts with at least one token
        long count(long expert) const { return offset[expert + 1] - offset[expert]; }
    };
    std::vector<Slots> slots;   // [members]: each has its own; what was chosen for many tokens stands in the first
    uint64_t expert_reads = 0;  // of all steps together: an expert's weights are read once a step
    // Copies what the last step chose, if anybody asks: experts and weights [T, K], and the router's scores [T, E].
    void last_routing(long tokens, int32_t* experts_out, float* weights_out, float* scores_out) const;
    void reserve(Engine& engine, const Step& step) override;
    void run(const Worker& worker) override;

  private:
    void route(const float* scores, int32_t* experts_out, float* weights_out) const;
    void choose_experts(const Worker& worker, Slots& s);
    void group_slots(const Slots& picks, Slots& s, long tokens) const;
    bool quantises_input() const;
    WideRows run_experts(const Worker& worker, const Slots& s, const Prepared& x);
    // Low-rank products of the step's rows or slots, null where no row has an adapter here. Before gate and up they are
    // two, side by side; before down the dense rows' come first, then the slots'.
    const float* shrink_dense(const Worker& worker, const Prepared& x);
    const float* shrink_experts(const Worker& worker, const Slots& s, const Prepared& x);
    const float* shrink_hidden(const Worker& worker, const Slots* s);
    template <class Row>
    void shrink_slots(const Worker& worker, const Slots& s, const Adapted& adapted, long first, long last, Row row,
                      float* low, long stride) const;
    void expand_slots(const Worker& worker, const Slots& s, const Adapted& adapted, long expert, const float* low,
                      long low_stride, long from, long to, float* y, long stride) const;
    void count_experts(const Slots& s, const Prepared& x) const;
    void quantise_expert(const Worker& worker, const Slots& s, long expert, const WideRows& into, const float* rows,
                         long width) const;
    WideRows gather_expert(const Worker& worker, const Slots& s, long expert, const WideRows& from, long cols) const;
    WideRows quantise_dense_hidden(const Worker& worker, const float* rows, long width, long lanes);
    // `add` gets the gate's and the up projection's rows before they meet, and the columns that were made.
    template <class Add>
    void hidden_chunk(const Worker& worker, const PackedMatrix& g, const PackedMatrix& u, const Prepared& x, long first,
                      long last, float* out, long stride, Add add) const;
    void down_tiles(const Worker& worker, const Slots* s, long first, long last, float* x, const Prepared& dense,
                    const WideRows& routed, const float* low);
};

// Keys are attended to in chunks of four pages, each from a fresh state, and the chunks are merged in order. The
// partition does not depend on threads, batch or prefill, so neither does a single bit of the result.
constexpr long kChunkPages = 4;
constexpr long kChunk = kChunkPages * kPageTokens;
constexpr long kLaneState = 32;  // top and total of 16 lanes, in front of the rows
void clear_state(float* state, long lanes, long width);
// Rows times a number as the cache holds them, in bf16 or f32.
void store_rows(const Worker& worker, bool bf16, const float* rows, long stride, float factor, void* out,
                long out_stride, long count, long width);
// One such row as a lane of the queries that `attend` takes.
void pack_lane(const void* line, long width, bool bf16, long lane, long lanes, void* packed);

// logits = norm(x[output rows]) W^T.
struct Head final : Operation {
    Input input;
    PackedMatrix weight;
    float* moments = nullptr;  // add_moments of the input rows, if wanted
    void run(const Worker& worker) override;
};

}  // namespace shoal
