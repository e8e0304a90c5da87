// What a row of attention scores is to the softmax kernels: its columns and its lanes. Mathematics in softmax.cuh.
#pragma once
#include "dispatch.h"

namespace mx {

// Elements to a lane: few for short rows, whose lanes then read next to each other; beyond, as many as leave registers
// for their addresses, of which single elements need one each.
constexpr int64_t kShortRow = 256;
constexpr int per_lane(int vector, bool is_short) { return is_short ? 8 : vector == 1 ? 16 : 32; }

// The most threads of a block: those of rows of kMaxRegisterColumns.
constexpr int softmax_threads(int per_lane) { return per_lane == 8 ? kRowBlock : 16384 / per_lane; }

// Rows of a tensor [batch, sq, sk]; `visible`: columns that row 0 of a matrix sees.
struct AttentionRows {
  int64_t rows;
  int sq;
  int sk;
  int visible;
};

// The division is in 32 bits where they do: one in 64 bits costs more than a short row.
MX_DEVICE int visible_columns(const AttentionRows& shape, int64_t row) {
  if (row >= shape.rows) return 0;
  const uint32_t sq = static_cast<uint32_t>(shape.sq);
  const uint32_t i = row >> 32 == 0 ? static_cast<uint32_t>(row) % sq : static_cast<uint32_t>(row % shape.sq);
  return static_cast<int>(i) + shape.visible;
}

}  // namespace mx
