// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/jobs.h"

namespace moe::cpu {

// The widest kernels that this processor runs, or those that MOE_KERNELS_CPU_ISA names (avx512, avx2, generic). Chosen
// once. Throws std::invalid_argument where the variable names a set that the processor or the build lacks.
const KernelTable& kernels();

// Whether MOE_KERNELS_WINOGRAD, read once, leaves Winograd's algorithm allowed: unset or 1; 0 forbids it.
bool winograd_allowed();

}  // namespace moe::cpu
