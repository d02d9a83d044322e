#include "copy.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>

#include "isa.h"
#include "ops.h"

namespace smt {
namespace {

// Cache lines worth a thread of their own, and how many to ask for ahead. A row of a narrow block is a line in a page of
// its own, which no hardware foresees: 0.5 us each when met one by one (two cores, 2026-11).
constexpr int64_t kLine = 64, kGrainLines = 1024, kAheadLines = 64;

template <class A, class B>
using wide_t = std::conditional_t<std::is_same_v<A, double> || std::is_same_v<B, double>, double, float>;

// Through float for the 16-bit types, as PyTorch converts.
template <class To, class From>
inline To round_to(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (std::is_same_v<To, double>) {
    return static_cast<double>(value);
  } else {
    return static_cast<To>(static_cast<float>(value));
  }
}

#define SMT_KERNEL_TEXT "copy_kernel.inc"
#include "each_isa.inc"

// Rows in memory of one block: `h` of `n` elements, from element `offset` of the matrix on.
struct Rows {
  int64_t offset, h, n;
};

Rows rows_of(const Window& w, int64_t b) {
  const int64_t i = w.blocks.row(b) * w.block_rows, j = w.blocks.col(b) * w.block_cols;
  const int64_t rows = std::min(w.block_rows, w.matrix.rows - i), cols = std::min(w.block_cols, w.matrix.cols - j);
  return w.matrix.transposed ? Rows{j * w.matrix.rows + i, cols, rows} : Rows{i * w.matrix.cols + j, rows, cols};
}

// Calls `body(block, offset in the matrix, h, n)` for every block, in parallel.
template <class W, class Body>
void for_each_block(const Window& w, const W* matrix, const Body& body) {
  const int64_t ld = w.matrix.memory_cols(), h = w.matrix.transposed ? w.block_cols : w.block_rows;
  const int64_t row_bytes = (w.matrix.transposed ? w.block_rows : w.block_cols) * sizeof(W);
  const int64_t lines = h * (row_bytes / kLine + 1);
  const int64_t ahead = (kAheadLines - 1) / lines + 1, grain = (kGrainLines - 1) / lines + 1;
  const auto fetch = [&](int64_t b) {
    const Rows rows = rows_of(w, b);
    const char* row = reinterpret_cast<const char*>(matrix + rows.offset);
    for (int64_t i = 0; i < rows.h; ++i, row += ld * sizeof(W))
      for (int64_t o = 0; o < row_bytes; o += kLine) __builtin_prefetch(row + o, 1, 3);
  };
  torch::stable::parallel_for(0, w.blocks.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < std::min(begin + ahead, end); ++b) fetch(b);
    for (int64_t b = begin; b < end; ++b) {
      if (b + ahead < end) fetch(b + ahead);
      const Rows rows = rows_of(w, b);
      body(b, rows.offset, rows.h, rows.n);
    }
  });
}

Window window_of(const char* op, const Tensor& weight, const Tensor& blocks, int64_t block_rows, int64_t block_cols) {
  const Matrix matrix = check_weight(op, weight);
  return {matrix, check_blocks(op, blocks, matrix.rows, matrix.cols, block_rows, block_cols), block_rows, block_cols};
}

}  // namespace

Tensor block_gather(const Tensor& weight, const Tensor& blocks, int64_t block_rows, int64_t block_cols) {
  const Window w = window_of("block_gather", weight, blocks, block_rows, block_cols);
  const bool ragged = w.matrix.rows % block_rows != 0 || w.matrix.cols % block_cols != 0;
  const int64_t shape[] = {w.blocks.count, block_rows, block_cols};
  Tensor packed = ragged ? torch::stable::new_zeros(weight, {shape, 3}) : torch::stable::new_empty(weight, {shape, 3});
  const int64_t rs = w.matrix.transposed ? 1 : block_cols, cs = w.matrix.transposed ? block_cols : 1;
  for_dtype(weight.scalar_type(), [&](auto zero) {
    using W = decltype(zero);
    const auto kernel = SMT_KERNEL(gather<W>);
    const W* from = static_cast<const W*>(weight.const_data_ptr());
    W* to = static_cast<W*>(packed.mutable_data_ptr());
    for_each_block(w, from, [&](int64_t b, int64_t offset, int64_t h, int64_t n) {
      kernel(from + offset, w.matrix.memory_cols(), h, n, to + b * block_rows * block_cols, rs, cs);
    });
  });
  return packed;
}

void block_scatter_(const Tensor& weight, const Tensor& packed_any, const Tensor& blocks) {
  check_packed("block_scatter_", "packed", packed_any, blocks);
  const Tensor packed = torch::stable::contiguous(packed_any);
  const int64_t block_rows = packed.size(1), block_cols = packed.size(2);
  const Window w = window_of("block_scatter_", weight, blocks, block_rows, block_cols);
  const int64_t rs = w.matrix.transposed ? 1 : block_cols, cs = w.matrix.transposed ? block_cols : 1;
  for_dtype(weight.scalar_type(), [&](auto weight_zero) {
    for_dtype(packed.scalar_type(), [&](auto packed_zero) {
      using W = decltype(weight_zero);
      using P = decltype(packed_zero);
      const auto kernel = SMT_KERNEL(scatter<W, P>);
      W* to = static_cast<W*>(weight.mutable_data_ptr());
      const P* from = static_cast<const P*>(packed.const_data_ptr());
      for_each_block(w, to, [&](int64_t b, int64_t offset, int64_t h, int64_t n) {
        kernel(to + offset, w.matrix.memory_cols(), h, n, from + b * block_rows * block_cols, rs, cs);
      });
    });
  });
}

Overlay::Overlay(const Tensor& weight, const Tensor& delta_any, const Window& window)
    : weight_(weight), window_(window) {
  const Tensor delta = torch::stable::contiguous(delta_any);
  const Window& w = window_;
  const int64_t size = w.block_rows * w.block_cols;
  kept_.reset(new char[w.blocks.count * size * weight.element_size()]);
  const int64_t rs = w.matrix.transposed ? 1 : w.block_cols, cs = w.matrix.transposed ? w.block_cols : 1;
  for_dtype(weight.scalar_type(), [&](auto weight_zero) {
    for_dtype(delta.scalar_type(), [&](auto delta_zero) {
      using W = decltype(weight_zero);
      using P = decltype(delta_zero);
      const auto kernel = SMT_KERNEL(overlay<W, P>);
      W* matrix = static_cast<W*>(weight.data_ptr());
      W* kept = reinterpret_cast<W*>(kept_.get());
      const P* from = static_cast<const P*>(delta.const_data_ptr());
      for_each_block(w, matrix, [&](int64_t b, int64_t offset, int64_t h, int64_t n) {
        kernel(matrix + offset, w.matrix.memory_cols(), h, n, from + b * size, rs, cs, kept + b * size);
      });
    });
  });
}

Overlay::~Overlay() {
  const Window& w = window_;
  const int64_t size = w.block_rows * w.block_cols;
  for_dtype(weight_.scalar_type(), [&](auto zero) {
    using W = decltype(zero);
    const auto kernel = SMT_KERNEL(scatter<W, W>);
    W* matrix = static_cast<W*>(weight_.data_ptr());
    const W* kept = reinterpret_cast<const W*>(kept_.get());
    for_each_block(w, matrix, [&](int64_t b, int64_t offset, int64_t h, int64_t n) {
      kernel(matrix + offset, w.matrix.memory_cols(), h, n, kept + b * size, n, 1);
    });
  });
}

}  // namespace smt
