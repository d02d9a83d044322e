// AdamW on all tensors of a model in one launch per combination of dtypes (more only beyond 4 KB or 32 KB of table).
#include <algorithm>
#include <string>
#include <vector>

#include "adamw.cuh"
#include "common.cuh"
#include "ops.h"

namespace smt_cuda {
namespace {

constexpr const char* kOp = "block_adamw_";

__device__ uint32_t warp_max(uint32_t value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = max(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  return value;
}

template <class P, class G, class M>
__global__ void __launch_bounds__(kAdamwThreads) adamw_kernel(const __grid_constant__ AdamwBatch batch) {
  using Thread = AdamwThread<P, G, M>;
  const AdamwNumbers& numbers = batch.numbers;
  if (numbers.skip && *numbers.skip != 0) return;
  __shared__ Codebook books[Thread::kCoded ? 2 : 1];
  if constexpr (Thread::kCoded) {
    static_assert(kAdamwThreads == 256);
    books[0].fill(threadIdx.x, numbers.avg_code);
    books[1].fill(threadIdx.x, numbers.sq_code);
    __syncthreads();
  }
  const AdamwTensor& tensor = batch.tensors[find_tensor(batch, blockIdx.x)];
  const AdamwStep step = adamw_step(numbers, *tensor.step);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int round = 0; round < kChunkRounds; ++round) {
    const int64_t block = Thread::block_of(tensor, blockIdx.x, round, warp);
    // The same for a whole warp, whose shuffles need all of it.
    if (block * kQuantBlock >= static_cast<int64_t>(tensor.numel)) return;
    Thread thread;
    thread.update(numbers, step, tensor, block, lane, books);
    uint32_t avg_most = 0, sq_most = 0;
    if constexpr (Thread::kCoded) {
      avg_most = warp_max(thread.largest(thread.m));
      sq_most = warp_max(thread.largest(thread.v));
    }
    thread.store(tensor, block, lane, avg_most, sq_most, books);
  }
}

using Kernel = void (*)(AdamwBatch);

// The dtypes of one tensor's parameter, gradient and moments, and what runs them.
struct Kind {
  ScalarType param, grad, moment;
  Kernel kernel;
  bool (*is_aligned)(const AdamwTensor&);
};

template <class P, class G, class M>
constexpr Kind kind(ScalarType param, ScalarType grad, ScalarType moment) {
  return {param, grad, moment, adamw_kernel<P, G, M>, AdamwThread<P, G, M>::is_aligned};
}

const std::vector<Kind>& kinds() {
  using S = ScalarType;
  using B = __nv_bfloat16;
  static const std::vector<Kind> all = {
      kind<float, float, float>(S::Float, S::Float, S::Float),
      kind<float, float, B>(S::Float, S::Float, S::BFloat16),
      kind<float, float, uint8_t>(S::Float, S::Float, S::Byte),
      kind<float, B, float>(S::Float, S::BFloat16, S::Float),
      kind<float, B, B>(S::Float, S::BFloat16, S::BFloat16),
      kind<float, B, uint8_t>(S::Float, S::BFloat16, S::Byte),
      kind<float, __half, float>(S::Float, S::Half, S::Float),
      kind<float, __half, B>(S::Float, S::Half, S::BFloat16),
      kind<float, __half, uint8_t>(S::Float, S::Half, S::Byte),
      kind<B, float, float>(S::BFloat16, S::Float, S::Float),
      kind<B, float, B>(S::BFloat16, S::Float, S::BFloat16),
      kind<B, float, uint8_t>(S::BFloat16, S::Float, S::Byte),
      kind<B, B, float>(S::BFloat16, S::BFloat16, S::Float),
      kind<B, B, B>(S::BFloat16, S::BFloat16, S::BFloat16),
      kind<B, B, uint8_t>(S::BFloat16, S::BFloat16, S::Byte),
      kind<B, __half, float>(S::BFloat16, S::Half, S::Float),
      kind<B, __half, B>(S::BFloat16, S::Half, S::BFloat16),
      kind<B, __half, uint8_t>(S::BFloat16, S::Half, S::Byte),
  };
  return all;
}

// A tensor by the list it is in; put in words only when something is wrong with it.
struct Name {
  const char* list;
  int64_t position = -1;
  std::string text() const { return position < 0 ? list : std::string(list) + "[" + std::to_string(position) + "]"; }
};

void check(const Name& name, const Tensor& tensor, ScalarType dtype, int64_t numel, int32_t device) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, kOp, ": ", name.text(), " has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), "; it must be ",
                  torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(tensor.numel() == numel, kOp, ": ", name.text(), " has shape ", shape_of(tensor),
                  "; it must hold ", numel, " elements");
  STD_TORCH_CHECK(tensor.is_contiguous(), kOp, ": ", name.text(), " is not contiguous; pass its .contiguous()");
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, kOp, ": ", name.text(),
                  " is not on cuda:", device, " as the first parameter is; move all tensors to one device");
}

