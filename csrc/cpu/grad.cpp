// dW[b] = dY[:, rows_b]^T X[:, cols_b] for the chosen blocks: A^T B with A the side that is broadcast and B the side
// that fills the vector registers.
//
// Every element is summed in an order that the shapes alone decide: the result does not depend on the number of threads.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "checks.h"
#include "isa.h"
#include "ops.h"

namespace smt {
namespace {

// Multiply-adds worth a thread of their own.
constexpr int64_t kGrain = 1 << 18;

// One operand, `(tokens, features)`, read in stripes of `width` columns.
struct Operand {
  const void* data;
  ScalarType dtype;
  int64_t token_stride, stride, features, width;
  int64_t valid(int64_t stripe) const { return std::min(width, features - stripe * width); }
};

#define SMT_KERNEL_TEXT "grad_kernel.inc"
#include "each_isa.inc"

template <class T>
struct Problem {
  Operand a, b;
  // Strides of the result: from block to block, and along A and B in a block.
  int64_t block_step, a_step, b_step;
  T* grad;
  int64_t tokens;
  // Stripes of every block, sorted by (A, B), and which block of the result it is.
  std::vector<int64_t> a_stripe, b_stripe, block;

  int64_t count() const { return block.size(); }
  int64_t numel() const { return count() * a.width * b.width; }
};

// Memory that a thread keeps from call to call: fresh pages cost more than filling them (blocks of 16, 512 tokens,
// 512 x 512: five times the whole call, 2026-11). Zeroed once, so that what pads a panel is a number.
template <class T>
class Scratch {
 public:
  T* get(size_t size) {
    if (size_ < size) {
      memory_.reset();
      memory_.reset(new T[size]());
      size_ = size;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<T[]> memory_;
  size_t size_ = 0;
};

template <class T>
struct Scratches {
  Scratch<T> a, b, partial;
  static Scratches& of_thread() {
    static thread_local Scratches scratches;
    return scratches;
  }
};

template <class T>
void pack_columns(const Operand& from, int64_t first, int64_t count, int64_t token, int64_t tokens, T* to, int64_t ld) {
  for_dtype(from.dtype, [&](auto zero) {
    SMT_KERNEL(pack<T, decltype(zero)>)(from, first, count, token, tokens, to, ld);
  });
}

#include "grad_stripes.inc"
#include "grad_panels.inc"

// Narrow sides fill registers by packing several blocks side by side, which the panels do.
template <class T>
void run(const Blocks& blocks, const Operand& dy, const Operand& x, T* grad, int64_t tokens) {
  const int64_t r = dy.width, c = x.width;
  // The columns fill the registers, unless the rows would be fewer than a tile has: then the other way round.
  const bool turned = r < 8 && c > r;
  Problem<T> p{turned ? x : dy, turned ? dy : x, r * c, turned ? 1 : c, turned ? c : 1, grad, tokens, {}, {}, {}};
  for (int64_t b = 0; b < blocks.count; ++b) p.block.push_back(b);
  const auto a_of = [&](int64_t b) { return turned ? blocks.col(b) : blocks.row(b); };
  const auto b_of = [&](int64_t b) { return turned ? blocks.row(b) : blocks.col(b); };
  std::sort(p.block.begin(), p.block.end(), [&](int64_t i, int64_t j) {
    return a_of(i) != a_of(j) ? a_of(i) < a_of(j) : b_of(i) < b_of(j);
  });
  for (const int64_t b : p.block) {
    p.a_stripe.push_back(a_of(b));
    p.b_stripe.push_back(b_of(b));
  }
  if (std::max(r, c) <= kStripeWidth)
    stripes::run(p);
  else
    panels::run(p);
}

Operand operand_of(const char* name, const Tensor& tensor, int64_t width) {
  check_float("block_grad_", name, tensor);
  STD_TORCH_CHECK(tensor.dim() == 2, "block_grad_: ", name, " has shape ", shape_of(tensor),
                  "; it must be (tokens, features)");
  return {tensor.const_data_ptr(), tensor.scalar_type(), tensor.stride(0), tensor.stride(1), tensor.size(1), width};
}

}  // namespace

void block_grad_(const Tensor& grad, const Tensor& dy, const Tensor& x, const Tensor& blocks, bool accumulate) {
  check_packed("block_grad_", "grad", grad, blocks);
  const int64_t r = grad.size(1), c = grad.size(2);
  const Operand dy_operand = operand_of("dy", dy, r), x_operand = operand_of("x", x, c);
  STD_TORCH_CHECK(dy.size(0) == x.size(0), "block_grad_: dy has ", dy.size(0), " tokens and x has ", x.size(0),
                  "; both must come from one pass");
  const bool wide = dy.scalar_type() == ScalarType::Double || x.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(grad.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float) && grad.is_contiguous(),
                  "block_grad_: grad has dtype ", torch::headeronly::toString(grad.scalar_type()),
                  "; it must be contiguous and ", wide ? "float64, as an operand is" : "float32");
  const Blocks list = check_blocks("block_grad_", blocks, dy.size(1), x.size(1), r, c);
  if (!accumulate && grad.numel() > 0) std::memset(grad.mutable_data_ptr(), 0, grad.numel() * grad.element_size());
  if (list.count == 0 || dy.size(0) == 0) return;
  if (wide)
    run<double>(list, dy_operand, x_operand, static_cast<double*>(grad.mutable_data_ptr()), dy.size(0));
  else
    run<float>(list, dy_operand, x_operand, static_cast<float*>(grad.mutable_data_ptr()), dy.size(0));
}

}  // namespace smt
