// See shadow.h. Compiled without -fsanitize=thread: it is what the instrumented code calls.
#include "shadow.h"

#include <stdio.h>
#include <string.h>

#include <algorithm>

#include "machine.h"

namespace emulator {
namespace {

constexpr uint32_t kManyBlocks = 0xffffffffu;
constexpr uint16_t kManyWarps = 0xffff, kManyLanes = 0x8000;  // kManyLanes + warp
constexpr size_t kGranule = 2;

// Launch 0 does not exist: a record of zeros is of nobody.
struct Record {
  uint32_t launch, block, epoch, warp_epoch;
  uint16_t thread;
};

struct Cell {
  Record writer, reader;
};

struct Space {
  Region region;
  std::vector<Cell> cells;
};

struct Shared {
  uintptr_t begin = 0, end = 0;
  std::vector<Cell> cells;
  std::vector<std::pair<uintptr_t, uintptr_t>> variables;
};

struct Memory {
  const Actor* actor = nullptr;
  std::vector<Space> spaces;  // by address
  Shared shared;
};

Memory& memory() {
  static Memory only;
  return only;
}

uint16_t warp_of(uint16_t thread) { return thread / 32; }

// True where nothing orders the recorded access before one that `now` makes.
bool unordered(const Record& record, const Actor& now) {
  if (record.launch != now.launch) return false;
  if (record.block != now.block) return true;
  if (record.epoch != now.epoch || record.thread == now.thread) return false;
  if (record.thread == kManyWarps) return true;
  const bool many = record.thread & kManyLanes;
  const uint16_t warp = many ? record.thread & ~kManyLanes : warp_of(record.thread);
  return warp != warp_of(now.thread) || record.warp_epoch == now.warp_epoch;
}

Record record_of(const Actor& now) { return {now.launch, now.block, now.epoch, now.warp_epoch, now.thread}; }

// Adds a reader to the readers that a later writer has to be ordered behind.
void add_reader(Record& readers, const Actor& now) {
  const bool same_launch = readers.launch == now.launch;
  if (same_launch && readers.block == kManyBlocks) return;
  const Record before = readers;
  readers = record_of(now);
  if (!same_launch) return;
  if (before.block != now.block) {
    readers.block = kManyBlocks;
    return;
  }
  if (before.epoch != now.epoch || before.thread == now.thread) return;
  const bool many = before.thread & kManyLanes;
  const uint16_t warp = many ? before.thread & ~kManyLanes : warp_of(before.thread);
  if (before.thread == kManyWarps || warp != warp_of(now.thread)) {
    readers.thread = kManyWarps;
  } else if (before.warp_epoch == now.warp_epoch) {
    readers.thread = static_cast<uint16_t>(kManyLanes | warp);
  }
}

[[noreturn]] void fail_race(const char* what, const char* place, const Record& other) {
  char text[160];
  if (other.block == kManyBlocks || other.thread == kManyWarps || other.thread & kManyLanes) {
    snprintf(text, sizeof text, "race in %s memory: %s several threads", place, what);
  } else {
    snprintf(text, sizeof text, "race in %s memory: %s thread %u of block %u", place, what, other.thread, other.block);
  }
  fail(text);
}

void check_cells(Cell* cell, Cell* last, bool write, bool shared) {
  const Actor& now = *memory().actor;
  const char* place = shared ? "shared" : "global";
  for (; cell <= last; ++cell) {
    if (shared && !write && cell->writer.launch == 0) fail("read of shared memory that nobody wrote");
    if (unordered(cell->writer, now)) fail_race(write ? "a second write, after" : "a read of what is written by", place, cell->writer);
    if (!write) {
      add_reader(cell->reader, now);
      continue;
    }
    if (unordered(cell->reader, now)) fail_race("a write of what is read by", place, cell->reader);
    cell->writer = record_of(now);
  }
}

[[noreturn]] void fail_outside(const char* place, uintptr_t at, size_t size, bool write, int64_t offset) {
  char text[160];
  snprintf(text, sizeof text, "%s of %zu bytes outside of %s memory, at byte %+lld of the nearest variable (%#llx)",
           write ? "write" : "read", size, place, static_cast<long long>(offset), static_cast<unsigned long long>(at));
  fail(text);
}

void access_shared(Shared& shared, uintptr_t at, size_t size, bool write) {
  for (const auto& [begin, end] : shared.variables) {
    if (at < begin || at + size > end) continue;
    Cell* cells = shared.cells.data();
    check_cells(cells + (at - shared.begin) / kGranule, cells + (at + size - 1 - shared.begin) / kGranule, write, true);
    return;
  }
  const uintptr_t base = shared.variables.empty() ? shared.begin : shared.variables.back().first;
  fail_outside("shared", at, size, write, static_cast<int64_t>(at) - static_cast<int64_t>(base));
}

void access_global(Space& space, uintptr_t at, size_t size, bool write) {
  const Region& region = space.region;
  if (at < region.data || at + size > region.data_end) {
    fail_outside("global", at, size, write, static_cast<int64_t>(at) - static_cast<int64_t>(region.data));
  }
  Cell* cells = space.cells.data();
  check_cells(cells + (at - region.data) / kGranule, cells + (at + size - 1 - region.data) / kGranule, write, false);
}

void access(const void* address, size_t size, bool write, size_t alignment) {
  Memory& all = memory();
  if (all.actor == nullptr || size == 0) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const bool shared = at >= all.shared.begin && at < all.shared.end;
  Space* space = nullptr;
  if (!shared) {
    const auto next = std::upper_bound(all.spaces.begin(), all.spaces.end(), at,
                                       [](uintptr_t value, const Space& each) { return value < each.region.begin; });
    if (next == all.spaces.begin()) return;
    space = &*(next - 1);
    if (at >= space->region.end) return;  // a fiber's stack, the machine, constants
  }
  if (at % alignment != 0) fail("misaligned access of " + std::to_string(size) + " bytes");
  if (shared) {
    access_shared(all.shared, at, size, write);
  } else {
    access_global(*space, at, size, write);
  }
}

}  // namespace

void watch_memory(const std::vector<Region>& regions) {
  std::vector<Space>& spaces = memory().spaces;
  spaces.clear();
  for (const Region& region : regions) {
    spaces.push_back({region, std::vector<Cell>((region.data_end - region.data) / kGranule + 1)});
  }
  std::sort(spaces.begin(), spaces.end(), [](const Space& a, const Space& b) { return a.region.begin < b.region.begin; });
}

void begin_shared(uintptr_t arena, size_t size) {
  Shared& shared = memory().shared;
  shared.begin = arena;
  shared.end = arena + size;
  shared.cells.resize(size / kGranule + 1);
  shared.variables.clear();
}

void add_shared(uintptr_t variable, size_t size) {
  Shared& shared = memory().shared;
  shared.variables.emplace_back(variable, variable + size);
  Cell* first = shared.cells.data() + (variable - shared.begin) / kGranule;
  std::fill(first, first + (size + kGranule - 1) / kGranule, Cell{});
}

void set_actor(const Actor* actor) { memory().actor = actor; }

}  // namespace emulator

