// See fiber.h. Linux on x86-64: the switch and the way out of a fault are written for its calling convention.
#include "fiber.h"

#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulator's fibers are written for Linux on x86-64"
#endif

namespace emulator {
namespace {

constexpr size_t kPage = 4096, kMaxFibers = 1024;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 << 10;  // frames with red zones
#else
constexpr size_t kStack = 64 << 10;
#endif

struct Faults {
  void (*report)(void*) = nullptr;
  bool (*in_fiber)() = nullptr;
  struct sigaction before_segv = {}, before_bus = {};
};

Faults& faults() {
  static Faults only;
  return only;
}

// Goes on, on the fiber's own stack, in faults().report: the handler's stack cannot be left for another by a switch.
void on_fault(int signal_number, siginfo_t* info, void* context) {
  if (faults().in_fiber == nullptr || !faults().in_fiber()) {
    // The access is tried again, and met by whoever cared for it before.
    sigaction(signal_number, signal_number == SIGBUS ? &faults().before_bus : &faults().before_segv, nullptr);
    return;
  }
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  registers[REG_RDI] = reinterpret_cast<greg_t>(info->si_addr);
  registers[REG_RIP] = reinterpret_cast<greg_t>(faults().report);
  // Below the red zone, and aligned as after a call.
  registers[REG_RSP] = ((registers[REG_RSP] - 256) & ~greg_t{15}) - 8;
}

}  // namespace

extern "C" void mx_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl mx_emulator_switch
.hidden mx_emulator_switch
.type mx_emulator_switch, @function
mx_emulator_switch:
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
.size mx_emulator_switch, .-mx_emulator_switch
)");

namespace {

#if defined(__SANITIZE_ADDRESS__)
void (*started_body)() = nullptr;
// The first thing on a new stack is to tell the sanitizer that the switch to it is over.
void announced_body() {
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  started_body();
}
#endif

}  // namespace

void switch_fiber(Fiber& from, Fiber& to, bool ends) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  static thread_local const void* main_bottom = nullptr;
  static thread_local size_t main_size = 0;
  const void* bottom = to.stack ? to.stack : main_bottom;
  __sanitizer_start_switch_fiber(ends ? nullptr : &fake_stack, bottom, to.stack ? kStack : main_size);
  mx_emulator_switch(&from.stack_pointer, to.stack_pointer);
  const void* left = nullptr;
  size_t left_size = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &left, &left_size);
  if (from.stack != nullptr) {
    main_bottom = left;
    main_size = left_size;
  }
#else
  static_cast<void>(ends);
  mx_emulator_switch(&from.stack_pointer, to.stack_pointer);
#endif
}

FiberPool::FiberPool() {
  const size_t each = kStack + kPage;
  void* memory = mmap(nullptr, each * kMaxFibers, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                      -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  for (size_t i = 0; i < kMaxFibers; ++i) mprotect(memory_ + i * each, kPage, PROT_NONE);
}

Fiber FiberPool::start(int index, void (*body)()) {
  char* stack = memory_ + static_cast<size_t>(index) * (kStack + kPage) + kPage;
  void** top = reinterpret_cast<void**>(stack + kStack);
#if defined(__SANITIZE_ADDRESS__)
  // A fiber that has ended never returned from its frames, whose red zones are still marked.
  ASAN_UNPOISON_MEMORY_REGION(stack, kStack);
  started_body = body;
  body = announced_body;
#endif
  *--top = nullptr;  // what would be the return address of body, whose frame is aligned so
  *--top = reinterpret_cast<void*>(body);
  top -= 6;  // registers
  return {top, stack};
}

void catch_faults(void (*report)(void*), bool (*in_fiber)()) {
#if !defined(__SANITIZE_ADDRESS__)
  if (faults().report != nullptr) return;
  faults().report = report;
  faults().in_fiber = in_fiber;
  constexpr size_t kHandlerStack = 64 << 10;
  stack_t alternate = {};
  alternate.ss_sp = malloc(kHandlerStack);
  alternate.ss_size = kHandlerStack;
  sigaltstack(&alternate, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &faults().before_segv);
  sigaction(SIGBUS, &action, &faults().before_bus);
#else
  static_cast<void>(report);
  static_cast<void>(in_fiber);
  static_cast<void>(on_fault);
#endif
}

}  // namespace emulator
