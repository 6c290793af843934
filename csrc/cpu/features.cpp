// SPDX-License-Identifier: Apache-2.0
// The kernels between convolutions, of one instruction set. Compiled once for each, with MOE_ISA naming it, as
// kernels.cpp, whose table has them.
#include "cpu/features.h"

namespace moe::cpu {

Result MOE_FEATURES(MOE_ISA)(DType dtype, FeatureKernel kernel, const FeatureJob& job) {
    switch (dtype) {
        case DType::float32:
            return feature_kernel<float, float>(kernel, job);
        case DType::float64:
            return feature_kernel<double, double>(kernel, job);
        case DType::bfloat16:
            return feature_kernel<bfloat16, float>(kernel, job);
        default:
            return feature_kernel<float16, float>(kernel, job);
    }
}

}  // namespace moe::cpu
