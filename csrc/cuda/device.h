// SPDX-License-Identifier: Apache-2.0
// What kernels know of the device, and the only place with inline PTX. There are two implementations of these names: this
// file, for nvcc (sm_80 and later), and sim/device.h, with which the same .cu files compile as C++ for the host.
//
//   MOE_KERNEL(threads, blocks)  before a kernel: threads of a block at most, blocks of a multiprocessor at least
//   block_x() thread() lane() warp() ..       where this thread is; blocks have one dimension
//   Global<T>, Shared<T>         pointers that know their extent where somebody checks it: in the simulator
//   shared<T>(offset, count)     `count` elements of the block's shared memory, from byte `offset` on
//   sync_threads() sync_warp()   barriers
//   shuffle() shuffle_xor() ballot() match_any()          of all 32 lanes
//   copy_async() commit_copies() wait_copies<N>()         16 bytes from global to shared memory, zeros if not `inside`;
//                                the data is there after wait_copies, for other threads after a barrier too
//   load_matrices() load_matrices_transposed()  ldmatrix.x4: lane l gives row l % 8 of matrix l / 8
//   multiply_accumulate(d, a, b, T{})           mma.sync m16n8: k16 of bfloat16 and float16, k8 of tf32
//   wait_for_previous() allow_next()            programmatic dependent launch
//   launch()                     on the host: starts a kernel, says what went wrong
#pragma once

#ifdef MOE_SIMULATOR
#include "sim/device.h"
#else

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <type_traits>

#include "cuda/status.h"

#define MOE_GPU cuda
#define MOE_ENTRY(name) moe_cuda_##name
#define MOE_DEVICE __device__ __forceinline__
#define MOE_HOST_DEVICE __host__ __device__ __forceinline__
#define MOE_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define MOE_UNROLL _Pragma("unroll")

namespace moe::MOE_GPU::device {

// --- element types ----------------------------------------------------------------------------------------------------

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};
struct tf32 {};  // float32 in memory; what the matrix unit reads of it

MOE_DEVICE float to_float(float x) { return x; }
MOE_DEVICE float to_float(bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
MOE_DEVICE float to_float(float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

template <class T>
MOE_DEVICE T from_float(float x);
template <>
MOE_DEVICE float from_float<float>(float x) {
    return x;
}
template <>
MOE_DEVICE bfloat16 from_float<bfloat16>(float x) {
    bfloat16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <>
MOE_DEVICE float16 from_float<float16>(float x) {
    float16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// The bits of a float32 rounded to tf32: to the nearest, ties away from zero.
MOE_DEVICE uint32_t to_tf32(uint32_t bits) {
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(bits)));
    return y;
}

MOE_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
MOE_DEVICE float not_a_number() { return __uint_as_float(0x7fc00000u); }
MOE_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
MOE_DEVICE float exponential(float x) { return expf(x); }
MOE_DEVICE float reciprocal_root(float x) { return rsqrtf(x); }
MOE_HOST_DEVICE uint32_t high_product(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    T v[N];
};

// --- where a thread is ------------------------------------------------------------------------------------------------

MOE_DEVICE int block_x() { return blockIdx.x; }
MOE_DEVICE int block_y() { return blockIdx.y; }
MOE_DEVICE int block_z() { return blockIdx.z; }
MOE_DEVICE int thread() { return threadIdx.x; }
MOE_DEVICE int threads() { return blockDim.x; }
MOE_DEVICE int lane() { return threadIdx.x % 32; }
MOE_DEVICE int warp() { return threadIdx.x / 32; }

// --- memory -----------------------------------------------------------------------------------------------------------

template <class T>
struct Global {
    T* p;
    MOE_DEVICE T load(int64_t i) const { return p[i]; }
    MOE_DEVICE void store(int64_t i, T value) const { p[i] = value; }
    // N elements from i on, which lie N * sizeof(T) bytes aligned
    template <int N>
    MOE_DEVICE Vector<std::remove_const_t<T>, N> load_vector(int64_t i) const {
        return *reinterpret_cast<const Vector<std::remove_const_t<T>, N>*>(p + i);
    }
    template <int N>
    MOE_DEVICE void store_vector(int64_t i, const Vector<T, N>& value) const {
        *reinterpret_cast<Vector<T, N>*>(p + i) = value;
    }
    // what other blocks of this grid may have written: past the first cache, which is not coherent
    MOE_DEVICE T load_of_others(int64_t i) const { return __ldcg(p + i); }
    MOE_DEVICE Global at(int64_t offset) const { return {p + offset}; }
    MOE_HOST_DEVICE bool given() const { return p != nullptr; }
};

// `count` elements at p, called `name` in messages; given() is false where p is null.
template <class T>
Global<T> global(T* p, int64_t count, const char* name) {
    (void)count, (void)name;
    return {p};
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
    T* p;
    MOE_DEVICE T load(int i) const { return p[i]; }
    MOE_DEVICE void store(int i, T value) const { p[i] = value; }
    template <int N>
    MOE_DEVICE Vector<T, N> load_vector(int i) const {
        return *reinterpret_cast<const Vector<T, N>*>(p + i);
    }
    template <int N>
    MOE_DEVICE void store_vector(int i, const Vector<T, N>& value) const {
        *reinterpret_cast<Vector<T, N>*>(p + i) = value;
    }
    MOE_DEVICE Shared at(int offset) const { return {p + offset}; }
};

template <class T>
MOE_DEVICE Shared<T> shared(int offset, int count) {
    extern __shared__ __align__(128) unsigned char moe_shared_memory[];
    (void)count;
    return {reinterpret_cast<T*>(moe_shared_memory + offset)};
}

MOE_DEVICE int atomic_add(Global<int> where, int64_t i, int value) { return atomicAdd(where.p + i, value); }
MOE_DEVICE int atomic_add(Shared<int> where, int i, int value) { return atomicAdd(where.p + i, value); }
// What this thread wrote to global memory before is seen by whoever sees what it writes after.
MOE_DEVICE void fence() { __threadfence(); }

// --- barriers and warps -----------------------------------------------------------------------------------------------

MOE_DEVICE void sync_threads() { __syncthreads(); }
MOE_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
MOE_DEVICE T shuffle(T value, int from) {
    return __shfl_sync(0xffffffffu, value, from);
}
template <class T>
MOE_DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
MOE_DEVICE uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
MOE_DEVICE uint32_t match_any(int value) { return __match_any_sync(0xffffffffu, value); }
MOE_DEVICE int population(uint32_t bits) { return __popc(bits); }

// --- asynchronous copies ----------------------------------------------------------------------------------------------

MOE_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

template <class T>
MOE_DEVICE void copy_async(Shared<T> to, Global<const T> from, bool inside) {
    const int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to.p)), "l"(from.p), "r"(bytes)
                 : "memory");
}
MOE_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's committed groups are on their way.
template <int N>
MOE_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// --- matrix unit ------------------------------------------------------------------------------------------------------