struct Lists {
  const std::vector<Tensor>&params, &grads, &avgs, &sqs, &avg_scales, &sq_scales, &steps;
};

// Checks all that belongs to one parameter; returns its kind.
const Kind& check_tensor(const Lists& lists, size_t i, int32_t device) {
  const auto named = [i](const char* list) { return Name{list, static_cast<int64_t>(i)}; };
  const ScalarType param = lists.params[i].scalar_type(), grad = lists.grads[i].scalar_type();
  const ScalarType moment = lists.avgs[i].scalar_type();
  const auto kind = std::find_if(kinds().begin(), kinds().end(), [&](const Kind& kind) {
    return kind.param == param && kind.grad == grad && kind.moment == moment;
  });
  STD_TORCH_CHECK(kind != kinds().end(), kOp, ": ", named("params").text(), " has dtype ",
                  torch::headeronly::toString(param), ", its gradient ", torch::headeronly::toString(grad),
                  " and its moments ", torch::headeronly::toString(moment),
                  "; on a GPU they must be float32 or bfloat16; float32, bfloat16 or float16; float32, bfloat16 or "
                  "uint8");
  const int64_t numel = lists.params[i].numel();
  const int64_t scales = moment == ScalarType::Byte ? (numel + kQuantBlock - 1) / kQuantBlock : 0;
  check(named("params"), lists.params[i], param, numel, device);
  check(named("grads"), lists.grads[i], grad, numel, device);
  check(named("exp_avgs"), lists.avgs[i], moment, numel, device);
  check(named("exp_avg_sqs"), lists.sqs[i], moment, numel, device);
  check(named("avg_scales"), lists.avg_scales[i], ScalarType::Float, scales, device);
  check(named("sq_scales"), lists.sq_scales[i], ScalarType::Float, scales, device);
  const int64_t blocks = lists.steps[i].dim() == 2 ? lists.steps[i].size(0) : 0;
  check(named("steps"), lists.steps[i], ScalarType::Float, blocks ? 2 * blocks : 1, device);
  const bool countable = blocks == 0 ? numel < kMaxNumel
                                     : lists.params[i].dim() > 0 && lists.params[i].size(0) == blocks &&
                                           numel < kMaxNumelByBlock && numel / blocks < kMaxPerStep;
  STD_TORCH_CHECK(countable, kOp, ": ", named("steps").text(), " has shape ", shape_of(lists.steps[i]),
                  ", which a parameter of shape ", shape_of(lists.params[i]), " cannot take; one number or, by block, "
                  "(num_blocks, 2), for blocks of less than 2^26 elements");
  return *kind;
}

AdamwTensor entry(const Lists& lists, size_t i, const Kind& kind, int64_t seed) {
  AdamwTensor tensor{};
  tensor.param = lists.params[i].mutable_data_ptr();
  tensor.grad = lists.grads[i].const_data_ptr();
  tensor.avg = lists.avgs[i].mutable_data_ptr();
  tensor.sq = lists.sqs[i].mutable_data_ptr();
  tensor.avg_scale = static_cast<float*>(lists.avg_scales[i].mutable_data_ptr());
  tensor.sq_scale = static_cast<float*>(lists.sq_scales[i].mutable_data_ptr());
  tensor.step = static_cast<const float*>(lists.steps[i].const_data_ptr());
  tensor.numel = lists.params[i].numel();
  if (lists.steps[i].dim() == 2) tensor.per_step = tensor.numel / lists.steps[i].size(0);
  tensor.aligned = kind.is_aligned(tensor);
  tensor.key = adamw_key(seed, static_cast<uint32_t>(i));
  return tensor;
}

