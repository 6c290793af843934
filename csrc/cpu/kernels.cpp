// SPDX-License-Identifier: Apache-2.0
// The kernels of one instruction set. Compiled once for each, with MOE_ISA naming it; see dispatch.cpp.
#include "cpu/convolution.h"
#include "cpu/grad_weight.h"
#include "cpu/layers.h"
#include "cpu/pack.h"
#include "cpu/winograd.h"

#define MOE_CONCAT_(a, b) a##b
#define MOE_CONCAT(a, b) MOE_CONCAT_(a, b)
#define MOE_STRING_(a) #a
#define MOE_STRING(a) MOE_STRING_(a)

namespace moe::cpu {

Result MOE_FEATURES(MOE_ISA)(DType, FeatureKernel, const FeatureJob&);  // features.cpp

namespace {

int64_t packed_channels_of(DType dtype, int64_t out) {
    const int64_t width = dtype == DType::float64 ? panel<double> : panel<float>;
    return ceil_div(out, width) * width;
}

template <class T>
Result pack_with(const PackJob& job) {
    return job.algorithm == Algorithm::winograd ? winograd_pack<T, float>(job) : pack<T, float>(job);
}

Result pack_of(DType dtype, const PackJob& job) {
    switch (dtype) {
        case DType::float32:
            return pack_with<float>(job);
        case DType::float64:
            return pack<double, double>(job);  // always direct
        case DType::bfloat16:
            return pack_with<bfloat16>(job);
        default:
            return pack_with<float16>(job);
    }
}

template <class T>
Result conv_with(const ConvJob& job) {
    return job.algorithm == Algorithm::winograd ? winograd<T, float>(job) : conv<T, float>(job);
}

Result conv_of(DType dtype, const ConvJob& job) {
    switch (dtype) {
        case DType::float32:
            return conv_with<float>(job);
        case DType::float64:
            return conv<double, double>(job);  // always direct
        case DType::bfloat16:
            return conv_with<bfloat16>(job);
        default:
            return conv_with<float16>(job);
    }
}

Result grad_weight_of(DType dtype, const GradWeightJob& job) {
    switch (dtype) {
        case DType::float32:
            return grad_weight<float, float>(job);
        case DType::float64:
            return grad_weight<double, double>(job);
        case DType::bfloat16:
            return grad_weight<bfloat16, float>(job);
        default:
            return grad_weight<float16, float>(job);
    }
}

Result layer_of(DType dtype, const LayerJob& job) {
    return dtype == DType::float64 ? layer<double>(job) : layer<float>(job);
}

}  // namespace

extern const KernelTable MOE_CONCAT(kernels_, MOE_ISA);
const KernelTable MOE_CONCAT(kernels_, MOE_ISA) = {MOE_STRING(MOE_ISA), packed_channels_of,    pack_of, conv_of,
                                                   grad_weight_of,      MOE_FEATURES(MOE_ISA), layer_of};

}  // namespace moe::cpu
