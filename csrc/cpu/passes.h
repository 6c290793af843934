// SPDX-License-Identifier: Apache-2.0
// The passes of a convolution, as the kernels are given them.
#pragma once

#include <utility>
#include <vector>

#include "common/conv2d.h"
#include "cpu/jobs.h"

namespace moe::cpu {

// Passes with the arrays that they point to.
struct Passes {
    std::vector<Pass> list;
    std::vector<std::vector<int64_t>> storage;

    void add(Pass pass, const std::vector<int64_t>& h, const std::vector<int64_t>& w, const std::vector<int64_t>& r,
             const std::vector<int64_t>& s, int64_t S) {
        std::vector<int64_t> tap_h, tap_w, tap_weight;
        for (size_t i = 0; i < h.size(); ++i) {
            for (size_t j = 0; j < w.size(); ++j) {
                tap_h.push_back(h[i]);
                tap_w.push_back(w[j]);
                tap_weight.push_back(r[i] * S + s[j]);
            }
        }
        pass.taps = int64_t(tap_h.size());
        pass.taps_before = list.empty() ? 0 : list.back().taps_before + list.back().taps;
        for (auto* v : {&tap_h, &tap_w, &tap_weight}) storage.push_back(std::move(*v));
        const size_t n = storage.size();
        pass.tap_h = storage[n - 3].data();
        pass.tap_w = storage[n - 2].data();
        pass.tap_weight = storage[n - 1].data();
        list.push_back(pass);
    }
};

Passes forward_passes(const Conv2dShape& shape);

// Never by the number of samples: a sample's result does not depend on its batch, and weights are packed before the
// batch is known.
Algorithm choose_algorithm(DType dtype, int64_t red, const Passes& passes);

}  // namespace moe::cpu
