// Rows at odd addresses for the check programs.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

namespace shoal::tests {

constexpr int kGap = 3;                  // elements between rows
constexpr float kUntouched = -12345.0f;  // what lies in the gaps

// rows x cols floats at an odd address in a block that ends with the last element.
class Rows {
  public:
    Rows(int rows, int cols) : rows_(rows), cols_(cols), block_(1 + sizeof(float) * size()) {
        for (size_t i = 0; i < size(); ++i) {
            set(i, kUntouched);
        }
    }
    float* data() { return reinterpret_cast<float*>(block_.data() + 1); }
    int64_t stride() const { return cols_ + kGap; }
    size_t size() const { return rows_ ? static_cast<size_t>(rows_ * (cols_ + kGap) - kGap) : 0; }
    bool in_gap(size_t i) const { return static_cast<int>(i % static_cast<size_t>(cols_ + kGap)) >= cols_; }
    float get(size_t i) const {
        float value;
        std::memcpy(&value, block_.data() + 1 + sizeof(float) * i, sizeof(value));
        return value;
    }
    void set(size_t i, float value) { std::memcpy(block_.data() + 1 + sizeof(float) * i, &value, sizeof(value)); }
    void fill(uint32_t seed, float range) {
        for (size_t i = 0; i < size(); ++i) {
            seed = seed * 1664525u + 1013904223u;
            set(i, in_gap(i) ? kUntouched : range * (static_cast<float>(seed >> 8) / 8388608.0f - 1.0f));
        }
    }

  private:
    int rows_, cols_;
    std::vector<unsigned char> block_;
};

}  // namespace shoal::tests
