// SPDX-License-Identifier: Apache-2.0
// The entry points of the CUDA kernels, built once for the device (moe_cuda_*) and once for the simulator
// (moe_cuda_sim_*): plain structs in; a status code and a message out, never an exception. Pointers are the device's
// unless said otherwise. Arguments have been checked by the caller; what the kernels themselves rely on is checked again.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/conv2d.h"

namespace moe::gpu {

// Where a call runs. What the device can do is handed in, so that a call asks the driver nothing.
struct Where {
    int device;
    int multiprocessors;
    int overlap;   // programmatic dependent launch may be used
    void* stream;  // cudaStream_t
};

// Values of which each has one for a channel or a sample, in a type of their own; data null: absent.
struct Values {
    const void* data;
    int64_t count;
    DType dtype;
};

// offsets [G + 2] and order [V], int32: the samples in the order of their groups; group G holds the invalid ones.
struct PlanCall {
    Where where;
    int64_t samples, num_out, num_in;  // num_in 0: the input side follows the output side's choice
    const int64_t* out_expert;         // [V] or null
    const int64_t* in_expert;          // [V] or null
    int32_t* plan;
};

// The forward, and the input gradient: source is dy then, target dx of each virtual sample.
struct ConvolutionCall {
    Where where;
    DType dtype;
    int tf32;  // float32 may be rounded to tf32 for the matrix unit
    int backward;
    Conv2dShape shape;
    Slices slices;                // starts: the device's
    int64_t total_out, total_in;  // rows and columns of the weight
    int64_t weight_strides[4];
    int64_t in_alignment;  // a number that divides every first channel of the input side's slices
    const void* source;
    const void* weight;
    void* target;
    int64_t groups;       // what share a slice on both sides
    int pairs;            // they are pairs of experts, not one choice for both sides
    const int32_t* plan;  // or null, where convolution_needs says that none is read
    Values bias, gate, scale, shift;
    const void* residual;  // as target, or null
    int affine_per_slice, relu;
    const void* image;  // backward: the forward's input, for the gate's gradient; or null
    float* dots;        // [V, dots_columns(), H * W], with image
    float* workspace;   // as many floats as convolution_needs says
    int32_t* counters;  // as many as convolution_needs says, zero (make_counters); left zero
};

struct ConvolutionNeeds {
    int64_t workspace, counters;  // floats, integers
    int64_t dots_columns;
    int reads_plan;
    // what is started: its tile, by asynchronous copies or not, of several samples or not, in how many parts
    int tile_m, tile_n, copies, packed, splits;
};

struct GradWeightCall {
    Where where;
    DType dtype;
    int tf32;
    Conv2dShape shape;
    Slices slices;
    int64_t total_out, total_in;
    int64_t weight_strides[4];  // of grad_weight
    const void* grad;
    const void* input;
    void* grad_weight;
    int64_t groups;
    int pairs;
    const int32_t* plan;  // or null, where grad_weight_needs says that none is read
    float* workspace;
};

struct GradWeightNeeds {
    int64_t workspace;
    int reads_plan;
    int tile_m, tile_n, copies;
    int64_t segment, parts;  // samples of a part; how many there are at most
};

// Channel means, layer normalisation, linear, argmax (the lowest of equals), softmax probability of the chosen expert.
struct RouterCall {
    Where where;
    DType dtype;
    int64_t samples, channels, pixels, num_experts;
    const void* input;              // [B, H, W, C]
    Values norm_weight, norm_bias;  // [C], or absent
    int normalize;                  // 0: no layer normalisation
    float epsilon;
    Values weight;    // [N, C]
    Values bias;      // [N], or absent
    int64_t* expert;  // [B]; num_experts where a score is NaN
    void* scores;     // [B, N], in dtype; or null
    float* gate;      // [B], or null
};

constexpr int64_t few_samples = 32;    // a kernel orders so many by itself, without a plan
constexpr int64_t most_groups = 8191;  // of a plan: a counter for each lies in shared memory

}  // namespace moe::gpu

#define MOE_DECLARE_ENTRIES(prefix)                                                                            \
    extern "C" {                                                                                               \
    /* whether the module has code for the device */                                                           \
    int prefix##_check_device(const moe::gpu::Where* where, char* message, size_t size);                       \
    int prefix##_plan(const moe::gpu::PlanCall* call, char* message, size_t size);                             \
    int prefix##_make_counters(const moe::gpu::Where* where, int64_t count, int32_t** counters, char* message, \
                               size_t size);                                                                   \
    int prefix##_convolution_needs(const moe::gpu::ConvolutionCall* call, moe::gpu::ConvolutionNeeds* needs,   \
                                   char* message, size_t size);                                                \
    int prefix##_convolution(const moe::gpu::ConvolutionCall* call, char* message, size_t size);               \
    int prefix##_grad_weight_needs(const moe::gpu::GradWeightCall* call, moe::gpu::GradWeightNeeds* needs,     \
                                   char* message, size_t size);                                                \
    int prefix##_grad_weight(const moe::gpu::GradWeightCall* call, char* message, size_t size);                \
    int prefix##_router(const moe::gpu::RouterCall* call, char* message, size_t size);                         \
    }

MOE_DECLARE_ENTRIES(moe_cuda)
MOE_DECLARE_ENTRIES(moe_cuda_sim)
