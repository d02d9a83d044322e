// AdamW (Loshchilov & Hutter, arXiv 1711.05101, Alg. 2): the work of one thread, the same on host and device.
//
// A tensor is cut in chunks, one per CTA; a warp takes 256 consecutive elements of it at a time, 8 per thread: as many
// as share the scale of an 8-bit moment. The formula stands in smt_peft/ops/adamw.py.
#pragma once

#include <cmath>

#include "scalars.cuh"

namespace smt_cuda {

constexpr int kAdamwThreads = 256;
constexpr int kWarp = 32;
constexpr int kPerThread = 8;
constexpr int kQuantBlock = kWarp * kPerThread;
constexpr int kChunkRounds = 2;
constexpr int kChunk = kAdamwThreads * kPerThread * kChunkRounds;
// What tells apart the random bits of the three values of one element.
constexpr uint32_t kSaltParam = 1, kSaltAvg = 2, kSaltSq = 3;

#if CUDART_VERSION >= 12010
constexpr size_t kParameterBytes = 32764;
#else
constexpr size_t kParameterBytes = 4096;
#endif

struct AdamwTensor {
  void* param;
  const void* grad;
  void* avg;
  void* sq;
  float* avg_scale;
  float* sq_scale;
  const float* step;  // its number; by block: step_size and inverse_sqrt_bias2 of each, as `AdamwStep` has them
  uint64_t numel : 37;
  uint64_t per_step : 26;  // elements of a block, where each counts its steps on its own; 0: `step` is one for all
  uint64_t aligned : 1;    // every pointer allows accesses of whole packs
  uint32_t key;            // of the stochastic rounding, without salt
  uint32_t first_chunk;    // chunks of the tensors before this one
};

struct AdamwNumbers {
  const float* coefficient;
  const float* skip;
  const float* avg_code;
  const float* sq_code;
  float lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, log_beta1, log_beta2, eps;
};

// Everything one launch needs, passed by value: no copy to the device, nothing for a CUDA graph to lose.
constexpr int kAdamwTensors = (kParameterBytes - sizeof(AdamwNumbers) - 8) / sizeof(AdamwTensor);
struct AdamwBatch {
  AdamwNumbers numbers;
  uint32_t count;
  AdamwTensor tensors[kAdamwTensors];
};
static_assert(sizeof(AdamwBatch) <= kParameterBytes);

inline AdamwNumbers adamw_numbers(double lr, double beta1, double beta2, double eps, double weight_decay) {
  AdamwNumbers numbers{};
  numbers.lr = static_cast<float>(lr);
  numbers.decay = static_cast<float>(1 - lr * weight_decay);
  numbers.beta1 = static_cast<float>(beta1);
  numbers.one_minus_beta1 = static_cast<float>(1 - beta1);
  numbers.beta2 = static_cast<float>(beta2);
  numbers.one_minus_beta2 = static_cast<float>(1 - beta2);
  numbers.log_beta1 = static_cast<float>(std::log(beta1));
  numbers.log_beta2 = static_cast<float>(std::log(beta2));
  numbers.eps = static_cast<float>(eps);
  return numbers;
}

inline uint32_t adamw_key(int64_t seed, uint32_t ordinal) {
  return fmix32(static_cast<uint32_t>(seed) ^ (ordinal + 1) * 0x9e3779b9u);
}

// Of a tensor, of one by block, and of a block.
constexpr int64_t kMaxNumel = int64_t{1} << 37, kMaxNumelByBlock = int64_t{1} << 32, kMaxPerStep = int64_t{1} << 26;

inline uint32_t adamw_chunks(uint64_t numel) { return static_cast<uint32_t>((numel + kChunk - 1) / kChunk); }

// The tensor that a CTA works on: the last whose first chunk is not after it. Nine steps through constant memory.
SMT_HD uint32_t find_tensor(const AdamwBatch& batch, uint32_t cta) {
  uint32_t low = 0, high = batch.count;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (batch.tensors[middle].first_chunk <= cta) low = middle;
    else high = middle;
  }
  return low;
}

// What changes from step to step, but not from element to element.
struct AdamwStep {
  float coefficient, step_size, inverse_sqrt_bias2;
};

SMT_HD AdamwStep adamw_step(const AdamwNumbers& numbers, float step) {
  // 1 - beta^step = -expm1(step log beta): a power in fp32 would lose it (5 digits at beta2 = 0.999 and step 1).
  const float bias1 = -expm1f(step * numbers.log_beta1);
  const float bias2 = -expm1f(step * numbers.log_beta2);
  return {numbers.coefficient ? *numbers.coefficient : 1.0f, numbers.lr / bias1, 1.0f / sqrtf(bias2)};
}

