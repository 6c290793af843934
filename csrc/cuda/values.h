// SPDX-License-Identifier: Apache-2.0
// Values of which each has one for a channel or a sample (api.h), as kernels read them: a branch on their type, the same
// for all threads, instead of a kernel for each combination of types.
#pragma once

#include "cuda/api.h"
#include "cuda/device.h"
#include "cuda/entry.h"

namespace moe::MOE_GPU {

// One of them is given, or none: then the values are absent.
struct ValuesView {
    device::Global<const float> f;
    device::Global<const device::bfloat16> b;
    device::Global<const device::float16> h;

    MOE_HOST_DEVICE bool given() const { return f.given() || b.given() || h.given(); }
    MOE_DEVICE float load(int64_t i) const {
        if (f.given()) return device::to_float(f.load(i));
        if (b.given()) return device::to_float(b.load(i));
        return device::to_float(h.load(i));
    }
};

// Values called `name` in messages. Writes to `status` only where their type is none that kernels read.
inline ValuesView view(const gpu::Values& values, const char* name, Status& status) {
    const auto is = [&](DType dtype) { return values.data != nullptr && values.dtype == dtype; };
    ValuesView out{
        device::global<float>(is(DType::float32) ? values.data : nullptr, values.count, name),
        device::global<device::bfloat16>(is(DType::bfloat16) ? values.data : nullptr, values.count, name),
        device::global<device::float16>(is(DType::float16) ? values.data : nullptr, values.count, name),
    };
    if (values.data != nullptr && !out.given()) {
        status = invalid("%s: expected float32, bfloat16 or float16, got dtype %d", name, int(values.dtype));
    }
    return out;
}

// The same, of which there must be `count`.
inline ValuesView view(const gpu::Values& values, int64_t count, const char* name, Status& status) {
    if (values.data != nullptr && values.count != count) {
        status = invalid("%s: expected %lld values, got %lld", name, static_cast<long long>(count),
                         static_cast<long long>(values.count));
    }
    return view(values, name, status);
}

}  // namespace moe::MOE_GPU
