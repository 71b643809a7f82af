// The Python module vggt_mv_ext._C: addresses and sizes in, kernels launched, a failure out as an exception.
//
// Arguments come in the order of the params structs of csrc/core; vggt_mv_ext/ops checks them first. Tensors are passed
// as addresses, so that nothing here depends on a version of PyTorch, and the GIL is released while kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/alternating_attention.h"
#include "core/conv3x3.h"
#include "core/dual_stream_attention.h"
#include "core/gathered_attention.h"
#include "core/qk_norm_rope.h"
#include "core/residual_scale_norm.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#if defined(VGGT_MV_WITH_CUDA)
#include <cuda_runtime_api.h>

#include "cuda/alternating_attention.h"
#include "cuda/alternating_attention_backward.h"
#include "cuda/dual_stream_attention.h"
#include "cuda/gathered_attention.h"
#include "cuda/qk_norm_rope.h"
#include "cuda/residual_scale_norm.h"
#endif

namespace py = pybind11;

namespace vggt_mv {

namespace {

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(Status status, const std::string& name) {
  if (status != Status::ok) throw std::runtime_error(name + ", CPU kernel: " + describe(status));
}

#if defined(VGGT_MV_WITH_CUDA)
void check(cudaError_t status, const std::string& name) {
  if (status != cudaSuccess) throw std::runtime_error(name + ", CUDA kernel: " + cudaGetErrorString(status));
}
#endif

ResidualScaleNormParams forward_params(Address x, Address y, Address gamma, Address weight, Address bias,
                                       Address residual, Address normed, Address mean, Address rstd, int64_t rows,
                                       int features, int64_t x_row_stride, int64_t y_row_stride, float eps, int x_dtype,
                                       int y_dtype, int param_dtype) {
  return {.x = pointer<const void>(x),
          .y = pointer<const void>(y),
          .gamma = pointer<const void>(gamma),
          .weight = pointer<const void>(weight),
          .bias = pointer<const void>(bias),
          .residual = pointer<void>(residual),
          .normed = pointer<void>(normed),
          .mean = pointer<float>(mean),
          .rstd = pointer<float>(rstd),
          .rows = rows,
          .features = features,
          .x_row_stride = x_row_stride,
          .y_row_stride = y_row_stride,
          .eps = eps,
          .x_dtype = static_cast<DType>(x_dtype),
          .y_dtype = static_cast<DType>(y_dtype),
          .param_dtype = static_cast<DType>(param_dtype)};
}

ResidualScaleNormBackwardParams backward_params(Address grad_residual, Address grad_normed, Address residual, Address y,
                                                Address gamma, Address weight, Address mean, Address rstd,
                                                Address grad_x, Address grad_y, Address partial_sums,
                                                Address grad_parameters, int64_t rows, int features, int row_blocks,
                                                int64_t y_row_stride, int x_dtype, int y_dtype, int param_dtype) {
  return {.grad_residual = pointer<const void>(grad_residual),
          .grad_normed = pointer<const void>(grad_normed),
          .residual = pointer<const void>(residual),
          .y = pointer<const void>(y),
          .gamma = pointer<const void>(gamma),
          .weight = pointer<const void>(weight),
          .mean = pointer<const float>(mean),
          .rstd = pointer<const float>(rstd),
          .grad_x = pointer<void>(grad_x),
          .grad_y = pointer<void>(grad_y),
          .partial_sums = pointer<float>(partial_sums),
          .grad_parameters = pointer<float>(grad_parameters),
          .rows = rows,
          .features = features,
          .row_blocks = row_blocks,
          .y_row_stride = y_row_stride,
          .x_dtype = static_cast<DType>(x_dtype),
          .y_dtype = static_cast<DType>(y_dtype),
          .param_dtype = static_cast<DType>(param_dtype)};
}

// Sizes B, T, N, P of the token grid; strides of those dimensions; the same with those of part (q, k, v) and head.
using GridSizes = std::array<int, 4>;
using TokenSteps = std::array<int64_t, 4>;
using QkvSteps = std::array<int64_t, 6>;

TokenGrid token_grid(const GridSizes& sizes) { return {sizes[0], sizes[1], sizes[2], sizes[3]}; }

TokenStrides token_strides(const TokenSteps& steps) { return {steps[0], steps[1], steps[2], steps[3]}; }

QkvStrides qkv_strides(const QkvSteps& steps) { return {{steps[0], steps[1], steps[2], steps[3]}, steps[4], steps[5]}; }

AlternatingAttentionParams attention_params(Address qkv, Address key_bias, Address row_gate, Address out, Address lse,
                                            const GridSizes& grid, const QkvSteps& qkv_steps,
                                            const TokenSteps& row_gate_steps, int axis, int heads, int width,
                                            float scale, int dtype) {
  return {.qkv = pointer<const void>(qkv),
          .key_bias = pointer<const float>(key_bias),
          .row_gate = pointer<const float>(row_gate),
          .out = pointer<void>(out),
          .lse = pointer<float>(lse),
          .grid = token_grid(grid),
          .qkv_strides = qkv_strides(qkv_steps),
          .row_gate_strides = token_strides(row_gate_steps),
          .axis = static_cast<Axis>(axis),
          .heads = heads,
          .width = width,
          .scale = scale,
          .dtype = static_cast<DType>(dtype)};
}

AlternatingAttentionBackwardParams attention_backward_params(Address grad_out, Address qkv, Address out, Address lse,
                                                             Address key_bias, Address row_gate, Address delta,
                                                             Address grad_qkv, Address grad_key_bias,
                                                             Address grad_row_gate, const GridSizes& grid,
                                                             const QkvSteps& qkv_steps, const QkvSteps& grad_qkv_steps,
                                                             const TokenSteps& row_gate_steps, int axis, int heads,
                                                             int width, float scale, int dtype) {
  return {.grad_out = pointer<const void>(grad_out),
          .qkv = pointer<const void>(qkv),
          .out = pointer<const void>(out),
          .lse = pointer<const float>(lse),
          .key_bias = pointer<const float>(key_bias),
          .row_gate = pointer<const float>(row_gate),
          .delta = pointer<float>(delta),
          .grad_qkv = pointer<void>(grad_qkv),
          .grad_key_bias = pointer<float>(grad_key_bias),
          .grad_row_gate = pointer<float>(grad_row_gate),
          .grid = token_grid(grid),
          .qkv_strides = qkv_strides(qkv_steps),
          .grad_qkv_strides = qkv_strides(grad_qkv_steps),
          .row_gate_strides = token_strides(row_gate_steps),
          .axis = static_cast<Axis>(axis),
          .heads = heads,
          .width = width,
          .scale = scale,
          .dtype = static_cast<DType>(dtype)};
}

DualStreamAttentionParams dual_stream_params(Address qkv_pose, Address qkv_geo, Address mask, Address lambda_pose,
                                             Address lambda_geo, Address pose, Address geo, Address lse_pose,
                                             Address lse_geo, const GridSizes& grid, const QkvSteps& pose_steps,
                                             const QkvSteps& geo_steps, int axis, int heads, int width, float scale,
                                             int dtype) {
  return {.qkv_pose = pointer<const void>(qkv_pose),
          .qkv_geo = pointer<const void>(qkv_geo),
          .mask = pointer<const float>(mask),
          .lambda_pose = pointer<const float>(lambda_pose),
          .lambda_geo = pointer<const float>(lambda_geo),
          .pose = pointer<void>(pose),
          .geo = pointer<void>(geo),
          .lse_pose = pointer<float>(lse_pose),
          .lse_geo = pointer<float>(lse_geo),
          .grid = token_grid(grid),
          .pose_strides = qkv_strides(pose_steps),
          .geo_strides = qkv_strides(geo_steps),
          .axis = static_cast<Axis>(axis),
          .heads = heads,
          .width = width,
          .scale = scale,
          .dtype = static_cast<DType>(dtype)};
}

GatheredAttentionParams gathered_params(Address qkv, Address memory_qkv, Address key_bias, Address listed, Address out,
                                        Address lse, Address partial, const GridSizes& grid, const QkvSteps& qkv_steps,
                                        const TokenSteps& memory_steps, int token_keys, bool memory_queries,
                                        int memory_tokens, int list_length, int key_chunks, int heads, int width,
                                        float scale, int dtype) {
  return {.qkv = pointer<const void>(qkv),
          .memory_qkv = pointer<const void>(memory_qkv),
          .key_bias = pointer<const float>(key_bias),
          .listed = pointer<const int64_t>(listed),
          .out = pointer<void>(out),
          .lse = pointer<float>(lse),
          .partial = pointer<float>(partial),
          .grid = token_grid(grid),
          .qkv_strides = qkv_strides(qkv_steps),
          .memory_strides = {memory_steps[0], memory_steps[1], memory_steps[2], memory_steps[3]},
          .token_keys = static_cast<TokenKeys>(token_keys),
          .memory_queries = memory_queries,
          .memory_tokens = memory_tokens,
          .list_length = list_length,
          .key_chunks = key_chunks,
          .heads = heads,
          .width = width,
          .scale = scale,
          .dtype = static_cast<DType>(dtype)};
}

QkNormRopeParams rope_params(Address qkv, Address out, Address q_weight, Address q_bias, Address k_weight,
                             Address k_bias, Address cos_sin, const GridSizes& grid, const QkvSteps& qkv_steps,
                             const QkvSteps& out_steps, int heads, int width, int special, int grid_width,
                             int special_position, float eps, int dtype, int norm_dtype) {
  return {.qkv = pointer<const void>(qkv),
          .out = pointer<void>(out),
          .q_weight = pointer<const void>(q_weight),
          .q_bias = pointer<const void>(q_bias),
          .k_weight = pointer<const void>(k_weight),
          .k_bias = pointer<const void>(k_bias),
          .cos_sin = pointer<const float>(cos_sin),
          .grid = token_grid(grid),
          .qkv_strides = qkv_strides(qkv_steps),
          .out_strides = qkv_strides(out_steps),
          .heads = heads,
          .width = width,
          .special = special,
          .grid_width = grid_width,
          .special_position = special_position,
          .eps = eps,
          .dtype = static_cast<DType>(dtype),
          .norm_dtype = static_cast<DType>(norm_dtype)};
}

QkNormRopeBackwardParams rope_backward_params(Address grad_out, Address qkv, Address grad_qkv, Address q_weight,
                                              Address k_weight, Address cos_sin, Address partial_sums,
                                              Address grad_norms, const GridSizes& grid, const QkvSteps& grad_out_steps,
                                              const QkvSteps& qkv_steps, const QkvSteps& grad_qkv_steps, int heads,
                                              int width, int special, int grid_width, int special_position, int blocks,
                                              float eps, int dtype, int norm_dtype) {
  return {.grad_out = pointer<const void>(grad_out),
          .qkv = pointer<const void>(qkv),
          .grad_qkv = pointer<void>(grad_qkv),
          .q_weight = pointer<const void>(q_weight),
          .k_weight = pointer<const void>(k_weight),
          .cos_sin = pointer<const float>(cos_sin),
          .partial_sums = pointer<float>(partial_sums),
          .grad_norms = pointer<float>(grad_norms),
          .grid = token_grid(grid),
          .grad_out_strides = qkv_strides(grad_out_steps),
          .qkv_strides = qkv_strides(qkv_steps),
          .grad_qkv_strides = qkv_strides(grad_qkv_steps),
          .heads = heads,
          .width = width,
          .special = special,
          .grid_width = grid_width,
          .special_position = special_position,
          .blocks = blocks,
          .eps = eps,
          .dtype = static_cast<DType>(dtype),
          .norm_dtype = static_cast<DType>(norm_dtype)};
}

Conv3x3Params conv_params(Address x, Address weight, Address bias, Address residual, Address row_offsets,
                          Address column_offsets, Address out, int64_t batch, int in_height, int in_width, int height,
                          int width, int in_channels, int out_channels, bool relu) {
  return {.x = pointer<const float>(x),
          .weight = pointer<const float>(weight),
          .bias = pointer<const float>(bias),
          .residual = pointer<const float>(residual),
          .row_offsets = pointer<const float>(row_offsets),
          .column_offsets = pointer<const float>(column_offsets),
          .out = pointer<float>(out),
          .batch = batch,
          .in_height = in_height,
          .in_width = in_width,
          .height = height,
          .width = width,
          .in_channels = in_channels,
          .out_channels = out_channels,
          .relu = relu};
}

// A Python function that takes the fields of `make_params` and one more: `cpu(params, num_threads)`.
template <typename Params, typename... Fields>
void define_cpu(py::module_& module, const char* name, Params (*make_params)(Fields...),
                Status (*CpuKernels::*kernel)(const Params&, int)) {
  const std::string text = name;
  module.def((text + "_cpu").c_str(), [=](Fields... fields, int num_threads) {
    const Params params = make_params(fields...);
    py::gil_scoped_release release;
    check((cpu_kernels().*kernel)(params, num_threads), text);
  });
}

#if defined(VGGT_MV_WITH_CUDA)
// The same for `launch(params, stream)`, with the stream's address.
template <typename Params, typename... Fields>
void define_cuda(py::module_& module, const char* name, Params (*make_params)(Fields...),
                 cudaError_t (*launch)(const Params&, cudaStream_t)) {
  const std::string text = name;
  module.def((text + "_cuda").c_str(), [=](Fields... fields, Address stream) {
    const Params params = make_params(fields...);
    py::gil_scoped_release release;
    check(launch(params, pointer<CUstream_st>(stream)), text);
  });
}
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = VGGT_MV_COMPILER;
  info["cpu_isas"] = compiled_isas();
  info["cpu_isas_usable"] = usable_isas();
  info["cpu_isa"] = cpu_isa();
  info["openmp"] = static_cast<bool>(VGGT_MV_OPENMP);
#if defined(VGGT_MV_WITH_CUDA)
  py::dict cuda;
  cuda["toolkit"] = VGGT_MV_CUDA_VERSION;
  cuda["architectures"] = VGGT_MV_CUDA_ARCHITECTURES;
  info["cuda"] = cuda;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

}  // namespace

}  // namespace vggt_mv

