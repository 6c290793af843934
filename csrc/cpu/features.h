// SPDX-License-Identifier: Apache-2.0
// What happens to feature maps between convolutions, each in one pass over memory: BatchNorm's statistics, its map and
// the sums of its derivative, with values of each sample's expert; the sum with a shortcut, ReLU and channel means along
// with the map; <a[v], b[v]>.
//
// A sample is cut into units of a number of pixels that depends on its channels alone. A unit is one thread's; what units
// give is added in their order, so that the bits are the same for any number of threads.
#pragma once

#include "cpu/jobs.h"
#include "cpu/vec.h"

namespace moe::cpu {
namespace {

constexpr int64_t kUnitElements = 16384;  // 64 KiB of float32: a second look at a unit finds it in the cache
constexpr int64_t kRow = 256;             // elements that inner loops have at least; narrower pixels are taken together

// How a sample's elements are walked through: rows of whole pixels.
struct Units {
    int64_t pixels;  // of a unit
    int64_t each;    // of a sample
    int64_t repeat;  // pixels of a row
    int64_t row;     // elements of a row
};

inline Units units_of(const FeatureJob& job) {
    Units cut{};
    const int64_t channels = larger(1, job.channels);
    cut.pixels = larger(16, kUnitElements / channels);
    cut.each = ceil_div(job.pixels, cut.pixels);
    cut.repeat = ceil_div(kRow, channels);
    cut.row = cut.repeat * channels;
    return cut;
}

inline int64_t first_channel(const FeatureJob& job, int64_t sample) {
    if (job.side.expert == nullptr) return 0;
    const int64_t expert = job.side.expert[sample];
    return job.side.starts == nullptr ? expert * job.channels : job.side.starts[expert];
}

inline int64_t expert_of(const FeatureJob& job, int64_t sample) {
    return job.side.expert == nullptr ? 0 : job.side.expert[sample];
}

template <class T, class A>
inline void read(A* to, const T* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = to_acc(from[i]);
}

// A value of each channel, once for each pixel of a row.
template <class A>
inline void spread(A* row, const A* values, int64_t channels, int64_t repeat) {
    for (int64_t r = 0; r < repeat; ++r) {
        for (int64_t c = 0; c < channels; ++c) row[r * channels + c] = values[c];
    }
}

// The sums of a row's columns by channel, in the order of its pixels.
template <class A>
inline void fold(A* sums, const A* row, int64_t channels, int64_t repeat) {
    for (int64_t c = 0; c < channels; ++c) sums[c] = row[c];
    for (int64_t r = 1; r < repeat; ++r) {
        for (int64_t c = 0; c < channels; ++c) sums[c] += row[r * channels + c];
    }
}

// --- the map ----------------------------------------------------------------------------------------------------------

// Where a unit's elements begin and end.
struct Range {
    int64_t begin, end;
};

inline Range range_of(const FeatureJob& job, const Units& cut, int64_t sample, int64_t unit) {
    const int64_t begin = (sample * job.pixels + unit * cut.pixels) * job.channels;
    return {begin, begin + smaller(cut.pixels, job.pixels - unit * cut.pixels) * job.channels};
}

// A sample's values, once for each pixel of a row; what the job has not is 0. And rows to add up in.
template <class A>
struct Rows {
    const A *mean, *scale, *shift, *grad_scale, *kept_shift;
    const A* pooled;  // the gradient that each pixel has from the means
    A *sums, *products, *work;

