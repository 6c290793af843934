// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/feature_maps.h"
#include "fuzz/cases.h"
#include "fuzz/fuzz.h"

namespace moe::fuzz {

namespace {

using cpu::FeatureJob;
using cpu::FeatureKernel;

// The job's pointers point to buffers of the same names.
struct Case {
    DType dtype;
    FeatureKernel kernel;
    FeatureJob job{};
    std::vector<int64_t> expert, starts;
    std::unique_ptr<Buffer> x, grad, residual, scale, mean, shift, grad_scale, kept_shift, pooled_grad, y, first, second,
        third;

    int64_t start(int64_t v) const {
        if (job.side.expert == nullptr) return 0;
        return starts.empty() ? expert[size_t(v)] * job.channels : starts[size_t(expert[size_t(v)])];
    }
    int64_t at(int64_t v, int64_t p, int64_t c) const { return (v * job.pixels + p) * job.channels + c; }
};

[[noreturn]] void fail(const Case& c, const std::string& what) {
    const FeatureJob& j = c.job;
    throw std::runtime_error(what + ": kernel " + std::to_string(int(c.kernel)) + " dtype " +
                             std::to_string(int(c.dtype)) + " samples " + std::to_string(j.samples) + " pixels " +
                             std::to_string(j.pixels) + " channels " + std::to_string(j.channels) + " total " +
                             std::to_string(j.total) + " slices " + std::to_string(j.side.count) + " relu " +
                             std::to_string(j.relu) + " threads " + std::to_string(j.threads));
}

void require_close(const Case& c, const char* what, double got, const Sum& expected, int roundings) {
    if (!close(c.dtype, got, expected, roundings))
        fail(c, std::string(what) + " " + std::to_string(got) + ", expected " + std::to_string(expected.value));
}

void make(Case& c) {
    const DType dtypes[] = {DType::float32, DType::float32, DType::float64, DType::bfloat16, DType::float16};
    c.dtype = dtypes[between(0, 4)];
    c.kernel = FeatureKernel(between(0, 3));
    FeatureJob& j = c.job;
    j.samples = between(0, 6);
    j.channels = one_in(2) ? 8 * between(1, 8) : between(1, 70);
    j.pixels = one_in(8) ? between(200, 1200) : between(0, 70);  // the former in several units
    j.threads = int(between(1, 3));
    Side& side = j.side;
    make_side(side, c.expert, c.starts, j.total, j.channels, j.samples, one_in(3) || c.kernel == FeatureKernel::dot);
    const DType acc = accumulator(c.dtype);
    const int64_t numel = j.samples * j.pixels * j.channels;
    const auto features = [&](std::unique_ptr<Buffer>& to, const void*& pointer, DType dtype, int64_t count) {
        to = std::make_unique<Buffer>(dtype, count, true);
        pointer = to->data();
    };
    const auto result = [&](std::unique_ptr<Buffer>& to, void*& pointer, DType dtype, int64_t count) {
        to = std::make_unique<Buffer>(dtype, count, false);
        pointer = to->data();
    };
    features(c.x, j.x, c.dtype, numel);
    if (c.kernel == FeatureKernel::dot) {
        features(c.grad, j.grad, c.dtype, numel);
        result(c.first, j.first, acc, j.samples);
        return;
    }
    if (c.kernel == FeatureKernel::moments) {
        result(c.first, j.first, acc, j.total), result(c.second, j.second, acc, j.total);
        result(c.third, j.third, acc, j.total);
        return;
    }
    const bool sums = c.kernel == FeatureKernel::sums, backward = sums || one_in(2);
    j.relu = one_in(2);
    if (sums || one_in(2)) features(c.mean, j.mean, acc, j.total);
    if (backward) {
        const int64_t which = between(0, 2);
        if (which != 0) features(c.grad, j.grad, c.dtype, numel);
        if (which != 1) features(c.pooled_grad, j.pooled_grad, acc, j.samples * j.channels);
    }
    if (sums) {
        if (j.relu) features(c.grad_scale, j.grad_scale, acc, j.total);
        if (j.relu && one_in(2)) features(c.kept_shift, j.kept_shift, acc, j.total);
        result(c.first, j.first, acc, j.total), result(c.second, j.second, acc, j.total);
        return;
    }
    result(c.y, j.y, c.dtype, numel);
    if (backward) {
        if (!j.relu || one_in(2)) features(c.grad_scale, j.grad_scale, acc, j.total);
        if (c.grad_scale != nullptr && one_in(2)) features(c.kept_shift, j.kept_shift, acc, j.total);
        if (c.grad_scale != nullptr && one_in(2)) features(c.scale, j.scale, acc, j.total);
        if (c.scale != nullptr && one_in(2)) features(c.shift, j.shift, acc, j.total);
        return;
    }
    if (!j.relu || one_in(2)) features(c.scale, j.scale, acc, j.total);
    if (c.scale != nullptr && one_in(2)) features(c.shift, j.shift, acc, j.total);
    if (c.scale != nullptr && j.relu && one_in(2)) features(c.residual, j.residual, c.dtype, numel);
    if (j.relu && one_in(2)) result(c.first, j.first, acc, j.samples * j.channels);
}

double value(const std::unique_ptr<Buffer>& values, int64_t at) { return values == nullptr ? 0 : values->get(at); }

// The gradient of the map's result, 0 where ReLU gave nothing.
double through(const Case& c, int64_t v, int64_t p, int64_t ch) {
    const FeatureJob& j = c.job;
    const int64_t at = c.at(v, p, ch), of_side = c.start(v) + ch;
    const double x = c.x->get(at);
    const double kept = c.grad_scale == nullptr
                            ? x
                            : c.grad_scale->get(of_side) * (x - value(c.mean, of_side)) + value(c.kept_shift, of_side);
    if (j.relu && kept <= 0) return 0;
    return value(c.grad, at) + value(c.pooled_grad, v * j.channels + ch) / double(j.pixels);
}

void expect_map(const Case& c) {
    const FeatureJob& j = c.job;
    const bool backward = c.grad != nullptr || c.pooled_grad != nullptr;
    for (int64_t v = 0; v < j.samples; ++v) {
        for (int64_t ch = 0; ch < j.channels; ++ch) {
            const int64_t of_side = c.start(v) + ch;
            Sum means;
            for (int64_t p = 0; p < j.pixels; ++p) {
                const int64_t at = c.at(v, p, ch);
                const double above = c.x->get(at) - value(c.mean, of_side);
                Sum y;
                if (backward) {
                    y.add((c.grad_scale == nullptr ? 1 : c.grad_scale->get(of_side)) * through(c, v, p, ch));
                    y.add(value(c.scale, of_side) * above), y.add(value(c.shift, of_side));
                } else {
                    y.add(c.scale == nullptr ? c.x->get(at) : c.scale->get(of_side) * above);
                    y.add(value(c.shift, of_side)), y.add(value(c.residual, at));
                    if (j.relu && y.value < 0) y.value = 0;
                }
                means.add(y.value / double(j.pixels));
                require_close(c, "y", c.y->get(at), y, 2);
            }
            means.magnitude *= 1 + double(j.pixels) / 64;
            if (j.pixels == 0 && c.first != nullptr && !std::isnan(c.first->get(v * j.channels + ch)))
                fail(c, "a mean of no pixels");
            if (j.pixels > 0 && c.first != nullptr) require_close(c, "mean", c.first->get(v * j.channels + ch), means, 1);
        }
    }
}

void expect_reduced(const Case& c) {
    const FeatureJob& j = c.job;
    const bool moments = c.kernel == FeatureKernel::moments;
    for (int64_t side = 0; side < j.total; ++side) {
        Sum sum, product;
        double count = 0;
        const auto each = [&](const auto& f) {
            for (int64_t v = 0; v < j.samples; ++v) {
                const int64_t ch = side - c.start(v);
                for (int64_t p = 0; ch >= 0 && ch < j.channels && p < j.pixels; ++p) f(v, p, ch);
            }
        };
        each([&](int64_t v, int64_t p, int64_t ch) {
            const double x = c.x->get(c.at(v, p, ch));
            sum.add(moments ? x : through(c, v, p, ch));
            product.add(moments ? 0 : through(c, v, p, ch) * (x - value(c.mean, side)));
            ++count;
        });
        if (moments && count > 0) {
            sum.value /= count, sum.magnitude /= count;
            each([&](int64_t v, int64_t p, int64_t ch) {
                const double above = c.x->get(c.at(v, p, ch)) - sum.value;
                product.add(above * above / count);
            });
        }
        for (Sum* long_sum : {&sum, &product}) long_sum->magnitude *= 1 + count / 64;  // each addition rounds
        require_close(c, "first", c.first->get(side), sum, 1);
        require_close(c, "second", c.second->get(side), product, 1);
        if (moments && c.third->get(side) != count) fail(c, "another number of values");
    }
}

void expect_dots(const Case& c) {
    const FeatureJob& j = c.job;
    for (int64_t v = 0; v < j.samples; ++v) {
        Sum sum;
        for (int64_t i = v * j.pixels * j.channels; i < (v + 1) * j.pixels * j.channels; ++i)
            sum.add(c.x->get(i) * c.grad->get(i));
        sum.magnitude *= 1 + double(j.pixels * j.channels) / 64;
        require_close(c, "dot", c.first->get(v), sum, 1);
    }
}

void run(Case& c) {
    const std::string error = cpu::features(c.dtype, c.kernel, c.job);
    if (!error.empty()) fail(c, error);
    if (c.kernel == FeatureKernel::map)
        expect_map(c);
    else if (c.kernel == FeatureKernel::dot)
        expect_dots(c);
    else
        expect_reduced(c);
}

// One argument wrong. False where it happens to be right.
bool spoil(Case& c) {
    FeatureJob& j = c.job;
    int64_t* const sizes[] = {&j.samples, &j.pixels, &j.channels, &j.total};
    const bool some = j.samples * j.pixels * j.channels > 0;
    switch (between(0, 8)) {
        case 0:
            *sizes[between(0, 3)] = -between(1, 3);
            return true;
        case 1:
            j.threads = one_in(2) ? int(-between(0, 2)) : cpu::kMaxThreads + int(between(1, 1 << 20));
            return true;
        case 2:
            *sizes[between(0, 2)] = int64_t(1) << between(58, 62);
            return true;
        case 3:
            j.total = j.channels - 1;
            return true;
        case 4:
            if (j.side.count == 0) return false;
            if (j.side.starts != nullptr)
                c.starts[size_t(between(0, j.side.count - 1))] = one_in(2) ? -1 : j.total - j.channels + between(1, 2);
            else
                j.side.count += between(1, 2);
            return true;
        case 5:
            if (j.side.count == 0 || j.samples == 0) return false;
            c.expert[size_t(between(0, j.samples - 1))] = one_in(2) ? -1 : j.side.count + between(0, 2);
            return true;
        case 6:
            if (!some) return false;
            (c.kernel == FeatureKernel::map ? j.y : j.first) = nullptr;
            return true;
        case 7:  // a result over the samples' experts
            if (c.kernel != FeatureKernel::map || !some || j.side.count == 0 ||
                j.pixels * j.channels * size_of(c.dtype) < int64_t(sizeof(int64_t)))
                return false;
            std::memset(j.y, 0, size_t(j.samples) * sizeof(int64_t));  // experts that there are
            j.side.expert = static_cast<const int64_t*>(j.y);
            return true;
        default:  // a result over what it is computed from
            if (!some || size_of(c.dtype) < 4) return false;
            (c.kernel == FeatureKernel::map ? j.y : j.first) = c.x->data();
            return true;
    }
}

void run_wrong(Case& c) {
    if (spoil(c) && cpu::features(c.dtype, c.kernel, c.job).empty()) fail(c, "wrong arguments were taken");
}

}  // namespace

std::string features(uint64_t seed, int64_t first, int64_t cases) {
    int64_t wrong = 0;
    for_cases(seed, first, cases, [&] {
        Case c;
        make(c);
        const bool spoiled = one_in(5);
        wrong += spoiled;
        spoiled ? run_wrong(c) : run(c);
    });
    return std::to_string(cases) + " cases, " + std::to_string(wrong) + " with a wrong argument";
}

}  // namespace moe::fuzz
