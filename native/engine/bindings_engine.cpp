// The executor's Python face: a plan is written by calling one method per operation, then `run` replays it.
#include "engine/bindings_engine.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "engine/bindings_weights.h"
#include "engine/operations.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

using OutFloats = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Halves = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // bf16
using Ints = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;
using OutInts = nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Flags = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Routes = nb::ndarray<int32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using RouteWeights = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

class PlanEngine {
  public:
    PlanEngine(int threads, bool wide, bool wide_experts)
        : engine_(threads), wide_(wide), wide_experts_(wide_experts) {}

    int threads() const { return engine_.threads(); }
    long buffer(long cols) { return engine_.add_buffer(cols); }
    // A page holds, for 64 tokens, a row of each of these widths: the latent, or every head's key and value.
    void cache(long layers, const std::vector<long>& widths, int type, long pages) {
        require(type >= 0 && type <= 2, "no such cache type");
        long bytes = 0;
        for (const long width : widths)
            bytes += shoal::kPageTokens * shoal::cache_row_bytes(shoal::CacheType(type), width);
        engine_.set_cache(layers, bytes, shoal::CacheType(type), pages);
    }
    size_t cache_bytes() const { return engine_.cache_bytes(); }

    void embed(const Packed& table, long out) {
        auto op = std::make_unique<shoal::Embed>();
        op->table = hold(table);
        op->out = out;
        put(std::move(op), false);
    }

    void look_ahead(const Packed& table, long states, Floats embed_norm, Floats final_norm, Floats state_norm,
                    float eps, long out) {
        auto op = std::make_unique<shoal::LookAhead>();
        require(engine_.buffer_cols(out) == 2 * table.matrix.cols, "out holds an embedding and a state");
        op->table = hold(table);
        op->embed_norm = hold(embed_norm), op->final_norm = hold(final_norm), op->state_norm = hold(state_norm);
        op->eps = eps, op->states = states, op->out = out;
        put(std::move(op), true);
    }

    void rope_table(const std::vector<float>& inverse_frequency, float factor, long cosines, long sines) {
        auto op = std::make_unique<shoal::RopeTable>();
        op->inverse_frequency = inverse_frequency;
        op->factor = factor;
        op->cosines = cosines;
        op->sines = sines;
        put(std::move(op), true);
    }

    // Number of the first matrix; the others' follow (`adapt`).
    long linear(long in, std::optional<Floats> norm, float eps, const std::vector<Packed>& weights,
                const std::vector<std::optional<Floats>>& biases, const std::vector<long>& outs, bool add_to,
                std::optional<OutFloats> moments) {
        auto op = std::make_unique<shoal::Linear>();
        op->input = {in, hold(norm), eps, wide_};
        require(weights.size() == biases.size() && weights.size() == outs.size() && !weights.empty(),
                "one output a matrix");
        for (size_t i = 0; i < weights.size(); ++i) {
            require(weights[i].matrix.cols == engine_.buffer_cols(in), "matrix and input differ in columns");
            require(weights[i].matrix.rows <= engine_.buffer_cols(outs[i]), "output is narrower than the matrix");
            op->parts.push_back({hold(weights[i]), hold(biases[i]), outs[i]});
        }
        op->add_to = add_to;
        op->moments = hold(moments, 1, engine_.buffer_cols(in));
        const long first = long(adapted_.size());
        for (auto& part : op->parts) adaptable(part.adapted, part.weight);
        put(std::move(op), true);
        return first;
    }

    long head_linear(const Packed& stack, long in, long in_first, long in_step, long out, long out_first,
                     long out_step) {
        auto op = std::make_unique<shoal::HeadLinear>();
        op->weights = hold_stack(stack);
        op->wide = wide_;
        op->in = in, op->in_first = in_first, op->in_step = in_step;
        op->out = out, op->out_first = out_first, op->out_step = out_step;
        adaptable(op->adapted, stack.matrix, stack.count);
        put(std::move(op), true);
        return long(adapted_.size()) - 1;
    }

    void cache_mla(long layer, long query, long heads, long nope, long rope, long latent, long compressed, Floats norm,
                   float eps, long cosines, long sines, bool interleave) {
        auto op = std::make_unique<shoal::CacheMla>();
        op->layer = layer, op->query = query, op->heads = heads, op->nope = nope, op->rope = rope;
        op->latent = latent, op->compressed = compressed, op->norm = hold(norm), op->eps = eps;
        op->cosines = cosines, op->sines = sines, op->interleave = interleave;
        put(std::move(op), false);
    }

