// SPDX-License-Identifier: Apache-2.0
// A whole network as a sequence of kernel calls, recorded once and run for batches of any size without Python between its
// layers. moe_kernels.inference.lowering records it and plans its memory: a place is so many bytes into the memory of one
// sample, and lies so many times the number of samples into the memory of a run.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "common/conv2d.h"
#include "cpu/jobs.h"
#include "cpu/passes.h"

namespace moe::cpu {

constexpr int64_t kNowhere = -1;

// Pixels in a program's memory. A vector is an image of one pixel.
struct Place {
    int64_t offset = kNowhere;  // bytes, for one sample; where the buffer begins
    int64_t channel = 0;        // the first of these in the buffer's pixels
    int64_t height = 1, width = 1, channels = 0, pixel_stride = 0;

    bool none() const { return offset == kNowhere; }
};

// A prologue whose samples' rows are chosen by an index in the program's memory.
struct ProgramPrologue {
    const void* scale = nullptr;
    const void* shift = nullptr;
    int64_t expert = kNowhere;
    int64_t channels = 0;  // of a row
    int64_t rows = 0;
    bool relu = false;

    bool none() const { return scale == nullptr && shift == nullptr && !relu; }
};

struct ProgramConv {
    Place src, dst, residual;
    Conv2dShape shape;                                    // of one sample
    int64_t out_expert = kNowhere, in_expert = kNowhere;  // places of int64 indices, one for each sample
    int64_t out_count = 0, in_count = 0;
    std::vector<int64_t> out_starts, in_starts;
    const void* packed = nullptr;
    Epilogue epilogue;  // gate and residual are set by each run
    int64_t gate = kNowhere;
    ProgramPrologue prologue;
};

struct ProgramLayer {
    LayerJob job;  // but for what each run sets: samples, data, index, prologue, threads
    Place src, other, dst;
    int64_t index = kNowhere;
    ProgramPrologue prologue;
};

// The part of a program that takes more samples together, in memory of its own: layers whose weights, of all experts, are
// heavy, and are read once for so many. What it reads of the steps before is copied.
struct Late {
    struct Live {
        int64_t offset, bytes;  // for one sample
    };
    int64_t first = -1;  // its first step; -1: there is none
    int64_t chunk = 0;   // samples, at most
    int64_t sample_bytes = 0;
    std::vector<Live> live;
};

// A tensor from outside [samples, channels, height, width], by strides in elements. Indices are int64 [samples].
struct External {
    void* data;
    int64_t strides[4];
};

// Steps are looked at as they are recorded: std::invalid_argument where one would read or write outside its memory. What
// pointers to constants point to is the caller's word.
class Program {
  public:
    // `chunk`: samples that go through the network together at most, where there are many.
    Program(DType dtype, int64_t sample_bytes, int64_t chunk, Late late);
    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;

    void load(int64_t input, Place dst);
    void load_index(int64_t input, int64_t dst);
    void store(int64_t output, Place src, ProgramPrologue prologue);
    void store_index(int64_t output, int64_t src);
    void conv(ProgramConv conv);
    void layer(ProgramLayer layer);

    // Returns an empty string, or what was wrong: a number of samples, threads or tensors, an index out of range, or a
    // NaN score. `seconds`, if not null, gets the time of each step, summed over the parts of the batch.
    std::string run(int64_t samples, const std::vector<External>& inputs, const std::vector<External>& outputs,
                    int threads, std::vector<double>* seconds = nullptr) const;

    // Bytes that a run for so many samples takes, and that are kept for the next. Throws std::invalid_argument where run
    // would refuse them.
    int64_t memory(int64_t samples, int threads) const;

  private:
    struct Step {
        enum class Kind { load, load_index, store, store_index, conv, layer } kind;
        size_t which = 0;      // of convs_ or layers_
        int64_t external = 0;  // input or output
        Place place;
        int64_t index = kNowhere;
        ProgramPrologue prologue;
    };
    struct Conv {
        ProgramConv given;
        Passes passes;
    };
    struct Memory {
        void* data = nullptr;
        size_t size = 0;
        ~Memory();
    };
    struct Part;

    struct Cut;

    int64_t room() const;
    std::string check_run(int64_t samples, int threads) const;
    std::string check_tensors(int64_t samples, const std::vector<External>& inputs,
                              const std::vector<External>& outputs) const;
    Cut cut(int64_t samples, int threads) const;
    std::string run_part(const Part& part, const Cut& cut, std::vector<double>* seconds) const;
    std::string run_steps(const Part& part, size_t begin, size_t end, std::vector<double>* seconds) const;
    std::string run_step(const Step& step, const Part& part) const;
    std::string run_conv(const Conv& conv, const Part& part) const;
    std::string run_layer(const ProgramLayer& layer, const Part& part) const;
    std::unique_ptr<Memory> take_memory(size_t bytes) const;

    DType dtype_;
    int64_t sample_bytes_, chunk_;
    Late late_;
    std::vector<Step> steps_;
    std::vector<Conv> convs_;
    std::vector<ProgramLayer> layers_;
    mutable std::mutex mutex_;  // of free_: runs of several threads of the process have memory of their own
    mutable std::vector<std::unique_ptr<Memory>> free_;
};

}  // namespace moe::cpu
