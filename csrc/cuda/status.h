// SPDX-License-Identifier: Apache-2.0
// How a call on the device ended: no exception leaves the kernels' entry points.
#pragma once

namespace moe {

enum class StatusCode : int { ok = 0, invalid_argument = 1, device_error = 2 };

struct Status {
    StatusCode code = StatusCode::ok;
    char message[512] = {};
    bool ok() const { return code == StatusCode::ok; }
};

}  // namespace moe
