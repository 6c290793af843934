// SPDX-License-Identifier: Apache-2.0
// What the kernels of features.h are given.
#pragma once

#include <cstdint>

#include "common/conv2d.h"

namespace moe::cpu {

// One description for all of them; what a kernel does not read is null. Features are [samples, pixels, channels], dense.
// `acc` is float for float and narrower types, double for double.
//
// map forward:   y = scale * (x - mean) + shift, and with relu max(that + residual, 0); first = y's means over the
// pixels.
//                Without scale y = max(x, 0)
// map backward (grad or pooled_grad is there):
//                y = scale * (x - mean) + shift + grad_scale * d, d = grad + pooled_grad / pixels; without scale the last
//                alone, without grad_scale d alone. With relu d is 0 where the forward map gave nothing: where
//                grad_scale * (x - mean) + kept_shift <= 0, or without grad_scale where x <= 0
// moments:       first, second, third = mean, biased variance and number of values of each channel of x
// sums:          first, second = the sums of d and of d * (x - mean) over each channel
// dot:           first[v] = <x[v], grad[v]>
struct FeatureJob {
    int64_t samples, pixels, channels;
    int64_t total;                                               // channels of the whole side: of the values below
    Side side;                                                   // whose values a sample takes
    const void *x, *grad, *residual;                             // features
    const void *scale, *mean, *shift, *grad_scale, *kept_shift;  // acc [total]
    const void* pooled_grad;                                     // acc [samples, channels]
    void* y;                                                     // features
    void *first, *second, *third;  // acc [total]; of dot [samples], of map [samples, channels]
    bool relu;
    int threads;
};

enum class FeatureKernel : int { map = 0, moments = 1, sums = 2, dot = 3 };

// The function of each instruction set: features_avx2 and its kin.
#define MOE_FEATURES_(isa) features_##isa
#define MOE_FEATURES(isa) MOE_FEATURES_(isa)

}  // namespace moe::cpu
