// q, k -> rotate(LayerNorm_D(q)), rotate(LayerNorm_D(k)): see core/qk_norm_rope.h for the formula and the pairs.
//
// Layout    qkv and out [B, T, N, P, 3, h, D], each with strides of its own and unit stride in D.
// Mapping   A warp takes one token of one frame and walks through its 2 h rows of D elements (and h more to copy values,
//           unless in place). A row belongs to D / (2 kVector) lanes; a lane holds the kVector features from j on and
//           their kVector partners from j + w / 2 on, so a rotation needs no exchange, and mean and variance only a few
//           shuffles inside the row. D = 64, 16-bit: 4 lanes a row, 8 rows of a warp at a time. For D = 96, 6 (or 12)
//           lanes make a row and the last 2 (or 8) lanes of a warp rest. The backward does the same with blockIdx.y
//           choosing queries, keys or values, and a block keeps its tokens' sums for the norm's parameters in registers.
// Shared    None; the backward adds up its block's parameter gradients there at the end.
// Sums      In float; mean first, then squared deviations, both in registers.
// Why       Pure bandwidth: every element of q and k is read and written once, in 16-byte pieces, of which the lanes of
//           a row touch whole 32-byte sectors. A token's sines, cosines and norm parameters are read once for all
//           its heads and come from the L1 cache.
#pragma once

#include "core/qk_norm_rope.h"
#include "cuda/arch/numeric.cuh"
#include "cuda/arch/simt.cuh"

namespace vggt_mv {

constexpr int kQkNormRopeWarps = 4;

// How the D features of a row lie in the lanes of a warp.
template <typename T, int kWidth>
struct RopeLayout {
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  static constexpr int kHalf = kWidth / 2;                    // features that turn with one coordinate
  static constexpr int kVectorsOfHalf = kHalf / 2 / kVector;  // lanes that share such a half
  static constexpr int kLanes = 2 * kVectorsOfHalf;           // of a row
  static constexpr int kRows = simt::kWarpSize / kLanes;      // of a warp at a time
  static_assert(kHalf % (2 * kVector) == 0, "a pair of vectors must lie inside a half");

  int row;     // of the warp's rows; kRows or more: this lane rests
  int half;    // 0: turns with the row of the token, 1: with its column
  int pair;    // first of the lane's kVector pairs, below kHalf / 2
  int first;   // feature of the first element of each pair
  int second;  // of its partner

  __device__ __forceinline__ RopeLayout() {
    const int lane = simt::lane_index() % kLanes;
    row = simt::lane_index() / kLanes;
    half = lane / kVectorsOfHalf;
    pair = lane % kVectorsOfHalf * kVector;
    first = half * kHalf + pair;
    second = first + kHalf / 2;
  }

  // The sum over the lanes of a row, the same in each of them.
  __device__ __forceinline__ float row_sum(float value) const {
    if constexpr ((kLanes & (kLanes - 1)) == 0) {
#pragma unroll
      for (int mask = kLanes / 2; mask > 0; mask /= 2) value += simt::shuffle_xor(value, mask);
      return value;
    } else {
      float sum = 0.0f;
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) sum += simt::shuffle(value, row * kLanes + lane);
      return sum;
    }
  }
};

// Twice kVector features of a row in float: those from `first` on, then their partners from `second` on.
template <typename T, int kWidth>
struct RopeRow {
  using Layout = RopeLayout<T, kWidth>;
  static constexpr int kVector = Layout::kVector;
  float a[kVector], b[kVector];

  __device__ __forceinline__ void load(const Layout& layout, const T* row, bool valid) {
    Packed<T, kVector> packed_a = {}, packed_b = {};
    if (valid) {
      packed_a = load_packed<T, kVector>(row + layout.first);
      packed_b = load_packed<T, kVector>(row + layout.second);
    }
    unpack(packed_a, a);
    unpack(packed_b, b);
  }
  __device__ __forceinline__ void store(const Layout& layout, T* row) const {
    store_packed(row + layout.first, pack<T>(a));
    store_packed(row + layout.second, pack<T>(b));
  }
  __device__ __forceinline__ float sum() const {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) total += a[i] + b[i];
    return total;
  }
  // Replaces the row by its normalised form and returns 1 / standard deviation.
  __device__ __forceinline__ float normalise(const Layout& layout, float eps) {
    const float mean = layout.row_sum(sum()) * (1.0f / kWidth);
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      a[i] -= mean;
      b[i] -= mean;
      squares = fmaf(a[i], a[i], fmaf(b[i], b[i], squares));
    }
    const float rstd = simt::reciprocal_square_root(layout.row_sum(squares) * (1.0f / kWidth) + eps);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      a[i] *= rstd;
      b[i] *= rstd;
    }
    return rstd;
  }
};

