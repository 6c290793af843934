// SPDX-License-Identifier: Apache-2.0
// The module moe_kernels._C: raw pointers and sizes in, nothing out. moe_kernels.backends.cpu is its one caller; what
// it hands on has been checked: by moe_kernels.checks, for functions and for operators called by themselves, and by a
// module that compares its parameters' shapes with those it was made with.
// The interpreter's lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings_features.h"
#include "bindings_gpu.h"
#include "bindings_program.h"
#include "cpu/conv2d.h"
#include "cpu/dispatch.h"
#ifdef MOE_WITH_FUZZ
#include "fuzz/fuzz.h"
#endif

#ifndef MOE_BUILD_INFO
#define MOE_BUILD_INFO "built without build information"
#endif

namespace py = pybind11;

namespace {

using Pointer = std::uintptr_t;
using Shape = std::array<int64_t, 17>;
using Weight = std::array<int64_t, 6>;  // channels out and in, strides
// out expert, number, starts; in expert, number, starts
using SliceTuple = std::tuple<Pointer, int64_t, std::vector<int64_t>, Pointer, int64_t, std::vector<int64_t>>;

using PackedTuple = std::pair<Pointer, int64_t>;  // and how many numbers

template <class T = void>
const T* in(Pointer p) {
    return reinterpret_cast<const T*>(p);
}
void* out(Pointer p) { return reinterpret_cast<void*>(p); }

moe::cpu::Packed packed_of(PackedTuple p) { return {in(p.first), p.second}; }

moe::Side side(Pointer expert, int64_t count, const std::vector<int64_t>& starts, const char* name) {
    if (!starts.empty() && int64_t(starts.size()) != count) {
        throw std::invalid_argument(std::string(name) + ": " + std::to_string(starts.size()) + " starts for " +
                                    std::to_string(count) + " slices");
    }
    return {in<int64_t>(expert), count, starts.empty() ? nullptr : starts.data()};
}

moe::cpu::Call make_call(int dtype, int threads, const Shape& s, const SliceTuple& sl, const Weight& weight) {
    if (dtype < 0 || dtype > 3) throw std::invalid_argument("dtype: expected 0 .. 3, got " + std::to_string(dtype));
    moe::cpu::Call call{};
    call.dtype = static_cast<moe::DType>(dtype);
    call.threads = threads;
    call.shape = {s[0], s[1],  s[2],  s[3],  s[4],  s[5],  s[6],  s[7], s[8],
                  s[9], s[10], s[11], s[12], s[13], s[14], s[15], s[16]};
    call.slices.out = side(std::get<0>(sl), std::get<1>(sl), std::get<2>(sl), "out slices");
    call.slices.in = side(std::get<3>(sl), std::get<4>(sl), std::get<5>(sl), "in slices");
    call.weight = {weight[0], weight[1], {weight[2], weight[3], weight[4], weight[5]}};
    return call;
}

void raise_if(const std::string& error) {
    if (!error.empty()) throw std::invalid_argument(error);
}

moe::cpu::Direction direction_of(int direction) {
    if (direction != 0 && direction != 1) throw std::invalid_argument("direction: expected 0 or 1");
    return static_cast<moe::cpu::Direction>(direction);
}

void conv2d_forward(int dtype, int threads, const Shape& shape, const SliceTuple& slices, const Weight& layout, Pointer x,
                    Pointer weight, PackedTuple packed, Pointer y, Pointer bias, Pointer gate, Pointer scale,
                    Pointer shift, bool affine_per_slice, Pointer residual, bool relu) {
    const moe::Epilogue epilogue{in(bias), in(gate), in(scale), in(shift), in(residual), affine_per_slice, relu};
    raise_if(moe::cpu::conv2d_forward(make_call(dtype, threads, shape, slices, layout), in(x), in(weight),
                                      packed_of(packed), out(y), epilogue));
}

void conv2d_grad_input(int dtype, int threads, const Shape& shape, const SliceTuple& slices, const Weight& layout,
                       Pointer grad, Pointer weight, PackedTuple packed, Pointer grad_input) {
    raise_if(moe::cpu::conv2d_grad_input(make_call(dtype, threads, shape, slices, layout), in(grad), in(weight),
                                         packed_of(packed), out(grad_input)));
}

void conv2d_grad_weight(int dtype, int threads, const Shape& shape, const SliceTuple& slices, const Weight& layout,
                        Pointer grad, Pointer x, Pointer grad_weight) {
    raise_if(moe::cpu::conv2d_grad_weight(make_call(dtype, threads, shape, slices, layout), in(grad), in(x),
                                          out(grad_weight)));
}

int algorithm(int direction, int dtype, const Shape& shape) {
    const moe::cpu::Call call = make_call(dtype, 1, shape, {}, {});
    raise_if(moe::cpu::check(call));
    return int(moe::cpu::algorithm(direction_of(direction), call));
}

int64_t pack_numel(int direction, int dtype, const Shape& shape, const SliceTuple& slices) {
    const moe::cpu::Call call = make_call(dtype, 1, shape, slices, {});
    raise_if(moe::cpu::check(call));
    return moe::cpu::pack_numel(direction_of(direction), call);
}

void pack(int direction, int dtype, int threads, const Shape& shape, const SliceTuple& slices, const Weight& layout,
          Pointer weight, Pointer packed) {
    raise_if(moe::cpu::pack(direction_of(direction), make_call(dtype, threads, shape, slices, layout), in(weight),
                            out(packed)));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    m.doc() = "Native kernels of moe_kernels; called by moe_kernels.backends only.";
    m.def("isa", [] { return moe::cpu::kernels().isa; }, "Instruction set in use: avx512, avx2 or generic.");
    m.def("build_info", [] { return MOE_BUILD_INFO; }, "What was built, in one line.");
    m.def("conv2d_forward", &conv2d_forward, unlocked);
    m.def("conv2d_grad_input", &conv2d_grad_input, unlocked);
    m.def("conv2d_grad_weight", &conv2d_grad_weight, unlocked);
    m.def("algorithm", &algorithm, "0: direct sums, 1: Winograd's.");
    m.def("pack_numel", &pack_numel, unlocked);
    m.def("pack", &pack, unlocked);
#ifdef MOE_WITH_FUZZ
    m.def("fuzz_conv2d", &moe::fuzz::conv2d, unlocked);
    m.def("fuzz_features", &moe::fuzz::features, unlocked);
    m.def("fuzz_program", &moe::fuzz::program, unlocked);
#endif
    moe::bind_program(m);
    moe::bind_features(m);
    moe::bind_gpu(m);
}
