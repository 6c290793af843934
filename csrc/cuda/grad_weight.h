// SPDX-License-Identifier: Apache-2.0
// The weight gradient of a routed convolution: rows are output channels, columns (tap, input channel), and the reduction
// runs over the pixels of one segment, a fixed number of one group's samples. A second kernel adds the segments of each
// group in their order (grad_weight.cu). No atomics: the same inputs give the same bits.
#pragma once

#include <type_traits>

#include "cuda/entry.h"
#include "cuda/gemm.h"
#include "cuda/groups.h"
#include "cuda/tiles.h"

namespace moe::MOE_GPU {

template <class T>
struct GradWeightParams {
    Grouping groups;
    Global<const T> grad;                       // [V, P, Q, K]
    Global<const T> input;                      // [B, H, W, C]
    Global<float> partial;                      // [parts, K, columns]
    Divisor pixels, row_length, depth, taps_s;  // P * Q, Q, input channels of a convolution group, S
    int samples_per_input, segment;
    int rows, row_pixels;                // H, W
    int grad_channels, source_channels;  // K, C
    int width, columns;                  // output channels of a convolution group; R * S * depth
    int blocks_m, blocks_n, conv_groups;
    int stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
};

template <class Tile, class Loading>
struct GradWeightLayout {
    using Left = Operand<typename Tile::Element, Tile::kM, false>;
    using Right = Operand<typename Tile::Element, Tile::kN, false>;
    static constexpr int kStage = Left::kElements + Right::kElements;
    static constexpr int kStages = std::is_same_v<Loading, Copy> ? Tile::kStages : 2;
    static constexpr int kFoundAt = kStages * kStage * int(sizeof(typename Tile::T));
    static constexpr int kBytes = kFoundAt + kFoundInts * int(sizeof(int));
};

// A pixel of the reduction on its way through a segment.
template <class T>
struct Pixel {
    int left;             // pixels of the segment from this one on; none: outside
    int at, sample;       // in its image; in the segment
    int64_t grad, input;  // where its images begin

