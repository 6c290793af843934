// SPDX-License-Identifier: Apache-2.0
// A case is a kernel and a mode: 0 is the correct one, the others are the mistakes that the case's name tells of.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/device.h"
#include "sim/selftest.h"

namespace moe::MOE_GPU {
namespace {

using namespace device;

constexpr int kThreads = 64;

struct Params {
    int mode;
    Global<const float> in;  // [2 * kThreads], 0 1 2 ..
    Global<float> out;       // [2 * kThreads]
    Global<int> counters;    // [4], zero
};

// --- barriers ---------------------------------------------------------------------------------------------------------

enum { correct, no_barrier, warp_barrier };

// Each block: the sum of kThreads values of its own.
MOE_KERNEL(kThreads, 1) reduction(const Params p) {
    const Shared<float> s = shared<float>(16, kThreads);
    s.store(thread(), p.in.load(block_x() * kThreads + thread()));
    for (int n = kThreads / 2; n > 0; n /= 2) {
        if (p.mode == correct) sync_threads();
        if (p.mode == warp_barrier) sync_warp();
        if (thread() < n) s.store(thread(), s.load(thread()) + s.load(thread() + n));
    }
    if (thread() == 0) p.out.store(block_x(), s.load(0));
}

enum { shuffle_for_barrier = 2 };

// Neighbours of a warp exchange values through shared memory.
MOE_KERNEL(kThreads, 1) exchange_in_warp(const Params p) {
    const Shared<float> s = shared<float>(0, kThreads);
    s.store(thread(), p.in.load(thread()));
    if (p.mode == correct) sync_warp();
    if (p.mode == shuffle_for_barrier) shuffle(0, 0);
    p.out.store(thread(), s.load(thread() ^ 1));
}

// Thread 0's value for all.
MOE_KERNEL(kThreads, 1) broadcast(const Params p) {
    const Shared<float> s = shared<float>(0, 4);
    if (thread() == 0) s.store(0, 1);
    if (p.mode == correct) sync_threads();
    if (p.mode == warp_barrier) sync_warp();
    p.out.store(thread(), s.load(0));
}

// Two buffers, each read after the barrier of its step; the next step's barrier is what lets it be written again.
MOE_KERNEL(kThreads, 1) ring(const Params p) {
    const int buffers = p.mode == correct ? 2 : 1;
    const Shared<float> s = shared<float>(0, buffers * kThreads);
    float sum = 0;
    for (int step = 0; step < 4; ++step) {
        const Shared<float> buffer = s.at(step % buffers * kThreads);
        buffer.store(thread(), float(step));
        sync_threads();
        sum += buffer.load((thread() + 1) % kThreads);
    }
    p.out.store(thread(), sum);
}

enum { two_barriers = 1, with_shuffle, after_return };

MOE_KERNEL(kThreads, 1) branch(const Params p) {
    if (p.mode == after_return && thread() < 40) return;  // the others' barrier is one of them only
    if (p.mode == two_barriers && thread() % 2 == 0) {
        sync_threads();
    } else if (p.mode == with_shuffle && lane() < 16) {
        shuffle(1, 0);
    } else {
        sync_threads();
    }
    p.out.store(thread(), 1);
}

enum { lane_returned = 1, lane_returns_later, different_collectives, different_lines };

MOE_KERNEL(kThreads, 1) collective(const Params p) {
    if (p.mode == lane_returned && lane() == 0) return;
    if (p.mode == lane_returns_later && lane() == 31) return;
    float value = p.in.load(thread());
    if (p.mode == different_collectives && lane() == 5) {
        ballot(true);
    } else if (p.mode == different_lines && lane() == 5) {
        value = shuffle(value, 7);
    } else {
        value = shuffle(value, 7);
    }
    p.out.store(thread(), value);
}

// Everything that lanes tell each other, and where they are.
MOE_KERNEL(kThreads, 1) lanes(const Params p) {
    const uint32_t odd = ballot(lane() % 2 == 1);
    const uint32_t same = match_any(lane() % 4);
    const int up = shuffle_xor(lane(), 16), far = shuffle(lane(), 32 + 5);
    const double wide = shuffle(double(thread()), 31);
    const bool right = odd == 0xaaaaaaaau && same == 0x11111111u << lane() % 4 && population(same) == 8 &&
                       up == (lane() ^ 16) && far == 5 && wide == warp() * 32 + 31 && threads() == kThreads &&
                       thread() == warp() * 32 + lane();
    p.out.store(thread(), right && block_y() == 0 && block_z() == 0 ? 1 : 0);
}

// --- memory -----------------------------------------------------------------------------------------------------------

enum {
    global_read = 1,
    global_read_before,
    global_write,
    global_vector,
    global_misaligned,
    shared_read,
    shared_write,
    shared_vector,
    shared_misaligned,
    shared_unwritten,
    shared_half_written,
    shared_too_large,
    null_pointer,
};

MOE_KERNEL(kThreads, 1) memory(const Params p) {
    const int count = 2 * kThreads, i = 2 * thread();
    const Shared<float> s = shared<float>(32, p.mode == shared_too_large ? 512 : count);
    const bool last = thread() == kThreads - 1;
    s.store(i, p.in.load(i));
    if (p.mode != shared_half_written) s.store(i + 1, p.in.load(i + 1));
    if (p.mode == global_read && last) p.in.at(i).load(2);
    if (p.mode == global_read_before) p.in.at(-1).load(thread());
    if (p.mode == global_write && last) p.out.store(count, 0);
    if (p.mode == global_vector && last) p.in.load_vector<4>(count - 2);
    if (p.mode == global_misaligned) p.in.load_vector<4>(2);
    if (p.mode == shared_read && last) s.at(i).load(2);
    if (p.mode == shared_write && last) s.store(count, 0);
    if (p.mode == shared_vector && last) s.store_vector<2>(count - 1, {});
    if (p.mode == shared_misaligned) s.load_vector<2>(1);
    if (p.mode == shared_unwritten) shared<int>(0, 4).load(0);
    if (p.mode == null_pointer) global<float>(static_cast<void*>(nullptr), 8, "absent").load(0);
    p.out.store_vector<2>(i, s.load_vector<2>(i));
}

enum { read_without_barrier = 1, write_without_barrier, add_unwritten };

MOE_KERNEL(kThreads, 1) atomics(const Params p) {
    const Shared<int> s = shared<int>(0, 4);
    if (thread() < 4 && p.mode != add_unwritten) s.store(thread(), 0);
    sync_threads();
    atomic_add(s, thread() % 4, 1);
    if (p.mode == write_without_barrier && thread() == 9) s.store(1, 0);
    if (p.mode != read_without_barrier) sync_threads();
    atomic_add(p.counters, thread() % 4, 1);
    fence();
    if (thread() == 63) {
        for (int i = 0; i < 4; ++i) p.out.store(i, float(s.load(i) + p.counters.load_of_others(i)));
    }
}

enum { early_read = 1, early_write, early_copy, never_waits };

MOE_KERNEL(kThreads, 1) overlap(const Params p) {
    const Shared<float> s = shared<float>(0, 4 * kThreads);
    if (p.mode == never_waits) return;
    if (p.mode == early_read) p.in.load(thread());
    if (p.mode == early_write) p.out.store(thread(), 0);
    if (p.mode == early_copy) copy_async(s.at(4 * thread()), p.in, true);
    wait_for_previous();
    allow_next();
    p.out.store(thread(), p.in.load(thread()) + 1);
}

// --- asynchronous copies ----------------------------------------------------------------------------------------------

enum {
    copy_without_wait = 1,
    copy_without_barrier,
    copy_wrong_group,
    copy_without_commit,
    copy_written_over,
    copy_into_read,
    copy_outside,
    copy_misaligned,
    copy_twice,
};

// Two groups of copies, of which the second is half zeros; values go to the next thread.
MOE_KERNEL(kThreads, 1) copies(const Params p) {
    const Shared<float> first = shared<float>(0, 4 * kThreads), second = shared<float>(16 * kThreads, 4 * kThreads);
    const int mine = 4 * thread(), next = 4 * ((thread() + 1) % kThreads);
    if (p.mode == copy_into_read) {
        first.store(mine, 0);
        sync_threads();
        first.load(next);
    }
    const int from = 4 * (thread() % 32), bytes_off = p.mode == copy_misaligned ? 1 : 0;
    copy_async(first.at(mine + bytes_off), p.in.at(from), true);
    if (p.mode == copy_twice) copy_async(first.at(mine), p.in.at(from), true);
    commit_copies();
    copy_async(second.at(mine), p.in.at(p.mode == copy_outside ? mine : from + 1000 * (thread() / 32)),
               thread() < 32 || p.mode == copy_outside);
    if (p.mode != copy_without_commit) commit_copies();
    if (p.mode == copy_written_over) first.store(mine + 1, 0);
    if (p.mode != copy_without_wait) wait_copies<1>();
    if (p.mode != copy_without_barrier) sync_threads();
    float sum = first.load(p.mode == copy_without_wait ? mine : next);
    if (p.mode == copy_wrong_group) {
        wait_copies<1>();
    } else {
        wait_copies<0>();
    }
    sync_threads();
    sum += second.load(next + 3);
    p.out.store(thread(), sum);
}

enum { all_wait = 1 };

// Thread 0's copy for all.
MOE_KERNEL(kThreads, 1) copy_for_all(const Params p) {
    const Shared<float> s = shared<float>(0, 4);
    if (thread() == 0) copy_async(s, p.in, true);
    commit_copies();
    wait_copies<0>();
    if (p.mode != all_wait) sync_threads();
    p.out.store(thread(), s.load(1));
}

// --- element types ----------------------------------------------------------------------------------------------------

template <class T>
bool rounds() {
    for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
        const float x = to_float(T{uint16_t(bits)});
        const T again = from_float<T>(x);
        if (x != x) {
            if (to_float(again) == to_float(again)) return false;
            continue;
        }
        if (again.bits != bits) return false;
        const float y = to_float(T{uint16_t(bits + 1)});
        if (!(x >= 0 && y > x && y < 1e30f)) continue;  // negative ones below; the largest
        const float middle = float((double(x) + double(y)) / 2);
        const T even{uint16_t(bits % 2 == 0 ? bits : bits + 1)};
        if (from_float<T>(middle).bits != even.bits) return false;
        if (from_float<T>(-middle).bits != (even.bits | 0x8000u)) return false;
        if (from_float<T>(std::nextafter(middle, 0.0f)).bits != bits) return false;
        if (from_float<T>(std::nextafter(middle, 1e38f)).bits != bits + 1) return false;
    }
    return true;
}

MOE_KERNEL(kThreads, 1) types(const Params p) {
    const float inf = float_of(0x7f800000u), none = not_a_number();
    bool right = rounds<bfloat16>() && rounds<float16>();
    right =
        right && to_float(from_float<float16>(65520.0f)) == inf && to_float(from_float<float16>(65519.0f)) == 65504.0f;
    right = right && to_float(from_float<bfloat16>(float_of(0x7f7fffffu))) == inf;
    right = right && to_tf32(0x3f800fffu) == 0x3f800000u && to_tf32(0x3f801000u) == 0x3f802000u;
    right = right && to_tf32(0xbf801000u) == 0xbf802000u && to_tf32(0x7f7fffffu) == 0x7f800000u;
    right = right && float_of(to_tf32(0xff800000u)) == -inf && float_of(to_tf32(0x7f800001u)) != none;
    right = right && float_of(to_tf32(0x7f800001u)) != float_of(to_tf32(0x7f800001u));
    p.out.store(thread(), right ? 1 : 0);
}

// --- matrix unit ------------------------------------------------------------------------------------------------------

enum { by_hand, through_matrices, through_transposed, swapped, wrong_transposition, row_misaligned };

template <class T>
struct Multiplication {
    using Element = std::conditional_t<std::is_same<T, tf32>::value, float, T>;
    static constexpr int k = sizeof(Element) == 4 ? 8 : 16;
};

template <class T>
struct ProductParams {
    using Element = typename Multiplication<T>::Element;
    int mode;
    Global<const Element> a, b;  // [16][k], [k][8]
    Global<float> c;             // [16][8]
};

inline uint32_t word_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}

