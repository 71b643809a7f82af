// residual = x + gamma * y;  normed = (residual - mean) * rstd * weight + bias;  and the gradients of both.
//
// Layouts: rows of C features, unit stride inside a row (core/residual_scale_norm.h). Rows are shared out to threads in
// contiguous parts, features to the lanes of a vector.
//
// The operator does a dozen operations an element and so is bound by memory: 4 streams forward (x and y in, residual and
// normed out), 6 backward. So a row is brought in once and stays in the first-level cache (4 KiB at C = 1024) for what
// comes next: the sum, then the variance about the mean, which needs no trick to be accurate, then the result.
// Sums are kept in float, kSlots x kLanes of them beside each other, which bounds their rounding errors.
#include "core/residual_scale_norm.h"

#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace vggt_mv::VGGT_MV_ISA {

namespace {

// Below this many elements waking up other threads costs more than it saves.
constexpr int64_t kSerialElements = 16384;

int threads_for(int64_t elements, int num_threads) {
  return elements <= kSerialElements || num_threads < 1 ? 1 : num_threads;
}

template <typename T>
const T* row_of(const void* tensor, int64_t row, int64_t stride) {
  return static_cast<const T*>(tensor) + row * stride;
}

template <typename T>
T* row_of(void* tensor, int64_t row, int64_t stride) {
  return static_cast<T*>(tensor) + row * stride;
}

// The parameters as floats, widened once for all rows of a thread where they are stored in 16 bits.
template <typename P>
const float* as_floats(const void* parameter, int features, float* room) {
  if constexpr (std::is_same_v<P, float>) {
    return static_cast<const float*>(parameter);
  } else {
    const P* stored = static_cast<const P*>(parameter);
    for_each_vector(features, [&](int i, int, auto lanes)
                                  VGGT_MV_INLINE_LAMBDA { store(room + i, load(stored + i, lanes), lanes); });
    return room;
  }
}

struct Parameters {
  const float* gamma;
  const float* weight;
  const float* bias;
};

// `room` holds the row as it was rounded, where the stored row would have to be widened again.
template <typename X, typename Y>
void forward_row(const ResidualScaleNormParams& p, const Parameters& parameters, int64_t row, float* room) {
  const X* x = row_of<X>(p.x, row, p.x_row_stride);
  const Y* y = row_of<Y>(p.y, row, p.y_row_stride);
  X* residual = row_of<X>(p.residual, row, p.features);
  Y* normed = row_of<Y>(p.normed, row, p.features);
  const float* kept = room;
  if constexpr (std::is_same_v<X, float>) kept = residual;

  Vector sums[kSlots] = {};
  for_each_vector(p.features, [&](int i, int slot, auto lanes) VGGT_MV_INLINE_LAMBDA {
    const Vector sum = multiply_add(load(parameters.gamma + i, lanes), load(y + i, lanes), load(x + i, lanes));
    const Vector r = store_rounded(residual + i, sum, lanes);
    if constexpr (!std::is_same_v<X, float>) store(room + i, r, lanes);
    sums[slot] += keep(r, lanes);
  });
  const float mean = sum_of_slots(sums) / static_cast<float>(p.features);

  Vector squares[kSlots] = {};
  for_each_vector(p.features, [&](int i, int slot, auto lanes) VGGT_MV_INLINE_LAMBDA {
    const Vector distance = keep(load(kept + i, lanes) - mean, lanes);
    squares[slot] = multiply_add(distance, distance, squares[slot]);
  });
  const float variance = sum_of_slots(squares) / static_cast<float>(p.features);
  const float rstd = 1.0f / __builtin_sqrtf(variance + p.eps);

  for_each_vector(p.features, [&](int i, int, auto lanes) VGGT_MV_INLINE_LAMBDA {
    const Vector n = (load(kept + i, lanes) - mean) * rstd;
    store(normed + i, multiply_add(n, load(parameters.weight + i, lanes), load(parameters.bias + i, lanes)), lanes);
  });
  p.mean[row] = mean;
  p.rstd[row] = rstd;
}

template <typename X, typename Y, typename P>
Status forward(const ResidualScaleNormParams& p, int num_threads) {
  const int threads = threads_for(p.rows * p.features, num_threads);
  const int64_t size = p.features;
  bool failed = false;
#pragma omp parallel num_threads(threads)
  {
    const FloatBuffer room(4 * size);
    Parameters parameters = {};
    if (room.data != nullptr) {
      parameters = {as_floats<P>(p.gamma, p.features, room.data + size),
                    as_floats<P>(p.weight, p.features, room.data + 2 * size),
                    as_floats<P>(p.bias, p.features, room.data + 3 * size)};
    } else {
#pragma omp atomic write
      failed = true;
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
      if (room.data != nullptr) forward_row<X, Y>(p, parameters, row, room.data);
    }
  }
  return failed ? Status::out_of_memory : Status::ok;
}

template <typename T, typename Lanes>
VGGT_MV_INLINE Vector load_or_zero(const T* row, int i, Lanes lanes) {
  return row == nullptr ? Vector{} : load(row + i, lanes);
}

// `partial_sums` [3, C] of this block of rows: gamma, weight, bias.
template <typename X, typename Y>
void backward_row(const ResidualScaleNormBackwardParams& p, const Parameters& parameters, int64_t row,
                  float* partial_sums) {
  const X* grad_residual = p.grad_residual ? row_of<X>(p.grad_residual, row, p.features) : nullptr;
  const Y* grad_normed = p.grad_normed ? row_of<Y>(p.grad_normed, row, p.features) : nullptr;
  const X* residual = row_of<X>(p.residual, row, p.features);
  const Y* y = row_of<Y>(p.y, row, p.y_row_stride);
  X* grad_x = row_of<X>(p.grad_x, row, p.features);
  Y* grad_y = row_of<Y>(p.grad_y, row, p.features);
  float* sum_gamma = partial_sums;
  float* sum_weight = partial_sums + p.features;
  float* sum_bias = partial_sums + 2 * static_cast<int64_t>(p.features);
  const float mean = p.mean[row];
  const float rstd = p.rstd[row];

  // sum(g) and sum(g * n); lanes that take no part hold g = 0.
  float mean_g = 0.0f;
  float mean_gn = 0.0f;
  if (grad_normed != nullptr) {
    Vector sums[kSlots] = {};
    Vector products[kSlots] = {};
    for_each_vector(p.features, [&](int i, int slot, auto lanes) VGGT_MV_INLINE_LAMBDA {
      const Vector grad = load(grad_normed + i, lanes);
      const Vector n = (load(residual + i, lanes) - mean) * rstd;
      const Vector g = grad * load(parameters.weight + i, lanes);
      sums[slot] += g;
      products[slot] = multiply_add(g, keep(n, lanes), products[slot]);
      if (partial_sums != nullptr) {
        store(sum_weight + i, multiply_add(grad, n, load(sum_weight + i, lanes)), lanes);
        store(sum_bias + i, load(sum_bias + i, lanes) + grad, lanes);
      }
    });
    mean_g = sum_of_slots(sums) / static_cast<float>(p.features);
    mean_gn = sum_of_slots(products) / static_cast<float>(p.features);
  }

  for_each_vector(p.features, [&](int i, int, auto lanes) VGGT_MV_INLINE_LAMBDA {
    Vector grad = load_or_zero(grad_residual, i, lanes);
    if (grad_normed != nullptr) {
      const Vector n = (load(residual + i, lanes) - mean) * rstd;
      const Vector g = load(grad_normed + i, lanes) * load(parameters.weight + i, lanes);
      grad = multiply_add(broadcast(rstd), g - mean_g - n * mean_gn, grad);
    }
    store(grad_x + i, grad, lanes);
    store(grad_y + i, load(parameters.gamma + i, lanes) * grad, lanes);
    if (partial_sums != nullptr) {
      store(sum_gamma + i, multiply_add(grad, load(y + i, lanes), load(sum_gamma + i, lanes)), lanes);
    }
  });
}

// Stage two: adds the blocks' partial sums in order, so that the result does not depend on the number of threads.
void add_partial_sums(const ResidualScaleNormBackwardParams& p) {
  const int64_t size = 3 * static_cast<int64_t>(p.features);
  for (int64_t i = 0; i < size; ++i) p.grad_parameters[i] = 0.0f;
  for (int block = 0; block < p.row_blocks; ++block) {
    const float* partial = p.partial_sums + block * size;
    for (int64_t i = 0; i < size; ++i) p.grad_parameters[i] += partial[i];
  }
}

template <typename X, typename Y, typename P>
Status backward(const ResidualScaleNormBackwardParams& p, int num_threads) {
  const int threads = threads_for(p.rows * p.features, num_threads);
  const int64_t size = p.features;
  bool failed = false;
#pragma omp parallel num_threads(threads)
  {
    const FloatBuffer room(2 * size);
    Parameters parameters = {};
    if (room.data != nullptr) {
      parameters = {.gamma = as_floats<P>(p.gamma, p.features, room.data),
                    .weight = as_floats<P>(p.weight, p.features, room.data + size),
                    .bias = nullptr};
    } else {
#pragma omp atomic write
      failed = true;
    }
#pragma omp for schedule(static)
    for (int block = 0; block < p.row_blocks; ++block) {
      if (room.data == nullptr) continue;
      float* partial_sums = p.partial_sums == nullptr ? nullptr : p.partial_sums + block * 3 * size;
      if (partial_sums != nullptr) __builtin_memset(partial_sums, 0, 3 * size * sizeof(float));
      const int64_t end = first_row_of_block(block + 1, p.rows, p.row_blocks);
      for (int64_t row = first_row_of_block(block, p.rows, p.row_blocks); row < end; ++row) {
        backward_row<X, Y>(p, parameters, row, partial_sums);
      }
    }
  }
  if (failed) return Status::out_of_memory;
  if (p.partial_sums != nullptr) add_partial_sums(p);
  return Status::ok;
}

constexpr int combination(DType x, DType y, DType parameters) {
  return (static_cast<int>(x) * 3 + static_cast<int>(y)) * 3 + static_cast<int>(parameters);
}

// Calls run(X{}, Y{}, P{}) with the storage types of the params' dtypes.
template <typename Params, typename Run>
Status for_dtypes(const Params& p, Run run) {
  constexpr DType f32 = DType::f32, f16 = DType::f16, bf16 = DType::bf16;
  switch (combination(p.x_dtype, p.y_dtype, p.param_dtype)) {
    case combination(f32, f32, f32): return run(float{}, float{}, float{});
    case combination(f16, f16, f16): return run(Half{}, Half{}, Half{});
    case combination(bf16, bf16, bf16): return run(Bfloat16{}, Bfloat16{}, Bfloat16{});
    case combination(f32, f16, f32): return run(float{}, Half{}, float{});
    case combination(f32, bf16, f32): return run(float{}, Bfloat16{}, float{});
    case combination(f16, f16, f32): return run(Half{}, Half{}, float{});
    case combination(bf16, bf16, f32): return run(Bfloat16{}, Bfloat16{}, float{});
    default: return Status::unsupported_dtypes;
  }
}

}  // namespace

Status residual_scale_norm(const ResidualScaleNormParams& params, int num_threads) {
  return for_dtypes(params, [&](auto x, auto y, auto parameter) {
    return forward<decltype(x), decltype(y), decltype(parameter)>(params, num_threads);
  });
}

Status residual_scale_norm_backward(const ResidualScaleNormBackwardParams& params, int num_threads) {
  return for_dtypes(params, [&](auto x, auto y, auto parameter) {
    return backward<decltype(x), decltype(y), decltype(parameter)>(params, num_threads);
  });
}

}  // namespace vggt_mv::VGGT_MV_ISA
