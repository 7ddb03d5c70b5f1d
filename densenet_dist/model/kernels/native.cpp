// The four passes of interface.py for CPUs, in C++ with OpenMP. No header but the standard library's: a build takes two
// seconds, and fits every version of torch. Maps are rows of channels, `ld` elements apart, one row a pixel.
//
// Sums go over fixed chunks of rows, added up in order: the same bits with any number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t kChunk = 64;      // rows summed in single precision, their maps still in the first cache
constexpr int64_t kGroup = 1024;    // rows whose sums one thread makes alone

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

// y = scale x + shift. Forward and backward use this one expression, or the sign of y could differ by a rounding.
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

template <typename T>
void bn_relu(int64_t rows, int64_t channels, int64_t padded, const T *x, int64_t ldx, const void *gamma,
             const void *beta, const void *mean, const void *var, double eps, T *out, int64_t ldo, int threads) {
  using A = typename Wide<T>::type;
  const Affine<A> norm(channels, static_cast<const A *>(gamma), static_cast<const A *>(beta),
                       static_cast<const A *>(mean), static_cast<const A *>(var), eps);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const T *__restrict from = x + row * ldx;
    T *__restrict to = out + row * ldo;
    const A *__restrict scale = norm.scale.data();
    const A *__restrict shift = norm.shift.data();
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const A y = load(from + c) * scale[c] + shift[c];
      store(to + c, y < 0 ? A(0) : y);  // NaN stays NaN
    }
    for (int64_t c = channels; c < padded; ++c) store(to + c, A(0));
  }
}

template <typename T>
void write(int64_t rows, int64_t channels, const T *made, int64_t ldm, const uint8_t *mask, double keep, T *slot,
           int64_t lds, void *mean_, void *var_, int threads) {
  using A = typename Wide<T>::type;
  const A factor = keep > 0 ? static_cast<A>(1 / keep) : A(0);
  const bool copies = made != slot || mask != nullptr, counts = mean_ != nullptr;
  const int64_t groups = (rows + kGroup - 1) / kGroup;
  std::vector<double> means(counts ? groups * channels : 0), squares(counts ? groups * channels : 0);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = group * kGroup, end = std::min(rows, begin + kGroup);
    std::vector<A> sum(channels), square(channels), centre(channels);
    double *mean = counts ? means.data() + group * channels : nullptr;
    double *m2 = counts ? squares.data() + group * channels : nullptr;
    for (int64_t first = begin; first < end; first += kChunk) {
      const int64_t last = std::min(end, first + kChunk);
      if (copies)
        for (int64_t row = first; row < last; ++row) {
          const T *from = made + row * ldm;
          T *to = slot + row * lds;
          if (mask != nullptr) {
            const uint8_t *__restrict kept = mask + row * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; ++c) store(to + c, load(from + c) * (kept[c] ? factor : A(0)));
          } else {
#pragma omp simd
            for (int64_t c = 0; c < channels; ++c) to[c] = from[c];
          }
        }
      if (!counts) continue;
      // Mean and sum of squared deviations of the chunk, then merged as Chan, Golub and LeVeque (1983), eq. 2.1.
      std::fill(sum.begin(), sum.end(), A(0));
      std::fill(square.begin(), square.end(), A(0));
      for (int64_t row = first; row < last; ++row) {
        const T *__restrict from = slot + row * lds;
        A *__restrict s = sum.data();
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) s[c] += load(from + c);
      }
      const A share = A(1) / static_cast<A>(last - first);
      for (int64_t c = 0; c < channels; ++c) centre[c] = sum[c] * share;
      for (int64_t row = first; row < last; ++row) {
        const T *__restrict from = slot + row * lds;
        const A *__restrict middle = centre.data();
        A *__restrict s = square.data();
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const A off = load(from + c) - middle[c];
          s[c] += off * off;
        }
      }
      const double old = static_cast<double>(first - begin), more = static_cast<double>(last - first);
      for (int64_t c = 0; c < channels; ++c) {
        const double delta = static_cast<double>(centre[c]) - mean[c];
        mean[c] += delta * (more / (old + more));
        m2[c] += square[c] + delta * delta * (old * more / (old + more));
      }
    }
  }
  if (!counts) return;
  A *mean_out = static_cast<A *>(mean_), *var_out = static_cast<A *>(var_);
  for (int64_t c = 0; c < channels; ++c) {
    double mean = 0, m2 = 0;
    for (int64_t group = 0; group < groups; ++group) {
      const double old = static_cast<double>(group * kGroup);
      const double more = static_cast<double>(std::min(rows, (group + 1) * kGroup) - group * kGroup);
      const double delta = means[group * channels + c] - mean;
      mean += delta * (more / (old + more));
      m2 += squares[group * channels + c] + delta * delta * (old * more / (old + more));
    }
    mean_out[c] = static_cast<A>(mean);
    var_out[c] = static_cast<A>(m2 / static_cast<double>(std::max<int64_t>(rows, 1)));
  }
}