// Cosines and sines of a lane's pairs at the position of its token.
template <typename T, int kWidth>
struct RopeAngles {
  static constexpr int kVector = RopeLayout<T, kWidth>::kVector;
  float cosine[kVector], sine[kVector];

  template <typename Params>
  __device__ __forceinline__ void load(const RopeLayout<T, kWidth>& layout, const Params& p, int token) {
    const int patch = token - p.special;
    int position = p.special_position;
    if (patch >= 0) position = 1 + (layout.half == 0 ? patch / p.grid_width : patch % p.grid_width);
    const float* table = p.cos_sin + (int64_t{position} * (kWidth / 4) + layout.pair) * 2;
    float both[2 * kVector];
    unpack(load_packed<float, 2 * kVector>(table), both);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      cosine[i] = both[2 * i];
      sine[i] = both[2 * i + 1];
    }
  }
};

template <typename T, typename P, int kWidth>
__global__ void __launch_bounds__(32 * kQkNormRopeWarps, 4)
    qk_norm_rope_kernel(const __grid_constant__ QkNormRopeParams p) {
  using Layout = RopeLayout<T, kWidth>;
  constexpr int kVector = Layout::kVector;
  const Layout layout;
  const int token = simt::block_index_x() * kQkNormRopeWarps + simt::warp_index();
  if (token >= p.grid.tokens) return;
  RopeAngles<T, kWidth> angles;
  angles.load(layout, p, token);

  const int64_t frames = frame_count(p.grid);
  for (int64_t frame = simt::block_index_y(); frame < frames; frame += simt::grid_size_y()) {
    const T* in = static_cast<const T*>(p.qkv) + frame_offset(p.grid, p.qkv_strides.tokens, frame) +
                  token * p.qkv_strides.tokens.token;
    T* out =
        static_cast<T*>(p.out) + frame_offset(p.grid, p.out_strides.tokens, frame) + token * p.out_strides.tokens.token;
    for (int part = 0; part < 2; ++part) {
      const P* weight = static_cast<const P*>(part == 0 ? p.q_weight : p.k_weight);
      const P* bias = static_cast<const P*>(part == 0 ? p.q_bias : p.k_bias);
      float weight_a[kVector], weight_b[kVector], bias_a[kVector], bias_b[kVector];
      if (weight != nullptr) {
        unpack(load_packed<P, kVector>(weight + layout.first), weight_a);
        unpack(load_packed<P, kVector>(weight + layout.second), weight_b);
        unpack(load_packed<P, kVector>(bias + layout.first), bias_a);
        unpack(load_packed<P, kVector>(bias + layout.second), bias_b);
      }
#pragma unroll 2
      for (int first_head = 0; first_head < p.heads; first_head += Layout::kRows) {
        const int head = first_head + layout.row;
        const bool valid = layout.row < Layout::kRows && head < p.heads;
        RopeRow<T, kWidth> row;
        row.load(layout, in + part * p.qkv_strides.part + head * p.qkv_strides.head, valid);
        if (weight != nullptr) {
          row.normalise(layout, p.eps);
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            row.a[i] = fmaf(row.a[i], weight_a[i], bias_a[i]);
            row.b[i] = fmaf(row.b[i], weight_b[i], bias_b[i]);
          }
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float a = row.a[i], b = row.b[i];
          row.a[i] = a * angles.cosine[i] - b * angles.sine[i];
          row.b[i] = b * angles.cosine[i] + a * angles.sine[i];
        }
        if (valid) row.store(layout, out + part * p.out_strides.part + head * p.out_strides.head);
      }
    }
    if (p.out == p.qkv) continue;
    for (int head = layout.row; head < p.heads && layout.row < Layout::kRows; head += Layout::kRows) {
      const T* from = in + 2 * p.qkv_strides.part + head * p.qkv_strides.head;
      T* to = out + 2 * p.out_strides.part + head * p.out_strides.head;
      store_packed(to + layout.first, load_packed<T, kVector>(from + layout.first));
      store_packed(to + layout.second, load_packed<T, kVector>(from + layout.second));
    }
  }
}

