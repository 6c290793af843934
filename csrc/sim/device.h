// SPDX-License-Identifier: Apache-2.0
// The names of cuda/device.h for the host: kernels run on sim/simulator.h, which checks every access. The last argument
// of what may fail is the place of the call, for messages; kernels leave it out.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "cuda/status.h"
#include "sim/simulator.h"

#define MOE_GPU cuda_sim
#define MOE_ENTRY(name) moe_cuda_sim_##name
#define MOE_DEVICE inline
#define MOE_HOST_DEVICE inline
#define MOE_KERNEL(threads, blocks) inline void
#define MOE_UNROLL

namespace moe::MOE_GPU::device {

using sim::here;
using sim::Place;

// --- element types ----------------------------------------------------------------------------------------------------

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};
struct tf32 {};

MOE_DEVICE float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}
namespace details {
inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}
}  // namespace details

MOE_DEVICE float to_float(float x) { return x; }
MOE_DEVICE float to_float(bfloat16 x) { return float_of(uint32_t(x.bits) << 16); }
MOE_DEVICE float to_float(float16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
    const uint32_t exponent = (x.bits >> 10) & 0x1fu;
    const uint32_t mantissa = x.bits & 0x3ffu;
    if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, exact in float32
        const float y = float(mantissa) * 5.9604644775390625e-8f;
        return sign != 0 ? -y : y;
    }
    return float_of(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13));
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {
    const uint32_t wide = details::bits_of(x);
    if ((wide & 0x7fffffffu) > 0x7f800000u) return {uint16_t(0x7fffu)};
    return {uint16_t((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16)};  // to nearest, ties to even
}
template <>
inline float16 from_float<float16>(float x) {
    uint32_t wide = details::bits_of(x);
    const uint16_t sign = uint16_t((wide >> 16) & 0x8000u);
    wide &= 0x7fffffffu;
    if (wide > 0x7f800000u) return {uint16_t(0x7fffu)};
    if (wide >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to infinity
    if (wide < 0x38800000u)
        return {uint16_t(sign | (details::bits_of(float_of(wide) + 0.5f) - 0x3f000000u))};  // subnormal
    const uint32_t rounded = wide - 0x38000000u + 0xfffu + ((wide >> 13) & 1u);
    return {uint16_t(sign | (rounded >> 13))};
}

MOE_DEVICE uint32_t to_tf32(uint32_t bits) {
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fffffffu;
    if (magnitude == 0x7f800000u) return bits;
    return (bits + 0x1000u) & ~0x1fffu;
}

MOE_DEVICE float not_a_number() { return float_of(0x7fc00000u); }
MOE_DEVICE float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
MOE_DEVICE float exponential(float x) { return std::exp(x); }
MOE_DEVICE float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }
MOE_HOST_DEVICE uint32_t high_product(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    T v[N];
};

// --- where a thread is ------------------------------------------------------------------------------------------------

MOE_DEVICE int block_x() { return sim::current->state->block[0]; }
MOE_DEVICE int block_y() { return sim::current->state->block[1]; }
MOE_DEVICE int block_z() { return sim::current->state->block[2]; }
MOE_DEVICE int thread() { return sim::current->index; }
MOE_DEVICE int threads() { return sim::current->state->start.threads; }
MOE_DEVICE int lane() { return sim::current->lane; }
MOE_DEVICE int warp() { return sim::current->index / sim::kLanes; }

// --- memory -----------------------------------------------------------------------------------------------------------

template <class T>
struct Global {
    T* base;
    int64_t count;     // elements from base on
    int64_t position;  // where index 0 is; may be anywhere, only accesses are checked
    const char* name;

    T load(int64_t i, Place place = here()) const { return *access("reads", i, place); }
    void store(int64_t i, T value, Place place = here()) const { *access("writes", i, place) = value; }
    template <int N>
    Vector<std::remove_const_t<T>, N> load_vector(int64_t i, Place place = here()) const {
        Vector<std::remove_const_t<T>, N> value;
        std::memcpy(&value, vector<N>("reads", i, place), sizeof(value));
        return value;
    }
    template <int N>
    void store_vector(int64_t i, const Vector<T, N>& value, Place place = here()) const {
        std::memcpy(vector<N>("writes", i, place), &value, sizeof(value));
    }
    T load_of_others(int64_t i, Place place = here()) const { return *access("reads", i, place); }
    Global at(int64_t offset) const { return {base, count, position + offset, name}; }
    bool given() const { return base != nullptr; }

    T* access(const char* does, int64_t i, Place place) const {
        i += position;
        if (sim::current->early) sim::fail_early(place, does, name);
        if (uint64_t(i) >= uint64_t(count)) sim::fail_bounds(place, does, i, 1, name, count);
        return base + i;
    }
    template <int N>
    T* vector(const char* does, int64_t i, Place place) const {
        i += position;
        if (sim::current->early) sim::fail_early(place, does, name);
        if (i < 0 || i > count - N) sim::fail_bounds(place, does, i, N, name, count);
        at(i - position).aligned(does, N, place);
        return base + i;
    }
    // That N elements from index 0 on lie aligned; whether there are so many is not asked.
    void aligned(const char* does, int n, Place place) const {
        const uint64_t bytes = uint64_t(n) * sizeof(T);
        if ((uint64_t(reinterpret_cast<uintptr_t>(base)) + uint64_t(position) * sizeof(T)) % bytes != 0) {
            sim::fail_alignment(place, does, position, name, int(bytes));
        }
    }
};

// A null pointer has no elements, whatever was said.
template <class T>
Global<T> global(T* p, int64_t count, const char* name) {
    return {p, p == nullptr || count < 0 ? 0 : count, 0, name};
}
template <class T>
Global<T> global(void* p, int64_t count, const char* name) {
    return global(static_cast<T*>(p), count, name);
}
template <class T>
Global<const T> global(const void* p, int64_t count, const char* name) {
    return global(static_cast<const T*>(p), count, name);
}

template <class T>
struct Shared {
    static_assert(sizeof(T) % 2 == 0, "accesses are tracked for each two bytes");
    int offset;  // of element 0, in bytes
    int count;
    int position;

    T load(int i, Place place = here()) const {
        const int byte = check("reads", i, 1, sizeof(T), place);
        sim::read_shared(byte, sizeof(T), place);
        T value;
        std::memcpy(&value, memory() + byte, sizeof(value));
        return value;
    }
    void store(int i, T value, Place place = here()) const {
        const int byte = check("writes", i, 1, sizeof(T), place);
        sim::write_shared(byte, sizeof(T), place);
        std::memcpy(memory() + byte, &value, sizeof(value));
    }
    template <int N>
    Vector<T, N> load_vector(int i, Place place = here()) const {
        const int byte = check("reads", i, N, N * sizeof(T), place);
        sim::read_shared(byte, N * sizeof(T), place);
        Vector<T, N> value;
        std::memcpy(&value, memory() + byte, sizeof(value));
        return value;
    }
    template <int N>
    void store_vector(int i, const Vector<T, N>& value, Place place = here()) const {
        const int byte = check("writes", i, N, N * sizeof(T), place);
        sim::write_shared(byte, N * sizeof(T), place);
        std::memcpy(memory() + byte, &value, sizeof(value));
    }
    Shared at(int elements) const { return {offset, count, position + elements}; }

    static unsigned char* memory() { return sim::current->state->memory; }
    // The first byte of n elements from i on.
    int check(const char* does, int i, int n, int alignment, Place place) const {
        i += position;
        if (i < 0 || i > count - n) sim::fail_bounds(place, does, i, n, "shared memory", count);
        const int byte = offset + i * int(sizeof(T));
        if (byte % alignment != 0) sim::fail_alignment(place, does, i, "shared memory", alignment);
        return byte;
    }
};

template <class T>
Shared<T> shared(int offset, int count, Place place = here()) {
    const int bytes = sim::current->state->start.shared_bytes;
    if (offset < 0 || count < 0 || int64_t(offset) + int64_t(count) * int64_t(sizeof(T)) > bytes) {
        sim::fail(place, "places %d elements of %d bytes at byte %d of shared memory, which has %d bytes", count,
                  int(sizeof(T)), offset, bytes);
    }
    if (offset % int(alignof(T)) != 0) sim::fail_alignment(place, "places", 0, "shared memory", int(alignof(T)));
    return {offset, count, 0};
}

// Blocks run one after the other, so that this is one.
MOE_DEVICE int atomic_add(Global<int> where, int64_t i, int value, Place place = here()) {
    int* const p = where.access("adds to", i, place);
    const int before = *p;
    *p = int(uint32_t(before) + uint32_t(value));
    return before;
}
MOE_DEVICE int atomic_add(Shared<int> where, int i, int value, Place place = here()) {
    const int byte = where.check("adds to", i, 1, sizeof(int), place);
    sim::add_shared(byte, sizeof(int), place);
    int before;
    std::memcpy(&before, where.memory() + byte, sizeof(before));
    const int after = int(uint32_t(before) + uint32_t(value));
    std::memcpy(where.memory() + byte, &after, sizeof(after));
    return before;
}
MOE_DEVICE void fence() {}

// --- barriers and warps -----------------------------------------------------------------------------------------------

MOE_DEVICE void sync_threads(Place place = here()) { sim::sync_threads(place); }
MOE_DEVICE void sync_warp(Place place = here()) { sim::sync_warp(place); }

namespace details {
// What each lane brought, in the order of lanes. Only until the next collective.
template <class T>
const sim::Slot* exchange(const T& value, sim::Wait what, Place place) {
    static_assert(sizeof(T) <= sizeof(sim::Slot));
    const sim::Thread& me = *sim::current;
    sim::Slot* const slots = me.warp->slots[me.warp->turn];
    std::memcpy(&slots[me.lane], &value, sizeof(value));
    sim::collect(what, place);
    return slots;
}
template <class T>
T taken(const sim::Slot& slot) {
    T value;
    std::memcpy(&value, &slot, sizeof(value));
    return value;
}
}  // namespace details

template <class T>
T shuffle(T value, int from, Place place = here()) {
    return details::taken<T>(details::exchange(value, sim::Wait::shuffle, place)[uint32_t(from) % sim::kLanes]);
}
template <class T>
T shuffle_xor(T value, int mask, Place place = here()) {
    const sim::Slot* const slots = details::exchange(value, sim::Wait::shuffle_xor, place);
    const uint32_t from = uint32_t(lane()) ^ uint32_t(mask);
    return from < sim::kLanes ? details::taken<T>(slots[from]) : value;
}
MOE_DEVICE uint32_t ballot(bool value, Place place = here()) {
    const sim::Slot* const slots = details::exchange(uint32_t(value), sim::Wait::ballot, place);
    uint32_t mask = 0;
    for (int i = 0; i < sim::kLanes; ++i) mask |= slots[i].word[0] << i;
    return mask;
}
MOE_DEVICE uint32_t match_any(int value, Place place = here()) {
    const sim::Slot* const slots = details::exchange(uint32_t(value), sim::Wait::match_any, place);
    uint32_t mask = 0;
    for (int i = 0; i < sim::kLanes; ++i) mask |= uint32_t(slots[i].word[0] == uint32_t(value)) << i;
    return mask;
}
MOE_DEVICE int population(uint32_t bits) { return __builtin_popcount(bits); }

// --- asynchronous copies ----------------------------------------------------------------------------------------------

template <class T>
void copy_async(Shared<T> to, Global<const T> from, bool inside, Place place = here()) {
    constexpr int n = sim::kCopyBytes / int(sizeof(T));
    const int byte = to.check("copies to", 0, n, sim::kCopyBytes, place);
    from.aligned("copies from", n, place);  // a device wants that of an address that it does not read, too
    sim::start_copy(byte, inside ? from.template vector<n>("copies from", 0, place) : nullptr, place);
}
MOE_DEVICE void commit_copies() { ++sim::current->groups; }
template <int N>
void wait_copies() {
    sim::wait_copies(N);
}

// --- matrix unit ------------------------------------------------------------------------------------------------------

namespace details {
// The row of matrix m that lane 8 m + r brought is its row r.
template <class T>
const sim::Slot* exchange_rows(Shared<T> row, sim::Wait what, Place place) {
    const int byte = row.check("reads", 0, 16 / int(sizeof(T)), 16, place);
    sim::read_shared(byte, 16, place);
    sim::Slot bytes;
    std::memcpy(&bytes, row.memory() + byte, sizeof(bytes));
    return exchange(bytes, what, place);
}
}  // namespace details

template <class T>
void load_matrices(uint32_t (&r)[4], Shared<T> row, Place place = here()) {
    const sim::Slot* const rows = details::exchange_rows(row, sim::Wait::load_matrices, place);
    for (int m = 0; m < 4; ++m) r[m] = rows[8 * m + lane() / 4].word[lane() % 4];
}
template <class T>
void load_matrices_transposed(uint32_t (&r)[4], Shared<T> row, Place place = here()) {
    const sim::Slot* const rows = details::exchange_rows(row, sim::Wait::load_matrices_transposed, place);
    const int column = lane() / 4, shift = 16 * (column % 2);
    for (int m = 0; m < 4; ++m) {
        const sim::Slot* const pair = rows + 8 * m + 2 * (lane() % 4);
        const uint32_t low = pair[0].word[column / 2] >> shift, high = pair[1].word[column / 2] >> shift;
        r[m] = (low & 0xffffu) | (high << 16);
    }
}

namespace details {
// Each lane brings its fragments, as floats, to their places in the matrices; the last one multiplies.
template <class Fill>
void multiply_together(float (&d)[4], int k, sim::Wait what, Place place, Fill fill) {
    const sim::Thread& me = *sim::current;
    sim::Product& all = me.warp->products[me.warp->turn];
    const int group = me.lane / 4, pair = 2 * (me.lane % 4);
    fill(all, group, me.lane % 4);
    std::memcpy(&all.c[group][pair], d, 8);
    std::memcpy(&all.c[group + 8][pair], d + 2, 8);
    if (sim::arrive(what, place)) {
        sim::multiply(all, k);
        sim::release_warp();
    } else {
        sim::wait();
    }
    std::memcpy(d, &all.c[group][pair], 8);
    std::memcpy(d + 2, &all.c[group + 8][pair], 8);
}
template <class T>
void multiply_halves(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], sim::Wait what, Place place) {
    multiply_together(d, 16, what, place, [&](sim::Product& all, int group, int quad) {
        for (int r = 0; r < 4; ++r) {
            float* const to = &all.a[group + r % 2 * 8][2 * quad + r / 2 * 8];
            to[0] = to_float(T{uint16_t(a[r])});
            to[1] = to_float(T{uint16_t(a[r] >> 16)});
        }
        for (int r = 0; r < 2; ++r) {
            all.b[2 * quad + 8 * r][group] = to_float(T{uint16_t(b[r])});
            all.b[2 * quad + 8 * r + 1][group] = to_float(T{uint16_t(b[r] >> 16)});
        }
    });
}
}  // namespace details

