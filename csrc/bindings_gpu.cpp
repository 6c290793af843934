// SPDX-License-Identifier: Apache-2.0
#include "bindings_gpu.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/api.h"
#include "cuda/status.h"
#ifdef MOE_WITH_SIMULATOR
#include "sim/selftest.h"
#include "sim/simulator.h"
#endif

namespace py = pybind11;

namespace moe {

namespace {

using Pointer = std::uintptr_t;
using Where = std::tuple<int, int, bool, Pointer>;  // device, multiprocessors, overlap, stream
using Shape = std::array<int64_t, 17>;              // as Conv2dShape
using Totals = std::array<int64_t, 2>;              // rows and columns of the weight
using Strides = std::array<int64_t, 4>;
using Side = std::tuple<Pointer, int64_t, Pointer>;  // expert, number of slices, first channels
using Groups = std::tuple<int64_t, bool, Pointer>;   // how many, whether they are pairs, the plan
using Values = std::tuple<Pointer, int64_t, int>;    // data, count, dtype

template <class T = void>
const T* in(Pointer p) {
    return reinterpret_cast<const T*>(p);
}
template <class T = void>
T* out(Pointer p) {
    return reinterpret_cast<T*>(p);
}

DType dtype_of(int dtype) {
    if (dtype < 0 || dtype > 3) throw std::invalid_argument("dtype: expected 0 .. 3, got " + std::to_string(dtype));
    return static_cast<DType>(dtype);
}

gpu::Where where(const Where& w) { return {std::get<0>(w), std::get<1>(w), std::get<2>(w), out(std::get<3>(w))}; }

Conv2dShape shape_of(const Shape& s) {
    return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14], s[15], s[16]};
}

Slices slices(const Side& out_side, const Side& in_side) {
    const auto side = [](const Side& s) {
        return moe::Side{in<int64_t>(std::get<0>(s)), std::get<1>(s), in<int64_t>(std::get<2>(s))};
    };
    return {side(out_side), side(in_side)};
}

gpu::Values values(const Values& v) { return {in(std::get<0>(v)), std::get<1>(v), dtype_of(std::get<2>(v))}; }

constexpr size_t kMessage = sizeof(Status::message);

// A status as Python hears it: ValueError for arguments, RuntimeError for what the device said.
void raise_if(int code, const char* message) {
    if (code == int(StatusCode::ok)) return;
    if (code == int(StatusCode::invalid_argument)) throw std::invalid_argument(message);
    throw std::runtime_error(message);
}

// The entry points of one build of the kernels.
struct Entries {
    decltype(&moe_cuda_check_device) check_device;
    decltype(&moe_cuda_plan) plan;
    decltype(&moe_cuda_make_counters) make_counters;
    decltype(&moe_cuda_convolution_needs) convolution_needs;
    decltype(&moe_cuda_convolution) convolution;
    decltype(&moe_cuda_grad_weight_needs) grad_weight_needs;
    decltype(&moe_cuda_grad_weight) grad_weight;
    decltype(&moe_cuda_router) router;
};

gpu::ConvolutionCall make_call(const Where& w, int dtype, bool tf32, bool backward, const Shape& shape,
                               const Side& out_side, const Side& in_side, const Totals& totals, const Strides& strides,
                               int64_t in_alignment, const Groups& groups, Pointer source, Pointer weight) {
    gpu::ConvolutionCall call{};
    call.where = where(w);
    call.dtype = dtype_of(dtype);
    call.tf32 = tf32;
    call.backward = backward;
    call.shape = shape_of(shape);
    call.slices = slices(out_side, in_side);
    call.total_out = totals[0];
    call.total_in = totals[1];
    for (int i = 0; i < 4; ++i) call.weight_strides[i] = strides[i];
    call.in_alignment = in_alignment;
    std::tie(call.groups, call.pairs) = std::tuple(std::get<0>(groups), int(std::get<1>(groups)));
    call.plan = in<int32_t>(std::get<2>(groups));
    call.source = in(source);
    call.weight = in(weight);
    return call;
}

