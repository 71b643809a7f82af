// The tuning table of alternating_attention's backward: what a block holds, by the head's width and by the pass.
//
// A block of kWarps warps owns kWarps * kRowTiles * 16 rows and goes through the other side in tiles of kColumns.
// What decides is registers, 65536 a multiprocessor, so 255 a thread for two blocks of four warps:
//   accumulators      kRowTiles * D / 2 floats a thread for each gradient: two in the pass of keys, one in that of queries
//   own rows          kRowTiles * D / 4 registers for each of the two operands that are held there and not fetched from
//                     shared memory at every step
//   logits            kRowTiles * 16
// and the traffic of shared memory beside the tensor cores: an operand fetched serves kRowTiles products, so two row tiles
// are worth more than operands in registers, and those more than occupancy. Not measured on a GPU yet.
#pragma once

namespace vggt_mv {

enum class BackwardPass {
  keys,    // a block owns keys: grad_k, grad_v, grad_key_bias
  queries  // a block owns queries: grad_q, grad_row_gate
};

template <int kRowTilesOf, int kColumnsOf, int kFirst, int kSecond, int kBlocks>
struct BackwardTileSizes {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kRowTilesOf;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kColumns = kColumnsOf;
  static constexpr int kFirstSteps = kFirst;    // of D / 16: of the owned keys or queries, in registers
  static constexpr int kSecondSteps = kSecond;  // the same of the owned values or grad_out
  static constexpr int kBlocksPerMultiprocessor = kBlocks;
};

template <int kWidth, BackwardPass kPass>
struct BackwardTiles;
template <>
struct BackwardTiles<32, BackwardPass::keys> : BackwardTileSizes<2, 64, 2, 2, 2> {};
template <>
struct BackwardTiles<64, BackwardPass::keys> : BackwardTileSizes<2, 64, 3, 0, 2> {};
template <>
struct BackwardTiles<96, BackwardPass::keys> : BackwardTileSizes<1, 32, 6, 5, 2> {};
template <>
struct BackwardTiles<128, BackwardPass::keys> : BackwardTileSizes<1, 32, 6, 0, 2> {};
template <>
struct BackwardTiles<32, BackwardPass::queries> : BackwardTileSizes<2, 64, 2, 2, 2> {};
template <>
struct BackwardTiles<64, BackwardPass::queries> : BackwardTileSizes<2, 64, 4, 4, 2> {};
template <>
struct BackwardTiles<96, BackwardPass::queries> : BackwardTileSizes<1, 32, 6, 6, 2> {};
template <>
struct BackwardTiles<128, BackwardPass::queries> : BackwardTileSizes<1, 32, 8, 8, 2> {};

}  // namespace vggt_mv
