// SPDX-License-Identifier: Apache-2.0
// Which samples a block works on: tiles of rows (pixels of samples) and segments of samples, numbered group by group.
// How many there are depends on the routing, but not more than tile_bound(), which the host knows; a block past the end
// leaves. A group is what shares one slice on both sides; the last one holds the samples with an index out of range.
#pragma once

#include "cuda/api.h"
#include "cuda/device.h"

namespace moe::MOE_GPU {

using device::Global;
using device::Shared;

// Positions in kernels are 32-bit numbers, which are rounded up to whole tiles.
constexpr int64_t kMostInt = (int64_t(1) << 31) - 4096;

// Division of numbers below 2^31 by one that the host knows.
struct Divisor {
    uint32_t value = 1, multiplier = 0, shift = 0;

    Divisor() = default;
    explicit Divisor(int64_t divisor) : value(uint32_t(divisor)) {
        if (value == 0) return;  // of what is empty; nothing is divided
        while ((uint64_t(1) << shift) < value) ++shift;
        multiplier = uint32_t((((uint64_t(1) << shift) - value) << 32) / value + 1);
    }
    MOE_DEVICE int quotient(int n) const {
        return int((device::high_product(uint32_t(n), multiplier) + uint32_t(n)) >> shift);
    }
};

// The slices of one side, as the device sees them.
struct SideView {
    Global<const int64_t> expert;  // [V]; not given: the side is whole
    Global<const int64_t> starts;  // [count]; not given: a partition
    int count;
    int width;

    // The expert of a sample; -1 where it is out of range.
    MOE_DEVICE int chosen(int64_t sample) const {
        const int64_t e = expert.load(sample);
        return e >= 0 && e < count ? int(e) : -1;
    }
    MOE_DEVICE int64_t start(int e) const { return starts.given() ? starts.load(e) : int64_t(e) * width; }
};

inline SideView view(const Side& side, int64_t samples, int64_t width, const char* expert, const char* starts) {
    return {device::global(side.count ? side.expert : nullptr, samples, expert),
            device::global(side.count ? side.starts : nullptr, side.count, starts), int(side.count), int(width)};
}

// What the samples are grouped by.
struct Grouping {
    SideView out, in;
    Global<const int32_t> plan;  // offsets [count + 2], order [V]; not given: few samples, ordered by each block
    int samples;
    int count;   // groups, without that of the invalid ones
    bool pairs;  // a group is a pair of experts

    // The group of a sample; `count` where an index is out of range.
    MOE_DEVICE int of(int sample) const {
        int group = 0;
        bool valid = true;
        if (out.expert.given()) {
            group = out.chosen(sample);
            valid = group >= 0;
        }
        if (in.expert.given()) {
            const int inner = in.chosen(sample);
            valid = valid && inner >= 0;
            group = pairs ? group * in.count + inner : inner;
        }
        return valid ? group : count;
    }
    MOE_DEVICE int out_expert(int group) const { return pairs ? group / in.count : group; }
    MOE_DEVICE int in_expert(int group) const { return pairs ? group % in.count : group; }
};

inline Grouping view(const Slices& slices, const Conv2dShape& shape, int64_t count, int pairs, const int32_t* plan) {
    Grouping g{};
    g.out = view(slices.out, shape.V, shape.K, "out_expert", "out_starts");
    g.in = view(slices.in, shape.V, shape.C, "in_expert", "in_starts");
    g.pairs = pairs != 0;
    g.count = int(count);
    g.samples = int(shape.V);
    g.plan = device::global(plan, count + 2 + shape.V, "plan");
    return g;
}

// No routing needs more tiles: each group, the invalid ones' too, has at most one that is not full.
inline int64_t tile_bound(int64_t samples, int64_t rows_per_sample, int64_t tile_rows, int64_t groups) {
    const int64_t partly = groups + 1 < samples ? groups + 1 : samples;
    return (samples * rows_per_sample + tile_rows - 1) / tile_rows + partly;
}

// What find_tile leaves in shared memory, and the order of few samples after it.
struct Found {
    int group;   // above `count`: there is no such tile
    int place;   // of the group's first sample in the order
    int first;   // the tile's first row in the group
    int rows;    // of the group
    int before;  // tiles of the groups before
};
constexpr int kFoundInts = 5 + int(gpu::few_samples);

// The sum over the lanes up to this one.
MOE_DEVICE int inclusive_sum(int value) {
    const int lane = device::lane();
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = device::shuffle(value, lane >= distance ? lane - distance : lane);
        if (lane >= distance) value += other;
    }
    return value;
}

// Finds tile number `tile`. For all threads of the block; ends with a barrier.
MOE_DEVICE Found find_tile(const Grouping& groups, Shared<int> memory, int tile, int rows_per_sample, int tile_rows) {
    if (device::warp() == 0) {
        const int lane = device::lane();
        if (lane == 0) memory.store(0, groups.count + 1);
        device::sync_warp();
        if (groups.plan.given()) {
            int before = 0;
            for (int first = 0; first <= groups.count; first += 32) {
                const int g = first + lane;
                const bool inside = g <= groups.count;
                const int begin = inside ? groups.plan.load(g) : 0;
                const int samples = inside ? groups.plan.load(g + 1) - begin : 0;
                const int tiles = (samples * rows_per_sample + tile_rows - 1) / tile_rows;
                const int last = before + inclusive_sum(tiles);
                if (tile < last && tile >= last - tiles) {
                    memory.store(0, g);
                    memory.store(1, begin);
                    memory.store(2, (tile - (last - tiles)) * tile_rows);
                    memory.store(3, samples * rows_per_sample);
                    memory.store(4, last - tiles);
                }
                before = device::shuffle(last, 31);
            }
        } else {
            // a lane for each sample: its place, and what comes before its group
            const bool inside = lane < groups.samples;
            const int group = inside ? groups.of(lane) : groups.count + 1;
            int place = 0, members = 0, begin = 0, before = 0;
            bool leader = inside;
            for (int other = 0; other < groups.samples; ++other) {
                const int theirs = device::shuffle(group, other);
                if (theirs < group) ++begin;
                if (theirs == group) {
                    ++members;
                    if (other < lane) ++place, leader = false;
                }
            }
            const int tiles = (members * rows_per_sample + tile_rows - 1) / tile_rows;
            for (int other = 0; other < groups.samples; ++other) {
                const int theirs = device::shuffle(group, other);
                const int more = device::shuffle(leader ? tiles : 0, other);
                if (theirs < group) before += more;
            }
            if (inside) memory.store(5 + begin + place, lane);
            if (leader && tile >= before && tile < before + tiles) {
                memory.store(0, group);
                memory.store(1, begin);
                memory.store(2, (tile - before) * tile_rows);
                memory.store(3, members * rows_per_sample);
                memory.store(4, before);
            }
        }
    }
    device::sync_threads();
    Found found{};
    found.group = memory.load(0);
    if (found.group > groups.count) return found;
    found.place = memory.load(1);
    found.first = memory.load(2);
    found.rows = memory.load(3);
    found.before = memory.load(4);
    return found;
}

// The sample at a place of the order; after find_tile.
MOE_DEVICE int sample_at(const Grouping& groups, Shared<int> memory, int place) {
    return groups.plan.given() ? groups.plan.load(groups.count + 2 + place) : memory.load(5 + place);
}

}  // namespace moe::MOE_GPU
