// See machine.h: fibers, their scheduling, and what a launch is checked for.
#include "machine.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <bitset>
#include <numeric>
#include <random>

#include "fiber.h"
#include "shadow.h"

namespace emulator {
namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kStaticShared = 48 << 10, kAllShared = 227 << 10, kDefaultDynamicShared = 48 << 10;
constexpr size_t kGap = 64;  // between shared variables, so that an index too far hits none
constexpr size_t kArena = kAllShared + 64 * kGap;
constexpr int kInvalidConfiguration = 9;
constexpr unsigned char kPoison = 0xff;  // NaN in every float type

enum class State : uint8_t { kReady, kAtBarrier, kAtCollective, kDone };

struct Thread {
  Fiber fiber;
  uint3 index;
  State state;
  Collective collective;
  uint32_t mask;
  uint64_t value;
  const char* file;
  int line;
  uint64_t received[32];
};

struct SharedVariable {
  const void* key;
  void* memory;
};

struct Machine {
  Order order = Order::kForward;
  unsigned seed = 0;
  std::vector<Launch> recorded;
  int last_error = 0;
  std::vector<std::pair<const void*, size_t>> dynamic_limits;

  std::vector<Thread> threads;
  FiberPool pool;
  Fiber main;
  std::bitset<kMaxThreads> ready;
  int size = 0, current = -1, at_barrier = 0, done = 0;
  uint3 block{}, block_dim{}, grid_dim{};
  Actor actor{};
  uint32_t warp_epochs[kMaxThreads / 32] = {};
  std::mt19937 random;
  std::string error;
  const void* kernel = nullptr;
  Body body = nullptr;
  void* context = nullptr;

