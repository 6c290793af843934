// SPDX-License-Identifier: Apache-2.0
// Weight gradient: for each pair of slices in use, a product over pixels. A register tile holds a few input channels by
// one panel of output channels and runs over blocks of about 128 pixels, copied so that they lie together in the
// first-level cache. Work is cut by shapes and routing alone, and partial sums are added in one fixed order, so the
// result has the same bits for any number of threads.
#pragma once

#include "cpu/convolution.h"
#include "cpu/jobs.h"
#include "cpu/transpose.h"
#include "cpu/vec.h"

namespace moe::cpu {
namespace {

// Input channels of a register tile: sums, the pixel's gradients and a value must fit the registers together.
constexpr int kTileChannels = MOE_REGISTERS == 32 ? 8 : 6;

struct GradWeightCut {
    int64_t samples, rows;           // of a block of pixels
    int64_t row_blocks;              // of an image
    int64_t panels, channel_blocks;  // of one item
    int64_t segments;                // of a group's blocks of pixels
    int64_t panel_items, channel_items;
    bool two_passes;  // partial sums first: of several segments, or of slices that share weights
    bool direct;      // sums are kept in the gradient itself
};

template <class A>
GradWeightCut cut_grad_weight(const GradWeightJob& job, bool converts) {
    constexpr int64_t pixels = 128;       // of a block: 16 KiB of gradients in float32
    constexpr int64_t items_wanted = 64;  // independent of the number of threads, for the sake of the bits
    constexpr int64_t sums = 256 * 1024;  // bytes of running sums of an item
    const Conv2dShape& s = job.shape;
    const int64_t panels = ceil_div(s.K / s.groups, panel<A>);
    const int64_t blocks = ceil_div(s.C / s.groups, kBlock);
    GradWeightCut cut;
    cut.rows = larger(1, smaller(s.P, pixels / larger(1, s.Q)));
    cut.row_blocks = ceil_div(s.P, cut.rows);
    cut.samples = cut.row_blocks > 1 ? 1 : larger(1, pixels / larger(1, s.P * s.Q));
    const int64_t unit = s.R * s.S * kBlock * panel<A> * int64_t(sizeof(A));
    cut.panels = smaller(panels, 4);
    cut.channel_blocks = smaller(blocks, larger(1, sums / (unit * cut.panels)));
    auto items = [&] {
        cut.panel_items = ceil_div(panels, cut.panels);
        cut.channel_items = ceil_div(blocks, cut.channel_blocks);
        return cut.panel_items * cut.channel_items * job.group_count * s.groups;
    };
    while (items() < items_wanted && cut.channel_blocks > 1) cut.channel_blocks = ceil_div(cut.channel_blocks, 2);
    while (items() < items_wanted && cut.panels > 1) cut.panels = ceil_div(cut.panels, 2);
    int64_t most = 1;
    for (int64_t g = 0; g < job.group_count; ++g) {
        most = larger(most, ceil_div(job.groups[g].end - job.groups[g].begin, cut.samples) * cut.row_blocks);
    }
    cut.segments = larger(1, smaller(most, ceil_div(items_wanted, larger(1, items()))));
    cut.two_passes = job.overlapping || cut.segments > 1;
    // Many weights and few pixels: sums on the side would cost more passes over the weights than the pixels are worth.
    cut.direct = !converts && !cut.two_passes && most == 1 && job.strides[1] == 1 && s.C / s.groups % kBlock == 0;
    return cut;
}

// Output rows or columns [begin, end) of a block that one tap reads from inside the image; the others meet padding.
struct Inside {
    int64_t begin, end;
};
inline Inside inside(int64_t first, int64_t count, int64_t step, int64_t offset, int64_t size) {
    // first + i takes input position (first + i) * step + offset
    const int64_t low = -offset - first * step, high = size - offset - first * step;
    const int64_t begin = low > 0 ? ceil_div(low, step) : 0, end = high > 0 ? ceil_div(high, step) : 0;
    return {smaller(begin, count), smaller(end, count)};
}

// The pixels of a block that one tap meets inside the image: steps in the copied input, and what is left of the block.
struct TapPixels {
    int64_t samples, sample_stride, row_stride, col_stride;
    int64_t all_rows, all_cols;
    Inside rows, cols;

