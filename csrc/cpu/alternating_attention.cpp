// s_ij = scale * q_i . k_j + row_gate_i * key_bias_j,   out_i = sum_j softmax_j(s_ij) v_j,   lse_i = log sum_j exp(s_ij)
//
// Layouts: core/alternating_attention.h. How it is computed: attention_forward.h. Here is what an axis of the token grid
// makes of a sequence: a run of tokens for every frame, read and written where they lie.
#include "core/alternating_attention.h"

#include "cpu/attention_forward.h"
#include "cpu/kernels.h"

namespace vggt_mv::VGGT_MV_ISA {

namespace {

// One head of one sequence.
template <typename T>
struct GridSource {
  using Storage = T;

  GridSource(const AlternatingAttentionParams& params, int64_t index)
      : p(params),
        keys(sequence_length(params.grid, params.axis)),
        width(params.width),
        scale(params.scale),
        has_bias(params.key_bias != nullptr),
        sequence(index / params.heads),
        head(static_cast<int>(index % params.heads)),
        lse(params.lse == nullptr ? nullptr : params.lse + index * keys) {}

  const T* part(int which, int64_t frame, int token) const {
    return static_cast<const T*>(p.qkv) + frame_offset(p.grid, p.qkv_strides.tokens, frame) +
           token * p.qkv_strides.tokens.token + which * p.qkv_strides.part + head * p.qkv_strides.head;
  }

  template <typename Body>
  VGGT_MV_INLINE void for_each_row_run(int64_t first, int count, Body body) const {
    for_each_run(p.grid, p.axis, sequence, first, count, [&](int64_t frame, int token, int done, int run) {
      const float* gate = p.row_gate == nullptr ? nullptr
                                                : p.row_gate + frame_offset(p.grid, p.row_gate_strides, frame) +
                                                      token * p.row_gate_strides.token;
      body(part(0, frame, token), p.qkv_strides.tokens.token, gate, p.row_gate_strides.token, done, run);
    });
  }

  template <typename Body>
  VGGT_MV_INLINE void for_each_key_run(int64_t first, int count, Body body) const {
    for_each_run(p.grid, p.axis, sequence, first, count, [&](int64_t frame, int token, int done, int run) {
      const float* bias = p.key_bias == nullptr ? nullptr : p.key_bias + frame * p.grid.tokens + token;
      body(part(1, frame, token), part(2, frame, token), p.qkv_strides.tokens.token, bias, done, run);
    });
  }

  template <typename Body>
  VGGT_MV_INLINE void for_each_out_run(int64_t first, int count, Body body) const {
    const int64_t stride = int64_t{p.heads} * p.width;
    for_each_run(p.grid, p.axis, sequence, first, count, [&](int64_t frame, int token, int done, int run) {
      body(static_cast<T*>(p.out) + (frame * p.grid.tokens + token) * stride + int64_t{head} * p.width, stride, done,
           run);
    });
  }

  const AlternatingAttentionParams& p;
  int64_t keys;
  int width;
  float scale;
  bool has_bias;
  int64_t sequence;
  int head;
  float* lse;
};

template <typename T>
Status forward(const AlternatingAttentionParams& p, int num_threads) {
  const int64_t length = sequence_length(p.grid, p.axis);
  return attend<T>(sequence_count(p.grid, p.axis) * p.heads, length, length, p.width, num_threads,
                   [&](int64_t index) { return GridSource<T>(p, index); });
}

}  // namespace

Status alternating_attention(const AlternatingAttentionParams& params, int num_threads) {
  switch (params.dtype) {
    case DType::f32: return forward<float>(params, num_threads);
    case DType::f16: return forward<Half>(params, num_threads);
    case DType::bf16: return forward<Bfloat16>(params, num_threads);
  }
  return Status::unsupported_dtypes;
}

}  // namespace vggt_mv::VGGT_MV_ISA