// The tokens of a block, over all frames, go to its warps in turn.
template <typename T, typename P, int kWidth>
__global__ void __launch_bounds__(32 * kQkNormRopeWarps, 3)
    qk_norm_rope_backward_kernel(const __grid_constant__ QkNormRopeBackwardParams p) {
  using Layout = RopeLayout<T, kWidth>;
  constexpr int kVector = Layout::kVector;
  const Layout layout;
  const int part = simt::block_index_y();
  const int block = simt::block_index_x();
  const P* weight = static_cast<const P*>(part == 0 ? p.q_weight : p.k_weight);
  float weight_a[kVector] = {}, weight_b[kVector] = {};
  if (weight != nullptr && part < 2) {
    unpack(load_packed<P, kVector>(weight + layout.first), weight_a);
    unpack(load_packed<P, kVector>(weight + layout.second), weight_b);
  }
  float sum_weight_a[kVector] = {}, sum_weight_b[kVector] = {}, sum_bias_a[kVector] = {}, sum_bias_b[kVector] = {};

  const int64_t tokens = token_count(p.grid);
  const int64_t first_token = tokens * block / p.blocks;
  const int64_t end_token = tokens * (block + 1) / p.blocks;
  for (int64_t index = first_token + simt::warp_index(); index < end_token; index += kQkNormRopeWarps) {
    const int64_t frame = index / p.grid.tokens;
    const int token = static_cast<int>(index % p.grid.tokens);
    const auto at = [&](const QkvStrides& strides) {
      return frame_offset(p.grid, strides.tokens, frame) + token * strides.tokens.token + part * strides.part;
    };
    const T* grad_out = static_cast<const T*>(p.grad_out) + at(p.grad_out_strides);
    const T* in = static_cast<const T*>(p.qkv) + at(p.qkv_strides);
    T* grad_in = static_cast<T*>(p.grad_qkv) + at(p.grad_qkv_strides);
    RopeAngles<T, kWidth> angles;
    if (part < 2) angles.load(layout, p, token);

    for (int first_head = 0; first_head < p.heads; first_head += Layout::kRows) {
      const int head = first_head + layout.row;
      const bool valid = layout.row < Layout::kRows && head < p.heads;
      RopeRow<T, kWidth> grad;
      grad.load(layout, grad_out + head * p.grad_out_strides.head, valid);
      if (part < 2) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float a = grad.a[i], b = grad.b[i];
          grad.a[i] = a * angles.cosine[i] + b * angles.sine[i];
          grad.b[i] = b * angles.cosine[i] - a * angles.sine[i];
        }
        if (weight != nullptr) {
          RopeRow<T, kWidth> row;
          row.load(layout, in + head * p.qkv_strides.head, valid);
          const float rstd = row.normalise(layout, p.eps);
          float products = 0.0f;
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            sum_weight_a[i] = fmaf(grad.a[i], row.a[i], sum_weight_a[i]);
            sum_weight_b[i] = fmaf(grad.b[i], row.b[i], sum_weight_b[i]);
            sum_bias_a[i] += grad.a[i];
            sum_bias_b[i] += grad.b[i];
            grad.a[i] *= weight_a[i];
            grad.b[i] *= weight_b[i];
            products = fmaf(grad.a[i], row.a[i], fmaf(grad.b[i], row.b[i], products));
          }
          const float mean_grad = layout.row_sum(grad.sum()) * (1.0f / kWidth);
          const float mean_product = layout.row_sum(products) * (1.0f / kWidth);
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            grad.a[i] = rstd * (grad.a[i] - fmaf(row.a[i], mean_product, mean_grad));
            grad.b[i] = rstd * (grad.b[i] - fmaf(row.b[i], mean_product, mean_grad));
          }
        }
      }
      if (valid) grad.store(layout, grad_in + head * p.grad_qkv_strides.head);
    }
  }

  if (p.partial_sums == nullptr || part == 2) return;
  // One [2, D] for each row of each warp, added up in order.
  const auto sums = simt::dynamic_shared<float>();
  if (layout.row < Layout::kRows) {
    const int slot = (simt::warp_index() * Layout::kRows + layout.row) * 2 * kWidth;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      sums.store(slot + layout.first + i, sum_weight_a[i]);
      sums.store(slot + layout.second + i, sum_weight_b[i]);
      sums.store(slot + kWidth + layout.first + i, sum_bias_a[i]);
      sums.store(slot + kWidth + layout.second + i, sum_bias_b[i]);
    }
  }
  simt::block_barrier();
  float* partial = p.partial_sums + (int64_t{part} * p.blocks + block) * 2 * kWidth;
  for (int column = simt::thread_index(); column < 2 * kWidth; column += simt::block_size()) {
    float sum = 0.0f;
    for (int slot = 0; slot < kQkNormRopeWarps * Layout::kRows; ++slot) sum += sums.load(slot * 2 * kWidth + column);
    simt::store_global(partial + column, sum);
  }
}

}  // namespace vggt_mv