inline void fragments_by_hand(const ProductParams<tf32>& p, int l, uint32_t (&a)[4], uint32_t (&b)[2]) {
    const int g = l >> 2, t = l % 4;
    a[0] = word_of(p.a.load(g * 8 + t));
    a[1] = word_of(p.a.load((g + 8) * 8 + t));
    a[2] = word_of(p.a.load(g * 8 + t + 4));
    a[3] = word_of(p.a.load((g + 8) * 8 + t + 4));
    b[0] = word_of(p.b.load(t * 8 + g));
    b[1] = word_of(p.b.load((t + 4) * 8 + g));
}
// The eight elements a0 .. a7 of a lane, two of them in each word, and b0 .. b3, as the tables of the PTX ISA have them.
template <class T>
void fragments_by_hand(const ProductParams<T>& p, int l, uint32_t (&a)[4], uint32_t (&b)[2]) {
    const int g = l >> 2, t = l % 4;
    for (int i = 0; i < 8; i += 2) {
        const int row = i < 2 || (i >= 4 && i < 6) ? g : g + 8;
        const int column = 2 * t + (i < 4 ? 0 : 8);
        a[i / 2] = p.a.load(row * 16 + column).bits | uint32_t(p.a.load(row * 16 + column + 1).bits) << 16;
    }
    for (int i = 0; i < 4; i += 2) {
        const int row = 2 * t + (i < 2 ? 0 : 8);
        b[i / 2] = p.b.load(row * 8 + g).bits | uint32_t(p.b.load((row + 1) * 8 + g).bits) << 16;
    }
}

