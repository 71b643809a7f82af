// s_ij = scale * q_i . k_j + row_gate_i * key_bias_j,   out_i = sum_j softmax_j(s_ij) v_j,   lse_i = log sum_j exp(s_ij)
//
// Layouts: core/alternating_attention.h. How it is computed: attention_forward.h, on the heads of grid_source.h.
#include "core/alternating_attention.h"

#include "cpu/attention_forward.h"
#include "cpu/grid_source.h"
#include "cpu/kernels.h"

namespace vggt_mv::VGGT_MV_ISA {

namespace {

template <typename T>
Status forward(const AlternatingAttentionParams& p, int num_threads) {
  const int64_t length = sequence_length(p.grid, p.axis);
  return attend<GridSource<T>>(sequence_count(p.grid, p.axis) * p.heads, length, length, p.width, num_threads,
                               [&](int64_t index) { return GridSource<T>(p, index); });
}

}  // namespace

Status alternating_attention(const AlternatingAttentionParams& params, int num_threads) {
  return for_dtype(params.dtype, [&](auto element) { return forward<decltype(element)>(params, num_threads); });
}

}  // namespace vggt_mv::VGGT_MV_ISA