    bool empty() const { return rows.begin >= rows.end || cols.begin >= cols.end; }
};

// Calls f(input, gradients) with the place of each pixel's channels in both.
template <class A, class F>
[[gnu::always_inline]] inline void each_pixel(const TapPixels& pixels, const A* x, const A* grads, F&& f) {
    for (int64_t s = 0; s < pixels.samples; ++s) {
        for (int64_t row = pixels.rows.begin; row < pixels.rows.end; ++row) {
            const A* at = x + s * pixels.sample_stride + row * pixels.row_stride + pixels.cols.begin * pixels.col_stride;
            const A* g = grads + ((s * pixels.all_rows + row) * pixels.all_cols + pixels.cols.begin) * panel<A>;
            for (int64_t col = pixels.cols.begin; col < pixels.cols.end; ++col, at += pixels.col_stride, g += panel<A>) {
                f(at, g);
            }
        }
    }
}

// sums[channel][panel] += the sum over the pixels of a block, for NC input channels.
template <class A, int NC>
inline void pixel_sum(const TapPixels& pixels, const A* x, const A* grads, A* sums) {
    typedef typename Vec<A>::type V;
    constexpr int L = lanes<A>;
    V acc[NC][kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < NC; ++c) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[c][v] = load(sums + c * panel<A> + v * L);
    }
    each_pixel<A>(pixels, x, grads, [&](const A* at, const A* g) {
        V w[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) w[v] = load(g + v * L);
#pragma GCC unroll 8
        for (int c = 0; c < NC; ++c) {
            const A value = at[c];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) acc[c][v] += value * w[v];
        }
    });
#pragma GCC unroll 8
    for (int c = 0; c < NC; ++c) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(sums + c * panel<A> + v * L, acc[c][v]);
    }
}

// Output channels of a tile whose lanes are a block's input channels, as the gradient of a channels_last weight has them.
template <class A>
constexpr int kBlockVectors = int(kBlock) / lanes<A>;
template <class A>
constexpr int kDirect = kBlockVectors<A> > 4 ? 1 : (MOE_REGISTERS == 32 ? 16 : 12) / kBlockVectors<A>;

// to[channel of the panel][input channel of the block] = the sum over the pixels, for `count` channels of the panel.
template <class A, int NK>
inline void pixel_rows(const TapPixels& pixels, const A* x, const A* grads, int64_t count, A* to, int64_t k_stride) {
    typedef typename Vec<A>::type V;
    constexpr int NV = kBlockVectors<A>, L = lanes<A>;
    int64_t k = 0;
    for (; k + NK <= count; k += NK, grads += NK, to += NK * k_stride) {
        V acc[NK][NV] = {};
        each_pixel<A>(pixels, x, grads, [&](const A* at, const A* g) {
            V w[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) w[v] = load(at + v * L);
#pragma GCC unroll 16
            for (int i = 0; i < NK; ++i) {
                const A value = g[i];
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) acc[i][v] += value * w[v];
            }
        });
#pragma GCC unroll 16
        for (int i = 0; i < NK; ++i) {
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) store(to + i * k_stride + v * L, acc[i][v]);
        }
    }
    if constexpr (NK > 1) {
        if (k < count) pixel_rows<A, (NK > 4 ? NK / 2 : 1)>(pixels, x, grads, count - k, to, k_stride);
    }
}

template <class T, class A>
void copy_gradients(const GradWeightJob& job, const int64_t* samples, int64_t count, int64_t row_begin, int64_t row_end,
                    int64_t channel, int64_t filled, A* to) {
    const Conv2dShape& s = job.shape;
    for (int64_t i = 0; i < count; ++i) {
        const T* from = static_cast<const T*>(job.grad) + ((samples[i] * s.P + row_begin) * s.Q) * s.K + channel;
        const int64_t pixels = (row_end - row_begin) * s.Q;
        if (filled == panel<A>) {
            for (int64_t p = 0; p < pixels; ++p, to += panel<A>, from += s.K) {
                for (int c = 0; c < panel<A>; ++c) to[c] = to_acc(from[c]);
            }
        } else {
            for (int64_t p = 0; p < pixels; ++p, to += panel<A>, from += s.K) {
                for (int64_t c = 0; c < panel<A>; ++c) to[c] = c < filled ? to_acc(from[c]) : A(0);
            }
        }
    }
}

