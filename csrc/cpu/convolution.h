// SPDX-License-Identifier: Apache-2.0
// The correlation engine behind forward and input gradient. A task copies a few padded rows of a few samples of one group
// into a buffer [block of channels][row][column][channel], then walks over it with a register tile of pixels x output
// channels. The sample's slice decides only where packed weights are read: nothing is gathered.
#pragma once

#include "cpu/jobs.h"
#include "cpu/pack.h"
#include "cpu/vec.h"

namespace moe::cpu {
namespace {

// The padded copy of one sample's rows for one pass.
struct Window {
    int64_t rows, cols;  // of the buffer
    int64_t row_stride, block_stride, size;
};

template <class T, class A>
void copy_window(const T* image, int64_t height, int64_t width, int64_t pixel_stride, int64_t channels, int64_t top,
                 int64_t left, const Window& window, A* buffer) {
    const int64_t col_begin = larger(0, -left);
    const int64_t col_end = larger(col_begin, smaller(window.cols, width - left));
    const int64_t blocks = ceil_div(channels, kBlock);
    for (int64_t row = 0; row < window.rows; ++row) {
        const int64_t from_row = top + row;
        const bool inside = from_row >= 0 && from_row < height;
        for (int64_t block = 0; block < blocks; ++block) {
            A* to = buffer + block * window.block_stride + row * window.row_stride;
            if (!inside) {
                std::memset(to, 0, size_t(window.cols * kBlock) * sizeof(A));
                continue;
            }
            std::memset(to, 0, size_t(col_begin * kBlock) * sizeof(A));
            const int64_t count = smaller(kBlock, channels - block * kBlock);
            const T* from = image + (from_row * width + left) * pixel_stride + block * kBlock;
            if (count == kBlock) {
                for (int64_t col = col_begin; col < col_end; ++col) {
                    const T* pixel = from + col * pixel_stride;
                    for (int c = 0; c < kBlock; ++c) to[col * kBlock + c] = to_acc(pixel[c]);
                }
            } else {
                for (int64_t col = col_begin; col < col_end; ++col) {
                    const T* pixel = from + col * pixel_stride;
                    for (int64_t c = 0; c < count; ++c) to[col * kBlock + c] = to_acc(pixel[c]);
                    for (int64_t c = count; c < kBlock; ++c) to[col * kBlock + c] = A(0);
                }
            }
            std::memset(to + col_end * kBlock, 0, size_t((window.cols - col_end) * kBlock) * sizeof(A));
        }
    }
}

// NR rows x NC columns of pixels by one panel of output channels, held in registers. STEP is the source distance of
// neighbouring columns, 0 when it is known only at run time.
template <class A, int NR, int NC, int STEP>
inline void tile(const A* const* rows, int64_t step, int64_t block_stride, int64_t reduced, const int64_t* taps,
                 int64_t tap_count, const A* weight, typename Vec<A>::type (&acc)[NR * NC][kVectors]) {
    typedef typename Vec<A>::type V;
    constexpr int L = lanes<A>;
    const int64_t distance = STEP > 0 ? STEP * kBlock : step * kBlock;
    for (int64_t begin = 0, block = 0; begin < reduced; begin += kBlock, ++block) {
        const int64_t count = smaller(kBlock, reduced - begin);
        for (int64_t t = 0; t < tap_count; ++t) {
            const A* at[NR];
#pragma GCC unroll 8
            for (int r = 0; r < NR; ++r) at[r] = rows[r] + block * block_stride + taps[t];
            for (int64_t c = 0; c < count; ++c) {
                V w[kVectors];
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) w[v] = load(weight + v * L);
#pragma GCC unroll 8
                for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 16
                    for (int j = 0; j < NC; ++j) {
                        const A x = at[r][j * distance + c];
#pragma GCC unroll 4
                        for (int v = 0; v < kVectors; ++v) acc[r * NC + j][v] += x * w[v];
                    }
                }
                weight += kVectors * L;
            }
        }
    }
}

// The epilogue's vectors for one panel, padded to its width. Null where absent.
template <class A>
struct PanelEpilogue {
    A bias[panel<A>], scale[panel<A>], shift[panel<A>];
    bool has_bias, has_gate, has_affine, relu;

