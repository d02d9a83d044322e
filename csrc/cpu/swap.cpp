// A GEMM on a weight whose blocks hold base + delta for exactly its length. Nothing in here runs Python code, so no
// signal handler (Ctrl-C) can come between writing and restoring; the GIL is not held, so that threads wait in parallel.

#include <torch/csrc/stable/ops.h>

#include <array>
#include <mutex>

#include "copy.h"
#include "ops.h"

namespace smt {
namespace {

// One mutex for all weights of a storage (tied weights, views); two storages may share one, which only costs time.
// Recursive, because the GEMM may be intercepted by a program that comes back here with the same weight.
std::recursive_mutex& lock_of(const Tensor& weight) {
  static std::array<std::recursive_mutex, 64> locks;
  const auto storage = reinterpret_cast<uintptr_t>(weight.data_ptr()) - weight.storage_offset() * weight.element_size();
  return locks[(storage * 0x9E3779B97F4A7C15ull) >> 58];
}

Window window_of(const char* op, const char* name, const Tensor& input, int64_t input_side, const Tensor& weight,
                 const Tensor& delta, const Tensor& blocks) {
  const Matrix matrix = check_weight(op, weight);
  check_packed(op, "delta", delta, blocks);
  check_float(op, name, input);
  STD_TORCH_CHECK(input.scalar_type() == weight.scalar_type(), op, ": ", name, " is ",
                  torch::headeronly::toString(input.scalar_type()), " but weight is ",
                  torch::headeronly::toString(weight.scalar_type()), "; cast ", name, " to the dtype of the weight");
  STD_TORCH_CHECK(input.dim() >= 1 && input.size(input.dim() - 1) == input_side, op, ": ", name, " has shape ",
                  shape_of(input), ", which does not fit a weight of shape ", shape_of(weight));
  return {matrix, check_blocks(op, blocks, matrix.rows, matrix.cols, delta.size(1), delta.size(2)), delta.size(1),
          delta.size(2)};
}

template <size_t n>
Tensor call(const char* op, std::array<StableIValue, n> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

Tensor swap_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& delta,
                   const Tensor& blocks) {
  using torch::stable::detail::from;
  const int64_t in_features = weight.dim() == 2 ? weight.size(1) : 0;
  const Window window = window_of("swap_linear", "x", x, in_features, weight, delta, blocks);
  if (bias.has_value()) {
    check_cpu("swap_linear", "bias", *bias);
    STD_TORCH_CHECK(bias->scalar_type() == weight.scalar_type() && bias->dim() == 1 && bias->size(0) == weight.size(0),
                    "swap_linear: bias has shape ", shape_of(*bias), " and dtype ",
                    torch::headeronly::toString(bias->scalar_type()), "; the weight needs (", weight.size(0), ") of ",
                    torch::headeronly::toString(weight.scalar_type()));
  }
  const std::lock_guard<std::recursive_mutex> guard(lock_of(weight));
  const Overlay overlay(weight, delta, window);
  return call<3>("aten::linear", {from(x), from(weight), from(bias)});
}

Tensor swap_matmul(const Tensor& dy, const Tensor& weight, const Tensor& delta, const Tensor& blocks) {
  using torch::stable::detail::from;
  const int64_t out_features = weight.dim() == 2 ? weight.size(0) : 0;
  const Window window = window_of("swap_matmul", "dy", dy, out_features, weight, delta, blocks);
  STD_TORCH_CHECK(dy.dim() == 2, "swap_matmul: dy has shape ", shape_of(dy), "; it must be (tokens, out_features)");
  const std::lock_guard<std::recursive_mutex> guard(lock_of(weight));
  const Overlay overlay(weight, delta, window);
  return call<2>("aten::mm", {from(dy), from(weight)});
}

}  // namespace smt
