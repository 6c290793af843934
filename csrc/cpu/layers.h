// SPDX-License-Identifier: Apache-2.0
// The layers of a program that are no convolutions: what routers need, pools, and what could not be made part of a
// convolution. Each number of a result is summed by one thread in one order.
#pragma once

#include <cmath>

#include "cpu/convolution.h"
#include "cpu/jobs.h"
#include "cpu/vec.h"

namespace moe::cpu {
namespace {

template <class A>
inline A* sample_of(const View& view, int64_t s) {
    return static_cast<A*>(view.data) + s * view.height * view.width * view.pixel_stride;
}

// Channels that are worked on at a time.
constexpr int64_t kChannels = 64;

// Calls f(sample, first channel, channels) for all samples and channels of src; parallel where there is enough to do.
template <class F>
void for_channels(const LayerJob& job, const F& f) {
    const int64_t parts = ceil_div(job.src.channels, kChannels);
    const int64_t tasks = job.samples * parts;
    const bool parallel =
        job.threads > 1 && tasks > 1 && job.samples * job.src.height * job.src.width * job.src.channels >= 32768;
#pragma omp parallel for schedule(static) num_threads(job.threads) if (parallel)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t first = task % parts * kChannels;
        f(task / parts, first, smaller(kChannels, job.src.channels - first));
    }
}

template <class A>
inline A larger_of(A a, A b) {  // NaN wins, as in torch
    return b > a || b != b ? b : a;
}

template <class A>
void mean(const LayerJob& job) {
    for_channels(job, [&](int64_t s, int64_t first, int64_t count) {
        const Before<A> before = Before<A>::of(job.prologue, s, first);
        const A* from = sample_of<A>(job.src, s) + first;
        A total[kChannels] = {};
        for (int64_t y = 0; y < job.src.height; ++y) {
            A row[kChannels] = {};
            for (int64_t x = 0; x < job.src.width; ++x, from += job.src.pixel_stride) {
                if (before.empty()) {
                    for (int64_t c = 0; c < count; ++c) row[c] += from[c];
                } else {
                    for (int64_t c = 0; c < count; ++c) row[c] += before(from[c], c);
                }
            }
            for (int64_t c = 0; c < count; ++c) total[c] += row[c];
        }
        A* to = sample_of<A>(job.dst, s) + first;
        const A pixels = A(job.src.height * job.src.width);
        for (int64_t c = 0; c < count; ++c) to[c] = total[c] / pixels;
    });
}

// Mean and 1 / deviation of channels [first, first + count) of all pixels.
template <class A>
void moments(const View& view, const A* from, int64_t first, int64_t count, double eps, A* mean, A* scale) {
    const int64_t pixels = view.height * view.width;
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < pixels; ++i) {
        for (int64_t c = first; c < first + count; ++c) sum += double(from[i * view.pixel_stride + c]);
    }
    const double center = sum / double(pixels * count);
    for (int64_t i = 0; i < pixels; ++i) {
        for (int64_t c = first; c < first + count; ++c) {
            const double d = double(from[i * view.pixel_stride + c]) - center;
            squares += d * d;
        }
    }
    *mean = A(center);
    *scale = A(1 / std::sqrt(squares / double(pixels * count) + eps));
}

// Each of `groups` groups of a sample's channels normalised over all its pixels; layer_norm is one group of one pixel.
template <class A>
void group_norm(const LayerJob& job) {
    const int64_t each = job.src.channels / job.groups, tasks = job.samples * job.groups;
    const int64_t pixels = job.src.height * job.src.width;
    const A* weight = static_cast<const A*>(job.weight);
    const A* bias = static_cast<const A*>(job.bias);
#pragma omp parallel for schedule(static) num_threads(job.threads) if (job.threads > 1 && tasks > 1 && pixels > 64)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t s = task / job.groups, first = task % job.groups * each;
        const A* from = sample_of<A>(job.src, s);
        A* to = sample_of<A>(job.dst, s);
        A center, scale;
        moments<A>(job.src, from, first, each, job.eps, &center, &scale);
        for (int64_t i = 0; i < pixels; ++i, from += job.src.pixel_stride, to += job.dst.pixel_stride) {
            for (int64_t c = first; c < first + each; ++c) {
                A y = (from[c] - center) * scale;
                if (weight != nullptr) y *= weight[c];
                if (bias != nullptr) y += bias[c];
                to[c] = y;
            }
        }
    }
}

