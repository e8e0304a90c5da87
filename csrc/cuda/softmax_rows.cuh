// What a row of attention scores is to the softmax kernels: its columns, its lanes, its mask. Mathematics in softmax.cuh.
#pragma once
#include "dispatch.h"

namespace mx {

// Elements to a lane: few for short rows, whose lanes then read next to each other; beyond, as many as leave registers
// for their addresses, of which single elements need one each.
constexpr int64_t kShortRow = 256;
constexpr int per_lane(int vector, bool is_short) { return is_short ? 8 : vector == 1 ? 16 : 32; }

// The most threads of a block: those of rows of kMaxRegisterColumns.
constexpr int softmax_threads(int per_lane) { return per_lane == 8 ? kRowBlock : 16384 / per_lane; }

// Rows of a tensor [batch, heads, sq, sk]; `visible` is 0 in a masked softmax, else the columns that row 0 sees.
struct AttentionRows {
  int64_t rows;
  int sq;
  int sk;
  int visible;
};

// row % count, with 32 bits where they do: a 64-bit division costs more than a short row.
MX_DEVICE int64_t divide(int64_t row, int64_t count, int64_t& remainder) {
  if (static_cast<uint64_t>(row | count) >> 32 == 0) {
    const uint32_t quotient = static_cast<uint32_t>(row) / static_cast<uint32_t>(count);
    remainder = static_cast<uint32_t>(row) - quotient * static_cast<uint32_t>(count);
    return quotient;
  }
  const int64_t quotient = row / count;
  remainder = row - quotient * count;
  return quotient;
}

MX_DEVICE int visible_columns(const AttentionRows& shape, int64_t row) {
  if (row >= shape.rows) return 0;
  if (shape.visible == 0) return shape.sk;
  int64_t i;
  divide(row, shape.sq, i);
  return static_cast<int>(i) + shape.visible;
}

// The mask: [shape of one batch] where shared, else one for every `rows_per_mask` rows.
struct MaskRows {
  const uint8_t* mask;
  int64_t rows_per_mask;
  int shared;
};

template <int N>
struct alignas(N) MaskBytes {
  uint8_t hidden[N];
};

template <int N>
MX_DEVICE void hide(const MaskRows& mask, const AttentionRows& shape, int64_t row, int column, float (&value)[N],
                    float& seen) {
  int64_t i, batch_row;
  divide(row, shape.sq, i);
  const int64_t batch = mask.shared ? 0 : divide(row, mask.rows_per_mask, batch_row);
  const MaskBytes<N> bytes =
      *reinterpret_cast<const MaskBytes<N>*>(mask.mask + (batch * shape.sq + i) * shape.sk + column);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (bytes.hidden[k]) {
      value[k] = -INFINITY;
    } else {
      seen = 1.f;
    }
  }
}

}  // namespace mx
