// Blocks copied between a matrix and packed form, and added to a matrix for a while.
#pragma once

#include <memory>

#include "checks.h"

namespace smt {

// `blocks` of r x c elements of `matrix`, ready to copy.
struct Window {
  Matrix matrix;
  Blocks blocks;
  int64_t block_rows, block_cols;
};

// While it lives, the blocks of a weight hold round(base + delta); its end puts the base back bit for bit.
class Overlay {
 public:
  Overlay(const Tensor& weight, const Tensor& delta, const Window& window);
  ~Overlay();
  Overlay(const Overlay&) = delete;
  Overlay& operator=(const Overlay&) = delete;

 private:
  Tensor weight_;
  Window window_;
  std::unique_ptr<char[]> kept_;
};

}  // namespace smt