  std::vector<char> arena;
  uintptr_t arena_begin = 0;
  size_t arena_used = 0, static_shared = 0, dynamic_size = 0;
  void* dynamic = nullptr;
  std::vector<SharedVariable> variables;
};

Machine& machine() {
  static Machine only;
  return only;
}

std::string symbol_of(const void* function) {
  Dl_info info;
  if (dladdr(function, &info) == 0 || info.dli_sname == nullptr) return "(a kernel without a name)";
  return info.dli_sname;
}

std::string readable(const std::string& symbol) {
  int status = 0;
  char* text = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  if (status != 0) return symbol;
  std::string name(text);
  free(text);
  return name.substr(0, name.find('('));
}

void make_ready(Machine& m, int thread) {
  m.threads[thread].state = State::kReady;
  m.ready.set(thread);
}

// Leaves the running fiber, which somebody has to make ready again.
void wait_as(Machine& m, State state) {
  Thread& self = m.threads[m.current];
  self.state = state;
  m.ready.reset(m.current);
  switch_fiber(self.fiber, m.main, state == State::kDone);
}

void fiber_body() {
  Machine& m = machine();
  m.body(m.context);
  ++m.done;
  wait_as(m, State::kDone);
}

std::string place_of(const Thread& thread) {
  const std::string file(thread.file);
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(thread.line);
}

std::string waits_for(const Thread& thread) {
  switch (thread.state) {
    case State::kDone: return "has ended";
    case State::kAtBarrier: return "is at __syncthreads of " + place_of(thread);
    case State::kAtCollective: return "is at a collective of " + place_of(thread);
    default: return "is running";
  }
}

bool same_collective(const Thread& a, const Thread& b) {
  return b.state == State::kAtCollective && a.mask == b.mask && a.collective == b.collective && a.line == b.line;
}

// Nobody can go on: says of one thread what it waits for, and of another why that does not come.
void fail_stuck(Machine& m) {
  const auto waiting = std::find_if(m.threads.begin(), m.threads.begin() + m.size,
                                    [](const Thread& thread) { return thread.state != State::kDone; });
  m.current = static_cast<int>(waiting - m.threads.begin());
  std::string why;
  if (waiting->state == State::kAtBarrier) {
    const auto other = std::find_if(m.threads.begin(), m.threads.begin() + m.size,
                                    [](const Thread& thread) { return thread.state != State::kAtBarrier; });
    why = "divergent barrier: thread " + std::to_string(other - m.threads.begin()) + " " + waits_for(*other);
  } else {
    const int first = m.current & ~31;
    for (int lane = 0; lane < 32 && why.empty(); ++lane) {
      if (!(waiting->mask >> lane & 1)) continue;
      const Thread& other = m.threads[first + lane];
      if (!same_collective(*waiting, other)) {
        why = "warp collective names lane " + std::to_string(lane) + ", which " + waits_for(other);
      }
    }
  }
  m.error = "deadlock: this thread " + waits_for(*waiting) + "; " + why;
}

int next_thread(Machine& m) {
  if (m.order == Order::kForward) return static_cast<int>(m.ready._Find_first());
  if (m.order == Order::kReverse) {
    int thread = m.size - 1;
    while (!m.ready.test(thread)) --thread;
    return thread;
  }
  const int from = static_cast<int>(m.random() % static_cast<unsigned>(m.size));
  const size_t thread = from == 0 ? m.ready._Find_first() : m.ready._Find_next(from - 1);
  return static_cast<int>(thread < kMaxThreads ? thread : m.ready._Find_first());
}

void start_block(Machine& m, uint64_t block) {
  const uint3& grid = m.grid_dim;
  m.block = {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
             static_cast<unsigned>(block / grid.x / grid.y)};
  m.actor.block = static_cast<uint32_t>(block);
  ++m.actor.epoch;
  m.at_barrier = m.done = 0;
  m.variables.clear();
  begin_shared(m.arena_begin, kArena);
  m.arena_used = m.static_shared = 0;
  m.dynamic = nullptr;
  if (m.dynamic_size != 0) m.dynamic = shared_variable(&m.dynamic, m.dynamic_size, 16);
  for (int i = 0; i < m.size; ++i) {
    const unsigned thread = static_cast<unsigned>(i);
    m.threads[i].index = {thread % m.block_dim.x, thread / m.block_dim.x % m.block_dim.y,
                          thread / (m.block_dim.x * m.block_dim.y)};
    m.threads[i].fiber = m.pool.start(i, fiber_body);
    make_ready(m, i);
  }
}

void run_block(Machine& m, uint64_t block) {
  start_block(m, block);
  while (m.error.empty() && m.done < m.size) {
    if (m.ready.none()) {
      fail_stuck(m);
      break;
    }
    m.current = next_thread(m);
    m.actor.thread = static_cast<uint16_t>(m.current);
    m.actor.warp_epoch = m.warp_epochs[m.current / 32];
    set_actor(&m.actor);
    switch_fiber(m.main, m.threads[m.current].fiber, false);
    set_actor(nullptr);
  }
  m.ready.reset();
  if (m.error.empty()) return;
  const uint3 at = m.threads[m.current].index;
  char where[160];
  snprintf(where, sizeof where, " [block (%u, %u, %u), thread (%u, %u, %u)]", m.block.x, m.block.y, m.block.z, at.x, at.y,
           at.z);
  m.current = -1;
  throw Report(readable(symbol_of(m.kernel)) + ": " + m.error + where);
}

void fail_at(void* address) {
  char text[80];
  snprintf(text, sizeof text, "access to memory that is nobody's, at %p", address);
  fail(text);
}

size_t dynamic_limit(const Machine& m, const void* kernel) {
  size_t limit = kDefaultDynamicShared;
  for (const auto& [of, bytes] : m.dynamic_limits) {
    if (of == kernel) limit = bytes;
  }
  return limit;
}

bool valid_configuration(const Machine& m, const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return threads >= 1 && threads <= kMaxThreads && block.z <= 64 && grid.x >= 1 && grid.x <= 0x7fffffffu &&
         grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535 && dynamic_shared <= dynamic_limit(m, kernel);
}

void run_blocks(Machine& m) {
  std::vector<uint32_t> blocks(uint64_t{m.grid_dim.x} * m.grid_dim.y * m.grid_dim.z);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (m.order == Order::kReverse) std::reverse(blocks.begin(), blocks.end());
  if (m.order == Order::kRandom) std::shuffle(blocks.begin(), blocks.end(), m.random);
  for (const uint32_t block : blocks) run_block(m, block);
}

}  // namespace

void configure(Order order, unsigned seed) {
  machine().order = order;
  machine().seed = seed;
}

std::vector<Launch> take_recorded() { return std::exchange(machine().recorded, {}); }

uint3& thread_index() { return machine().threads[machine().current].index; }
uint3& block_index() { return machine().block; }
uint3& block_size() { return machine().block_dim; }
uint3& grid_size() { return machine().grid_dim; }
int lane_index() { return machine().current & 31; }
void* dynamic_shared() { return machine().dynamic; }

void fail(const std::string& what) {
  Machine& m = machine();
  if (m.current < 0) throw Report(what);
  m.error = what;
  switch_fiber(m.threads[m.current].fiber, m.main, false);
  abort();  // a thread that failed is not run again
}

