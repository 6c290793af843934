// SPDX-License-Identifier: Apache-2.0
// Forward and input gradient of a routed convolution as one implicit GEMM over channels_last images.
//
// Rows are pixels of the result, columns its channels, and the reduction runs over (tap, channel). The input gradient
// runs once for each residue of its pixels modulo the stride, over the taps that meet that residue only:
// nothing is multiplied by inserted zeros. Where there are fewer tiles than multiprocessors the reduction is split
// (block_z); the last block of a tile to arrive adds the parts in their order, so that the same inputs give the same
// bits.
#pragma once

#include <numeric>
#include <type_traits>

#include "cuda/entry.h"
#include "cuda/gemm.h"
#include "cuda/groups.h"
#include "cuda/tiles.h"
#include "cuda/values.h"

namespace moe::MOE_GPU {

struct Forward {};
struct Backward {};

struct Axis {
    int source, target;  // pixels
    int taps, stride, padding, dilation;
    int step;  // taps that meet one residue are so far apart
};

template <class T>
struct ConvolutionParams {
    Grouping groups;
    Global<const T> source;  // [.., H, W, channels]
    Global<const T> weight;
    Global<T> target;
    Global<const T> residual, image;
    Global<float> dots, workspace;
    Global<int32_t> counters;
    ValuesView bias, gate, scale, shift;
    Axis y, x;
    Divisor pixels, row_length;  // of one sample's rows
    int samples_per_input;
    int source_channels, target_channels;
    int depth, width;  // channels of one convolution group: of the reduction, of the result
    int conv_groups, blocks_n, tiles_per_sample;
    int residues;
    int splits;
    bool packed;  // a tile takes rows of several samples of one group
    bool affine_per_slice, relu, store_pairs;
    int64_t weight_row, weight_column, weight_r, weight_s;
    int64_t weight_n, weight_k;  // along the result's channels, along the reduction's
    int64_t weight_group;
};

// The taps of one axis that meet a residue, and where they begin.
struct Taps {
    int count, first;    // how many, and the first one
    int origin, offset;  // first target pixel; what is added to the source pixel
    int step;            // of the source pixel, from tap to tap
};

template <class Direction>
MOE_DEVICE Taps taps_of(const Axis& axis, int residue) {
    Taps taps{};
    if constexpr (std::is_same_v<Direction, Forward>) {
        taps.count = axis.taps;
        taps.offset = -axis.padding;
        taps.step = axis.dilation;
    } else {
        taps.first = axis.taps;
        for (int t = axis.step - 1; t >= 0; --t) {
            if (t < axis.taps && t * axis.dilation % axis.stride == residue) taps.first = t;
        }
        taps.count = (axis.taps - taps.first + axis.step - 1) / axis.step;
        taps.origin = (residue + axis.stride - axis.padding % axis.stride) % axis.stride;
        // exact: numbers that meet the residue
        taps.offset = (taps.origin + axis.padding - taps.first * axis.dilation) / axis.stride;
        taps.step = -(axis.step * axis.dilation / axis.stride);
    }
    return taps;
}

constexpr int kOutside = -(1 << 29);  // a source pixel that no tap brings inside

template <class Tile, class Direction, class Loading>
struct ConvolutionLayout {
    using Element = typename Tile::Element;
    using T = typename Tile::T;
    static constexpr bool kFastB = std::is_same_v<Direction, Forward>;  // how the weight lies in memory
    using Left = Operand<Element, Tile::kM, true>;
    using Right = Operand<Element, Tile::kN, kFastB>;
    static constexpr int kStage = Left::kElements + Right::kElements;
    static constexpr int kStages = std::is_same_v<Loading, Copy> ? Tile::kStages : 2;
    static constexpr int kStageBytes = kStages * kStage * int(sizeof(T));
    static constexpr int kRowsAt = kStageBytes;  // sample, pixel, y, x of each row
    static constexpr int kFoundAt = kRowsAt + 4 * Tile::kM * int(sizeof(int));
    static constexpr int kBytes = kFoundAt + (kFoundInts + 1) * int(sizeof(int));
    static_assert(int(sizeof(float)) * Tile::kWarpsN * Tile::kM <= kStageBytes, "the dot products' place");
};

// Fetches one stage by asynchronous copies. Steps are (tap, block of channels), in order: what changes from tap to tap
// only is kept in between.
template <class Tile, class Direction>
struct CopyLoader {
    using Layout = ConvolutionLayout<Tile, Direction, Copy>;
    using Left = typename Layout::Left;
    using Right = typename Layout::Right;
    using T = typename Tile::T;
    static constexpr int kChunk = Left::kChunk;
    static constexpr int kDepth = Traits<typename Tile::Element>::kDepth;
    static constexpr int kLefts = (Left::kLines * Left::kChunks + Tile::kThreads - 1) / Tile::kThreads;
    static constexpr int kRights = (Right::kLines * Right::kChunks + Tile::kThreads - 1) / Tile::kThreads;
    static constexpr bool kAllLeft = Left::kLines * Left::kChunks % Tile::kThreads == 0;
    static constexpr bool kAllRight = Right::kLines * Right::kChunks % Tile::kThreads == 0;