// One consumer's share of a chunk: out (+)= scale g, and the sums of g and of g (x - mean).
template <typename T, typename B, typename O, bool kFirst>
void add_consumer(int64_t first, int64_t last, int64_t channels, const T *x, int64_t ldx, const T *gradient, int64_t ldg,
                  const typename Wide<T>::type *__restrict scale, const typename Wide<T>::type *__restrict shift,
                  const typename Wide<T>::type *__restrict mean, const B *carry, int64_t ldc, O *out, int64_t ldo,
                  typename Wide<T>::type *__restrict sum, typename Wide<T>::type *__restrict moment) {
  using A = typename Wide<T>::type;
  for (int64_t row = first; row < last; ++row) {
    const T *__restrict maps = x + row * ldx;
    const T *__restrict came = gradient + row * ldg;
    const B *before = carry + row * ldc;
    O *to = out + row * ldo;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const A value = load(maps + c);
      const A g = value * scale[c] + shift[c] <= 0 ? A(0) : static_cast<A>(load(came + c));
      const A base = kFirst ? A(0) : static_cast<A>(load(before + c));
      store(to + c, base + scale[c] * g);
      sum[c] += g;
      moment[c] += g * (value - mean[c]);
    }
  }
}

template <typename T>
struct Consumer {
  const T *gradient;
  int64_t ld;
  const void *gamma, *beta, *mean, *var;
  double eps;
  void *sums;
};

template <typename T, typename O>
void gather(int64_t rows, int64_t channels, const T *x, int64_t ldx, int64_t count, const Consumer<T> *consumers,
            const T *carry, int64_t ldc, O *out, int64_t ldo, int threads) {
  using A = typename Wide<T>::type;
  std::vector<Affine<A>> norms;
  for (int64_t i = 0; i < count; ++i)
    norms.emplace_back(channels, static_cast<const A *>(consumers[i].gamma), static_cast<const A *>(consumers[i].beta),
                       static_cast<const A *>(consumers[i].mean), static_cast<const A *>(consumers[i].var),
                       consumers[i].eps);
  const int64_t groups = (rows + kGroup - 1) / kGroup, width = 2 * channels;
  std::vector<double> partial(groups * count * width);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = group * kGroup, end = std::min(rows, begin + kGroup);
    std::vector<A> sums(width);
    std::vector<A> kept(sizeof(O) < sizeof(A) ? kChunk * channels : 0);
    for (int64_t first = begin; first < end; first += kChunk) {
      const int64_t last = std::min(end, first + kChunk);
      for (int64_t i = 0; i < count; ++i) {
        std::fill(sums.begin(), sums.end(), A(0));
        const A *mean = static_cast<const A *>(consumers[i].mean);
        const auto add = [&](auto zero, auto *before, int64_t ldb, auto *to, int64_t ldt) {
          add_consumer<T, std::remove_const_t<std::remove_pointer_t<decltype(before)>>,
                       std::remove_pointer_t<decltype(to)>, decltype(zero)::value>(
              first, last, channels, x, ldx, consumers[i].gradient, consumers[i].ld, norms[i].scale.data(),
              norms[i].shift.data(), mean, before, ldb, to, ldt, sums.data(), sums.data() + channels);
        };
        if constexpr (sizeof(O) < sizeof(A)) {
          // Summed in single precision and rounded once, or every consumer would add a rounding.
          A *chunk = kept.data() - first * channels;
          if (i == 0 && carry != nullptr)
            for (int64_t row = first; row < last; ++row)
              for (int64_t c = 0; c < channels; ++c) chunk[row * channels + c] = load(carry + row * ldc + c);
          if (i == 0 && carry == nullptr)
            add(std::true_type{}, chunk, channels, chunk, channels);
          else
            add(std::false_type{}, chunk, channels, chunk, channels);
          if (i == count - 1)
            for (int64_t row = first; row < last; ++row)
              for (int64_t c = 0; c < channels; ++c) store(out + row * ldo + c, chunk[row * channels + c]);
        } else if (i > 0) {
          add(std::false_type{}, static_cast<const O *>(out), ldo, out, ldo);
        } else if (carry != nullptr) {
          add(std::false_type{}, carry, ldc, out, ldo);
        } else {
          add(std::true_type{}, static_cast<const O *>(out), ldo, out, ldo);
        }
        double *total = partial.data() + (group * count + i) * width;
        for (int64_t c = 0; c < width; ++c) total[c] += sums[c];
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    A *to = static_cast<A *>(consumers[i].sums);
    for (int64_t c = 0; c < width; ++c) {
      double total = 0;
      for (int64_t group = 0; group < groups; ++group) total += partial[(group * count + i) * width + c];
      to[c] = static_cast<A>(total);
    }
  }
}

template <typename T, typename G>
void finish(int64_t rows, int64_t channels, int64_t padded, const G *gradient, int64_t ldg, const T *x, int64_t ldx,
            const void *mean_, const void *offset_, const void *slope_, const uint8_t *mask, double keep, T *out,
            int64_t ldo, int threads) {
  using A = typename Wide<T>::type;
  const A *mean = static_cast<const A *>(mean_), *slope = static_cast<const A *>(slope_);
  const A *offset = static_cast<const A *>(offset_);
  const A factor = keep > 0 ? static_cast<A>(1 / keep) : A(0);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const G *__restrict g = gradient + row * ldg;
    const T *__restrict maps = x + row * ldx;
    const uint8_t *__restrict kept = mask + row * channels;
    T *__restrict to = out + row * ldo;
    if (mean == nullptr) {
      for (int64_t c = 0; c < channels; ++c)
        store(to + c, static_cast<A>(load(g + c)) * (mask == nullptr ? A(1) : kept[c] ? factor : A(0)));
    } else if (mask == nullptr) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c)
        store(to + c, static_cast<A>(load(g + c)) - offset[c] - slope[c] * (load(maps + c) - mean[c]));
    } else {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c)
        store(to + c, (static_cast<A>(load(g + c)) - offset[c] - slope[c] * (load(maps + c) - mean[c])) *
                          (kept[c] ? factor : A(0)));
    }
    for (int64_t c = channels; c < padded; ++c) store(to + c, A(0));
  }
}

}  // namespace

