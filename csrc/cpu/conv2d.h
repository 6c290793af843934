// SPDX-License-Identifier: Apache-2.0
// The CPU backend's entry points. Each returns an empty string, or what was wrong with the arguments; memory that cannot
// be had is std::bad_alloc. All activations are dense channels_last; weights have any strides. Outputs overlap nothing.
#pragma once

#include <string>

#include "common/conv2d.h"
#include "cpu/jobs.h"

namespace moe::cpu {

enum class Direction : int { forward = 0, grad_input = 1 };

// A weight [total_out, total_in, R, S] of all slices; strides in elements. Gradients of weights are dense: strides[0] is
// total_in * R * S.
struct WeightLayout {
    int64_t total_out, total_in;
    int64_t strides[4];
};

struct Call {
    DType dtype;
    int threads;
    Conv2dShape shape;
    Slices slices;
    WeightLayout weight;
};

// Weights that pack made for images of the call's size; null data: those of the experts in use are packed for this call.
struct Packed {
    const void* data;
    int64_t numel;
};

// What is wrong with a call's sizes and slices, or an empty string; its weight's layout and the samples' experts are
// looked at when they are used. What passes can be computed without any number overflowing.
std::string check(const Call& call);

// How a call is computed; weights packed for one algorithm serve images of all sizes that it is chosen for.
Algorithm algorithm(Direction direction, const Call& call);
int64_t pack_numel(Direction direction, const Call& call);
std::string pack(Direction direction, const Call& call, const void* weight, void* packed);

std::string conv2d_forward(const Call& call, const void* x, const void* weight, Packed packed, void* y,
                           const Epilogue& epilogue);
std::string conv2d_grad_input(const Call& call, const void* grad, const void* weight, Packed packed, void* grad_input);
std::string conv2d_grad_weight(const Call& call, const void* grad, const void* x, void* grad_weight);

}  // namespace moe::cpu