template <class T>
MOE_KERNEL(32, 1)
product(const ProductParams<T> p) {
    using Element = typename Multiplication<T>::Element;
    constexpr int k = Multiplication<T>::k, run = 16 / int(sizeof(Element));
    const int l = lane(), g = l >> 2, t = l % 4, r = l % 8;
    uint32_t a[4], b[2], both[4];
    const bool transposed = p.mode == through_transposed || p.mode == wrong_transposition;
    const Shared<Element> left = shared<Element>(0, 16 * k), right = shared<Element>(1024, 8 * k);
    for (int i = l; i < 16 * k; i += 32) {  // [16][k], or [k][16]
        left.store(transposed ? i % k * 16 + i / k : i, p.a.load(i));
    }
    for (int i = l; i < 8 * k; i += 32) {  // [8][k], or [k][8]
        right.store(transposed ? i : i % 8 * k + i / 8, p.b.load(i));
    }
    sync_warp();
    if (p.mode == by_hand || p.mode == swapped) {
        fragments_by_hand(p, p.mode == swapped && (l == 4 || l == 5) ? 9 - l : l, a, b);
    } else if (!transposed) {
        const int row = l / 8 % 2 * 8 + r, column = l / 16 * run;
        load_matrices(a, left.at(row * k + column + (p.mode == row_misaligned && l == 9 ? 1 : 0)));
        load_matrices(both, right.at(r * k + l / 8 % 2 * run));
        b[0] = both[0], b[1] = both[1];
    } else {
        const int row = l / 16 * 8 + r, column = l / 8 % 2 * 8;
        load_matrices_transposed(a, left.at(row * 16 + column));
        if (p.mode == wrong_transposition) {
            load_matrices(both, right.at((l / 8 % 2 * 8 + r) * 8));
        } else {
            load_matrices_transposed(both, right.at((l / 8 % 2 * 8 + r) * 8));
        }
        b[0] = both[0], b[1] = both[1];
    }
    const int at[4] = {g * 8 + 2 * t, g * 8 + 2 * t + 1, (g + 8) * 8 + 2 * t, (g + 8) * 8 + 2 * t + 1};
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = p.c.load(at[i]);
    multiply_accumulate(d, a, b, T{});
    multiply_accumulate(d, a, b, T{});
    for (int i = 0; i < 4; ++i) p.c.store(at[i], d[i]);
}