#define FOR_TYPE(NAME, T, WIDE)                                                                                        \
  extern "C" void bn_relu_##NAME(int64_t rows, int64_t channels, int64_t padded, const T *x, int64_t ldx,              \
                                 const void *gamma, const void *beta, const void *mean, const void *var, double eps,   \
                                 T *out, int64_t ldo, int threads) {                                                   \
    bn_relu(rows, channels, padded, x, ldx, gamma, beta, mean, var, eps, out, ldo, threads);                           \
  }                                                                                                                    \
  extern "C" void write_##NAME(int64_t rows, int64_t channels, const T *made, int64_t ldm, const uint8_t *mask,        \
                               double keep, T *slot, int64_t lds, void *mean, void *var, int threads) {                \
    write(rows, channels, made, ldm, mask, keep, slot, lds, mean, var, threads);                                       \
  }                                                                                                                    \
  extern "C" void gather_##NAME(int64_t rows, int64_t channels, const T *x, int64_t ldx, int64_t count,                \
                                const void *consumers, const T *carry, int64_t ldc, void *out, int64_t ldo,         \
                                int wide, int threads) {                                                               \
    const auto *all = static_cast<const Consumer<T> *>(consumers);                                                     \
    if (wide)                                                                                                          \
      gather<T, WIDE>(rows, channels, x, ldx, count, all, carry, ldc, static_cast<WIDE *>(out), ldo, threads);         \
    else                                                                                                               \
      gather<T, T>(rows, channels, x, ldx, count, all, carry, ldc, static_cast<T *>(out), ldo, threads);               \
  }                                                                                                                    \
  extern "C" void finish_##NAME(int64_t rows, int64_t channels, int64_t padded, const void *gradient, int64_t ldg,     \
                                const T *x, int64_t ldx, const void *mean, const void *offset, const void *slope,      \
                                const uint8_t *mask, double keep, T *out, int64_t ldo, int wide, int threads) {        \
    if (wide)                                                                                                          \
      finish(rows, channels, padded, static_cast<const WIDE *>(gradient), ldg, x, ldx, mean, offset, slope, mask,      \
             keep, out, ldo, threads);                                                                                 \
    else                                                                                                               \
      finish(rows, channels, padded, static_cast<const T *>(gradient), ldg, x, ldx, mean, offset, slope, mask, keep,   \
             out, ldo, threads);                                                                                       \
  }

FOR_TYPE(f32, float, float)
FOR_TYPE(f64, double, double)
FOR_TYPE(bf16, bfloat16, float)
