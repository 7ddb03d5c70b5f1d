// Shared by the CPU kernels: element types, a batch normalization as scale and shift, and the statistics of rows.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t kChunk = 128;   // rows summed in the accumulation type, while they are in the L1 cache
constexpr int64_t kGroup = 1024;  // rows that one thread sums, in double (3x3: whole images)

struct bfloat16 {
  uint16_t bits;
};

template <typename T>
struct Wide {
  using type = T;
};
template <>
struct Wide<bfloat16> {
  using type = float;
};

inline float load(const float *p) { return *p; }
inline double load(const double *p) { return *p; }
inline float load(const bfloat16 *p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void store(float *p, float value) { *p = value; }
inline void store(double *p, double value) { *p = value; }
inline void store(bfloat16 *p, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  p->bits = static_cast<uint16_t>(value != value ? 0x7FC0 : rounded);
}

// y = scale x + shift. The backward pass must recompute the same bits as the forward pass: if y > 0 in one of them and
// y <= 0 in the other, the gradient is of another function.
template <typename A>
struct Affine {
  std::vector<A> scale, shift;
  Affine(int64_t channels, const A *gamma, const A *beta, const A *mean, const A *var, double eps)
      : scale(channels), shift(channels) {
    for (int64_t c = 0; c < channels; ++c) {
      scale[c] = gamma[c] / std::sqrt(var[c] + static_cast<A>(eps));
      shift[c] = beta[c] - mean[c] * scale[c];
    }
  }
};

template <typename T, typename O, typename A>
inline void rectify(int64_t channels, const T *__restrict from, const Affine<A> &norm, O *__restrict to,
                    int64_t first = 0) {
  const A *__restrict scale = norm.scale.data() + first;
  const A *__restrict shift = norm.shift.data() + first;
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    const A y = load(from + c) * scale[c] + shift[c];
    store(to + c, y < 0 ? A(0) : y);  // NaN stays NaN
  }
}

// Apply dropout to a row, or copy it if there is no mask. `to` may be `from`.
template <typename S, typename T, typename A>
inline void drop(int64_t channels, const S *from, const uint8_t *kept, A factor, T *to) {
  if (kept != nullptr) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) store(to + c, load(from + c) * (kept[c] ? factor : A(0)));
  } else {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) store(to + c, load(from + c));
  }
}

// Mean and sum of squared deviations (M2) of each channel. They are computed for a chunk of rows while it is in the L1
// cache, and combined as in Chan, Golub and LeVeque (1983), eq. 2.1:
//
//   chunk 0..127: mean, M2 -> group 0 (rows 0..1023): 8 chunks, added in order by one thread -> all groups, in order
//
// The order depends on the shape only, so any number of threads gives the same bits.
template <typename A>
class Moments {
 public:
  Moments(int64_t rows, int64_t channels, bool wanted, int64_t group = kGroup)
      : rows_(rows), channels_(channels), group_(group), wanted_(wanted),
        means_(wanted ? groups() * channels : 0), squares_(wanted ? groups() * channels : 0) {}

  int64_t groups() const { return (rows_ + group_ - 1) / group_; }

  // Add rows [first, last) of the group that begins at row `begin`. `scratch` has 3 * channels elements.
  template <typename T>
  void add(int64_t begin, int64_t first, int64_t last, const T *values, int64_t ld, A *scratch) {
    if (!wanted_) return;
    A *__restrict sum = scratch, *__restrict square = sum + channels_, *__restrict center = square + channels_;
    std::fill(sum, sum + 2 * channels_, A(0));
    for (int64_t row = first; row < last; ++row) {
      const T *__restrict from = values + row * ld;
#pragma omp simd
      for (int64_t c = 0; c < channels_; ++c) sum[c] += load(from + c);
    }
    const A share = A(1) / static_cast<A>(last - first);
    for (int64_t c = 0; c < channels_; ++c) center[c] = sum[c] * share;
    for (int64_t row = first; row < last; ++row) {
      const T *__restrict from = values + row * ld;
#pragma omp simd
      for (int64_t c = 0; c < channels_; ++c) {
        const A off = load(from + c) - center[c];
        square[c] += off * off;
      }
    }
    double *mean = means_.data() + begin / group_ * channels_, *m2 = squares_.data() + begin / group_ * channels_;
    const double old = static_cast<double>(first - begin), more = static_cast<double>(last - first);
    for (int64_t c = 0; c < channels_; ++c) merge(mean[c], m2[c], old, center[c], square[c], more);
  }

  void finish(void *mean_out, void *var_out) const {
    if (!wanted_) return;
    for (int64_t c = 0; c < channels_; ++c) {
      double mean = 0, m2 = 0;
      for (int64_t group = 0; group < groups(); ++group) {
        const int64_t begin = group * group_, end = std::min(rows_, begin + group_);
        merge(mean, m2, static_cast<double>(begin), means_[group * channels_ + c], squares_[group * channels_ + c],
              static_cast<double>(end - begin));
      }
      static_cast<A *>(mean_out)[c] = static_cast<A>(mean);
      static_cast<A *>(var_out)[c] = static_cast<A>(m2 / static_cast<double>(std::max<int64_t>(rows_, 1)));
    }
  }

 private:
  static void merge(double &mean, double &m2, double old, double new_mean, double new_m2, double more) {
    const double delta = new_mean - mean;
    mean += delta * (more / (old + more));
    m2 += new_m2 + delta * delta * (old * more / (old + more));
  }

  int64_t rows_, channels_, group_;
  bool wanted_;
  std::vector<double> means_, squares_;
};

}  // namespace
