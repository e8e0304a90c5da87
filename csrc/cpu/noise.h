// Dropout factors of a run of elements: the Philox of common/philox.h, eight blocks at a time where there is AVX2.
//
// A vector holds one word of four blocks in the low halves of 64 bits, as the 32 x 32 -> 64 bit product wants it; what the
// high halves hold is never read. Kernels ask for the factors of a stretch of a row, multiply, and go on.
#pragma once
#include "parallel.h"

namespace mx::cpu {

// Columns whose factors are made at a time: they stay in the first cache beside the row.
constexpr int64_t kNoise = 512;

class Noise {
 public:
  // `seed` is read only where something is dropped.
  Noise(float probability, const int64_t* seed)
      : dropout_(dropout_of(probability)), seed_(dropout_.threshold ? static_cast<uint64_t>(*seed) : 0) {}

  // The factors of elements first .. first + count - 1 of the tensor, count <= kNoise. What is in the buffer already, as
  // where rows are shorter than a group of blocks, is not made again.
  const float* factors(int64_t first, int64_t count) {
    constexpr int64_t group = 4 * kBlocks;
    if (first < begin_ || first + count > end_) {
      begin_ = end_ = first / group * group;
      for (; end_ < first + count; end_ += group) fill(static_cast<uint64_t>(end_) >> 2, buffer_ + (end_ - begin_));
    }
    return buffer_ + (first - begin_);
  }

 private:
  static constexpr int64_t kBlocks = 8;

#if defined(__AVX2__)
  struct Four {
    __m256i word[4];
  };

  // Counters of four blocks, of which `block` is the first.
  static Four counters(uint64_t block) {
    const __m256i low = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(block)), _mm256_setr_epi64x(0, 1, 2, 3));
    return {{low, _mm256_srli_epi64(low, 32), _mm256_setzero_si256(), _mm256_setzero_si256()}};
  }

  static MX_INLINE void round(Four& four, __m256i key0, __m256i key1) {
    const __m256i first = _mm256_mul_epu32(four.word[0], _mm256_set1_epi64x(0xD2511F53));
    const __m256i second = _mm256_mul_epu32(four.word[2], _mm256_set1_epi64x(0xCD9E8D57));
    four = {{_mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(second, 32), four.word[1]), key0), second,
             _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(first, 32), four.word[3]), key1), first}};
  }

  // Words into factors, in the order of the elements.
  MX_INLINE void store_factors(const Four& four, float* to) const {
    const __m256i even = _mm256_blend_epi32(four.word[0], _mm256_slli_epi64(four.word[1], 32), 0xAA);
    const __m256i odd = _mm256_blend_epi32(four.word[2], _mm256_slli_epi64(four.word[3], 32), 0xAA);
    const __m256i low = _mm256_unpacklo_epi64(even, odd), high = _mm256_unpackhi_epi64(even, odd);
    const Words halves[2] = {reinterpret_cast<Words>(_mm256_permute2x128_si256(low, high, 0x20)),
                             reinterpret_cast<Words>(_mm256_permute2x128_si256(low, high, 0x31))};
    for (int half = 0; half < 2; ++half)
      store(to + half * kLanes, halves[half] >= dropout_.threshold ? broadcast(dropout_.scale) : Floats{}, Full{});
  }

  void fill(uint64_t block, float* to) const {
    Four low = counters(block), high = counters(block + 4);
    uint32_t key0 = static_cast<uint32_t>(seed_), key1 = static_cast<uint32_t>(seed_ >> 32);
    for (int i = 0; i < 10; ++i) {
      const __m256i keys0 = _mm256_set1_epi64x(key0), keys1 = _mm256_set1_epi64x(key1);
      round(low, keys0, keys1);
      round(high, keys0, keys1);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    store_factors(low, to);
    store_factors(high, to + 2 * kLanes);
  }
#else
  void fill(uint64_t block, float* to) const {
    for (int64_t b = 0; b < kBlocks; ++b) dropout_factors(dropout_, seed_, block + static_cast<uint64_t>(b), to + 4 * b);
  }
#endif

  Dropout dropout_;
  uint64_t seed_;
  int64_t begin_ = 0;
  int64_t end_ = 0;
  // Whole groups are filled, and a run may begin at the end of one.
  float buffer_[kNoise + 4 * kBlocks];
};

// body(column, lanes, factors of these columns) for every vector of a row of `cols` elements that begins at element `first`.
template <class Body>
MX_INLINE void for_dropped(Noise& noise, int64_t first, int64_t cols, Body body) {
  for (int64_t begin = 0; begin < cols; begin += kNoise) {
    const int64_t count = std::min(kNoise, cols - begin);
    const float* factors = noise.factors(first + begin, count);
    for_vectors(count, [&](int64_t c, auto lanes, int) { body(begin + c, lanes, load(factors + c, lanes)); });
  }
}

}  // namespace mx::cpu
