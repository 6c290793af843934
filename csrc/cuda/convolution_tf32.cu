// SPDX-License-Identifier: Apache-2.0
#include "cuda/convolution.h"

namespace moe::MOE_GPU {
template Status convolve<device::tf32>(const gpu::ConvolutionCall&, gpu::ConvolutionNeeds*);
}  // namespace moe::MOE_GPU
