// The machine that kernels are written for, under plain names.
//
// All PTX, all shared-memory access, all thread indices and every kernel launch of this package go through the names
// in this header; kernels (`*.cuh`) and launchers (`*.cu`) contain no `asm`, no `extern __shared__`, no `threadIdx` and
// no `<<<>>>`. The same names are implemented a second time for the host in tests/emulation/simt_emulated.h, so the
// very same kernel and launcher sources run on a CPU, thread by thread, with bounds checks and race detection. To add
// an instruction, add it in both places and a test to tests/emulation/test_emulator.py.
//
//   indices      thread_index, block_index_{x,y,z}, block_size, grid_size_{x,y,z}, lane_index, warp_index
//   barriers     block_barrier, named_barrier_sync, named_barrier_arrive, warp_barrier
//   shared       dynamic_shared<T>() -> Shared<T> with load, store, load_as, store_as, as, +
//   global       load_global, load_global_once, store_global (2 to 16 bytes each)
//   warp         shuffle, shuffle_xor, shuffle_down, warp_sum, warp_max, ballot, any_lane, all_lanes
//   copies       copy_async<4|8|16>, copy_async_commit, copy_async_wait<N>, copy_async_wait_all
//   tensor core  load_matrix_{x1,x2,x4}, load_matrix_{x1,x2,x4}_transposed, multiply_accumulate_16x8x16<__half|__nv_bfloat16>
//   arithmetic   exp2_approximate, log2_approximate, reciprocal_square_root, reciprocal
//   host         launch, multiprocessor_count
//
// Conventions: blocks are one-dimensional and a multiple of 32 threads wide; warp functions are called by all 32 lanes.
#pragma once

#if defined(VGGT_MV_EMULATED)
#include "simt_emulated.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace vggt_mv::simt {

#define VGGT_MV_SIMT_DEVICE static __device__ __forceinline__

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---------------------------------------------------------------------------------------------------------- indices

VGGT_MV_SIMT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
VGGT_MV_SIMT_DEVICE int block_size() { return static_cast<int>(blockDim.x); }
VGGT_MV_SIMT_DEVICE int block_index_x() { return static_cast<int>(blockIdx.x); }
VGGT_MV_SIMT_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }
VGGT_MV_SIMT_DEVICE int block_index_z() { return static_cast<int>(blockIdx.z); }
VGGT_MV_SIMT_DEVICE int grid_size_x() { return static_cast<int>(gridDim.x); }
VGGT_MV_SIMT_DEVICE int grid_size_y() { return static_cast<int>(gridDim.y); }
VGGT_MV_SIMT_DEVICE int grid_size_z() { return static_cast<int>(gridDim.z); }
VGGT_MV_SIMT_DEVICE int lane_index() { return static_cast<int>(threadIdx.x & 31u); }
VGGT_MV_SIMT_DEVICE int warp_index() { return static_cast<int>(threadIdx.x >> 5); }

// --------------------------------------------------------------------------------------------------------- barriers

// All threads of the block; orders their shared and global accesses.
VGGT_MV_SIMT_DEVICE void block_barrier() { __syncthreads(); }

// Barrier `id` (1..15) shared by `threads` threads (a multiple of 32), of which some may only arrive and not wait.
VGGT_MV_SIMT_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
VGGT_MV_SIMT_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// All lanes of the warp; orders their shared and global accesses (shuffles and votes do not).
VGGT_MV_SIMT_DEVICE void warp_barrier() { __syncwarp(); }

// ---------------------------------------------------------------------------------------------------- shared memory

// A place in the block's shared memory, counted in elements of T. On the device, a pointer and nothing more.
template <typename T>
class Shared {
 public:
  __device__ __forceinline__ explicit Shared(T* pointer) : pointer_(pointer) {}

  __device__ __forceinline__ T load(int index = 0) const { return pointer_[index]; }
  __device__ __forceinline__ void store(int index, T value) const { pointer_[index] = value; }

  // Vector access: U (up to 16 bytes) at element `index`, whose address must be a multiple of sizeof(U).
  template <typename U>
  __device__ __forceinline__ U load_as(int index = 0) const {
    return *reinterpret_cast<const U*>(pointer_ + index);
  }
  template <typename U>
  __device__ __forceinline__ void store_as(int index, U value) const {
    *reinterpret_cast<U*>(pointer_ + index) = value;
  }