// One vector of output channels of a unit, turned in registers; false, and nothing done, for other strides.
template <class A>
bool write_lanes(const A* sums, int64_t taps, int64_t channels, A* to, int64_t k_stride, int64_t c_stride,
                 int64_t tap_stride) {
    constexpr int L = lanes<A>;
    typename Vec<A>::type rows[L];
    if (c_stride == 1) {
        for (int64_t t = 0; t < taps; ++t) {
            for (int64_t c = 0; c < channels; c += L) {
                const int64_t count = smaller(L, channels - c);
                for (int64_t i = 0; i < L; ++i)
                    rows[i] = load(sums + (t * kBlock + c + smaller(i, count - 1)) * panel<A>);
                store_transposed<A>(rows, to + t * tap_stride + c, k_stride, count);
            }
        }
        return true;
    }
    if (tap_stride != 1 || c_stride != taps) return false;
    int64_t c = 0, tap = 0;
    for (int64_t q = 0; q < channels * taps; q += L) {
        const int64_t count = smaller(L, channels * taps - q);
        for (int64_t i = 0; i < count; ++i) {
            rows[i] = load(sums + (tap * kBlock + c) * panel<A>);
            if (++tap == taps) tap = 0, ++c;
        }
        for (int64_t i = count; i < L; ++i) rows[i] = rows[0];
        store_transposed<A>(rows, to + q, k_stride, count);
    }
    return true;
}

// Writes one unit of running sums, [tap][channel][lane], to its places [lane][channel][tap] by strides.
template <class D, class A>
void write_unit(const A* sums, int64_t taps, int64_t channels, int64_t filled, D* to, int64_t k_stride, int64_t c_stride,
                int64_t tap_stride) {
    constexpr int L = lanes<A>;
    int64_t lane = 0;
    if constexpr (sizeof(D) == sizeof(A)) {
        while (lane + L <= filled &&
               write_lanes<A>(sums + lane, taps, channels, reinterpret_cast<A*>(to) + lane * k_stride, k_stride, c_stride,
                              tap_stride)) {
            lane += L;
        }
    }
    for (; lane < filled; ++lane) {
        for (int64_t c = 0; c < channels; ++c) {
            D* at = to + lane * k_stride + c * c_stride;
            const A* from = sums + c * panel<A> + lane;
            for (int64_t t = 0; t < taps; ++t) at[t * tap_stride] = from_acc<D>(from[t * kBlock * panel<A>]);
        }
    }
}

