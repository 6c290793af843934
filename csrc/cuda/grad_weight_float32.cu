// SPDX-License-Identifier: Apache-2.0
#include "cuda/grad_weight.h"

namespace moe::MOE_GPU {
template Status fill_parts<float>(const gpu::GradWeightCall&, GradWeightChoice&, bool);
}  // namespace moe::MOE_GPU