    void cache_gqa(long layer, long query, long key, long value, long heads, long kv_heads, long head_dim,
                   std::optional<Floats> query_norm, std::optional<Floats> key_norm, float eps, long cosines,
                   long sines, bool interleave) {
        auto op = std::make_unique<shoal::CacheGqa>();
        op->layer = layer, op->query = query, op->key = key, op->value = value;
        op->heads = heads, op->kv_heads = kv_heads, op->head_dim = head_dim;
        op->query_norm = hold(query_norm), op->key_norm = hold(key_norm), op->eps = eps;
        op->cosines = cosines, op->sines = sines, op->interleave = interleave;
        put(std::move(op), true);
    }

    void attention(long layer, long query, long query_step, long rotary, long rotary_first, long rotary_step,
                   long heads, long kv_heads, long key_width, long value_width, bool shared_values, float scale,
                   long out, const std::optional<Packed>& expand_keys, const std::optional<Packed>& expand_values,
                   long expand_out) {
        auto op = std::make_unique<shoal::Attention>();
        op->layer = layer, op->query = query, op->query_step = query_step;
        op->rotary = rotary, op->rotary_first = rotary_first, op->rotary_step = rotary_step;
        op->heads = heads, op->kv_heads = kv_heads, op->key_width = key_width, op->value_width = value_width;
        op->shared_values = shared_values, op->scale = scale, op->out = out;
        if (expand_keys && expand_values) {
            const shoal::PackedMatrix &k = expand_keys->matrix, &v = expand_values->matrix;
            require(shared_values && kv_heads == 1 && rotary >= 0 && expand_keys->count == heads &&
                        expand_values->count == heads && k.cols == value_width && v.cols == value_width &&
                        rotary_first == k.rows && rotary_step == k.rows + key_width - value_width,
                    "keys and values of another layer");
            op->expansion.keys = hold_stack(*expand_keys);
            op->expansion.values = hold_stack(*expand_values);
            op->expansion.rope = key_width - value_width;
            op->expansion.out = expand_out;
            op->expansion.wide = wide_;
            op->expansion.memory = &expansion_memory_;
        }
        put(std::move(op), true);
    }

    // Numbers six matrices, there or not: gate, up and down of the always-used MLP, then of the experts.
    long feed_forward(long in, Floats norm, float eps, const std::vector<Packed>& dense, std::optional<Packed> router,
                      std::optional<Floats> bias, const std::vector<Packed>& routed, nb::dict routing,
                      const std::vector<OutFloats>& moments) {
        auto op = std::make_unique<shoal::FeedForward>();
        op->input = {in, hold(norm), eps, wide_};
        require(dense.size() == 3 || dense.empty(), "dense holds gate, up and down");
        if (!dense.empty()) {
            op->has_dense = true;
            op->gate = hold(dense[0]), op->up = hold(dense[1]), op->down = hold(dense[2]);
        }
        op->wide_experts = wide_experts_;
        if (router) {
            require(routed.size() == 3 && routed[0].count == router->matrix.rows,
                    "routed holds gate, up and down stacks");
            op->router = hold(*router);
            op->bias = hold(bias);
            op->expert_gate = hold(routed[0]), op->expert_up = hold(routed[1]), op->expert_down = hold(routed[2]);
            op->experts = routed[0].count;
            op->active = nb::cast<long>(routing["num_experts_per_tok"]);
            op->groups = nb::cast<long>(routing["n_group"]);
            op->groups_kept = nb::cast<long>(routing["topk_group"]);
            op->sigmoid = nb::cast<bool>(routing["sigmoid"]);
            op->top_two = nb::cast<bool>(routing["top_two"]);
            op->normalise = nb::cast<bool>(routing["normalise"]);
            op->scaling = nb::cast<float>(routing["scaling"]);
        }
        if (!moments.empty()) hold_moments(*op, moments);
        feed_forwards_.push_back({program_, op.get()});
        const long first = long(adapted_.size());
        adaptable(op->adapted_dense.gate, op->gate, op->has_dense);
        adaptable(op->adapted_dense.up, op->up, op->has_dense);
        adaptable(op->adapted_dense.down, op->down, op->has_dense);
        adaptable(op->adapted_experts.gate, op->expert_gate, op->experts);
        adaptable(op->adapted_experts.up, op->expert_up, op->experts);
        adaptable(op->adapted_experts.down, op->expert_down, op->experts);
        put(std::move(op), true);
        return first;
    }