    MOE_DEVICE void start(const GradWeightParams<T>& p, Shared<int> memory, const Found& found, int line, int end) {
        left = end - line;
        sample = 0;
        at = line;
        find_image(p, memory, found);
        settle(p, memory, found);
    }
    MOE_DEVICE void advance(const GradWeightParams<T>& p, Shared<int> memory, const Found& found, int by) {
        left -= by;
        at += by;
        settle(p, memory, found);
    }
    MOE_DEVICE void settle(const GradWeightParams<T>& p, Shared<int> memory, const Found& found) {
        const int pixels = int(p.pixels.value);
        if (at < pixels || left <= 0) return;
        const int samples = p.pixels.quotient(at);
        sample += samples;
        at -= samples * pixels;
        find_image(p, memory, found);
    }
    MOE_DEVICE void find_image(const GradWeightParams<T>& p, Shared<int> memory, const Found& found) {
        const int of = sample_at(p.groups, memory, found.place + found.first + sample);
        grad = int64_t(of) * p.pixels.value * p.grad_channels;
        input = int64_t(of / p.samples_per_input) * p.rows * p.row_pixels * p.source_channels;
    }
};

// A column of the result: which tap, as an offset in the image, and which input channel.
struct Column {
    bool inside;
    int y, x, channel;  // channel: of the image
};

template <class T>
MOE_DEVICE Column column_at(const GradWeightParams<T>& p, int conv_group, int n) {
    const int tap = p.depth.quotient(n);
    const int r = p.taps_s.quotient(tap), s = tap - r * int(p.taps_s.value);
    return {n < p.columns, r * p.dil_h - p.pad_h, s * p.dil_w - p.pad_w, (conv_group - tap) * int(p.depth.value) + n};
}

// Where the input has the value of a pixel and a column; -1 in the padding.
template <class T>
MOE_DEVICE int64_t input_at(const GradWeightParams<T>& p, const Pixel<T>& pixel, const Column& column) {
    const int row = p.row_length.quotient(pixel.at);
    const int y = row * p.stride_h + column.y;
    const int x = (pixel.at - row * int(p.row_length.value)) * p.stride_w + column.x;
    const bool seen =
        pixel.left > 0 && column.inside && unsigned(y) < unsigned(p.rows) && unsigned(x) < unsigned(p.row_pixels);
    return seen ? pixel.input + (y * p.row_pixels + x) * p.source_channels + column.channel : -1;
}

template <class Tile, class Loading>
MOE_KERNEL(Tile::kThreads, Tile::kBlocks)
grad_weight_kernel(const GradWeightParams<typename Tile::T> p) {
    using Layout = GradWeightLayout<Tile, Loading>;
    using Left = typename Layout::Left;
    using Right = typename Layout::Right;
    using T = typename Tile::T;
    constexpr int depth = Traits<typename Tile::Element>::kDepth;
    constexpr int run = Left::kChunk;
    device::wait_for_previous();
    device::allow_next();
    const Shared<T> stages = device::shared<T>(0, Layout::kStages * Layout::kStage);
    const Shared<int> memory = device::shared<int>(Layout::kFoundAt, kFoundInts);

    const int blocks = p.blocks_m * p.blocks_n * p.conv_groups;
    const int part = device::block_x() / blocks;
    int rest = device::block_x() - part * blocks;
    const int first_m = rest % p.blocks_m * Tile::kM;
    rest /= p.blocks_m;
    const int first_n = rest % p.blocks_n * Tile::kN;
    const int conv_group = rest / p.blocks_n;
    const Found found = find_tile(p.groups, memory, part, 1, p.segment);
    if (found.group >= p.groups.count) return;  // past the end, or the invalid samples
    const int samples = found.rows - found.first < p.segment ? found.rows - found.first : p.segment;
    const int end = samples * int(p.pixels.value);

    Tile tile;
    tile.clear();
    const auto multiply_stage = [&](int stage) {
        const Shared<T> left = stages.at(stage * Layout::kStage);
        multiply<false, false>(tile, left, left.at(Left::kElements));
    };
    // Each thread has one place along the rows and one along the columns: of a chunk, or, where they are gathered, of an
    // element; in every so many lines of a stage.
    constexpr bool copies = std::is_same_v<Loading, Copy>;
    constexpr int chunk = copies ? run : 1;
    constexpr int left_lines = Tile::kThreads / (Tile::kM / chunk), right_lines = Tile::kThreads / (Tile::kN / chunk);
    static_assert(left_lines > 0 && right_lines > 0 && depth % left_lines == 0 && depth % right_lines == 0,
                  "whole rounds");
    const int left_line = device::thread() / (Tile::kM / chunk), right_line = device::thread() / (Tile::kN / chunk);
    const int left_at = device::thread() % (Tile::kM / chunk) * chunk;
    const int right_at = device::thread() % (Tile::kN / chunk) * chunk;
    const bool row_inside = first_m + left_at < p.width;
    const int row = conv_group * p.width + first_m + left_at;
    const Column column = column_at(p, conv_group, first_n + right_at);
    const auto left_place = [&](int line) { return Left::place(line, left_at / run) + left_at % run; };
    const auto right_place = [&](int line) { return Right::place(line, right_at / run) + right_at % run; };
    const int steps = (end + depth - 1) / depth;
    if constexpr (copies) {
        constexpr int lefts = depth / left_lines, rights = depth / right_lines;
        constexpr bool same_lines = left_lines == right_lines;
        Pixel<T> left_pixel[lefts], right_pixel[same_lines ? 1 : rights];
        MOE_UNROLL
        for (int i = 0; i < lefts; ++i) left_pixel[i].start(p, memory, found, left_line + i * left_lines, end);
        if constexpr (!same_lines) {
            MOE_UNROLL
            for (int i = 0; i < rights; ++i) right_pixel[i].start(p, memory, found, right_line + i * right_lines, end);
        }
        const auto load = [&](int stage, int) {
            const Shared<T> left = stages.at(stage * Layout::kStage), right = left.at(Left::kElements);
            MOE_UNROLL
            for (int i = 0; i < lefts; ++i) {
                const Pixel<T>& pixel = left_pixel[i];
                device::copy_async(left.at(left_place(left_line + i * left_lines)),
                                   p.grad.at(pixel.grad + pixel.at * p.grad_channels + row),
                                   pixel.left > 0 && row_inside);
            }
            MOE_UNROLL
            for (int i = 0; i < rights; ++i) {
                const int64_t from =
                    input_at(p, same_lines ? left_pixel[i % lefts] : right_pixel[same_lines ? 0 : i], column);
                device::copy_async(right.at(right_place(right_line + i * right_lines)), p.input.at(from < 0 ? 0 : from),
                                   from >= 0);
            }
            MOE_UNROLL
            for (int i = 0; i < lefts; ++i) left_pixel[i].advance(p, memory, found, depth);
            if constexpr (!same_lines) {
                MOE_UNROLL
                for (int i = 0; i < rights; ++i) right_pixel[i].advance(p, memory, found, depth);
            }
        };
        pipeline<Layout::kStages>(0, steps, load, multiply_stage);
    } else {
        const auto load = [&](int stage, int step) {
            const Shared<T> left = stages.at(stage * Layout::kStage), right = left.at(Left::kElements);
            Pixel<T> pixel;
            for (int line = left_line; line < depth; line += left_lines) {
                pixel.start(p, memory, found, step * depth + line, end);
                const bool seen = pixel.left > 0 && row_inside;
                left.store(left_place(line), seen ? p.grad.load(pixel.grad + pixel.at * p.grad_channels + row)
                                                  : device::from_float<T>(0.0f));
            }
            for (int line = right_line; line < depth; line += right_lines) {
                pixel.start(p, memory, found, step * depth + line, end);
                const int64_t from = input_at(p, pixel, column);
                right.store(right_place(line), from >= 0 ? p.input.load(from) : device::from_float<T>(0.0f));
            }
        };
        pipeline<Layout::kStages>(0, steps, load, multiply_stage);
    }

    MOE_UNROLL
    for (int i = 0; i < Tile::kBlocksM; ++i) {
        MOE_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int m = first_m + Tile::row(i, 2 * h);
            if (m >= p.width) continue;
            const int64_t at = (int64_t(part) * p.grad_channels + conv_group * p.width + m) * p.columns;
            MOE_UNROLL
            for (int j = 0; j < Tile::kBlocksN; ++j) {
                const int n = first_n + Tile::column(j, 0);
                const float (&sum)[4] = tile.sum[i][j];
                if (p.columns % 2 == 0) {
                    if (n < p.columns) p.partial.template store_vector<2>(at + n, {sum[2 * h], sum[2 * h + 1]});
                } else {
                    if (n < p.columns) p.partial.store(at + n, sum[2 * h]);
                    if (n + 1 < p.columns) p.partial.store(at + n + 1, sum[2 * h + 1]);
                }
            }
        }
    }
}