  template <typename U>
  __device__ __forceinline__ Shared<U> as() const {
    return Shared<U>(reinterpret_cast<U*>(pointer_));
  }
  __device__ __forceinline__ Shared operator+(int elements) const { return Shared(pointer_ + elements); }

  // The 32-bit address that instructions want; for this header.
  __device__ __forceinline__ unsigned address() const {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer_));
  }

 private:
  T* pointer_;
};

// The block's dynamic shared memory from `byte_offset` on; aligned to 128 bytes plus the offset.
template <typename T>
VGGT_MV_SIMT_DEVICE Shared<T> dynamic_shared(int byte_offset = 0) {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return Shared<T>(reinterpret_cast<T*>(dynamic_shared_bytes + byte_offset));
}

// ---------------------------------------------------------------------------------------------------- global memory

// One access of sizeof(T) in {2, 4, 8, 16} bytes; the address must be a multiple of that.
template <typename T>
VGGT_MV_SIMT_DEVICE T load_global(const T* address) {
  return *address;
}

// The same for data that no thread of this launch writes and nobody reads twice: does not stay in the L1 cache.
template <typename T>
VGGT_MV_SIMT_DEVICE T load_global_once(const T* address) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "2, 4, 8 or 16 bytes");
  T value;
  if constexpr (sizeof(T) == 16) {
    uint4 bits;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "l"(address));
    memcpy(&value, &bits, 16);
  } else if constexpr (sizeof(T) == 8) {
    uint2 bits;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(bits.x), "=r"(bits.y) : "l"(address));
    memcpy(&value, &bits, 8);
  } else if constexpr (sizeof(T) == 4) {
    unsigned bits;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(bits) : "l"(address));
    memcpy(&value, &bits, 4);
  } else {
    unsigned short bits;
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(bits) : "l"(address));
    memcpy(&value, &bits, 2);
  }
  return value;
}

// Wide ones by instruction: of `*address = value` the compiler may make four stores of 4 bytes.
template <typename T>
VGGT_MV_SIMT_DEVICE void store_global(T* address, std::type_identity_t<T> value) {
  if constexpr (sizeof(T) == 16) {
    uint4 bits;
    memcpy(&bits, &value, 16);
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(bits.x), "r"(bits.y), "r"(bits.z),
                 "r"(bits.w)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    uint2 bits;
    memcpy(&bits, &value, 8);
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(bits.x), "r"(bits.y) : "memory");
  } else {
    *address = value;
  }
}

// ------------------------------------------------------------------------------------------------- warp collectives

// T of 4 or 8 bytes.
template <typename T>
VGGT_MV_SIMT_DEVICE T shuffle(T value, int source_lane) {
  return __shfl_sync(kAllLanes, value, source_lane);
}
template <typename T>
VGGT_MV_SIMT_DEVICE T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(kAllLanes, value, lane_mask);
}
// Lanes past the end keep their own value.
template <typename T>
VGGT_MV_SIMT_DEVICE T shuffle_down(T value, int distance) {
  return __shfl_down_sync(kAllLanes, value, static_cast<unsigned>(distance));
}

VGGT_MV_SIMT_DEVICE unsigned ballot(bool predicate) { return __ballot_sync(kAllLanes, predicate); }
VGGT_MV_SIMT_DEVICE bool any_lane(bool predicate) { return __any_sync(kAllLanes, predicate) != 0; }
VGGT_MV_SIMT_DEVICE bool all_lanes(bool predicate) { return __all_sync(kAllLanes, predicate) != 0; }

// Sum and maximum over the warp, the same value in every lane.
template <typename T>
VGGT_MV_SIMT_DEVICE T warp_sum(T value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
VGGT_MV_SIMT_DEVICE float warp_max(float value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}

// -------------------------------------------------------------------------------------------------------- cp.async

// Starts a copy of kBytes from global to shared memory that bypasses registers; where `valid` is false nothing is read
// (the address must still be a pointer) and zeros arrive. The destination may be read only after copy_async_wait, by
// this thread, and after a barrier, by others.
template <int kBytes, typename T>
VGGT_MV_SIMT_DEVICE void copy_async(Shared<T> destination, const void* source, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async moves 4, 8 or 16 bytes");
  const int source_bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination.address()), "l"(source),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination.address()), "l"(source), "n"(kBytes),
                 "r"(source_bytes)
                 : "memory");
  }
}