PYBIND11_MODULE(_C, module) {
  using namespace vggt_mv;
  select_cpu_isa();
  module.doc() = "Compiled kernels of vggt_mv_ext. Call the operators of vggt_mv_ext, not these.";
  module.def("build_info", build_info);
  module.def("select_cpu_isa", select_cpu_isa);
  module.def("set_cpu_isa", [](const std::string& name) { set_cpu_isa(name); });
  define_cpu(module, "alternating_attention", attention_params, &CpuKernels::alternating_attention);
  define_cpu(module, "alternating_attention_backward", attention_backward_params,
             &CpuKernels::alternating_attention_backward);
  define_cpu(module, "conv3x3", conv_params, &CpuKernels::conv3x3);
  define_cpu(module, "dual_stream_attention", dual_stream_params, &CpuKernels::dual_stream_attention);
  define_cpu(module, "gathered_attention", gathered_params, &CpuKernels::gathered_attention);
  define_cpu(module, "qk_norm_rope", rope_params, &CpuKernels::qk_norm_rope);
  define_cpu(module, "qk_norm_rope_backward", rope_backward_params, &CpuKernels::qk_norm_rope_backward);
  define_cpu(module, "residual_scale_norm", forward_params, &CpuKernels::residual_scale_norm);
  define_cpu(module, "residual_scale_norm_backward", backward_params, &CpuKernels::residual_scale_norm_backward);
#if defined(VGGT_MV_WITH_CUDA)
  module.attr("has_cuda") = true;
  define_cuda(module, "alternating_attention", attention_params, launch_alternating_attention);
  define_cuda(module, "alternating_attention_backward", attention_backward_params,
              launch_alternating_attention_backward);
  define_cuda(module, "dual_stream_attention", dual_stream_params, launch_dual_stream_attention);
  define_cuda(module, "gathered_attention", gathered_params, launch_gathered_attention);
  module.def("gathered_attention_key_chunks", [](const GridSizes& grid, int memory_tokens, int heads, int width) {
    int key_chunks = 0;
    check(gathered_attention_key_chunks(token_grid(grid), memory_tokens, heads, width, &key_chunks),
          "gathered_attention_key_chunks");
    return key_chunks;
  });
  define_cuda(module, "qk_norm_rope", rope_params, launch_qk_norm_rope);
  define_cuda(module, "qk_norm_rope_backward", rope_backward_params, launch_qk_norm_rope_backward);
  module.def("qk_norm_rope_blocks", [](const GridSizes& grid) {
    int blocks = 0;
    check(qk_norm_rope_blocks(token_grid(grid), &blocks), "qk_norm_rope_blocks");
    return blocks;
  });
  define_cuda(module, "residual_scale_norm", forward_params, launch_residual_scale_norm);
  define_cuda(module, "residual_scale_norm_backward", backward_params, launch_residual_scale_norm_backward);
  module.def("residual_scale_norm_row_blocks", [](int64_t rows, int features) {
    int row_blocks = 0;
    check(residual_scale_norm_row_blocks(rows, features, &row_blocks), "residual_scale_norm_row_blocks");
    return row_blocks;
  });
#else
  module.attr("has_cuda") = false;
#endif
}
