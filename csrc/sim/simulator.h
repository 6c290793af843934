// SPDX-License-Identifier: Apache-2.0
// Runs the threads of a block as fibers on the host and checks what they do with memory; sim/device.h gives kernels the
// names of cuda/device.h on top of it. A fiber switches only where a thread waits: at barriers and warp collectives.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/status.h"

namespace moe::sim {

// Where in a kernel something was called.
struct Place {
    const char* file;
    int line;
};
constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kLanes;
constexpr int kMaxShared = 227 * 1024;  // bytes of a block on sm_90; fewer before
constexpr int kCopyBytes = 16;

enum class Wait : uint8_t {
    nothing,
    sync_threads,
    sync_warp,
    shuffle,
    shuffle_xor,
    ballot,
    match_any,
    load_matrices,
    load_matrices_transposed,
    multiply_bfloat16,
    multiply_float16,
    multiply_tf32,
};

// What is known of two bytes of shared memory. Times are values of State::clock, which every barrier advances; a write or
// read is ordered before what a thread does now if it is older than the last barrier that both took part in. One reader
// stands for all: who reads next replaces an ordered one and merges with another (see State::merge).
struct alignas(16) Cell {
    uint32_t wrote, read;  // when last; wrote is kInFlight while a copy is on its way
    uint16_t writer, reader;
    uint16_t wrote_at, read_at;  // places, packed
};

// What a lane hands to the others. Two sets in turn, as a lane may be at the next collective before another has read.
struct Slot {
    alignas(16) uint32_t word[4];
};
struct Product {
    alignas(64) float a[16][16];  // [m][k]
    alignas(64) float b[16][8];   // [k][n]
    alignas(64) float c[16][8];
};

struct Warp {
    uint32_t alive, ready, arrived;  // a bit for each lane
    uint32_t synced;                 // when the last barrier of the warp was
    uint32_t turn;                   // which set of slots
    Wait waits;
    Place place;  // of the first lane that arrived
    Slot slots[2][kLanes];
    Product products[2];
};

struct Copy {
    const void* from;  // null: zeros
    int to;
    int64_t group;
    uint16_t started_at;
};

struct State;

// What every switch needs lies in one line of the cache.
struct alignas(64) Thread {
    void* context;  // where it goes on
    State* state;
    Warp* warp;
    Place place;  // where it waits
    int index, lane;
    Wait waits;
    bool early;  // may overlap the kernel before
    bool returned;
    int64_t groups;            // of copies, committed
    size_t first_copy;         // of copies: those before are there
    std::vector<Copy> copies;  // in order
};

using Body = void (*)(const void* params);

struct Start {
    const char* name;
    int64_t grid[3];
    int threads;
    int shared_bytes;
    bool overlap;
    Body body;
    const void* params;
};

// The block that runs. Everything is kept for the next one.
struct State {
    Start start;
    int block[3];
    uint32_t ready_warps;
    int warp;            // the one whose lanes go on first
    int alive, arrived;  // threads that have not returned; those at the barrier
    Place barrier;
    uint32_t clock, began, synced;  // now; when the block began; when its last barrier was
    bool waited_for_previous, failed;
    Status status;
    unsigned char* memory;  // shared
    Cell* cells;
    Warp warps[kMaxWarps];
    Thread threads[kMaxThreads];

    uint16_t merge(uint16_t who, uint32_t when, const Thread& me) const;
};

// The thread that runs; null outside of kernels. The model spares a call of the loader's for each access; it needs eight
// bytes of what the loader reserves for such variables, which CUDA's runtime leaves no room for in the same module.
#if defined(__GLIBC__) && !defined(MOE_WITH_CUDA)
extern __thread Thread* current __attribute__((tls_model("initial-exec")));
#else
extern __thread Thread* current;
#endif

// The blocks of a grid in the other order: what depends on which is last shows. For the whole process.
extern std::atomic<bool> last_block_first;

[[noreturn, gnu::cold, gnu::format(printf, 2, 3)]] void fail(Place place, const char* format, ...);
[[noreturn, gnu::cold]] void fail_bounds(Place place, const char* does, int64_t index, int n, const char* name,
                                         int64_t count);
[[noreturn, gnu::cold]] void fail_alignment(Place place, const char* does, int64_t index, const char* name, int bytes);
[[noreturn, gnu::cold]] void fail_early(Place place, const char* does, const char* name);

// A warp collective: true for the lane that arrives last, which does what is to do and calls release_warp(); the others
// call wait(), which returns after that.
bool arrive(Wait what, Place place);
void release_warp();
void wait();
inline void collect(Wait what, Place place) {
    if (arrive(what, place)) {
        release_warp();
    } else {
        wait();
    }
}
void sync_threads(Place place);
void sync_warp(Place place);

// Shared memory: bytes [offset, offset + bytes) by the current thread, in bounds, even.
void read_shared(int offset, int bytes, Place place);
void write_shared(int offset, int bytes, Place place);
void add_shared(int offset, int bytes, Place place);
void start_copy(int offset, const void* from, Place place);
void wait_copies(int groups);

// c[16][8] += a[16][k] b[k][8]
void multiply(Product& product, int k);

Status run(const Start& start);

}  // namespace moe::sim
