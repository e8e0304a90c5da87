// One GPU for kernels that g++ compiled: runs the blocks of a launch one after the other, every thread of a block as a
// fiber, in an order of the caller's choice.
//
// A fiber runs until it has to wait for others: at __syncthreads for its block, at a warp collective for the lanes of the
// mask. Whatever order threads, warps and blocks run in, a correct kernel gives the same bits; a missing barrier does not.
// `shadow.h` holds what is checked of every access to memory.
//
// Not emulated: tensor cores, asynchronous copies, clusters, grid-wide synchronization, weak memory ordering, and time.
#pragma once
#include <stddef.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "types.h"

namespace emulator {

// What a launch is to do: run in one of three orders, or only be written down (`recorded`), for another machine to run.
enum class Order { kForward, kReverse, kRandom, kRecord };

// A kernel did something that is wrong on a device; the text names kernel, block and thread.
struct Report : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Launch {
  std::string kernel;  // mangled
  dim3 grid, block;
  size_t dynamic_shared;
  std::vector<std::string> arguments;  // bytes of each parameter
};

enum class Collective : uint8_t { kSync, kShuffle };

void configure(Order order, unsigned seed);
std::vector<Launch> take_recorded();

// ---- what kernels call, through cuda_emulator.h ------------------------------------------------------------------------

uint3& thread_index();
uint3& block_index();
uint3& block_size();
uint3& grid_size();
void synchronize_block(const char* file, int line);
// Waits for the lanes of `mask`, which come with the same mask, collective and line; gives back what each lane brought,
// of which those outside the mask are undefined. The array is valid until the caller's next collective.
const uint64_t* meet_lanes(uint32_t mask, Collective collective, uint64_t value, const char* file, int line);
int lane_index();
// The variable of the block that is declared at `key`, filled with NaN bytes for the first thread that asks.
void* shared_variable(const void* key, size_t size, size_t alignment);
void* dynamic_shared();
[[noreturn]] void fail(const std::string& what);

// ---- what host code calls ----------------------------------------------------------------------------------------------

using Body = void (*)(void* context);
// Runs, or records, `body` for every thread; a configuration that a device refuses sets the last error and runs nothing.
void launch_bodies(const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared, Body body, void* context,
                   const std::vector<std::string>& arguments);
int take_last_error();
void allow_dynamic_shared(const void* kernel, size_t bytes);

template <class T>
std::string bytes_of(const T& value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared, const void* /*stream*/,
            Arguments&&... arguments) {
  std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...>* values;
  } call{kernel, &values};
  const Body body = [](void* context) {
    const Call& to_run = *static_cast<Call*>(context);
    std::apply(to_run.kernel, *to_run.values);
  };
  const auto packed =
      std::apply([](const auto&... value) { return std::vector<std::string>{bytes_of(value)...}; }, values);
  launch_bodies(reinterpret_cast<const void*>(kernel), grid, block, dynamic_shared, body, &call, packed);
}

}  // namespace emulator
