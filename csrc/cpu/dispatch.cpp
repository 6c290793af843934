// SPDX-License-Identifier: Apache-2.0
#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace moe::cpu {

extern const KernelTable kernels_generic;
#ifndef MOE_ISA_GENERIC_ONLY
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
#endif

namespace {

struct Candidate {
    const KernelTable* table;
    bool runs;
};

const KernelTable& choose() {
#ifndef MOE_ISA_GENERIC_ONLY
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const Candidate candidates[] = {{&kernels_avx512, avx512}, {&kernels_avx2, avx2}, {&kernels_generic, true}};
#else
    const Candidate candidates[] = {{&kernels_generic, true}};
#endif
    const char* wanted = std::getenv("MOE_KERNELS_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') {
        for (const Candidate& c : candidates) {
            if (c.runs) return *c.table;
        }
    }
    std::string usable;
    for (const Candidate& c : candidates) {
        if (!c.runs) continue;
        if (std::string(c.table->isa) == wanted) return *c.table;
        usable += std::string(usable.empty() ? "" : ", ") + c.table->isa;
    }
    throw std::invalid_argument(std::string("MOE_KERNELS_CPU_ISA=") + wanted + " cannot be used here; expected one of " +
                                usable);
}

// A block of memory that grows and is given back with its thread.
struct Arena {
    void* memory = nullptr;
    size_t size = 0;
    ~Arena() { std::free(memory); }
    void* get(size_t bytes) {
        if (bytes <= size) return memory;
        std::free(memory);
        const size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
        memory = std::aligned_alloc(4096, rounded);
        size = memory != nullptr ? rounded : 0;
        return memory;
    }
};

}  // namespace

const KernelTable& kernels() {
    static const KernelTable& chosen = choose();
    return chosen;
}

bool winograd_allowed() {
    static const bool allowed = [] {
        const char* wanted = std::getenv("MOE_KERNELS_WINOGRAD");
        if (wanted == nullptr || *wanted == '\0' || std::string(wanted) == "1") return true;
        if (std::string(wanted) == "0") return false;
        throw std::invalid_argument(std::string("MOE_KERNELS_WINOGRAD=") + wanted + " must be 0 or 1");
    }();
    return allowed;
}

void* scratch(Scratch which, size_t bytes) {
    thread_local Arena arenas[4];
    return arenas[int(which)].get(bytes > 0 ? bytes : 1);
}

}  // namespace moe::cpu
