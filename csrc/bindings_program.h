// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace moe {

// Adds the class Program to the module.
void bind_program(pybind11::module_& m);

}  // namespace moe
