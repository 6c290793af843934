// SPDX-License-Identifier: Apache-2.0
// The pooled-features router: channel means, layer normalisation, linear, argmax and the chosen expert's softmax
// probability. One block takes one sample; all sums have a fixed order.
#include "cuda/api.h"
#include "cuda/device.h"
#include "cuda/entry.h"
#include "cuda/values.h"

namespace moe::MOE_GPU {
namespace {

using namespace device;

constexpr int block_threads = 256;
constexpr int block_warps = block_threads / 32;
constexpr int most_rows = 64;  // of partial sums, which one thread for each channel adds
constexpr int most_shared = 48 * 1024;

template <class T>
struct RouterParams {
    Global<const T> input;  // [B, pixels, channels]
    ValuesView norm_weight, norm_bias, weight, bias;
    Global<int64_t> expert;
    Global<T> scores;
    Global<float> gate;
    int64_t pixels;
    int channels, num_experts, normalize;
    float epsilon;
};

// The block's shared memory. `width`: channels of one load.
struct RouterMemory {
    int sums, means, best, total, index, bytes;
    MOE_HOST_DEVICE RouterMemory(int width, int channels) {
        sums = 0;  // [rows][channels of a pass]; first, because vectors of it are stored
        means = sums + block_threads * width * int(sizeof(float));
        best = means + channels * int(sizeof(float));  // of each warp
        total = best + block_warps * int(sizeof(float));
        index = total + block_warps * int(sizeof(float));
        bytes = index + block_warps * int(sizeof(int));
    }
};

MOE_DEVICE float warp_sum(float value) {  // the same bits in all lanes: the two sides of each addition only change places
    MOE_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// Means of all channels into shared memory. Threads lie over the columns, of `width` channels each, as memory does, and
// in as many rows as fit; a row takes every rows-th pixel. More columns than threads take several passes.
template <class T, int width>
MOE_DEVICE void pool(const RouterParams<T>& p, Shared<float> sums, Shared<float> means) {
    const int columns = p.channels / width;
    const int64_t image = int64_t(block_x()) * p.pixels * p.channels;
    for (int first = 0; first < columns; first += block_threads) {
        const int across = columns - first < block_threads ? columns - first : block_threads;
        const int fitting = block_threads / across;
        const int rows = fitting < most_rows ? fitting : most_rows;
        const int row = thread() / across, column = thread() % across;
        if (row < rows) {
            const int64_t from = image + int64_t(first + column) * width;
            Vector<float, width> sum{};
            const auto load = [&](int64_t pixel) {
                return p.input.template load_vector<width>(from + pixel * p.channels);
            };
            const auto add = [&](const auto& v) {
                MOE_UNROLL
                for (int k = 0; k < width; ++k) sum.v[k] += to_float(v.v[k]);
            };
            int64_t pixel = row;
            for (; pixel + 3 * rows < p.pixels; pixel += 4 * rows) {  // four loads on their way together
                const auto v0 = load(pixel), v1 = load(pixel + rows);
                const auto v2 = load(pixel + 2 * rows), v3 = load(pixel + 3 * rows);
                add(v0), add(v1), add(v2), add(v3);
            }
            for (; pixel < p.pixels; pixel += rows) add(load(pixel));
            sums.template store_vector<width>((row * across + column) * width, sum);
        }
        sync_threads();
        const int wide = across * width;
        for (int channel = thread(); channel < wide; channel += block_threads) {
            float sum = 0;
            for (int r = 0; r < rows; ++r) sum += sums.load(r * wide + channel);
            means.store(first * width + channel, sum / float(p.pixels));
        }
        sync_threads();
    }
}

// The pooled features as the linear map sees them. Every warp finds mean and variance by itself: there are few channels,
// and it costs no barrier.
template <class T>
struct Features {
    const RouterParams<T>& p;
    Shared<float> means;
    float mean = 0, scale = 1;

    MOE_DEVICE Features(const RouterParams<T>& params, Shared<float> of) : p(params), means(of) {
        if (!p.normalize) return;
        float sum = 0, squares = 0;
        for (int c = lane(); c < p.channels; c += 32) sum += means.load(c);
        mean = warp_sum(sum) / float(p.channels);
        for (int c = lane(); c < p.channels; c += 32) {
            const float centred = means.load(c) - mean;
            squares = multiply_add(centred, centred, squares);
        }
        scale = reciprocal_root(warp_sum(squares) / float(p.channels) + p.epsilon);
    }
    MOE_DEVICE float load(int c) const {
        if (!p.normalize) return means.load(c);
        float x = (means.load(c) - mean) * scale;
        if (p.norm_weight.given()) x *= p.norm_weight.load(c);
        return p.norm_bias.given() ? x + p.norm_bias.load(c) : x;
    }
};

// The highest score so far, the lowest of its indices, and the sum of exp(score - highest): what softmax needs of scores
// that are not kept. Index -1: a score was NaN.
struct Choice {
    float best;
    float total = 0;
    int index;

    // `start`: the index to stand for scores of which none is above minus infinity
    MOE_DEVICE explicit Choice(int start) : best(float_of(0xff800000u)), index(start) {}

    MOE_DEVICE void add(float score, int at) { merge(score, 1.f, score == score ? at : -1); }
    MOE_DEVICE void merge(float other, float others, int at) {
        if (index < 0 || at < 0) {
            index = -1;
        } else if (other > best) {
            total = multiply_add(total, exponential(best - other), others);
            best = other, index = at;
        } else {
            if (other == best && at < index) index = at;
            // minus infinity adds nothing, also to others of its kind: its difference from them would be NaN
            if (other > float_of(0xff800000u)) total = multiply_add(others, exponential(other - best), total);
        }
    }
    // NaN where torch's softmax has it: where the highest score is not finite
    MOE_DEVICE float probability() const { return index >= 0 && best - best == 0.f ? 1.f / total : not_a_number(); }
};

template <class T, int width>
MOE_KERNEL(block_threads, 4)
route(const RouterParams<T> p) {
    wait_for_previous();
    allow_next();
    const RouterMemory memory(width, p.channels);
    const auto means = shared<float>(memory.means, p.channels);
    pool<T, width>(p, shared<float>(memory.sums, block_threads * width), means);

    // an expert a warp, and the warp's choice among its own
    Choice choice(warp());
    if (warp() < p.num_experts) {
        const Features<T> features(p, means);
        for (int expert = warp(); expert < p.num_experts; expert += block_warps) {
            const int64_t row = int64_t(expert) * p.channels;
            float sum = 0;
            for (int c = lane(); c < p.channels; c += 32)
                sum = multiply_add(features.load(c), p.weight.load(row + c), sum);
            sum = warp_sum(sum);
            if (p.bias.given()) sum += p.bias.load(expert);
            // chosen by what is returned: a choice made of finer scores could contradict them
            const T score = from_float<T>(sum);
            choice.add(to_float(score), expert);
            if (p.scores.given() && lane() == 0) p.scores.store(int64_t(block_x()) * p.num_experts + expert, score);
        }
    }

    const auto best = shared<float>(memory.best, block_warps), total = shared<float>(memory.total, block_warps);
    const auto index = shared<int>(memory.index, block_warps);
    if (lane() == 0) {
        best.store(warp(), choice.best);
        total.store(warp(), choice.total);
        index.store(warp(), choice.index);
    }
    sync_threads();
    if (thread() == 0) {
        for (int w = 1; w < block_warps; ++w) choice.merge(best.load(w), total.load(w), index.load(w));
        p.expert.store(block_x(), choice.index < 0 ? p.num_experts : choice.index);
        if (p.gate.given()) p.gate.store(block_x(), choice.probability());
    }
}

template <class T>
Status start(const gpu::RouterCall& call) {
    Status status;
    const RouterParams<T> params{
        global<T>(call.input, call.samples * call.pixels * call.channels, "input"),
        view(call.norm_weight, call.channels, "norm_weight", status),
        view(call.norm_bias, call.channels, "norm_bias", status),
        view(call.weight, call.num_experts * call.channels, "weight", status),
        view(call.bias, call.num_experts, "bias", status),
        global<int64_t>(call.expert, call.samples, "expert"),
        global<T>(call.scores, call.samples * call.num_experts, "scores"),
        global<float>(call.gate, call.samples, "gate"),
        call.pixels,
        int(call.channels),
        int(call.num_experts),
        call.normalize,
        call.epsilon,
    };
    if (!status.ok()) return status;
    constexpr int vector = 16 / int(sizeof(T));
    const bool vectors = call.channels % vector == 0 && reinterpret_cast<uintptr_t>(call.input) % 16 == 0;
    const RouterMemory memory(vectors ? vector : 1, int(call.channels));
    const Launch how{"router",          {call.samples},    block_threads,          memory.bytes,
                     call.where.device, call.where.stream, call.where.overlap != 0};
    if (vectors) return launch<route<T, vector>, RouterParams<T>>(how, params);
    return launch<route<T, 1>, RouterParams<T>>(how, params);
}

Status check(const gpu::RouterCall& call) {
    constexpr int64_t most = INT32_MAX;
    const auto number = [](int64_t n) { return static_cast<long long>(n); };
    if (call.samples < 0 || call.samples > most) {
        return invalid("samples: expected 0 .. %lld, got %lld", number(most), number(call.samples));
    }
    if (call.num_experts < 1 || call.num_experts >= most) {
        return invalid("num_experts: expected 1 .. %lld, got %lld", number(most - 1), number(call.num_experts));
    }
    if (call.pixels < 0) return invalid("pixels: expected at least 0, got %lld", number(call.pixels));
    const int most_channels = (most_shared - RouterMemory(16 / 2, 0).bytes) / int(sizeof(float));
    if (call.channels < 0 || call.channels > most_channels) {
        return invalid("channels: expected 0 .. %d, whose means fit the shared memory of a block, got %lld",
                       most_channels, number(call.channels));
    }
    const bool empty = call.channels == 0;  // of no elements there may be no address
    if (call.input == nullptr && !empty && call.pixels > 0) return invalid("input: expected an address, got null");
    if (call.weight.data == nullptr && !empty) return invalid("weight: expected an address, got null");
    if (call.expert == nullptr) return invalid("expert: expected an address, got null");
    return {};
}

Status router(const gpu::RouterCall& call) {
    if (call.samples == 0) return {};
    Status status = check(call);
    if (!status.ok()) return status;
    const DeviceGuard guard(call.where.device);
    if (!guard.status.ok()) return guard.status;
    switch (call.dtype) {
        case DType::float32:
            return start<float>(call);
        case DType::bfloat16:
            return start<bfloat16>(call);
        case DType::float16:
            return start<float16>(call);
        default:
            return invalid("dtype: expected float32, bfloat16 or float16, got dtype %d", int(call.dtype));
    }
}

}  // namespace
}  // namespace moe::MOE_GPU

extern "C" int MOE_ENTRY(router)(const moe::gpu::RouterCall* call, char* message, size_t size) {
    return moe::finish(moe::MOE_GPU::router(*call), message, size);
}