gpu::GradWeightCall make_call(const Where& w, int dtype, bool tf32, const Shape& shape, const Side& out_side,
                              const Side& in_side, const Totals& totals, const Strides& strides, const Groups& groups,
                              Pointer grad, Pointer input) {
    gpu::GradWeightCall call{};
    call.where = where(w);
    call.dtype = dtype_of(dtype);
    call.tf32 = tf32;
    call.shape = shape_of(shape);
    call.slices = slices(out_side, in_side);
    call.total_out = totals[0];
    call.total_in = totals[1];
    for (int i = 0; i < 4; ++i) call.weight_strides[i] = strides[i];
    std::tie(call.groups, call.pairs) = std::tuple(std::get<0>(groups), int(std::get<1>(groups)));
    call.plan = in<int32_t>(std::get<2>(groups));
    call.grad = in(grad);
    call.input = in(input);
    return call;
}

void bind_entries(py::module_ m, Entries entries) {
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    m.attr("few_samples") = gpu::few_samples;
    m.attr("most_groups") = gpu::most_groups;
    m.def("check_device", [entries](const Where& w) {
        const gpu::Where on = where(w);
        char message[kMessage];
        raise_if(entries.check_device(&on, message, kMessage), message);
    });
    m.def(
        "plan",
        [entries](const Where& w, int64_t samples, int64_t num_out, int64_t num_in, Pointer out_expert, Pointer in_expert,
                  Pointer plan) {
            const gpu::PlanCall call{
                where(w), samples, num_out, num_in, in<int64_t>(out_expert), in<int64_t>(in_expert), out<int32_t>(plan)};
            char message[kMessage];
            raise_if(entries.plan(&call, message, kMessage), message);
        },
        unlocked);
    m.def("make_counters", [entries](const Where& w, int64_t count) {
        const gpu::Where on = where(w);
        int32_t* counters = nullptr;
        char message[kMessage];
        raise_if(entries.make_counters(&on, count, &counters, message, kMessage), message);
        return reinterpret_cast<Pointer>(counters);
    });
    m.def("convolution_needs",
          [entries](const Where& w, int dtype, bool tf32, bool backward, const Shape& shape, const Side& out_side,
                    const Side& in_side, const Totals& totals, const Strides& strides, int64_t in_alignment,
                    const Groups& groups, Pointer source, Pointer weight) {
              const auto call = make_call(w, dtype, tf32, backward, shape, out_side, in_side, totals, strides,
                                          in_alignment, groups, source, weight);
              gpu::ConvolutionNeeds needs{};
              char message[kMessage];
              raise_if(entries.convolution_needs(&call, &needs, message, kMessage), message);
              return std::tuple(needs.workspace, needs.counters, needs.dots_columns, needs.reads_plan != 0, needs.tile_m,
                                needs.tile_n, needs.copies != 0, needs.packed != 0, needs.splits);
          });
    m.def(
        "convolution",
        [entries](const Where& w, int dtype, bool tf32, bool backward, const Shape& shape, const Side& out_side,
                  const Side& in_side, const Totals& totals, const Strides& strides, int64_t in_alignment,
                  const Groups& groups, Pointer source, Pointer weight, Pointer target, const Values& bias,
                  const Values& gate, const Values& scale, const Values& shift, Pointer residual, bool affine_per_slice,
                  bool relu, Pointer image, Pointer dots, Pointer workspace, Pointer counters) {
            auto call = make_call(w, dtype, tf32, backward, shape, out_side, in_side, totals, strides, in_alignment,
                                  groups, source, weight);
            call.target = out(target);
            call.bias = values(bias);
            call.gate = values(gate);
            call.scale = values(scale);
            call.shift = values(shift);
            call.residual = in(residual);
            call.affine_per_slice = affine_per_slice;
            call.relu = relu;
            call.image = in(image);
            call.dots = out<float>(dots);
            call.workspace = out<float>(workspace);
            call.counters = out<int32_t>(counters);
            char message[kMessage];
            raise_if(entries.convolution(&call, message, kMessage), message);
        },
        unlocked);
    m.def("grad_weight_needs",
          [entries](const Where& w, int dtype, bool tf32, const Shape& shape, const Side& out_side, const Side& in_side,
                    const Totals& totals, const Strides& strides, const Groups& groups, Pointer grad, Pointer input) {
              const auto call = make_call(w, dtype, tf32, shape, out_side, in_side, totals, strides, groups, grad, input);
              gpu::GradWeightNeeds needs{};
              char message[kMessage];
              raise_if(entries.grad_weight_needs(&call, &needs, message, kMessage), message);
              return std::tuple(needs.workspace, needs.reads_plan != 0, needs.tile_m, needs.tile_n, needs.copies != 0,
                                needs.segment, needs.parts);
          });
    m.def(
        "grad_weight",
        [entries](const Where& w, int dtype, bool tf32, const Shape& shape, const Side& out_side, const Side& in_side,
                  const Totals& totals, const Strides& strides, const Groups& groups, Pointer grad, Pointer input,
                  Pointer grad_weight, Pointer workspace) {
            auto call = make_call(w, dtype, tf32, shape, out_side, in_side, totals, strides, groups, grad, input);
            call.grad_weight = out(grad_weight);
            call.workspace = out<float>(workspace);
            char message[kMessage];
            raise_if(entries.grad_weight(&call, message, kMessage), message);
        },
        unlocked);
    m.def(
        "router",
        [entries](const Where& w, int dtype, int64_t samples, int64_t channels, int64_t pixels, int64_t num_experts,
                  Pointer input, const Values& norm_weight, const Values& norm_bias, bool normalize, float epsilon,
                  const Values& weight, const Values& bias, Pointer expert, Pointer scores, Pointer gate) {
            gpu::RouterCall call{};
            call.where = where(w);
            call.dtype = dtype_of(dtype);
            call.samples = samples;
            call.channels = channels;
            call.pixels = pixels;
            call.num_experts = num_experts;
            call.input = in(input);
            call.norm_weight = values(norm_weight);
            call.norm_bias = values(norm_bias);
            call.normalize = normalize;
            call.epsilon = epsilon;
            call.weight = values(weight);
            call.bias = values(bias);
            call.expert = out<int64_t>(expert);
            call.scores = out(scores);
            call.gate = out<float>(gate);
            char message[kMessage];
            raise_if(entries.router(&call, message, kMessage), message);
        },
        unlocked);
}

}  // namespace

