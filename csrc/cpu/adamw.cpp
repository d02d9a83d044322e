// AdamW (Loshchilov & Hutter, arXiv 1711.05101, Alg. 2) over many tensors in one parallel pass. The arithmetic is that of
// smt_peft/ops/adamw.py, operation by operation.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "isa.h"
#include "ops.h"

namespace smt {
namespace {

// Elements that share a scale when moments are 8-bit, and that are widened, updated and narrowed at a time.
constexpr int64_t kChunk = 256;
// Chunks worth a thread of their own.
constexpr int64_t kGrain = 64;

// One tensor's share: raw memory and what differs between tensors.
struct Task {
  void *param, *avg, *sq;
  const void* grad;
  float *avg_scale, *sq_scale;
  int64_t numel, first_chunk;
  double step;
  uint32_t key_param, key_avg, key_sq;
  // Of a tensor whose blocks count their steps each on its own: elements of a block, and what hangs on its count.
  int64_t per_step = 0;
  const double *rates = nullptr, *root_bias2s = nullptr;
};

template <class T>
struct Step {
  T decay, rate, root_bias2, one_minus_beta1, beta2, one_minus_beta2, eps, coefficient;
  const float *avg_code, *sq_code;
  const T *avg_middles, *sq_middles;
};

// What is common to all tensors of a call.
struct Call {
  double lr, beta1, beta2, eps, weight_decay, coefficient;
  const float *avg_code, *sq_code;
  float middles[2][255];
  double exact_middles[2][255];
};

inline uint32_t fmix32(uint32_t word) {
  word ^= word >> 16;
  word *= 0x85EBCA6Bu;
  word ^= word >> 13;
  word *= 0xC2B2AE35u;
  return word ^ word >> 16;
}

inline float square_root(float value) { return __builtin_sqrtf(value); }
inline double square_root(double value) { return __builtin_sqrt(value); }

// No fused multiply-adds: they are nearer to the truth, but not the numbers of torch.optim.AdamW (1e-5 apart after 100
// steps at a learning rate of 1e-3, 2.4e-7 without, 2026-11).
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#define SMT_KERNEL_TEXT "adamw_kernel.inc"
#include "each_isa.inc"

double rate_of(const Call& call, double step) { return call.lr / (1 - std::pow(call.beta1, step)); }
double root_bias2_of(const Call& call, double step) { return std::sqrt(1 - std::pow(call.beta2, step)); }

// The rates of all blocks, then their root_bias2s.
std::vector<double> by_block(const Call& call, const float* steps, int64_t count) {
  std::vector<double> found(2 * count);
  for (int64_t i = 0; i < count; ++i) {
    // Most blocks are as old as their neighbour.
    const bool again = i > 0 && steps[i] == steps[i - 1];
    found[i] = again ? found[i - 1] : rate_of(call, steps[i]);
    found[count + i] = again ? found[count + i - 1] : root_bias2_of(call, steps[i]);
  }
  return found;
}

template <class T>
Step<T> step_of(const Call& call, double step) {
  Step<T> s;
  s.decay = static_cast<T>(1 - call.lr * call.weight_decay);
  s.rate = static_cast<T>(rate_of(call, step));
  s.root_bias2 = static_cast<T>(root_bias2_of(call, step));
  s.one_minus_beta1 = static_cast<T>(1 - call.beta1);
  s.beta2 = static_cast<T>(call.beta2);
  s.one_minus_beta2 = static_cast<T>(1 - call.beta2);
  s.eps = static_cast<T>(call.eps);
  s.coefficient = static_cast<T>(call.coefficient);
  s.avg_code = call.avg_code;
  s.sq_code = call.sq_code;
  if constexpr (std::is_same_v<T, float>) {
    s.avg_middles = call.middles[0];
    s.sq_middles = call.middles[1];
  } else {
    s.avg_middles = call.exact_middles[0];
    s.sq_middles = call.exact_middles[1];
  }
  return s;
}

template <class T, class P>
void run(const Task& task, const Call& call, ScalarType grad, ScalarType moment, int64_t begin, int64_t end) {
  const Step<T> s = step_of<T>(call, task.step);
  for_dtype(grad, [&](auto zero) {
    using G = decltype(zero);
    const auto kernel = moment == ScalarType::Byte       ? SMT_KERNEL(step_chunk<T, P, G, uint8_t>)
                        : moment == ScalarType::BFloat16 ? SMT_KERNEL(step_chunk<T, P, G, BFloat16>)
                                                         : SMT_KERNEL(step_chunk<T, P, G, T>);
    for (int64_t chunk = begin; chunk < end; ++chunk)
      kernel(task, chunk * kChunk, std::min(kChunk, task.numel - chunk * kChunk), s);
  });
}

void check_operand(const char* name, size_t i, const Tensor& tensor, const Tensor& like, bool dtype_fits) {
  check_cpu("block_adamw_", name, tensor);
  STD_TORCH_CHECK(dtype_fits, "block_adamw_: ", name, "[", i, "] has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), ", which does not go with params[", i, "] of ",
                  torch::headeronly::toString(like.scalar_type()));
  STD_TORCH_CHECK(tensor.is_contiguous() && shape_of(tensor) == shape_of(like), "block_adamw_: ", name, "[", i,
                  "] has shape ", shape_of(tensor), "; it must be contiguous and of shape ", shape_of(like));
}

float scalar_of(const char* name, const Tensor& tensor) {
  check_cpu("block_adamw_", name, tensor);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.numel() == 1, "block_adamw_: ", name,
                  " must be one float32 number, got shape ", shape_of(tensor), " of ",
                  torch::headeronly::toString(tensor.scalar_type()));
  return *static_cast<const float*>(tensor.const_data_ptr());
}

// The steps of a tensor: one number, or one for each of its blocks.
const float* steps_of(size_t i, const Tensor& steps, const Tensor& param) {
  check_cpu("block_adamw_", "steps", steps);
  STD_TORCH_CHECK(steps.scalar_type() == ScalarType::Float && steps.is_contiguous() &&
                      (steps.dim() == 0 || (steps.dim() == 1 && param.dim() > 0 && steps.size(0) == param.size(0))),
                  "block_adamw_: steps[", i, "] has shape ", shape_of(steps), " of ",
                  torch::headeronly::toString(steps.scalar_type()),
                  "; it must be float32, one number or one for each block of a parameter of shape ", shape_of(param));
  const float* values = static_cast<const float*>(steps.const_data_ptr());
  for (int64_t block = 0; block < steps.numel(); ++block)
    STD_TORCH_CHECK(values[block] >= 1, "block_adamw_: steps[", i, "] is ", values[block],
                    "; it counts this step already, so it is at least 1");
  return values;
}

float* scales_of(const char* name, size_t i, const Tensor& scales, int64_t needed) {
  check_cpu("block_adamw_", name, scales);
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.dim() == 1 && scales.is_contiguous() &&
                      scales.size(0) == needed,
                  "block_adamw_: ", name, "[", i, "] has shape ", shape_of(scales), "; it must be float32 (", needed,
                  "): one number for 256 elements of an 8-bit moment, none for another");
  return static_cast<float*>(scales.mutable_data_ptr());
}