    const ConvolutionParams<T>& p;
    Shared<T> memory;
    const Taps &ty, &tx;
    int r, s, c;
    int64_t base[kLefts], from[kLefts];  // of the sample; of the tap
    int y[kLefts], x[kLefts];
    bool seen[kLefts], inside[kRights];
    int64_t weight[kRights], tap;

    static MOE_DEVICE int left_line(int i) { return (device::thread() + i * Tile::kThreads) / Left::kChunks; }
    static MOE_DEVICE int left_chunk() { return device::thread() % Left::kChunks; }
    static MOE_DEVICE int right_line(int i) { return (device::thread() + i * Tile::kThreads) / Right::kChunks; }
    static MOE_DEVICE int right_chunk() { return device::thread() % Right::kChunks; }
    static_assert(Tile::kThreads % Left::kChunks == 0 && Tile::kThreads % Right::kChunks == 0, "a chunk a thread");

    MOE_DEVICE CopyLoader(const ConvolutionParams<T>& p, Shared<T> memory, Shared<int> rows, const Taps& ty,
                          const Taps& tx, int64_t slice, int conv_group, int first_n, int begin)
        : p(p), memory(memory), ty(ty), tx(tx) {
        const int blocks = (p.depth + kDepth - 1) / kDepth;
        const int number = begin / blocks;
        c = (begin - number * blocks) * kDepth;
        r = tx.count ? number / tx.count : 0;
        s = number - r * tx.count;
        MOE_UNROLL
        for (int i = 0; i < kLefts; ++i) {
            const int line = left_line(i);
            y[i] = kOutside, x[i] = 0, base[i] = 0;
            if (kAllLeft || line < Left::kLines) {
                int64_t sample = rows.load(line);
                if constexpr (std::is_same_v<Direction, Forward>) sample = int(sample) / p.samples_per_input;
                base[i] =
                    sample * p.y.source * p.x.source * p.source_channels + conv_group * p.depth + left_chunk() * kChunk;
                y[i] = rows.load(2 * Tile::kM + line);
                x[i] = rows.load(3 * Tile::kM + line);
            }
        }
        MOE_UNROLL
        for (int i = 0; i < kRights; ++i) {
            const int n = first_n + (Layout::kFastB ? right_line(i) : right_chunk() * kChunk);
            const int k = Layout::kFastB ? right_chunk() * kChunk : right_line(i);
            inside[i] = right_line(i) < Right::kLines && n < p.width;
            weight[i] = slice + n * p.weight_n + k * p.weight_k;
        }
        find_tap();
    }