    // Adapter `adapter` adds scale * B (A x) to matrix `number`, or to each of its stack. a bf16 [R, cols] and b bf16
    // [R, rows] hold the directions of all; pieces [count, 3] says of each matrix where its own begin in a and in b and
    // how many they are. Not while a step runs.
    void adapt(size_t number, size_t adapter, Halves a, Halves b, OutInts pieces, Floats scales) {
        require(number < adapted_.size(), "no such matrix");
        shoal::Adapted& matrix = *adapted_[number];
        require(long(a.shape(1)) == matrix.cols && long(b.shape(1)) == matrix.rows, "factors of another matrix");
        require(long(pieces.shape(0)) == matrix.count && pieces.shape(1) == 3 && long(scales.size()) == matrix.count,
                "one piece a matrix of the stack");
        std::vector<shoal::LowRank> stack;
        for (long i = 0; i < matrix.count; ++i) {
            const long at_a = pieces.data()[3 * i], at_b = pieces.data()[3 * i + 1], rank = pieces.data()[3 * i + 2];
            require(at_a >= 0 && at_b >= 0 && rank >= 0 && at_a + rank <= long(a.shape(0)) &&
                        at_b + rank <= long(b.shape(0)),
                    "a piece outside the factors");
            stack.push_back({a.data() + at_a * matrix.cols, b.data() + at_b * matrix.rows, rank, scales.data()[i]});
        }
        factors_.push_back({adapter, a, b});
        matrix.set(adapter, std::move(stack));
        num_adapters_ = std::max(num_adapters_, long(adapter) + 1);
    }

    // Forgets an adapter and lets go of its memory. Not while a step runs.
    void drop_adapter(size_t adapter) {
        for (shoal::Adapted* matrix : adapted_) matrix->clear(adapter);
        std::erase_if(factors_, [&](const Factors& held) { return held.adapter == adapter; });
    }

    // How many routed experts all steps so far have read, and their packed bytes; an expert counts once a step.
    std::pair<size_t, size_t> experts_read() const {
        size_t count = 0, bytes = 0;
        for (const auto& [program, op] : feed_forwards_) {
            if (!op->experts) continue;
            count += op->expert_reads;
            bytes += op->expert_reads * (op->expert_gate.bytes() + op->expert_up.bytes() + op->expert_down.bytes());
        }
        return {count, bytes};
    }

    // Where the last step of program 0 sent its tokens, in every layer with experts: experts and weights [L, T, K],
    // the router's scores [L, T, E]. A copy of what the step left behind: it costs the step nothing.
    void routing(Routes experts, RouteWeights weights, RouteWeights scores) const {
        const auto layers = routed_layers();
        const bool whole = experts.shape(0) == layers.size() && long(experts.shape(1)) == rows_ && rows_ > 0;
        require(whole && weights.shape(0) == layers.size() && long(weights.shape(1)) == rows_ &&
                    weights.shape(2) == experts.shape(2) && scores.shape(0) == layers.size() &&
                    long(scores.shape(1)) == rows_,
                "routing of another step");
        for (const auto* op : layers)
            require(op->active == long(experts.shape(2)) && op->experts == long(scores.shape(2)),
                    "another number of experts");
        nb::gil_scoped_release unlocked;
        const long step = rows_ * long(experts.shape(2));
        for (size_t i = 0; i < layers.size(); ++i)
            layers[i]->last_routing(rows_, experts.data() + i * step, weights.data() + i * step,
                                    scores.data() + i * rows_ * scores.shape(2));
    }

    void head(long in, Floats norm, float eps, const Packed& weight, std::optional<OutFloats> moments) {
        auto op = std::make_unique<shoal::Head>();
        op->input = {in, hold(norm), eps, wide_};
        op->weight = hold(weight);
        op->moments = hold(moments, 1, op->weight.cols);
        vocabulary_ = op->weight.rows;
        put(std::move(op), false);
    }

    // The operations written from here on belong to this program.
    void program(size_t number) { program_ = number; }

