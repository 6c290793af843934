// SPDX-License-Identifier: Apache-2.0
// features(): the kernels of cpu/features.h, by raw pointers.
#include "bindings_features.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/feature_maps.h"

namespace moe {

namespace {

using Pointer = std::uintptr_t;
using SideTuple = std::tuple<Pointer, int64_t, std::vector<int64_t>>;  // expert, number of slices, starts

// sizes: samples, pixels, channels, total. Pointers: x, grad, residual; scale, mean, shift, grad_scale, kept_shift;
// pooled_grad; y; first, second, third.
void features(int kernel, int dtype, int threads, bool relu, const std::array<int64_t, 4>& sizes, const SideTuple& side,
              const std::array<Pointer, 13>& p) {
    if (dtype < 0 || dtype > 3) throw std::invalid_argument("dtype: expected 0 .. 3, got " + std::to_string(dtype));
    if (kernel < 0 || kernel > 3) throw std::invalid_argument("kernel: expected 0 .. 3, got " + std::to_string(kernel));
    const auto& [expert, count, starts] = side;
    if (!starts.empty() && int64_t(starts.size()) != count) {
        throw std::invalid_argument("starts: expected " + std::to_string(count) + ", got " +
                                    std::to_string(starts.size()));
    }
    cpu::FeatureJob job{};
    job.samples = sizes[0], job.pixels = sizes[1], job.channels = sizes[2], job.total = sizes[3];
    job.side = {reinterpret_cast<const int64_t*>(expert), count, starts.empty() ? nullptr : starts.data()};
    const void** const inputs[] = {&job.x,     &job.grad,       &job.residual,   &job.scale,      &job.mean,
                                   &job.shift, &job.grad_scale, &job.kept_shift, &job.pooled_grad};
    for (int i = 0; i < 9; ++i) *inputs[i] = reinterpret_cast<const void*>(p[i]);
    void** const outputs[] = {&job.y, &job.first, &job.second, &job.third};
    for (int i = 0; i < 4; ++i) *outputs[i] = reinterpret_cast<void*>(p[9 + i]);
    job.relu = relu;
    job.threads = threads;
    const std::string error = cpu::features(static_cast<DType>(dtype), static_cast<cpu::FeatureKernel>(kernel), job);
    if (!error.empty()) throw std::invalid_argument(error);
}

}  // namespace

void bind_features(pybind11::module_& module) {
    module.def("features", &features, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace moe
