// SPDX-License-Identifier: Apache-2.0
// Weights in the order in which the register tiles read them:
//   [pair][convolution group][pass][panel of output channels][block of reduced channels][tap][channel][lane]
// converted to the accumulation type, output channels padded with zeros to whole panels.
#pragma once

#include "cpu/jobs.h"
#include "cpu/transpose.h"
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

// One vector of output channels of one block, where numbers that lie together in memory can be turned in registers: over
// output channels themselves, over reduced channels (channels_last weights), or over both and taps (contiguous ones).
// False, and nothing done, for other strides. place[tap] is where the tap's reduced channels go.
template <class A>
bool pack_lanes(const PackJob& job, const A* weight, int64_t taps, int64_t red_count, A* const* place, int64_t lane) {
    constexpr int L = lanes<A>;
    constexpr int width = panel<A>;
    typename Vec<A>::type rows[L];
    if (job.out_stride == 1) {
        for (int64_t t = 0; t < taps; ++t) {
            const A* at = weight + (t / job.S) * job.r_stride + (t % job.S) * job.s_stride;
            for (int64_t c = 0; c < red_count; ++c) store(place[t] + c * width + lane, load(at + c * job.red_stride));
        }
        return true;
    }
    if (job.red_stride == 1) {
        for (int64_t t = 0; t < taps; ++t) {
            const A* at = weight + (t / job.S) * job.r_stride + (t % job.S) * job.s_stride;
            for (int64_t c = 0; c < red_count; c += L) {
                const int64_t count = smaller(L, red_count - c);
                load_transposed<A>(at + c, job.out_stride, count, rows);
                for (int64_t i = 0; i < count; ++i) store(place[t] + (c + i) * width + lane, rows[i]);
            }
        }
        return true;
    }
    if (job.s_stride != 1 || job.r_stride != job.S || job.red_stride != taps) return false;
    // all reduced channels and taps of an output channel in one run
    int64_t c = 0, tap = 0;
    for (int64_t q = 0; q < red_count * taps; q += L) {
        const int64_t count = smaller(L, red_count * taps - q);
        load_transposed<A>(weight + q, job.out_stride, count, rows);
        for (int64_t i = 0; i < count; ++i) {
            store(place[tap] + c * width + lane, rows[i]);
            if (++tap == taps) tap = 0, ++c;
        }
    }
    return true;
}

// One block of reduced channels of one panel, all taps of all passes.
template <class T, class A>
void pack_block(const PackJob& job, const T* weight, int64_t taps, int64_t out_left, int64_t red_count, A* const* place) {
    constexpr int width = panel<A>, L = lanes<A>;
    for (int64_t lane = 0; lane < width; lane += L) {
        const int64_t filled = larger(0, smaller(L, out_left - lane));
        const T* first = weight + lane * job.out_stride;
        if constexpr (sizeof(T) == sizeof(A)) {
            if (filled == L && pack_lanes<A>(job, reinterpret_cast<const A*>(first), taps, red_count, place, lane))
                continue;
        }
        for (int64_t t = 0; t < taps; ++t) {
            const T* at = first + (t / job.S) * job.r_stride + (t % job.S) * job.s_stride;
            A* row = place[t] + lane;
            for (int64_t c = 0; c < red_count; ++c, row += width, at += job.red_stride) {
                for (int64_t i = 0; i < L; ++i) row[i] = i < filled ? to_acc(at[i * job.out_stride]) : A(0);
            }
        }
    }
}

// One block of reduced channels of panel p of a group. place[r * S + s] is where that tap's reduced channels go.
template <class T, class A>
void pack_taps(const PackJob& job, const Group& group, int64_t cg, int64_t p, int64_t block, int64_t taps,
               A* const* place) {
    const int64_t red_begin = block * kBlock;
    const T* weight = static_cast<const T*>(job.weight) + group.out_start * job.slice_out_stride +
                      group.in_start * job.slice_in_stride + cg * job.group_stride + p * panel<A> * job.out_stride +
                      red_begin * job.red_stride;
    pack_block<T, A>(job, weight, taps, job.out - p * panel<A>, smaller(kBlock, job.red - red_begin), place);
}

// The same into a group's memory that holds `held` panels from `first` on.
template <class T, class A>
bool pack_part(const PackJob& job, const Group& group, int64_t cg, int64_t p, int64_t block, int64_t taps, int64_t first,
               int64_t held, A* of_group) {
    constexpr int width = panel<A>;
    const int64_t red_begin = block * kBlock;
    const int64_t red_count = smaller(kBlock, job.red - red_begin);
    A** place = static_cast<A**>(scratch(Scratch::places, size_t(taps) * sizeof(A*)));
    if (place == nullptr) return false;
    for (int64_t i = 0; i < job.pass_count; ++i) {
        const Pass& pass = job.passes[i];
        A* to = of_group + (pass.taps_before * held + (p - first) * pass.taps) * job.red * width +
                red_begin * pass.taps * width;
        for (int64_t t = 0; t < pass.taps; ++t) place[pass.tap_weight[t]] = to + t * red_count * width;
    }
    pack_taps<T, A>(job, group, cg, p, block, taps, place);
    return true;
}

// Calls part(group, convolution group, panel, block of reduced channels, memory of that convolution group) for all of
// them; false is memory that could not be had.
template <class A, class F>
Result pack_parts(const PackJob& job, int64_t pair_size, const F& part) {
    const int64_t panels = ceil_div(job.out, panel<A>);
    const int64_t blocks = ceil_div(job.red, kBlock);
    const int64_t tasks = job.group_count * job.conv_groups * panels * blocks;
    const bool parallel = job.threads > 1 && pair_size * job.group_count > 16384;
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(job.threads) if (parallel) reduction(| : failed)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t block = task % blocks;
        const int64_t p = task / blocks % panels;
        const int64_t cg = task / blocks / panels % job.conv_groups;
        const int64_t g = task / blocks / panels / job.conv_groups;
        A* of_group = static_cast<A*>(job.packed) + (job.dense_index ? g : job.groups[g].pair) * pair_size +
                      cg * (pair_size / job.conv_groups);
        failed |= !part(job.groups[g], cg, p, block, of_group);
    }
    return failed != 0 ? Result::out_of_memory : Result::ok;
}

template <class T, class A>
Result pack(const PackJob& job) {
    const int64_t panels = ceil_div(job.out, panel<A>), taps = count_taps(job.passes, job.pass_count);
    const int64_t pair_size = packed_size_of_pair<A>(job.out, job.red, taps, job.conv_groups);
    return pack_parts<A>(job, pair_size, [&](const Group& group, int64_t cg, int64_t p, int64_t block, A* of_group) {
        return pack_part<T, A>(job, group, cg, p, block, taps, 0, panels, of_group);
    });
}

}  // namespace
}  // namespace moe::cpu