// --- on the host ------------------------------------------------------------------------------------------------------

Status wrong(const char* what) {
    Status status;
    status.code = StatusCode::device_error;
    std::snprintf(status.message, sizeof(status.message), "%s", what);
    return status;
}

template <auto kernel>
Status run(const char* name, int mode, bool overlaps, float (*expected)(int), int count) {
    std::vector<float> in(2 * kThreads), out(2 * kThreads, -1.0f);
    std::vector<int> counters(4);
    for (int i = 0; i < 2 * kThreads; ++i) in[size_t(i)] = float(i);
    const Params p{mode, global<float>(static_cast<const void*>(in.data()), 2 * kThreads, "in"),
                   global(out.data(), 2 * kThreads, "out"), global(counters.data(), 4, "counters")};
    const int blocks = mode == 0 && count == 2 ? 2 : 1;
    const Status status = launch<kernel>(Launch{name, {blocks, 1, 1}, kThreads, 2048, 0, nullptr, overlaps}, p);
    if (!status.ok()) return status;
    for (int i = 0; i < count; ++i) {
        if (out[size_t(i)] != expected(i)) return wrong("wrong values");
    }
    return status;
}

float one(int) { return 1; }
float nothing(int) { return -1; }
float block_sum(int i) { return i == 0 ? 63 * 64 / 2 : 63 * 64 / 2 + 64 * 64; }
float neighbour(int i) { return float(i ^ 1); }
float steps(int) { return 0 + 1 + 2 + 3; }
float lane_seven(int i) { return float(i / 32 * 32 + 7); }
float itself(int i) { return float(i); }
float after(int i) { return float(i + 1); }
float twice_16(int) { return 32; }
float of_late(int i) { return i < 40 ? -1.0f : 1.0f; }
float copied(int i) {
    const int from = (i + 1) % kThreads;
    return float(4 * (from % 32)) + (from < 32 ? float(4 * from + 3) : 0.0f);
}

