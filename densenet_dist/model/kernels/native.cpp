// The kernels of interface.py for CPUs, in C++ with OpenMP. They do not include PyTorch's headers, so that a build
// takes a few seconds and works with every version of torch. Maps are rows of channels, one row per pixel, `ld`
// elements apart.
//
// Sums are computed for chunks that depend on the shape only and added up in order, so any number of threads gives the
// same bits.

#include "native_common.h"
#include "native_conv1x1.h"
#include "native_conv3x3.h"

namespace {

template <typename T>
void bn_relu(int64_t rows, int64_t channels, int64_t padded, const T *x, int64_t ldx, const void *gamma,
             const void *beta, const void *mean, const void *var, double eps, T *out, int64_t ldo, int threads) {
  using A = typename Wide<T>::type;
  const Affine<A> norm(channels, static_cast<const A *>(gamma), static_cast<const A *>(beta),
                       static_cast<const A *>(mean), static_cast<const A *>(var), eps);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    T *to = out + row * ldo;
    rectify(channels, x + row * ldx, norm, to);
    for (int64_t c = channels; c < padded; ++c) store(to + c, A(0));
  }
}

template <typename T>
void store_output(int64_t rows, int64_t channels, const T *output, int64_t ldp, const uint8_t *mask, double keep,
                  T *slot, int64_t lds, void *mean, void *var, int threads) {
  using A = typename Wide<T>::type;
  const A factor = keep > 0 ? static_cast<A>(1 / keep) : A(0);
  const bool copies = output != slot || mask != nullptr;
  Moments<A> moments(rows, channels, mean != nullptr);
  const int64_t groups = moments.groups();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = group * kGroup, end = std::min(rows, begin + kGroup);
    std::vector<A> scratch(3 * channels);
    for (int64_t first = begin; first < end; first += kChunk) {
      const int64_t last = std::min(end, first + kChunk);
      if (copies)
        for (int64_t row = first; row < last; ++row)
          drop(channels, output + row * ldp, mask == nullptr ? nullptr : mask + row * channels, factor,
               slot + row * lds);
      moments.add(begin, first, last, slot, lds, scratch.data());
    }
  }
  moments.finish(mean, var);
}

