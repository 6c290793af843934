// SPDX-License-Identifier: Apache-2.0
// Small kernels that try the simulator: some are correct, the others have one planted mistake each.
#pragma once

#include <cstddef>

// Runs a case; returns a StatusCode, and what the simulator said. An unknown name is an invalid argument.
extern "C" int moe_cuda_sim_selftest(const char* name, char* message, size_t size);

// All cases, a line each.
extern "C" const char* moe_cuda_sim_selftest_names();
