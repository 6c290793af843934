// SPDX-License-Identifier: Apache-2.0
#include "cpu/program_checks.h"

#include "cpu/checks.h"
#include "cpu/conv2d.h"

namespace moe::cpu {

namespace {

std::string text(int64_t n) { return std::to_string(n); }

int64_t bytes_of(const Place& p, Room room) { return p.height * p.width * p.pixel_stride * size_of(room.dtype); }

// Whether writing one changes the other; two ranges of one buffer's channels do not meet.
bool meet(const Place& a, const Place& b, Room room) {
    if (a.none() || b.none()) return false;
    if (a.offset >= b.offset + bytes_of(b, room) || b.offset >= a.offset + bytes_of(a, room)) return false;
    const bool same =
        a.offset == b.offset && a.height == b.height && a.width == b.width && a.pixel_stride == b.pixel_stride;
    return !same || (a.channel < b.channel + b.channels && b.channel < a.channel + a.channels);
}

Place place_of_index(int64_t offset, Room room) {
    const int64_t numbers = int64_t(sizeof(int64_t)) / size_of(room.dtype);
    return {offset, 0, 1, 1, numbers, numbers};
}

// Of what every step may read besides.
bool meets_index(const Place& dst, int64_t offset, Room room) {
    return offset != kNowhere && meet(dst, place_of_index(offset, room), room);
}

std::string check_size(const Place& place, int64_t channels, int64_t height, int64_t width, const char* name) {
    if (place.channels == channels && place.height == height && place.width == width) return {};
    return std::string(name) + ": expected " + text(channels) + " x " + text(height) + " x " + text(width) + ", got " +
           text(place.channels) + " x " + text(place.height) + " x " + text(place.width);
}

bool is_vector(const Place& place) { return place.height == 1 && place.width == 1; }

std::string check_slices(int64_t expert, int64_t count, const std::vector<int64_t>& starts, Room room, const char* name) {
    if (count < 0 || (count == 0) != (expert == kNowhere)) return std::string(name) + ": slices without samples' experts";
    if (!starts.empty() && int64_t(starts.size()) != count)
        return std::string(name) + ": " + text(int64_t(starts.size())) + " starts for " + text(count) + " slices";
    for (const int64_t start : starts) {
        if (start < 0 || start > kMaxBytes) return std::string(name) + ": a slice from " + text(start) + " on";
    }
    return count == 0 ? std::string() : check_index(expert, room, name);
}

// What a layer asks of its places, each of which is within the memory.
std::string check_shapes(const ProgramLayer& l) {
    const Place &src = l.src, &dst = l.dst, &other = l.other;
    const LayerJob& job = l.job;
    switch (job.op) {
        case LayerOp::mean:
            return check_size(dst, src.channels, 1, 1, "dst");
        case LayerOp::group_norm:
            if (job.groups < 1 || src.channels % job.groups != 0) return "groups: must divide the channels";
            return check_size(dst, src.channels, src.height, src.width, "dst");
        case LayerOp::linear:
            if (job.weight == nullptr) return "weight: missing";
            if (!is_vector(src)) return "src: a linear layer is of a vector";
            return check_size(dst, dst.channels, 1, 1, "dst");
        case LayerOp::argmax:
            return is_vector(src) ? "" : "src: the largest is one of a vector's";
        case LayerOp::softmax:
            if (!is_vector(src)) return "src: a softmax is of a vector";
            return check_size(dst, src.channels, 1, 1, "dst");
        case LayerOp::gather:
            if (!is_vector(src)) return "src: what is gathered is one of a vector's";
            return check_size(dst, 1, 1, 1, "dst");
        case LayerOp::copy:
            if (job.stride_h < 1 || job.stride_w < 1 || job.stride_h > kMaxSize || job.stride_w > kMaxSize ||
                (dst.height - 1) * job.stride_h >= src.height || (dst.width - 1) * job.stride_w >= src.width)
                return "stride: there are not so many rows or columns";
            if (job.at_channel < 0 || job.at_channel > dst.channels - src.channels)
                return "at_channel: outside the result's channels";
            return {};
        case LayerOp::add:
        case LayerOp::scale_rows: {
            if (job.stride_h != 1 || job.stride_w != 1 || job.at_channel != 0) return "stride: of copies and pools only";
            if (other.none()) return "other: missing";
            const bool adds = job.op == LayerOp::add;
            const std::string error = adds ? check_size(other, src.channels, src.height, src.width, "other")
                                           : check_size(other, 1, 1, 1, "other");
            return error.empty() ? check_size(dst, src.channels, src.height, src.width, "dst") : error;
        }
        case LayerOp::max_pool:
        case LayerOp::average_pool:
            for (const int64_t size :
                 {job.kernel_h, job.kernel_w, job.stride_h, job.stride_w, job.pad_h + 1, job.pad_w + 1}) {
                if (size < 1 || size > kMaxSize) return "kernel: sizes and strides must be 1 .. 2^31, padding from 0 on";
            }
            if (job.pad_h >= job.kernel_h || job.pad_w >= job.kernel_w) return "padding: must be less than the kernel";
            if ((dst.height - 1) * job.stride_h - job.pad_h >= src.height ||
                (dst.width - 1) * job.stride_w - job.pad_w >= src.width)
                return "dst: there are not so many windows";
            return check_size(dst, src.channels, dst.height, dst.width, "dst");
        case LayerOp::flatten:
            return check_size(dst, src.channels * src.height * src.width, 1, 1, "dst");
    }
    return "op: unknown";
}

}  // namespace

bool is_memory(int64_t bytes) { return bytes >= 0 && bytes <= kMaxBytes && bytes % int64_t(sizeof(int64_t)) == 0; }

std::string check(const Late& late, Room room) {
    if (late.first < 0) return {};
    if (late.first == 0 || late.chunk < 1 || late.chunk > kMaxSize || !is_memory(late.sample_bytes))
        return "late: expected steps before it, 1 .. 2^31 samples, and a multiple of 8 bytes";
    for (const Late::Live& live : late.live) {
        for (const int64_t bytes : {room.bytes, late.sample_bytes}) {
            if (live.offset < 0 || live.bytes < 0 || live.offset > bytes || live.bytes > bytes - live.offset)
                return "late: what is copied lies outside the memory";
        }
    }
    return {};
}

std::string check(const Place& p, Room room, const char* name) {
    const int64_t size = size_of(room.dtype);
    if (p.offset < 0 || p.offset % size != 0)
        return std::string(name) + ": expected an offset that is a multiple of " + text(size) + ", got " + text(p.offset);
    if (p.height < 1 || p.width < 1 || p.channels < 1 || p.height > kMaxSize || p.width > kMaxSize)
        return std::string(name) + ": sizes must be at least 1, and rows and columns no more than 2^31";
    if (p.channel < 0 || p.channels > p.pixel_stride || p.channel > p.pixel_stride - p.channels)
        return std::string(name) + ": more channels than there are between two pixels";
    if (!addressable({p.height, p.width, p.pixel_stride}) || p.offset > room.bytes ||
        bytes_of(p, room) > room.bytes - p.offset)
        return std::string(name) + ": outside the memory of a sample, " + text(room.bytes) + " bytes";
    return {};
}

std::string check_index(int64_t offset, Room room, const char* name) {
    constexpr int64_t kIndex = sizeof(int64_t);
    if (offset >= 0 && offset % kIndex == 0 && offset <= room.bytes - kIndex) return {};
    return std::string(name) + ": an index at " + text(offset) + " of " + text(room.bytes) + " bytes";
}

std::string check(const ProgramPrologue& p, const Place& of, Room room) {
    if (p.scale == nullptr && p.shift == nullptr) return {};
    if (p.channels != of.channels) return "prologue: " + text(p.channels) + " channels for " + text(of.channels);
    if (p.rows < 1 || !addressable({p.rows, p.channels})) return "prologue: expected at least a row";
    return p.expert == kNowhere ? std::string() : check_index(p.expert, room, "prologue");
}

std::string check(const ProgramConv& c, Room room) {
    const Conv2dShape& s = c.shape;
    Call call{};
    call.dtype = room.dtype;
    call.threads = 1;
    call.shape = s;
    call.slices = {{nullptr, c.out_count, c.out_starts.empty() ? nullptr : c.out_starts.data()},
                   {nullptr, c.in_count, c.in_starts.empty() ? nullptr : c.in_starts.data()}};
    std::string error = check_slices(c.out_expert, c.out_count, c.out_starts, room, "out_slices");
    if (error.empty()) error = check_slices(c.in_expert, c.in_count, c.in_starts, room, "in_slices");
    if (error.empty()) error = check(call);
    if (error.empty() && (s.V != 1 || s.k != 1)) error = "shape: expected one sample";
    if (error.empty() && c.packed == nullptr) error = "packed: missing";
    if (error.empty()) error = check(c.src, room, "src");
    if (error.empty()) error = check_size(c.src, s.C, s.H, s.W, "src");
    if (error.empty()) error = check(c.dst, room, "dst");
    if (error.empty()) error = check_size(c.dst, s.K, s.P, s.Q, "dst");
    if (error.empty() && !c.residual.none()) {
        error = check(c.residual, room, "residual");
        if (error.empty()) error = check_size(c.residual, s.K, s.P, s.Q, "residual");
    }
    if (error.empty() && c.gate != kNowhere) error = check({c.gate, 0, 1, 1, 1, 1}, room, "gate");
    if (error.empty()) error = check(c.prologue, c.src, room);
    const Place gate = c.gate == kNowhere ? Place{} : Place{c.gate, 0, 1, 1, 1, 1};
    if (error.empty() && (meet(c.dst, c.src, room) || meet(c.dst, c.residual, room) || meet(c.dst, gate, room) ||
                          meets_index(c.dst, c.prologue.expert, room)))
        error = "dst: overlaps what it is computed from";
    return error;
}

std::string check(const ProgramLayer& l, Room room) {
    const LayerOp op = l.job.op;
    const bool chooses = op == LayerOp::argmax;
    std::string error = check(l.src, room, "src");
    if (error.empty() && !l.other.none()) error = check(l.other, room, "other");
    if (error.empty() && (chooses || op == LayerOp::gather)) error = check_index(l.index, room, "index");
    if (error.empty() && !chooses) error = check(l.dst, room, "dst");
    if (error.empty()) error = check_shapes(l);
    const bool reads_plain =
        op == LayerOp::group_norm || op == LayerOp::linear || chooses || op == LayerOp::softmax || op == LayerOp::gather;
    if (error.empty() && reads_plain && !l.prologue.none()) error = "prologue: of a layer that has none";
    if (error.empty()) error = check(l.prologue, l.src, room);
    const Place written = chooses ? place_of_index(l.index, room) : l.dst;
    if (error.empty() &&
        (meet(written, l.src, room) || meet(written, l.other, room) ||
         (op == LayerOp::gather && meets_index(written, l.index, room)) || meets_index(written, l.prologue.expert, room)))
        error = "dst: overlaps what it is computed from";
    return error;
}

}  // namespace moe::cpu
