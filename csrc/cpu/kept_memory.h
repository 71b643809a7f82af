// Memory that a kernel needs while it runs and that is kept for its next run.
#pragma once

#include <stdlib.h>

#include <atomic>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if !defined(VGGT_MV_ISA)
#error "csrc/cpu/kept_memory.h is for files that are compiled once for each instruction set"
#endif

namespace vggt_mv::VGGT_MV_ISA {

// Hands out one piece of memory at a time and keeps the last that came back. Fresh memory is handed out and cleared by
// the system page by page, at every first touch; where many places are written in turn, large pages also save most
// lookups of addresses. Who asks while another call works gets memory of its own.
class KeptMemory {
 public:
  KeptMemory() = default;
  KeptMemory(const KeptMemory&) = delete;
  KeptMemory& operator=(const KeptMemory&) = delete;
  ~KeptMemory() { free(kept_.load()); }

  // At least `count` floats, aligned to 64 bytes, with what was in them; null where there is no memory left.
  float* take(int64_t count) {
    Header* memory = kept_.exchange(nullptr);
    if (memory != nullptr && memory->count >= count) return floats(memory);
    free(memory);
    const size_t bytes = (sizeof(Header) + count * sizeof(float) + kLargePage - 1) / kLargePage * kLargePage;
    memory = static_cast<Header*>(aligned_alloc(kLargePage, bytes));
    if (memory == nullptr) return nullptr;
#if defined(MADV_HUGEPAGE)
    madvise(memory, bytes, MADV_HUGEPAGE);  // a wish; nothing depends on it
#endif
    memory->count = static_cast<int64_t>((bytes - sizeof(Header)) / sizeof(float));
    return floats(memory);
  }

  // `memory` as `take` gave it. More than kMost is not kept.
  void give_back(float* memory) {
    Header* header = reinterpret_cast<Header*>(memory) - 1;
    if (header->count > kMost) {
      free(header);
    } else {
      free(kept_.exchange(header));
    }
  }

 private:
  struct alignas(64) Header {
    int64_t count;
  };
  static constexpr size_t kLargePage = size_t{2} << 20;
  static constexpr int64_t kMost = int64_t{1} << 26;  // 256 MiB

  static float* floats(Header* memory) { return reinterpret_cast<float*>(memory + 1); }

  std::atomic<Header*> kept_{nullptr};
};

}  // namespace vggt_mv::VGGT_MV_ISA