    void read(const Epilogue& e, int64_t slice_channel, int64_t channel, int64_t filled) {
        has_bias = e.bias != nullptr;
        has_gate = e.gate != nullptr;
        has_affine = e.scale != nullptr || e.shift != nullptr;
        relu = e.relu;
        const int64_t affine = e.affine_per_slice ? slice_channel : channel;
        for (int64_t i = 0; i < panel<A>; ++i) {
            const bool inside = i < filled;
            bias[i] = inside && has_bias ? static_cast<const A*>(e.bias)[slice_channel + i] : A(0);
            scale[i] = inside && e.scale != nullptr ? static_cast<const A*>(e.scale)[affine + i] : A(1);
            shift[i] = inside && e.shift != nullptr ? static_cast<const A*>(e.shift)[affine + i] : A(0);
        }
    }
};

template <class T, class A>
inline void finish_pixel(typename Vec<A>::type (&acc)[kVectors], const PanelEpilogue<A>& e, A gate, const T* residual,
                         T* to, int64_t filled) {
    typedef typename Vec<A>::type V;
    constexpr int L = lanes<A>;
    A line[panel<A>] __attribute__((aligned(64)));
    if (residual != nullptr) {
        for (int i = 0; i < panel<A>; ++i) line[i] = i < filled ? to_acc(residual[i]) : A(0);
    }
    for (int v = 0; v < kVectors; ++v) {
        V y = acc[v];
        if (e.has_bias) y += load(e.bias + v * L);
        if (e.has_gate) y *= gate;
        if (e.has_affine) y = y * load(e.scale + v * L) + load(e.shift + v * L);
        if (residual != nullptr) y += load(line + v * L);
        if (e.relu) y = y < A(0) ? V{} : y;  // NaN compares false and stays
        acc[v] = y;
    }
    if constexpr (sizeof(T) == sizeof(A)) {
        if (filled == panel<A>) {
            for (int v = 0; v < kVectors; ++v) store(reinterpret_cast<A*>(to) + v * L, acc[v]);
            return;
        }
    }
    for (int v = 0; v < kVectors; ++v) store(line + v * L, acc[v]);
    for (int64_t i = 0; i < filled; ++i) to[i] = from_acc<T>(line[i]);
}

// The tile's shape: always eight pixels, as many in a row as the image is wide.
struct TileShape {
    int rows, cols;
};
inline TileShape choose_tile(int64_t cols) {
    const TileShape shapes[] = {{1, 8}, {2, 4}, {4, 2}, {8, 1}};
    TileShape best = shapes[0];
    for (const TileShape& s : shapes) {
        if (ceil_div(cols, s.cols) * s.cols < ceil_div(cols, best.cols) * best.cols) best = s;
    }
    return best;
}

// One task's samples, rows and panels of one pass.
template <class T, class A>
struct Walk {
    const ConvJob& job;
    const Pass& pass;
    const Window& window;
    const int64_t* taps;      // [pass.taps] offsets into the buffer
    const int64_t* samples;   // virtual samples
    int64_t sample_count;
    int64_t row_begin, row_end;
    const A* buffer;          // [sample_count] windows
    const A* weight;          // this group's packed weights of this pass
    int64_t channel_begin;    // first destination channel of the convolution group
    int64_t slice_begin;      // first channel of the slice in the layer, with the convolution group's offset

    template <int NR, int NC, int STEP>
    void run(int64_t panel_begin, int64_t panel_end) const {
        const int64_t height = row_end - row_begin;
        const int64_t all_rows = sample_count * height;
        const int64_t panel_size = pass.taps * job.red * panel<A>;
        PanelEpilogue<A> epilogue;
        for (int64_t p = panel_begin; p < panel_end; ++p) {
            const int64_t channel = p * panel<A>;
            const int64_t filled = smaller(panel<A>, job.out - channel);
            epilogue.read(job.epilogue, slice_begin + channel, channel_begin + channel, filled);
            for (int64_t row = 0; row < all_rows; row += NR) {
                const A* base[NR];
                for (int r = 0; r < NR; ++r) {
                    const int64_t clamped = smaller(row + r, all_rows - 1);
                    base[r] = buffer + clamped / height * window.size + clamped % height * pass.is_h * window.row_stride;
                }
                for (int64_t col = 0; col < pass.cols; col += NC) {
                    const A* at[NR];
                    for (int r = 0; r < NR; ++r) at[r] = base[r] + col * pass.is_w * kBlock;
                    typename Vec<A>::type acc[NR * NC][kVectors] = {};
                    tile<A, NR, NC, STEP>(at, pass.is_w, window.block_stride, job.red, taps, pass.taps,
                                          weight + p * panel_size, acc);
                    for (int r = 0; r < NR && row + r < all_rows; ++r) {
                        finish_row<NC>(acc + r * NC, epilogue, row + r, col, channel_begin + channel, filled);
                    }
                }
            }
        }
    }

