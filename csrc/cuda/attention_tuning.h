// Tile sizes of the attention kernels by head width, and why. Nothing else knows them.
//
// Forward. A warp owns 16 kRowTiles rows and meets every key, so a fragment of K or V that it reads from shared memory
// (512 bytes, 4 cycles of the multiprocessor's shared memory) feeds 2 kRowTiles tensor-core instructions (at best one in
// 2 cycles, sm_80). With kRowTiles = 1 shared memory is as busy as the tensor cores; with 2 it is half as busy. So 2
// wherever there is enough work, and 1 where the grid would leave multiprocessors without a block (one small frame).
//
//   registers   16 kRowTiles rows hold kRowTiles (D + kKeys) / 2 floats a thread, plus kRowTiles D / 4 registers of
//               queries where they stay there: 2 blocks of 4 warps leave 255. D = 64, 64 keys: 64 + 64 + 32. D = 96 and
//               128: 96 and 128 for the result leave no room for queries, which are read again from shared memory for
//               each tile of keys (one load for 2 kKeys / 16 instructions), nor for 64 keys: with a bias they spill.
//   shared      queries and kStages tiles of keys and values, at most 65 KB, so that 2 blocks fit on sm_80 (164 KB a
//               multiprocessor); D <= 64 also on sm_86 and sm_89 (100 KB).
//   stages      2: the copy of the next tile runs under the products of this one. A tile of 64 keys for 128 rows at
//               D = 64 is 2.1 MFLOP; two blocks a multiprocessor of an H200 at 320 TFLOP/s take 1.7 us for it, twice
//               the latency of global memory.
//
// No GPU has run these kernels yet; the numbers follow from the counts above and are to be measured.
#pragma once

namespace vggt_mv {

// kStreams results of one row, which differ in the bias of their logits, are row tiles of their own from the logits on.
template <int kTileWidth, int kTileRowTiles, int kTileStreams = 1>
struct AttentionTiling {
  static constexpr int kWidth = kTileWidth;
  static constexpr int kRowTiles = kTileRowTiles;  // of 16 rows, a warp
  static constexpr int kStreams = kTileStreams;
  static constexpr int kQueryTiles = kRowTiles / kStreams;   // of 16 queries, a warp
  static constexpr int kWarps = 4;                           // of a block
  static constexpr int kKeys = kWidth <= 64 ? 64 : 32;       // of a tile
  static constexpr int kStages = 2;                          // tiles of keys and values in shared memory
  static constexpr bool kQueriesInRegisters = kWidth <= 64;  // else read again for each tile of keys
  static constexpr int kBlocks = 2;                          // of a multiprocessor, at least
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kQueryTiles * kWarps;  // of a block
  static constexpr int kQueryBytes = kRows * kWidth * 2;
  static constexpr int kTileBytes = kKeys * kWidth * 2;
  static constexpr int kBiasOffset = kQueryBytes + kStages * 2 * kTileBytes;
  static constexpr int kGateOffset = kBiasOffset + kStages * kKeys * 4;
  static constexpr int shared_bytes(bool bias) { return bias ? kGateOffset + kRows * 4 : kBiasOffset; }
};

}  // namespace vggt_mv