MOE_DEVICE void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16,
                                    Place place = here()) {
    details::multiply_halves<bfloat16>(d, a, b, sim::Wait::multiply_bfloat16, place);
}
MOE_DEVICE void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float16,
                                    Place place = here()) {
    details::multiply_halves<float16>(d, a, b, sim::Wait::multiply_float16, place);
}
MOE_DEVICE void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], tf32,
                                    Place place = here()) {
    constexpr uint32_t read = 0xffffe000u;  // the unit leaves the other bits out
    details::multiply_together(d, 8, sim::Wait::multiply_tf32, place, [&](sim::Product& all, int group, int quad) {
        for (int r = 0; r < 4; ++r) all.a[group + r % 2 * 8][quad + r / 2 * 4] = float_of(a[r] & read);
        for (int r = 0; r < 2; ++r) all.b[quad + 4 * r][group] = float_of(b[r] & read);
    });
}

// --- one kernel after another -----------------------------------------------------------------------------------------

MOE_DEVICE void wait_for_previous() {
    sim::current->early = false;
    sim::current->state->waited_for_previous = true;
}
MOE_DEVICE void allow_next() {}

// --- the host's side --------------------------------------------------------------------------------------------------

class DeviceGuard {
  public:
    explicit DeviceGuard(int) {}
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    Status status;
};

inline Status allocate_zeros(void** p, size_t bytes, void*) {
    *p = std::calloc(bytes, 1);
    Status status;
    if (!*p) {
        status.code = StatusCode::device_error;
        std::snprintf(status.message, sizeof(status.message), "out of memory: %zu bytes", bytes);
    }
    return status;
}

template <auto kernel>
Status loadable() {
    return {};
}

struct Grid {
    int64_t x = 1, y = 1, z = 1;
};

struct Launch {
    const char* name;
    Grid grid;
    int threads;
    int shared_bytes;
    int device;
    void* stream;
    bool overlap;
};

// Returns when the grid has run.
template <auto kernel, class Params>
Status launch(const Launch& how, const Params& params) {
    const auto body = [](const void* p) { kernel(*static_cast<const Params*>(p)); };
    return sim::run(
        {how.name, {how.grid.x, how.grid.y, how.grid.z}, how.threads, how.shared_bytes, how.overlap, body, &params});
}

}  // namespace moe::MOE_GPU::device