// --- the host's side --------------------------------------------------------------------------------------------------

struct GradWeightChoice {
    int tile, tile_m, tile_n;
    bool copies;
    int64_t blocks_m, blocks_n, segment, parts;
};

// A function of shapes, alignment and the device, so that the same inputs give the same bits.
Status choose(const gpu::GradWeightCall& call, const TileSize* sizes, int count, int element_bytes,
              GradWeightChoice& choice);

template <class Tile, class Loading>
Status launch_grad_weight(const gpu::GradWeightCall& call, const GradWeightChoice& choice) {
    using T = typename Tile::T;
    const Conv2dShape& s = call.shape;
    GradWeightParams<T> p{};
    p.groups = view(call.slices, s, call.groups, call.pairs, call.plan);
    p.grad = device::global<T>(call.grad, s.V * s.P * s.Q * s.K, "grad");
    p.input = device::global<T>(call.input, s.V / s.k * s.H * s.W * s.C, "input");
    const int64_t depth = s.C / s.groups;
    p.columns = int(s.R * s.S * depth);
    p.partial = device::global<float>(call.workspace, choice.parts * s.K * p.columns, "workspace");
    p.pixels = Divisor(s.P * s.Q);
    p.row_length = Divisor(s.Q);
    p.depth = Divisor(depth);
    p.taps_s = Divisor(s.S);
    p.samples_per_input = int(s.k);
    p.segment = int(choice.segment);
    p.rows = int(s.H), p.row_pixels = int(s.W);
    p.grad_channels = int(s.K), p.source_channels = int(s.C);
    p.width = int(s.K / s.groups);
    p.blocks_m = int(choice.blocks_m), p.blocks_n = int(choice.blocks_n), p.conv_groups = int(s.groups);
    p.stride_h = int(s.stride_h), p.stride_w = int(s.stride_w);
    p.pad_h = int(s.pad_h), p.pad_w = int(s.pad_w), p.dil_h = int(s.dil_h), p.dil_w = int(s.dil_w);
    const device::Launch how{"grad_weight",          {choice.parts * choice.blocks_m * choice.blocks_n * s.groups},
                             Tile::kThreads,         GradWeightLayout<Tile, Loading>::kBytes,
                             call.where.device,      call.where.stream,
                             call.where.overlap != 0};
    return device::launch<grad_weight_kernel<Tile, Loading>>(how, p);
}

template <class Loading>
struct LaunchGradWeight {
    const gpu::GradWeightCall& call;
    const GradWeightChoice& choice;
    template <class Tile>
    Status run() {
        return launch_grad_weight<Tile, Loading>(call, choice);
    }
};

// Starts the first kernel of a call, which fills the workspace.
template <class Element>
Status fill_parts(const gpu::GradWeightCall& call, GradWeightChoice& choice, bool only_choose) {
    using Tiles = GradWeightTiles<Element>;
    const Status status =
        choose(call, Tiles::kSizes, Tiles::Copies::kCount, int(sizeof(typename Traits<Element>::T)), choice);
    if (!status.ok() || only_choose || call.shape.V == 0) return status;
    if (choice.copies) return Tiles::Copies::visit(choice.tile, LaunchGradWeight<Copy>{call, choice});
    return launch_grad_weight<typename Tiles::Gathers, Gather>(call, choice);
}

// Each instantiated in a file of its own.
extern template Status fill_parts<device::bfloat16>(const gpu::GradWeightCall&, GradWeightChoice&, bool);
extern template Status fill_parts<device::float16>(const gpu::GradWeightCall&, GradWeightChoice&, bool);
extern template Status fill_parts<device::tf32>(const gpu::GradWeightCall&, GradWeightChoice&, bool);
extern template Status fill_parts<float>(const gpu::GradWeightCall&, GradWeightChoice&, bool);

}  // namespace moe::MOE_GPU