// ---- what -fsanitize=thread calls --------------------------------------------------------------------------------------

#define MX_HOOK(SIZE)                                                                                             \
  extern "C" void __tsan_read##SIZE(void* at) { emulator::access(at, SIZE, false, SIZE); }                        \
  extern "C" void __tsan_write##SIZE(void* at) { emulator::access(at, SIZE, true, SIZE); }                        \
  extern "C" void __tsan_unaligned_read##SIZE(void* at) { emulator::access(at, SIZE, false, 1); }                 \
  extern "C" void __tsan_unaligned_write##SIZE(void* at) { emulator::access(at, SIZE, true, 1); }                 \
  extern "C" void __tsan_volatile_read##SIZE(void* at) { emulator::access(at, SIZE, false, SIZE); }               \
  extern "C" void __tsan_volatile_write##SIZE(void* at) { emulator::access(at, SIZE, true, SIZE); }
MX_HOOK(1)
MX_HOOK(2)
MX_HOOK(4)
MX_HOOK(8)
MX_HOOK(16)
extern "C" void __tsan_read_range(void* at, size_t size) { emulator::access(at, size, false, 1); }
extern "C" void __tsan_write_range(void* at, size_t size) { emulator::access(at, size, true, 1); }
extern "C" void __tsan_vptr_update(void*, void*) {}
extern "C" void __tsan_vptr_read(void*) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