// Of blocks that count their steps each on its own: what hangs on the count, ready made, as a power in the loop over the
// elements would spill registers.
SMT_HD AdamwStep adamw_step_at(const AdamwTensor& tensor, AdamwStep step, int64_t element) {
  const uint32_t block = static_cast<uint32_t>(element) / static_cast<uint32_t>(tensor.per_step);
  return {step.coefficient, tensor.step[2 * block], tensor.step[2 * block + 1]};
}

SMT_HD void adamw_element(const AdamwNumbers& numbers, const AdamwStep& step, float g, float& p, float& m, float& v) {
  g *= step.coefficient;
  // From the end that weighs more, as torch.lerp does: at beta1 = 0 the other way would leave g the rounding of m.
  m = numbers.beta1 < 0.5f ? g + (m - g) * numbers.beta1 : m + (g - m) * numbers.one_minus_beta1;
  v = numbers.beta2 * v + numbers.one_minus_beta2 * g * g;
  p = p * numbers.decay - step.step_size * (m / (sqrtf(v) * step.inverse_sqrt_bias2 + numbers.eps));
}

// A table of 256 ascending values, and the middles between neighbours rounded down: x lies beyond a middle exactly
// when it lies beyond the middle so rounded, x being fp32 too.
struct Codebook {
  float code[256];
  float middle[256];

  SMT_HD void fill(int i, const float* table) {
    code[i] = table[i];
    if (i == 255) return;
    const double exact = (static_cast<double>(table[i]) + static_cast<double>(table[i + 1])) / 2;
    const float rounded = static_cast<float>(exact);
    middle[i] = rounded > exact ? nextafterf(rounded, -INFINITY) : rounded;
  }

  // The nearest code; of two as near, the lower: the number of middles below x.
  SMT_HD uint8_t nearest(float x) const {
    int number = 0;
#pragma unroll
    for (int step = 128; step > 0; step /= 2) {
      if (middle[number + step - 1] < x) number += step;
    }
    return static_cast<uint8_t>(number);
  }
};

// Ordered as magnitudes with NaN above infinity, so that a block with a NaN in it shows one.
SMT_HD uint32_t magnitude_bits(float value) { return bit_cast<uint32_t>(value) & 0x7fffffffu; }

// One thread's share of 256 consecutive elements. P, G, M: dtypes of parameter, gradient and moments (uint8_t: codes).
// The widest of them is accessed 16 bytes at a time; a warp's accesses to the others are as dense.
template <class P, class G, class M>
struct AdamwThread {
  static constexpr bool kCoded = std::is_same_v<M, uint8_t>;
  static constexpr int kWidest = sizeof(P) > sizeof(G) ? (sizeof(P) > sizeof(M) ? sizeof(P) : sizeof(M))
                                                       : (sizeof(G) > sizeof(M) ? sizeof(G) : sizeof(M));
  static constexpr int kWidth = 16 / kWidest;
  static constexpr int kPacks = kPerThread / kWidth;
  static_assert(kPacks * kWidth == kPerThread);

  int64_t first;  // of this thread's elements
  bool whole;     // the warp's elements are all there, and aligned
  float p[kPerThread], m[kPerThread], v[kPerThread];

  static bool is_aligned(const AdamwTensor& tensor) {
    return smt_cuda::is_aligned<P, kWidth>(tensor.param) && smt_cuda::is_aligned<G, kWidth>(tensor.grad) &&
           smt_cuda::is_aligned<M, kWidth>(tensor.avg) && smt_cuda::is_aligned<M, kWidth>(tensor.sq);
  }

  SMT_HD static int64_t block_of(const AdamwTensor& tensor, uint32_t cta, int round, int warp) {
    const int64_t chunk = static_cast<int64_t>(cta - tensor.first_chunk) * kChunkRounds + round;
    return chunk * (kAdamwThreads / kWarp) + warp;
  }

  SMT_HD int64_t pack_at(int pack) const { return first + pack * kWarp * kWidth; }

  template <class T>
  SMT_HD const T* pack_in(const void* values, int pack) const {
    return static_cast<const T*>(values) + pack_at(pack);
  }