template <class A>
A dot(const A* a, const A* b, int64_t count) {
    typedef typename Vec<A>::type V;
    constexpr int L = lanes<A>;
    V sum = {};
    int64_t i = 0;
    for (; i + L <= count; i += L) sum += load(a + i) * load(b + i);
    A total = 0;
    for (int l = 0; l < L; ++l) total += sum[l];
    for (; i < count; ++i) total += a[i] * b[i];
    return total;
}

// For the few outputs of a router; wide layers are 1x1 convolutions.
template <class A>
void linear(const LayerJob& job) {
    const A* weight = static_cast<const A*>(job.weight);
    const A* bias = static_cast<const A*>(job.bias);
    for (int64_t s = 0; s < job.samples; ++s) {
        const A* from = sample_of<A>(job.src, s);
        A* to = sample_of<A>(job.dst, s);
        for (int64_t n = 0; n < job.dst.channels; ++n) {
            to[n] = dot(weight + n * job.src.channels, from, job.src.channels) + (bias != nullptr ? bias[n] : A(0));
        }
    }
}

template <class A>
Result argmax(const LayerJob& job) {
    bool finite = true;
    for (int64_t s = 0; s < job.samples; ++s) {
        const A* from = sample_of<A>(job.src, s);
        int64_t best = 0;
        for (int64_t c = 0; c < job.src.channels; ++c) {
            finite &= from[c] == from[c];
            if (from[c] > from[best]) best = c;
        }
        job.index[s] = best;
    }
    return finite ? Result::ok : Result::not_a_number;
}

template <class A>
void softmax(const LayerJob& job) {
    const int64_t count = job.src.channels;
    for (int64_t s = 0; s < job.samples; ++s) {
        const A* from = sample_of<A>(job.src, s);
        A* to = sample_of<A>(job.dst, s);
        A most = from[0];
        double sum = 0;  // of many small ones float32 loses a share
        for (int64_t c = 1; c < count; ++c) most = larger_of(most, from[c]);
        for (int64_t c = 0; c < count; ++c) sum += double(to[c] = std::exp(from[c] - most));
        for (int64_t c = 0; c < count; ++c) to[c] /= A(sum);
    }
}

template <class A>
void gather(const LayerJob& job) {
    for (int64_t s = 0; s < job.samples; ++s) {
        *sample_of<A>(job.dst, s) = sample_of<A>(job.src, s)[job.index[s]];
    }
}

// dst = before(src) [+ other] [* factor] for each pixel of dst; src is read at every step-th pixel.
template <class A>
void pointwise(const LayerJob& job) {
    const View& dst = job.dst;
    const bool adds = job.op == LayerOp::add, scales = job.op == LayerOp::scale_rows;
    for_channels(job, [&](int64_t s, int64_t first, int64_t count) {
        const Before<A> before = Before<A>::of(job.prologue, s, first);
        const A factor = scales ? *sample_of<A>(job.other, s) : A(1);
        const A* image = sample_of<A>(job.src, s) + first;
        const A* other = adds ? sample_of<A>(job.other, s) + first : nullptr;
        A* to = sample_of<A>(dst, s) + job.at_channel + first;
        for (int64_t y = 0; y < dst.height; ++y) {
            for (int64_t x = 0; x < dst.width; ++x, to += dst.pixel_stride) {
                const A* from = image + (y * job.stride_h * job.src.width + x * job.stride_w) * job.src.pixel_stride;
                A line[kChannels];
                if (before.empty()) {
                    for (int64_t c = 0; c < count; ++c) line[c] = from[c];
                } else {
                    for (int64_t c = 0; c < count; ++c) line[c] = before(from[c], c);
                }
                if (adds) {
                    for (int64_t c = 0; c < count; ++c) line[c] += other[c];
                    other += job.other.pixel_stride;
                }
                if (scales) {
                    for (int64_t c = 0; c < count; ++c) line[c] *= factor;
                }
                for (int64_t c = 0; c < count; ++c) to[c] = line[c];
            }
        }
    });
}

