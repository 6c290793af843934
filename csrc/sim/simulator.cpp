// SPDX-License-Identifier: Apache-2.0
#include "sim/simulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define MOE_SIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MOE_SIM_ASAN 1
#endif
#endif

#if defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__)) && !defined(MOE_SIM_ASAN) && \
    !defined(MOE_SIM_UCONTEXT)
#define MOE_SIM_ASSEMBLER 1
#else
#include <ucontext.h>
#endif

#ifdef MOE_SIM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace moe::sim {

__thread Thread* current = nullptr;
std::atomic<bool> last_block_first{false};

}  // namespace moe::sim

// --- fibers -----------------------------------------------------------------------------------------------------------

#ifdef MOE_SIM_ASSEMBLER

extern "C" void moe_sim_switch(void** from, void* to);  // what a call preserves goes to the stack, stacks change

#if defined(__x86_64__)
asm(R"(
.pushsection .text
.globl moe_sim_switch
.hidden moe_sim_switch
.type moe_sim_switch, @function
moe_sim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size moe_sim_switch, . - moe_sim_switch
.popsection
)");
#else
asm(R"(
.pushsection .text
.globl moe_sim_switch
.hidden moe_sim_switch
.type moe_sim_switch, @function
moe_sim_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size moe_sim_switch, . - moe_sim_switch
.popsection
)");
#endif

#endif  // MOE_SIM_ASSEMBLER

namespace moe::sim {
namespace {

struct Failure {};  // thrown where a check fails; what it says is in State::status

#ifdef MOE_SIM_ASSEMBLER

struct Context {};  // the stack's address is all

void* prepare(Context&, unsigned char* base, size_t size, void (*entry)()) {
    void** const top = reinterpret_cast<void**>(base + size);
#if defined(__x86_64__)
    void** const stack = top - 8;  // six registers, the entry, and where it would return to
    std::memset(stack, 0, 64);
    stack[6] = reinterpret_cast<void*>(entry);
#else
    void** const stack = top - 20;
    std::memset(stack, 0, 160);
    stack[11] = reinterpret_cast<void*>(entry);
#endif
    return stack;
}
inline void switch_context(void*& from, void* to, bool) { moe_sim_switch(&from, to); }
void* host_context(Context&) { return nullptr; }
void entered() {}

#else

struct Context {
    ucontext_t registers;
    void* shadow;  // AddressSanitizer's
    const void* base;
    size_t size;
};

void* prepare(Context& context, unsigned char* base, size_t size, void (*entry)()) {
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = base;
    context.registers.uc_stack.ss_size = size;
    context.registers.uc_link = nullptr;
    context.shadow = nullptr;
    context.base = base;
    context.size = size;
    makecontext(&context.registers, entry, 0);
#ifdef MOE_SIM_ASAN
    __asan_unpoison_memory_region(base, size);  // what an abandoned fiber left
#endif
    return &context;
}
void* host_context(Context& context) { return &context; }

#ifdef MOE_SIM_ASAN
thread_local Context* left = nullptr;  // its stack is learnt when the next one is entered

void entered(void* shadow) { __sanitizer_finish_switch_fiber(shadow, &left->base, &left->size); }
void entered() { entered(nullptr); }
#else
void entered() {}
#endif

void switch_context(void*& from, void* to, [[maybe_unused]] bool last) {
    Context& here = *static_cast<Context*>(from);
    Context& there = *static_cast<Context*>(to);
#ifdef MOE_SIM_ASAN
    left = &here;
    __sanitizer_start_switch_fiber(last ? nullptr : &here.shadow, there.base, there.size);
#endif
    swapcontext(&here.registers, &there.registers);
#ifdef MOE_SIM_ASAN
    entered(here.shadow);
#endif
}

#endif

#ifdef MOE_SIM_ASAN
constexpr size_t kStack = 512 * 1024;
#else
constexpr size_t kStack = 128 * 1024;
#endif

// --- the state of a host thread ---------------------------------------------------------------------------------------

constexpr uint32_t kInFlight = 0xffffffffu;
// Who: a thread's index, or
constexpr uint16_t kOfWarp = 0x400;   // several threads of the warp in the low bits
constexpr uint16_t kOfBlock = 0x800;  // threads of several warps
constexpr uint16_t kAtomic = 0x1000;
constexpr uint16_t kCopying = 0x2000;

int warp_of(uint16_t who) {
    if (who & kOfBlock) return -1;
    return who & kOfWarp ? who & (kMaxWarps - 1) : (who & (kMaxThreads - 1)) / kLanes;
}

struct Machine : State {
    Context contexts[kMaxThreads], host;
    void* host_stack = nullptr;
    unsigned char* stacks = nullptr;
    size_t stride = 0, guard = 0;
    int stacks_ready = 0;
    const char* files[16] = {};
    int file = 0, known_files = 0;

