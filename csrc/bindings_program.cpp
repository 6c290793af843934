// SPDX-License-Identifier: Apache-2.0
// moe_kernels._C.Program: recorded by moe_kernels.inference.lowering, which keeps alive what its pointers point to.
#include "bindings_program.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/program.h"

namespace py = pybind11;

namespace moe {

namespace {

using cpu::Place;
using cpu::Program;
using cpu::ProgramConv;
using cpu::ProgramLayer;
using cpu::ProgramPrologue;

using Pointer = std::uintptr_t;
using PlaceTuple = std::array<int64_t, 6>;  // offset, channel, height, width, channels, pixel stride
// scale, shift, expert, channels, rows, relu
using PrologueTuple = std::tuple<Pointer, Pointer, int64_t, int64_t, int64_t, bool>;
using SideTuple = std::tuple<int64_t, int64_t, std::vector<int64_t>>;  // expert, count, starts
using ExternalTuple = std::tuple<Pointer, std::array<int64_t, 4>>;     // data, strides

using LateTuple = std::tuple<int64_t, int64_t, int64_t, std::vector<std::array<int64_t, 2>>>;  // as cpu::Late

const void* in(Pointer p) { return reinterpret_cast<const void*>(p); }

Place place(const PlaceTuple& t) { return {t[0], t[1], t[2], t[3], t[4], t[5]}; }

ProgramPrologue prologue(const PrologueTuple& t) {
    return {in(std::get<0>(t)), in(std::get<1>(t)), std::get<2>(t), std::get<3>(t), std::get<4>(t), std::get<5>(t)};
}

void conv(Program& program, const PlaceTuple& src, const PlaceTuple& dst, const PlaceTuple& residual,
          const std::array<int64_t, 17>& s, const SideTuple& out_side, const SideTuple& in_side, Pointer packed,
          Pointer bias, int64_t gate, Pointer scale, Pointer shift, bool affine_per_slice, bool relu,
          const PrologueTuple& before) {
    ProgramConv c;
    c.src = place(src), c.dst = place(dst), c.residual = place(residual);
    c.shape = {s[0], s[1],  s[2],  s[3],  s[4],  s[5],  s[6],  s[7], s[8],
               s[9], s[10], s[11], s[12], s[13], s[14], s[15], s[16]};
    std::tie(c.out_expert, c.out_count, c.out_starts) = out_side;
    std::tie(c.in_expert, c.in_count, c.in_starts) = in_side;
    c.packed = in(packed);
    c.epilogue = {in(bias), nullptr, in(scale), in(shift), nullptr, affine_per_slice, relu};
    c.gate = gate;
    c.prologue = prologue(before);
    program.conv(std::move(c));
}

// numbers: groups, kernel, stride, padding (two each), at_channel
void layer(Program& program, int op, const PlaceTuple& src, const PlaceTuple& other, const PlaceTuple& dst,
           Pointer weight, Pointer bias, int64_t index, const std::array<int64_t, 8>& numbers, double eps,
           bool count_padding, const PrologueTuple& before) {
    if (op < 0 || op > int(cpu::LayerOp::flatten)) throw std::invalid_argument("op: unknown, " + std::to_string(op));
    ProgramLayer l{};
    l.src = place(src), l.other = place(other), l.dst = place(dst);
    l.job.op = static_cast<cpu::LayerOp>(op);
    l.job.weight = in(weight), l.job.bias = in(bias);
    l.index = index;
    l.job.groups = numbers[0];
    l.job.kernel_h = numbers[1], l.job.kernel_w = numbers[2];
    l.job.stride_h = numbers[3], l.job.stride_w = numbers[4];
    l.job.pad_h = numbers[5], l.job.pad_w = numbers[6];
    l.job.at_channel = numbers[7];
    l.job.eps = eps;
    l.job.count_padding = count_padding;
    l.prologue = prologue(before);
    program.layer(std::move(l));
}

std::vector<cpu::External> externals(const std::vector<ExternalTuple>& given) {
    std::vector<cpu::External> made;
    for (const auto& [data, strides] : given) {
        made.push_back({reinterpret_cast<void*>(data), {strides[0], strides[1], strides[2], strides[3]}});
    }
    return made;
}

void run_with(const Program& program, int64_t samples, const std::vector<ExternalTuple>& inputs,
              const std::vector<ExternalTuple>& outputs, int threads, std::vector<double>* seconds) {
    const auto from = externals(inputs), to = externals(outputs);
    std::string error;
    {
        const py::gil_scoped_release unlocked;
        error = program.run(samples, from, to, threads, seconds);
    }
    if (!error.empty()) throw std::invalid_argument(error);
}

void run(const Program& program, int64_t samples, const std::vector<ExternalTuple>& inputs,
         const std::vector<ExternalTuple>& outputs, int threads) {
    run_with(program, samples, inputs, outputs, threads, nullptr);
}

std::vector<double> profile(const Program& program, int64_t samples, const std::vector<ExternalTuple>& inputs,
                            const std::vector<ExternalTuple>& outputs, int threads) {
    std::vector<double> seconds;
    run_with(program, samples, inputs, outputs, threads, &seconds);
    return seconds;
}

cpu::Late late_of(const LateTuple& t) {
    cpu::Late late{std::get<0>(t), std::get<1>(t), std::get<2>(t), {}};
    for (const auto& [offset, bytes] : std::get<3>(t)) late.live.push_back({offset, bytes});
    return late;
}

DType dtype_of(int dtype) {
    if (dtype != 0 && dtype != 1) throw std::invalid_argument("dtype: expected float32 (0) or float64 (1)");
    return static_cast<DType>(dtype);
}

}  // namespace

void bind_program(py::module_& m) {
    py::class_<Program>(m, "Program", "A recorded sequence of kernel calls.")
        .def(py::init([](int dtype, int64_t sample_bytes, int64_t chunk, const LateTuple& late) {
            return std::make_unique<Program>(dtype_of(dtype), sample_bytes, chunk, late_of(late));
        }))
        .def("load", [](Program& p, int64_t input, const PlaceTuple& dst) { p.load(input, place(dst)); })
        .def("store", [](Program& p, int64_t output, const PlaceTuple& src,
                         const PrologueTuple& before) { p.store(output, place(src), prologue(before)); })
        .def("load_index", &Program::load_index)
        .def("store_index", &Program::store_index)
        .def("conv", &conv)
        .def("layer", &layer)
        .def("memory", &Program::memory)
        .def("run", &run)
        .def("profile", &profile);
}

}  // namespace moe
