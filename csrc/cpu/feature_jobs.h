// SPDX-License-Identifier: Apache-2.0
// What the kernels of features.h are given.
#pragma once

#include <cstdint>

#include "common/conv2d.h"

namespace moe::cpu {

// One description for all of them; what a kernel does not read is null. Features are [samples, pixels, channels], dense.
// `acc` is float for float and narrower types, double for double.
//
// map:               y = scale * (x - mean) + shift + grad_scale * grad
// moments:           first, second, third = mean, biased variance and number of values of each channel of x
// sums:              first, second = the sums of grad and of grad * (x - mean) over each channel
// dot:               first[v] = <x[v], grad[v]>
// rectify:           y = max(x, 0), first = its means over the pixels
// rectify_backward:  y = grad + pooled_grad / pixels where x, what rectify gave, is not <= 0; 0 elsewhere
struct FeatureJob {
    int64_t samples, pixels, channels;
    int64_t total;                                  // channels of the whole side: of the values below
    Side side;                                      // whose values a sample takes
    const void *x, *grad;                           // features
    const void *scale, *mean, *shift, *grad_scale;  // acc [total]
    const void* pooled_grad;                        // acc [samples, channels]
    void* y;                                        // features
    void *first, *second, *third;                   // acc [total]; of dot [samples], of rectify [samples, channels]
    int threads;
};

enum class FeatureKernel : int { map = 0, moments = 1, sums = 2, dot = 3, rectify = 4, rectify_backward = 5 };

// The function of each instruction set: features_avx2 and its kin.
#define MOE_FEATURES_(isa) features_##isa
#define MOE_FEATURES(isa) MOE_FEATURES_(isa)

}  // namespace moe::cpu
