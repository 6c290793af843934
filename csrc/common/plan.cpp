// SPDX-License-Identifier: Apache-2.0
#include "common/plan.h"

namespace moe {

namespace {

int64_t at_least_one(int64_t n) { return n > 0 ? n : 1; }

}  // namespace

std::string check_experts(const Side& side, int64_t samples, const char* name) {
    if (side.expert == nullptr) return {};
    for (int64_t v = 0; v < samples; ++v) {
        if (side.expert[v] < 0 || side.expert[v] >= side.count) {
            return std::string(name) + ": expert index " + std::to_string(side.expert[v]) + " of sample " +
                   std::to_string(v) + " is outside 0 .. " + std::to_string(side.count - 1);
        }
    }
    return {};
}

int64_t pair_count(const Slices& slices) { return at_least_one(slices.out.count) * at_least_one(slices.in.count); }

int64_t start_of(const Side& side, int64_t index, int64_t width) {
    if (side.count == 0) return 0;
    return side.starts != nullptr ? side.starts[index] : index * width;
}

std::string make_plan(const Conv2dShape& shape, const Slices& slices, Plan& plan) {
    std::string error = check_experts(slices.out, shape.V, "routing");
    if (error.empty()) error = check_experts(slices.in, shape.V, "in_routing");
    if (!error.empty()) return error;

    const int64_t ins = at_least_one(slices.in.count);
    const int64_t pairs = pair_count(slices);
    auto out_of = [&](int64_t v) { return slices.out.expert != nullptr ? slices.out.expert[v] : 0; };
    auto in_of = [&](int64_t v) { return slices.in.expert != nullptr ? slices.in.expert[v] : 0; };

    // A stable counting sort by pair.
    std::vector<int64_t> offset(pairs + 1, 0);
    for (int64_t v = 0; v < shape.V; ++v) ++offset[out_of(v) * ins + in_of(v) + 1];
    for (int64_t p = 0; p < pairs; ++p) {
        if (offset[p + 1] > 0) {
            plan.groups.push_back({start_of(slices.out, p / ins, shape.K), start_of(slices.in, p % ins, shape.C), p,
                                   offset[p], offset[p] + offset[p + 1]});
        }
        offset[p + 1] += offset[p];
    }
    plan.order.resize(shape.V);
    for (int64_t v = 0; v < shape.V; ++v) plan.order[offset[out_of(v) * ins + in_of(v)]++] = v;
    return {};
}

std::vector<Group> all_pairs(const Conv2dShape& shape, const Slices& slices) {
    const int64_t ins = at_least_one(slices.in.count);
    std::vector<Group> groups;
    for (int64_t p = 0; p < pair_count(slices); ++p) {
        groups.push_back({start_of(slices.out, p / ins, shape.K), start_of(slices.in, p % ins, shape.C), p, 0, 0});
    }
    return groups;
}

}  // namespace moe
