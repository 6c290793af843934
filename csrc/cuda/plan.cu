// SPDX-License-Identifier: Apache-2.0
// The routing plan: the samples in the order of their groups, and where each group begins. One block; stable, so that the
// same routing has the same plan.
#include <algorithm>

#include "cuda/entry.h"
#include "cuda/groups.h"

namespace moe::MOE_GPU {

namespace {

struct PlanParams {
    Grouping groups;
    Global<int32_t> plan;  // offsets [count + 2], order [V]
};

constexpr int kPlanThreads = 1024;

MOE_KERNEL(kPlanThreads, 1)
plan_kernel(const PlanParams p) {
    device::wait_for_previous();
    device::allow_next();
    const int samples = p.groups.samples, groups = p.groups.count + 1;  // the invalid samples' too
    const int lane = device::lane();
    const Shared<int> next = device::shared<int>(0, groups);  // how many; then the next free place of each group
    for (int g = device::thread(); g < groups; g += device::threads()) next.store(g, 0);
    device::sync_threads();
    for (int v = device::thread(); v < samples; v += device::threads()) device::atomic_add(next, p.groups.of(v), 1);
    device::sync_threads();
    if (device::warp() == 0) {
        int before = 0;
        for (int first = 0; first < groups; first += 32) {
            const int g = first + lane;
            const int count = g < groups ? next.load(g) : 0;
            const int last = before + inclusive_sum(count);
            if (g < groups) {
                next.store(g, last - count);
                p.plan.store(g, last - count);
            }
            before = device::shuffle(last, 31);
        }
        if (lane == 0) p.plan.store(groups, samples);
    }
    device::sync_threads();
    // warp after warp, so that the order within a group is that of the samples
    const int warps = device::threads() / 32;
    for (int first = 0; first < samples; first += device::threads()) {
        const int v = first + device::thread();
        const int group = v < samples ? p.groups.of(v) : groups;
        const uint32_t alike = device::match_any(group);
        const int rank = device::population(alike & ((uint32_t(1) << lane) - 1));
        int place = 0;
        for (int w = 0; w < warps; ++w) {
            if (device::warp() == w) {
                if (v < samples) place = next.load(group);
                device::sync_warp();
                if (v < samples && rank == 0) next.store(group, place + device::population(alike));
            }
            device::sync_threads();
        }
        if (v < samples) p.plan.store(groups + 1 + place + rank, v);
    }
}

Status make_plan(const gpu::PlanCall& call) {
    Slices slices{{call.out_expert, call.num_out, nullptr}, {call.in_expert, call.num_in, nullptr}};
    Conv2dShape shape{};
    shape.V = call.samples;
    PlanParams params{};
    const int64_t count = std::max<int64_t>(call.num_out, 1) * std::max<int64_t>(call.num_in, 1);
    if (count > gpu::most_groups) {
        return invalid("groups: at most %lld, got %lld", (long long)gpu::most_groups, (long long)count);
    }
    params.groups = view(slices, shape, count, call.num_out && call.num_in, nullptr);
    if (call.samples > kMostInt) return invalid("samples: fewer than 2^31, got %lld", (long long)call.samples);
    params.plan = device::global(call.plan, params.groups.count + 2 + call.samples, "plan");
    const int threads = int(std::clamp<int64_t>((call.samples + 31) / 32 * 32, 32, kPlanThreads));
    const device::Launch how{"plan",
                             {},
                             threads,
                             (params.groups.count + 1) * int(sizeof(int)),
                             call.where.device,
                             call.where.stream,
                             call.where.overlap != 0};
    return device::launch<plan_kernel>(how, params);
}

}  // namespace

}  // namespace moe::MOE_GPU

using namespace moe;

extern "C" int MOE_ENTRY(check_device)(const gpu::Where* where, char* message, size_t size) {
    const MOE_GPU::device::DeviceGuard guard(where->device);
    if (!guard.status.ok()) return finish(guard.status, message, size);
    return finish(MOE_GPU::device::loadable<MOE_GPU::plan_kernel>(), message, size);
}

extern "C" int MOE_ENTRY(plan)(const gpu::PlanCall* call, char* message, size_t size) {
    const MOE_GPU::device::DeviceGuard guard(call->where.device);
    if (!guard.status.ok()) return finish(guard.status, message, size);
    return finish(MOE_GPU::make_plan(*call), message, size);
}