    // One step. pages [sequences, max_pages]; first_row [sequences + 1]; logits [outputs, vocabulary] is filled;
    // adapter [T] is the number of each row's adapter or -1; expanded [sequences] is not 0 for those whose rows are
    // computed in MLA's expanded form, without adapters.
    // `source` is for programs that look ahead: the rows of the last step of program 0 that they continue.
    void run(Ints token, Ints position, Ints first_row, OutInts pages, Ints output_row, OutFloats logits,
             size_t program, std::optional<Ints> source, std::optional<Ints> adapter, std::optional<Flags> expanded) {
        require(token.size() > 0 && token.size() == position.size(), "one position a token");
        require(first_row.size() == pages.shape(0) + 1, "one row range a sequence");
        require(long(logits.shape(0)) == long(output_row.size()) && long(logits.shape(1)) == vocabulary_,
                "logits has the wrong shape");
        require((program == 0) == !source, "programs that look ahead need source rows, and only they");
        if (program == 0) rows_ = long(token.size());
        require(long(token.size()) <= rows_, "more rows than the step that they continue");  // its states must not move
        for (size_t i = 0; source && i < token.size(); ++i)
            require(source->size() == token.size() && source->data()[i] >= 0 && source->data()[i] < rows_,
                    "no such source row");
        for (size_t i = 0; adapter && i < token.size(); ++i)
            require(adapter->size() == token.size() && adapter->data()[i] >= -1 && adapter->data()[i] < num_adapters_,
                    "no such adapter");
        require(!expanded || expanded->size() == pages.shape(0), "one flag a sequence");
        shoal::Step step;
        step.expanded = expanded ? expanded->data() : nullptr;
        step.adapter = adapter ? adapter->data() : nullptr;
        step.tokens = long(token.size());
        step.token = token.data();
        step.position = position.data();
        step.source = source ? source->data() : nullptr;
        step.sequences = long(pages.shape(0));
        step.first_row = first_row.data();
        step.pages = pages.data();
        step.max_pages = long(pages.shape(1));
        step.outputs = long(output_row.size());
        step.output_row = output_row.data();
        step.logits = logits.data();
        nb::gil_scoped_release unlocked;
        engine_.run(program, step);
    }

  private:
    std::vector<const shoal::FeedForward*> routed_layers() const {
        std::vector<const shoal::FeedForward*> out;
        for (const auto& [program, op] : feed_forwards_)
            if (program == 0 && op->experts) out.push_back(op);
        return out;
    }
    shoal::PackedMatrix hold(const Packed& packed) {
        memory_.push_back(packed.memory);
        return packed.matrix;
    }
    std::vector<shoal::PackedMatrix> hold_stack(const Packed& stack) {
        std::vector<shoal::PackedMatrix> out;
        shoal::PackedMatrix matrix = hold(stack);
        for (long n = 0; n < stack.count; ++n, matrix.data += matrix.bytes()) out.push_back(matrix);
        return out;
    }
    const float* hold(const Floats& floats) {
        floats_.push_back(floats);
        return floats.data();
    }
    const float* hold(const std::optional<Floats>& floats) { return floats ? hold(*floats) : nullptr; }
    float* hold(const std::optional<OutFloats>& moments, long count, long cols) {
        if (!moments) return nullptr;
        require(long(moments->shape(0)) == count && long(moments->shape(1)) == cols + 1, "moments have another shape");
        moments_.push_back(*moments);
        return moments_.back().data();
    }
    // Of the input and the dense hidden rows, then by expert; a part that the layer lacks is left out.
    void hold_moments(shoal::FeedForward& op, const std::vector<OutFloats>& moments) {
        const size_t dense = op.has_dense ? 2 : 0;
        require(moments.size() == dense + (op.experts ? 2 : 0), "moments of another layer");
        const long cols = engine_.buffer_cols(op.input.buffer);
        if (op.has_dense) {
            op.moments = hold(std::optional(moments[0]), 1, cols);
            op.hidden_moments = hold(std::optional(moments[1]), 1, op.gate.rows);
        }
        if (op.experts) {
            op.expert_moments = hold(std::optional(moments[dense]), op.experts, cols);
            op.expert_hidden_moments = hold(std::optional(moments[dense + 1]), op.experts, op.expert_gate.rows);
        }
    }
    void adaptable(shoal::Adapted& matrix, const shoal::PackedMatrix& weight, long count = 1) {
        matrix.count = count;
        if (count) matrix.rows = weight.rows, matrix.cols = weight.cols;
        adapted_.push_back(&matrix);
    }
    void put(std::unique_ptr<shoal::Operation> op, bool barrier) {
        op->barrier_after = barrier;
        engine_.add(program_, std::move(op));
    }

