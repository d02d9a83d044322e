#include "isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace smt {
namespace {

Isa best() {
#if SMT_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa chosen() {
  const char* name = std::getenv("SMT_CPU_ISA");
  if (name == nullptr || *name == '\0') return best();
  const std::string wanted = name;
  STD_TORCH_CHECK(wanted == "avx512" || wanted == "avx2" || wanted == "baseline", "SMT_CPU_ISA is '", wanted,
                  "'; it must be avx512, avx2, baseline or unset");
  const Isa isa = wanted == "avx512" ? Isa::avx512 : wanted == "avx2" ? Isa::avx2 : Isa::baseline;
  STD_TORCH_CHECK(isa <= best(), "SMT_CPU_ISA is '", wanted, "', which this processor lacks; unset it");
  return isa;
}

}  // namespace

Isa isa() {
  static const Isa isa = chosen();
  return isa;
}

}  // namespace smt
