// SPDX-License-Identifier: Apache-2.0
// The routing plan: which samples share a pair of slices. Made once for a call, from V integers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/conv2d.h"

namespace moe {

// Samples order[begin] .. order[end - 1] share the slice that starts at (out_start, in_start) of the weight.
struct Group {
    int64_t out_start, in_start;
    int64_t pair;  // out index * max(1, number of input slices) + in index: its place among packed weights
    int64_t begin, end;
};

struct Plan {
    std::vector<Group> groups;   // only those with samples, by ascending pair
    std::vector<int64_t> order;  // [V], stable within a group
};

int64_t pair_count(const Slices& slices);
int64_t start_of(const Side& side, int64_t index, int64_t width);

// Returns an empty string, or which sample's expert is outside the side's slices.
std::string check_experts(const Side& side, int64_t samples, const char* name);

// Returns an empty string, or what is wrong with the routing (an index out of range).
std::string make_plan(const Conv2dShape& shape, const Slices& slices, Plan& plan);

// Every pair of slices, each as a group without samples: what packing all weights goes through.
std::vector<Group> all_pairs(const Conv2dShape& shape, const Slices& slices);

}  // namespace moe
