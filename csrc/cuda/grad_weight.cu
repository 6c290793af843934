// SPDX-License-Identifier: Apache-2.0
// The weight gradient's second kernel, which adds the segments of every group; and its entry points.
#include <algorithm>

#include "cuda/grad_weight.h"

namespace moe::MOE_GPU {

namespace {

template <class T>
struct ReduceParams {
    Grouping groups;
    Global<const float> partial;  // [parts, K, taps * depth]
    Global<T> grad_weight;        // [R_out, R_in / conv_groups, R, S], any strides
    Divisor total_in, taps_s;
    int segment;
    int rows_of_slice, depth;  // K; input channels of a convolution group
    int columns;               // taps * total_in
    int blocks;                // of one row
    int64_t stride_row, stride_column, stride_r, stride_s;
};

constexpr int kReduceThreads = 256, kColumns = 2;  // of each thread

// A block has columns of one row of the weight. The groups whose slice covers the row are looked for 32 at a time; where
// nobody's does, zeros are written.
template <class T>
MOE_KERNEL(kReduceThreads, 1)
reduce_kernel(const ReduceParams<T> p) {
    device::wait_for_previous();
    device::allow_next();
    const int row = device::block_x() / p.blocks;
    const int first_column = (device::block_x() - row * p.blocks) * kReduceThreads * kColumns + device::thread();
    const Shared<int> first_part = device::shared<int>(0, 32);
    const Shared<int> parts = device::shared<int>(32 * 4, 32);
    const Shared<int> first_row = device::shared<int>(64 * 4, 32);  // of the slice, in the weight
    const Shared<int> first_channel = device::shared<int>(96 * 4, 32);
    const Shared<uint32_t> covering = device::shared<uint32_t>(128 * 4, 1);
    const int lane = device::lane();
    const int taps = p.columns / int(p.total_in.value);
    const int64_t part_size = int64_t(p.rows_of_slice) * taps * p.depth;
    int tap[kColumns], channel[kColumns];
    float sum[kColumns] = {};
    MOE_UNROLL
    for (int i = 0; i < kColumns; ++i) {
        const int column = first_column + i * kReduceThreads;
        tap[i] = p.total_in.quotient(column);
        channel[i] = column - tap[i] * int(p.total_in.value);
    }
    const int rounds = p.groups.plan.given() ? (p.groups.count + 31) / 32 : 1;
    int parts_before = 0;  // in the first warp
    for (int round = 0; round < rounds; ++round) {
        if (device::warp() == 0) {
            // a lane for each group, or, without a plan, for each sample that is the first of its group
            int group = round * 32 + lane, samples = 0, begin = 0;
            if (p.groups.plan.given()) {
                if (group < p.groups.count) samples = p.groups.plan.load(group + 1) - p.groups.plan.load(group);
            } else {
                group = lane < p.groups.samples ? p.groups.of(lane) : p.groups.count;
                bool leader = group < p.groups.count;
                for (int other = 0; other < p.groups.samples; ++other) {
                    if (device::shuffle(group, other) == group) {
                        ++samples;
                        if (other < lane) leader = false;
                    }
                }
                if (!leader) samples = 0;
            }
            const int mine = (samples + p.segment - 1) / p.segment;
            if (p.groups.plan.given()) {
                const int last = inclusive_sum(mine);
                begin = parts_before + last - mine;
                parts_before += device::shuffle(last, 31);
            } else {
                for (int other = 0; other < p.groups.samples; ++other) {
                    const int theirs = device::shuffle(group, other), more = device::shuffle(mine, other);
                    if (theirs < group) begin += more;
                }
            }
            int out_start = 0, in_start = 0;
            if (mine > 0) {
                if (p.groups.out.expert.given()) out_start = int(p.groups.out.start(p.groups.out_expert(group)));
                if (p.groups.in.expert.given()) in_start = int(p.groups.in.start(p.groups.in_expert(group)));
            }
            first_part.store(lane, begin);
            parts.store(lane, mine);
            first_row.store(lane, out_start);
            first_channel.store(lane, in_start);
            const uint32_t mask = device::ballot(mine > 0 && row >= out_start && row < out_start + p.rows_of_slice);
            if (lane == 0) covering.store(0, mask);
        }
        device::sync_threads();
        for (uint32_t mask = covering.load(0); mask != 0; mask &= mask - 1) {
            const int of = device::population((mask & (~mask + 1)) - 1);
            const int count = parts.load(of);
            const int64_t first = first_part.load(of) * part_size + int64_t(row - first_row.load(of)) * taps * p.depth;
            MOE_UNROLL
            for (int i = 0; i < kColumns; ++i) {
                const int c = channel[i] - first_channel.load(of);
                if (tap[i] >= taps || c < 0 || c >= p.depth) continue;
                const int64_t at = first + int64_t(tap[i]) * p.depth + c;
                for (int part = 0; part < count; ++part) sum[i] += p.partial.load(at + part * part_size);
            }
        }
        device::sync_threads();
    }
    MOE_UNROLL
    for (int i = 0; i < kColumns; ++i) {
        if (tap[i] >= taps) continue;
        const int r = p.taps_s.quotient(tap[i]), s = tap[i] - r * int(p.taps_s.value);
        const int64_t at = row * p.stride_row + channel[i] * p.stride_column + r * p.stride_r + s * p.stride_s;
        p.grad_weight.store(at, device::from_float<T>(sum[i]));
    }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kMostWorkspace = int64_t(1) << 26;  // bytes of parts, where segments of one sample would take more
constexpr int64_t kRounds = 2;                        // a device should be full so many times

template <class T>
Status add_parts(const gpu::GradWeightCall& call, const GradWeightChoice& choice) {
    const Conv2dShape& s = call.shape;
    ReduceParams<T> p{};
    p.groups = view(call.slices, s, call.groups, call.pairs, call.plan);
    const int64_t taps = s.R * s.S, depth = s.C / s.groups;
    p.partial =
        device::global<float>(static_cast<const void*>(call.workspace), choice.parts * s.K * taps * depth, "workspace");
    p.grad_weight = device::global<T>(call.grad_weight, call.total_out * call.total_in * taps, "grad_weight");
    p.total_in = Divisor(call.total_in);
    p.taps_s = Divisor(s.S);
    p.segment = int(choice.segment);
    p.rows_of_slice = int(s.K);
    p.depth = int(depth);
    p.columns = int(taps * call.total_in);
    p.blocks = int(divide_up(p.columns, kReduceThreads * kColumns));
    p.stride_row = call.weight_strides[0], p.stride_column = call.weight_strides[1];
    p.stride_r = call.weight_strides[2], p.stride_s = call.weight_strides[3];
    if (call.total_out * p.blocks > kMostInt) return invalid("weight: too many rows");
    const device::Launch how{"grad_weight's sum",    {call.total_out * p.blocks}, kReduceThreads,
                             129 * int(sizeof(int)), call.where.device,           call.where.stream,
                             call.where.overlap != 0};
    return device::launch<reduce_kernel<T>>(how, p);
}

Status run(const gpu::GradWeightCall& call, gpu::GradWeightNeeds* needs) {
    GradWeightChoice choice{};
    Status status;
    const bool only_choose = needs != nullptr;
    switch (call.dtype) {
        case DType::bfloat16:
            status = fill_parts<device::bfloat16>(call, choice, only_choose);
            break;
        case DType::float16:
            status = fill_parts<device::float16>(call, choice, only_choose);
            break;
        case DType::float32:
            status = call.tf32 ? fill_parts<device::tf32>(call, choice, only_choose)
                               : fill_parts<float>(call, choice, only_choose);
            break;
        default:
            return invalid("dtype: expected float32, bfloat16 or float16");
    }
    if (!status.ok()) return status;
    const Conv2dShape& s = call.shape;
    if (needs) {
        needs->workspace = choice.parts * s.K * s.R * s.S * (s.C / s.groups);
        needs->reads_plan = s.V > gpu::few_samples;
        needs->tile_m = choice.tile_m, needs->tile_n = choice.tile_n, needs->copies = choice.copies;
        needs->segment = choice.segment, needs->parts = choice.parts;
        return status;
    }
    if (call.total_out * call.total_in * s.R * s.S == 0) return status;
    switch (call.dtype) {
        case DType::bfloat16:
            return add_parts<device::bfloat16>(call, choice);
        case DType::float16:
            return add_parts<device::float16>(call, choice);
        default:
            return add_parts<float>(call, choice);
    }
}

}  // namespace

Status choose(const gpu::GradWeightCall& call, const TileSize* sizes, int count, int element_bytes,
              GradWeightChoice& best) {
    const Conv2dShape& s = call.shape;
    const int64_t multiprocessors = std::max(call.where.multiprocessors, 1);
    const int64_t width = s.K / s.groups, depth = s.C / s.groups, columns = s.R * s.S * depth;
    const int64_t run = 16 / element_bytes;
    if (!call.plan && s.V > gpu::few_samples && call.workspace)
        return invalid("plan: expected for more than %d samples, got null", int(gpu::few_samples));
    if (s.V > 0 && s.P * s.Q == 0) return invalid("grad: expected pixels, got none");
    if (s.K * columns > kMostInt) return invalid("weight: one slice has 2^31 elements or more");
    if (std::max(s.C * s.H * s.W, s.K * s.P * s.Q) > kMostInt) return invalid("one sample has 2^31 elements or more");
    GradWeightChoice c{};
    c.copies = width % run == 0 && depth % run == 0;
    for (const void* p : {call.grad, call.input}) c.copies = c.copies && reinterpret_cast<uintptr_t>(p) % 16 == 0;
    double least = -1.0;
    for (int i = 0; i < (c.copies ? count : 1); ++i) {
        const TileSize size = c.copies ? sizes[i] : kGatherSize;
        c.tile = i, c.tile_m = size.m, c.tile_n = size.n;
        c.blocks_m = divide_up(width, size.m);
        c.blocks_n = divide_up(columns, size.n);
        const int64_t tiles = c.blocks_m * c.blocks_n * s.groups;
        const int64_t most = kMostWorkspace / int64_t(sizeof(float)) / std::max<int64_t>(s.K * columns, 1);
        const int64_t wanted = std::clamp<int64_t>(std::min(divide_up(kRounds * multiprocessors, tiles), most), 1,
                                                   std::max<int64_t>(s.V, 1));
        c.segment = std::max<int64_t>(divide_up(s.V, wanted), 1);
        c.parts = tile_bound(s.V, 1, c.segment, call.groups);
        if (c.segment * s.P * s.Q > kMostInt) return invalid("one segment has 2^31 pixels or more");
        const double blocks = double(divide_up(s.V, c.segment) * tiles);
        const double waves = std::max(blocks / double(multiprocessors), 1.0);
        const double time = waves * double(c.segment) * size.m * size.n / size.rate;
        if (least < 0.0 || time < least) least = time, best = c;
    }
    if (best.parts * best.blocks_m * best.blocks_n * s.groups > kMostInt) return invalid("more than 2^31 tiles");
    return {};
}

}  // namespace moe::MOE_GPU

using namespace moe;

extern "C" int MOE_ENTRY(grad_weight_needs)(const gpu::GradWeightCall* call, gpu::GradWeightNeeds* needs, char* message,
                                            size_t size) {
    *needs = {};
    return finish(MOE_GPU::run(*call, needs), message, size);
}

extern "C" int MOE_ENTRY(grad_weight)(const gpu::GradWeightCall* call, char* message, size_t size) {
    const MOE_GPU::device::DeviceGuard guard(call->where.device);
    if (!guard.status.ok()) return finish(guard.status, message, size);
    return finish(MOE_GPU::run(*call, nullptr), message, size);
}
