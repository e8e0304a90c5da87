// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) and the dropout mask made of it.
//
// A word of noise is a function of (seed, element), so a kernel draws it in any order, on any number of threads, and the
// backward pass draws it again instead of reading a mask. Element i of a tensor has word i % 4 of block i / 4; abi.h says
// which words are dropped. Plain C++: the same text is compiled by nvcc for the device, and by g++ for the CPU kernels.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#define MX_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MX_HOST_DEVICE inline
#endif

namespace mx {

struct PhiloxBlock {
  uint32_t word[4];
};

// The four words of `counter` under `key`, ten rounds.
MX_HOST_DEVICE PhiloxBlock philox4x32(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(0xD2511F53u) * counter.word[0];
    const uint64_t second = static_cast<uint64_t>(0xCD9E8D57u) * counter.word[2];
    counter = {{static_cast<uint32_t>(second >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(second),
                static_cast<uint32_t>(first >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(first)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// The noise of elements 4 * block .. 4 * block + 3.
MX_HOST_DEVICE PhiloxBlock philox_block(uint64_t seed, uint64_t block) {
  return philox4x32({{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 0}},
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// What a kernel needs to know of a dropout probability: words below `threshold` drop, what is kept is multiplied.
struct Dropout {
  uint32_t threshold;
  float scale;
};

// 0 <= probability < 1 (callers refuse the rest). A threshold of 0 keeps everything: no word is below it.
inline Dropout dropout_of(float probability) {
  const double p = static_cast<double>(probability);
  return {static_cast<uint32_t>(p * 4294967296.0), static_cast<float>(1.0 / (1.0 - p))};
}

// The factor of each of four elements: 0, or 1 / (1 - probability).
MX_HOST_DEVICE void dropout_factors(const Dropout& dropout, uint64_t seed, uint64_t block, float factor[4]) {
  const PhiloxBlock noise = philox_block(seed, block);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int k = 0; k < 4; ++k) factor[k] = noise.word[k] >= dropout.threshold ? dropout.scale : 0.f;
}

// The factor of one element, where a row does not begin at a multiple of four: one block of noise for one word of it.
MX_HOST_DEVICE float dropout_factor(const Dropout& dropout, uint64_t seed, uint64_t element) {
  const PhiloxBlock noise = philox_block(seed, element >> 2);
  const uint32_t low = element & 1 ? noise.word[1] : noise.word[0];
  const uint32_t high = element & 1 ? noise.word[3] : noise.word[2];
  return (element & 2 ? high : low) >= dropout.threshold ? dropout.scale : 0.f;
}

}  // namespace mx
