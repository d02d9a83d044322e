// The CUDA operations, as bindings.cu registers them. Their contracts are in smt_peft/ops/native.py.
// T tokens, N out_features, K in_features, B blocks of r rows and c columns.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace smt_cuda {

using torch::stable::Tensor;

Tensor block_gather(const Tensor& weight_NK, const Tensor& blocks, int64_t block_rows, int64_t block_cols);
void block_scatter_(const Tensor& weight_NK, const Tensor& packed_Brc, const Tensor& blocks);
// Writes round(W + delta) to the blocks and returns the originals, in an order that only `swap_out` knows.
Tensor swap_in(const Tensor& weight_NK, const Tensor& delta_Brc, const Tensor& blocks);
void swap_out(const Tensor& weight_NK, const Tensor& saved, const Tensor& blocks);
Tensor swap_linear(const Tensor& x_TK, const Tensor& weight_NK, const std::optional<Tensor>& bias_N,
                   const Tensor& delta_Brc, const Tensor& blocks);
Tensor swap_matmul(const Tensor& dy_TN, const Tensor& weight_NK, const Tensor& delta_Brc, const Tensor& blocks);
void block_adamw_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                  const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                  const std::vector<Tensor>& avg_scales, const std::vector<Tensor>& sq_scales,
                  const std::vector<Tensor>& steps, const std::optional<Tensor>& coefficient,
                  const std::optional<Tensor>& skip, const std::optional<Tensor>& avg_code,
                  const std::optional<Tensor>& sq_code, double lr, double beta1, double beta2, double eps,
                  double weight_decay, int64_t seed);

}  // namespace smt_cuda