// Small integers: every product and sum is exact.
template <class T>
Status run_product(const char* name, int mode) {
    using Element = typename Multiplication<T>::Element;
    constexpr int k = Multiplication<T>::k;
    std::vector<Element> a(16 * k), b(8 * k);
    std::vector<float> c(16 * 8), expected;
    uint32_t state = 1;
    const auto draw = [&] {
        state = state * 1664525u + 1013904223u;
        return float(int(state >> 24) % 17 - 8);
    };
    for (auto& x : a) x = from_float<Element>(draw());
    for (auto& x : b) x = from_float<Element>(draw());
    for (auto& x : c) x = draw();
    expected = c;
    for (int m = 0; m < 16; ++m) {
        for (int n = 0; n < 8; ++n) {
            float& sum = expected[size_t(m * 8 + n)];
            for (int i = 0; i < k; ++i) sum += 2 * to_float(a[size_t(m * k + i)]) * to_float(b[size_t(i * 8 + n)]);
        }
    }
    if constexpr (std::is_same<T, tf32>::value) {  // the unit shall not see these bits
        for (auto& x : a) x = float_of(word_of(x) | 0x1fffu);
    }
    const ProductParams<T> p{mode, global<Element>(static_cast<const void*>(a.data()), 16 * k, "a"),
                             global<Element>(static_cast<const void*>(b.data()), 8 * k, "b"),
                             global(c.data(), 16 * 8, "c")};
    const Status status = launch<product<T>>(Launch{name, {1, 1, 1}, 32, 2048, 0, nullptr, false}, p);
    if (!status.ok()) return status;
    return c == expected ? status : wrong("wrong product");
}

