// SPDX-License-Identifier: Apache-2.0
// What random calls are made of: numbers, buffers beside pages that nothing may touch, and what a sum may differ by.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <exception>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/conv2d.h"
#include "cpu/checks.h"

namespace moe::fuzz {

using cpu::size_of;

inline thread_local std::mt19937_64* source;  // where it points: a module's own thread-local memory is scarce

inline int64_t between(int64_t low, int64_t high) { return low + int64_t((*source)() % uint64_t(high - low + 1)); }
inline bool one_in(int64_t n) { return between(1, n) == 1; }
inline double number() { return double(between(-64, 64)) / 64; }  // exact in every element type

inline uint16_t to_bits(DType dtype, double value) {  // of multiples of 1 / 64 up to 1 in magnitude
    const uint16_t sign = value < 0 ? 0x8000 : 0;
    value = std::fabs(value);
    if (value == 0) return sign;
    int exponent;
    const double fraction = std::frexp(value, &exponent) * 2 - 1;  // value = (1 + fraction) * 2^(exponent - 1)
    if (dtype == DType::float16) return uint16_t(sign | (exponent + 14) << 10 | int(fraction * 1024));
    return uint16_t(sign | (exponent + 126) << 7 | int(fraction * 128));
}

inline double from_bits(DType dtype, uint16_t bits) {
    const double sign = bits & 0x8000 ? -1 : 1;
    const bool half = dtype == DType::float16;
    const int mantissa = half ? 10 : 7, bias = half ? 15 : 127;
    const int exponent = (bits & 0x7fff) >> mantissa;
    const double fraction = double(bits & ((1 << mantissa) - 1)) / (1 << mantissa);
    if (exponent == (half ? 31 : 255)) return fraction != 0 ? NAN : sign * INFINITY;
    return sign * (exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, exponent - bias));
}

// Elements in pages of their own, between two that nothing may touch: up to the last byte, or from the first on, and
// before the next buffer so many bytes more. What is to be written begins as NaN.
class Buffer {
  public:
    Buffer(DType dtype, int64_t count, bool filled, size_t more = 0) : dtype_(dtype) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = size_t(count * size_of(dtype));
        const size_t usable = (bytes + page - 1) / page * page;
        size_ = usable + 2 * page + more;
        pages_ = static_cast<char*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (pages_ == MAP_FAILED || (usable > 0 && mprotect(pages_ + page, usable, PROT_READ | PROT_WRITE)))
            throw std::bad_alloc();
        data_ = pages_ + page + (one_in(4) ? 0 : usable - bytes);
        for (int64_t i = 0; i < count; ++i) set(i, filled ? number() : NAN);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { munmap(pages_, size_); }

    void* data() { return data_; }
    double get(int64_t i) {
        if (dtype_ == DType::float64) return static_cast<double*>(data())[i];
        if (dtype_ == DType::float32) return double(static_cast<float*>(data())[i]);
        return from_bits(dtype_, static_cast<uint16_t*>(data())[i]);
    }

  private:
    void set(int64_t i, double value) {
        if (dtype_ == DType::float64)
            static_cast<double*>(data())[i] = value;
        else if (dtype_ == DType::float32)
            static_cast<float*>(data())[i] = float(value);
        else
            static_cast<uint16_t*>(data())[i] = value == value ? to_bits(dtype_, value) : uint16_t(0x7fff);
    }

    DType dtype_;
    size_t size_;
    char *pages_, *data_;
};

inline DType accumulator(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

// One side's slices: whole, a partition, or windows anywhere.
inline void make_side(Side& side, std::vector<int64_t>& expert, std::vector<int64_t>& starts, int64_t& total,
                      int64_t width, int64_t samples, bool whole) {
    total = width;
    if (whole) return;
    side.count = between(1, 5);
    if (one_in(2)) {
        total = width + between(0, 2 * width);
        for (int64_t i = 0; i < side.count; ++i) starts.push_back(between(0, total - width));
        side.starts = starts.data();
    } else {
        total = width * side.count;
    }
    for (int64_t v = 0; v < samples; ++v) expert.push_back(between(0, side.count - 1));
    expert.push_back(0);  // so that there is an address without samples too
    side.expert = expert.data();
}

// A sum in double, and the sum of its parts' magnitudes, of which float32 and narrower types lose a share.
struct Sum {
    double value = 0, magnitude = 1e-6;
    void add(double part) { value += part, magnitude += std::fabs(part); }
};

// `roundings`: how often the result was written in the type of the features.
inline bool close(DType dtype, double got, const Sum& expected, int roundings) {
    const double eps[] = {1.2e-7, 2.3e-16, 7.9e-3, 9.8e-4};
    const double accumulated = dtype == DType::float64 ? 2.3e-16 : 1.2e-7;
    const double bound = (64 * accumulated + roundings * eps[int(dtype)]) * expected.magnitude +
                         (dtype == DType::float64 ? 1e-14 : 1e-7) * roundings;
    return std::fabs(got - expected.value) <= bound;
}

// Calls f() for each case, with a generator of its own. What it throws says which case it was.
template <class F>
void for_cases(uint64_t seed, int64_t first, int64_t cases, const F& f) {
    for (int64_t i = first; i < first + cases; ++i) {
        std::mt19937_64 generator(seed * 1000003 + uint64_t(i));
        source = &generator;
        try {
            f();
        } catch (const std::exception& error) {
            throw std::runtime_error("seed " + std::to_string(seed) + ", case " + std::to_string(i) + ": " +
                                     error.what());
        }
    }
}

}  // namespace moe::fuzz
