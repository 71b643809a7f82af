// Cooperative fibers: stacks of their own in one OS thread, switched without a system call.
//
// x86-64 uses a dozen instructions of its own (callee-saved registers of the System V ABI and the stack pointer);
// everything else, or a build with -DVGGT_MV_FIBER_UCONTEXT, uses ucontext, which is the same thing slower.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(VGGT_MV_FIBER_UCONTEXT)
#define VGGT_MV_FIBER_USES_UCONTEXT 1
#include <ucontext.h>
#endif

namespace vggt_mv::emulation {

// A suspended flow of control: the scheduler's own or a fiber's.
struct Context {
#if defined(VGGT_MV_FIBER_USES_UCONTEXT)
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
};

// Makes `context` start `entry` on the given stack when it is first switched to. `entry` must never return.
void prepare_context(Context& context, std::byte* stack, std::size_t stack_bytes, void (*entry)());

// Suspends the running flow in `from` and continues `to`.
void switch_context(Context& from, Context& to);

// One mapping that holds many stacks, each with an inaccessible page below it, so that an overflow is a crash there and
// not silent damage to a neighbour.
class StackPool {
 public:
  StackPool() = default;
  ~StackPool();
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;

  void reserve(int count);  // at least this many stacks
  std::byte* stack(int index) const;
  static constexpr std::size_t kStackBytes = 256 * 1024;

 private:
  std::byte* mapping_ = nullptr;
  int count_ = 0;
};

}  // namespace vggt_mv::emulation