    MOE_DEVICE void find_tap() {
        MOE_UNROLL
        for (int i = 0; i < kLefts; ++i) {
            const int row = y[i] + r * ty.step, column = x[i] + s * tx.step;
            seen[i] = unsigned(row) < unsigned(p.y.source) && unsigned(column) < unsigned(p.x.source);
            // of a pixel outside, which is not read, the product may wrap around
            const int pixel = int(unsigned(row) * unsigned(p.x.source) + unsigned(column));
            from[i] = base[i] + int64_t(pixel) * p.source_channels;
        }
        tap = r * p.y.step * p.weight_r + s * p.x.step * p.weight_s;
    }

    MOE_DEVICE void operator()(int stage, int) {
        const Shared<T> left = memory.at(stage * Layout::kStage), right = left.at(Left::kElements);
        const bool channel_inside = c + left_chunk() * kChunk < p.depth;
        MOE_UNROLL
        for (int i = 0; i < kLefts; ++i) {
            if (!kAllLeft && left_line(i) >= Left::kLines) break;
            device::copy_async(left.at(Left::place(left_line(i), left_chunk())), p.source.at(from[i] + c),
                               seen[i] && channel_inside);
        }
        const int64_t at = tap + c * p.weight_k;
        MOE_UNROLL
        for (int i = 0; i < kRights; ++i) {
            if (!kAllRight && right_line(i) >= Right::kLines) break;
            const int k = Layout::kFastB ? right_chunk() * kChunk : right_line(i);
            device::copy_async(right.at(Right::place(right_line(i), right_chunk())), p.weight.at(weight[i] + at),
                               inside[i] && c + k < p.depth);
        }
        c += kDepth;
        if (c >= p.depth) {
            c = 0;
            if (++s == tx.count) s = 0, ++r;
            find_tap();
        }
    }
};

// Fetches one stage element by element, for channels that are few, odd or not aligned. Steps are blocks of the flattened
// (tap, channel); a thread has the same place in every block.
template <class Tile, class Direction>
struct GatherLoader {
    using Layout = ConvolutionLayout<Tile, Direction, Gather>;
    using Left = typename Layout::Left;
    using Right = typename Layout::Right;
    using T = typename Tile::T;
    static constexpr int kChunk = Left::kChunk;
    static constexpr int kDepth = Traits<typename Tile::Element>::kDepth;
    static_assert(Tile::kThreads % kDepth == 0, "a place a thread");

    const ConvolutionParams<T>& p;
    Shared<T> memory;
    Shared<int> rows;
    const Taps &ty, &tx;
    int64_t slice;
    int conv_group, first_n;

