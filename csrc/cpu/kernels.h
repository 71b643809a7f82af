// The CPU kernels of one instruction set, as a table of functions; every operator adds its lines here.
//
// Each file in csrc/cpu except isa.cpp is compiled once for every instruction set with VGGT_MV_ISA set to its name
// (portable, avx2, avx512), and puts everything into the namespace vggt_mv::VGGT_MV_ISA.
#pragma once

#include "core/alternating_attention.h"
#include "core/conv3x3.h"
#include "core/dual_stream_attention.h"
#include "core/gathered_attention.h"
#include "core/qk_norm_rope.h"
#include "core/residual_scale_norm.h"
#include "core/status.h"

namespace vggt_mv {

struct CpuKernels {
  Status (*alternating_attention)(const AlternatingAttentionParams& params, int num_threads);
  Status (*alternating_attention_backward)(const AlternatingAttentionBackwardParams& params, int num_threads);
  Status (*conv3x3)(const Conv3x3Params& params, int num_threads);
  Status (*dual_stream_attention)(const DualStreamAttentionParams& params, int num_threads);
  Status (*gathered_attention)(const GatheredAttentionParams& params, int num_threads);
  Status (*qk_norm_rope)(const QkNormRopeParams& params, int num_threads);
  Status (*qk_norm_rope_backward)(const QkNormRopeBackwardParams& params, int num_threads);
  Status (*residual_scale_norm)(const ResidualScaleNormParams& params, int num_threads);
  Status (*residual_scale_norm_backward)(const ResidualScaleNormBackwardParams& params, int num_threads);
};

#if defined(VGGT_MV_ISA)
namespace VGGT_MV_ISA {

extern const CpuKernels kernels;

Status alternating_attention(const AlternatingAttentionParams& params, int num_threads);
Status alternating_attention_backward(const AlternatingAttentionBackwardParams& params, int num_threads);
Status conv3x3(const Conv3x3Params& params, int num_threads);
Status dual_stream_attention(const DualStreamAttentionParams& params, int num_threads);
Status gathered_attention(const GatheredAttentionParams& params, int num_threads);
Status qk_norm_rope(const QkNormRopeParams& params, int num_threads);
Status qk_norm_rope_backward(const QkNormRopeBackwardParams& params, int num_threads);
Status residual_scale_norm(const ResidualScaleNormParams& params, int num_threads);
Status residual_scale_norm_backward(const ResidualScaleNormBackwardParams& params, int num_threads);

}  // namespace VGGT_MV_ISA
#endif

}  // namespace vggt_mv
