// pose: s_ij = scale * q_i . k_j - lambda_pose m_j,   geometry: s_ij = scale * q_i . k_j + lambda_geo m_j,
// out_i = sum_j softmax_j(s_ij) v_j,   lse_i = log sum_j exp(s_ij)
//
// Layouts: core/dual_stream_attention.h. How it is computed: attention_forward.h. The biases of both streams, one number for
// a token and stream, are computed ahead. Then one call shares out to threads:
//
// * heads of both streams, where each has its own q, k and v. The biases are added to the scores.
// * heads with two results, where streams share q, k and v: exp(x_ij + b_j) = exp(x_ij) exp(b_j), so that scores x and
//   their exponentials serve both, and a stream is weights exp(b_j) of the keys. Three products of matrices instead of
//   four, one softmax instead of two. It needs biases within kRange of each other: then no weight is small enough to
//   lose, with exp(x_ij), what would count in its stream. Else, with -inf for example, streams go as above.
#include "core/dual_stream_attention.h"

#include "cpu/attention_forward.h"
#include "cpu/grid_source.h"
#include "cpu/kernels.h"

namespace vggt_mv::VGGT_MV_ISA {

namespace {

// exp(x_ij - max x_i) counts as zero from exp(-88) on. A stream's own maximum is at most kRange lower, relative to the
// largest weight, so that what is left out there is below exp(-58) of the largest term.
constexpr float kRange = 30.0f;

struct Biases {
  float* of_stream[2];  // [B, T, N, P], zero up to a multiple of kLanes; null: no bias
  float largest[2];
  bool within_range;
};

// Places both streams' biases in `memory`, `stride` floats apart.
Biases make_biases(const DualStreamAttentionParams& p, int64_t tokens, int64_t stride, float* memory) {
  Biases biases = {{nullptr, nullptr}, {0.0f, 0.0f}, true};
  if (p.mask == nullptr) return biases;
  const float factors[2] = {-*p.lambda_pose, *p.lambda_geo};
  for (int stream = 0; stream < 2; ++stream) {
    float* to = biases.of_stream[stream] = memory + stream * stride;
    float smallest = __builtin_inff(), largest = -__builtin_inff();
    for (int64_t i = 0; i < tokens; ++i) {
      const float bias = factors[stream] * p.mask[i];
      smallest = bias < smallest ? bias : smallest;
      largest = bias > largest ? bias : largest;
      to[i] = bias;
    }
    for (int64_t i = tokens; i < stride; ++i) to[i] = 0.0f;
    biases.largest[stream] = largest;
    biases.within_range &= largest - smallest <= kRange;  // a NaN makes NaN of what it meets either way
  }
  return biases;
}

// From biases b to weights exp(b - largest b).
void make_weights(const Biases& biases, int64_t stride) {
  for (int stream = 0; stream < 2; ++stream) {
    float* weights = biases.of_stream[stream];
    for (int64_t i = 0; weights != nullptr && i < stride; i += kLanes) {
      store(weights + i, exp_of_nonpositive(load(weights + i) - biases.largest[stream]));
    }
  }
}

AlternatingAttentionParams stream_params(const DualStreamAttentionParams& p, int stream, const float* bias) {
  const bool own = stream == 1 && p.qkv_geo != nullptr;
  return {.qkv = own ? p.qkv_geo : p.qkv_pose,
          .key_bias = bias,
          .row_gate = nullptr,
          .out = stream == 0 ? p.pose : p.geo,
          .lse = stream == 0 ? p.lse_pose : p.lse_geo,
          .grid = p.grid,
          .qkv_strides = own ? p.geo_strides : p.pose_strides,
          .row_gate_strides = {},
          .axis = p.axis,
          .heads = p.heads,
          .width = p.width,
          .scale = p.scale,
          .dtype = p.dtype};
}

// One head of one sequence for both streams: the pose stream's, whose biases are weights, and where the geometry stream's
// results go.
template <typename T>
struct SharedSource : GridSource<T> {
  static constexpr int kWeights = 2;

  SharedSource(const AlternatingAttentionParams (&streams)[2], const Biases& biases, int64_t index)
      : GridSource<T>(streams[0], index),
        weight_stride(streams[1].key_bias - streams[0].key_bias),
        geo(streams[1], index) {
    this->bias = Bias::none;
    this->lse_offset = biases.largest[0];
    geo.lse_offset = biases.largest[1];
  }

  const GridSource<T>& result(int stream) const { return stream == 0 ? *this : geo; }

  int64_t weight_stride;
  GridSource<T> geo;
};

template <typename T>
Status forward(const DualStreamAttentionParams& p, int num_threads) {
  const int64_t tokens = frame_count(p.grid) * p.grid.tokens;
  const int64_t stride = round_up(tokens, kLanes);
  const FloatBuffer memory(p.mask == nullptr ? 0 : 2 * stride);
  if (memory.data == nullptr) return Status::out_of_memory;
  const Biases biases = make_biases(p, tokens, stride, memory.data);
  const AlternatingAttentionParams streams[2] = {stream_params(p, 0, biases.of_stream[0]),
                                                 stream_params(p, 1, biases.of_stream[1])};
  const int64_t heads = sequence_count(p.grid, p.axis) * p.heads;
  const int64_t length = sequence_length(p.grid, p.axis);
  if (p.qkv_geo == nullptr && biases.within_range) {
    make_weights(biases, stride);
    return attend<SharedSource<T>>(heads, length, length, p.width, num_threads,
                                   [&](int64_t index) { return SharedSource<T>(streams, biases, index); });
  }
  return attend<GridSource<T>>(2 * heads, length, length, p.width, num_threads,
                               [&](int64_t index) { return GridSource<T>(streams[index / heads], index % heads); });
}

}  // namespace

Status dual_stream_attention(const DualStreamAttentionParams& params, int num_threads) {
  return for_dtype(params.dtype, [&](auto element) { return forward<decltype(element)>(params, num_threads); });
}

}  // namespace vggt_mv::VGGT_MV_ISA
