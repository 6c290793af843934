// SPDX-License-Identifier: Apache-2.0
// Plain structs that describe one routed convolution; shared by every native backend. Letters: V virtual samples
// (input sample v / k), C x H x W what comes in, K x P x Q what goes out (widths of one slice), R x S the kernel.
#pragma once

#include <cstdint>

namespace moe {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

struct Conv2dShape {
    int64_t V, k;
    int64_t C, H, W;
    int64_t K, P, Q;
    int64_t R, S;
    int64_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
    int64_t groups;
};

// Where one side's slices lie. A whole side has expert == nullptr and count == 0.
struct Side {
    const int64_t* expert;  // [V], or null: the side is whole
    int64_t count;          // number of slices
    const int64_t* starts;  // [count] first channels, or null: a partition, start = index * width
};

struct Slices {
    Side out, in;
};

// What follows the convolution, in this order: bias, gate, scale and shift, residual, ReLU. Null pointers are absent.
struct Epilogue {
    const void* bias = nullptr;      // [R_out], accumulation type, indexed by the slice
    const void* gate = nullptr;      // [V], accumulation type
    const void* scale = nullptr;     // [R_out] if affine_per_slice, else [K], accumulation type
    const void* shift = nullptr;     // as scale
    const void* residual = nullptr;  // as the output
    bool affine_per_slice = false;
    bool relu = false;
};

}  // namespace moe
