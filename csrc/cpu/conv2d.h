// SPDX-License-Identifier: Apache-2.0
// The CPU backend's entry points. Each returns an empty string, or what was wrong with the arguments; memory that cannot
// be had is std::bad_alloc. All activations are dense channels_last; weights have any strides.
#pragma once

#include <string>

#include "common/conv2d.h"

namespace moe::cpu {

enum class Direction : int { forward = 0, grad_input = 1 };

struct Call {
    DType dtype;
    int threads;
    Conv2dShape shape;
    Slices slices;
    int64_t weight_strides[4];  // elements
};

std::string check(const Call& call);

int64_t pack_numel(Direction direction, const Call& call);
std::string pack(Direction direction, const Call& call, const void* weight, void* packed);

// packed may be null: the weights of the experts in use are then packed for this call.
std::string conv2d_forward(const Call& call, const void* x, const void* weight, const void* packed, void* y,
                           const Epilogue& epilogue);
std::string conv2d_grad_input(const Call& call, const void* grad, const void* weight, const void* packed,
                              void* grad_input);
std::string conv2d_grad_weight(const Call& call, int64_t total_out, int64_t total_in, const void* grad, const void* x,
                               void* grad_weight);

}  // namespace moe::cpu
