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

// A prologue's numbers for one sample, from the first channel that is read.
template <class A>
struct Before {
    const A* scale = nullptr;
    const A* shift = nullptr;
    bool relu = false;

    static Before of(const Prologue& p, int64_t sample, int64_t channel) {
        const int64_t at = (p.expert != nullptr ? p.expert[sample] * p.channels : 0) + channel;
        return {p.scale != nullptr ? static_cast<const A*>(p.scale) + at : nullptr,
                p.shift != nullptr ? static_cast<const A*>(p.shift) + at : nullptr, p.relu};
    }
    bool empty() const { return scale == nullptr && shift == nullptr && !relu; }
    A operator()(A x, int64_t c) const {
        if (scale != nullptr) x *= scale[c];
        if (shift != nullptr) x += shift[c];
        return relu && x < A(0) ? A(0) : x;  // NaN compares false and stays
    }
};

template <class A>
inline void apply(const Before<A>& before, int64_t channel, int64_t count, int64_t pixels, A* to) {
    A scale[kBlock], shift[kBlock];
    for (int64_t c = 0; c < kBlock; ++c) {
        scale[c] = before.scale != nullptr && c < count ? before.scale[channel + c] : A(1);
        shift[c] = before.shift != nullptr && c < count ? before.shift[channel + c] : A(0);
    }
    for (int64_t i = 0; i < pixels; ++i, to += kBlock) {
        for (int c = 0; c < kBlock; ++c) {
            const A x = to[c] * scale[c] + shift[c];
            to[c] = before.relu && x < A(0) ? A(0) : x;
        }
    }
}

template <class T, class A>
void copy_window(const T* image, int64_t height, int64_t width, int64_t pixel_stride, int64_t channels, int64_t top,
                 int64_t left, const Before<A>& before, const Window& window, A* buffer) {
    const int64_t col_begin = smaller(window.cols, larger(0, -left));
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
            if (!before.empty()) {
                apply(before, block * kBlock, count, col_end - col_begin, to + col_begin * kBlock);
            }
            std::memset(to + col_end * kBlock, 0, size_t((window.cols - col_end) * kBlock) * sizeof(A));
        }
    }
}

// The taps that a tile needs: those outside [begin_h, end_h) meet padding in all its rows; those before begin_w meet it
// in the tile's first column, those from end_w on in its last. On a 4x4 image a third of a 3x3 kernel's work is padding.
struct TapRange {
    int64_t begin_h, end_h, begin_w, end_w;
};

// One tap's reduced channels of a tile, for its columns FROM .. TO - 1.
template <class A, int NV, int NR, int NC, int STEP, int FROM, int TO>
[[gnu::always_inline]] inline void tap(const A* const (&at)[NR], int64_t distance, int64_t count, const A* weight,
                                       typename Vec<A>::type (&acc)[NR * NC][NV]) {
    typedef typename Vec<A>::type V;
    if (STEP > 0) distance = STEP * kBlock;
    for (int64_t c = 0; c < count; ++c, weight += panel<A>) {
        V w[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) w[v] = load(weight + v * lanes<A>);
#pragma GCC unroll 12
        for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 4
            for (int j = FROM; j < TO; ++j) {
                const A x = at[r][j * distance + c];
#pragma GCC unroll 2
                for (int v = 0; v < NV; ++v) acc[r * NC + j][v] += x * w[v];
            }
        }
    }
}