    template <int NC>
    void finish_row(typename Vec<A>::type (*acc)[kVectors], const PanelEpilogue<A>& epilogue, int64_t row, int64_t col,
                    int64_t channel, int64_t filled) const {
        const int64_t height = row_end - row_begin;
        const int64_t sample = samples[row / height];
        const int64_t y = pass.oo_h + pass.os_h * (row_begin + row % height);
        const A gate = epilogue.has_gate ? static_cast<const A*>(job.epilogue.gate)[sample] : A(1);
        const int64_t line = (sample * job.dst_h + y) * job.dst_w + pass.oo_w;
        for (int j = 0; j < NC && col + j < pass.cols; ++j) {
            const int64_t offset = (line + pass.os_w * (col + j)) * job.dst_c + channel;
            const T* residual =
                job.epilogue.residual != nullptr ? static_cast<const T*>(job.epilogue.residual) + offset : nullptr;
            finish_pixel<T, A>(acc[j], epilogue, gate, residual, static_cast<T*>(job.dst) + offset, filled);
        }
    }

    template <int NR, int NC>
    void with_step(int64_t panel_begin, int64_t panel_end) const {
        if (NC == 1 || pass.is_w == 1) return run<NR, NC, 1>(panel_begin, panel_end);
        if (pass.is_w == 2) return run<NR, NC, 2>(panel_begin, panel_end);
        run<NR, NC, 0>(panel_begin, panel_end);
    }

    void dispatch(int64_t panel_begin, int64_t panel_end) const {
        switch (choose_tile(pass.cols).cols) {
            case 8: return with_step<1, 8>(panel_begin, panel_end);
            case 4: return with_step<2, 4>(panel_begin, panel_end);
            case 2: return with_step<4, 2>(panel_begin, panel_end);
            default: return with_step<8, 1>(panel_begin, panel_end);
        }
    }
};

inline Window window_of(const Pass& pass, int64_t rows, int64_t reduced) {
    Window window;
    const int64_t tile_cols = choose_tile(pass.cols).cols;
    window.rows = (rows - 1) * pass.is_h + pass.span_h;
    window.cols = (ceil_div(pass.cols, tile_cols) * tile_cols - 1) * pass.is_w + pass.span_w;
    window.row_stride = window.cols * kBlock;
    window.block_stride = window.rows * window.row_stride;
    window.size = ceil_div(reduced, kBlock) * window.block_stride;
    return window;
}

// How the work is cut into tasks. It changes no bit of the result: every output is summed by one tile in one order.
struct Cut {
    int64_t samples;    // of a group, in one task
    int64_t row_parts;  // of an image
    int64_t panel_parts;
};

template <class A>
Cut cut_work(const ConvJob& job) {
    constexpr int64_t target = 160 * 1024;  // bytes of copied rows that stay in the second-level cache beside a panel
    int64_t bytes = 1, rows = 1;
    for (int64_t i = 0; i < job.pass_count; ++i) {
        if (job.passes[i].taps == 0 || job.passes[i].rows <= 0 || job.passes[i].cols <= 0) continue;
        bytes = larger(bytes, window_of(job.passes[i], job.passes[i].rows, job.red).size * int64_t(sizeof(A)));
        rows = larger(rows, job.passes[i].rows);
    }
    const int64_t panels = ceil_div(job.out, panel<A>);
    Cut cut{larger(1, smaller(64, target / bytes)), smaller(rows, ceil_div(bytes, target)), 1};
    const int64_t wanted = job.threads > 1 ? 4 * int64_t(job.threads) : 1;
    auto tasks = [&] {
        int64_t chunks = 0;
        for (int64_t g = 0; g < job.group_count; ++g) {
            chunks += ceil_div(job.groups[g].end - job.groups[g].begin, cut.samples);
        }
        return chunks * cut.row_parts * cut.panel_parts * job.conv_groups;
    };
    while (tasks() < wanted && cut.samples > 1) cut.samples = ceil_div(cut.samples, 2);
    while (tasks() < wanted && cut.row_parts * 4 <= rows) cut.row_parts *= 2;
    while (tasks() < wanted && cut.panel_parts < panels) cut.panel_parts = smaller(panels, cut.panel_parts * 2);
    return cut;
}

template <class T, class A>
void zero_pass(const ConvJob& job, const Pass& pass, int64_t sample, int64_t row_begin, int64_t row_end,
               int64_t channel_begin) {
    for (int64_t p = row_begin; p < row_end; ++p) {
        for (int64_t q = 0; q < pass.cols; ++q) {
            T* to = static_cast<T*>(job.dst) + channel_begin +
                    ((sample * job.dst_h + pass.oo_h + pass.os_h * p) * job.dst_w + pass.oo_w + pass.os_w * q) * job.dst_c;
            std::memset(to, 0, size_t(job.out) * sizeof(T));
        }
    }
}

