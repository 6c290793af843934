// SPDX-License-Identifier: Apache-2.0
// What the vectorised kernels are given. Baseline code (conv2d.cpp) prepares these plain structs; kernels.cpp, compiled
// once for each instruction set, carries them out.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/conv2d.h"
#include "common/plan.h"
#include "cpu/feature_jobs.h"

namespace moe::cpu {

// Reduced channels are held in blocks of this many, so that a pixel's neighbour lies at a constant distance.
constexpr int64_t kBlock = 16;

// A correlation over a regular grid of destination pixels. A forward convolution is one pass; an input gradient is one
// pass for each parity of the stride, with the taps that reach that parity: no zero is ever inserted.
//   dst[oo + os * p] += sum over taps t of src[org + is * p + tap[t]]
struct Pass {
    int64_t rows, cols;              // destination pixels of this pass
    int64_t is_h, is_w;              // source step
    int64_t org_h, org_w;            // source position of pixel 0 at tap offset 0 (negative: padding)
    int64_t span_h, span_w;          // 1 + the largest tap offset
    int64_t os_h, os_w, oo_h, oo_w;  // destination step and offset
    int64_t taps;
    const int64_t* tap_h;       // [taps], >= 0
    const int64_t* tap_w;       // [taps], >= 0
    const int64_t* tap_weight;  // [taps], r * S + s
    int64_t taps_before;        // taps of the passes before this one: where its packed weights begin
};

// How a correlation is computed, and with it the form of its packed weights.
enum class Algorithm : int { direct = 0, winograd = 1 };

// Products of a channel that Winograd's F(2x2, 3x3) takes for a tile of 2x2 pixels.
constexpr int64_t kWinogradPositions = 16;

struct PackJob {
    Algorithm algorithm;
    const void* weight;
    int64_t out_stride, red_stride, r_stride, s_stride;  // elements
    int64_t slice_out_stride, slice_in_stride;           // what a slice's starts are multiplied by
    int64_t group_stride;                                // from one convolution group to the next
    int64_t S;
    int64_t out, red;  // output and reduced channels of one convolution group
    int64_t conv_groups;
    const Pass* passes;
    int64_t pass_count;
    const Group* groups;  // the pairs to pack
    int64_t group_count;
    bool dense_index;  // true: the i-th group goes to place i; false: to place group.pair
    void* packed;
    int threads;
};

// What a layer does to each number before it reads it: relu(scale * x + shift), by channel. A normalisation and ReLU that
// several layers read are not written out.
struct Prologue {
    const void* scale = nullptr;      // [rows, channels], accumulation type; null: 1
    const void* shift = nullptr;      // as scale; null: 0
    const int64_t* expert = nullptr;  // each sample's row; null: row 0
    int64_t channels = 0;             // of a row
    bool relu = false;

    bool empty() const { return scale == nullptr && shift == nullptr && !relu; }
};

struct ConvJob {
    Algorithm algorithm;
    const void* src;  // [., src_h, src_w, src_c], channels last; src_c and dst_c count what lies between two pixels
    int64_t src_h, src_w, src_c;
    int64_t src_div;  // virtual sample v reads sample v / src_div
    void* dst;        // [V, dst_h, dst_w, dst_c]
    int64_t dst_h, dst_w, dst_c;
    int64_t residual_c;  // as dst_c, of the epilogue's residual
    int64_t out, red;
    int64_t conv_groups;
    const Pass* passes;
    int64_t pass_count;
    const Group* groups;
    int64_t group_count;
    const int64_t* order;
    const void* packed;
    bool dense_index;
    const PackJob* fresh;  // not null: each task packs its own panels of these weights, instead of `packed`
    Prologue prologue;
    Epilogue epilogue;
    int threads;
};

// Pixels of samples as a program's small layers read and write them; sample s lies height * width * pixel_stride behind
// sample s - 1. A vector is an image of one pixel.
struct View {
    void* data;
    int64_t height, width, channels, pixel_stride;
};

// The layers of a program (program.h) that are no convolutions. Of float32 and float64 only.
enum class LayerOp : int {
    mean = 0,    // over the pixels
    group_norm,  // layer_norm is one group of one pixel
    linear,      // of a vector
    argmax,      // of a vector, into index; the lowest of equals
    softmax,
    gather,      // one number of a vector, by index
    copy,        // every step-th pixel, into channels at_channel ... of dst; others are set to 0
    add,         // src + other
    scale_rows,  // src * other, one number for each sample
    max_pool,
    average_pool,
    flatten,  // an image into a vector in the order [C, H, W]
};

struct LayerJob {
    LayerOp op;
    int64_t samples;
    View src, other, dst;
    Prologue prologue;                                             // of src
    const void* weight;                                            // linear: [outputs, channels]; norms: [channels]
    const void* bias;                                              // as many as outputs or channels
    int64_t* index;                                                // argmax writes, gather reads
    int64_t groups;                                                // of group_norm
    double eps;                                                    // of the norms
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;  // of pools; copy: the stride is the step
    bool count_padding;  // average_pool divides by the kernel's size at the border too
    int64_t at_channel;  // of copy
    int threads;
};

struct GradWeightJob {
    const void* grad;   // [V, P, Q, K_all]
    const void* input;  // [V / k, H, W, C_all]
    void* grad_weight;  // [total_out, total_in, R, S] by strides
    int64_t strides[4];
    Conv2dShape shape;
    int64_t total_out, total_in;
    bool overlapping;  // slices may share weights, or leave some uncovered: sum in a second pass
    const Group* groups;
    int64_t group_count;
    const int64_t* order;
    Pass pass;  // the forward's
    int threads;
};

enum class Result { ok, out_of_memory, not_a_number };

struct KernelTable {
    const char* isa;
    int64_t (*packed_channels)(DType, int64_t out);  // output channels rounded up to whole panels
    Result (*pack)(DType, const PackJob&);
    Result (*conv)(DType, const ConvJob&);
    Result (*grad_weight)(DType, const GradWeightJob&);
    Result (*features)(DType, FeatureKernel, const FeatureJob&);
    Result (*layer)(DType, const LayerJob&);
};

// Memory that a thread keeps from call to call, 64-byte aligned; null when there is none. Contents are not kept.
enum class Scratch { worker = 0, packed = 1, partial = 2, places = 3 };
void* scratch(Scratch which, size_t bytes);

}  // namespace moe::cpu