// NR rows x NC columns of pixels by NV vectors of output channels, held in registers. STEP is the source distance of
// neighbouring columns, 0 when it is known only at run time.
template <class A, int NV, int NR, int NC, int STEP>
[[gnu::always_inline]] inline void tile(const A* const* rows, const Pass& pass, const TapRange& range,
                                        int64_t block_stride, int64_t reduced, const int64_t* taps, const A* weight,
                                        typename Vec<A>::type (&acc)[NR * NC][NV]) {
    const int64_t distance = pass.is_w * kBlock;
    for (int64_t begin = 0, block = 0; begin < reduced; begin += kBlock, ++block) {
        const int64_t count = smaller(kBlock, reduced - begin);
        for (int64_t t = 0; t < pass.taps; ++t, weight += count * panel<A>) {
            if (pass.tap_h[t] < range.begin_h || pass.tap_h[t] >= range.end_h) continue;
            const A* at[NR];
#pragma GCC unroll 12
            for (int r = 0; r < NR; ++r) at[r] = rows[r] + block * block_stride + taps[t];
            if constexpr (NC > 1) {
                if (pass.tap_w[t] < range.begin_w) {
                    tap<A, NV, NR, NC, STEP, 1, NC>(at, distance, count, weight, acc);
                    continue;
                }
                if (pass.tap_w[t] >= range.end_w) {
                    tap<A, NV, NR, NC, STEP, 0, NC - 1>(at, distance, count, weight, acc);
                    continue;
                }
            }
            tap<A, NV, NR, NC, STEP, 0, NC>(at, distance, count, weight, acc);
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

template <class T, class A, int NV>
inline void finish_pixel(typename Vec<A>::type (&acc)[NV], const PanelEpilogue<A>& e, A gate, const T* residual, T* to,
                         int64_t filled) {
    typedef typename Vec<A>::type V;
    constexpr int L = lanes<A>;
    A line[NV * L] __attribute__((aligned(64)));
    A padded[NV * L] __attribute__((aligned(64)));
    const A* added = nullptr;
    if (residual != nullptr) {
        if (sizeof(T) == sizeof(A) && filled == NV * L) {
            added = reinterpret_cast<const A*>(residual);
        } else {
            for (int i = 0; i < NV * L; ++i) padded[i] = i < filled ? to_acc(residual[i]) : A(0);
            added = padded;
        }
    }
    for (int v = 0; v < NV; ++v) {
        V y = acc[v];
        if (e.has_bias) y += load(e.bias + v * L);
        if (e.has_gate) y *= gate;
        if (e.has_affine) y = y * load(e.scale + v * L) + load(e.shift + v * L);
        if (added != nullptr) y += load(added + v * L);
        if (e.relu) y = y < A(0) ? V{} : y;  // NaN compares false and stays
        acc[v] = y;
    }
    if constexpr (sizeof(T) == sizeof(A)) {
        if (filled == NV * L) {
            for (int v = 0; v < NV; ++v) store(reinterpret_cast<A*>(to) + v * L, acc[v]);
            return;
        }
    }
    for (int v = 0; v < NV; ++v) store(line + v * L, acc[v]);
    for (int64_t i = 0; i < smaller(filled, NV * L); ++i) to[i] = from_acc<T>(line[i]);
}

// The pixels that a tile holds beside a panel: as many as the registers take. Columns of a tile divide the image's where
// they can; its rows run on from sample to sample.
constexpr int kPixels = MOE_REGISTERS == 32 ? 12 : 6;

inline int tile_cols(int64_t cols) {
    if (kPixels == 12 && (cols % 4 == 0 || cols > 8)) return 4;
    return cols == 1 ? 1 : 2;
}

// One task's samples, rows and panels of one pass.
template <class T, class A>
struct Walk {
    const ConvJob& job;
    const Pass& pass;
    const Window& window;
    const int64_t* taps;     // [pass.taps] offsets into the buffer
    const int64_t* samples;  // virtual samples
    int64_t sample_count;
    int64_t row_begin, row_end;
    const A* buffer;  // [sample_count] windows
    const A* weight;  // this group's packed weights of this pass, from first_panel on
    int64_t first_panel;
    int64_t channel_begin;  // first destination channel of the convolution group
    int64_t slice_begin;    // first channel of the slice in the layer, with the convolution group's offset

    // Rows of the task in the order of tiles: the same row of all samples, then the next, so that a tile's rows meet the
    // padding together.
    struct Row {
        int64_t sample = 0, y = 0;
        const A* at = nullptr;
    };

    Row first() const { return {0, 0, buffer}; }
    Row next(Row row) const {
        row.at += window.size;
        if (++row.sample == sample_count) {
            row.sample = 0;
            ++row.y;
            row.at = buffer + row.y * pass.is_h * window.row_stride;
        }
        return row;
    }

    // NR rows of the image by all its columns and one panel.
    template <int NV, int NR, int NC, int STEP>
    Row rows(Row row, int64_t p, const PanelEpilogue<A>& epilogue) const {
        Row all[NR];
        for (int r = 0; r < NR; ++r, row = next(row)) all[r] = row;
        const int64_t channel = p * panel<A>;
        const A* panel_weight = weight + (channel - first_panel * panel<A>)*pass.taps * job.red;
        TapRange range;
        range.begin_h = -((row_begin + all[NR - 1].y) * pass.is_h + pass.org_h);
        range.end_h = job.src_h - ((row_begin + all[0].y) * pass.is_h + pass.org_h);
        for (int64_t col = 0; col < pass.cols; col += NC) {
            range.begin_w = -(col * pass.is_w + pass.org_w);
            range.end_w = job.src_w - ((col + NC - 1) * pass.is_w + pass.org_w);
            const A* at[NR];
            for (int r = 0; r < NR; ++r) at[r] = all[r].at + col * pass.is_w * kBlock;
            typename Vec<A>::type acc[NR * NC][NV] = {};
            tile<A, NV, NR, NC, STEP>(at, pass, range, window.block_stride, job.red, taps, panel_weight, acc);
            for (int r = 0; r < NR; ++r) finish_row<NV, NC>(acc + r * NC, epilogue, all[r], col, channel);
        }
        return row;
    }

    template <int NV, int NC>
    void finish_row(typename Vec<A>::type (*acc)[NV], const PanelEpilogue<A>& epilogue, const Row& row, int64_t col,
                    int64_t channel) const {
        const int64_t filled = smaller(panel<A>, job.out - channel);
        const int64_t sample = samples[row.sample];
        const A gate = epilogue.has_gate ? static_cast<const A*>(job.epilogue.gate)[sample] : A(1);
        const int64_t line = (sample * job.dst_h + pass.oo_h + pass.os_h * (row_begin + row.y)) * job.dst_w + pass.oo_w;
        for (int j = 0; j < NC && col + j < pass.cols; ++j) {
            const int64_t pixel = line + pass.os_w * (col + j), first = channel_begin + channel;
            const T* residual = job.epilogue.residual != nullptr
                                    ? static_cast<const T*>(job.epilogue.residual) + pixel * job.residual_c + first
                                    : nullptr;
            T* to = static_cast<T*>(job.dst) + pixel * job.dst_c + first;
            finish_pixel<T, A, NV>(acc[j], epilogue, gate, residual, to, filled);
        }
    }

    template <int NV, int NC, int STEP>
    void run(int64_t p) const {
        constexpr int most = kPixels / NC, some = most > 6 ? 4 : 2;
        PanelEpilogue<A> epilogue;
        const int64_t channel = p * panel<A>;
        epilogue.read(job.epilogue, slice_begin + channel, channel_begin + channel, smaller(panel<A>, job.out - channel));
        Row row = first();
        int64_t left = sample_count * (row_end - row_begin);
        for (; left >= most; left -= most) row = rows<NV, most, NC, STEP>(row, p, epilogue);
        for (; left >= some; left -= some) row = rows<NV, some, NC, STEP>(row, p, epilogue);
        for (; left > 0; --left) row = rows<NV, 1, NC, STEP>(row, p, epilogue);
    }

    template <int NV, int NC>
    void with_step(int64_t p) const {
        if (NC == 1 || pass.is_w == 1) return run<NV, NC, 1>(p);
        if (pass.is_w == 2) return run<NV, NC, 2>(p);
        run<NV, NC, 0>(p);
    }

    template <int NV>
    void with_cols(int64_t p) const {
        switch (tile_cols(pass.cols)) {
            case 4:
                return with_step<NV, kPixels == 12 ? 4 : 2>(p);
            case 2:
                return with_step<NV, 2>(p);
            default:
                return with_step<NV, 1>(p);
        }
    }

    void dispatch(int64_t panel_begin, int64_t panel_end) const {
        for (int64_t p = panel_begin; p < panel_end; ++p) {
            // a last panel that fills one vector pays for one
            if (job.out - p * panel<A> <= lanes<A>)
                with_cols<1>(p);
            else
                with_cols<kVectors>(p);
        }
    }
};

inline Window window_of(const Pass& pass, int64_t rows, int64_t reduced) {
    Window window;
    const int64_t step = tile_cols(pass.cols);
    window.rows = (rows - 1) * pass.is_h + pass.span_h;
    window.cols = (ceil_div(pass.cols, step) * step - 1) * pass.is_w + pass.span_w;
    window.row_stride = window.cols * kBlock;
    window.block_stride = window.rows * window.row_stride;
    window.size = ceil_div(reduced, kBlock) * window.block_stride;
    return window;
}

// Pieces of up to `chunk` units of one group, where a sample has `of_sample` of them.
inline int64_t count_chunks(const ConvJob& job, int64_t of_sample, int64_t chunk) {
    int64_t chunks = 0;
    for (int64_t g = 0; g < job.group_count; ++g) {
        chunks += ceil_div((job.groups[g].end - job.groups[g].begin) * of_sample, chunk);
    }
    return chunks;
}

// Calls task(group, chunk of the group, i) for all chunks and i < each; false is memory that could not be had.
template <class F>
Result run_chunks(const ConvJob& job, int64_t of_sample, int64_t chunk_size, int64_t each, const F& task) {
    const int64_t tasks = count_chunks(job, of_sample, chunk_size) * each;
    int failed = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(job.threads) if (job.threads > 1 && tasks > 1) \
    reduction(| : failed)
    for (int64_t i = 0; i < tasks; ++i) {
        int64_t chunk = i / each, g = 0;
        for (;; ++g) {
            const int64_t here = ceil_div((job.groups[g].end - job.groups[g].begin) * of_sample, chunk_size);
            if (chunk < here) break;
            chunk -= here;
        }
        failed |= !task(g, chunk, i % each);
    }
    return failed != 0 ? Result::out_of_memory : Result::ok;
}

// How the work is cut into tasks. It changes no bit of the result: every output is summed by one tile in one order.
struct Cut {
    int64_t samples;    // of a group, in one task
    int64_t row_parts;  // of an image
    int64_t panel_parts;
};

template <class A>
Cut cut_work(const ConvJob& job) {
    constexpr int64_t target = 256 * 1024;  // bytes of copied rows that stay in the second-level cache beside a panel
    int64_t bytes = 1, rows = 1;
    for (int64_t i = 0; i < job.pass_count; ++i) {
        if (job.passes[i].taps == 0 || job.passes[i].rows <= 0 || job.passes[i].cols <= 0) continue;
        bytes = larger(bytes, window_of(job.passes[i], job.passes[i].rows, job.red).size * int64_t(sizeof(A)));
        rows = larger(rows, job.passes[i].rows);
    }
    const int64_t panels = ceil_div(job.out, panel<A>);
    if (job.fresh != nullptr) {  // a panel is packed once: all of a group's samples are one task's
        int64_t most = 1;
        for (int64_t g = 0; g < job.group_count; ++g) most = larger(most, job.groups[g].end - job.groups[g].begin);
        return {most, 1, job.threads > 1 ? smaller(panels, 4 * int64_t(job.threads)) : 1};
    }
    Cut cut{larger(1, smaller(64, target / bytes)), smaller(rows, ceil_div(bytes, target)), 1};
    const int64_t wanted = job.threads > 1 ? 4 * int64_t(job.threads) : 1;
    auto tasks = [&] { return count_chunks(job, 1, cut.samples) * cut.row_parts * cut.panel_parts * job.conv_groups; };
    while (tasks() < wanted && cut.samples > 1) cut.samples = ceil_div(cut.samples, 2);
    constexpr int64_t together = kPixels / 4;  // rows of most tiles: as many samples meet the padding at once
    if (cut.samples > together) cut.samples = cut.samples / together * together;
    while (tasks() < wanted && cut.row_parts * 4 <= rows) cut.row_parts *= 2;
    while (tasks() < wanted && cut.panel_parts < panels) cut.panel_parts = smaller(panels, cut.panel_parts * 2);
    return cut;
}

template <class T, class A>
void zero_pass(const ConvJob& job, const Pass& pass, int64_t sample, int64_t row_begin, int64_t row_end,
               int64_t channel_begin) {
    for (int64_t p = row_begin; p < row_end; ++p) {
        for (int64_t q = 0; q < pass.cols; ++q) {
            T* to =
                static_cast<T*>(job.dst) + channel_begin +
                ((sample * job.dst_h + pass.oo_h + pass.os_h * p) * job.dst_w + pass.oo_w + pass.os_w * q) * job.dst_c;
            std::memset(to, 0, size_t(job.out) * sizeof(T));
        }
    }
}

// What a task has of one pass: the offsets of its taps and the copied windows of its samples.
template <class A>
struct Prepared {
    Window window;
    int64_t row_begin, row_end;
    int64_t* taps;
    A* buffer;
    size_t bytes;  // of both; none where the pass has nothing to do

    bool empty() const { return bytes == 0; }
};

template <class A>
Prepared<A> lay_out(const ConvJob& job, const Pass& pass, int64_t samples, int64_t part, int64_t parts, char* memory) {
    Prepared<A> p{};
    p.row_begin = pass.rows * part / parts;
    p.row_end = pass.rows * (part + 1) / parts;
    if (p.row_begin >= p.row_end || pass.cols <= 0 || pass.taps == 0) return p;
    p.window = window_of(pass, p.row_end - p.row_begin, job.red);
    const size_t tap_bytes = size_t(ceil_div(pass.taps * int64_t(sizeof(int64_t)), 64) * 64);
    p.bytes = tap_bytes + size_t(ceil_div(p.window.size * samples * int64_t(sizeof(A)), 64) * 64);
    p.taps = reinterpret_cast<int64_t*>(memory);
    p.buffer = reinterpret_cast<A*>(memory + tap_bytes);
    return p;
}

template <class T, class A>
bool run_task(const ConvJob& job, const Cut& cut, int64_t g, int64_t chunk, int64_t part, int64_t panel_part,
              int64_t conv_group) {
    const Group& group = job.groups[g];
    const int64_t panels = ceil_div(job.out, panel<A>);
    const int64_t all_taps = count_taps(job.passes, job.pass_count);
    const int64_t begin = group.begin + chunk * cut.samples;
    const int64_t count = smaller(cut.samples, group.end - begin);
    const int64_t panel_begin = panels * panel_part / cut.panel_parts;
    const int64_t panel_end = panels * (panel_part + 1) / cut.panel_parts;
    if (panel_begin == panel_end) return true;

    auto prepare = [&](const Pass& pass, char* memory) {
        const Prepared<A> p = lay_out<A>(job, pass, count, part, cut.row_parts, memory);
        if (!p.empty()) {
            for (int64_t t = 0; t < pass.taps; ++t)
                p.taps[t] = pass.tap_h[t] * p.window.row_stride + pass.tap_w[t] * kBlock;
            for (int64_t s = 0; s < count; ++s) {
                const int64_t from = job.order[begin + s] / job.src_div;
                const T* image =
                    static_cast<const T*>(job.src) + from * job.src_h * job.src_w * job.src_c + conv_group * job.red;
                copy_window<T, A>(image, job.src_h, job.src_w, job.src_c, job.red, p.row_begin * pass.is_h + pass.org_h,
                                  pass.org_w, Before<A>::of(job.prologue, from, conv_group * job.red), p.window,
                                  p.buffer + s * p.window.size);
            }
        } else if (pass.taps == 0 && panel_part == 0) {  // a stride that skips these pixels: nothing reaches them
            for (int64_t s = 0; s < count; ++s) {
                zero_pass<T, A>(job, pass, job.order[begin + s], p.row_begin, p.row_end, conv_group * job.out);
            }
        }
        return p;
    };
    // `weight` holds `held` panels from first_held on
    auto walk = [&](const Pass& pass, const Prepared<A>& p, const A* weight, int64_t first_held, int64_t held,
                    int64_t from, int64_t to) {
        const Walk<T, A> walk{job,
                              pass,
                              p.window,
                              p.taps,
                              job.order + begin,
                              count,
                              p.row_begin,
                              p.row_end,
                              p.buffer,
                              weight + pass.taps_before * held * panel<A> * job.red,
                              first_held,
                              conv_group * job.out,
                              group.out_start + conv_group * job.out};
        walk.dispatch(from, to);
    };

    size_t most = 1, all = 1;
    for (int64_t i = 0; i < job.pass_count; ++i) {
        const size_t bytes = lay_out<A>(job, job.passes[i], count, part, cut.row_parts, nullptr).bytes;
        most = bytes > most ? bytes : most;
        all += bytes;
    }
    char* memory = static_cast<char*>(scratch(Scratch::worker, job.fresh == nullptr ? most : all));
    if (memory == nullptr) return false;
    if (job.fresh == nullptr) {
        const int64_t pair_size = packed_size_of_pair<A>(job.out, job.red, all_taps, job.conv_groups);
        const A* weight = static_cast<const A*>(job.packed) + (job.dense_index ? g : group.pair) * pair_size +
                          conv_group * (pair_size / job.conv_groups);
        for (int64_t i = 0; i < job.pass_count; ++i) {
            const Prepared<A> p = prepare(job.passes[i], memory);
            if (!p.empty()) walk(job.passes[i], p, weight, 0, panels, panel_begin, panel_end);
        }
        return true;
    }
    // all passes' windows once, then panel by panel: each is packed while it is needed, and stays in the cache
    A* weight = static_cast<A*>(scratch(Scratch::packed, size_t(panel<A> * job.red * all_taps) * sizeof(A)));
    if (weight == nullptr) return false;
    size_t offset = 0;
    for (int64_t i = 0; i < job.pass_count; ++i) offset += prepare(job.passes[i], memory + offset).bytes;
    for (int64_t first = panel_begin; first < panel_end; ++first) {
        for (int64_t block = 0; block < ceil_div(job.red, kBlock); ++block) {
            if (!pack_part<T, A>(*job.fresh, group, conv_group, first, block, all_taps, first, 1, weight)) return false;
        }
        offset = 0;
        for (int64_t i = 0; i < job.pass_count; ++i) {
            const Prepared<A> p = lay_out<A>(job, job.passes[i], count, part, cut.row_parts, memory + offset);
            offset += p.bytes;
            if (!p.empty()) walk(job.passes[i], p, weight, first, 1, first, first + 1);
        }
    }
    return true;
}

template <class T, class A>
Result conv(const ConvJob& job) {
    const Cut cut = cut_work<A>(job);
    const int64_t each = cut.row_parts * cut.panel_parts * job.conv_groups;
    return run_chunks(job, 1, cut.samples, each, [&](int64_t g, int64_t chunk, int64_t i) {
        const int64_t conv_group = i % job.conv_groups, rest = i / job.conv_groups;
        return run_task<T, A>(job, cut, g, chunk, rest % cut.row_parts, rest / cut.row_parts, conv_group);
    });
}

}  // namespace
}  // namespace moe::cpu