template <class T>
MOE_DEVICE void load_matrices(uint32_t (&r)[4], Shared<T> row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row.p))
                 : "memory");
}
template <class T>
MOE_DEVICE void load_matrices_transposed(uint32_t (&r)[4], Shared<T> row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row.p))
                 : "memory");
}

// d[16][8] += a[16][k] * b[k][8]; fragments as the PTX ISA lays them out.
MOE_DEVICE void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
MOE_DEVICE void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
MOE_DEVICE void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], tf32) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- one kernel after another -----------------------------------------------------------------------------------------

// Of a launch that may overlap the one before it: nothing that an earlier kernel wrote may be read, and nothing that it
// reads may be written, before this.
MOE_DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
MOE_DEVICE void allow_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// --- the host's side --------------------------------------------------------------------------------------------------

inline Status from_cuda(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return {};
    Status status;
    status.code = StatusCode::device_error;
    std::snprintf(status.message, sizeof(status.message), "%s: %s: %s", what, cudaGetErrorName(error),
                  cudaGetErrorString(error));
    return status;
}

// Makes a device current, and the one before it again at its end: this library's runtime has a notion of its own.
class DeviceGuard {
  public:
    explicit DeviceGuard(int index) {
        status = from_cuda(cudaGetDevice(&before_), "cudaGetDevice");
        if (status.ok() && before_ != index) {
            status = from_cuda(cudaSetDevice(index), "cudaSetDevice");
            changed_ = status.ok();
        }
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    Status status;

  private:
    int before_ = 0;
    bool changed_ = false;
};

// Zeros that live as long as the process, there for what follows in the stream.
inline Status allocate_zeros(void** p, size_t bytes, void* stream) {
    const Status status = from_cuda(cudaMalloc(p, bytes), "cudaMalloc");
    if (!status.ok()) {
        cudaGetLastError();
        return status;
    }
    return from_cuda(cudaMemsetAsync(*p, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

struct Grid {
    int64_t x = 1, y = 1, z = 1;
};

// What a kernel is started with. `overlap`: it may start before the kernel ahead of it in the stream has ended, and calls
// wait_for_previous(); asked for only where the device can.
struct Launch {
    const char* name;
    Grid grid;
    int threads;
    int shared_bytes;
    int device;
    void* stream;
    bool overlap;
};

// Whether this module has code for the current device.
template <auto kernel>
Status loadable() {
    cudaFuncAttributes attributes{};
    const auto error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) cudaGetLastError();
    return from_cuda(error, "cudaFuncGetAttributes");
}

// A template argument, so that what was asked of the driver is kept for each kernel.
template <auto kernel, class Params>
Status launch(const Launch& how, const Params& params) {
    constexpr int without_asking = 48 * 1024;
    static std::atomic<uint64_t> asked{0}, waits{0};  // a bit for each device
    const auto bit = uint64_t(how.device < 64) << (how.device % 64);
    bool can_wait = (waits.load() & bit) != 0;
    if (!(asked.load() & bit)) {
        cudaFuncAttributes attributes{};
        auto error = cudaFuncGetAttributes(&attributes, kernel);
        if (error == cudaSuccess && how.shared_bytes > without_asking) {
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes);
        }
        if (error != cudaSuccess) {
            cudaGetLastError();
            return from_cuda(error, how.name);
        }
        // made from older PTX, a kernel has no wait_for_previous, whatever the device can do
        can_wait = attributes.ptxVersion >= 90;
        if (can_wait) waits |= bit;
        asked |= bit;
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(how.grid.x), unsigned(how.grid.y), unsigned(how.grid.z));
    config.blockDim = dim3(unsigned(how.threads));
    config.dynamicSmemBytes = size_t(how.shared_bytes);
    config.stream = static_cast<cudaStream_t>(how.stream);
    config.attrs = &attribute;
    config.numAttrs = how.overlap && can_wait ? 1 : 0;
    const auto error = cudaLaunchKernelEx(&config, kernel, params);
    if (error != cudaSuccess) cudaGetLastError();  // an error of a launch stays in the runtime otherwise
    return from_cuda(error, how.name);
}

}  // namespace moe::MOE_GPU::device

#endif  // MOE_SIMULATOR