// Closes a group of the copies that this thread has started.
VGGT_MV_SIMT_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
VGGT_MV_SIMT_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
VGGT_MV_SIMT_DEVICE void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ------------------------------------------------------------------------------------------------------ tensor core

// ldmatrix: 8x8 tiles of 16-bit elements. Lane i gives the address of row i % 8 of tile i / 8 (16 bytes, 16-aligned;
// lanes beyond the tiles give any valid address) and receives from each tile elements (row lane / 4, columns
// 2 (lane % 4) and the next); transposed: (rows 2 (lane % 4) and the next, column lane / 4).
template <typename T>
VGGT_MV_SIMT_DEVICE void load_matrix_x1(unsigned (&tiles)[1], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(tiles[0]) : "r"(row.address()) : "memory");
}
template <typename T>
VGGT_MV_SIMT_DEVICE void load_matrix_x2(unsigned (&tiles)[2], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(tiles[0]), "=r"(tiles[1])
               : "r"(row.address())
               : "memory");
}
template <typename T>
VGGT_MV_SIMT_DEVICE void load_matrix_x4(unsigned (&tiles)[4], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"(row.address())
               : "memory");
}
template <typename T>
VGGT_MV_SIMT_DEVICE void load_matrix_x1_transposed(unsigned (&tiles)[1], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(tiles[0])
               : "r"(row.address())
               : "memory");
}
template <typename T>
VGGT_MV_SIMT_DEVICE void load_matrix_x2_transposed(unsigned (&tiles)[2], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(tiles[0]), "=r"(tiles[1])
               : "r"(row.address())
               : "memory");
}
template <typename T>
VGGT_MV_SIMT_DEVICE void load_matrix_x4_transposed(unsigned (&tiles)[4], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"(row.address())
               : "memory");
}

// mma.m16n8k16: sum[16,8] += a[16,16] b[16,8], products of 16-bit elements accumulated in fp32. With g = lane / 4 and
// t = lane % 4, two elements in a register, the lower column (for b, the lower row) in the lower half:
//   a[0] = (g, 2t..)  a[1] = (g + 8, 2t..)  a[2] = (g, 2t + 8..)  a[3] = (g + 8, 2t + 8..)
//   b[0] = (2t.., g)  b[1] = (2t + 8.., g)
//   sum[0], sum[1] = (g, 2t), (g, 2t + 1);  sum[2], sum[3] = (g + 8, 2t), (g + 8, 2t + 1)
template <typename T>
VGGT_MV_SIMT_DEVICE void multiply_accumulate_16x8x16(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "T is __half or __nv_bfloat16");
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// ------------------------------------------------------------------------------------------------------- arithmetic

// One instruction each, relative error about 2^-22, subnormals flushed to zero.
VGGT_MV_SIMT_DEVICE float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
VGGT_MV_SIMT_DEVICE float log2_approximate(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
VGGT_MV_SIMT_DEVICE float reciprocal_square_root(float x) { return rsqrtf(x); }
VGGT_MV_SIMT_DEVICE float reciprocal(float x) { return __frcp_rn(x); }

// ------------------------------------------------------------------------------------------------- host: launching

// Starts `kernel(params)` on `grid` blocks of `threads` threads with `shared_bytes` of dynamic shared memory.
template <typename Params>
inline cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, std::size_t shared_bytes, cudaStream_t stream,
                          const std::type_identity_t<Params>& params) {
  const void* entry = reinterpret_cast<const void*>(kernel);
  constexpr std::size_t kWithoutOptIn = 48 * 1024;
  if (shared_bytes > kWithoutOptIn) {
    const cudaError_t status =
        cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernel(entry, grid, dim3(static_cast<unsigned>(threads)), arguments, shared_bytes, stream);
}

// Streaming multiprocessors of the current device, for launchers that size their grid by it.
inline cudaError_t multiprocessor_count(int* count) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace vggt_mv::simt

#endif  // VGGT_MV_EMULATED