template <class A>
void zero_other_channels(const LayerJob& job) {
    const int64_t pixels = job.dst.height * job.dst.width, behind = job.at_channel + job.src.channels;
    for (int64_t s = 0; s < job.samples; ++s) {
        A* to = sample_of<A>(job.dst, s);
        for (int64_t i = 0; i < pixels; ++i, to += job.dst.pixel_stride) {
            for (int64_t c = 0; c < job.at_channel; ++c) to[c] = A(0);
            for (int64_t c = behind; c < job.dst.channels; ++c) to[c] = A(0);
        }
    }
}

template <class A>
void pool(const LayerJob& job) {
    const bool takes_max = job.op == LayerOp::max_pool;
    for_channels(job, [&](int64_t s, int64_t first, int64_t count) {
        const Before<A> before = Before<A>::of(job.prologue, s, first);
        const A* image = sample_of<A>(job.src, s) + first;
        A* to = sample_of<A>(job.dst, s) + first;
        for (int64_t y = 0; y < job.dst.height; ++y) {
            const int64_t top = y * job.stride_h - job.pad_h;
            const int64_t y0 = larger(0, top), y1 = smaller(job.src.height, top + job.kernel_h);
            for (int64_t x = 0; x < job.dst.width; ++x, to += job.dst.pixel_stride) {
                const int64_t left = x * job.stride_w - job.pad_w;
                const int64_t x0 = larger(0, left), x1 = smaller(job.src.width, left + job.kernel_w);
                A line[kChannels] = {};
                bool begun = false;
                for (int64_t i = y0; i < y1; ++i) {
                    for (int64_t j = x0; j < x1; ++j) {
                        const A* from = image + (i * job.src.width + j) * job.src.pixel_stride;
                        for (int64_t c = 0; c < count; ++c) {
                            const A v = before(from[c], c);
                            line[c] = !takes_max ? line[c] + v : begun ? larger_of(line[c], v) : v;
                        }
                        begun = true;
                    }
                }
                const int64_t seen = (y1 - y0) * (x1 - x0);
                const A divisor = takes_max ? A(1) : A(job.count_padding ? job.kernel_h * job.kernel_w : seen);
                for (int64_t c = 0; c < count; ++c) to[c] = line[c] / divisor;
            }
        }
    });
}

template <class A>
void flatten(const LayerJob& job) {
    const int64_t pixels = job.src.height * job.src.width;
    for (int64_t s = 0; s < job.samples; ++s) {
        const A* from = sample_of<A>(job.src, s);
        A* to = sample_of<A>(job.dst, s);
        const Before<A> before = Before<A>::of(job.prologue, s, 0);
        for (int64_t i = 0; i < pixels; ++i, from += job.src.pixel_stride) {
            for (int64_t c = 0; c < job.src.channels; ++c) to[c * pixels + i] = before(from[c], c);
        }
    }
}

template <class A>
Result layer(const LayerJob& job) {
    switch (job.op) {
        case LayerOp::mean:
            mean<A>(job);
            break;
        case LayerOp::group_norm:
            group_norm<A>(job);
            break;
        case LayerOp::linear:
            linear<A>(job);
            break;
        case LayerOp::argmax:
            return argmax<A>(job);
        case LayerOp::softmax:
            softmax<A>(job);
            break;
        case LayerOp::gather:
            gather<A>(job);
            break;
        case LayerOp::copy:
            zero_other_channels<A>(job);
            pointwise<A>(job);
            break;
        case LayerOp::add:
        case LayerOp::scale_rows:
            pointwise<A>(job);
            break;
        case LayerOp::max_pool:
        case LayerOp::average_pool:
            pool<A>(job);
            break;
        case LayerOp::flatten:
            flatten<A>(job);
            break;
    }
    return Result::ok;
}

}  // namespace
}  // namespace moe::cpu
