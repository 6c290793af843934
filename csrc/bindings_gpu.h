// SPDX-License-Identifier: Apache-2.0
// The submodules moe_kernels._C.cuda and moe_kernels._C.cuda_sim: the same entry points, of the device and the simulator.
#pragma once

#include <pybind11/pybind11.h>

namespace moe {

void bind_gpu(pybind11::module_& module);

}  // namespace moe