void synchronize_block(const char* file, int line) {
  Machine& m = machine();
  Thread& self = m.threads[m.current];
  self.file = file;
  self.line = line;
  if (++m.at_barrier < m.size) {
    wait_as(m, State::kAtBarrier);
    return;
  }
  for (int i = 0; i < m.size; ++i) {
    if (i != m.current && m.threads[i].line != line) {
      fail("divergent barrier: thread " + std::to_string(i) + " " + waits_for(m.threads[i]) + ", this one at " +
           place_of(self));
    }
  }
  m.at_barrier = 0;
  ++m.actor.epoch;
  for (int i = 0; i < m.size; ++i) make_ready(m, i);
  // The last one to come does not run on: who goes first is the order's choice.
  switch_fiber(self.fiber, m.main, false);
}

const uint64_t* meet_lanes(uint32_t mask, Collective collective, uint64_t value, const char* file, int line) {
  Machine& m = machine();
  Thread& self = m.threads[m.current];
  const int first = m.current & ~31, lanes = std::min(32, m.size - first);
  if (!(mask >> (m.current & 31) & 1)) fail("the mask of a warp collective leaves out the lane that calls it");
  if (lanes < 32 && mask >> lanes != 0) fail("the mask of a warp collective names lanes that the block does not have");
  self.collective = collective;
  self.mask = mask;
  self.value = value;
  self.file = file;
  self.line = line;
  self.state = State::kAtCollective;
  bool complete = true;
  for (int lane = 0; lane < lanes && complete; ++lane) {
    if (mask >> lane & 1) complete = same_collective(self, m.threads[first + lane]);
  }
  if (!complete) {
    wait_as(m, State::kAtCollective);
    return self.received;
  }
  if (collective == Collective::kSync && mask == 0xffffffffu >> (32 - lanes)) ++m.warp_epochs[first / 32];
  for (int to = 0; to < lanes; ++to) {
    if (!(mask >> to & 1)) continue;
    for (int from = 0; from < lanes; ++from) {
      if (mask >> from & 1) m.threads[first + to].received[from] = m.threads[first + from].value;
    }
    make_ready(m, first + to);
  }
  switch_fiber(self.fiber, m.main, false);
  return self.received;
}

void* shared_variable(const void* key, size_t size, size_t alignment) {
  Machine& m = machine();
  for (const SharedVariable& variable : m.variables) {
    if (variable.key == key) return variable.memory;
  }
  const bool dynamic = key == &m.dynamic;
  if (!dynamic) m.static_shared += size;
  if (m.static_shared > kStaticShared || m.static_shared + m.dynamic_size > kAllShared) {
    fail("more shared memory than a block may have");
  }
  const uintptr_t at = (m.arena_begin + m.arena_used + kGap + alignment - 1) / alignment * alignment;
  m.arena_used = at + size - m.arena_begin;
  void* memory = reinterpret_cast<void*>(at);
  std::fill_n(static_cast<unsigned char*>(memory), size, kPoison);
  m.variables.push_back({key, memory});
  add_shared(at, size);
  return memory;
}

void launch_bodies(const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared, Body body, void* context,
                   const std::vector<std::string>& arguments) {
  Machine& m = machine();
  if (!valid_configuration(m, kernel, grid, block, dynamic_shared)) {
    m.last_error = kInvalidConfiguration;
    return;
  }
  if (m.order == Order::kRecord) {
    m.recorded.push_back({symbol_of(kernel), grid, block, dynamic_shared, arguments});
    return;
  }
  m.size = static_cast<int>(block.x * block.y * block.z);
  if (m.threads.size() < static_cast<size_t>(m.size)) m.threads.resize(static_cast<size_t>(m.size));
  m.arena.resize(kArena + kGap);
  m.arena_begin = (reinterpret_cast<uintptr_t>(m.arena.data()) + kGap - 1) / kGap * kGap;
  m.dynamic_size = dynamic_shared;
  m.block_dim = {block.x, block.y, block.z};
  m.grid_dim = {grid.x, grid.y, grid.z};
  m.kernel = kernel;
  m.body = body;
  m.context = context;
  m.error.clear();
  m.random.seed(m.seed);
  catch_faults(fail_at, [] { return machine().current >= 0; });
  ++m.actor.launch;
  run_blocks(m);
  m.current = -1;
}

int take_last_error() { return std::exchange(machine().last_error, 0); }

void allow_dynamic_shared(const void* kernel, size_t bytes) {
  if (bytes > kAllShared) {
    machine().last_error = kInvalidConfiguration;
    return;
  }
  machine().dynamic_limits.emplace_back(kernel, bytes);
}

}  // namespace emulator
