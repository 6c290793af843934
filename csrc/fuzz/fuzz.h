// SPDX-License-Identifier: Apache-2.0
// Random calls of the CPU backend's entry points.
#pragma once

#include <cstdint>
#include <string>

namespace moe::fuzz {

// Cases first .. first + cases - 1 of a seed, each by itself: sizes, strides, slices, element types and kernels' options
// drawn at random, in buffers beside pages that nothing may touch; one case in five has a wrong argument. Each returns a
// line about what was called.
//
// Throws std::runtime_error, with the case and its sizes: where a result is not what it should be, a right call is
// refused or a wrong one is taken. A kernel that reads or writes outside ends the process.
std::string conv2d(uint64_t seed, int64_t first, int64_t cases);    // cpu/conv2d.h
std::string features(uint64_t seed, int64_t first, int64_t cases);  // cpu/feature_maps.h
std::string program(uint64_t seed, int64_t first, int64_t cases);   // cpu/program.h

}  // namespace moe::fuzz
