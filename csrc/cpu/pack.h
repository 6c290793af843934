// SPDX-License-Identifier: Apache-2.0
// Weights in the order in which the register tiles read them:
//   [pair][convolution group][pass][panel of output channels][block of reduced channels][tap][channel][lane]
// converted to the accumulation type, output channels padded with zeros to whole panels.
#pragma once

#include "cpu/jobs.h"
#include "cpu/vec.h"

namespace moe::cpu {
namespace {

template <class A>
inline int64_t packed_size_of_pair(int64_t out, int64_t red, int64_t all_taps, int64_t conv_groups) {
    return conv_groups * ceil_div(out, panel<A>) * panel<A> * red * all_taps;
}

inline int64_t count_taps(const Pass* passes, int64_t count) {
    return count == 0 ? 0 : passes[count - 1].taps_before + passes[count - 1].taps;
}

// One block of reduced channels of one panel.
template <class T, class A>
void pack_block(const PackJob& job, const Pass& pass, const T* weight, int64_t out_begin, int64_t red_begin,
                int64_t red_count, A* packed) {
    constexpr int width = panel<A>;
    const int64_t filled = smaller(width, job.out - out_begin);
    for (int64_t t = 0; t < pass.taps; ++t) {
        const int64_t tap = pass.tap_weight[t];
        const T* at_tap = weight + (tap / job.S) * job.r_stride + (tap % job.S) * job.s_stride +
                          out_begin * job.out_stride + red_begin * job.red_stride;
        A* row = packed + t * red_count * width;
        for (int64_t c = 0; c < red_count; ++c, row += width) {
            const T* from = at_tap + c * job.red_stride;
            int64_t lane = 0;
            for (; lane < filled; ++lane) row[lane] = to_acc(from[lane * job.out_stride]);
            for (; lane < width; ++lane) row[lane] = A(0);
        }
    }
}

template <class T, class A>
Result pack(const PackJob& job) {
    constexpr int width = panel<A>;
    const int64_t panels = ceil_div(job.out, width);
    const int64_t all_taps = count_taps(job.passes, job.pass_count);
    const int64_t pair_size = packed_size_of_pair<A>(job.out, job.red, all_taps, job.conv_groups);
    const int64_t blocks = ceil_div(job.red, kBlock);
    const int64_t tasks = job.group_count * job.conv_groups * panels * blocks;
    const bool parallel = job.threads > 1 && pair_size * job.group_count > 16384;
#pragma omp parallel for schedule(static) num_threads(job.threads) if (parallel)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t block = task % blocks;
        const int64_t p = task / blocks % panels;
        const int64_t cg = task / blocks / panels % job.conv_groups;
        const int64_t g = task / blocks / panels / job.conv_groups;
        const Group& group = job.groups[g];
        const T* weight = static_cast<const T*>(job.weight) + group.out_start * job.slice_out_stride +
                          group.in_start * job.slice_in_stride + cg * job.group_stride;
        A* of_group = static_cast<A*>(job.packed) + (job.dense_index ? g : group.pair) * pair_size +
                      cg * (pair_size / job.conv_groups);
        const int64_t red_begin = block * kBlock;
        const int64_t red_count = smaller(kBlock, job.red - red_begin);
        for (int64_t i = 0; i < job.pass_count; ++i) {
            const Pass& pass = job.passes[i];
            A* to = of_group + (pass.taps_before * panels + p * pass.taps) * job.red * width +
                    red_begin * pass.taps * width;
            pack_block<T, A>(job, pass, weight, p * width, red_begin, red_count, to);
        }
    }
    return Result::ok;
}

}  // namespace
}  // namespace moe::cpu
