// The executor: holds packed weights, activation buffers and the paged cache, and replays a plan (a list of operations
// that Python wrote once) for the tokens of a step. One call a step; every team member walks the whole list.
//
// Letters: T tokens of the step, D model, N heads, K active experts, F hidden, C latent, R rope, V value head.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "engine/team.h"
#include "shoal/ops.h"
#include "shoal/packed.h"

namespace shoal {

constexpr long kPageTokens = 64;
constexpr int kScratchSlots = 12;  // of a member
constexpr long kCacheGroup = 64;   // cached int8 values that share a scale

enum class CacheType : int32_t { f32 = 0, bf16 = 1, int8 = 2 };

// Bytes of one cached row of `width` values; int8 rows end with an f32 scale for every 64 of them.
constexpr long cache_row_bytes(CacheType type, long width) {
    if (type == CacheType::int8) return round_up(width, 4) + 4 * ((width + kCacheGroup - 1) / kCacheGroup);
    return width * (type == CacheType::bf16 ? 2 : 4);
}
void store_cache_row(CacheType type, void* at, const float* values, long width);

// How far a member's own share of each of an operation's stages is handed out: a cache line that it seldom shares.
struct alignas(64) Shares {
    static constexpr int kStages = 8;
    std::atomic<long> taken[kStages];
};

// What one step works on. Rows of the same sequence are neighbours, in the order of their positions.
struct Step {
    long tokens = 0;
    const int32_t* token = nullptr;     // [T]
    const int32_t* position = nullptr;  // [T]
    const int32_t* source = nullptr;    // [T]: rows of an earlier step's states (MTP programs); else null
    long sequences = 0;
    const int32_t* first_row = nullptr;  // [sequences + 1]
    const int32_t* pages = nullptr;      // [sequences, max_pages]: cache pages in the order of positions
    long max_pages = 0;
    long outputs = 0;
    const int32_t* output_row = nullptr;  // [outputs]: rows whose logits are wanted
    float* logits = nullptr;              // [outputs, vocabulary]
    const int32_t* adapter = nullptr;     // [T]: number of the adapter of each row, -1 for none; null: no row has one
    const uint8_t* expanded = nullptr;    // [sequences]: whose rows meet keys and values, not latents; null: nobody's
    bool is_expanded(long sequence) const { return expanded && expanded[sequence]; }
    long sequence_of(long row) const {
        long s = 0;
        while (first_row[s + 1] <= row) ++s;
        return s;
    }
};

// Memory that grows and never shrinks; 64-byte aligned.
class Scratch {
  public:
    ~Scratch();
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    uint8_t* bytes(size_t size);
    template <class T>
    T* array(size_t count) {
        return reinterpret_cast<T*>(bytes(count * sizeof(T)));
    }

  private:
    uint8_t* data_ = nullptr;
    size_t size_ = 0;
};

// Rows in int8, and in a second layer what the first left over (wide activations, about 16 bits; else its codes are
// null).
struct WideRows {
    QuantRows high{}, low{};
    WideRows from_row(long row, long cols) const;
};

// Such rows with the memory that holds them.
struct QuantBuffer {
    Scratch codes, scales, sums;
    WideRows reserve(long rows, long cols, bool wide);
};

class Engine;

// How many tokens' activations are interleaved: a lone token's stand as plain rows.
constexpr long lanes_for(long tokens) { return tokens == 1 ? 1 : 4; }

// Everything an operation needs while it runs on one member of the team.
struct Worker {
    Engine& engine;
    const Step& step;
    const Ops& ops;
    int member;
    Shares* shares;  // [members] of the operation
    void barrier() const;
    // The next piece of stage `stage`'s [0, total) for this member, `grain` at a time; false when none is left. A
    // member walks through its own part in order, so that weights come from memory as one stream, then helps its
    // neighbours.
    bool next(int stage, long total, long grain, long& first, long& last) const;
    long grain(long total,
               long at_least = 1) const;  // pieces small enough to balance, large enough to be worth handing out
};

struct Operation {
    virtual ~Operation() = default;
    virtual void reserve(Engine&, const Step&) {}  // memory and bookkeeping of the step, before the team starts
    virtual void run(const Worker& worker) = 0;    // on every member
    bool barrier_after = true;
};

// Rows of activations ready to meet weights: normalised f32 and, where a matrix wants it, int8.
struct Prepared {
    const float* rows = nullptr;
    long stride = 0;
    WideRows quant{};
    long lanes = 1;
    long tokens = 0;
    long cols = 0;
};

class Engine {
  public:
    explicit Engine(int threads);

