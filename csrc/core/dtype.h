// The number formats that kernels read and write.
#pragma once

#include <cstdint>

namespace vggt_mv {

// The numbers stand in vggt_mv_ext/ops/_kernels.py too, on the other side of the binding.
enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

static constexpr int size_in_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace vggt_mv
