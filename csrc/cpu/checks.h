// What the operations demand of their arguments. Every check comes before anything is written.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <string>

namespace smt {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Checked block coordinates: int32 (row stripe, column stripe) pairs, unique and inside the grid.
struct Blocks {
  const int32_t* coordinates;
  int64_t count;
  int64_t row(int64_t b) const { return coordinates[2 * b]; }
  int64_t col(int64_t b) const { return coordinates[2 * b + 1]; }
};

// A matrix in memory as rows of unit stride. `transposed`: the rows in memory are the columns of the tensor.
struct Matrix {
  int64_t rows, cols;
  bool transposed;
  int64_t memory_cols() const { return transposed ? rows : cols; }
};

std::string shape_of(const Tensor& tensor);
void check_float(const char* op, const char* name, const Tensor& tensor);
void check_cpu(const char* op, const char* name, const Tensor& tensor);
Matrix check_weight(const char* op, const Tensor& weight);
// (B, r, c) for these blocks, any float dtype.
void check_packed(const char* op, const char* name, const Tensor& packed, const Tensor& blocks);
Blocks check_blocks(const char* op, const Tensor& blocks, int64_t rows, int64_t cols, int64_t block_rows,
                    int64_t block_cols);

// Calls `body` with a value of the C++ type of a float dtype that `check_float` has passed.
template <class Body>
void for_dtype(ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(BFloat16{});
    default: return body(Half{});
  }
}

}  // namespace smt
