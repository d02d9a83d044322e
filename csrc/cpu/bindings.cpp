// The table of native operations: every schema (also those that only `_C_cuda` adds to) and the CPU implementations.

#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(smt_native, m) {
  m.def("block_gather(Tensor weight, Tensor blocks, int block_rows, int block_cols) -> Tensor");
  m.def("block_scatter_(Tensor(a!) weight, Tensor packed, Tensor blocks) -> ()");
  m.def("block_grad_(Tensor(a!) grad, Tensor dy, Tensor x, Tensor blocks, bool accumulate) -> ()");
  m.def("swap_linear(Tensor x, Tensor weight, Tensor? bias, Tensor delta, Tensor blocks) -> Tensor");
  m.def("swap_matmul(Tensor dy, Tensor weight, Tensor delta, Tensor blocks) -> Tensor");
  m.def(
      "block_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] avg_scales, Tensor(e!)[] sq_scales, Tensor[] steps, Tensor? coefficient, Tensor? skip, "
      "Tensor? avg_code, Tensor? sq_code, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "int seed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(smt_native, CPU, m) {
  m.impl("block_gather", TORCH_BOX(&smt::block_gather));
  m.impl("block_scatter_", TORCH_BOX(&smt::block_scatter_));
  m.impl("block_grad_", TORCH_BOX(&smt::block_grad_));
  m.impl("swap_linear", TORCH_BOX(&smt::swap_linear));
  m.impl("swap_matmul", TORCH_BOX(&smt::swap_matmul));
  m.impl("block_adamw_", TORCH_BOX(&smt::block_adamw_));
}