    shoal::Expansion::Memory expansion_memory_;
    shoal::Engine engine_;
    std::vector<std::pair<size_t, const shoal::FeedForward*>> feed_forwards_;  // by program; the engine owns them
    struct Factors {
        size_t adapter;
        Halves a, b;
    };
    std::vector<shoal::Adapted*> adapted_;  // by number; the operations own them
    std::vector<Factors> factors_;          // what they point into
    long num_adapters_ = 0;
    std::vector<Bytes> memory_;
    std::vector<Floats> floats_;
    std::vector<OutFloats> moments_;
    bool wide_, wide_experts_;  // 16-bit activations
    size_t program_ = 0;
    long vocabulary_ = 0;
    long rows_ = 0;  // of the last step of program 0
};

}  // namespace

void shoal_bind_engine(nb::module_& m) {
    nb::class_<PlanEngine>(m, "Engine")
        .def(nb::init<int, bool, bool>(), "threads"_a, "wide"_a = false, "wide_experts"_a = false)
        .def_prop_ro("threads", &PlanEngine::threads)
        .def_prop_ro("cache_bytes", &PlanEngine::cache_bytes)
        .def_prop_ro("experts_read", &PlanEngine::experts_read)
        .def("buffer", &PlanEngine::buffer, "cols"_a)
        .def("cache", &PlanEngine::cache, "layers"_a, "widths"_a, "type"_a, "pages"_a)
        .def("embed", &PlanEngine::embed, "table"_a, "out"_a)
        .def("program", &PlanEngine::program, "number"_a)
        .def("look_ahead", &PlanEngine::look_ahead, "table"_a, "states"_a, "embed_norm"_a, "final_norm"_a,
             "state_norm"_a, "eps"_a, "out"_a)
        .def("rope_table", &PlanEngine::rope_table, "inverse_frequency"_a, "factor"_a, "cosines"_a, "sines"_a)
        .def("linear", &PlanEngine::linear, "input"_a, "norm"_a.none(), "eps"_a, "weights"_a, "biases"_a, "outs"_a,
             "add_to"_a = false, "moments"_a.noconvert() = nb::none())
        .def("head_linear", &PlanEngine::head_linear, "stack"_a, "input"_a, "in_first"_a, "in_step"_a, "out"_a,
             "out_first"_a, "out_step"_a)
        .def("cache_mla", &PlanEngine::cache_mla, "layer"_a, "query"_a, "heads"_a, "nope"_a, "rope"_a, "latent"_a,
             "compressed"_a, "norm"_a, "eps"_a, "cosines"_a, "sines"_a, "interleave"_a)
        .def("cache_gqa", &PlanEngine::cache_gqa, "layer"_a, "query"_a, "key"_a, "value"_a, "heads"_a, "kv_heads"_a,
             "head_dim"_a, "query_norm"_a.none(), "key_norm"_a.none(), "eps"_a, "cosines"_a, "sines"_a, "interleave"_a)
        .def("attention", &PlanEngine::attention, "layer"_a, "query"_a, "query_step"_a, "rotary"_a, "rotary_first"_a,
             "rotary_step"_a, "heads"_a, "kv_heads"_a, "key_width"_a, "value_width"_a, "shared_values"_a, "scale"_a,
             "out"_a, "expand_keys"_a = nb::none(), "expand_values"_a = nb::none(), "expand_out"_a = 0)
        .def("feed_forward", &PlanEngine::feed_forward, "input"_a, "norm"_a, "eps"_a, "dense"_a, "router"_a.none(),
             "bias"_a.none(), "routed"_a, "routing"_a, "moments"_a = std::vector<OutFloats>{})
        .def("adapt", &PlanEngine::adapt, "number"_a, "adapter"_a, "a"_a.noconvert(), "b"_a.noconvert(),
             "pieces"_a.noconvert(), "scales"_a.noconvert())
        .def("drop_adapter", &PlanEngine::drop_adapter, "adapter"_a)
        .def("routing", &PlanEngine::routing, "experts"_a.noconvert(), "weights"_a.noconvert(), "entropy"_a.noconvert())
        .def("head", &PlanEngine::head, "input"_a, "norm"_a, "eps"_a, "weight"_a, "moments"_a.noconvert() = nb::none())
        .def("run", &PlanEngine::run, "token"_a.noconvert(), "position"_a.noconvert(), "first_row"_a.noconvert(),
             "pages"_a.noconvert(), "output_row"_a.noconvert(), "logits"_a.noconvert(), "program"_a = 0,
             "source"_a.noconvert() = nb::none(), "adapter"_a.noconvert() = nb::none(),
             "expanded"_a.noconvert() = nb::none());
}