const float* code_of(const char* name, const std::optional<Tensor>& code, float* middles, double* exact) {
  STD_TORCH_CHECK(code.has_value() && code->is_cpu() && code->scalar_type() == ScalarType::Float &&
                      code->numel() == 256 && code->is_contiguous(),
                  "block_adamw_: 8-bit moments need ", name, ", a float32 table of 256 ascending values");
  const float* values = static_cast<const float*>(code->const_data_ptr());
  for (int i = 0; i < 255; ++i) {
    exact[i] = (static_cast<double>(values[i]) + static_cast<double>(values[i + 1])) / 2;
    // A float lies above the exact middle just when it lies above the greatest float that is not above that middle.
    const float near = static_cast<float>(exact[i]);
    middles[i] = static_cast<double>(near) > exact[i] ? std::nextafterf(near, -INFINITY) : near;
  }
  return values;
}

}  // namespace

void block_adamw_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                  const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                  const std::vector<Tensor>& avg_scales, const std::vector<Tensor>& sq_scales,
                  const std::vector<Tensor>& steps, const std::optional<Tensor>& coefficient,
                  const std::optional<Tensor>& skip, const std::optional<Tensor>& avg_code,
                  const std::optional<Tensor>& sq_code, double lr, double beta1, double beta2, double eps,
                  double weight_decay, int64_t seed) {
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
                      avg_scales.size() == count && sq_scales.size() == count && steps.size() == count,
                  "block_adamw_: the lists of tensors differ in length");
  Call call{lr, beta1, beta2, eps, weight_decay, 1.0, nullptr, nullptr, {}, {}};
  std::vector<Task> tasks(count);
  std::vector<std::vector<double>> counted;
  int64_t chunks = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor &param = params[i], &grad = grads[i], &avg = exp_avgs[i], &sq = exp_avg_sqs[i];
    const ScalarType kind = param.scalar_type(), moment = avg.scalar_type();
    const ScalarType wide = kind == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    check_operand("params", i, param, param, kind == wide || kind == ScalarType::BFloat16);
    check_float("block_adamw_", "grads", grad);
    check_operand("grads", i, grad, param, true);
    check_operand("exp_avgs", i, avg, param,
                  moment == wide || moment == ScalarType::BFloat16 || moment == ScalarType::Byte);
    check_operand("exp_avg_sqs", i, sq, param, sq.scalar_type() == moment);
    const int64_t own_chunks = (param.numel() + kChunk - 1) / kChunk;
    const int64_t scales = moment == ScalarType::Byte ? own_chunks : 0;
    const uint32_t key = fmix32(static_cast<uint32_t>(seed) ^ static_cast<uint32_t>(i + 1) * 0x9E3779B9u);
    tasks[i] = {param.mutable_data_ptr(),
                avg.mutable_data_ptr(),
                sq.mutable_data_ptr(),
                grad.const_data_ptr(),
                scales_of("avg_scales", i, avg_scales[i], scales),
                scales_of("sq_scales", i, sq_scales[i], scales),
                param.numel(),
                chunks,
                1.0,
                fmix32(key + 1),
                fmix32(key + 2),
                fmix32(key + 3)};
    const float* counts = steps_of(i, steps[i], param);
    if (steps[i].dim() == 0) {
      tasks[i].step = *counts;
    } else if (const int64_t blocks = steps[i].numel(); blocks > 0) {
      counted.push_back(by_block(call, counts, blocks));
      tasks[i].per_step = param.numel() / blocks;
      tasks[i].rates = counted.back().data();
      tasks[i].root_bias2s = tasks[i].rates + blocks;
    }
    if (moment == ScalarType::Byte && call.avg_code == nullptr) {
      call.avg_code = code_of("avg_code", avg_code, call.middles[0], call.exact_middles[0]);
      call.sq_code = code_of("sq_code", sq_code, call.middles[1], call.exact_middles[1]);
    }
    chunks += own_chunks;
  }
  if (skip.has_value() && scalar_of("skip", *skip) != 0) return;
  if (coefficient.has_value()) call.coefficient = scalar_of("coefficient", *coefficient);
  STD_TORCH_CHECK(std::isfinite(call.coefficient), "block_adamw_: coefficient is ", call.coefficient,
                  "; a gradient is not finite: leave the step out, or pass skip");
  torch::stable::parallel_for(0, chunks, kGrain, [&](int64_t begin, int64_t end) {
    auto task = std::upper_bound(tasks.begin(), tasks.end(), begin,
                                 [](int64_t chunk, const Task& t) { return chunk < t.first_chunk; }) - 1;
    for (; begin < end; ++task) {
      const size_t i = task - tasks.begin();
      const int64_t own_end = task->first_chunk + (task->numel + kChunk - 1) / kChunk;
      const int64_t stop = std::min(end, own_end);
      const int64_t from = begin - task->first_chunk, to = stop - task->first_chunk;
      const ScalarType kind = params[i].scalar_type(), grad = grads[i].scalar_type(), moment = exp_avgs[i].scalar_type();
      if (from < to) {
        if (kind == ScalarType::Double) run<double, double>(*task, call, grad, moment, from, to);
        if (kind == ScalarType::Float) run<float, float>(*task, call, grad, moment, from, to);
        if (kind == ScalarType::BFloat16) run<float, BFloat16>(*task, call, grad, moment, from, to);
      }
      begin = std::max(begin, stop);
    }
  });
}

}  // namespace smt
