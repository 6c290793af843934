// SPDX-License-Identifier: Apache-2.0
// What the CPU's entry points ask of their arguments before a kernel touches memory. Each returns an empty string, or
// what is wrong.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "common/conv2d.h"

namespace moe::cpu {

// Tensors are addressable in bytes, and positions in images stay far from overflowing.
constexpr int64_t kMaxBytes = int64_t(1) << 60, kMaxSize = int64_t(1) << 31;
constexpr int kMaxThreads = 4096;  // OpenMP ends the process where it cannot make those it is asked for

inline int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : dtype == DType::float64 ? 8 : 2; }
inline int64_t acc_size(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

// Whether so many numbers of 8 bytes are no more than kMaxBytes. Sizes are not negative; 0 counts as 1.
inline bool addressable(std::initializer_list<int64_t> sizes) {
    int64_t bytes = 8;
    for (int64_t size : sizes) {
        if (__builtin_mul_overflow(bytes, size > 1 ? size : 1, &bytes) || bytes > kMaxBytes) return false;
    }
    return true;
}

inline std::string check_threads(int64_t threads) {
    if (threads < 1 || threads > kMaxThreads)
        return "threads: expected 1 .. " + std::to_string(kMaxThreads) + ", got " + std::to_string(threads);
    return {};
}

// Slices of `width` channels among `total`.
inline std::string check_side(const Side& side, int64_t width, int64_t total, const char* name) {
    if (width > total || (side.count == 0 && width != total))
        return std::string(name) + ": " + std::to_string(total) + " channels for slices of " + std::to_string(width);
    if (side.count > 0 && side.starts == nullptr && width > 0 && side.count > total / width)
        return std::string(name) + ": " + std::to_string(side.count) + " slices of " + std::to_string(width) +
               " are more than " + std::to_string(total) + " channels";
    for (int64_t i = 0; side.starts != nullptr && i < side.count; ++i) {
        if (side.starts[i] < 0 || side.starts[i] > total - width)
            return std::string(name) + ": slice " + std::to_string(i) + " of " + std::to_string(width) +
                   " channels from " + std::to_string(side.starts[i]) + " on is outside 0 .. " +
                   std::to_string(total - 1);
    }
    return {};
}

struct Span {
    const void* data;  // null: there is none, as with 0 bytes
    int64_t bytes;
};

// What one task writes another must not read: tasks run in any order.
inline std::string check_apart(Span output, std::initializer_list<Span> inputs) {
    const auto begin = [](const Span& span) { return reinterpret_cast<uintptr_t>(span.data); };
    const auto end = [&](const Span& span) { return begin(span) + uintptr_t(span.bytes); };
    for (const Span& input : inputs) {
        if (input.data != nullptr && input.bytes > 0 && output.bytes > 0 && begin(input) < end(output) &&
            begin(output) < end(input))
            return "output: overlaps what it is computed from, or another output";
    }
    return {};
}

}  // namespace moe::cpu