// Add one consumer to a chunk: out = before + scale g, and the sums of g and of g (x - mean).
template <typename T, typename B, typename O>
void add_consumer(int64_t first, int64_t last, int64_t channels, const T *x, int64_t ldx, const T *gradient,
                  int64_t ldg, const typename Wide<T>::type *__restrict scale,
                  const typename Wide<T>::type *__restrict shift,
                  const typename Wide<T>::type *__restrict mean, const B *before, int64_t ldb, O *out, int64_t ldo,
                  typename Wide<T>::type *__restrict sum, typename Wide<T>::type *__restrict moment) {
  using A = typename Wide<T>::type;
  for (int64_t row = first; row < last; ++row) {
    const T *__restrict maps = x + row * ldx;
    const T *__restrict d_rectified = gradient + row * ldg;
    const B *from = before + row * ldb;
    O *to = out + row * ldo;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const A value = load(maps + c);
      const A g = value * scale[c] + shift[c] <= 0 ? A(0) : static_cast<A>(load(d_rectified + c));
      store(to + c, static_cast<A>(load(from + c)) + scale[c] * g);
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
void sum_gradients(int64_t rows, int64_t channels, const T *x, int64_t ldx, int64_t count, const Consumer<T> *consumers,
                   const T *accumulator, int64_t ldc, O *out, int64_t ldo, int threads) {
  using A = typename Wide<T>::type;
  std::vector<Affine<A>> norms;
  for (int64_t i = 0; i < count; ++i)
    norms.emplace_back(channels, static_cast<const A *>(consumers[i].gamma), static_cast<const A *>(consumers[i].beta),
                       static_cast<const A *>(consumers[i].mean), static_cast<const A *>(consumers[i].var),
                       consumers[i].eps);
  const int64_t groups = (rows + kGroup - 1) / kGroup, width = 2 * channels;
  std::vector<double> partial(groups * count * width);
  const std::vector<O> zeros(channels);
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
        const auto add = [&](const auto *before, int64_t ldb, auto *to, int64_t ldt) {
          add_consumer(first, last, channels, x, ldx, consumers[i].gradient, consumers[i].ld, norms[i].scale.data(),
                       norms[i].shift.data(), mean, before, ldb, to, ldt, sums.data(), sums.data() + channels);
        };
        if constexpr (sizeof(O) < sizeof(A)) {
          // Sum in the accumulation type and round once, instead of after every consumer.
          A *chunk = kept.data() - first * channels;
          if (i == 0 && accumulator == nullptr) std::fill(kept.begin(), kept.end(), A(0));
          if (i == 0 && accumulator != nullptr)
            for (int64_t row = first; row < last; ++row)
              for (int64_t c = 0; c < channels; ++c) chunk[row * channels + c] = load(accumulator + row * ldc + c);
          add(chunk, channels, chunk, channels);
          if (i == count - 1)
            for (int64_t row = first; row < last; ++row)
              for (int64_t c = 0; c < channels; ++c) store(out + row * ldo + c, chunk[row * channels + c]);
        } else if (i > 0) {
          add(out, ldo, out, ldo);
        } else if (accumulator != nullptr) {
          add(accumulator, ldc, out, ldo);
        } else {
          add(zeros.data(), 0, out, ldo);
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
void correct_gradient(int64_t rows, int64_t channels, int64_t padded, const G *gradient, int64_t ldg, const T *x,
                      int64_t ldx, const void *mean_, const void *offset_, const void *slope_, const uint8_t *mask,
                      double keep, T *out, int64_t ldo, int threads) {
  using A = typename Wide<T>::type;
  const A *mean = static_cast<const A *>(mean_), *slope = static_cast<const A *>(slope_);
  const A *offset = static_cast<const A *>(offset_);
  const A factor = keep > 0 ? static_cast<A>(1 / keep) : A(0);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const G *g = gradient + row * ldg;  // may be `out`
    const T *__restrict maps = x + row * ldx;
    const uint8_t *__restrict kept = mask + row * channels;
    T *to = out + row * ldo;
    if (mean == nullptr) {
#pragma omp simd
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
  extern "C" void store_output_##NAME(int64_t rows, int64_t channels, const T *output, int64_t ldp,                    \
                                      const uint8_t *mask, double keep, T *slot, int64_t lds, void *mean, void *var,   \
                                      int threads) {                                                                   \
    store_output(rows, channels, output, ldp, mask, keep, slot, lds, mean, var, threads);                              \
  }                                                                                                                    \
  extern "C" void sum_gradients_##NAME(int64_t rows, int64_t channels, const T *x, int64_t ldx, int64_t count,         \
                                       const void *consumers, const T *accumulator, int64_t ldc, void *out, int64_t ldo, \
                                       int wide, int threads) {                                                        \
    const auto *all = static_cast<const Consumer<T> *>(consumers);                                                     \
    if (wide)                                                                                                          \
      sum_gradients<T, WIDE>(rows, channels, x, ldx, count, all, accumulator, ldc, static_cast<WIDE *>(out), ldo, threads); \
    else                                                                                                               \
      sum_gradients<T, T>(rows, channels, x, ldx, count, all, accumulator, ldc, static_cast<T *>(out), ldo, threads);  \
  }                                                                                                                    \
  extern "C" void correct_gradient_##NAME(int64_t rows, int64_t channels, int64_t padded, const void *gradient,        \
                                          int64_t ldg, const T *x, int64_t ldx, const void *mean, const void *offset,  \
                                          const void *slope, const uint8_t *mask, double keep, T *out, int64_t ldo,    \
                                          int wide, int threads) {                                                     \
    if (wide)                                                                                                          \
      correct_gradient(rows, channels, padded, static_cast<const WIDE *>(gradient), ldg, x, ldx, mean, offset, slope,  \
                       mask, keep, out, ldo, threads);                                                                 \
    else                                                                                                               \
      correct_gradient(rows, channels, padded, static_cast<const T *>(gradient), ldg, x, ldx, mean, offset, slope,     \
                       mask, keep, out, ldo, threads);                                                                 \
  }

#define FOR_WIDE_TYPE(NAME, T)                                                                                         \
  extern "C" void conv1x1_##NAME(const ConvolutionForward<T> *conv) { conv1x1(*conv); }                                \
  extern "C" void conv3x3_##NAME(const ConvolutionForward<T> *conv) { conv3x3(*conv); }                                \
  extern "C" void conv1x1_backward_##NAME(const ConvolutionBackward<T> *conv) { conv1x1_backward(*conv); }             \
  extern "C" void conv3x3_backward_##NAME(const ConvolutionBackward<T> *conv) { conv3x3_backward(*conv); }

FOR_TYPE(f32, float, float)
FOR_TYPE(f64, double, double)
FOR_TYPE(bf16, bfloat16, float)
FOR_WIDE_TYPE(f32, float)
FOR_WIDE_TYPE(f64, double)