    MOE_DEVICE void operator()(int stage, int step) {
        const Shared<T> to_left = memory.at(stage * Layout::kStage), to_right = to_left.at(Left::kElements);
        const int k = device::thread() % kDepth, flat = step * kDepth + k;
        const bool inside = flat < ty.count * tx.count * p.depth;
        const int tap = inside ? flat / p.depth : 0, r = inside ? tap / tx.count : 0, s = tap - r * tx.count;
        const int c = flat - tap * p.depth;
        const int64_t channel = conv_group * p.depth + c;
        const int64_t weight = slice + c * p.weight_k + r * p.y.step * p.weight_r + s * p.x.step * p.weight_s;
        for (int line = device::thread() / kDepth; line < Tile::kM; line += Tile::kThreads / kDepth) {
            const int row = rows.load(2 * Tile::kM + line) + r * ty.step;
            const int column = rows.load(3 * Tile::kM + line) + s * tx.step;
            T value = device::from_float<T>(0.0f);
            if (inside && unsigned(row) < unsigned(p.y.source) && unsigned(column) < unsigned(p.x.source)) {
                int64_t sample = rows.load(line);
                if constexpr (std::is_same_v<Direction, Forward>) sample = int(sample) / p.samples_per_input;
                const int64_t pixel = (sample * p.y.source + row) * p.x.source + column;
                value = p.source.load(pixel * p.source_channels + channel);
            }
            to_left.store(Left::place(line, k / kChunk) + k % kChunk, value);
        }
        for (int n = device::thread() / kDepth; n < Tile::kN; n += Tile::kThreads / kDepth) {
            T value = device::from_float<T>(0.0f);
            if (inside && first_n + n < p.width) value = p.weight.load(weight + (first_n + n) * p.weight_n);
            to_right.store(
                Layout::kFastB ? Right::place(n, k / kChunk) + k % kChunk : Right::place(k, n / kChunk) + n % kChunk,
                value);
        }
    }
};

// Adds the parts of a split reduction, in the last block of the tile to arrive: true there.
template <class Tile>
MOE_DEVICE bool add_splits(Tile& tile, Global<float> workspace, Global<int32_t> counters, Shared<int> flag, int splits) {
    const int64_t unit = device::block_x();
    constexpr int vectors = Tile::kBlocksM * Tile::kBlocksN;
    const int64_t own = (unit * splits + device::block_z()) * vectors * Tile::kThreads * 4;
    MOE_UNROLL
    for (int v = 0; v < vectors; ++v) {
        const float (&sum)[4] = tile.sum[v / Tile::kBlocksN][v % Tile::kBlocksN];
        const device::Vector<float, 4> four{sum[0], sum[1], sum[2], sum[3]};
        workspace.template store_vector<4>(own + (v * Tile::kThreads + device::thread()) * 4, four);
    }
    device::fence();
    device::sync_threads();
    if (device::thread() == 0) flag.store(0, device::atomic_add(counters, unit, 1));
    device::sync_threads();
    if (flag.load(0) != splits - 1) return false;
    device::fence();
    tile.clear();
    for (int split = 0; split < splits; ++split) {
        const int64_t part = (unit * splits + split) * vectors * Tile::kThreads * 4;
        MOE_UNROLL
        for (int v = 0; v < vectors; ++v) {
            MOE_UNROLL
            for (int e = 0; e < 4; ++e) {
                tile.sum[v / Tile::kBlocksN][v % Tile::kBlocksN][e] +=
                    workspace.load_of_others(part + (v * Tile::kThreads + device::thread()) * 4 + e);
            }
        }
    }
    if (device::thread() == 0) counters.store(unit, 0);  // for the next kernel
    return true;
}

template <class Tile, class Direction, class Loading>
MOE_KERNEL(Tile::kThreads, Tile::kBlocks)
convolution_kernel(const ConvolutionParams<typename Tile::T> p) {
    using Layout = ConvolutionLayout<Tile, Direction, Loading>;
    using T = typename Tile::T;
    device::wait_for_previous();
    device::allow_next();

    const int columns = p.conv_groups * p.blocks_n;
    const int block = device::block_x() / p.residues;
    const int residue = device::block_x() - block * p.residues;
    const int tile_number = block / columns;
    const int column_number = block - tile_number * columns;
    const int conv_group = column_number / p.blocks_n;
    const int first_n = (column_number - conv_group * p.blocks_n) * Tile::kN;
    const int pixels = int(p.pixels.value);
    const Shared<T> stages = device::shared<T>(0, Layout::kStages * Layout::kStage);
    const Shared<int> rows = device::shared<int>(Layout::kRowsAt, 4 * Tile::kM);
    const Shared<int> memory = device::shared<int>(Layout::kFoundAt, kFoundInts);
    const Shared<int> flag = device::shared<int>(Layout::kFoundAt + kFoundInts * int(sizeof(int)), 1);

    // the slice of the weight, and which samples
    Found found{};
    int out_e = 0, in_e = 0;
    bool valid = true;
    if (p.packed) {
        found = find_tile(p.groups, memory, tile_number, pixels, Tile::kM);
        if (found.group > p.groups.count) return;
        valid = found.group < p.groups.count;
        out_e = p.groups.out_expert(found.group);
        in_e = p.groups.in_expert(found.group);
    } else {
        found.place = tile_number / p.tiles_per_sample;
        found.first = (tile_number - found.place * p.tiles_per_sample) * Tile::kM;
        found.rows = pixels;
        if (p.groups.out.expert.given()) out_e = p.groups.out.chosen(found.place);
        if (p.groups.in.expert.given()) in_e = p.groups.in.chosen(found.place);
        valid = out_e >= 0 && in_e >= 0;
    }
    int64_t slice = conv_group * p.weight_group, out_start = 0;
    if (valid && p.groups.out.expert.given()) {
        out_start = p.groups.out.start(out_e);
        slice += out_start * p.weight_row;
    }
    if (valid && p.groups.in.expert.given()) slice += p.groups.in.start(in_e) * p.weight_column;

    // the rows
    const Taps ty = taps_of<Direction>(p.y, residue / p.x.stride);
    const Taps tx = taps_of<Direction>(p.x, residue % p.x.stride);
    for (int r = device::thread(); r < Tile::kM; r += Tile::kThreads) {
        const int row = found.first + r;
        int sample = 0, pixel = -1, y = kOutside, x = 0;
        if (row < found.rows) {
            const int local = p.packed ? p.pixels.quotient(row) : 0;
            sample = p.packed ? sample_at(p.groups, memory, found.place + local) : found.place;
            const int within = row - local * pixels;
            const int i = p.row_length.quotient(within), j = within - i * int(p.row_length.value);
            int h = i, w = j;
            if constexpr (std::is_same_v<Direction, Forward>) {
                y = i * p.y.stride + ty.offset;
                x = j * p.x.stride + tx.offset;
            } else {
                h = ty.origin + i * p.y.stride;
                w = tx.origin + j * p.x.stride;
                y = i + ty.offset;
                x = j + tx.offset;
            }
            pixel = h < p.y.target && w < p.x.target ? h * p.x.target + w : -1;
            if (pixel < 0) y = kOutside;
        }
        rows.store(r, sample);
        rows.store(Tile::kM + r, pixel);
        rows.store(2 * Tile::kM + r, y);
        rows.store(3 * Tile::kM + r, x);
    }
    device::sync_threads();

    // this split's part of the reduction
    slice += ty.first * p.weight_r + tx.first * p.weight_s;
    constexpr int depth = Traits<typename Tile::Element>::kDepth;
    int steps = ty.count * tx.count;
    if constexpr (std::is_same_v<Loading, Copy>) {
        steps *= (p.depth + depth - 1) / depth;
    } else {
        steps = (steps * p.depth + depth - 1) / depth;
    }
    if (!valid) steps = 0;
    const int begin = int(int64_t(steps) * device::block_z() / p.splits);
    const int end = int(int64_t(steps) * (device::block_z() + 1) / p.splits);
    Tile tile;
    tile.clear();
    const auto multiply_stage = [&](int stage) {
        const Shared<T> left = stages.at(stage * Layout::kStage);
        multiply<true, Layout::kFastB>(tile, left, left.at(Layout::Left::kElements));
    };
    if constexpr (std::is_same_v<Loading, Copy>) {
        CopyLoader<Tile, Direction> load(p, stages, rows, ty, tx, slice, conv_group, first_n, begin);
        pipeline<Layout::kStages>(begin, end, [&](int stage, int step) { load(stage, step); }, multiply_stage);
    } else {
        GatherLoader<Tile, Direction> load{p, stages, rows, ty, tx, slice, conv_group, first_n};
        pipeline<Layout::kStages>(begin, end, [&](int stage, int step) { load(stage, step); }, multiply_stage);
    }
    if (p.splits > 1 && !add_splits(tile, p.workspace, p.counters, flag, p.splits)) return;

    // the gate's gradient: <dx, image> of each pixel, from the ungated sums
    const int64_t frame = int64_t(p.y.target) * p.x.target;
    if (p.dots.given()) {
        const Shared<float> dots = device::shared<float>(0, Tile::kWarpsN * Tile::kM);
        MOE_UNROLL
        for (int i = 0; i < Tile::kBlocksM; ++i) {
            MOE_UNROLL
            for (int h = 0; h < 2; ++h) {
                const int row = Tile::row(i, 2 * h);
                const int pixel = rows.load(Tile::kM + row);
                const int sample = rows.load(row) / p.samples_per_input;
                const int64_t at = (sample * frame + pixel) * p.target_channels + conv_group * p.width;
                float dot = 0.0f;
                MOE_UNROLL
                for (int j = 0; j < Tile::kBlocksN; ++j) {
                    MOE_UNROLL
                    for (int e = 0; e < 2; ++e) {
                        const int n = first_n + Tile::column(j, e);
                        if (pixel >= 0 && n < p.width) {
                            dot = device::multiply_add(tile.sum[i][j][2 * h + e], device::to_float(p.image.load(at + n)),
                                                       dot);
                        }
                    }
                }
                dot += device::shuffle_xor(dot, 1);
                dot += device::shuffle_xor(dot, 2);
                if (device::lane() % 4 == 0) dots.store(device::warp() % Tile::kWarpsN * Tile::kM + row, dot);
            }
        }
        device::sync_threads();
        for (int r = device::thread(); r < Tile::kM; r += Tile::kThreads) {
            const int pixel = rows.load(Tile::kM + r);
            if (pixel < 0) continue;
            float dot = 0.0f;
            for (int w = 0; w < Tile::kWarpsN; ++w) dot += dots.load(w * Tile::kM + r);
            const int64_t at = (int64_t(rows.load(r)) * columns + column_number) * frame + pixel;
            p.dots.store(at, valid ? dot : device::not_a_number());
        }
    }

    // bias, gate, scale and shift, residual, ReLU
    MOE_UNROLL
    for (int j = 0; j < Tile::kBlocksN; ++j) {
        const int n = first_n + Tile::column(j, 0);
        if (n >= p.width) continue;
        const bool two = n + 1 < p.width;
        const int channel = conv_group * p.width + n;
        float bias[2] = {}, scale[2] = {1.0f, 1.0f}, shift[2] = {};
        MOE_UNROLL
        for (int e = 0; e < 2; ++e) {
            if (e == 1 && !two) break;
            const int64_t affine = channel + e + (p.affine_per_slice ? out_start : 0);
            if (p.bias.given()) bias[e] = p.bias.load(out_start + channel + e);
            if (p.scale.given()) scale[e] = p.scale.load(affine);
            if (p.shift.given()) shift[e] = p.shift.load(affine);
        }
        MOE_UNROLL
        for (int i = 0; i < Tile::kBlocksM; ++i) {
            MOE_UNROLL
            for (int h = 0; h < 2; ++h) {
                const int row = Tile::row(i, 2 * h);
                const int pixel = rows.load(Tile::kM + row);
                if (pixel < 0) continue;
                const int sample = rows.load(row);
                const int64_t at = (sample * frame + pixel) * p.target_channels + channel;
                const float gate = p.gate.given() ? p.gate.load(sample) : 1.0f;
                T values[2];
                MOE_UNROLL
                for (int e = 0; e < 2; ++e) {
                    float value = (tile.sum[i][j][2 * h + e] + bias[e]) * gate;
                    value = value * scale[e] + shift[e];
                    if (p.residual.given() && (e == 0 || two)) value += device::to_float(p.residual.load(at + e));
                    if (p.relu && value < 0.0f) value = 0.0f;  // NaN stays
                    values[e] = device::from_float<T>(valid ? value : device::not_a_number());
                }
                if (p.store_pairs) {
                    p.target.template store_vector<2>(at, {values[0], values[1]});
                } else {
                    p.target.store(at, values[0]);
                    if (two) p.target.store(at + 1, values[1]);
                }
            }
        }
    }
}

// --- the host's side --------------------------------------------------------------------------------------------------

// What is started for a call: a function of shapes, alignment and the device, so that the same inputs give the same bits.
struct ConvolutionChoice {
    int tile;  // an index into the element's list of tiles
    int tile_m, tile_n;
    bool copies, packed;
    int64_t tiles, blocks_n, tiles_per_sample, residues;
    int splits;
    int64_t rows[2];  // of one sample's rows, along y and x
    // blocks, before the reduction is split
    int64_t units(const Conv2dShape& s) const { return tiles * blocks_n * s.groups * residues; }
};

// `element_bytes`, `stage_depth`: of the element type in memory, and how much of the reduction one stage holds.
Status choose(const gpu::ConvolutionCall& call, const TileSize* sizes, int count, int element_bytes, int stage_depth,
              ConvolutionChoice& choice);

template <class T>
ConvolutionParams<T> convolution_params(const gpu::ConvolutionCall& call, const ConvolutionChoice& choice,
                                        Status& status) {
    const Conv2dShape& s = call.shape;
    const bool backward = call.backward != 0;
    const int64_t inputs = s.V / s.k;
    ConvolutionParams<T> p{};
    p.groups = view(call.slices, s, call.groups, call.pairs, call.plan);
    const int64_t large = (backward ? s.V : inputs) * s.C * s.H * s.W, small = s.V * s.K * s.P * s.Q;
    p.source = device::global<T>(call.source, backward ? small : large, backward ? "grad" : "input");
    p.target = device::global<T>(call.target, backward ? large : small, backward ? "grad_input" : "output");
    p.residual = device::global<T>(call.residual, small, "residual");
    p.image = device::global<T>(call.image, inputs * s.C * s.H * s.W, "input");
    const int64_t *strides = call.weight_strides, sizes[] = {call.total_out, call.total_in, s.R, s.S};
    int64_t reach = 1;  // from the first number to the last: a part of a larger tensor is read in place
    for (int i = 0; i < 4; ++i) reach = reach > 0 && sizes[i] > 0 ? reach + (sizes[i] - 1) * strides[i] : 0;
    p.weight = device::global<T>(call.weight, reach, "weight");
    const int64_t channels = backward ? s.C : s.K, affine = call.affine_per_slice ? call.total_out : channels;
    p.bias = view(call.bias, call.total_out, "bias", status);
    p.gate = view(call.gate, s.V, "gate", status);
    p.scale = view(call.scale, affine, "scale", status);
    p.shift = view(call.shift, affine, "shift", status);
    const int64_t step_y = backward ? s.stride_h / std::gcd(s.stride_h, s.dil_h) : 1;
    const int64_t step_x = backward ? s.stride_w / std::gcd(s.stride_w, s.dil_w) : 1;
    p.y = {int(backward ? s.P : s.H),
           int(backward ? s.H : s.P),
           int(s.R),
           int(s.stride_h),
           int(s.pad_h),
           int(s.dil_h),
           int(step_y)};
    p.x = {int(backward ? s.Q : s.W),
           int(backward ? s.W : s.Q),
           int(s.S),
           int(s.stride_w),
           int(s.pad_w),
           int(s.dil_w),
           int(step_x)};
    p.pixels = Divisor(choice.rows[0] * choice.rows[1]);
    p.row_length = Divisor(choice.rows[1]);
    p.samples_per_input = int(s.k);
    p.source_channels = int(backward ? s.K : s.C);
    p.target_channels = int(backward ? s.C : s.K);
    p.conv_groups = int(s.groups);
    p.depth = int(p.source_channels / s.groups);
    p.width = int(p.target_channels / s.groups);
    p.blocks_n = int(choice.blocks_n);
    p.tiles_per_sample = int(choice.tiles_per_sample);
    p.residues = int(choice.residues);
    p.splits = choice.splits;
    p.packed = choice.packed;
    p.affine_per_slice = call.affine_per_slice != 0;
    p.relu = call.relu != 0;
    p.store_pairs = p.width % 2 == 0 && reinterpret_cast<uintptr_t>(call.target) % (2 * sizeof(T)) == 0;
    p.weight_row = strides[0], p.weight_column = strides[1], p.weight_r = strides[2], p.weight_s = strides[3];
    p.weight_n = backward ? strides[1] : strides[0];
    p.weight_k = backward ? strides[0] : strides[1];
    p.weight_group = s.K / s.groups * strides[0];
    const int64_t units = choice.units(s);
    p.workspace = device::global<float>(choice.splits > 1 ? call.workspace : nullptr,
                                        units * choice.splits * choice.tile_m * choice.tile_n, "workspace");
    p.counters = device::global<int32_t>(choice.splits > 1 ? call.counters : nullptr, units, "counters");
    p.dots =
        device::global<float>(call.image ? call.dots : nullptr, s.V * choice.blocks_n * s.groups * s.H * s.W, "dots");
    return p;
}

template <class Tile, class Direction, class Loading>
Status launch_convolution(const gpu::ConvolutionCall& call, const ConvolutionChoice& choice) {
    using Layout = ConvolutionLayout<Tile, Direction, Loading>;
    Status status;
    const auto params = convolution_params<typename Tile::T>(call, choice, status);
    if (!status.ok()) return status;
    const device::Launch how{call.backward ? "grad_input" : "forward",
                             {choice.units(call.shape), 1, choice.splits},
                             Tile::kThreads,
                             Layout::kBytes,
                             call.where.device,
                             call.where.stream,
                             call.where.overlap != 0};
    return device::launch<convolution_kernel<Tile, Direction, Loading>>(how, params);
}

template <class Direction, class Loading>
struct LaunchConvolution {
    const gpu::ConvolutionCall& call;
    const ConvolutionChoice& choice;
    template <class Tile>
    Status run() {
        return launch_convolution<Tile, Direction, Loading>(call, choice);
    }
};

// Starts the kernel of a call; with `needs`, only says what it needs.
template <class Element>
Status convolve(const gpu::ConvolutionCall& call, gpu::ConvolutionNeeds* needs) {
    using Tiles = ConvolutionTiles<Element>;
    ConvolutionChoice choice{};
    Status status = choose(call, Tiles::kSizes, Tiles::Copies::kCount, int(sizeof(typename Traits<Element>::T)),
                           Traits<Element>::kDepth, choice);
    if (!status.ok()) return status;
    const int64_t units = choice.units(call.shape);
    if (needs) {
        needs->workspace = choice.splits > 1 ? units * choice.splits * choice.tile_m * choice.tile_n : 0;
        needs->counters = choice.splits > 1 ? units : 0;
        needs->dots_columns = choice.blocks_n * call.shape.groups;
        needs->reads_plan = choice.packed && call.shape.V > gpu::few_samples;
        needs->tile_m = choice.tile_m, needs->tile_n = choice.tile_n;
        needs->copies = choice.copies, needs->packed = choice.packed, needs->splits = choice.splits;
        return status;
    }
    if (units == 0) return status;
    if (choice.packed && !call.plan && call.shape.V > gpu::few_samples) return invalid("plan: expected, got null");
    if (choice.splits > 1 && !(call.workspace && call.counters))
        return invalid("workspace, counters: expected, got null");
    if (call.image && !call.dots) return invalid("dots: expected beside image, got null");
    if (choice.copies) {
        if (call.backward) return Tiles::Copies::visit(choice.tile, LaunchConvolution<Backward, Copy>{call, choice});
        return Tiles::Copies::visit(choice.tile, LaunchConvolution<Forward, Copy>{call, choice});
    }
    if (call.backward) return launch_convolution<typename Tiles::Gathers, Backward, Gather>(call, choice);
    return launch_convolution<typename Tiles::Gathers, Forward, Gather>(call, choice);
}

// Each instantiated in a file of its own.
extern template Status convolve<device::bfloat16>(const gpu::ConvolutionCall&, gpu::ConvolutionNeeds*);
extern template Status convolve<device::float16>(const gpu::ConvolutionCall&, gpu::ConvolutionNeeds*);
extern template Status convolve<device::tf32>(const gpu::ConvolutionCall&, gpu::ConvolutionNeeds*);
extern template Status convolve<float>(const gpu::ConvolutionCall&, gpu::ConvolutionNeeds*);

}  // namespace moe::MOE_GPU
