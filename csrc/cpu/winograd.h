// SPDX-License-Identifier: Apache-2.0
// The correlation with a 3x3 kernel at stride 1 by Winograd's F(2x2, 3x3) (Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks", CVPR 2016, section 4.1): a tile of 2x2 pixels is read off 16 sums of products, where
// convolution.h takes 36. The transforms add and halve only, so that rounding stays that of a direct sum.
//
//   y = A' [sum over c of (G w_c G') * (B' x_c B)] A
//
// A task transforms the 4x4 patches of some tiles of one group, multiplies each of the 16 positions with the slice's
// transformed weights, and transforms what it summed into pixels. Tiles run on from sample to sample of the group.
#pragma once

#include "cpu/convolution.h"

namespace moe::cpu {
namespace {

constexpr int kPatch = 4, kPositions = int(kWinogradPositions);

// Rows (or columns) of B' x, G w and A' m.
template <class V>
inline void transform_patch(const V (&x)[4], V (&u)[4]) {
    u[0] = x[0] - x[2];
    u[1] = x[1] + x[2];
    u[2] = x[2] - x[1];
    u[3] = x[1] - x[3];
}
template <class A, class V>
inline void transform_kernel(const V (&w)[3], V (&u)[4]) {
    const V even = (w[0] + w[2]) * A(0.5), odd = w[1] * A(0.5);
    u[0] = w[0];
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = w[2];
}
template <class V>
inline void transform_sums(const V (&m)[4], V (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
}

// Transformed weights of one block of reduced channels of panel p, of which there are whole ones only. A panel is
// [block][position][channel][lane]: a position's weights of all blocks together would be written through one set of a
// cache.
template <class T, class A>
void winograd_pack_part(const PackJob& job, const Group& group, int64_t cg, int64_t p, int64_t block, A* to) {
    constexpr int width = panel<A>;
    const Pass& pass = job.passes[0];
    A taps[9 * kBlock * width];
    A* place[9];
    for (int64_t t = 0; t < 9; ++t) {
        place[pass.tap_weight[t]] = taps + (pass.tap_h[t] * 3 + pass.tap_w[t]) * kBlock * width;
    }
    pack_taps<T, A>(job, group, cg, p, block, 9, place);
    typedef typename Vec<A>::type V;
    for (int64_t i = 0; i < kBlock * width; i += lanes<A>) {
        V half[4][3];  // [row of G w][column of w]
        for (int s = 0; s < 3; ++s) {
            V column[3], u[4];
            for (int r = 0; r < 3; ++r) column[r] = load(taps + (r * 3 + s) * kBlock * width + i);
            transform_kernel<A>(column, u);
            for (int r = 0; r < 4; ++r) half[r][s] = u[r];
        }
        for (int r = 0; r < 4; ++r) {
            V u[4];
            transform_kernel<A>(half[r], u);
            for (int s = 0; s < 4; ++s) store(to + (kPositions * block + r * 4 + s) * kBlock * width + i, u[s]);
        }
    }
}

template <class T, class A>
Result winograd_pack(const PackJob& job) {
    const int64_t of_panel = kPositions * job.red * panel<A>;
    const int64_t pair_size = job.conv_groups * ceil_div(job.out, panel<A>) * of_panel;
    return pack_parts<A>(job, pair_size, [&](const Group& group, int64_t cg, int64_t p, int64_t block, A* of_group) {
        winograd_pack_part<T, A>(job, group, cg, p, block, of_group + p * of_panel);
        return true;
    });
}

// One task's tiles of a group, for some panels.
template <class T, class A>
struct Tiles {
    typedef typename Vec<A>::type V;
    static constexpr int L = lanes<A>;
    static constexpr int kCols = kPixels == 12 ? 4 : 2;

    const ConvJob& job;
    const Pass& pass;
    const int64_t* samples;  // of the group
    int64_t tile_rows, tile_cols;
    int64_t conv_group, slice_begin;
    A* sums;  // [position][tile][lane of a panel]

    struct Tile {
        int64_t sample, y, x;  // the tile's first pixel
    };

    Tile tile(int64_t i) const {
        const int64_t each = tile_rows * tile_cols, at = i % each;
        return {samples[i / each], at / tile_cols * 2, at % tile_cols * 2};
    }

    template <bool INSIDE>
    void transform(const T* image, int64_t top, int64_t left, const Before<A>& before, int64_t tiles, A* to) const {
        const int64_t blocks = job.red / kBlock, position = blocks * tiles * kBlock;
        bool seen[kPositions];
        if (!INSIDE) {
            for (int i = 0; i < kPositions; ++i) {
                const int64_t y = top + i / 4, x = left + i % 4;
                seen[i] = y >= 0 && y < job.src_h && x >= 0 && x < job.src_w;
            }
        }
        const T* corner = image + (top * job.src_w + left) * job.src_c;
        for (int64_t block = 0; block < blocks; ++block, corner += kBlock, to += tiles * kBlock) {
            for (int v = 0; v < kBlock / L; ++v) {
                V half[4][4];  // [column of x][row of B' x]
                for (int s = 0; s < 4; ++s) {
                    V x[4];
                    for (int r = 0; r < 4; ++r) {
                        x[r] = V{};
                        if (!INSIDE && !seen[r * 4 + s]) continue;
                        x[r] = load_lanes(corner + (r * job.src_w + s) * job.src_c + v * L);
                        if (!before.empty()) x[r] = prepared(before, block * kBlock + v * L, x[r]);
                    }
                    transform_patch(x, half[s]);
                }
                for (int r = 0; r < 4; ++r) {
                    const V row[4] = {half[0][r], half[1][r], half[2][r], half[3][r]};
                    V u[4];
                    transform_patch(row, u);
                    for (int s = 0; s < 4; ++s) store(to + (r * 4 + s) * position + v * L, u[s]);
                }
            }
        }
    }

    static V load_lanes(const T* from) {
        if constexpr (sizeof(T) == sizeof(A)) {
            return load(reinterpret_cast<const A*>(from));
        } else {
            A line[L] __attribute__((aligned(64)));
            for (int c = 0; c < L; ++c) line[c] = to_acc(from[c]);
            return load(line);
        }
    }

    static V prepared(const Before<A>& before, int64_t channel, V x) {
        if (before.scale != nullptr) x *= load(before.scale + channel);
        if (before.shift != nullptr) x += load(before.shift + channel);
        return before.relu ? (x < A(0) ? V{} : x) : x;
    }

    // Tiles that are multiplied together: whole rows of a register tile.
    static int64_t held(int64_t count) { return ceil_div(count, kCols) * kCols; }

    // The patches of up to kPixels tiles from `first` on: [position][block of channels][tile][channel].
    void read(int64_t first, int64_t count, A* patches) const {
        const int64_t tiles = held(count);
        for (int64_t j = 0; j < count; ++j) {
            const Tile t = tile(first + j);
            const int64_t from = t.sample / job.src_div, top = t.y + pass.org_h, left = t.x + pass.org_w;
            const T* image =
                static_cast<const T*>(job.src) + from * job.src_h * job.src_w * job.src_c + conv_group * job.red;
            const Before<A> before = Before<A>::of(job.prologue, from, conv_group * job.red);
            A* to = patches + j * kBlock;
            if (top >= 0 && left >= 0 && top + kPatch <= job.src_h && left + kPatch <= job.src_w)
                transform<true>(image, top, left, before, tiles, to);
            else
                transform<false>(image, top, left, before, tiles, to);
        }
        for (int64_t j = count; j < tiles; ++j) {
            for (int64_t i = 0; i < kPositions * job.red / kBlock; ++i) {
                std::memset(patches + (i * tiles + j) * kBlock, 0, kBlock * sizeof(A));
            }
        }
    }

    template <int NV, int NR>
    void multiply(const A* from, const A* weight) const {
        constexpr int tiles = NR * kCols;
        for (int i = 0; i < kPositions; ++i) {
            V acc[tiles][NV] = {};
            const A* w = weight + i * kBlock * panel<A>;
            for (int64_t block = 0; block < job.red / kBlock;
                 ++block, from += tiles * kBlock, w += kPositions * kBlock * panel<A>) {
                const A* at[NR];
                for (int r = 0; r < NR; ++r) at[r] = from + r * kCols * kBlock;
                tap<A, NV, NR, kCols, 1, 0, kCols>(at, kBlock, kBlock, w, acc);
            }
            A* to = sums + i * tiles * NV * L;
            for (int j = 0; j < tiles; ++j) {
                for (int v = 0; v < NV; ++v) store(to + (j * NV + v) * L, acc[j][v]);
            }
        }
    }

    template <int NV>
    void write(int64_t first, int64_t count, int64_t tiles, int64_t p, const PanelEpilogue<A>& epilogue) const {
        const int64_t channel = p * panel<A>, filled = smaller(panel<A>, job.out - channel);
        for (int64_t j = 0; j < count; ++j) {
            const Tile t = tile(first + j);
            V y[4][NV];
            for (int v = 0; v < NV; ++v) {
                V half[2][4];  // [row of A' m][column of m]
                for (int s = 0; s < 4; ++s) {
                    V m[4], a[2];
                    for (int r = 0; r < 4; ++r) m[r] = load(sums + (((r * 4 + s) * tiles + j) * NV + v) * L);
                    transform_sums(m, a);
                    half[0][s] = a[0], half[1][s] = a[1];
                }
                for (int r = 0; r < 2; ++r) {
                    V a[2];
                    transform_sums(half[r], a);
                    y[r * 2][v] = a[0], y[r * 2 + 1][v] = a[1];
                }
            }
            const A gate = epilogue.has_gate ? static_cast<const A*>(job.epilogue.gate)[t.sample] : A(1);
            for (int64_t r = 0; r < smaller(2, pass.rows - t.y); ++r) {
                for (int64_t s = 0; s < smaller(2, pass.cols - t.x); ++s) {
                    const int64_t pixel = (t.sample * job.dst_h + t.y + r) * job.dst_w + t.x + s;
                    const int64_t at = conv_group * job.out + channel;
                    const T* residual = job.epilogue.residual != nullptr
                                            ? static_cast<const T*>(job.epilogue.residual) + pixel * job.residual_c + at
                                            : nullptr;
                    finish_pixel<T, A, NV>(y[r * 2 + s], epilogue, gate, residual,
                                           static_cast<T*>(job.dst) + pixel * job.dst_c + at, filled);
                }
            }
        }
    }

    template <int NV>
    void run(int64_t first, int64_t count, int64_t p, const A* patches, const A* weight) const {
        PanelEpilogue<A> epilogue;
        const int64_t channel = p * panel<A>;
        epilogue.read(job.epilogue, slice_begin + channel, conv_group * job.out + channel,
                      smaller(panel<A>, job.out - channel));
        const int64_t rows = ceil_div(count, kCols);
        if (rows == 3)
            multiply<NV, 3>(patches, weight);
        else if (rows == 2)
            multiply<NV, 2>(patches, weight);
        else
            multiply<NV, 1>(patches, weight);
        write<NV>(first, count, rows * kCols, p, epilogue);
    }
};

struct WinogradCut {
    int64_t tiles;  // of a group, in one task
    int64_t panel_parts;
};

// As cut_work: no bit of the result depends on it.
template <class A>
WinogradCut winograd_cut(const ConvJob& job, int64_t tiles_of_image) {
    constexpr int64_t target = 256 * 1024;  // bytes of patches that stay in the second-level cache beside a panel
    const int64_t panels = ceil_div(job.out, panel<A>);
    if (job.fresh != nullptr) {  // a panel is packed once: all of a group's tiles are one task's
        int64_t most = 1;
        for (int64_t g = 0; g < job.group_count; ++g) most = larger(most, job.groups[g].end - job.groups[g].begin);
        return {most * tiles_of_image, job.threads > 1 ? smaller(panels, 4 * int64_t(job.threads)) : 1};
    }
    const int64_t bytes = kPositions * job.red * kPixels * int64_t(sizeof(A));
    WinogradCut cut{larger(1, target / bytes) * kPixels, 1};
    const int64_t wanted = job.threads > 1 ? 4 * int64_t(job.threads) : 1;
    auto tasks = [&] { return count_chunks(job, tiles_of_image, cut.tiles) * cut.panel_parts * job.conv_groups; };
    while (tasks() < wanted && cut.tiles > kPixels) cut.tiles = larger(1, cut.tiles / kPixels / 2) * kPixels;
    while (tasks() < wanted && cut.panel_parts < panels) cut.panel_parts = smaller(panels, cut.panel_parts * 2);
    return cut;
}

template <class T, class A>
bool winograd_task(const ConvJob& job, const WinogradCut& cut, int64_t g, int64_t chunk, int64_t panel_part,
                   int64_t conv_group) {
    const Group& group = job.groups[g];
    const Pass& pass = job.passes[0];
    const int64_t panels = ceil_div(job.out, panel<A>);
    const int64_t panel_begin = panels * panel_part / cut.panel_parts;
    const int64_t panel_end = panels * (panel_part + 1) / cut.panel_parts;
    if (panel_begin == panel_end) return true;
    const int64_t tile_rows = ceil_div(pass.rows, 2), tile_cols = ceil_div(pass.cols, 2);
    const int64_t begin = chunk * cut.tiles;
    const int64_t end = smaller(begin + cut.tiles, (group.end - group.begin) * tile_rows * tile_cols);

    const int64_t of_tiles = kPositions * job.red * kPixels;  // a register tile's patches
    const int64_t sums = kPositions * kPixels * panel<A>;
    A* memory =
        static_cast<A*>(scratch(Scratch::worker, size_t(sums + ceil_div(end - begin, kPixels) * of_tiles) * sizeof(A)));
    if (memory == nullptr) return false;
    const Tiles<T, A> tiles{
        job,   pass, job.order + group.begin, tile_rows, tile_cols, conv_group, group.out_start + conv_group * job.out,
        memory};
    A* patches = memory + sums;
    for (int64_t first = begin; first < end; first += kPixels) {
        tiles.read(first, smaller(kPixels, end - first), patches + (first - begin) / kPixels * of_tiles);
    }
    const int64_t of_panel = kPositions * job.red * panel<A>;
    A* own = nullptr;
    if (job.fresh != nullptr) {
        own = static_cast<A*>(scratch(Scratch::packed, size_t(of_panel) * sizeof(A)));
        if (own == nullptr) return false;
    }
    for (int64_t p = panel_begin; p < panel_end; ++p) {
        const A* weight = own;
        if (own != nullptr) {
            for (int64_t block = 0; block < job.red / kBlock; ++block) {
                winograd_pack_part<T, A>(*job.fresh, group, conv_group, p, block, own);
            }
        } else {
            const int64_t pair = job.dense_index ? g : group.pair;
            weight = static_cast<const A*>(job.packed) + ((pair * job.conv_groups + conv_group) * panels + p) * of_panel;
        }
        for (int64_t first = begin; first < end; first += kPixels) {
            const int64_t count = smaller(kPixels, end - first);
            const A* from = patches + (first - begin) / kPixels * of_tiles;
            if (job.out - p * panel<A> <= lanes<A>)
                tiles.template run<1>(first, count, p, from, weight);
            else
                tiles.template run<kVectors>(first, count, p, from, weight);
        }
    }
    return true;
}

template <class T, class A>
Result winograd(const ConvJob& job) {
    const int64_t tiles_of_image = ceil_div(job.passes[0].rows, 2) * ceil_div(job.passes[0].cols, 2);
    const WinogradCut cut = winograd_cut<A>(job, tiles_of_image);
    const int64_t each = cut.panel_parts * job.conv_groups;
    return run_chunks(job, tiles_of_image, cut.tiles, each, [&](int64_t g, int64_t chunk, int64_t i) {
        return winograd_task<T, A>(job, cut, g, chunk, i / job.conv_groups, i % job.conv_groups);
    });
}

}  // namespace
}  // namespace moe::cpu