void bind_gpu(py::module_& module) {
#ifdef MOE_WITH_CUDA
    auto cuda = module.def_submodule("cuda", "The CUDA kernels, on the device.");
    bind_entries(cuda, {moe_cuda_check_device, moe_cuda_plan, moe_cuda_make_counters, moe_cuda_convolution_needs,
                        moe_cuda_convolution, moe_cuda_grad_weight_needs, moe_cuda_grad_weight, moe_cuda_router});
    cuda.attr("build_info") = MOE_CUDA_INFO;
#else
    module.attr("cuda_missing") = MOE_CUDA_MISSING;
#endif
#ifdef MOE_WITH_SIMULATOR
    auto simulated = module.def_submodule("cuda_sim", "The CUDA kernels, simulated on the host.");
    bind_entries(simulated, {moe_cuda_sim_check_device, moe_cuda_sim_plan, moe_cuda_sim_make_counters,
                             moe_cuda_sim_convolution_needs, moe_cuda_sim_convolution, moe_cuda_sim_grad_weight_needs,
                             moe_cuda_sim_grad_weight, moe_cuda_sim_router});
    simulated.attr("build_info") = "host simulator";
    simulated.def("selftest", [](const std::string& name) {
        char message[kMessage] = {};
        const int code = moe_cuda_sim_selftest(name.c_str(), message, kMessage);
        return std::pair(code, std::string(message));
    });
    simulated.def("run_last_block_first", [](bool on) { sim::last_block_first = on; });
    simulated.def("selftest_names", [] {
        std::vector<std::string> names;
        std::string name;
        for (const char c : std::string(moe_cuda_sim_selftest_names()) + "\n") {
            if (c != '\n') {
                name += c;
            } else if (!name.empty()) {
                names.push_back(name);
                name.clear();
            }
        }
        return names;
    });
#endif
}

}  // namespace moe
