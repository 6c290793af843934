// SPDX-License-Identifier: Apache-2.0
// Which tile a forward or input gradient takes, and its entry points.
#include <algorithm>

#include "cuda/convolution.h"

namespace moe::MOE_GPU {

namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kMaxSplits = 32, kLeastSteps = 4;  // a part of a split reduction has at least so many stages
constexpr double kSplitCost = 4.0;               // in stages of a tile: writing the parts and adding them

// Whether the reduction's channels, and those along which the weight is read, lie in aligned runs of 16 bytes.
bool copies(const gpu::ConvolutionCall& call, int element_bytes) {
    const Conv2dShape& s = call.shape;
    const int64_t run = 16 / element_bytes;
    const int64_t* strides = call.weight_strides;
    const auto even = [&](int64_t n) { return n % run == 0; };
    const int64_t depth = (call.backward ? s.K : s.C) / s.groups;
    bool good = even(depth) && even(s.C / s.groups) && strides[1] == 1 && even(strides[0]);
    good = good && (s.R == 1 || even(strides[2])) && (s.S == 1 || even(strides[3])) && even(call.in_alignment);
    for (const void* p : {call.source, call.weight}) good = good && reinterpret_cast<uintptr_t>(p) % 16 == 0;
    return good;
}

}  // namespace

Status choose(const gpu::ConvolutionCall& call, const TileSize* sizes, int count, int element_bytes, int stage_depth,
              ConvolutionChoice& best) {
    const Conv2dShape& s = call.shape;
    const bool backward = call.backward != 0;
    const int64_t multiprocessors = std::max(call.where.multiprocessors, 1);
    ConvolutionChoice c{};
    c.copies = copies(call, element_bytes);
    c.residues = backward ? s.stride_h * s.stride_w : 1;
    c.rows[0] = backward ? divide_up(s.H, s.stride_h) : s.P;
    c.rows[1] = backward ? divide_up(s.W, s.stride_w) : s.Q;
    const int64_t pixels = c.rows[0] * c.rows[1];
    const int64_t width = (backward ? s.C : s.K) / s.groups, depth = (backward ? s.K : s.C) / s.groups;
    // a step of the stride in which taps meet one residue: of the residue with the most taps
    const auto taps = [&](int64_t all, int64_t stride, int64_t dilation) {
        const int64_t step = backward ? stride / std::gcd(stride, dilation) : 1;
        return divide_up(all, step);
    };
    const int64_t most = taps(s.R, s.stride_h, s.dil_h) * taps(s.S, s.stride_w, s.dil_w);
    const int64_t steps = c.copies ? most * divide_up(depth, stage_depth) : divide_up(most * depth, stage_depth);
    double least = -1.0;
    for (int i = 0; i < (c.copies ? count : 1); ++i) {
        const TileSize size = c.copies ? sizes[i] : kGatherSize;
        c.tile = i, c.tile_m = size.m, c.tile_n = size.n;
        c.blocks_n = divide_up(width, size.n);
        c.tiles_per_sample = divide_up(pixels, size.m);
        c.packed = s.V > 1 && pixels < size.m;  // no tile crosses a sample whose pixels fill one
        c.tiles = c.packed ? tile_bound(s.V, pixels, size.m, call.groups) : s.V * c.tiles_per_sample;
        if (pixels == 0) c.tiles = 0;
        // the bound has room for routings in unequal parts
        const int64_t expected = c.packed ? divide_up(s.V * pixels, size.m) + std::min(call.groups, s.V) / 2 : c.tiles;
        const int64_t blocks = std::max<int64_t>(expected * c.blocks_n * s.groups * c.residues, 1);
        c.splits = 1;
        if (blocks < multiprocessors) {
            c.splits = int(std::clamp<int64_t>(std::min(multiprocessors / blocks, steps / kLeastSteps), 1, kMaxSplits));
        }
        const double waves = double(divide_up(blocks * c.splits, multiprocessors));
        const double stages = double(divide_up(steps, c.splits)) + (c.splits > 1 ? kSplitCost : 0.0);
        const double time = waves * stages * size.m * size.n / size.rate;
        if (least < 0.0 || time < least) least = time, best = c;
    }
    if (best.packed && s.V * pixels > kMostInt) return invalid("the batch has 2^31 pixels or more");
    if (best.units(s) > kMostInt) return invalid("more than 2^31 tiles");
    if (std::max(s.C * s.H * s.W, s.K * s.P * s.Q) > kMostInt) return invalid("one sample has 2^31 elements or more");
    return {};
}

namespace {

Status dispatch(const gpu::ConvolutionCall& call, gpu::ConvolutionNeeds* needs) {
    switch (call.dtype) {
        case DType::bfloat16:
            return convolve<device::bfloat16>(call, needs);
        case DType::float16:
            return convolve<device::float16>(call, needs);
        case DType::float32:
            return call.tf32 ? convolve<device::tf32>(call, needs) : convolve<float>(call, needs);
        default:
            return invalid("dtype: expected float32, bfloat16 or float16");
    }
}

}  // namespace

}  // namespace moe::MOE_GPU

using namespace moe;

extern "C" int MOE_ENTRY(convolution_needs)(const gpu::ConvolutionCall* call, gpu::ConvolutionNeeds* needs, char* message,
                                            size_t size) {
    *needs = {};
    return finish(MOE_GPU::dispatch(*call, needs), message, size);
}

// For one stream: the kernels of two may run at once. They are never freed.
extern "C" int MOE_ENTRY(make_counters)(const gpu::Where* where, int64_t count, int32_t** counters, char* message,
                                        size_t size) {
    const MOE_GPU::device::DeviceGuard guard(where->device);
    if (!guard.status.ok()) return finish(guard.status, message, size);
    void* p = nullptr;
    const Status status = MOE_GPU::device::allocate_zeros(&p, size_t(count) * sizeof(int32_t), where->stream);
    *counters = static_cast<int32_t*>(p);
    return finish(status, message, size);
}

extern "C" int MOE_ENTRY(convolution)(const gpu::ConvolutionCall* call, char* message, size_t size) {
    const MOE_GPU::device::DeviceGuard guard(call->where.device);
    if (!guard.status.ok()) return finish(guard.status, message, size);
    return finish(MOE_GPU::dispatch(*call, nullptr), message, size);
}