    Machine();
    ~Machine();
    Machine(const Machine&) = delete;
    Machine& operator=(const Machine&) = delete;

    unsigned char* map(size_t bytes);
    void run_block();
    void prepare_fiber(int index);
    Thread* next();
    void release_block(const Thread& me);
    uint16_t pack(Place place);
    Place unpack(uint16_t packed) const;
    void report(const Thread& thread, Place place, const char* what);
    void describe_waiting(char* text, size_t size, const Thread*& first) const;
};

Machine& machine() { return *static_cast<Machine*>(current->state); }

unsigned char* Machine::map(size_t bytes) {
    void* const p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    return static_cast<unsigned char*>(p);
}

constexpr size_t kCellBytes = sizeof(Cell) * (kMaxShared / 2);

Machine::Machine() : State{} {
    guard = size_t(sysconf(_SC_PAGESIZE));
    stride = kStack + guard;
    memory = map(kMaxShared);
    cells = reinterpret_cast<Cell*>(map(kCellBytes));
    stacks = map(stride * kMaxThreads);
}

Machine::~Machine() {
    munmap(memory, kMaxShared);
    munmap(cells, kCellBytes);
    munmap(stacks, stride * kMaxThreads);
}

const char* relative(const char* file) {
    const char* found = file;
    for (const char* p = file; (p = std::strstr(p, "csrc/")) != nullptr; p += 5) found = p + 5;
    return found;
}

bool same(Place a, Place b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

const char* name_of(Wait what) {
    switch (what) {
        case Wait::nothing:
            return "nothing";
        case Wait::sync_threads:
            return "sync_threads";
        case Wait::sync_warp:
            return "sync_warp";
        case Wait::shuffle:
            return "shuffle";
        case Wait::shuffle_xor:
            return "shuffle_xor";
        case Wait::ballot:
            return "ballot";
        case Wait::match_any:
            return "match_any";
        case Wait::load_matrices:
            return "load_matrices";
        case Wait::load_matrices_transposed:
            return "load_matrices_transposed";
        case Wait::multiply_bfloat16:
            return "multiply_accumulate of bfloat16";
        case Wait::multiply_float16:
            return "multiply_accumulate of float16";
        case Wait::multiply_tf32:
            return "multiply_accumulate of tf32";
    }
    return "";
}

// A place in 16 bits, for cells: the file's number and the line, 0 if that has more than 12 bits.
uint16_t Machine::pack(Place place) {
    if (place.file != files[file]) {
        for (file = 0; file < known_files && files[file] != place.file; ++file) {
        }
        if (file == known_files) {
            if (known_files == 16) return uint16_t(file = 0);
            files[known_files++] = place.file;
        }
    }
    return uint16_t(file << 12 | (place.line < 4096 ? place.line : 0));
}
Place Machine::unpack(uint16_t packed) const { return {files[packed >> 12], packed & 4095}; }

void Machine::report(const Thread& thread, Place place, const char* what) {
    if (failed) return;
    failed = true;
    status.code = StatusCode::device_error;
    std::snprintf(status.message, sizeof(status.message),
                  "%.320s (%.60s:%d, kernel %.40s, block (%d, %d, %d), thread %d)", what, relative(place.file),
                  place.line, start.name, block[0], block[1], block[2], thread.index);
}

// "thread 3 and 4 others wait at .., thread 9 has returned"
void Machine::describe_waiting(char* text, size_t size, const Thread*& first) const {
    first = nullptr;
    bool told[kMaxThreads] = {};
    size_t used = 0;
    const int n = start.threads;
    for (int i = 0; i < n && used < size; ++i) {
        if (told[i]) continue;
        const Thread& a = threads[i];
        if (first == nullptr && !a.returned) first = &a;
        int others = 0;
        for (int j = i + 1; j < n; ++j) {
            const Thread& b = threads[j];
            if (a.returned != b.returned || (!a.returned && (a.waits != b.waits || !same(a.place, b.place)))) continue;
            told[j] = true;
            ++others;
        }
        char who[48];
        if (others == 0) {
            std::snprintf(who, sizeof(who), "thread %d", i);
        } else {
            std::snprintf(who, sizeof(who), "thread %d and %d other%s", i, others, others == 1 ? "" : "s");
        }
        const char* const comma = used == 0 ? "" : ", ";
        int written;
        if (a.returned) {
            written =
                std::snprintf(text + used, size - used, "%s%s %s returned", comma, who, others == 0 ? "has" : "have");
        } else {
            written =
                std::snprintf(text + used, size - used, "%s%s %s at %s (%s:%d)", comma, who,
                              others == 0 ? "waits" : "wait", name_of(a.waits), relative(a.place.file), a.place.line);
        }
        used += size_t(written);
    }
}

[[noreturn, gnu::cold]] void fail_deadlock() {
    Machine& m = machine();
    char who[280];
    const Thread* first = nullptr;
    m.describe_waiting(who, sizeof(who), first);
    char text[320];
    std::snprintf(text, sizeof(text), "no thread can go on: %s", who);
    m.report(*first, first->place, text);
    throw Failure();
}

// --- which fiber runs -------------------------------------------------------------------------------------------------

// A thread that can go on, of the same warp if there is one; it is no longer among the ready ones.
inline Thread* Machine::next() {
    if (!(ready_warps >> warp & 1u)) {
        if (ready_warps == 0) return nullptr;
        warp = __builtin_ctz(ready_warps);
    }
    uint32_t& ready = warps[warp].ready;
    Thread* const thread = &threads[warp * kLanes + __builtin_ctz(ready)];
    ready &= ready - 1;
    if (ready == 0) ready_warps &= ~(1u << warp);
    return thread;
}

inline void switch_threads(Thread& from, Thread& to) {
    current = &to;
    switch_context(from.context, to.context, false);
}

void Machine::release_block(const Thread& me) {
    arrived = 0;
    synced = ++clock;
    for (int w = 0; w * kLanes < start.threads; ++w) {
        warps[w].synced = clock;
        warps[w].ready = warps[w].alive;
        if (&warps[w] == me.warp) warps[w].ready &= ~(1u << me.lane);
        if (warps[w].ready != 0) ready_warps |= 1u << w;
    }
}

void leave(Thread& me) {
    Machine& m = machine();
    me.returned = true;
    me.warp->alive &= ~(1u << me.lane);
    --m.alive;
    if (me.warp->arrived != 0) {
        fail(me.warp->place, "returns while lane %d of its warp waits at %s for all 32 lanes",
             __builtin_ctz(me.warp->arrived), name_of(me.warp->waits));
    }
    if (m.arrived != 0 && m.arrived == m.alive) m.release_block(me);
}

// All of a fiber; it goes on elsewhere and never comes back.
void run_thread() {
    entered();
    Thread& me = *current;
    Machine& m = machine();
    Thread* to = nullptr;
    try {
        m.start.body(m.start.params);
        leave(me);
        to = m.next();
        if (to == nullptr && m.alive > 0) fail_deadlock();
    } catch (const Failure&) {
        to = nullptr;
    } catch (const std::exception& error) {
        m.report(me, {"", 0}, error.what());
        to = nullptr;
    } catch (...) {
        m.report(me, {"", 0}, "a kernel threw an exception");
        to = nullptr;
    }
    current = to;
    switch_context(me.context, to == nullptr ? m.host_stack : to->context, true);
    std::abort();
}

void Machine::prepare_fiber(int index) {
    unsigned char* const base = stacks + size_t(index) * stride;
    if (index >= stacks_ready) {
        mprotect(base, guard, PROT_NONE);  // only a help: a kernel whose stack is too small shall crash
        stacks_ready = index + 1;
    }
    // What lanes keep at the same depth shall not fall into the same few sets of the cache.
    const size_t shift = size_t(index) * 576 % 4096;
    threads[index].context = prepare(contexts[index], base + guard, kStack - shift, run_thread);
}

void Machine::run_block() {
    const int n = start.threads;
    if (clock > 0x7fffffffu) {
        std::memset(cells, 0, kCellBytes);
        clock = 0;
    }
    began = synced = ++clock;
    std::memset(memory, 0xff, size_t(start.shared_bytes));
    alive = n;
    arrived = 0;
    warp = 0;
    ready_warps = 0;
    for (int w = 0; w * kLanes < n; ++w) {
        const int lanes = n - w * kLanes;
        warps[w].alive = warps[w].ready = lanes >= kLanes ? ~0u : (1u << lanes) - 1;
        warps[w].arrived = 0;
        warps[w].synced = clock;
        warps[w].turn = 0;
        ready_warps |= 1u << w;
    }
    for (int i = 0; i < n; ++i) {
        Thread& t = threads[i];
        t.state = this;
        t.warp = &warps[i / kLanes];
        t.index = i;
        t.lane = i % kLanes;
        t.early = start.overlap;
        t.returned = false;
        t.waits = Wait::nothing;
        t.place = {"", 0};
        t.groups = 0;
        t.first_copy = 0;
        t.copies.clear();
        prepare_fiber(i);
    }
    Thread* const first = next();
    current = first;
    host_stack = host_context(host);
    switch_context(host_stack, first->context, false);
    current = nullptr;
    if (failed) {
        std::memset(cells, 0, kCellBytes);
        return;
    }
    for (int i = 0; i < n; ++i) {  // copies that nobody waited for
        const Thread& t = threads[i];
        for (size_t c = t.first_copy; c < t.copies.size(); ++c) {
            std::memset(static_cast<void*>(cells + t.copies[c].to / 2), 0, sizeof(Cell) * (kCopyBytes / 2));
        }
    }
}

Status refused(const Start& start, const char* what, long long value) {
    Status status;
    status.code = StatusCode::device_error;
    std::snprintf(status.message, sizeof(status.message), "%s %lld (kernel %.40s)", what, value, start.name);
    return status;
}

Status run_grid(const Start& start) {
    static thread_local std::unique_ptr<Machine> kept;
    if (current != nullptr) return refused(start, "launched by a kernel, thread", current->index);
    if (start.threads < 1 || start.threads > kMaxThreads) return refused(start, "threads of a block:", start.threads);
    if (start.shared_bytes < 0 || start.shared_bytes > kMaxShared) {
        return refused(start, "bytes of shared memory:", start.shared_bytes);
    }
    for (int i = 0; i < 3; ++i) {
        if (start.grid[i] < 1 || start.grid[i] > (i == 0 ? 0x7fffffff : 0xffff)) {
            return refused(start, "blocks of a grid in one dimension:", static_cast<long long>(start.grid[i]));
        }
    }
    if (!kept) kept.reset(new Machine);
    Machine& m = *kept;
    m.start = start;
    m.failed = false;
    m.waited_for_previous = false;
    m.status = {};
    m.file = m.known_files = 0;
    m.files[0] = nullptr;
    const int64_t blocks = start.grid[0] * start.grid[1] * start.grid[2];
    for (int64_t i = 0; i < blocks; ++i) {
        int64_t block = last_block_first ? blocks - 1 - i : i;
        for (int axis = 0; axis < 3; ++axis) {
            m.block[axis] = int(block % start.grid[axis]);
            block /= start.grid[axis];
        }
        m.run_block();
        if (m.failed) return m.status;
    }
    if (start.overlap && !m.waited_for_previous) {
        // The kernel after this one would wait for this one only, and this one has not waited for the one before.
        Status status;
        status.code = StatusCode::device_error;
        std::snprintf(status.message, sizeof(status.message),
                      "no thread called wait_for_previous in a launch that overlaps (kernel %.40s)", start.name);
        return status;
    }
    return {};
}

// --- checks of shared memory ------------------------------------------------------------------------------------------

// Whether what `who` did at `when` is ordered before what I do now.
inline bool ordered(const Machine& m, const Thread& me, uint16_t who, uint32_t when) {
    if (when < m.synced || who == me.index) return true;
    return when < me.warp->synced && warp_of(who) == me.index / kLanes;
}

struct Who {
    char text[96];
};
Who tell(const Machine& m, const Thread& me, uint16_t who, uint16_t at) {
    Who result;
    const Place place = m.unpack(at);
    const char* const file = place.file == nullptr ? "" : relative(place.file);
    if (who & kOfBlock) {
        std::snprintf(result.text, sizeof(result.text), "threads of several warps (last %.40s:%d)", file, place.line);
    } else if (who & kOfWarp) {
        std::snprintf(result.text, sizeof(result.text), "threads of warp %d (last %.40s:%d)", warp_of(who), file,
                      place.line);
    } else {
        const int index = who & (kMaxThreads - 1);
        std::snprintf(result.text, sizeof(result.text), "%sthread %d (%.40s:%d)", index == me.index ? "this " : "", index,
                      file, place.line);
    }
    return result;
}

[[noreturn, gnu::cold]] void fail_in_flight(const Machine& m, const Thread& me, const Cell& cell, const char* does,
                                            Place place) {
    fail(place, "%s byte %d of shared memory, to which a copy_async of %s is on its way", does, int(&cell - m.cells) * 2,
         tell(m, me, cell.writer & (kMaxThreads - 1), cell.wrote_at).text);
}
[[noreturn, gnu::cold]] void fail_unordered(const Machine& m, const Thread& me, const Cell& cell, const char* does,
                                            const char* did, uint16_t who, uint16_t at, Place place) {
    const bool warp = warp_of(who) == me.index / kLanes;
    fail(place, "%s byte %d of shared memory, which %s %s with no %s in between", does, int(&cell - m.cells) * 2,
         tell(m, me, who, at).text, did, warp ? "sync_warp or sync_threads" : "sync_threads");
}
[[noreturn, gnu::cold]] void fail_unwritten(const Machine& m, const Cell& cell, const char* does, Place place) {
    fail(place, "%s byte %d of shared memory, which no thread of this block has written so far", does,
         int(&cell - m.cells) * 2);
}

[[gnu::noinline]] void check_read(const Machine& m, const Thread& me, const Cell& cell, Place place) {
    if (cell.wrote < m.began) fail_unwritten(m, cell, "reads", place);
    if (cell.wrote == kInFlight) fail_in_flight(m, me, cell, "reads", place);
    const uint16_t who = cell.writer & uint16_t(~kAtomic);
    if (!ordered(m, me, who, cell.wrote)) {
        fail_unordered(m, me, cell, "reads", cell.writer & kAtomic ? "added to" : "wrote", who, cell.wrote_at, place);
    }
}
[[gnu::noinline]] void check_write(const Machine& m, const Thread& me, const Cell& cell, const char* does, Place place) {
    if (cell.wrote == kInFlight) fail_in_flight(m, me, cell, does, place);
    const uint16_t who = cell.writer & uint16_t(~kAtomic);
    if (!ordered(m, me, who, cell.wrote)) {
        fail_unordered(m, me, cell, does, cell.writer & kAtomic ? "added to" : "wrote", who, cell.wrote_at, place);
    }
    if (!ordered(m, me, cell.reader, cell.read)) {
        fail_unordered(m, me, cell, does, "read", cell.reader, cell.read_at, place);
    }
}

// Reads that were ordered before a write need not be kept: whoever they are not ordered before meets the write too.
inline void mark_written(Machine& m, const Thread& me, int offset, int bytes, const char* does, Place place,
                         bool copying) {
    Cell* const first = m.cells + offset / 2;
    Cell* const last = first + bytes / 2;
    const uint32_t synced = m.synced;
    for (const Cell* c = first; c != last; ++c) {
        if ((c->wrote >= synced && c->writer != me.index) || (c->read >= synced && c->reader != me.index)) {
            check_write(m, me, *c, does, place);
        }
    }
    const Cell after{
        copying ? kInFlight : m.clock, 0, uint16_t(copying ? me.index | kCopying : me.index), 0, m.pack(place), 0};
    for (Cell* c = first; c != last; ++c) *c = after;
}

}  // namespace

uint16_t State::merge(uint16_t who, uint32_t when, const Thread& me) const {
    if (when < synced || who == me.index) return uint16_t(me.index);
    const int warp_index = me.index / kLanes;
    if (warp_of(who) != warp_index) return kOfBlock;
    return when < me.warp->synced ? uint16_t(me.index) : uint16_t(kOfWarp | warp_index);
}

void read_shared(int offset, int bytes, Place place) {
    Thread& me = *current;
    Machine& m = machine();
    Cell* const first = m.cells + offset / 2;
    Cell* const last = first + bytes / 2;
    const uint32_t synced = m.synced, began = m.began, now = m.clock;
    const uint16_t at = m.pack(place), index = uint16_t(me.index);
    for (Cell* c = first; c != last; ++c) {
        if (c->wrote < began || (c->wrote >= synced && c->writer != index)) check_read(m, me, *c, place);
        c->reader = c->read < synced || c->reader == index ? index : m.merge(c->reader, c->read, me);
        c->read = now;
        c->read_at = at;
    }
}

void write_shared(int offset, int bytes, Place place) {
    mark_written(machine(), *current, offset, bytes, "writes", place, false);
}

void add_shared(int offset, int bytes, Place place) {
    const Thread& me = *current;
    Machine& m = machine();
    Cell* const first = m.cells + offset / 2;
    for (Cell* c = first; c != first + bytes / 2; ++c) {
        if (c->wrote < m.began) fail_unwritten(m, *c, "adds to", place);
        if (c->wrote == kInFlight) fail_in_flight(m, me, *c, "adds to", place);
        if (!(c->writer & kAtomic) && !ordered(m, me, c->writer, c->wrote)) {
            fail_unordered(m, me, *c, "adds to", "wrote", c->writer, c->wrote_at, place);
        }
        if (!ordered(m, me, c->reader, c->read)) {
            fail_unordered(m, me, *c, "adds to", "read", c->reader, c->read_at, place);
        }
        const bool also = c->writer & kAtomic;
        c->writer = uint16_t((also ? m.merge(c->writer & uint16_t(~kAtomic), c->wrote, me) : me.index) | kAtomic);
        c->wrote = m.clock;
        c->wrote_at = m.pack(place);
    }
}

void start_copy(int offset, const void* from, Place place) {
    Thread& me = *current;
    Machine& m = machine();
    mark_written(m, me, offset, kCopyBytes, "copies to", place, true);
    me.copies.push_back({from, offset, me.groups, m.pack(place)});
}

void wait_copies(int groups) {
    Thread& me = *current;
    Machine& m = machine();
    for (; me.first_copy < me.copies.size(); ++me.first_copy) {
        const Copy& copy = me.copies[me.first_copy];
        if (copy.group >= me.groups - groups) return;
        if (copy.from == nullptr) {
            std::memset(m.memory + copy.to, 0, kCopyBytes);
        } else {
            std::memcpy(m.memory + copy.to, copy.from, kCopyBytes);
        }
        const Cell after{m.clock, 0, uint16_t(me.index), 0, copy.started_at, 0};
        Cell* const first = m.cells + copy.to / 2;
        for (Cell* c = first; c != first + kCopyBytes / 2; ++c) *c = after;
    }
    me.copies.clear();
    me.first_copy = 0;
}

// --- barriers and collectives -----------------------------------------------------------------------------------------

bool arrive(Wait what, Place place) {
    Thread& me = *current;
    Warp& w = *me.warp;
    if (w.alive != ~0u) {
        const int missing = __builtin_ctz(~w.alive);
        const bool exists = me.index - me.lane + missing < me.state->start.threads;
        fail(place, "%s needs all 32 lanes, and lane %d of its warp %s", name_of(what), missing,
             exists ? "has returned" : "does not exist");
    }
    if (w.arrived == 0) {
        w.waits = what;
        w.place = place;
    } else if (w.waits != what || !same(w.place, place)) {
        fail(place, "lanes of a warp are at different collectives: lane %d waits at %s (%.60s:%d), lane %d comes to %s",
             __builtin_ctz(w.arrived), name_of(w.waits), relative(w.place.file), w.place.line, me.lane, name_of(what));
    }
    w.arrived |= 1u << me.lane;
    me.waits = what;
    me.place = place;
    return w.arrived == ~0u;
}

void release_warp() {
    const Thread& me = *current;
    Warp& w = *me.warp;
    w.arrived = 0;
    w.turn ^= 1u;
    w.ready = ~(1u << me.lane);
    me.state->ready_warps |= 1u << (me.index / kLanes);
}

void wait() {
    Machine& m = machine();
    Thread* const to = m.next();
    if (to == nullptr) fail_deadlock();
    switch_threads(*current, *to);
}

void sync_warp(Place place) {
    if (arrive(Wait::sync_warp, place)) {
        current->warp->synced = ++current->state->clock;
        release_warp();
    } else {
        wait();
    }
}

void sync_threads(Place place) {
    Thread& me = *current;
    Machine& m = machine();
    if (m.arrived == 0) {
        m.barrier = place;
    } else if (!same(m.barrier, place)) {
        fail(place,
             "threads of a block are at different barriers: some wait at sync_threads (%.60s:%d), this one comes to "
             "another",
             relative(m.barrier.file), m.barrier.line);
    }
    me.waits = Wait::sync_threads;
    me.place = place;
    if (++m.arrived == m.alive) {
        m.release_block(me);
    } else {
        wait();
    }
}

// --- errors -----------------------------------------------------------------------------------------------------------

void fail(Place place, const char* format, ...) {
    char text[320];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    machine().report(*current, place, text);
    throw Failure();
}

void fail_bounds(Place place, const char* does, int64_t index, int n, const char* name, int64_t count) {
    const auto i = static_cast<long long>(index), all = static_cast<long long>(count);
    if (n == 1) fail(place, "%s element %lld of %.80s, which has %lld", does, i, name, all);
    fail(place, "%s elements %lld to %lld of %.80s, which has %lld", does, i, i + n - 1, name, all);
}

void fail_alignment(Place place, const char* does, int64_t index, const char* name, int bytes) {
    fail(place, "%s element %lld of %.80s, misaligned: its address is no multiple of %d bytes", does,
         static_cast<long long>(index), name, bytes);
}

void fail_early(Place place, const char* does, const char* name) {
    const bool writes = std::strcmp(does, "writes") == 0;
    fail(place, "%s %.80s before wait_for_previous, and an earlier kernel may still %s it", does, name,
         writes ? "read" : "write");
}

// --- the matrix unit --------------------------------------------------------------------------------------------------

namespace {

typedef float Row __attribute__((vector_size(32)));

// Products are exact in float32, so that it makes no difference whether a processor fuses them with the sum.
template <int k>
inline __attribute__((always_inline)) void multiply_rows(Product& p) {
    Row b[k];
    std::memcpy(b, p.b, sizeof(b));
    for (int m = 0; m < 16; ++m) {
        Row sum;
        std::memcpy(&sum, p.c[m], sizeof(sum));
        for (int i = 0; i < k; ++i) sum += p.a[m][i] * b[i];
        std::memcpy(p.c[m], &sum, sizeof(sum));
    }
}

}  // namespace

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(MOE_SIM_ASAN)
__attribute__((target_clones("avx2", "default")))
#endif
void multiply(Product& product, int k) {
    if (k == 16) {
        multiply_rows<16>(product);
    } else {
        multiply_rows<8>(product);
    }
}

Status run(const Start& start) {
    try {
        return run_grid(start);
    } catch (const std::exception& error) {
        Status status;
        status.code = StatusCode::device_error;
        std::snprintf(status.message, sizeof(status.message), "%.200s (kernel %.40s)", error.what(), start.name);
        return status;
    }
}

}  // namespace moe::sim
