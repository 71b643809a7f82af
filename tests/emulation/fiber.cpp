#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <stdexcept>

namespace vggt_mv::emulation {

#if defined(VGGT_MV_FIBER_USES_UCONTEXT)

void prepare_context(Context& context, std::byte* stack, std::size_t stack_bytes, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = stack_bytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

#else

extern "C" void vggt_mv_switch_stack(void** save, void* load);

// The frame that prepare_context builds is the one that this function leaves behind: six registers, then the address
// to go on at.
asm(R"(
.text
.p2align 4
.globl vggt_mv_switch_stack
.hidden vggt_mv_switch_stack
.type vggt_mv_switch_stack, @function
vggt_mv_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size vggt_mv_switch_stack, .-vggt_mv_switch_stack
)");

void prepare_context(Context& context, std::byte* stack, std::size_t stack_bytes, void (*entry)()) {
  const auto top = (reinterpret_cast<std::uintptr_t>(stack) + stack_bytes) & ~std::uintptr_t{15};
  auto* frame = reinterpret_cast<std::uintptr_t*>(top);
  *--frame = 0;  // where `entry` would return to; leaves the stack pointer 8 below a multiple of 16, as a call does
  *--frame = reinterpret_cast<std::uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--frame = 0;
  context.stack_pointer = frame;
}

void switch_context(Context& from, Context& to) { vggt_mv_switch_stack(&from.stack_pointer, to.stack_pointer); }

#endif

namespace {
std::size_t page_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }
}  // namespace

void StackPool::reserve(int count) {
  if (count <= count_) return;
  const std::size_t slot = kStackBytes + page_bytes();
  if (mapping_ != nullptr) munmap(mapping_, slot * static_cast<std::size_t>(count_));
  mapping_ = nullptr;
  count_ = 0;
  void* mapping = mmap(nullptr, slot * static_cast<std::size_t>(count), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::runtime_error("emulator: cannot map fiber stacks");
  mapping_ = static_cast<std::byte*>(mapping);
  count_ = count;
  for (int i = 0; i < count; ++i) mprotect(mapping_ + slot * static_cast<std::size_t>(i), page_bytes(), PROT_NONE);
}

std::byte* StackPool::stack(int index) const {
  const std::size_t slot = kStackBytes + page_bytes();
  return mapping_ + slot * static_cast<std::size_t>(index) + page_bytes();
}

StackPool::~StackPool() {
  if (mapping_ != nullptr) munmap(mapping_, (kStackBytes + page_bytes()) * static_cast<std::size_t>(count_));
}

}  // namespace vggt_mv::emulation