    int threads() const { return team_.size(); }
    long add_buffer(long cols);  // f32 [T, cols]; returns its id
    float* buffer(long id, long tokens);
    long buffer_cols(long id) const { return buffers_[id].cols; }
    void set_cache(long layers, long page_bytes, CacheType type, long pages);
    uint8_t* cache_page(long page, long layer) const;
    CacheType cache_type() const { return cache_type_; }
    size_t cache_bytes() const { return cache_bytes_; }

    // Programs are lists of operations over the same buffers, weights and cache: 0 is the main network, the others the
    // layers that guess further ahead.
    void add(size_t program, std::unique_ptr<Operation> operation);
    void run(size_t program, const Step& step);
    void barrier() { team_.barrier(); }
    Scratch& scratch(int member, int slot) { return scratch_[member * kScratchSlots + slot]; }
    QuantBuffer& quant(int member, int slot = 0) { return quant_[member * 2 + slot]; }

  private:
    struct Buffer {
        long cols;
        std::unique_ptr<Scratch> memory;
    };
    Team team_;
    std::vector<Buffer> buffers_;
    struct Program {
        std::vector<std::unique_ptr<Operation>> operations;
        std::vector<Shares> shares;  // [operations, members]
    };
    std::vector<Program> programs_;
    std::vector<Scratch> scratch_;
    std::vector<QuantBuffer> quant_;
    Scratch cache_;
    size_t cache_bytes_ = 0, page_bytes_ = 0;
    long cache_layers_ = 0;
    CacheType cache_type_ = CacheType::f32;
};

// y[t][rows] (+)= x W^T for tiles [first, last) of W.
void multiply(const Ops& ops, const PackedMatrix& w, const Prepared& x, long first, long last, float* y, long y_stride,
              bool add_to);

// Rows for a multiplication: optionally normalised, quantised if asked. Few tokens are prepared by each member for
// itself, which saves a barrier; many are shared out and end with one.
struct Input {
    long buffer;
    const float* norm = nullptr;  // RMSNorm weights or null
    float eps = 0;
    bool wide = false;  // activations of 16 bits rather than 8 where they meet quantised weights
};
struct SharedInput {  // an operation's own memory for the shared case
    Scratch rows;
    QuantBuffer quant;
};
constexpr long kPrivateTokens = 2;
void reserve_input(Engine& engine, const Step& step, SharedInput& shared, const Input& input, bool quantised);
Prepared prepare(const Worker& worker, SharedInput& shared, const Input& input, bool quantised, int stage);
// Quantises up to 4 rows into one interleaved block at row `at` of `into`.
void quantise_block(const Worker& worker, const WideRows& into, long at, const float* const* rows, long count,
                    long cols, long lanes);
// The same for rows `stride` apart.
void quantise_block(const Worker& worker, const WideRows& into, long at, const float* rows, long stride, long count,
                    long cols, long lanes);
// Adds the squares of every column of `count` rows to out[0 .. cols), and `count` to out[cols].
void add_moments(const float* rows, long stride, long count, long cols, float* out);
// Quantised form of given rows in a member's own memory.
WideRows quantise_rows(const Worker& worker, QuantBuffer& into, const float* rows, long stride, long tokens, long cols,
                       long lanes, bool wide);

}  // namespace shoal
