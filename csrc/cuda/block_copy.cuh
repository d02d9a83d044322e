// Copies between the blocks of a matrix and their packed form: the work of one thread, the same on host and device.
//
// A matrix is seen as it lies in memory: `lines` of `length` consecutive elements (the rows of a row-major weight, the
// columns of a transposed one). A CTA holds one tile of one block, or several whole blocks when they are small; its
// threads run along a line first, so that accesses to the matrix coalesce in either orientation.
#pragma once

#include "scalars.cuh"

namespace smt_cuda {

constexpr int kCopyThreadsLog2 = 8;
constexpr int kCopyThreads = 1 << kCopyThreadsLog2;
// Lines per thread: two loads of 16 bytes in flight each.
constexpr int kCopyLines = 2;

enum class Copy { kGather, kScatter, kSwapIn };

struct BlockCopy {
  void* matrix;
  void* packed;          // (B, r, c): written by a gather, else read
  void* saved;           // swap-in only: the originals, (B, block_lines, block_length)
  const int32_t* index;  // (B, 2): row and column stripe
  int64_t lines, length, num_blocks;
  int64_t packed_block_stride, packed_line_stride, packed_stride;
  int32_t block_lines, block_length;
  int32_t line_axis;                 // which of the two coordinates says which lines
  int32_t along_log2, down_log2;     // threads along a line, and threads over lines; the rest over further blocks
  uint32_t tiles_along, tiles_down;  // CTAs per such group of blocks
};

// The blocks of a `(rows, cols)` matrix, which lies in memory row by row, or `transposed`: column by column.
inline BlockCopy describe(void* matrix, int64_t rows, int64_t cols, bool transposed, const int32_t* index,
                          int64_t num_blocks, int64_t block_rows, int64_t block_cols) {
  BlockCopy copy{};
  copy.matrix = matrix;
  copy.index = index;
  copy.lines = transposed ? cols : rows;
  copy.length = transposed ? rows : cols;
  copy.num_blocks = num_blocks;
  copy.block_lines = static_cast<int32_t>(transposed ? block_cols : block_rows);
  copy.block_length = static_cast<int32_t>(transposed ? block_rows : block_cols);
  copy.line_axis = transposed ? 1 : 0;
  return copy;
}

// `strides`: of the packed blocks `(B, r, c)`, in elements.
inline void set_packed(BlockCopy& copy, void* packed, const int64_t* strides) {
  copy.packed = packed;
  copy.packed_block_stride = strides[0];
  copy.packed_line_stride = strides[copy.line_axis == 0 ? 1 : 2];
  copy.packed_stride = strides[copy.line_axis == 0 ? 2 : 1];
}

// Elements per access where 16 bytes can be moved at a time: 16 bytes of the narrower dtype.
template <class W, class P>
constexpr int kCopyWidth = 16 / (sizeof(W) < sizeof(P) ? sizeof(W) : sizeof(P));

// Every line of every block starts at a whole access and is made of whole ones, in the matrix and packed.
template <class W, class P>
bool can_copy_wide(const BlockCopy& copy) {
  constexpr int kWidth = kCopyWidth<W, P>;
  return copy.length % kWidth == 0 && copy.block_length % kWidth == 0 && copy.packed_stride == 1 &&
         copy.packed_line_stride % kWidth == 0 && copy.packed_block_stride % kWidth == 0 &&
         is_aligned<W, kWidth>(copy.matrix) && is_aligned<P, kWidth>(copy.packed) && is_aligned<W, kWidth>(copy.saved);
}

// Number of CTAs that `copy_thread` needs; sets the thread tiling. `width`: elements per access.
inline uint64_t tile(BlockCopy& copy, int width) {
  const auto log2_at_least = [](int64_t n, int most) {
    int log2 = 0;
    while (log2 < most && (int64_t{1} << log2) < n) ++log2;
    return log2;
  };
  const auto over = [](int64_t n, int64_t step) { return (n + step - 1) / step; };
  const int64_t accesses = over(copy.block_length, width);
  copy.along_log2 = log2_at_least(accesses, kCopyThreadsLog2);
  copy.down_log2 = log2_at_least(over(copy.block_lines, kCopyLines), kCopyThreadsLog2 - copy.along_log2);
  copy.tiles_along = static_cast<uint32_t>(over(accesses, 1 << copy.along_log2));
  copy.tiles_down = static_cast<uint32_t>(over(copy.block_lines, kCopyLines << copy.down_log2));
  const int64_t blocks_per_cta = kCopyThreads >> (copy.along_log2 + copy.down_log2);
  return static_cast<uint64_t>(over(copy.num_blocks, blocks_per_cta)) * copy.tiles_along * copy.tiles_down;
}

template <class To, class From, int N>
SMT_HD Pack<To, N> convert(const Pack<From, N>& values) {
  Pack<To, N> converted;
#pragma unroll
  for (int i = 0; i < N; ++i) converted.at[i] = convert<To>(values.at[i]);
  return converted;
}

// round(base + delta), rounded once.
template <class W, class P, int N>
SMT_HD Pack<W, N> add_rounded(const Pack<W, N>& base, const Pack<P, N>& delta) {
  using A = Wide<W, P>;
  Pack<W, N> sum;
#pragma unroll
  for (int i = 0; i < N; ++i) sum.at[i] = round_to<W>(widen<A>(base.at[i]) + widen<A>(delta.at[i]));
  return sum;
}

// What thread `thread` of CTA `cta` does. W: dtype of the matrix, P: of the packed blocks, N: elements per access;
// above 1, `packed_stride` is 1 (a branch on it would keep the loads of a thread from being in flight together).
// Coordinates outside the matrix are neither read nor written, whatever the index holds: they gather zeros.
template <Copy kind, class W, class P, int N>
SMT_HD void copy_thread(const BlockCopy& copy, uint32_t cta, uint32_t thread) {
  const uint32_t along = thread & ((1u << copy.along_log2) - 1);
  const uint32_t down = thread >> copy.along_log2 & ((1u << copy.down_log2) - 1);
  const uint32_t further = thread >> (copy.along_log2 + copy.down_log2);
  const uint32_t tile_along = cta % copy.tiles_along;
  const uint32_t tile_down = cta / copy.tiles_along % copy.tiles_down;
  const uint32_t group = cta / copy.tiles_along / copy.tiles_down;

  const int together_log2 = kCopyThreadsLog2 - copy.along_log2 - copy.down_log2;
  const int64_t block = (static_cast<int64_t>(group) << together_log2) + further;
  const int64_t column = (static_cast<int64_t>(tile_along) << copy.along_log2 | along) * N;
  if (block >= copy.num_blocks || column >= copy.block_length) return;
  const int64_t first_line = (static_cast<int64_t>(tile_down) * kCopyLines << copy.down_log2) + down;

  const int64_t origin_line = static_cast<int64_t>(copy.index[2 * block + copy.line_axis]) * copy.block_lines;
  const int64_t at = static_cast<int64_t>(copy.index[2 * block + 1 - copy.line_axis]) * copy.block_length + column;
  // Unsigned, so that one comparison refuses both ends.
  const bool in_length = static_cast<uint64_t>(at) < static_cast<uint64_t>(copy.length);
  W* const matrix = static_cast<W*>(copy.matrix) + origin_line * copy.length + at;
  P* const packed = static_cast<P*>(copy.packed) + block * copy.packed_block_stride + column * copy.packed_stride;
  W* const saved = static_cast<W*>(copy.saved) + block * copy.block_lines * copy.block_length + column;

  // All loads before the first store: the compiler may not move a load over a store that could alias it.
  Pack<W, N> weight[kCopyLines] = {};
  Pack<P, N> value[kCopyLines] = {};
  bool inside[kCopyLines];
#pragma unroll
  for (int i = 0; i < kCopyLines; ++i) {
    const int64_t line = first_line + (static_cast<int64_t>(i) << copy.down_log2);
    inside[i] = line < copy.block_lines && in_length &&
                static_cast<uint64_t>(origin_line + line) < static_cast<uint64_t>(copy.lines);
    if (!inside[i]) continue;
    if constexpr (kind != Copy::kScatter) weight[i] = load<N>(matrix + line * copy.length);
    if constexpr (kind != Copy::kGather) value[i] = load<N>(packed + line * copy.packed_line_stride);
  }
#pragma unroll
  for (int i = 0; i < kCopyLines; ++i) {
    const int64_t line = first_line + (static_cast<int64_t>(i) << copy.down_log2);
    if constexpr (kind == Copy::kGather) {
      // Padding is written as well: zero.
      if (line < copy.block_lines) store(packed + line * copy.packed_line_stride, convert<P>(weight[i]));
    } else if (inside[i]) {
      if constexpr (kind == Copy::kSwapIn) {
        store(saved + line * copy.block_length, weight[i]);
        store(matrix + line * copy.length, add_rounded(weight[i], value[i]));
      } else {
        store(matrix + line * copy.length, convert<W>(value[i]));
      }
    }
  }
}

}  // namespace smt_cuda