template <class T, class A>
bool grad_weight_item(const GradWeightJob& job, const GradWeightCut& cut, int64_t g, int64_t segment, int64_t conv_group,
                      int64_t panel_item, int64_t channel_item, A* partial) {
    const Conv2dShape& s = job.shape;
    const Group& group = job.groups[g];
    const int64_t taps = s.R * s.S;
    const int64_t out = s.K / s.groups, red = s.C / s.groups;
    const int64_t panel_begin = panel_item * cut.panels;
    const int64_t panel_end = smaller(ceil_div(out, panel<A>), panel_begin + cut.panels);
    const int64_t block_begin = channel_item * cut.channel_blocks;
    const int64_t block_end = smaller(ceil_div(red, kBlock), block_begin + cut.channel_blocks);
    const int64_t blocks = block_end - block_begin;
    const int64_t channels = smaller(red - block_begin * kBlock, blocks * kBlock);

    Pass pass = job.pass;
    Window window;
    window.cols = (pass.cols - 1) * pass.is_w + pass.span_w;
    window.row_stride = window.cols * kBlock;
    window.rows = (cut.rows - 1) * pass.is_h + pass.span_h;
    window.block_stride = cut.samples * window.rows * window.row_stride;  // a block of channels of all samples together
    const int64_t sample_stride = window.rows * window.row_stride;

    const int64_t unit = taps * kBlock * panel<A>;
    const int64_t sums_size = cut.direct ? 0 : (panel_end - panel_begin) * blocks * unit;
    const int64_t grad_size = cut.samples * cut.rows * s.Q * panel<A>;
    const int64_t input_size = blocks * window.block_stride;
    A* sums = static_cast<A*>(scratch(Scratch::worker, size_t(sums_size + grad_size + input_size) * sizeof(A)));
    if (sums == nullptr) return false;
    A* grads = sums + sums_size;
    A* inputs = grads + grad_size;
    std::memset(sums, 0, size_t(sums_size) * sizeof(A));

    const int64_t pixel_blocks = ceil_div(group.end - group.begin, cut.samples) * cut.row_blocks;
    const int64_t first = pixel_blocks * segment / cut.segments, last = pixel_blocks * (segment + 1) / cut.segments;
    for (int64_t b = first; b < last; ++b) {
        const int64_t begin = group.begin + b / cut.row_blocks * cut.samples;
        const int64_t count = smaller(cut.samples, group.end - begin);
        const int64_t row_begin = b % cut.row_blocks * cut.rows;
        const int64_t row_end = smaller(s.P, row_begin + cut.rows);
        for (int64_t i = 0; i < count; ++i) {
            const T* image = static_cast<const T*>(job.input) + (job.order[begin + i] / s.k) * s.H * s.W * s.C +
                             conv_group * red + block_begin * kBlock;
            copy_window<T, A>(image, s.H, s.W, s.C, channels, row_begin * pass.is_h + pass.org_h, pass.org_w, Before<A>{},
                              window, inputs + i * sample_stride);
        }
        for (int64_t p = panel_begin; p < panel_end; ++p) {
            const int64_t channel = p * panel<A>;
            const int64_t filled = smaller(panel<A>, out - channel);
            copy_gradients<T, A>(job, job.order + begin, count, row_begin, row_end, conv_group * out + channel, filled,
                                 grads);
            for (int64_t block = 0; block < blocks; ++block) {
                A* to = sums + ((p - panel_begin) * blocks + block) * unit;
                for (int64_t t = 0; t < taps; ++t) {
                    const TapPixels pixels = {
                        count,
                        sample_stride,
                        pass.is_h * window.row_stride,
                        pass.is_w * kBlock,
                        row_end - row_begin,
                        s.Q,
                        inside(row_begin, row_end - row_begin, pass.is_h, pass.org_h + pass.tap_h[t], s.H),
                        inside(0, s.Q, pass.is_w, pass.org_w + pass.tap_w[t], s.W)};
                    const A* x =
                        inputs + block * window.block_stride + pass.tap_h[t] * window.row_stride + pass.tap_w[t] * kBlock;
                    if constexpr (sizeof(T) == sizeof(A)) {
                        if (cut.direct) {  // a tap that meets padding alone is written too, as zeros
                            A* place = static_cast<A*>(job.grad_weight) +
                                       (group.out_start + conv_group * out + channel) * job.strides[0] +
                                       (block_begin + block) * kBlock + t * job.strides[3];
                            pixel_rows<A, kDirect<A>>(pixels, x, grads, filled, place, job.strides[0]);
                            continue;
                        }
                    }
                    if (pixels.empty()) continue;
                    constexpr int NC = kTileChannels, rest = int(kBlock) % NC;
                    int64_t c = 0;
                    for (; c + NC <= kBlock && block * kBlock + c < channels; c += NC) {
                        pixel_sum<A, NC>(pixels, x + c, grads, to + (t * kBlock + c) * panel<A>);
                    }
                    if constexpr (rest > 0) {
                        if (c + NC > kBlock && block * kBlock + c < channels) {
                            pixel_sum<A, rest>(pixels, x + c, grads, to + (t * kBlock + c) * panel<A>);
                        }
                    }
                }
            }
        }
    }
    if (cut.direct) return true;

    for (int64_t p = panel_begin; p < panel_end; ++p) {
        for (int64_t block = 0; block < blocks; ++block) {
            const A* from = sums + ((p - panel_begin) * blocks + block) * unit;
            const int64_t k = conv_group * out + p * panel<A>, c = (block_begin + block) * kBlock;
            const int64_t filled = smaller(panel<A>, out - p * panel<A>), width = smaller(kBlock, red - c);
            if (partial != nullptr) {
                A* to = partial + ((g * cut.segments + segment) * s.K + k) * red * taps + c * taps;
                write_unit<A, A>(from, taps, width, filled, to, red * taps, taps, 1);
            } else {
                T* to = static_cast<T*>(job.grad_weight) + (group.out_start + k) * job.strides[0] + c * job.strides[1];
                write_unit<T, A>(from, taps, width, filled, to, job.strides[0], job.strides[1], job.strides[3]);
            }
        }
    }
    return true;
}

