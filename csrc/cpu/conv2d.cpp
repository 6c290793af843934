// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d.h"

#include <cstdint>
#include <new>
#include <string>
#include <vector>

#include "common/plan.h"
#include "cpu/checks.h"
#include "cpu/dispatch.h"
#include "cpu/passes.h"

namespace moe::cpu {

Passes forward_passes(const Conv2dShape& s) {
    std::vector<int64_t> h, w, r, c;
    for (int64_t i = 0; i < s.R; ++i) h.push_back(i * s.dil_h), r.push_back(i);
    for (int64_t i = 0; i < s.S; ++i) w.push_back(i * s.dil_w), c.push_back(i);
    Pass pass{};
    pass.rows = s.P, pass.cols = s.Q;
    pass.is_h = s.stride_h, pass.is_w = s.stride_w;
    pass.org_h = -s.pad_h, pass.org_w = -s.pad_w;
    pass.span_h = (s.R - 1) * s.dil_h + 1, pass.span_w = (s.S - 1) * s.dil_w + 1;
    pass.os_h = pass.os_w = 1;
    Passes passes;
    passes.add(pass, h, w, r, c, s.S);
    return passes;
}

Algorithm choose_algorithm(DType dtype, int64_t red, const Passes& passes) {
    const Pass& pass = passes.list[0];
    const bool possible = dtype != DType::float64 && passes.list.size() == 1 && pass.taps == 9 && pass.span_h == 3 &&
                          pass.span_w == 3 && pass.is_h == 1 && pass.is_w == 1 && red % kBlock == 0;
    if (!possible || !winograd_allowed()) return Algorithm::direct;
    // A sample's 16 transformed weights are read from memory for few pixels: below 64 that takes longer than it saves
    // where experts' batches are small (N = 16 took 1.3 times as long as N = 2 with 4x4 pixels included).
    if (pass.rows * pass.cols < 64) return Algorithm::direct;
    // products of a channel, those with padding left out as far as a row and a column on each side
    const int64_t direct = (3 * pass.rows - 2) * (3 * pass.cols - 2);
    const int64_t winograd = kWinogradPositions * ((pass.rows + 1) / 2) * ((pass.cols + 1) / 2);
    return 3 * direct >= 4 * winograd ? Algorithm::winograd : Algorithm::direct;
}

namespace {

constexpr int64_t kMaxTaps = 1 << 20;  // lists of taps and passes are short
constexpr int64_t kMaxPanel = 64;      // output channels that panels are padded to, at most

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dil) {
    const int64_t room = size + 2 * pad - dil * (kernel - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
}

int64_t weight_numel(const Call& call) {
    const WeightLayout& w = call.weight;
    const int64_t last[] = {w.total_out - 1, w.total_in - 1, call.shape.R - 1, call.shape.S - 1};
    int64_t numel = 1;
    for (int i = 0; i < 4; ++i) numel += last[i] * w.strides[i];
    return numel;
}

// A call whose weight is read, or written.
std::string check_with_weight(const Call& call) {
    std::string error = check(call);
    const Conv2dShape& s = call.shape;
    const WeightLayout& w = call.weight;
    if (error.empty()) error = check_side(call.slices.out, s.K, w.total_out, "out_slices");
    if (error.empty()) error = check_side(call.slices.in, s.C / s.groups, w.total_in, "in_slices");
    if (error.empty() && (!addressable({w.total_out}) || !addressable({w.total_in})))
        error = "weight: channels of more than 2^60 bytes";
    if (!error.empty()) return error;
    int64_t furthest = 0, way;
    const int64_t sizes[] = {w.total_out, w.total_in, s.R, s.S};
    for (int i = 0; i < 4; ++i) {
        if (w.strides[i] < 0) return "weight: strides must not be negative";
        if (__builtin_mul_overflow(sizes[i] - 1, w.strides[i], &way) || way > kMaxBytes ||
            (furthest += way) > kMaxBytes / 8)
            return "weight: more than 2^60 bytes";
    }
    return {};
}

// The taps that reach input positions of one residue: position a + stride * i takes gradient i + (a + pad - r * dil) /
// stride.
struct Residue {
    int64_t count = 0, origin = 0, span = 1;
    std::vector<int64_t> offset, index;
};

Residue residue(int64_t a, int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dil) {
    Residue result;
    result.count = a < size ? (size - a + stride - 1) / stride : 0;
    for (int64_t r = 0; r < kernel; ++r) {
        const int64_t distance = a + pad - r * dil;
        if (distance % stride == 0) result.offset.push_back(distance / stride), result.index.push_back(r);
    }
    if (result.offset.empty()) return result;
    int64_t low = result.offset[0], high = low;
    for (int64_t o : result.offset) low = o < low ? o : low, high = o > high ? o : high;
    for (int64_t& o : result.offset) o -= low;
    result.origin = low;
    result.span = high - low + 1;
    return result;
}

Passes grad_input_passes(const Conv2dShape& s) {
    Passes passes;
    for (int64_t a = 0; a < s.stride_h; ++a) {
        const Residue h = residue(a, s.H, s.R, s.stride_h, s.pad_h, s.dil_h);
        for (int64_t b = 0; b < s.stride_w; ++b) {
            const Residue w = residue(b, s.W, s.S, s.stride_w, s.pad_w, s.dil_w);
            Pass pass{};
            pass.rows = h.count, pass.cols = w.count;
            pass.is_h = pass.is_w = 1;
            pass.org_h = h.origin, pass.org_w = w.origin;
            pass.span_h = h.span, pass.span_w = w.span;
            pass.os_h = s.stride_h, pass.os_w = s.stride_w;
            pass.oo_h = a, pass.oo_w = b;
            passes.add(pass, h.offset, w.offset, h.index, w.index, s.S);
        }
    }
    return passes;
}

Passes passes_of(Direction direction, const Conv2dShape& s) {
    return direction == Direction::forward ? forward_passes(s) : grad_input_passes(s);
}

PackJob pack_job(Direction direction, const Call& call, const Passes& passes, const std::vector<Group>& groups,
                 const void* weight, void* packed, bool dense_index) {
    const Conv2dShape& s = call.shape;
    const bool forward = direction == Direction::forward;
    PackJob job{};
    job.algorithm = choose_algorithm(call.dtype, (forward ? s.C : s.K) / s.groups, passes);
    job.weight = weight;
    job.out_stride = call.weight.strides[forward ? 0 : 1];
    job.red_stride = call.weight.strides[forward ? 1 : 0];
    job.r_stride = call.weight.strides[2];
    job.s_stride = call.weight.strides[3];
    job.slice_out_stride = call.weight.strides[0];
    job.slice_in_stride = call.weight.strides[1];
    job.group_stride = s.K / s.groups * call.weight.strides[0];
    job.S = s.S;
    job.out = (forward ? s.K : s.C) / s.groups;
    job.red = (forward ? s.C : s.K) / s.groups;
    job.conv_groups = s.groups;
    job.passes = passes.list.data();
    job.pass_count = int64_t(passes.list.size());
    job.groups = groups.data();
    job.group_count = int64_t(groups.size());
    job.dense_index = dense_index;
    job.packed = packed;
    job.threads = call.threads;
    return job;
}

int64_t packed_numel_of_pair(Direction direction, const Call& call) {
    const Conv2dShape& s = call.shape;
    const bool forward = direction == Direction::forward;
    const int64_t out = (forward ? s.K : s.C) / s.groups, red = (forward ? s.C : s.K) / s.groups;
    const Passes passes = passes_of(direction, s);
    const int64_t taps = choose_algorithm(call.dtype, red, passes) == Algorithm::winograd
                             ? kWinogradPositions
                             : passes.list.back().taps_before + passes.list.back().taps;
    return s.groups * kernels().packed_channels(call.dtype, out) * red * taps;
}

// Whether each task should pack the panels that it uses: few images under heavy weights, where packing all of them first
// would write and read them once more through the outer caches, and enough panels for all threads.
bool packs_by_task(Direction direction, const Call& call, const Plan& plan) {
    const Conv2dShape& s = call.shape;
    const bool forward = direction == Direction::forward;
    const int64_t out = (forward ? s.K : s.C) / s.groups;
    const int64_t panels = kernels().packed_channels(call.dtype, out) / kernels().packed_channels(call.dtype, 1);
    int64_t most = 0;
    for (const Group& g : plan.groups) most = g.end - g.begin > most ? g.end - g.begin : most;
    const int64_t image = forward ? s.C * s.H * s.W : s.K * s.P * s.Q;
    const bool light = most * image * panels <= 2 * packed_numel_of_pair(direction, call);
    const int64_t tasks = int64_t(plan.groups.size()) * s.groups * panels;
    return light && (call.threads == 1 || tasks >= 2 * call.threads);
}

void require(Result result) {
    if (result == Result::out_of_memory) throw std::bad_alloc();
}

struct Operand {
    const char* name;
    const void* data;
    int64_t numel;
};

std::string check_operands(std::initializer_list<Operand> operands) {
    for (const Operand& operand : operands) {
        if (operand.data == nullptr && operand.numel > 0) return std::string(operand.name) + ": missing";
    }
    return {};
}

// What is read and written is there, and so are the samples' experts, which weights are packed without.
std::string check_present(const Call& call, std::initializer_list<Operand> operands) {
    for (const Side& side : {call.slices.out, call.slices.in}) {
        if (side.count > 0 && side.expert == nullptr && call.shape.V > 0) return "slices: without samples' experts";
    }
    return check_operands(operands);
}

// The result lies over nothing that it is computed from, the call's indices included.
std::string check_result(const Call& call, Span result, std::initializer_list<Span> inputs) {
    std::string error = check_apart(result, inputs);
    for (const Side& side : {call.slices.out, call.slices.in}) {
        if (error.empty())
            error = check_apart(result, {{side.expert, call.shape.V * int64_t(sizeof(int64_t))},
                                         {side.starts, side.count * int64_t(sizeof(int64_t))}});
    }
    return error;
}

std::string run(Direction direction, const Call& call, const void* src, const void* weight, Packed given, void* dst,
                const Epilogue& epilogue) {
    std::string error = check_with_weight(call);
    if (!error.empty()) return error;
    if (given.data != nullptr && given.numel != pack_numel(direction, call))
        return "packed: " + std::to_string(given.numel) + " numbers, expected " +
               std::to_string(pack_numel(direction, call)) + " for these slices and images of this size";
    const Conv2dShape& s = call.shape;
    const bool forward = direction == Direction::forward;
    const int64_t images = s.V / (forward ? s.k : 1) * s.H * s.W * s.C, features = s.V * s.P * s.Q * s.K;
    error = check_present(call, {{forward ? "input" : "grad", src, forward ? images : features},
                                 {"weight", given.data == nullptr ? weight : given.data, s.V},
                                 {forward ? "output" : "grad_input", dst, forward ? features : images}});
    if (!error.empty()) return error;
    const int64_t size = size_of(call.dtype), wide = acc_size(call.dtype);
    const int64_t rows = epilogue.affine_per_slice ? call.weight.total_out : s.K;
    error = check_result(call, {dst, (forward ? features : images) * size},
                         {{src, (forward ? images : features) * size},
                          {given.data == nullptr ? weight : nullptr, weight_numel(call) * size},
                          {given.data, given.numel * wide},
                          {epilogue.bias, call.weight.total_out * wide},
                          {epilogue.gate, s.V * wide},
                          {epilogue.scale, rows * wide},
                          {epilogue.shift, rows * wide},
                          {epilogue.residual, features * size}});
    if (!error.empty()) return error;
    Plan plan;
    error = make_plan(call.shape, call.slices, plan);
    if (!error.empty() || s.V == 0) return error;

    const Passes passes = passes_of(direction, s);
    const void* packed = given.data;
    const bool own = packed == nullptr;
    const PackJob fresh = pack_job(direction, call, passes, plan.groups, weight, nullptr, true);
    const bool by_task = own && packs_by_task(direction, call, plan);
    if (own && !by_task) {
        const int64_t numel = int64_t(plan.groups.size()) * packed_numel_of_pair(direction, call);
        void* memory = scratch(Scratch::packed, size_t(numel * acc_size(call.dtype)));
        if (memory == nullptr) throw std::bad_alloc();
        require(kernels().pack(call.dtype, pack_job(direction, call, passes, plan.groups, weight, memory, true)));
        packed = memory;
    }
    ConvJob job{};
    job.algorithm = fresh.algorithm;
    job.src = src;
    job.src_h = forward ? s.H : s.P, job.src_w = forward ? s.W : s.Q, job.src_c = forward ? s.C : s.K;
    job.src_div = forward ? s.k : 1;
    job.dst = dst;
    job.dst_h = forward ? s.P : s.H, job.dst_w = forward ? s.Q : s.W, job.dst_c = forward ? s.K : s.C;
    job.residual_c = job.dst_c;
    job.out = job.dst_c / s.groups;
    job.red = job.src_c / s.groups;
    job.conv_groups = s.groups;
    job.passes = passes.list.data();
    job.pass_count = int64_t(passes.list.size());
    job.groups = plan.groups.data();
    job.group_count = int64_t(plan.groups.size());
    job.order = plan.order.data();
    job.packed = packed;
    job.dense_index = own;
    job.fresh = by_task ? &fresh : nullptr;
    job.epilogue = epilogue;
    job.threads = call.threads;
    require(kernels().conv(call.dtype, job));
    return {};
}

}  // namespace

std::string check(const Call& call) {
    const Conv2dShape& s = call.shape;
    if (s.k < 1 || s.V % s.k != 0) return "shape: V must be a multiple of k >= 1";
    if (s.V < 0 || s.H < 0 || s.W < 0 || s.P < 0 || s.Q < 0) return "shape: sizes must not be negative";
    if (s.C < 1 || s.K < 1 || s.R < 1 || s.S < 1) return "shape: channels and kernel must be at least 1";
    if (s.stride_h < 1 || s.stride_w < 1 || s.dil_h < 1 || s.dil_w < 1)
        return "shape: stride and dilation must be at least 1";
    if (s.pad_h < 0 || s.pad_w < 0) return "shape: padding must not be negative";
    if (s.groups < 1 || s.C % s.groups != 0 || s.K % s.groups != 0) return "shape: groups must divide C and K";
    for (int64_t size : {s.H, s.W, s.R, s.S, s.stride_h, s.stride_w, s.pad_h, s.pad_w, s.dil_h, s.dil_w}) {
        if (size > kMaxSize) return "shape: " + std::to_string(size) + " is more than 2^31";
    }
    if (s.R * s.S > kMaxTaps || s.stride_h * s.stride_w > kMaxTaps)
        return "shape: a kernel, or a stride, of more than 2^20 pixels";
    if (s.P != output_size(s.H, s.R, s.stride_h, s.pad_h, s.dil_h) ||
        s.Q != output_size(s.W, s.S, s.stride_w, s.pad_w, s.dil_w))
        return "shape: P x Q is not the output's size";
    const Slices& slices = call.slices;
    for (const Side& side : {slices.out, slices.in}) {
        if (side.count < 0 || (side.count == 0 && (side.expert != nullptr || side.starts != nullptr)))
            return "slices: none, with experts or starts";
    }
    if (s.groups > 1 && (slices.in.count > 0 || slices.out.starts != nullptr))
        return "slices: groups need a whole input side and a partition of the output";
    // panels are padded, and Winograd's transform has more numbers than a kernel
    const int64_t taps = s.R * s.S + kWinogradPositions, pairs_of[] = {slices.out.count, slices.in.count};
    if (!addressable({s.V, s.H, s.W, s.C}) || !addressable({s.V, s.P, s.Q, s.K}) ||
        !addressable({pairs_of[0], pairs_of[1], s.C, s.K, kMaxPanel, taps}))
        return "shape: images, features or weights of more than 2^60 bytes";
    return check_threads(call.threads);
}

Algorithm algorithm(Direction direction, const Call& call) {
    const Conv2dShape& s = call.shape;
    const int64_t red = (direction == Direction::forward ? s.C : s.K) / s.groups;
    return choose_algorithm(call.dtype, red, passes_of(direction, s));
}

int64_t pack_numel(Direction direction, const Call& call) {
    return pair_count(call.slices) * packed_numel_of_pair(direction, call);
}

std::string pack(Direction direction, const Call& call, const void* weight, void* packed) {
    std::string error = check_with_weight(call);
    if (error.empty()) error = check_operands({{"weight", weight, 1}, {"packed", packed, 1}});
    if (error.empty())
        error = check_result(call, {packed, pack_numel(direction, call) * acc_size(call.dtype)},
                             {{weight, weight_numel(call) * size_of(call.dtype)}});
    if (!error.empty()) return error;
    const Passes passes = passes_of(direction, call.shape);
    const std::vector<Group> pairs = all_pairs(call.shape, call.slices);
    require(kernels().pack(call.dtype, pack_job(direction, call, passes, pairs, weight, packed, false)));
    return {};
}

std::string conv2d_forward(const Call& call, const void* x, const void* weight, Packed packed, void* y,
                           const Epilogue& epilogue) {
    return run(Direction::forward, call, x, weight, packed, y, epilogue);
}

std::string conv2d_grad_input(const Call& call, const void* grad, const void* weight, Packed packed, void* grad_input) {
    return run(Direction::grad_input, call, grad, weight, packed, grad_input, Epilogue{});
}

std::string conv2d_grad_weight(const Call& call, const void* grad, const void* x, void* grad_weight) {
    std::string error = check_with_weight(call);
    if (!error.empty()) return error;
    const Conv2dShape& s = call.shape;
    const WeightLayout& w = call.weight;
    const int64_t taps = s.R * s.S, *strides = w.strides;
    const bool by_channel = strides[1] == taps && strides[2] == s.S && strides[3] == 1;
    const bool by_tap = strides[1] == 1 && strides[2] == s.S * w.total_in && strides[3] == w.total_in;
    if (strides[0] != w.total_in * taps || !(by_channel || by_tap)) return "grad_weight: must be dense, or channels_last";
    const int64_t size = size_of(call.dtype), images = s.V / s.k * s.H * s.W * s.C, features = s.V * s.P * s.Q * s.K;
    error = check_present(call, {{"grad", grad, features}, {"input", x, images}, {"grad_weight", grad_weight, 1}});
    if (!error.empty()) return error;
    error = check_result(call, {grad_weight, weight_numel(call) * size}, {{grad, features * size}, {x, images * size}});
    if (!error.empty()) return error;
    Plan plan;
    error = make_plan(s, call.slices, plan);
    if (!error.empty()) return error;
    if (s.P * s.Q == 0) plan.groups.clear();  // nothing to sum over: zeros, as for experts without samples
    const Passes passes = forward_passes(s);
    GradWeightJob job{};
    job.grad = grad;
    job.input = x;
    job.grad_weight = grad_weight;
    for (int i = 0; i < 4; ++i) job.strides[i] = call.weight.strides[i];
    job.shape = s;
    job.total_out = w.total_out;
    job.total_in = w.total_in;
    job.overlapping = call.slices.out.starts != nullptr || call.slices.in.count != 0;
    job.groups = plan.groups.data();
    job.group_count = int64_t(plan.groups.size());
    job.order = plan.order.data();
    job.pass = passes.list[0];
    job.threads = call.threads;
    require(kernels().grad_weight(call.dtype, job));
    return {};
}

}  // namespace moe::cpu