// What the device refuses to start.
Status launch_refused(int threads, int shared_bytes, int64_t blocks) {
    return launch<types>(Launch{"types", {blocks, 1, 1}, threads, shared_bytes, 0, nullptr, false}, Params{});
}

struct Case {
    const char* name;
    Status (*run)();
};

#define CASE(name, kernel, mode, expected, count) \
    {name, [] { return run<kernel>(#kernel, mode, false, expected, count); }}
#define OVERLAP(name, mode) \
    {name, [] { return run<overlap>("overlap", mode, true, int(mode) == int(never_waits) ? nothing : after, kThreads); }}
#define PRODUCT(name, type, mode) {name, [] { return run_product<type>("product", mode); }}

const Case cases[] = {
    CASE("reduction", reduction, correct, block_sum, 2),
    CASE("reduction_without_barrier", reduction, no_barrier, block_sum, 1),
    CASE("reduction_with_sync_warp_only", reduction, warp_barrier, block_sum, 1),
    CASE("exchange_in_warp", exchange_in_warp, correct, neighbour, kThreads),
    CASE("exchange_in_warp_without_sync_warp", exchange_in_warp, no_barrier, neighbour, kThreads),
    CASE("exchange_in_warp_with_shuffle_for_barrier", exchange_in_warp, shuffle_for_barrier, neighbour, kThreads),
    CASE("broadcast", broadcast, correct, one, kThreads),
    CASE("broadcast_without_barrier", broadcast, no_barrier, one, kThreads),
    CASE("broadcast_with_sync_warp_only", broadcast, warp_barrier, one, kThreads),
    CASE("ring", ring, correct, steps, kThreads),
    CASE("ring_reused_without_barrier", ring, no_barrier, steps, kThreads),
    CASE("barrier", branch, correct, one, kThreads),
    CASE("barrier_after_some_returned", branch, after_return, of_late, kThreads),
    CASE("barrier_in_divergent_branch", branch, two_barriers, one, kThreads),
    CASE("barrier_and_shuffle", branch, with_shuffle, one, kThreads),
    CASE("collective", collective, correct, lane_seven, kThreads),
    CASE("collective_with_returned_lane", collective, lane_returned, lane_seven, kThreads),
    CASE("collective_with_lane_that_returns", collective, lane_returns_later, lane_seven, kThreads),
    CASE("collective_of_different_kinds", collective, different_collectives, lane_seven, kThreads),
    CASE("collective_at_different_lines", collective, different_lines, lane_seven, kThreads),
    CASE("lanes", lanes, correct, one, kThreads),
    CASE("memory", memory, correct, itself, 2 * kThreads),
    CASE("global_read_past_end", memory, global_read, itself, kThreads),
    CASE("global_read_before_start", memory, global_read_before, itself, kThreads),
    CASE("global_write_past_end", memory, global_write, itself, kThreads),
    CASE("global_vector_past_end", memory, global_vector, itself, kThreads),
    CASE("global_vector_misaligned", memory, global_misaligned, itself, kThreads),
    CASE("global_null", memory, null_pointer, itself, kThreads),
    CASE("shared_read_past_end", memory, shared_read, itself, kThreads),
    CASE("shared_write_past_end", memory, shared_write, itself, kThreads),
    CASE("shared_vector_past_end", memory, shared_vector, itself, kThreads),
    CASE("shared_vector_misaligned", memory, shared_misaligned, itself, kThreads),
    CASE("shared_unwritten", memory, shared_unwritten, itself, kThreads),
    CASE("shared_half_written", memory, shared_half_written, itself, kThreads),
    CASE("shared_larger_than_asked", memory, shared_too_large, itself, kThreads),
    CASE("atomics", atomics, correct, twice_16, 4),
    CASE("atomics_read_without_barrier", atomics, read_without_barrier, twice_16, 4),
    CASE("atomics_write_without_barrier", atomics, write_without_barrier, twice_16, 4),
    CASE("atomics_unwritten", atomics, add_unwritten, twice_16, 4),
    CASE("copies", copies, correct, copied, kThreads),
    CASE("copies_without_wait", copies, copy_without_wait, copied, kThreads),
    CASE("copies_without_barrier", copies, copy_without_barrier, copied, kThreads),
    CASE("copies_wait_for_wrong_group", copies, copy_wrong_group, copied, kThreads),
    CASE("copies_without_commit", copies, copy_without_commit, copied, kThreads),
    CASE("copies_written_over", copies, copy_written_over, copied, kThreads),
    CASE("copies_into_what_is_read", copies, copy_into_read, copied, kThreads),
    CASE("copies_from_outside", copies, copy_outside, copied, kThreads),
    CASE("copies_misaligned", copies, copy_misaligned, copied, kThreads),
    CASE("copies_twice", copies, copy_twice, copied, kThreads),
    CASE("copy_for_all", copy_for_all, correct, one, kThreads),
    CASE("copy_for_all_with_wait_for_barrier", copy_for_all, all_wait, one, kThreads),
    OVERLAP("overlap", correct),
    OVERLAP("overlap_reads_early", early_read),
    OVERLAP("overlap_writes_early", early_write),
    OVERLAP("overlap_copies_early", early_copy),
    OVERLAP("overlap_never_waits", never_waits),
    CASE("types", types, correct, one, kThreads),
    PRODUCT("product_bfloat16", bfloat16, by_hand),
    PRODUCT("product_bfloat16_matrices", bfloat16, through_matrices),
    PRODUCT("product_bfloat16_transposed", bfloat16, through_transposed),
    PRODUCT("product_bfloat16_swapped", bfloat16, swapped),
    PRODUCT("product_bfloat16_wrong_transposition", bfloat16, wrong_transposition),
    PRODUCT("product_float16", float16, by_hand),
    PRODUCT("product_float16_matrices", float16, through_matrices),
    PRODUCT("product_float16_transposed", float16, through_transposed),
    PRODUCT("product_float16_swapped", float16, swapped),
    PRODUCT("product_float16_wrong_transposition", float16, wrong_transposition),
    PRODUCT("product_tf32", tf32, by_hand),
    PRODUCT("product_tf32_matrices", tf32, through_matrices),
    PRODUCT("product_tf32_swapped", tf32, swapped),
    PRODUCT("product_row_misaligned", bfloat16, row_misaligned),
    {"launch_too_many_threads", [] { return launch_refused(1056, 0, 1); }},
    {"launch_too_much_shared_memory", [] { return launch_refused(32, 228 * 1024, 1); }},
    {"launch_empty_grid", [] { return launch_refused(32, 0, 0); }},
};

#undef CASE
#undef OVERLAP
#undef PRODUCT

}  // namespace
}  // namespace moe::MOE_GPU

extern "C" int moe_cuda_sim_selftest(const char* name, char* message, size_t size) {
    for (const auto& c : moe::MOE_GPU::cases) {
        if (std::strcmp(c.name, name) != 0) continue;
        const moe::Status status = c.run();
        std::snprintf(message, size, "%s", status.message);
        return int(status.code);
    }
    std::snprintf(message, size, "no case is called %s", name);
    return int(moe::StatusCode::invalid_argument);
}

extern "C" const char* moe_cuda_sim_selftest_names() {
    static const std::string names = [] {
        std::string all;
        for (const auto& c : moe::MOE_GPU::cases) all += std::string(all.empty() ? "" : "\n") + c.name;
        return all;
    }();
    return names.c_str();
}
