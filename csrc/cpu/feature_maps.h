// SPDX-License-Identifier: Apache-2.0
// The entry point of the kernels in features.h.
#pragma once

#include <string>

#include "cpu/feature_jobs.h"

namespace moe::cpu {

// Returns an empty string, or what was wrong with the job, found before its features are touched; memory that cannot be
// had is std::bad_alloc. Results overlap nothing.
std::string features(DType dtype, FeatureKernel kernel, const FeatureJob& job);

}  // namespace moe::cpu
