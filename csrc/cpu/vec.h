// SPDX-License-Identifier: Apache-2.0
// Vectors as the compiler's own vector types, so that one source serves every instruction set. This header is compiled
// with different flags into one library: everything lives in an unnamed namespace, and nothing from the standard
// library's templates is used, lest the linker keep a wide copy for a narrow machine.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define MOE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define MOE_VECTOR_BYTES 32
#else
#define MOE_VECTOR_BYTES 16
#endif

// Vector registers; the sizes of register tiles follow from them.
#if defined(__AVX512F__) || defined(__aarch64__)
#define MOE_REGISTERS 32
#else
#define MOE_REGISTERS 16
#endif

namespace moe::cpu {
namespace {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

inline float to_acc(float v) { return v; }
inline double to_acc(double v) { return v; }
inline float to_acc(bfloat16 v) {
    const uint32_t wide = uint32_t(v.bits) << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
}
inline float to_acc(float16 v) {
    const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16;
    const uint32_t exponent = (v.bits >> 10) & 0x1fu;
    const uint32_t mantissa = v.bits & 0x3ffu;
    float f;
    if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, exact in float32
        f = float(mantissa) * 5.9604644775390625e-8f;
        return sign != 0 ? -f : f;
    }
    const uint32_t wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
    std::memcpy(&f, &wide, 4);
    return f;
}

template <class T>
T from_acc(float v);
template <class T>
T from_acc(double v);
template <>
inline float from_acc<float>(float v) {
    return v;
}
template <>
inline double from_acc<double>(double v) {
    return v;
}
template <>
inline bfloat16 from_acc<bfloat16>(float v) {
    uint32_t wide;
    std::memcpy(&wide, &v, 4);
    if ((wide & 0x7fffffffu) > 0x7f800000u) return {uint16_t((wide >> 16) | 0x40u)};  // NaN stays NaN
    return {uint16_t((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16)};                  // to nearest, ties to even
}
template <>
inline float16 from_acc<float16>(float v) {
    uint32_t wide;
    std::memcpy(&wide, &v, 4);
    const uint16_t sign = uint16_t((wide >> 16) & 0x8000u);
    wide &= 0x7fffffffu;
    if (wide > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
    if (wide >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to infinity
    if (wide < 0x38800000u) {                                    // subnormal: add so that the unit is 2^-24
        float f;
        std::memcpy(&f, &wide, 4);
        f += 0.5f;
        std::memcpy(&wide, &f, 4);
        return {uint16_t(sign | (wide - 0x3f000000u))};
    }
    const uint32_t rounded = wide - 0x38000000u + 0xfffu + ((wide >> 13) & 1u);
    return {uint16_t(sign | (rounded >> 13))};
}

template <class A>
struct Vec;
template <>
struct Vec<float> {
    typedef float type __attribute__((vector_size(MOE_VECTOR_BYTES)));
    typedef float loose __attribute__((vector_size(MOE_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct Vec<double> {
    typedef double type __attribute__((vector_size(MOE_VECTOR_BYTES)));
    typedef double loose __attribute__((vector_size(MOE_VECTOR_BYTES), aligned(8), may_alias));
};

template <class A>
constexpr int lanes = MOE_VECTOR_BYTES / int(sizeof(A));

// Output channels that a register tile holds: two vectors.
constexpr int kVectors = 2;
template <class A>
constexpr int panel = kVectors * lanes<A>;

template <class A>
inline typename Vec<A>::type load(const A* p) {
    return *reinterpret_cast<const typename Vec<A>::loose*>(p);
}
template <class A>
inline void store(A* p, typename Vec<A>::type v) {
    *reinterpret_cast<typename Vec<A>::loose*>(p) = v;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace moe::cpu
