#include "checks.h"

namespace smt {

std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + ")";
}

void check_cpu(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " is not on the CPU; move all operands to one device");
}

void check_float(const char* op, const char* name, const Tensor& tensor) {
  check_cpu(op, name, tensor);
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  op, ": ", name, " has dtype ", torch::headeronly::toString(dtype),
                  "; it must be float32, float64, bfloat16 or float16");
}

Matrix check_weight(const char* op, const Tensor& weight) {
  check_float(op, "weight", weight);
  STD_TORCH_CHECK(weight.dim() == 2, op, ": weight has shape ", shape_of(weight), "; it must be a matrix");
  const int64_t rows = weight.size(0), cols = weight.size(1);
  if (weight.is_contiguous()) return {rows, cols, false};
  const bool transposed = (rows <= 1 || weight.stride(0) == 1) && (cols <= 1 || weight.stride(1) == rows);
  STD_TORCH_CHECK(transposed, op, ": weight has strides (", weight.stride(0), ", ", weight.stride(1), ") for shape ",
                  shape_of(weight), "; it must be contiguous or the transpose of a contiguous matrix");
  return {rows, cols, true};
}

void check_packed(const char* op, const char* name, const Tensor& packed, const Tensor& blocks) {
  check_float(op, name, packed);
  STD_TORCH_CHECK(packed.dim() == 3 && packed.size(1) > 0 && packed.size(2) > 0, op, ": ", name, " has shape ",
                  shape_of(packed), "; it must be (blocks, block rows, block columns)");
  STD_TORCH_CHECK(blocks.dim() >= 1 && packed.size(0) == blocks.size(0), op, ": ", name, " holds ", packed.size(0),
                  " blocks but the index has shape ", shape_of(blocks), "; both must come from one selection");
}

Blocks check_blocks(const char* op, const Tensor& blocks, int64_t rows, int64_t cols, int64_t block_rows,
                    int64_t block_cols) {
  constexpr const char* kRepair =
      "; the index is damaged or was made for another model; make the selection again with select_blocks";
  check_cpu(op, "blocks", blocks);
  STD_TORCH_CHECK(blocks.scalar_type() == ScalarType::Int, op, ": blocks have dtype ",
                  torch::headeronly::toString(blocks.scalar_type()), "; they must be int32");
  STD_TORCH_CHECK(blocks.dim() == 2 && blocks.size(1) == 2, op, ": blocks have shape ", shape_of(blocks),
                  "; it must be (number of blocks, 2)");
  STD_TORCH_CHECK(blocks.is_contiguous(), op, ": blocks are not contiguous; call .contiguous()");
  STD_TORCH_CHECK(block_rows > 0 && block_cols > 0, op, ": blocks of ", block_rows, " x ", block_cols,
                  " elements; both sides must be positive");
  const int64_t row_stripes = rows == 0 ? 0 : (rows - 1) / block_rows + 1;
  const int64_t col_stripes = cols == 0 ? 0 : (cols - 1) / block_cols + 1;
  const Blocks list{static_cast<const int32_t*>(blocks.const_data_ptr()), blocks.size(0)};
  bool by_row = true, by_col = true;
  for (int64_t b = 0; b < list.count; ++b) {
    const int64_t row = list.row(b), col = list.col(b);
    STD_TORCH_CHECK(row >= 0 && row < row_stripes && col >= 0 && col < col_stripes, op, ": block ", b, " is (", row,
                    ", ", col, "), outside the grid of ", row_stripes, " x ", col_stripes, " blocks of ", block_rows,
                    " x ", block_cols, kRepair);
    if (b == 0) continue;
    const int64_t last_row = list.row(b - 1), last_col = list.col(b - 1);
    by_row = by_row && (last_row < row || (last_row == row && last_col < col));
    by_col = by_col && (last_col < col || (last_col == col && last_row < row));
    STD_TORCH_CHECK(by_row || by_col, op, ": block ", b, ", (", row, ", ", col, "), after (", last_row, ", ", last_col,
                    ") is a duplicate or out of order by (row, column)", kRepair);
  }
  return list;
}

}  // namespace smt
