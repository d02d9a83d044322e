// Which instruction set the kernels use: the best that the processor has, or what SMT_CPU_ISA names
// (avx512, avx2, baseline; read once). One library therefore serves every x86-64 machine, and others through baseline.
#pragma once

namespace smt {

enum class Isa { baseline, avx2, avx512 };

Isa isa();

}  // namespace smt

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define SMT_X86 1
#include <immintrin.h>
// The variant of `function` (defined in a kernel text, see each_isa.inc) for this processor.
#define SMT_KERNEL(...)                                          \
  (::smt::isa() == ::smt::Isa::avx512 ? &avx512::__VA_ARGS__     \
   : ::smt::isa() == ::smt::Isa::avx2 ? &avx2::__VA_ARGS__       \
                                      : &baseline::__VA_ARGS__)
#else
#define SMT_X86 0
#define SMT_KERNEL(...) (&baseline::__VA_ARGS__)
#endif
