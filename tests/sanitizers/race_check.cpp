// Runs every CPU kernel of every instruction set on four threads, under ThreadSanitizer, and again on one: the results have
// to be the same bits. A race is reported by the sanitizer, which ends the program with another status than 0.
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace vggt_mv {

namespace {

constexpr int kThreads = 4;
constexpr int kHeads = 3, kWidth = 20, kMemory = 5;
constexpr TokenGrid kGrid = {2, 3, 2, 23};
constexpr int64_t kTokens = int64_t{2} * 3 * 2 * 23;
constexpr int64_t kQkv = kTokens * 3 * kHeads * kWidth;
constexpr int64_t kOut = kTokens * kHeads * kWidth;
const QkvStrides kQkvStrides = {contiguous_strides(kGrid, 3 * kHeads * kWidth), kHeads * kWidth, kWidth};

using Floats = std::vector<float>;

Floats random_floats(int64_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  Floats values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

int failures = 0;

// `run(results, threads)` fills the results; all of them are floats here, whatever the kernel makes of their bits.
void check(const std::string& name, std::vector<int64_t> sizes,
           const std::function<Status(std::vector<Floats>&, int)>& run) {
  std::vector<Floats> results[2];
  for (int i = 0; i < 2; ++i) {
    for (int64_t size : sizes) results[i].emplace_back(size, 0.0f);
    if (run(results[i], i == 0 ? 1 : kThreads) != Status::ok) {
      std::printf("%s, %s: did not run\n", cpu_isa().c_str(), name.c_str());
      ++failures;
      return;
    }
  }
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (std::memcmp(results[0][i].data(), results[1][i].data(), sizes[i] * sizeof(float)) == 0) continue;
    std::printf("%s, %s: result %zu differs between 1 and %d threads\n", cpu_isa().c_str(), name.c_str(), i, kThreads);
    ++failures;
  }
}

void check_attention(Axis axis, DType dtype) {
  const Floats qkv = random_floats(kQkv, 1), bias = random_floats(kTokens, 2), grad = random_floats(kOut, 3);
  const int64_t rows = kTokens * kHeads;
  AlternatingAttentionParams forward = {};
  forward.qkv = qkv.data();
  forward.key_bias = bias.data();
  forward.row_gate = bias.data();
  forward.grid = kGrid;
  forward.qkv_strides = kQkvStrides;
  forward.row_gate_strides = contiguous_strides(kGrid, 1);
  forward.axis = axis;
  forward.heads = kHeads;
  forward.width = kWidth;
  forward.scale = 0.2f;
  forward.dtype = dtype;
  Floats out(kOut), lse(rows);
  check("alternating_attention", {kOut, rows}, [&](std::vector<Floats>& results, int threads) {
    forward.out = results[0].data();
    forward.lse = results[1].data();
    const Status status = cpu_kernels().alternating_attention(forward, threads);
    out = results[0];
    lse = results[1];
    return status;
  });
  AlternatingAttentionBackwardParams backward = {};
  backward.grad_out = grad.data();
  backward.qkv = qkv.data();
  backward.out = out.data();
  backward.lse = lse.data();
  backward.key_bias = bias.data();
  backward.row_gate = bias.data();
  backward.grid = kGrid;
  backward.qkv_strides = backward.grad_qkv_strides = kQkvStrides;
  backward.row_gate_strides = contiguous_strides(kGrid, 1);
  backward.axis = axis;
  backward.heads = kHeads;
  backward.width = kWidth;
  backward.scale = 0.2f;
  backward.dtype = dtype;
  check("alternating_attention_backward", {kQkv, rows, rows, rows}, [&](std::vector<Floats>& results, int threads) {
    backward.grad_qkv = results[0].data();
    backward.grad_key_bias = results[1].data();
    backward.grad_row_gate = results[2].data();
    backward.delta = results[3].data();
    return cpu_kernels().alternating_attention_backward(backward, threads);
  });
}

// lambdas of 100 put the biases too far apart for one softmax of both streams.
void check_dual_stream(Axis axis, bool shared, float lambda, DType dtype) {
  const Floats pose = random_floats(kQkv, 14), geo = random_floats(kQkv, 15), mask = random_floats(kTokens, 16);
  const int64_t rows = kTokens * kHeads;
  DualStreamAttentionParams p = {};
  p.qkv_pose = pose.data();
  p.qkv_geo = shared ? nullptr : geo.data();
  p.mask = mask.data();
  p.lambda_pose = p.lambda_geo = &lambda;
  p.grid = kGrid;
  p.pose_strides = p.geo_strides = kQkvStrides;
  p.axis = axis;
  p.heads = kHeads;
  p.width = kWidth;
  p.scale = 0.2f;
  p.dtype = dtype;
  check("dual_stream_attention", {kOut, kOut, rows, rows}, [&](std::vector<Floats>& results, int threads) {
    p.pose = results[0].data();
    p.geo = results[1].data();
    p.lse_pose = results[2].data();
    p.lse_geo = results[3].data();
    return cpu_kernels().dual_stream_attention(p, threads);
  });
}

void check_gathered(TokenKeys token_keys, bool memory, bool memory_queries) {
  const Floats qkv = random_floats(kQkv, 4), bias = random_floats(kTokens, 5);
  const Floats memory_qkv = random_floats(int64_t{kGrid.batch} * kMemory * 3 * kHeads * kWidth, 6);
  const bool frames = token_keys == TokenKeys::listed_frames;
  const int list_length = frames ? 4 : 31;
  std::vector<int64_t> listed;
  for (int64_t i = 0; i < int64_t{frames ? 6 : kGrid.batch} * list_length; ++i) {
    listed.push_back(frames ? (i % 3 == 2 ? -1 : i % 6) : i * 7 % (kTokens / kGrid.batch));
  }
  GatheredAttentionParams p = {};
  p.qkv = qkv.data();
  p.memory_qkv = memory ? memory_qkv.data() : nullptr;
  p.key_bias = bias.data();
  p.listed = listed.data();
  p.grid = kGrid;
  p.qkv_strides = kQkvStrides;
  p.memory_strides = {kMemory * 3 * kHeads * kWidth, 3 * kHeads * kWidth, kHeads * kWidth, kWidth};
  p.token_keys = token_keys;
  p.memory_queries = memory_queries;
  p.memory_tokens = memory ? kMemory : 0;
  p.list_length = list_length;
  p.heads = kHeads;
  p.width = kWidth;
  p.scale = 0.2f;
  p.dtype = DType::f32;
  const int64_t queries = memory_queries ? int64_t{kGrid.batch} * kMemory : kTokens;
  check("gathered_attention", {queries * kHeads * kWidth, queries * kHeads},
        [&](std::vector<Floats>& results, int threads) {
          p.out = results[0].data();
          p.lse = results[1].data();
          return cpu_kernels().gathered_attention(p, threads);
        });
}

void check_norm_rope() {
  const Floats qkv = random_floats(kQkv, 7), norm = random_floats(kWidth, 8), grad = random_floats(kQkv, 9);
  const Floats table = random_floats(8 * kWidth / 4 * 2, 10);
  QkNormRopeParams p = {};
  p.qkv = qkv.data();
  p.q_weight = p.q_bias = p.k_weight = p.k_bias = norm.data();
  p.cos_sin = table.data();
  p.grid = kGrid;
  p.qkv_strides = p.out_strides = kQkvStrides;
  p.heads = kHeads;
  p.width = kWidth;
  p.special = 2;
  p.grid_width = 3;
  p.eps = 1e-5f;
  check("qk_norm_rope", {kQkv}, [&](std::vector<Floats>& results, int threads) {
    p.out = results[0].data();
    return cpu_kernels().qk_norm_rope(p, threads);
  });
  QkNormRopeBackwardParams b = {};
  b.grad_out = grad.data();
  b.qkv = qkv.data();
  b.q_weight = b.k_weight = norm.data();
  b.cos_sin = table.data();
  b.grid = kGrid;
  b.grad_out_strides = b.qkv_strides = b.grad_qkv_strides = kQkvStrides;
  b.heads = kHeads;
  b.width = kWidth;
  b.special = 2;
  b.grid_width = 3;
  b.blocks = 16;
  b.eps = 1e-5f;
  check("qk_norm_rope_backward", {kQkv, 4 * 16 * kWidth, 4 * kWidth}, [&](std::vector<Floats>& results, int threads) {
    b.grad_qkv = results[0].data();
    b.partial_sums = results[1].data();
    b.grad_norms = results[2].data();
    return cpu_kernels().qk_norm_rope_backward(b, threads);
  });
}

void check_residual_scale_norm() {
  constexpr int64_t kRows = 301;
  constexpr int kFeatures = 77, kBlocks = 32;
  const Floats x = random_floats(kRows * kFeatures, 11), y = random_floats(kRows * kFeatures, 12);
  const Floats parameter = random_floats(kFeatures, 13);
  Floats mean(kRows), rstd(kRows, 1.0f);
  ResidualScaleNormParams p = {};
  p.gamma = p.weight = p.bias = parameter.data();
  p.rows = kRows;
  p.features = kFeatures;
  p.x_row_stride = p.y_row_stride = kFeatures;
  p.eps = 1e-5f;
  for (bool in_place : {false, true}) {
    check(in_place ? "residual_scale_norm, in place" : "residual_scale_norm",
          {kRows * kFeatures, kRows * kFeatures, kRows, kRows}, [&](std::vector<Floats>& results, int threads) {
            if (in_place) {
              results[0] = x;
              results[1] = y;
            }
            p.x = in_place ? results[0].data() : x.data();
            p.y = in_place ? results[1].data() : y.data();
            p.residual = results[0].data();
            p.normed = results[1].data();
            p.mean = results[2].data();
            p.rstd = results[3].data();
            return cpu_kernels().residual_scale_norm(p, threads);
          });
  }
  ResidualScaleNormBackwardParams b = {};
  b.grad_residual = b.grad_normed = b.y = y.data();
  b.residual = x.data();
  b.gamma = b.weight = parameter.data();
  b.mean = mean.data();
  b.rstd = rstd.data();
  b.rows = kRows;
  b.features = kFeatures;
  b.row_blocks = kBlocks;
  b.y_row_stride = kFeatures;
  check("residual_scale_norm_backward",
        {kRows * kFeatures, kRows * kFeatures, int64_t{kBlocks} * 3 * kFeatures, 3 * kFeatures},
        [&](std::vector<Floats>& results, int threads) {
          b.grad_x = results[0].data();
          b.grad_y = results[1].data();
          b.partial_sums = results[2].data();
          b.grad_parameters = results[3].data();
          return cpu_kernels().residual_scale_norm_backward(b, threads);
        });
}

void check_conv3x3() {
  constexpr int kIn = 19, kMaps = 35, kSide = 33;
  constexpr int64_t kPixels = int64_t{2} * kSide * kSide;
  const Floats x = random_floats(kPixels * kIn, 14), residual = random_floats(kPixels * kMaps, 15);
  const Floats weight = random_floats(9 * kIn * kMaps, 16);
  Conv3x3Params p = {};
  p.x = x.data();
  p.weight = weight.data();
  p.bias = weight.data();
  p.batch = 2;
  p.in_height = p.in_width = p.height = p.width = kSide;
  p.in_channels = kIn;
  p.out_channels = kMaps;
  p.relu = true;
  for (bool in_place : {false, true}) {
    check(in_place ? "conv3x3, in place" : "conv3x3", {kPixels * kMaps},
          [&](std::vector<Floats>& results, int threads) {
            if (in_place) results[0] = residual;
            p.residual = in_place ? results[0].data() : residual.data();
            p.out = results[0].data();
            return cpu_kernels().conv3x3(p, threads);
          });
  }
  p.in_height = p.in_width = kSide / 2;
  p.row_offsets = p.column_offsets = residual.data();
  p.residual = nullptr;
  check("conv3x3, resized", {kPixels * kMaps}, [&](std::vector<Floats>& results, int threads) {
    p.out = results[0].data();
    return cpu_kernels().conv3x3(p, threads);
  });
}

}  // namespace

}  // namespace vggt_mv

int main() {
  using namespace vggt_mv;
  for (const std::string& isa : usable_isas()) {
    set_cpu_isa(isa);
    for (Axis axis : {Axis::frame, Axis::view, Axis::time, Axis::global}) check_attention(axis, DType::f32);
    check_attention(Axis::time, DType::bf16);  // the bits of floats, as twice as many numbers: any will do
    for (Axis axis : {Axis::frame, Axis::time}) {
      for (bool shared : {false, true}) {
        check_dual_stream(axis, shared, 1.0f, DType::f32);
        check_dual_stream(axis, shared, 100.0f, DType::f32);
        check_dual_stream(axis, shared, 1.0f, DType::bf16);
      }
    }
    check_gathered(TokenKeys::all, true, true);
    check_gathered(TokenKeys::none, true, false);
    check_gathered(TokenKeys::listed_tokens, false, false);
    check_gathered(TokenKeys::listed_frames, false, false);
    check_conv3x3();
    check_norm_rope();
    check_residual_scale_norm();
    std::printf("%s: done\n", isa.c_str());
  }
  return failures == 0 ? 0 : 1;
}