// Adds the partial sums of every group and segment that touches one row of the weight.
template <class T, class A>
bool reduce_row(const GradWeightJob& job, const GradWeightCut& cut, const A* partial, int64_t row) {
    const Conv2dShape& s = job.shape;
    const int64_t taps = s.R * s.S, red = s.C / s.groups, length = job.total_in * taps;
    A* sums = static_cast<A*>(scratch(Scratch::worker, size_t(length) * sizeof(A)));
    if (sums == nullptr) return false;
    std::memset(sums, 0, size_t(length) * sizeof(A));
    for (int64_t g = 0; g < job.group_count; ++g) {
        const int64_t k = row - job.groups[g].out_start;
        if (k < 0 || k >= s.K) continue;
        A* to = sums + job.groups[g].in_start * taps;
        for (int64_t segment = 0; segment < cut.segments; ++segment) {
            const A* from = partial + ((g * cut.segments + segment) * s.K + k) * red * taps;
            for (int64_t i = 0; i < red * taps; ++i) to[i] += from[i];
        }
    }
    T* to = static_cast<T*>(job.grad_weight) + row * job.strides[0];
    for (int64_t c = 0; c < job.total_in; ++c) {
        for (int64_t t = 0; t < taps; ++t) to[c * job.strides[1] + t * job.strides[3]] = from_acc<T>(sums[c * taps + t]);
    }
    return true;
}

template <class T, class A>
Result grad_weight(const GradWeightJob& job) {
    const Conv2dShape& s = job.shape;
    const GradWeightCut cut = cut_grad_weight<A>(job, sizeof(T) != sizeof(A));
    A* partial = nullptr;
    if (cut.two_passes) {
        const int64_t size = job.group_count * cut.segments * s.K * (s.C / s.groups) * s.R * s.S;
        partial = static_cast<A*>(scratch(Scratch::partial, size_t(larger(1, size)) * sizeof(A)));
        if (partial == nullptr) return Result::out_of_memory;
    }
    int failed = 0;
    const int64_t each = cut.segments * s.groups * cut.panel_items * cut.channel_items;
    const int64_t items = job.group_count * each;
#pragma omp parallel num_threads(job.threads) if (job.threads > 1) reduction(| : failed)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < items; ++item) {
            int64_t rest = item % each;
            const int64_t channel_item = rest % cut.channel_items;
            rest /= cut.channel_items;
            const int64_t panel_item = rest % cut.panel_items;
            rest /= cut.panel_items;
            failed |= !grad_weight_item<T, A>(job, cut, item / each, rest / s.groups, rest % s.groups, panel_item,
                                              channel_item, partial);
        }
        if (cut.two_passes) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < job.total_out; ++row) failed |= !reduce_row<T, A>(job, cut, partial, row);
        } else {  // rows of experts that nobody chose
#pragma omp for schedule(static)
            for (int64_t row = 0; row < job.total_out; ++row) {
                bool used = false;
                for (int64_t g = 0; g < job.group_count && !used; ++g) {
                    used = row >= job.groups[g].out_start && row < job.groups[g].out_start + s.K;
                }
                if (used) continue;
                T* to = static_cast<T*>(job.grad_weight) + row * job.strides[0];
                std::memset(to, 0, size_t(job.total_in * s.R * s.S) * sizeof(T));
            }
        }
    }
    return failed != 0 ? Result::out_of_memory : Result::ok;
}

}  // namespace
}  // namespace moe::cpu
