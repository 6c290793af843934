// SPDX-License-Identifier: Apache-2.0
// Whether the steps of a program (program.h) stay within its memory and make sense: an empty string, or what is wrong.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/program.h"

namespace moe::cpu {

// The memory of one sample.
struct Room {
    DType dtype;
    int64_t bytes;
};

// Bytes of a sample: those of several lie one behind the other, and indices in them.
bool is_memory(int64_t bytes);

std::string check(const Late& late, Room room);
std::string check(const Place& place, Room room, const char* name);
std::string check_index(int64_t offset, Room room, const char* name);
std::string check(const ProgramPrologue& prologue, const Place& of, Room room);
std::string check(const ProgramConv& conv, Room room);
std::string check(const ProgramLayer& layer, Room room);

}  // namespace moe::cpu
