// SPDX-License-Identifier: Apache-2.0
// Squares of numbers turned in registers: between weights, where an output channel's numbers lie together, and packed
// blocks, where the lanes of a vector are output channels.
#pragma once

#include "cpu/vec.h"

namespace moe::cpu {
namespace {

template <class A>
struct Mask;
template <>
struct Mask<float> {
    typedef int32_t type __attribute__((vector_size(MOE_VECTOR_BYTES)));
};
template <>
struct Mask<double> {
    typedef int64_t type __attribute__((vector_size(MOE_VECTOR_BYTES)));
};

// One step: swaps the off-diagonal squares of size D of every 2D x 2D square.
template <class A, int D>
[[gnu::always_inline]] inline void swap_squares(typename Vec<A>::type (&rows)[lanes<A>]) {
    typedef typename Vec<A>::type V;
    constexpr int L = lanes<A>;
#if !defined(__clang__)
    typename Mask<A>::type low, high;
    for (int j = 0; j < L; ++j) {
        low[j] = (j & D) != 0 ? L + j - D : j;
        high[j] = (j & D) != 0 ? L + j : j + D;
    }
#endif
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
        if ((i & D) != 0) continue;
        const V a = rows[i], b = rows[i + D];
#if defined(__clang__)
        V first, second;
        for (int j = 0; j < L; ++j) {
            first[j] = (j & D) != 0 ? b[j - D] : a[j];
            second[j] = (j & D) != 0 ? b[j] : a[j + D];
        }
        rows[i] = first;
        rows[i + D] = second;
#else
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + D] = __builtin_shuffle(a, b, high);
#endif
    }
}

template <class A>
[[gnu::always_inline]] inline void transpose(typename Vec<A>::type (&rows)[lanes<A>]) {
    constexpr int L = lanes<A>;
    if constexpr (L >= 2) swap_squares<A, 1>(rows);
    if constexpr (L >= 4) swap_squares<A, 2>(rows);
    if constexpr (L >= 8) swap_squares<A, 4>(rows);
    if constexpr (L >= 16) swap_squares<A, 8>(rows);
}

// rows[i] = the i-th of `count` <= L neighbouring numbers of each of L lanes that lie `stride` apart.
template <class A>
[[gnu::always_inline]] inline void load_transposed(const A* from, int64_t stride, int64_t count,
                                                   typename Vec<A>::type (&rows)[lanes<A>]) {
    constexpr int L = lanes<A>;
    if (count == L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) rows[i] = load(from + i * stride);
    } else {
        for (int i = 0; i < L; ++i) {
            typename Vec<A>::type part = {};
            std::memcpy(&part, from + i * stride, size_t(count) * sizeof(A));
            rows[i] = part;
        }
    }
    transpose<A>(rows);
}

// The reverse: `count` numbers of each lane, from rows.
template <class A>
[[gnu::always_inline]] inline void store_transposed(typename Vec<A>::type (&rows)[lanes<A>], A* to, int64_t stride,
                                                    int64_t count) {
    constexpr int L = lanes<A>;
    transpose<A>(rows);
    if (count == L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(to + i * stride, rows[i]);
    } else {
        for (int i = 0; i < L; ++i) std::memcpy(to + i * stride, &rows[i], size_t(count) * sizeof(A));
    }
}

}  // namespace
}  // namespace moe::cpu