  // The elements that there are, zero for the rest.
  template <class T>
  SMT_HD Pack<T, kWidth> read_some(const void* from, const AdamwTensor& tensor, int pack) const {
    Pack<T, kWidth> some = {};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (pack_at(pack) + i < static_cast<int64_t>(tensor.numel)) some.at[i] = pack_in<T>(from, pack)[i];
    }
    return some;
  }

  template <class T>
  SMT_HD void write(void* to, const AdamwTensor& tensor, int pack, const Pack<T, kWidth>& values) const {
    T* const first_value = static_cast<T*>(to) + pack_at(pack);
    if (whole) {
      smt_cuda::store(first_value, values);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (pack_at(pack) + i < static_cast<int64_t>(tensor.numel)) first_value[i] = values.at[i];
      }
    }
  }

  // Reads, and computes the new values in fp32. Elements past the end come out as zero.
  SMT_HD void update(const AdamwNumbers& numbers, const AdamwStep& step, const AdamwTensor& tensor, int64_t block,
                     int lane, const Codebook* books) {
    first = block * kQuantBlock + lane * kWidth;
    whole = tensor.aligned && (block + 1) * kQuantBlock <= static_cast<int64_t>(tensor.numel);
    float avg_scale = 1, sq_scale = 1;
    if constexpr (kCoded) {
      avg_scale = tensor.avg_scale[block];
      sq_scale = tensor.sq_scale[block];
    }
    Pack<P, kWidth> params[kPacks];
    Pack<G, kWidth> grads[kPacks];
    Pack<M, kWidth> avgs[kPacks], sqs[kPacks];
    // One branch for all loads, so that they are in flight together.
    if (whole) {
#pragma unroll
      for (int pack = 0; pack < kPacks; ++pack) {
        params[pack] = load<kWidth>(pack_in<P>(tensor.param, pack));
        grads[pack] = load<kWidth>(pack_in<G>(tensor.grad, pack));
        avgs[pack] = load<kWidth>(pack_in<M>(tensor.avg, pack));
        sqs[pack] = load<kWidth>(pack_in<M>(tensor.sq, pack));
      }
    } else {
#pragma unroll
      for (int pack = 0; pack < kPacks; ++pack) {
        params[pack] = read_some<P>(tensor.param, tensor, pack);
        grads[pack] = read_some<G>(tensor.grad, tensor, pack);
        avgs[pack] = read_some<M>(tensor.avg, tensor, pack);
        sqs[pack] = read_some<M>(tensor.sq, tensor, pack);
      }
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int pack = i / kWidth, within = i % kWidth;
      p[i] = widen<float>(params[pack].at[within]);
      if constexpr (kCoded) {
        m[i] = books[0].code[avgs[pack].at[within]] * avg_scale;
        v[i] = books[1].code[sqs[pack].at[within]] * sq_scale;
      } else {
        m[i] = widen<float>(avgs[pack].at[within]);
        v[i] = widen<float>(sqs[pack].at[within]);
      }
      const bool by_block = tensor.per_step != 0 && pack_at(pack) + within < static_cast<int64_t>(tensor.numel);
      const AdamwStep own = by_block ? adamw_step_at(tensor, step, pack_at(pack) + within) : step;
      adamw_element(numbers, own, widen<float>(grads[pack].at[within]), p[i], m[i], v[i]);
      if (kCoded && pack_at(pack) + within >= static_cast<int64_t>(tensor.numel)) m[i] = v[i] = 0;
    }
  }

  SMT_HD uint32_t largest(const float (&values)[kPerThread]) const {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const uint32_t bits = magnitude_bits(values[i]);
      most = bits > most ? bits : most;
    }
    return most;
  }

  template <class T>
  SMT_HD void store_rounded(void* to, const AdamwTensor& tensor, const float (&values)[kPerThread],
                            uint32_t salt) const {
    const uint32_t key = fmix32(tensor.key + salt);
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      Pack<T, kWidth> some;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float value = values[pack * kWidth + i];
        if constexpr (std::is_same_v<T, __nv_bfloat16>) {
          some.at[i] = round_stochastically(value, static_cast<uint32_t>(pack_at(pack) + i), key);
        } else {
          some.at[i] = value;
        }
      }
      write<T>(to, tensor, pack, some);
    }
  }

  SMT_HD void store_coded(void* to, const AdamwTensor& tensor, const float (&values)[kPerThread], float scale,
                          const Codebook& book) const {
    const float divisor = scale == 0 ? 1 : scale;
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      Pack<uint8_t, kWidth> some;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) some.at[i] = book.nearest(values[pack * kWidth + i] / divisor);
      write<uint8_t>(to, tensor, pack, some);
    }
  }

  // `avg_most`, `sq_most`: bits of the largest magnitude over the warp; used for codes only.
  SMT_HD void store(const AdamwTensor& tensor, int64_t block, int lane, uint32_t avg_most, uint32_t sq_most,
                    const Codebook* books) const {
    store_rounded<P>(tensor.param, tensor, p, kSaltParam);
    if constexpr (kCoded) {
      const float avg_scale = bit_cast<float>(avg_most), sq_scale = bit_cast<float>(sq_most);
      store_coded(tensor.avg, tensor, m, avg_scale, books[0]);
      store_coded(tensor.sq, tensor, v, sq_scale, books[1]);
      if (lane == 0) {
        tensor.avg_scale[block] = avg_scale;
        tensor.sq_scale[block] = sq_scale;
      }
    } else {
      store_rounded<M>(tensor.avg, tensor, m, kSaltAvg);
      store_rounded<M>(tensor.sq, tensor, v, kSaltSq);
    }
  }
};

}  // namespace smt_cuda