const float* values_of(const char* name, const std::optional<Tensor>& tensor, int64_t numel, int32_t device) {
  if (!tensor) return nullptr;
  check(Name{name}, *tensor, ScalarType::Float, numel, device);
  return static_cast<const float*>(tensor->const_data_ptr());
}

// Tensors of one kind, launched together whenever the table is full.
class Batcher {
 public:
  Batcher(const AdamwNumbers& numbers, Kernel kernel, cudaStream_t stream) : kernel_(kernel), stream_(stream) {
    batch_.numbers = numbers;
    batch_.count = 0;
  }

  void add(AdamwTensor tensor) {
    if (batch_.count == kAdamwTensors) flush();
    tensor.first_chunk = chunks_;
    batch_.tensors[batch_.count++] = tensor;
    chunks_ += adamw_chunks(tensor.numel);
  }

  void flush() {
    if (batch_.count == 0) return;
    STD_CUDA_CHECK(launch(kernel_, chunks_, kAdamwThreads, stream_, batch_));
    batch_.count = chunks_ = 0;
  }

 private:
  Kernel kernel_;
  cudaStream_t stream_;
  uint32_t chunks_ = 0;
  AdamwBatch batch_;
};

}  // namespace

void block_adamw_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                  const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                  const std::vector<Tensor>& avg_scales, const std::vector<Tensor>& sq_scales,
                  const std::vector<Tensor>& steps, const std::optional<Tensor>& coefficient,
                  const std::optional<Tensor>& skip, const std::optional<Tensor>& avg_code,
                  const std::optional<Tensor>& sq_code, double lr, double beta1, double beta2, double eps,
                  double weight_decay, int64_t seed) {
  const Lists lists{params, grads, exp_avgs, exp_avg_sqs, avg_scales, sq_scales, steps};
  for (const auto* list : {&grads, &exp_avgs, &exp_avg_sqs, &avg_scales, &sq_scales, &steps}) {
    STD_TORCH_CHECK(list->size() == params.size(), kOp, ": the lists must be equally long, got ", params.size(),
                    " params, ", grads.size(), " grads, ", exp_avgs.size(), " exp_avgs, ", exp_avg_sqs.size(),
                    " exp_avg_sqs, ", avg_scales.size(), " avg_scales, ", sq_scales.size(), " sq_scales, ",
                    steps.size(), " steps");
  }
  if (params.empty()) return;
  const int32_t device = params[0].get_device_index();
  bool coded = false;
  std::vector<const Kind*> kind_of(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    kind_of[i] = &check_tensor(lists, i, device);
    coded = coded || kind_of[i]->moment == ScalarType::Byte;
  }
  STD_TORCH_CHECK(!coded || (avg_code && sq_code), kOp, ": 8-bit moments need both code tables, avg_code and sq_code");

  AdamwNumbers numbers = adamw_numbers(lr, beta1, beta2, eps, weight_decay);
  numbers.coefficient = values_of("coefficient", coefficient, 1, device);
  numbers.skip = values_of("skip", skip, 1, device);
  numbers.avg_code = values_of("avg_code", avg_code, 256, device);
  numbers.sq_code = values_of("sq_code", sq_code, 256, device);

  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  for (const Kind& kind : kinds()) {
    Batcher batcher(numbers, kind.kernel, stream);
    for (size_t i = 0; i < params.size(); ++i) {
      if (kind_of[i] == &kind && params[i].numel() > 0) batcher.add(entry(lists, i, kind, seed));
    }
    batcher.flush();
  }
}

}  // namespace smt_cuda
