// SPDX-License-Identifier: Apache-2.0
// The native code without Python, for sanitizers (make sanitize): random calls of each entry point, and one program that
// several threads run at once.
//
//   fuzz SEED CASES [THREADS]
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/conv2d.h"
#include "cpu/program.h"
#include "fuzz/fuzz.h"

namespace {

using namespace moe;
using namespace moe::cpu;

constexpr int64_t kWidth = 16, kSize = 8, kSlices = 2, kPixels = kSize * kSize;

// image -> routed 3x3 convolution with ReLU -> result, for every batch of the same weights.
class SharedProgram {
  public:
    SharedProgram() : program_(DType::float32, kBytes, 4, {}), packed_(numel()) {
        std::vector<float> weight(size_t(kSlices * kWidth * kWidth * 9));
        for (size_t i = 0; i < weight.size(); ++i) weight[i] = float(i % 31) / 31 - 0.5f;
        const std::string error = pack(Direction::forward, call(), weight.data(), packed_.data());
        if (!error.empty()) throw std::runtime_error(error);
        const Place images{0, 0, kSize, kSize, kWidth, kWidth};
        const Place results{kWidth * kPixels * 4, 0, kSize, kSize, kWidth, kWidth};
        program_.load(0, images);
        program_.load_index(1, 2 * kWidth * kPixels * 4);
        ProgramConv conv;
        conv.src = images, conv.dst = results;
        conv.shape = call().shape;
        conv.shape.V = 1;
        conv.out_expert = 2 * kWidth * kPixels * 4;
        conv.out_count = kSlices;
        conv.packed = packed_.data();
        conv.epilogue.relu = true;
        program_.conv(conv);
        program_.store(0, results, {});
    }

    std::vector<float> run(int64_t samples, int64_t shift, int threads) const {
        std::vector<float> x(size_t(samples * kWidth * kPixels)), y(x.size());
        std::vector<int64_t> expert;
        for (size_t i = 0; i < x.size(); ++i) x[i] = float((int64_t(i) + shift) % 17) / 17 - 0.5f;
        for (int64_t v = 0; v < samples; ++v) expert.push_back((v + shift) % kSlices);
        const External images{x.data(), {kWidth * kPixels, 1, kSize * kWidth, kWidth}};
        const External results{y.data(), {kWidth * kPixels, 1, kSize * kWidth, kWidth}};
        const std::string error = program_.run(samples, {images, {expert.data(), {1, 0, 0, 0}}}, {results}, threads);
        if (!error.empty()) throw std::runtime_error(error);
        return y;
    }

  private:
    static constexpr int64_t kBytes = 2 * kWidth * kPixels * 4 + 8;

    static Call call() {
        Call c{};
        c.dtype = DType::float32;
        c.threads = 1;
        c.shape = {0, 1, kWidth, kSize, kSize, kWidth, kSize, kSize, 3, 3, 1, 1, 1, 1, 1, 1, 1};
        c.slices.out.count = kSlices;
        c.weight = {kSlices * kWidth, kWidth, {kWidth * 9, 9, 3, 1}};
        return c;
    }
    static size_t numel() { return size_t(pack_numel(Direction::forward, call())); }

    Program program_;
    std::vector<float> packed_;
};

void run_shared(const SharedProgram& program, int64_t rounds, int64_t shift) {
    for (int64_t i = 0; i < rounds; ++i) {
        const int64_t samples = 1 + (i + shift) % 13;
        if (program.run(samples, shift, 1) != program.run(samples, shift, 2))
            throw std::runtime_error("program: another result with two threads");
    }
}

int run(int argc, char** argv) {
    if (argc < 3 || argc > 4) {
        std::fprintf(stderr, "usage: fuzz SEED CASES [THREADS]\n");
        return 2;
    }
    const uint64_t seed = std::strtoull(argv[1], nullptr, 10);
    const int64_t cases = std::strtoll(argv[2], nullptr, 10), count = argc > 3 ? std::strtoll(argv[3], nullptr, 10) : 1;
    const SharedProgram program;
    std::vector<std::string> said(size_t(count > 0 ? count : 0)), failed(said.size());
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; ++i) {
        threads.emplace_back([&, i] {
            try {
                const int64_t each = (cases + count - 1) / count;
                std::string& mine = said[size_t(i)];
                mine = "conv2d: " + moe::fuzz::conv2d(seed, i * each, each);
                mine += "; features: " + moe::fuzz::features(seed, i * each, each);
                mine += "; program: " + moe::fuzz::program(seed, i * each, each);
                run_shared(program, each + 1, i);
            } catch (const std::exception& error) {
                failed[size_t(i)] = error.what();
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    bool all = true;
    for (size_t i = 0; i < said.size(); ++i) {
        std::printf("thread %zu: %s\n", i, failed[i].empty() ? said[i].c_str() : failed[i].c_str());
        all = all && failed[i].empty();
    }
    return all && count > 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        return run(argc, argv);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
