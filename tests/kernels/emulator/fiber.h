// Fibers: threads that are switched by hand, each with a stack of its own that ends at an unreadable page.
#pragma once
#include <stddef.h>

namespace emulator {

struct Fiber {
  void* stack_pointer = nullptr;
  void* stack = nullptr;  // null for the thread that all fibers are switched from
};

// Stops `from` and goes on with `to`; returns when something switches to `from`. `ends`: nothing ever will.
void switch_fiber(Fiber& from, Fiber& to, bool ends);

// Stacks, made once and used again.
class FiberPool {
 public:
  FiberPool();
  FiberPool(const FiberPool&) = delete;
  FiberPool& operator=(const FiberPool&) = delete;
  // A fiber that runs `body` when it is switched to; `body` does not return. index < 1024.
  Fiber start(int index, void (*body)());

 private:
  char* memory_;
};

// From here on a fault of the running fiber (an access to a page that cannot be read, say) calls `report` on that fiber,
// with the address, instead of ending the process. `report` does not return. Faults outside fibers are left alone.
void catch_faults(void (*report)(void* address), bool (*in_fiber)());

}  // namespace emulator
