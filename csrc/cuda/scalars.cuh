// Conversions of single elements, the same on host and device: what the kernels store, the tests can compute.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#define SMT_HD __host__ __device__ __forceinline__

namespace smt_cuda {

// The dtype that a sum of an A and a B is formed in: fp64 if either is, else fp32.
template <class A, class B>
using Wide = std::conditional_t<std::is_same_v<A, double> || std::is_same_v<B, double>, double, float>;

template <class To, class From>
SMT_HD To widen(From value) {
  if constexpr (std::is_same_v<From, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else if constexpr (std::is_same_v<From, __half>) {
    return __half2float(value);
  } else {
    return static_cast<To>(value);
  }
}

// To nearest, ties to even; from fp64 to 16 bits through fp32, as PyTorch converts.
template <class To, class From>
SMT_HD To round_to(From value) {
  if constexpr (std::is_same_v<To, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(value));
  } else if constexpr (std::is_same_v<To, __half>) {
    return __float2half_rn(static_cast<float>(value));
  } else {
    return static_cast<To>(value);
  }
}

// The same dtype is passed on bit for bit, NaN payloads too.
template <class To, class From>
SMT_HD To convert(From value) {
  if constexpr (std::is_same_v<To, From>) return value;
  else return round_to<To>(widen<Wide<To, From>>(value));
}

template <class To, class From>
SMT_HD To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  memcpy(static_cast<void*>(&bits), &value, sizeof(To));
  return bits;
}

// N consecutive elements.
template <class T, int N>
struct Pack {
  T at[N];
  // What they are moved as: the widest access of at most 16 bytes.
  static constexpr size_t kBytes = sizeof(T) * N;
  using Narrow = std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>;
  using Word = std::conditional_t<kBytes >= 16, uint4, std::conditional_t<kBytes == 8, uint2, Narrow>>;
  static constexpr int kWords = kBytes / sizeof(Word);
  static_assert(kWords * sizeof(Word) == kBytes);
};

template <class T, int N>
bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(typename Pack<T, N>::Word) == 0;
}

template <int N, class T>
SMT_HD Pack<T, N> load(const T* from) {
  using P = Pack<T, N>;
  typename P::Word words[P::kWords];
#pragma unroll
  for (int i = 0; i < P::kWords; ++i) words[i] = reinterpret_cast<const typename P::Word*>(from)[i];
  P values;
  memcpy(static_cast<void*>(&values), words, sizeof(P));
  return values;
}

// An ordinary store of these is broken up into stores of 4 bytes, in two of three kernels (nvcc 13.0, 2026-11).
SMT_HD void store_word(uint4* to, const uint4& word) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(to), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
#else
  *to = word;
#endif
}

SMT_HD void store_word(uint2* to, const uint2& word) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(to), "r"(word.x), "r"(word.y) : "memory");
#else
  *to = word;
#endif
}

template <class Word>
SMT_HD void store_word(Word* to, const Word& word) {
  *to = word;
}

template <class T, int N>
SMT_HD void store(T* to, const Pack<T, N>& values) {
  using P = Pack<T, N>;
  typename P::Word words[P::kWords];
  memcpy(words, static_cast<const void*>(&values), sizeof(P));
#pragma unroll
  for (int i = 0; i < P::kWords; ++i) store_word(reinterpret_cast<typename P::Word*>(to) + i, words[i]);
}

// The finaliser of MurmurHash3 (32 bits).
SMT_HD uint32_t fmix32(uint32_t h) {
  h ^= h >> 16;
  h *= 0x85ebca6bu;
  h ^= h >> 13;
  h *= 0xc2b2ae35u;
  return h ^ h >> 16;
}

// fp32 to bf16, up or down with the probability that makes the mean right: 16 random bits, hashed from the index of the
// element and a key, are added below the last bit that is kept. NaN and infinity are kept.
SMT_HD __nv_bfloat16 round_stochastically(float value, uint32_t index, uint32_t key) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return __float2bfloat16_rn(value);
  return bit_cast<__nv_bfloat16>(static_cast<uint16_t>((bits + (fmix32(index ^ key) >> 16)) >> 16));
}

}  // namespace smt_cuda