template <class T, class A>
bool run_task(const ConvJob& job, const Cut& cut, int64_t g, int64_t chunk, int64_t part, int64_t panel_part,
              int64_t conv_group) {
    const Group& group = job.groups[g];
    const int64_t panels = ceil_div(job.out, panel<A>);
    const int64_t all_taps = count_taps(job.passes, job.pass_count);
    const int64_t pair_size = packed_size_of_pair<A>(job.out, job.red, all_taps, job.conv_groups);
    const A* weight = static_cast<const A*>(job.packed) + (job.dense_index ? g : group.pair) * pair_size +
                      conv_group * (pair_size / job.conv_groups);
    const int64_t begin = group.begin + chunk * cut.samples;
    const int64_t count = smaller(cut.samples, group.end - begin);
    const int64_t panel_begin = panels * panel_part / cut.panel_parts;
    const int64_t panel_end = panels * (panel_part + 1) / cut.panel_parts;
    if (panel_begin == panel_end) return true;

    for (int64_t i = 0; i < job.pass_count; ++i) {
        const Pass& pass = job.passes[i];
        const int64_t row_begin = pass.rows * part / cut.row_parts;
        const int64_t row_end = pass.rows * (part + 1) / cut.row_parts;
        if (row_begin >= row_end || pass.cols <= 0) continue;
        if (pass.taps == 0) {  // a stride that skips these pixels: nothing reaches them
            for (int64_t s = 0; s < count && panel_part == 0; ++s) {
                zero_pass<T, A>(job, pass, job.order[begin + s], row_begin, row_end, conv_group * job.out);
            }
            continue;
        }
        const Window window = window_of(pass, row_end - row_begin, job.red);
        const size_t tap_bytes = size_t(ceil_div(pass.taps * int64_t(sizeof(int64_t)), 64) * 64);
        void* memory = scratch(Scratch::worker, tap_bytes + size_t(window.size * count) * sizeof(A));
        if (memory == nullptr) return false;
        int64_t* taps = static_cast<int64_t*>(memory);
        A* buffer = reinterpret_cast<A*>(static_cast<char*>(memory) + tap_bytes);
        for (int64_t t = 0; t < pass.taps; ++t) taps[t] = pass.tap_h[t] * window.row_stride + pass.tap_w[t] * kBlock;
        for (int64_t s = 0; s < count; ++s) {
            const int64_t from = job.order[begin + s] / job.src_div;
            const T* image = static_cast<const T*>(job.src) + from * job.src_h * job.src_w * job.src_c + conv_group * job.red;
            copy_window<T, A>(image, job.src_h, job.src_w, job.src_c, job.red, row_begin * pass.is_h + pass.org_h,
                              pass.org_w, window, buffer + s * window.size);
        }
        const Walk<T, A> walk{job,     pass,    window, taps,
                              job.order + begin, count,   row_begin, row_end,
                              buffer,  weight + pass.taps_before * panels * panel<A> * job.red,
                              conv_group * job.out, group.out_start + conv_group * job.out};
        walk.dispatch(panel_begin, panel_end);
    }
    return true;
}

template <class T, class A>
Result conv(const ConvJob& job) {
    const Cut cut = cut_work<A>(job);
    int64_t chunks = 0;
    for (int64_t g = 0; g < job.group_count; ++g) {
        chunks += ceil_div(job.groups[g].end - job.groups[g].begin, cut.samples);
    }
    const int64_t each = cut.row_parts * cut.panel_parts * job.conv_groups;
    const int64_t tasks = chunks * each;
    int failed = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(job.threads) if (job.threads > 1 && tasks > 1) reduction(| : failed)
    for (int64_t task = 0; task < tasks; ++task) {
        int64_t chunk = task / each, rest = task % each, g = 0;
        for (;; ++g) {
            const int64_t here = ceil_div(job.groups[g].end - job.groups[g].begin, cut.samples);
            if (chunk < here) break;
            chunk -= here;
        }
        const int64_t conv_group = rest % job.conv_groups;
        rest /= job.conv_groups;
        failed |= !run_task<T, A>(job, cut, g, chunk, rest % cut.row_parts, rest / cut.row_parts, conv_group);
    }
    return failed != 0 ? Result::out_of_memory : Result::ok;
}

}  // namespace
}  // namespace moe::cpu
