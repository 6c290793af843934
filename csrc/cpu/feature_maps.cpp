// SPDX-License-Identifier: Apache-2.0
#include "cpu/feature_maps.h"

#include <new>

#include "common/plan.h"
#include "cpu/checks.h"
#include "cpu/dispatch.h"

namespace moe::cpu {

namespace {

std::string check_sizes(const FeatureJob& job) {
    if (job.samples < 0 || job.pixels < 0 || job.channels < 0 || job.total < 0)
        return "features: sizes must not be negative";
    const Side& side = job.side;
    if (side.count < 0 || (side.count == 0 && (side.expert != nullptr || side.starts != nullptr)))
        return "slices: none, with experts or starts";
    if (side.count > 0 && side.expert == nullptr && job.samples > 0) return "slices: without samples' experts";
    // kernels keep a few numbers of each channel
    constexpr int64_t kKept = 16;
    if (!addressable({job.samples, job.pixels, job.channels, kKept}) || !addressable({side.count, job.channels, kKept}) ||
        !addressable({job.total, kKept}))
        return "features: more than 2^60 bytes";
    std::string error = check_threads(job.threads);
    if (error.empty()) error = check_side(side, job.channels, job.total, "slices");
    return error;
}

// What the kernel reads and writes is there, and what it does not know is not.
std::string check_present(FeatureKernel kernel, const FeatureJob& job) {
    const bool some = job.samples > 0 && job.pixels > 0 && job.channels > 0;
    const bool gradient = job.grad != nullptr || job.pooled_grad != nullptr;
    if (some && job.x == nullptr) return "x: missing";
    switch (kernel) {
        case FeatureKernel::map:
            if (some && job.y == nullptr) return "y: missing";
            if (!gradient && !job.relu && job.scale == nullptr) return "scale: missing in a map without ReLU";
            if (job.residual != nullptr && (gradient || !job.relu || job.scale == nullptr))
                return "residual: of a forward map with scale and ReLU only";
            if (job.first != nullptr && (gradient || !job.relu)) return "first: means of a forward map with ReLU only";
            if (gradient && job.grad_scale == nullptr && (!job.relu || job.scale != nullptr))
                return "grad_scale: missing";
            return {};
        case FeatureKernel::moments:
            if (job.total > 0 && (job.first == nullptr || job.second == nullptr || job.third == nullptr))
                return "first, second, third: missing";
            return {};
        case FeatureKernel::sums:
            if (some && !gradient) return "grad: missing";
            if (job.relu && job.grad_scale == nullptr) return "grad_scale: missing";
            if (job.total > 0 && (job.first == nullptr || job.second == nullptr)) return "first, second: missing";
            return {};
        case FeatureKernel::dot:
            if (some && job.grad == nullptr) return "grad: missing";
            if (job.samples > 0 && job.first == nullptr) return "first: missing";
            return {};
    }
    return "kernel: unknown";
}

std::string check_results(DType dtype, FeatureKernel kernel, const FeatureJob& job) {
    const int64_t numel = job.samples * job.pixels * job.channels, bytes = numel * size_of(dtype);
    const int64_t number = acc_size(dtype), side = job.total * number;
    const Span x{job.x, bytes}, grad{job.grad, bytes}, residual{job.residual, bytes}, y{job.y, bytes};
    const Span scale{job.scale, side}, mean{job.mean, side}, shift{job.shift, side}, grad_scale{job.grad_scale, side},
        kept_shift{job.kept_shift, side}, pooled_grad{job.pooled_grad, job.samples * job.channels * number};
    const Span expert{job.side.expert, job.samples * int64_t(sizeof(int64_t))},
        starts{job.side.starts, job.side.count * int64_t(sizeof(int64_t))};
    const int64_t reduced = kernel == FeatureKernel::dot   ? job.samples * number
                            : kernel == FeatureKernel::map ? job.samples * job.channels * number
                                                           : side;
    const Span results[] = {y, {job.first, reduced}, {job.second, reduced}, {job.third, reduced}};
    for (int i = 0; i < 4; ++i) {
        if (results[i].data == nullptr) continue;
        std::string error = check_apart(
            results[i], {x, grad, residual, scale, mean, shift, grad_scale, kept_shift, pooled_grad, expert, starts});
        for (int j = 0; j < i && error.empty(); ++j) error = check_apart(results[i], {results[j]});
        if (!error.empty()) return error;
    }
    return {};
}

}  // namespace

std::string features(DType dtype, FeatureKernel kernel, const FeatureJob& job) {
    std::string error = check_sizes(job);
    if (error.empty()) error = check_present(kernel, job);
    if (error.empty()) error = check_results(dtype, kernel, job);
    if (error.empty()) error = check_experts(job.side, job.samples, "routing");
    if (!error.empty()) return error;
    if (kernels().features(dtype, kernel, job) == Result::out_of_memory) throw std::bad_alloc();
    return {};
}

}  // namespace moe::cpu
