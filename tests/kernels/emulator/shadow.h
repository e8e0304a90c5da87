// What is checked of every access that a kernel makes to memory, as compute-sanitizer does on a device.
//
// Kernels are compiled with g++ -fsanitize=thread but not linked with its runtime: the calls that the compiler puts before
// each load and store (__tsan_read4, ...) arrive in shadow.cpp. For two bytes at a time it remembers who wrote and who
// read them last, and reports
//   - accesses outside of every variable: before or behind a tensor, between shared variables,
//   - accesses that are not aligned to their size,
//   - reads of shared memory that nobody wrote,
//   - races: two threads, one of them writing, without a barrier between them that both passed (of one warp:
//     __syncwarp), in shared and in global memory; threads of different blocks have no barrier.
// This does not depend on the order in which threads happen to run. Without instrumentation only guard pages and poisoned
// memory are left.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace emulator {

// Memory of a tensor: bytes [data, data_end) inside its mapping [begin, end), none of whose other bytes may be touched.
struct Region {
  uintptr_t begin, data, data_end, end;
};

// Who makes the accesses from now on. Epochs grow with every barrier that the thread passes.
struct Actor {
  uint32_t launch, block, epoch, warp_epoch;
  uint16_t thread;
};

// The tensors that the next launches may touch.
void watch_memory(const std::vector<Region>& regions);
// Shared memory of a block begins anew: no variables, nothing written.
void begin_shared(uintptr_t arena, size_t size);
void add_shared(uintptr_t variable, size_t size);
// Null: accesses are not a kernel's.
void set_actor(const Actor* actor);

}  // namespace emulator
