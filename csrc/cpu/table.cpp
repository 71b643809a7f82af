#include "cpu/kernels.h"

namespace vggt_mv::VGGT_MV_ISA {

const CpuKernels kernels = {
    alternating_attention,
    alternating_attention_backward,
    conv3x3,
    dual_stream_attention,
    gathered_attention,
    qk_norm_rope,
    qk_norm_rope_backward,
    residual_scale_norm,
    residual_scale_norm_backward,
};

}  // namespace vggt_mv::VGGT_MV_ISA
