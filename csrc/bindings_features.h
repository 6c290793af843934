// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace moe {

void bind_features(pybind11::module_& module);

}  // namespace moe