    // False if there is no memory.
    bool fill(const FeatureJob& job, const Units& cut, int64_t sample) {
        const int64_t length = cut.row, offset = first_channel(job, sample);
        A* memory = static_cast<A*>(scratch(Scratch::worker, size_t(9 * length) * sizeof(A)));
        if (memory == nullptr) return false;
        const struct {
            const void* values;
            const A** row;
        } given[] = {{job.mean, &mean},
                     {job.scale, &scale},
                     {job.shift, &shift},
                     {job.grad_scale, &grad_scale},
                     {job.kept_shift, &kept_shift},
                     {job.pooled_grad, &pooled}};
        const A share = A(1) / A(larger(1, job.pixels));
        for (const auto& each : given) {
            *each.row = memory;
            for (int64_t i = 0; i < length && each.values == nullptr; ++i) memory[i] = A(0);
            if (each.values != nullptr) {
                const bool pool = each.values == job.pooled_grad;
                const int64_t at = pool ? sample * job.channels : offset;
                spread(memory, static_cast<const A*>(each.values) + at, job.channels, cut.repeat);
                for (int64_t i = 0; i < length && pool; ++i) memory[i] *= share;
            }
            memory += length;
        }
        sums = memory, products = sums + length, work = products + length;
        for (int64_t i = 0; i < length; ++i) sums[i] = products[i] = A(0);
        return true;
    }
};

// Which elements ReLU let through: all of them; those where the map behind it gave more than 0; those of which x, its own
// result, says so.
enum class Kept { all, by_map, by_sign };

template <Kept kKept, class A>
inline A through(A x, A d, A mean, A scale, A shift) {
    if constexpr (kKept == Kept::by_map) return scale * (x - mean) + shift <= A(0) ? A(0) : d;
    if constexpr (kKept == Kept::by_sign) return x <= A(0) ? A(0) : d;
    return d;
}

template <bool kAffine, bool kResidual, bool kRelu, class T, class A>
void map_row(const FeatureJob& job, const Rows<A>& rows, int64_t at, int64_t n) {
    const T* __restrict x = static_cast<const T*>(job.x) + at;
    const T* __restrict residual = kResidual ? static_cast<const T*>(job.residual) + at : nullptr;
    T* __restrict y = static_cast<T*>(job.y) + at;
    const A* __restrict mean = rows.mean, * __restrict scale = rows.scale, * __restrict shift = rows.shift;
    A* __restrict sums = rows.sums;
    for (int64_t i = 0; i < n; ++i) {
        A v = to_acc(x[i]);
        if constexpr (kAffine) v = scale[i] * (v - mean[i]) + shift[i];
        if constexpr (kResidual) v += to_acc(residual[i]);
        if constexpr (kRelu) {
            v = v < A(0) ? A(0) : v;  // NaN stays
            sums[i] += v;
        }
        y[i] = from_acc<T>(v);
    }
}

template <bool kAffine, Kept kKept, class T, class A>
void backward_row(const FeatureJob& job, const Rows<A>& rows, int64_t at, int64_t n) {
    const T* __restrict x = static_cast<const T*>(job.x) + at;
    const T* __restrict grad = job.grad == nullptr ? nullptr : static_cast<const T*>(job.grad) + at;
    T* __restrict y = static_cast<T*>(job.y) + at;
    const A* __restrict mean = rows.mean, * __restrict scale = rows.scale, * __restrict shift = rows.shift;
    const A* __restrict grad_scale = rows.grad_scale, * __restrict kept_shift = rows.kept_shift;
    const A* __restrict pooled = rows.pooled;
    const auto each = [&](int64_t i, A d) {
        const A v = to_acc(x[i]);
        d = through<kKept>(v, d + pooled[i], mean[i], grad_scale[i], kept_shift[i]);
        if constexpr (kKept != Kept::by_sign) d *= grad_scale[i];
        if constexpr (kAffine) d += scale[i] * (v - mean[i]) + shift[i];
        y[i] = from_acc<T>(d);
    };
    if (grad == nullptr) {
        for (int64_t i = 0; i < n; ++i) each(i, A(0));
    } else {
        for (int64_t i = 0; i < n; ++i) each(i, to_acc(grad[i]));
    }
}

// The form of a row that a job asks for.
template <class T, class A>
auto row_of(const FeatureJob& job) -> void (*)(const FeatureJob&, const Rows<A>&, int64_t, int64_t) {
    const bool affine = job.scale != nullptr;
    if (job.grad != nullptr || job.pooled_grad != nullptr) {
        if (job.grad_scale == nullptr) return backward_row<false, Kept::by_sign, T, A>;
        if (!job.relu) return backward_row<true, Kept::all, T, A>;
        return affine ? backward_row<true, Kept::by_map, T, A> : backward_row<false, Kept::by_map, T, A>;
    }
    if (!job.relu) return map_row<true, false, false, T, A>;
    if (!affine) return map_row<false, false, true, T, A>;
    return job.residual == nullptr ? map_row<true, false, true, T, A> : map_row<true, true, true, T, A>;
}

// `pooled`: of the unit's channels, what the results add up to; null where nobody asks.
template <class T, class A>
bool map_unit(const FeatureJob& job, const Units& cut, int64_t sample, int64_t unit, A* pooled) {
    Rows<A> rows;
    if (!rows.fill(job, cut, sample)) return false;
    const auto row = row_of<T, A>(job);
    const Range range = range_of(job, cut, sample, unit);
    for (int64_t at = range.begin; at < range.end; at += cut.row) row(job, rows, at, smaller(cut.row, range.end - at));
    if (pooled != nullptr) fold(pooled, rows.sums, job.channels, cut.repeat);
    return true;
}

// Calls of(sample, unit, number of the unit) for every unit.
template <class Of>
Result for_units(const FeatureJob& job, const Units& cut, Of of) {
    const int64_t units = job.samples * cut.each;
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(job.threads) if (job.threads > 1 && units > 1) reduction(| : failed)
    for (int64_t u = 0; u < units; ++u) failed |= !of(u / cut.each, u % cut.each, u);
    return failed ? Result::out_of_memory : Result::ok;
}

template <class T, class A>
Result feature_map(const FeatureJob& job) {
    const Units cut = units_of(job);
    const int64_t C = job.channels;
    A* pooled = static_cast<A*>(job.first);
    A* parts = pooled;
    if (pooled != nullptr && cut.each != 1) {
        parts = static_cast<A*>(scratch(Scratch::partial, size_t(larger(1, job.samples * cut.each * C)) * sizeof(A)));
        if (parts == nullptr) return Result::out_of_memory;
    }
    const Result result = for_units(job, cut, [&](int64_t v, int64_t unit, int64_t u) {
        return map_unit<T, A>(job, cut, v, unit, parts == nullptr ? nullptr : parts + u * C);
    });
    if (result != Result::ok || pooled == nullptr) return result;
    const A share = A(1) / A(job.pixels);
    for (int64_t v = 0; v < job.samples; ++v) {
        A* of_sample = pooled + v * C;
        for (int64_t c = 0; c < C && job.pixels == 0; ++c) of_sample[c] = A(0);  // and times infinity: NaN, as torch's
        for (int64_t unit = 0; unit < cut.each && parts != pooled; ++unit) {
            const A* part = parts + (v * cut.each + unit) * C;
            for (int64_t c = 0; c < C; ++c) of_sample[c] = unit == 0 ? part[c] : of_sample[c] + part[c];
        }
        for (int64_t c = 0; c < C; ++c) of_sample[c] *= share;
    }
    return Result::ok;
}

// --- statistics -------------------------------------------------------------------------------------------------------

// Of a unit: sums, and the sums of squares of what is left without the unit's own means.
template <class T, class A>
bool moments_unit(const FeatureJob& job, const Units& cut, int64_t sample, int64_t unit, A* sum, A* square) {
    A* memory = static_cast<A*>(scratch(Scratch::worker, size_t(3 * cut.row) * sizeof(A)));
    if (memory == nullptr) return false;
    A *v = memory, *sums = v + cut.row, *mean = sums + cut.row;
    const int64_t pixels = smaller(cut.pixels, job.pixels - unit * cut.pixels);
    const auto [begin, end] = range_of(job, cut, sample, unit);
    const T* x = static_cast<const T*>(job.x);
    for (int64_t i = 0; i < cut.row; ++i) sums[i] = A(0);
    for (int64_t at = begin; at < end; at += cut.row) {
        const int64_t n = smaller(cut.row, end - at);
        read(v, x + at, n);
        for (int64_t i = 0; i < n; ++i) sums[i] += v[i];
    }
    fold(sum, sums, job.channels, cut.repeat);
    spread(mean, sum, job.channels, cut.repeat);
    const A share = A(1) / A(pixels);
    for (int64_t i = 0; i < cut.row; ++i) mean[i] *= share, sums[i] = A(0);
    for (int64_t at = begin; at < end; at += cut.row) {
        const int64_t n = smaller(cut.row, end - at);
        read(v, x + at, n);
        for (int64_t i = 0; i < n; ++i) {
            v[i] -= mean[i];
            sums[i] += v[i] * v[i];
        }
    }
    fold(square, sums, job.channels, cut.repeat);
    // what is combined is the mean: a sum over many units would round
    for (int64_t c = 0; c < job.channels; ++c) sum[c] = mean[c];
    return true;
}

template <Kept kKept, class T, class A>
void sums_row(const FeatureJob& job, const Rows<A>& rows, int64_t at, int64_t n) {
    const T* __restrict x = static_cast<const T*>(job.x) + at;
    const T* __restrict grad = job.grad == nullptr ? nullptr : static_cast<const T*>(job.grad) + at;
    const A* __restrict mean = rows.mean, * __restrict scale = rows.grad_scale, * __restrict shift = rows.kept_shift;
    const A* __restrict pooled = rows.pooled;
    A* __restrict sums = rows.sums, * __restrict products = rows.products;
    A* __restrict d = rows.work;
    // a loop of its own: together with the sums compilers make a branch of the choice
    const auto each = [&](int64_t i, A of_result) {
        d[i] = through<kKept>(A(to_acc(x[i])), of_result + pooled[i], mean[i], scale[i], shift[i]);
    };
    if (grad == nullptr) {
        for (int64_t i = 0; i < n; ++i) each(i, A(0));
    } else {
        for (int64_t i = 0; i < n; ++i) each(i, to_acc(grad[i]));
    }
    for (int64_t i = 0; i < n; ++i) {
        sums[i] += d[i];
        products[i] += d[i] * (to_acc(x[i]) - mean[i]);
    }
}

// Sums of a unit's gradient, and of the gradient times what lies above the mean.
template <class T, class A>
bool sums_unit(const FeatureJob& job, const Units& cut, int64_t sample, int64_t unit, A* sum, A* product) {
    Rows<A> rows;
    if (!rows.fill(job, cut, sample)) return false;
    const auto row = job.relu ? sums_row<Kept::by_map, T, A> : sums_row<Kept::all, T, A>;
    const Range range = range_of(job, cut, sample, unit);
    for (int64_t at = range.begin; at < range.end; at += cut.row) row(job, rows, at, smaller(cut.row, range.end - at));
    fold(sum, rows.sums, job.channels, cut.repeat);
    fold(product, rows.products, job.channels, cut.repeat);
    return true;
}

// Each unit's two numbers of each channel, put together in the units' order and in double: to each expert's channels, and
// from there to those of the whole side, which experts may share.
template <class A, class Add>
void combine(const FeatureJob& job, const Units& cut, const A* parts, double* state, Add add) {
    const int64_t C = job.channels, units = job.samples * cut.each;
    constexpr int64_t kBlock = 32;  // channels that a thread takes at a time
    const int64_t blocks = ceil_div(C, kBlock);
    const int64_t experts = job.side.expert == nullptr ? 1 : job.side.count;
    double* of_side = state + 3 * experts * C;  // [3, total] behind [experts, 3, C]
    for (int64_t i = 0; i < 3 * experts * C + 3 * job.total; ++i) state[i] = 0;
#pragma omp parallel for schedule(static) num_threads(job.threads) if (job.threads > 1 && units * C > 16384)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t from = block * kBlock, count = smaller(kBlock, C - from);
        for (int64_t u = 0; u < units; ++u) {
            const int64_t sample = u / cut.each, unit = u % cut.each;
            const double values = double(smaller(cut.pixels, job.pixels - unit * cut.pixels));
            double* of_expert = state + 3 * expert_of(job, sample) * C + from;
            const A* part = parts + 2 * u * C + from;
            for (int64_t c = 0; c < count; ++c) {
                add(of_expert[c], of_expert[C + c], of_expert[2 * C + c], double(part[c]), double(part[C + c]), values);
            }
        }
    }
    for (int64_t e = 0; e < experts; ++e) {
        const int64_t start = job.side.starts == nullptr ? e * C : job.side.starts[e];
        const double* of_expert = state + 3 * e * C;
        for (int64_t c = 0; c < C; ++c) {
            double* to = of_side + start + c;
            add(to[0], to[job.total], to[2 * job.total], of_expert[c], of_expert[C + c], of_expert[2 * C + c]);
        }
    }
}

// Two numbers of each channel from every unit, of_unit(sample, unit, first, second), put together by `add`: three rows of
// the side's channels in `of_side`.
template <class A, class Of, class Add>
Result reduce(const FeatureJob& job, const double*& of_side, Of of_unit, Add add) {
    const Units cut = units_of(job);
    const int64_t C = job.channels;
    const int64_t experts = job.side.expert == nullptr ? 1 : job.side.count;
    const int64_t held = 2 * job.samples * cut.each * C;
    A* parts = static_cast<A*>(scratch(Scratch::partial, size_t(larger(1, held)) * sizeof(A)));
    double* state =
        static_cast<double*>(scratch(Scratch::packed, size_t(3 * experts * C + 3 * job.total) * sizeof(double)));
    if (parts == nullptr || state == nullptr) return Result::out_of_memory;
    const Result result = for_units(job, cut, [&](int64_t v, int64_t unit, int64_t u) {
        return of_unit(cut, v, unit, parts + 2 * u * C, parts + (2 * u + 1) * C);
    });
    if (result == Result::ok) combine(job, cut, parts, state, add);
    of_side = state + 3 * experts * C;
    return result;
}

template <class T, class A>
Result feature_moments(const FeatureJob& job) {
    const double* of_side = nullptr;
    // Chan, Golub and LeVeque (1979): means and centred squares of two sets to those of both
    const Result result = reduce<A>(
        job, of_side,
        [&](const Units& cut, int64_t v, int64_t unit, A* mean, A* square) {
            return moments_unit<T, A>(job, cut, v, unit, mean, square);
        },
        [](double& mean, double& square, double& count, double its_mean, double its_square, double its_count) {
            if (its_count == 0) return;
            const double all = count + its_count, distance = its_mean - mean;
            mean += distance * (its_count / all);
            square += its_square + distance * distance * (count * its_count / all);
            count = all;
        });
    for (int64_t i = 0; i < job.total && result == Result::ok; ++i) {
        const double count = of_side[2 * job.total + i];
        static_cast<A*>(job.first)[i] = A(of_side[i]);
        static_cast<A*>(job.second)[i] = A(of_side[job.total + i] / (count > 0 ? count : 1));
        static_cast<A*>(job.third)[i] = A(count);
    }
    return result;
}

template <class T, class A>
Result feature_sums(const FeatureJob& job) {
    const double* of_side = nullptr;
    const Result result = reduce<A>(
        job, of_side,
        [&](const Units& cut, int64_t v, int64_t unit, A* sum, A* product) {
            return sums_unit<T, A>(job, cut, v, unit, sum, product);
        },
        [](double& sum, double& product, double&, double its_sum, double its_product, double) {
            sum += its_sum;
            product += its_product;
        });
    for (int64_t i = 0; i < job.total && result == Result::ok; ++i) {
        static_cast<A*>(job.first)[i] = A(of_side[i]);
        static_cast<A*>(job.second)[i] = A(of_side[job.total + i]);
    }
    return result;
}

// --- <x[v], grad[v]> --------------------------------------------------------------------------------------------------

template <class T, class A>
double dot_part(const T* a, const T* b, int64_t n) {
    constexpr int64_t kLanes = 64;
    A sums[kLanes] = {};
    int64_t at = 0;
    for (; at + kLanes <= n; at += kLanes) {
        for (int64_t i = 0; i < kLanes; ++i) sums[i] += A(to_acc(a[at + i])) * A(to_acc(b[at + i]));
    }
    for (int64_t i = 0; at + i < n; ++i) sums[i] += A(to_acc(a[at + i])) * A(to_acc(b[at + i]));
    double total = 0;
    for (int64_t i = 0; i < kLanes; ++i) total += double(sums[i]);
    return total;
}

template <class T, class A>
Result feature_dot(const FeatureJob& job) {
    const int64_t size = job.pixels * job.channels, units = ceil_div(size, kUnitElements);
    double* parts =
        static_cast<double*>(scratch(Scratch::partial, size_t(larger(1, job.samples * units)) * sizeof(double)));
    if (parts == nullptr) return Result::out_of_memory;
    const T* a = static_cast<const T*>(job.x);
    const T* b = static_cast<const T*>(job.grad);
#pragma omp parallel for schedule(static) num_threads(job.threads) if (job.threads > 1 && job.samples * units > 1)
    for (int64_t u = 0; u < job.samples * units; ++u) {
        const int64_t from = u % units * kUnitElements, at = u / units * size + from;
        parts[u] = dot_part<T, A>(a + at, b + at, smaller(kUnitElements, size - from));
    }
    for (int64_t v = 0; v < job.samples; ++v) {
        double total = 0;
        for (int64_t unit = 0; unit < units; ++unit) total += parts[v * units + unit];
        static_cast<A*>(job.first)[v] = A(total);
    }
    return Result::ok;
}

template <class T, class A>
Result feature_kernel(FeatureKernel kernel, const FeatureJob& job) {
    switch (kernel) {
        case FeatureKernel::map:
            return feature_map<T, A>(job);
        case FeatureKernel::moments:
            return feature_moments<T, A>(job);
        case FeatureKernel::sums:
            return feature_sums<T, A>(job);
        default:
            return feature_dot<T, A>(job);
    }
}

}  // namespace
}  // namespace moe::cpu
