// The kernels of packed weights against the scalar table. Numbers are chosen so that every sum is exact in float32: the
// order of additions and fused operations then change nothing, and one wrong element shows as a wrong bit. Only attend,
// with its exponentials, is held to a tolerance.
#include "tests/packed_check.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>

#include "tests/rows.h"

namespace shoal::tests {
namespace {

class Random {
  public:
    explicit Random(uint32_t seed) : state_(seed * 2654435761u + 1) {}
    uint32_t below(uint32_t n) {
        state_ = state_ * 1664525u + 1013904223u;
        return static_cast<uint32_t>(static_cast<uint64_t>(state_ >> 8) * n >> 24);
    }
    float whole(int range) { return static_cast<float>(static_cast<int>(below(2 * range + 1)) - range); }
    float unit() { return static_cast<float>(below(1 << 20)) / static_cast<float>(1 << 19) - 1.0f; }

  private:
    uint32_t state_;
};

// `count` values in a heap block of their exact size, so that AddressSanitizer sees one step too far.
template <class T>
struct Array {
    explicit Array(int64_t count) : size(count), data(new T[static_cast<size_t>(count)]()) {}
    int64_t size;
    std::unique_ptr<T[]> data;
    T* get() { return data.get(); }
    bool same(const Array& other) const {
        return std::memcmp(data.get(), other.data.get(), sizeof(T) * static_cast<size_t>(size)) == 0;
    }
};

struct Quant {
    Quant(int64_t rows, int64_t cols, int64_t lanes)
        : codes(padded(rows, lanes) * round_up(cols, 64)),
          scales(padded(rows, lanes) * round_up(cols, 64) / 32),
          sums(padded(rows, lanes) * round_up(cols, 64) / 32),
          rest(rows * cols) {}
    static int64_t padded(int64_t rows, int64_t lanes) { return (rows + lanes - 1) / lanes * lanes; }
    void fill(const Ops& ops, Rows& x, int64_t rows, int64_t cols, int64_t lanes) {
        std::vector<const float*> pointers;
        for (int64_t row = 0; row < rows; ++row) pointers.push_back(x.data() + row * x.stride());
        ops.quantize_rows(pointers.data(), rows, cols, lanes, codes.get(), scales.get(), sums.get(), rest.get());
    }
    Array<int8_t> codes;
    Array<float> scales;
    Array<int32_t> sums;
    Array<float> rest;
};

uint16_t bf16(float value) { return static_cast<uint16_t>(__builtin_bit_cast(uint32_t, value) >> 16); }

bool fail(const char* kernel, const Ops& ops, int rows, int cols, int tokens) {
    std::fprintf(stderr, "%s on %s differs: %d rows, %d columns, %d tokens\n", kernel, ops.isa, rows, cols, tokens);
    return false;
}

bool same_rows(const Rows& a, const Rows& b) {
    for (size_t i = 0; i < a.size(); ++i) {
        const float x = a.get(i), y = b.get(i);
        if (std::memcmp(&x, &y, sizeof(x)) != 0) return false;
    }
    return true;
}

bool check_quantize_rows(const Ops& ops, const Ops& scalar) {
    for (int cols = 1; cols <= 131; ++cols) {
        for (int lanes = 1; lanes <= 4; lanes += 3) {
            const int rows = cols % 6;
            Rows x(rows, cols);
            x.fill(static_cast<uint32_t>(cols), cols % 7 ? 3.0f : 1e-38f);
            if (rows > 1) x.set(0, cols % 2 ? NAN : 3e38f);
            Quant ours(rows, cols, lanes), truth(rows, cols, lanes);
            ours.fill(ops, x, rows, cols, lanes);
            truth.fill(scalar, x, rows, cols, lanes);
            bool same = ours.codes.same(truth.codes) && ours.sums.same(truth.sums);
            for (int64_t i = 0; i < ours.scales.size; ++i) {  // a NaN may have any sign
                const float a = ours.scales.data[i], b = truth.scales.data[i];
                same = same && (a == b || (a != a && b != b));
            }
            for (int64_t i = 0; i < ours.rest.size; ++i) {
                const float a = ours.rest.data[i], b = truth.rest.data[i];
                same = same && (a == b || (a != a && b != b));
            }
            if (!same) return fail("quantize_rows", ops, rows, cols, lanes);
        }
    }
    return true;
}

// Tiles at an odd address: random codes, or all at one end, with scales and minima that are small powers of two.
struct Tiles {
    Tiles(Packing packing, int rows, int cols, uint32_t seed, int fill)
        : matrix{packing, rows, cols, nullptr}, block(static_cast<int64_t>(matrix.bytes()) + 1) {
        Random random(seed);
        uint8_t* at = block.get() + 1;
        matrix.data = at;
        const size_t bytes = block_bytes(packing);
        for (size_t i = 0; i < matrix.bytes(); ++i) {
            const size_t in_block = i % bytes;
            if (in_block < (packing == Packing::q4m ? 128u : 64u)) {  // f16: 1, 1/2, -1/2, -1 by their high bytes
                constexpr uint8_t halves[4] = {0x3C, 0x38, 0xB8, 0xBC};
                at[i] = in_block % 2 ? halves[fill < 0 ? random.below(4) : 0] : 0;
            } else {
                at[i] = fill < 0 ? static_cast<uint8_t>(random.below(256)) : static_cast<uint8_t>(fill);
            }
        }
    }
    PackedMatrix matrix;
    Array<uint8_t> block;
};

bool check_product(const Ops& ops, const Ops& scalar, const Tiles& w, int tokens, int lanes, int fill) {
    const int rows = static_cast<int>(w.matrix.rows), cols = static_cast<int>(w.matrix.cols);
    Random random(static_cast<uint32_t>(rows * 1000 + cols + tokens));
    Rows x(tokens, cols), y(tokens, rows), truth(tokens, rows);
    for (size_t i = 0; i < x.size(); ++i) {
        if (!x.in_gap(i)) x.set(i, fill < 0 ? random.whole(127) : i % 3 ? 127.0f : -127.0f);
    }
    Quant quant(tokens, cols, lanes);
    quant.fill(scalar, x, tokens, cols, lanes);
    for (int64_t i = 0; i < quant.scales.size; ++i) quant.scales.data[i] = i % 3 && fill < 0 ? 0.5f : 1.0f;
    const QuantRows rows_of_x{quant.codes.get(), quant.scales.get(), quant.sums.get()};
    const int packing = static_cast<int>(w.matrix.packing);
    y.fill(1, 0.0f);
    truth.fill(1, 0.0f);
    for (int add = 0; add < 3; ++add) {  // overwrites, then adds twice
        ops.matmul_q(packing, w.matrix.data, w.matrix.tiles(), cols, rows, &rows_of_x, tokens, lanes, y.data(),
                     y.stride(), add > 0);
        scalar.matmul_q(packing, w.matrix.data, w.matrix.tiles(), cols, rows, &rows_of_x, tokens, lanes, truth.data(),
                        truth.stride(), add > 0);
    }
    return same_rows(y, truth) || fail("matmul_q", ops, rows, cols, tokens);
}

bool check_matmul_q(const Ops& ops, const Ops& scalar) {
    for (const Packing packing : {Packing::q8, Packing::q4, Packing::q4m}) {
        for (int step = 0; step < 26; ++step) {
            const int rows = 1 + step * 7 % 50, cols = 1 + step * 37 % 200, tokens = 1 + step % 13;
            for (const int fill : {-1, 0, 255}) {
                const Tiles w(packing, rows, cols, static_cast<uint32_t>(step), fill);
                if (!check_product(ops, scalar, w, tokens, 1, fill)) return false;
                if (!check_product(ops, scalar, w, tokens, 4, fill)) return false;
            }
        }
    }
    return true;
}

bool check_matmul_f(const Ops& ops, const Ops& scalar) {
    for (const Packing packing : {Packing::f32, Packing::bf16}) {
        for (int step = 0; step < 40; ++step) {
            const int rows = 1 + step * 7 % 50, cols = 1 + step * 37 % 200, tokens = 1 + step % 9;
            Tiles w(packing, rows, cols, 0, 0);
            Random random(static_cast<uint32_t>(step));
            for (size_t i = 0; i < w.matrix.bytes(); i += packing == Packing::f32 ? 4 : 2) {
                const float value = random.whole(64) / 8.0f;  // exact in bf16 too
                uint8_t bytes[4];
                std::memcpy(bytes, &value, 4);
                if (packing == Packing::f32)
                    std::memcpy(w.block.get() + 1 + i, bytes, 4);
                else
                    std::memcpy(w.block.get() + 1 + i, bytes + 2, 2);
            }
            Rows x(tokens, cols), y(tokens, rows), truth(tokens, rows);
            for (size_t i = 0; i < x.size(); ++i) x.set(i, x.in_gap(i) ? NAN : random.whole(100));
            y.fill(1, 0.0f);
            truth.fill(1, 0.0f);
            for (int add = 0; add < 2; ++add) {
                ops.matmul_f(static_cast<int>(packing), w.matrix.data, w.matrix.tiles(), cols, rows, x.data(),
                             x.stride(), tokens, y.data(), y.stride(), add > 0);
                scalar.matmul_f(static_cast<int>(packing), w.matrix.data, w.matrix.tiles(), cols, rows, x.data(),
                                x.stride(), tokens, truth.data(), truth.stride(), add > 0);
            }
            if (!same_rows(y, truth)) return fail("matmul_f", ops, rows, cols, tokens);
        }
    }
    return true;
}

// Whole numbers and eighths: both products are exact.
bool check_lora_shrink(const Ops& ops, const Ops& scalar) {
    for (int step = 0; step < 150; ++step) {
        const int rows = step % 4, cols = 1 + step, rank = step % 7;
        Random random(static_cast<uint32_t>(step));
        Array<uint16_t> a(rank * cols);
        for (int64_t i = 0; i < a.size; ++i) a.data[i] = bf16(random.whole(64) / 8.0f);
        Rows x(rows, cols);
        for (size_t i = 0; i < x.size(); ++i) x.set(i, x.in_gap(i) ? NAN : random.whole(100));
        Array<float> low(rows * rank), truth(rows * rank);
        ops.lora_shrink(x.data(), x.stride(), rows, cols, a.get(), rank, 0.5f, low.get(), rank);
        scalar.lora_shrink(x.data(), x.stride(), rows, cols, a.get(), rank, 0.5f, truth.get(), rank);
        if (!low.same(truth)) return fail("lora_shrink", ops, rank, cols, rows);
    }
    return true;
}

bool check_lora_expand(const Ops& ops, const Ops& scalar) {
    for (int step = 0; step < 150; ++step) {
        const int rows = step % 4, cols = 1 + step, rank = step % 7;
        Random random(static_cast<uint32_t>(step));
        Array<uint16_t> b(rank * (cols + 3));  // in rows that go on behind the columns
        for (int64_t i = 0; i < b.size; ++i) b.data[i] = i % (cols + 3) < cols ? bf16(random.whole(64) / 8.0f) : 0x7fc0;
        Array<float> low(rows * rank);
        for (int64_t i = 0; i < low.size; ++i) low.data[i] = random.whole(100);
        Rows y(rows, cols), truth(rows, cols);
        y.fill(1, 0.0f);
        truth.fill(1, 0.0f);
        ops.lora_expand(low.get(), rank, rows, rank, b.get(), cols + 3, cols, y.data(), y.stride());
        scalar.lora_expand(low.get(), rank, rows, rank, b.get(), cols + 3, cols, truth.data(), truth.stride());
        if (!same_rows(y, truth)) return fail("lora_expand", ops, rank, cols, rows);
    }
    return true;
}

bool check_widen_rows(const Ops& ops, const Ops& scalar) {
    for (int width = 1; width <= 140; ++width) {
        const int rows = width % 5, scales_at = (width + 3) / 4 * 4, bytes = scales_at + (width + 63) / 64 * 4;
        Random random(static_cast<uint32_t>(width));
        Array<uint8_t> x(rows * bytes);
        for (int64_t i = 0; i < x.size; ++i) x.data[i] = static_cast<uint8_t>(random.below(256));
        for (int row = 0; row < rows; ++row) {
            for (int at = scales_at; at < bytes; at += 4) {
                const float scale = random.unit();
                std::memcpy(x.get() + row * bytes + at, &scale, 4);
            }
        }
        Array<uint16_t> y(rows * width), truth(rows * width);
        ops.widen_rows(x.get(), bytes, scales_at, rows, width, y.get());
        scalar.widen_rows(x.get(), bytes, scales_at, rows, width, truth.get());
        if (!y.same(truth)) return fail("widen_rows", ops, rows, width, 0);
    }
    return true;
}

bool check_narrow_rows(const Ops& ops, const Ops& scalar) {
    Random random(5);
    for (int64_t cols = 1; cols < 70; ++cols) {
        const int64_t rows = 1 + cols % 3, stride = cols + cols % 5;
        Array<float> x(rows * stride);
        for (int64_t i = 0; i < x.size; ++i) x.data[i] = random.unit() * (i % 7 == 0 ? 1e-39f : 3e4f);
        x.data[0] = cols % 4 == 0 ? __builtin_nanf("") : x.data[0];
        Array<uint16_t> y(rows * cols), truth(rows * cols);
        ops.narrow_rows(x.get(), stride, 0.37f, y.get(), cols, rows, cols);
        scalar.narrow_rows(x.get(), stride, 0.37f, truth.get(), cols, rows, cols);
        if (!y.same(truth)) return fail("narrow_rows", ops, rows, cols, stride);
    }
    return true;
}

struct Attended {
    explicit Attended(int64_t values) : top(16), total(16), out(values) {
        for (int lane = 0; lane < 16; ++lane) top.data[lane] = -1e30f;
    }
    Array<float> top, total, out;
};

template <class T>
bool check_run(const Ops& ops, const Ops& scalar, int queries, int keys, int key_width, int value_width) {
    Random random(static_cast<uint32_t>(queries * 4096 + keys * 64 + value_width));
    auto element = [&] {
        const float value = random.unit();
        if constexpr (sizeof(T) == 2) {
            return static_cast<uint16_t>(__builtin_bit_cast(uint32_t, value) >> 16);
        } else {
            return value;
        }
    };
    Array<T> q(16 * key_width), k(keys * (key_width + 1) - 1), v(keys * (value_width + 3) - 3);
    for (int64_t i = 0; i < q.size; ++i) q.data[i] = element();
    for (int64_t i = 0; i < k.size; ++i) k.data[i] = element();
    for (int64_t i = 0; i < v.size; ++i) v.data[i] = element();
    Array<int32_t> last(16);
    Attended ours(queries * value_width), truth(queries * value_width);
    for (int block = 0; block < 2; ++block) {
        for (int lane = 0; lane < 16; ++lane) {
            last.data[lane] = lane < queries ? static_cast<int32_t>(random.below(64) + 64 * random.below(2)) : -1;
        }
        const int lanes = query_lanes(sizeof(T) == 2, queries, key_width);
        const AttendRun run{sizeof(T) == 2,  q.get(),   queries,     lanes, k.get(),    v.get(),   key_width + 1,
                            value_width + 3, key_width, value_width, keys,  block * 64, last.get()};
        ops.attend(&run, ours.top.get(), ours.total.get(), ours.out.get());
        scalar.attend(&run, truth.top.get(), truth.total.get(), truth.out.get());
    }
    const float tolerance = sizeof(T) == 2 ? 8e-3f : 2e-5f;  // a weight that rounds the other way in bf16
    for (int i = 0; i < queries * value_width; ++i) {
        const int lane = i / value_width;
        const float a = ours.out.data[i] / ours.total.data[lane], b = truth.out.data[i] / truth.total.data[lane];
        if (!(std::fabs(a - b) <= tolerance)) return fail("attend", ops, queries, key_width, keys);
    }
    return true;
}

bool check_attend(const Ops& ops, const Ops& scalar) {
    for (int step = 0; step < 70; ++step) {
        const int queries = 1 + step % 16, keys = 1 + step * 11 % 64, value_width = 1 + step * 5 % 40;
        if (!check_run<float>(ops, scalar, queries, keys, 1 + step, value_width)) return false;
        if (!check_run<uint16_t>(ops, scalar, queries, keys, 2 + 2 * step, value_width)) return false;
    }
    return true;
}

}  // namespace

const std::vector<PackedCase>& packed_cases() {
    static const std::vector<PackedCase> cases = {
        {"quantize_rows", check_quantize_rows}, {"matmul_q", check_matmul_q},       {"matmul_f", check_matmul_f},
        {"lora_shrink", check_lora_shrink},     {"lora_expand", check_lora_expand}, {"widen_rows", check_widen_rows},
        {"narrow_rows", check_narrow_rows},     {"attend", check_attend},
    };
    return cases;
}

}  // namespace shoal::tests
