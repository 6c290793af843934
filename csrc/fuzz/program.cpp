// SPDX-License-Identifier: Apache-2.0
// Random programs. Nothing of a sample's memory is used twice, and all values are stored: each step is compared with what
// it should make of the very numbers that it read.
#include "cpu/program.h"

#include <algorithm>
#include <cmath>
#include <list>
#include <memory>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "cpu/conv2d.h"
#include "fuzz/cases.h"
#include "fuzz/fuzz.h"

namespace moe::fuzz {

namespace {

using namespace moe::cpu;

// What a step writes: numbers at a place, or with `index` one int64 below `choices`.
struct Value {
    Place place;
    bool index = false;
    int64_t choices = 0;
    std::unique_ptr<Buffer> stored;  // [samples, height, width, channels]
    std::vector<int64_t> stored_index;

    int64_t numel() const { return place.height * place.width * place.channels; }
    bool vector() const { return !index && place.height == 1 && place.width == 1; }
    double get(int64_t v, int64_t y, int64_t x, int64_t c) const {
        return stored->get(((v * place.height + y) * place.width + x) * place.channels + c);
    }
};

struct Load {
    int64_t input;
};

struct Step {
    std::variant<Load, ProgramConv, ProgramLayer> what;
    Value* src = nullptr;
    Value* other = nullptr;  // a layer's; a convolution's residual
    Value* dst = nullptr;
    Value *index = nullptr, *in_index = nullptr;  // out and in experts of a convolution; gather
    Value* gate = nullptr;
    Value* rows = nullptr;  // of the prologue
    ProgramPrologue prologue;
    Buffer *scale = nullptr, *shift = nullptr;  // of the prologue
    Buffer *weight = nullptr, *bias = nullptr;
    Buffer *after_scale = nullptr, *after_shift = nullptr;
    WeightLayout layout{};
};

struct Case {
    DType dtype;
    int64_t samples, chunk, bytes = 0;
    int threads;
    Late late;
    std::list<Value> values;
    std::list<Step> steps;
    std::list<Buffer> constants;
    std::list<std::vector<int64_t>> indices;
    std::vector<External> inputs, outputs;
    bool stores = true;  // its values; a wrong step must be refused without

    // What the case says that it is, for messages.
    std::string text() const {
        return "dtype " + std::to_string(int(dtype)) + " samples " + std::to_string(samples) + " threads " +
               std::to_string(threads) + " chunk " + std::to_string(chunk) + " late " + std::to_string(late.first) +
               " steps " + std::to_string(steps.size());
    }
};

[[noreturn]] void fail(const Case& c, const std::string& what) { throw std::runtime_error(what + ": " + c.text()); }

Buffer& constant(Case& c, int64_t count) { return c.constants.emplace_back(c.dtype, count, true); }

// Places: one behind the other, some with channels of nobody's beside them.
Value& new_value(Case& c, int64_t channels, int64_t height, int64_t width) {
    const int64_t before = one_in(4) ? between(1, 3) : 0, behind = one_in(4) ? between(1, 3) : 0;
    Value& value = c.values.emplace_back();
    value.place = {c.bytes, before, height, width, channels, before + channels + behind};
    c.bytes += (value.place.height * width * value.place.pixel_stride * size_of(c.dtype) + 63) / 64 * 64;
    return value;
}

Value& new_number(Case& c) {  // side by side, as gates are read
    Value& value = c.values.emplace_back();
    value.place = {c.bytes, 0, 1, 1, 1, 1};
    c.bytes += 64;
    return value;
}

Value& new_index(Case& c, int64_t choices) {
    Value& value = c.values.emplace_back();
    value.place.offset = c.bytes;
    value.index = true, value.choices = choices;
    c.bytes += 64;
    return value;
}

Value* any_value(Case& c, bool (*fits)(const Value&)) {
    std::vector<Value*> found;
    for (Value& value : c.values) {
        if (fits(value)) found.push_back(&value);
    }
    return found.empty() ? nullptr : found[size_t(between(0, int64_t(found.size()) - 1))];
}

Value* image(Case& c) {
    return any_value(c, [](const Value& v) { return !v.index; });
}
Value* vector(Case& c) {
    return any_value(c, [](const Value& v) { return v.vector(); });
}

// An index: one that is there or, given to the program, a new one.
Value* index_below(Case& c, int64_t choices) {
    std::vector<Value*> found;
    for (Value& value : c.values) {
        if (value.index && value.choices <= choices) found.push_back(&value);
    }
    if (!found.empty() && one_in(2)) return found[size_t(between(0, int64_t(found.size()) - 1))];
    std::vector<int64_t>& given = c.indices.emplace_back();
    for (int64_t v = 0; v < c.samples; ++v) given.push_back(between(0, choices - 1));
    given.push_back(0);
    Value& value = new_index(c, choices);
    Step& step = c.steps.emplace_back();
    step.what = Load{int64_t(c.inputs.size())};
    step.dst = &value;
    c.inputs.push_back({given.data(), {1, 0, 0, 0}});
    return &value;
}

void load_image(Case& c) {
    const int64_t channels = between(1, 20), height = between(1, 9), width = between(1, 9);
    Value& value = new_value(c, channels, height, width);
    Buffer& given = constant(c, c.samples * channels * height * width);
    Step& step = c.steps.emplace_back();
    step.what = Load{int64_t(c.inputs.size())};
    step.dst = &value;
    if (one_in(2))
        c.inputs.push_back({given.data(), {channels * height * width, 1, width * channels, channels}});
    else
        c.inputs.push_back({given.data(), {channels * height * width, height * width, width, 1}});
}

void add_prologue(Case& c, Step& step) {
    if (!one_in(3)) return;
    ProgramPrologue& p = step.prologue;
    const int64_t channels = step.src->place.channels;
    p.channels = channels, p.rows = between(1, 3), p.relu = one_in(2);
    if (p.rows > 1) step.rows = index_below(c, p.rows), p.expert = step.rows->place.offset;
    if (one_in(2)) step.scale = &constant(c, p.rows * channels), p.scale = step.scale->data();
    if (one_in(2)) step.shift = &constant(c, p.rows * channels), p.shift = step.shift->data();
}

void add_conv(Case& c) {
    Step step;
    step.src = image(c);
    add_prologue(c, step);
    ProgramConv conv;
    conv.src = step.src->place;
    Conv2dShape& s = conv.shape;
    s = {1, 1, conv.src.channels, conv.src.height, conv.src.width, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1};
    const bool same = one_in(2);
    s.R = s.S = one_in(2) ? 3 : between(1, 3);
    s.pad_h = same ? s.R / 2 : between(0, 1), s.pad_w = same ? s.S / 2 : between(0, 1);
    if (same && s.R == 2) s.R = s.S = 3;
    s.stride_h = s.stride_w = same ? 1 : between(1, 2);
    s.K = same && one_in(2) ? s.C : between(1, 24);
    s.P = (s.H + 2 * s.pad_h - s.R) / s.stride_h + 1, s.Q = (s.W + 2 * s.pad_w - s.S) / s.stride_w + 1;
    if (s.H + 2 * s.pad_h < s.R || s.W + 2 * s.pad_w < s.S) return;
    Side out{}, in{};
    std::vector<int64_t> unused;
    make_side(out, unused, conv.out_starts, step.layout.total_out, s.K, 0, one_in(3));
    make_side(in, unused, conv.in_starts, step.layout.total_in, s.C, 0, !one_in(4));
    conv.out_count = out.count, conv.in_count = in.count;
    if (out.count > 0) step.index = index_below(c, out.count), conv.out_expert = step.index->place.offset;
    if (in.count > 0) step.in_index = index_below(c, in.count), conv.in_expert = step.in_index->place.offset;
    WeightLayout& w = step.layout;
    const int64_t strides[] = {w.total_in * s.R * s.S, s.R * s.S, s.S, 1};
    std::copy(strides, strides + 4, w.strides);
    step.weight = &constant(c, w.total_out * w.total_in * s.R * s.S);
    Call call{};
    call.dtype = c.dtype, call.threads = 1, call.shape = s, call.weight = w;
    call.slices = {{nullptr, out.count, conv.out_starts.empty() ? nullptr : conv.out_starts.data()},
                   {nullptr, in.count, conv.in_starts.empty() ? nullptr : conv.in_starts.data()}};
    Buffer& packed = constant(c, pack_numel(Direction::forward, call));
    const std::string error = pack(Direction::forward, call, step.weight->data(), packed.data());
    if (!error.empty()) fail(c, error);
    conv.packed = packed.data();
    if (one_in(2)) step.bias = &constant(c, w.total_out), conv.epilogue.bias = step.bias->data();
    if (one_in(3)) {
        conv.epilogue.affine_per_slice = one_in(2);
        const int64_t count = conv.epilogue.affine_per_slice ? w.total_out : s.K;
        step.after_scale = &constant(c, count), conv.epilogue.scale = step.after_scale->data();
        step.after_shift = &constant(c, count), conv.epilogue.shift = step.after_shift->data();
    }
    conv.epilogue.relu = one_in(3);
    step.gate = any_value(c, [](const Value& v) { return v.vector() && v.place.pixel_stride == 1; });
    if (step.gate != nullptr) conv.gate = step.gate->place.offset;
    Value& dst = new_value(c, s.K, s.P, s.Q);
    step.dst = &dst, conv.dst = dst.place;
    for (Value& value : c.values) {
        const Place& p = value.place;
        if (&value != &dst && !value.index && p.channels == s.K && p.height == s.P && p.width == s.Q && one_in(2))
            step.other = &value, conv.residual = p;
    }
    conv.prologue = step.prologue;
    step.what = std::move(conv);
    c.steps.push_back(std::move(step));
}

void add_layer(Case& c) {
    const LayerOp op = LayerOp(between(0, int64_t(LayerOp::flatten)));
    Step step;
    ProgramLayer l{};
    l.job.op = op;
    l.job.groups = l.job.kernel_h = l.job.kernel_w = l.job.stride_h = l.job.stride_w = 1;
    const bool of_vector =
        op == LayerOp::linear || op == LayerOp::argmax || op == LayerOp::softmax || op == LayerOp::gather;
    step.src = of_vector ? vector(c) : image(c);
    if (step.src == nullptr) return;
    const Place src = step.src->place;
    if (!of_vector && op != LayerOp::group_norm) add_prologue(c, step);
    switch (op) {
        case LayerOp::mean:
            step.dst = &new_value(c, src.channels, 1, 1);
            break;
        case LayerOp::group_norm:
            l.job.groups = src.channels % 2 == 0 && one_in(2) ? 2 : 1;
            l.job.eps = 1e-3;
            if (one_in(2)) step.weight = &constant(c, src.channels);
            if (one_in(2)) step.bias = &constant(c, src.channels);
            step.dst = &new_value(c, src.channels, src.height, src.width);
            break;
        case LayerOp::linear: {
            const int64_t outputs = between(1, 9);
            step.weight = &constant(c, outputs * src.channels);
            if (one_in(2)) step.bias = &constant(c, outputs);
            step.dst = &new_value(c, outputs, 1, 1);
            break;
        }
        case LayerOp::argmax:
            step.dst = &new_index(c, src.channels);
            l.index = step.dst->place.offset;
            break;
        case LayerOp::softmax:
            step.dst = &new_value(c, src.channels, 1, 1);
            break;
        case LayerOp::gather:
            step.index = index_below(c, src.channels);
            l.index = step.index->place.offset;
            step.dst = &new_number(c);
            break;
        case LayerOp::copy: {
            l.job.stride_h = between(1, 2), l.job.stride_w = between(1, 2), l.job.at_channel = between(0, 3);
            step.dst = &new_value(c, l.job.at_channel + src.channels + between(0, 3),
                                  (src.height - 1) / l.job.stride_h + 1, (src.width - 1) / l.job.stride_w + 1);
            break;
        }
        case LayerOp::add:
            for (Value& value : c.values) {
                const Place& p = value.place;
                if (!value.index && p.channels == src.channels && p.height == src.height && p.width == src.width &&
                    (step.other == nullptr || one_in(2)))
                    step.other = &value;
            }
            step.dst = &new_value(c, src.channels, src.height, src.width);
            break;
        case LayerOp::scale_rows:
            step.other = any_value(c, [](const Value& v) { return v.vector() && v.place.channels == 1; });
            if (step.other == nullptr) return;
            step.dst = &new_value(c, src.channels, src.height, src.width);
            break;
        case LayerOp::max_pool:
        case LayerOp::average_pool: {
            LayerJob& j = l.job;
            j.kernel_h = between(1, 3), j.kernel_w = between(1, 3), j.stride_h = between(1, 3),
            j.stride_w = between(1, 3);
            j.pad_h = between(0, j.kernel_h / 2), j.pad_w = between(0, j.kernel_w / 2), j.count_padding = one_in(2);
            if (src.height + 2 * j.pad_h < j.kernel_h || src.width + 2 * j.pad_w < j.kernel_w) return;
            step.dst = &new_value(c, src.channels, (src.height + 2 * j.pad_h - j.kernel_h) / j.stride_h + 1,
                                  (src.width + 2 * j.pad_w - j.kernel_w) / j.stride_w + 1);
            break;
        }
        case LayerOp::flatten:
            step.dst = &new_value(c, src.channels * src.height * src.width, 1, 1);
            break;
    }
    l.src = src;
    if (!step.dst->index) l.dst = step.dst->place;
    if (step.other != nullptr) l.other = step.other->place;
    if (step.weight != nullptr) l.job.weight = step.weight->data();
    if (step.bias != nullptr) l.job.bias = step.bias->data();
    l.prologue = step.prologue;
    step.what = l;
    c.steps.push_back(std::move(step));
}

void make(Case& c) {
    c.dtype = one_in(2) ? DType::float32 : DType::float64;
    c.samples = one_in(8) ? 0 : between(1, 14);
    c.threads = int(between(1, 3));
    c.chunk = between(1, 6);
    load_image(c);
    if (one_in(3)) load_image(c);
    for (int64_t count = between(1, 8); count > 0; --count) one_in(3) ? add_conv(c) : add_layer(c);
    if (one_in(2) && c.steps.size() > 1) {
        c.late.first = between(1, int64_t(c.steps.size()) - 1);
        c.late.chunk = between(1, 12);
        c.late.sample_bytes = c.bytes + 64 * between(0, 2);
    }
    for (Value& value : c.values) {
        if (value.index) {
            value.stored_index.assign(size_t(c.samples + 1), -1);
            c.outputs.push_back({value.stored_index.data(), {1, 0, 0, 0}});
        } else {
            const Place& p = value.place;
            value.stored = std::make_unique<Buffer>(c.dtype, c.samples * value.numel(), false);
            c.outputs.push_back({value.stored->data(), {value.numel(), 1, p.width * p.channels, p.channels}});
        }
    }
    int64_t number = 0;
    for (const Step& step : c.steps) {  // what the late steps may read of the early ones
        if (number++ >= c.late.first) break;
        const Place& p = step.dst->place;
        c.late.live.push_back({p.offset, step.dst->index ? 8 : p.height * p.width * p.pixel_stride * size_of(c.dtype)});
    }
}

std::unique_ptr<Program> record(const Case& c) {
    auto program = std::make_unique<Program>(c.dtype, c.bytes, c.chunk, c.late);
    for (const Step& step : c.steps) {
        if (const auto* load = std::get_if<Load>(&step.what)) {
            if (step.dst->index)
                program->load_index(load->input, step.dst->place.offset);
            else
                program->load(load->input, step.dst->place);
        } else if (const auto* conv = std::get_if<ProgramConv>(&step.what)) {
            program->conv(*conv);
        } else {
            program->layer(std::get<ProgramLayer>(step.what));
        }
    }
    int64_t output = 0;
    for (const Value& value : c.values) {
        if (!c.stores) break;
        if (value.index)
            program->store_index(output++, value.place.offset);
        else
            program->store(output++, value.place, {});
    }
    return program;
}

// --- what a step should have made -------------------------------------------------------------------------------------

struct Pixel {
    int64_t v, y, x;
};

// What a step reads, behind its prologue.
double read(const Step& step, Pixel at, int64_t c) {
    const ProgramPrologue& p = step.prologue;
    double value = step.src->get(at.v, at.y, at.x, c);
    const int64_t row = (step.rows != nullptr ? step.rows->stored_index[size_t(at.v)] * p.channels : 0) + c;
    if (step.scale != nullptr) value *= step.scale->get(row);
    if (step.shift != nullptr) value += step.shift->get(row);
    return p.relu && value < 0 ? 0 : value;
}

Sum expected_conv(const Step& step, const ProgramConv& conv, Pixel at, int64_t o) {
    const Conv2dShape& s = conv.shape;
    const auto start = [&](const Value* index, const std::vector<int64_t>& starts, int64_t width) {
        if (index == nullptr) return int64_t(0);
        const int64_t i = index->stored_index[size_t(at.v)];
        return starts.empty() ? i * width : starts[size_t(i)];
    };
    const int64_t out = start(step.index, conv.out_starts, s.K), in = start(step.in_index, conv.in_starts, s.C);
    const int64_t* strides = step.layout.strides;
    Sum sum;
    for (int64_t r = 0; r < s.R; ++r) {
        for (int64_t t = 0; t < s.S; ++t) {
            const int64_t y = at.y * s.stride_h - s.pad_h + r, x = at.x * s.stride_w - s.pad_w + t;
            if (y < 0 || x < 0 || y >= s.H || x >= s.W) continue;
            for (int64_t i = 0; i < s.C; ++i) {
                sum.add(read(step, {at.v, y, x}, i) *
                        step.weight->get((out + o) * strides[0] + (in + i) * strides[1] + r * strides[2] + t));
            }
        }
    }
    if (step.bias != nullptr) sum.add(step.bias->get(out + o));
    if (step.gate != nullptr) {
        const double gate = step.gate->get(at.v, 0, 0, 0);
        sum.value *= gate, sum.magnitude *= 1 + std::fabs(gate);
    }
    if (step.after_scale != nullptr) {
        const int64_t row = conv.epilogue.affine_per_slice ? out + o : o;
        const double scale = step.after_scale->get(row);
        sum.value *= scale, sum.magnitude *= 1 + std::fabs(scale);
        sum.add(step.after_shift->get(row));
    }
    if (step.other != nullptr) sum.add(step.other->get(at.v, at.y, at.x, o));
    if (conv.epilogue.relu && sum.value < 0) sum.value = 0;
    return sum;
}

Sum exactly(double value) {
    Sum sum;
    sum.add(value);
    return sum;
}

Sum expected_norm(const Step& step, const LayerJob& job, Pixel at, int64_t c) {
    const Place& src = step.src->place;
    const int64_t each = src.channels / job.groups, first = c / each * each;
    Sum sum, squares;
    const double count = double(each * src.height * src.width);
    const auto for_all = [&](const auto& f) {
        for (int64_t y = 0; y < src.height; ++y) {
            for (int64_t x = 0; x < src.width; ++x) {
                for (int64_t i = first; i < first + each; ++i) f(step.src->get(at.v, y, x, i));
            }
        }
    };
    for_all([&](double value) { sum.add(value / count); });
    for_all([&](double value) { squares.add((value - sum.value) * (value - sum.value) / count); });
    const double scale = 1 / std::sqrt(squares.value + job.eps);
    Sum result;
    result.value = (step.src->get(at.v, at.y, at.x, c) - sum.value) * scale;
    result.magnitude = (std::fabs(step.src->get(at.v, at.y, at.x, c)) + sum.magnitude) * scale;
    if (step.weight != nullptr) result.value *= step.weight->get(c);
    if (step.bias != nullptr) result.add(step.bias->get(c));
    return result;
}

Sum expected_pool(const Step& step, const LayerJob& job, Pixel at, int64_t c) {
    const Place& src = step.src->place;
    const bool takes_max = job.op == LayerOp::max_pool;
    Sum sum;
    double most = -INFINITY, seen = 0;
    for (int64_t i = 0; i < job.kernel_h; ++i) {
        for (int64_t j = 0; j < job.kernel_w; ++j) {
            const int64_t y = at.y * job.stride_h - job.pad_h + i, x = at.x * job.stride_w - job.pad_w + j;
            if (y < 0 || x < 0 || y >= src.height || x >= src.width) continue;
            const double value = read(step, {at.v, y, x}, c);
            sum.add(value), most = std::fmax(most, value), ++seen;
        }
    }
    if (takes_max) return exactly(most);
    sum.value /= job.count_padding ? double(job.kernel_h * job.kernel_w) : seen;
    return sum;
}

Sum expected_layer(const Step& step, const ProgramLayer& layer, Pixel at, int64_t c) {
    const Place& src = step.src->place;
    const LayerJob& job = layer.job;
    Sum sum;
    switch (job.op) {
        case LayerOp::mean:
            for (int64_t y = 0; y < src.height; ++y) {
                for (int64_t x = 0; x < src.width; ++x)
                    sum.add(read(step, {at.v, y, x}, c) / double(src.height * src.width));
            }
            return sum;
        case LayerOp::group_norm:
            return expected_norm(step, job, at, c);
        case LayerOp::linear:
            for (int64_t i = 0; i < src.channels; ++i)
                sum.add(step.weight->get(c * src.channels + i) * step.src->get(at.v, 0, 0, i));
            if (step.bias != nullptr) sum.add(step.bias->get(c));
            return sum;
        case LayerOp::softmax: {
            double most = -INFINITY, total = 0;
            for (int64_t i = 0; i < src.channels; ++i) most = std::fmax(most, step.src->get(at.v, 0, 0, i));
            for (int64_t i = 0; i < src.channels; ++i) total += std::exp(step.src->get(at.v, 0, 0, i) - most);
            return exactly(std::exp(step.src->get(at.v, 0, 0, c) - most) / total);
        }
        case LayerOp::gather:
            return exactly(step.src->get(at.v, 0, 0, step.index->stored_index[size_t(at.v)]));
        case LayerOp::copy: {
            const int64_t from = c - job.at_channel;
            if (from < 0 || from >= src.channels) return exactly(0);
            return exactly(read(step, {at.v, at.y * job.stride_h, at.x * job.stride_w}, from));
        }
        case LayerOp::add:
            sum.add(read(step, at, c)), sum.add(step.other->get(at.v, at.y, at.x, c));
            return sum;
        case LayerOp::scale_rows:
            return exactly(read(step, at, c) * step.other->get(at.v, 0, 0, 0));
        case LayerOp::max_pool:
        case LayerOp::average_pool:
            return expected_pool(step, job, at, c);
        default: {  // flatten
            const int64_t pixels = src.height * src.width, pixel = c % pixels;
            return exactly(read(step, {at.v, pixel / src.width, pixel % src.width}, c / pixels));
        }
    }
}

void expect_index(const Case& c, const Step& step, const Load* load, int64_t v) {
    int64_t expected = 0;
    if (load != nullptr) {
        expected = static_cast<int64_t*>(c.inputs[size_t(load->input)].data)[v];
    } else {
        for (int64_t i = 0; i < step.src->place.channels; ++i) {
            if (step.src->get(v, 0, 0, i) > step.src->get(v, 0, 0, expected)) expected = i;
        }
    }
    if (step.dst->stored_index[size_t(v)] != expected) fail(c, "another index");
}

void expect_step(const Case& c, const Step& step, int64_t number) {
    const auto* load = std::get_if<Load>(&step.what);
    const auto* conv = std::get_if<ProgramConv>(&step.what);
    const auto* layer = std::get_if<ProgramLayer>(&step.what);
    const Place& p = step.dst->place;
    for (int64_t v = 0; v < c.samples; ++v) {
        if (step.dst->index) {
            expect_index(c, step, load, v);
            continue;
        }
        for (int64_t i = 0; i < p.height * p.width * p.channels; ++i) {
            const int64_t channel = i % p.channels, x = i / p.channels % p.width, y = i / p.channels / p.width;
            if (conv != nullptr && !one_in(6)) continue;  // the dearest to compare
            Sum expected;
            if (load != nullptr) {
                const External& given = c.inputs[size_t(load->input)];
                const int64_t* strides = given.strides;
                const int64_t at = v * strides[0] + channel * strides[1] + y * strides[2] + x * strides[3];
                expected = exactly(c.dtype == DType::float64 ? static_cast<double*>(given.data)[at]
                                                             : double(static_cast<float*>(given.data)[at]));
            } else if (conv != nullptr) {
                expected = expected_conv(step, *conv, {v, y, x}, channel);
            } else {
                expected = expected_layer(step, *layer, {v, y, x}, channel);
            }
            const double got = step.dst->get(v, y, x, channel);
            if (!close(c.dtype, got, expected, 2))
                fail(c, "step " + std::to_string(number) +
                            (layer != nullptr ? ", layer " + std::to_string(int(layer->job.op)) : ", conv or load") +
                            " gave " + std::to_string(got) + ", expected " + std::to_string(expected.value));
        }
    }
}

void run(const Case& c) {
    const std::unique_ptr<Program> program = record(c);
    const std::string error = program->run(c.samples, c.inputs, c.outputs, c.threads);
    if (!error.empty()) fail(c, error);
    int64_t number = 0;
    for (const Step& step : c.steps) expect_step(c, step, number++);
}

// --- wrong programs ---------------------------------------------------------------------------------------------------

// A place that is none of the program's, whatever else it is.
void spoil_place(const Case& c, Place& p) {
    switch (between(0, 7)) {
        case 0:
            p.offset = one_in(2) ? -8 : c.bytes;
            return;
        case 1:
            p.offset += between(1, 3);
            return;
        case 2:
            p.offset = int64_t(1) << between(40, 62);
            return;
        case 3:
            p.channel = one_in(2) ? -1 : p.pixel_stride;
            return;
        case 4:
            p.channels = one_in(2) ? 0 : p.pixel_stride + 1;
            return;
        case 5:
            (one_in(2) ? p.height : p.width) = one_in(2) ? 0 : int64_t(1) << between(30, 62);
            return;
        case 6:
            p.pixel_stride = one_in(2) ? 0 : int64_t(1) << between(40, 62);
            return;
        default:
            p.channels = -between(1, 3);
            return;
    }
}

// The result where the samples' rows of its prologue are read.
bool write_over_index(Place& dst, const ProgramPrologue& p) {
    if (p.expert == kNowhere || (p.scale == nullptr && p.shift == nullptr)) return false;
    dst.offset = p.expert;
    return true;
}

bool spoil_conv(const Case& c, ProgramConv& conv) {
    Conv2dShape& s = conv.shape;
    int64_t* const sizes[] = {&s.V, &s.C, &s.K, &s.P, &s.Q, &s.H, &s.W};
    switch (between(0, 7)) {
        case 0:
            spoil_place(c, one_in(2) ? conv.src : conv.dst);
            return true;
        case 6:
            return write_over_index(conv.dst, conv.prologue);
        case 1:
            *sizes[between(0, 6)] += one_in(2) ? 1 : int64_t(1) << between(20, 61);
            return true;
        case 2:
            conv.packed = nullptr;
            return true;
        case 3:
            conv.dst = conv.src;
            return true;
        case 4:
            conv.out_count = conv.out_count == 0 ? 1 : -1;
            return true;
        case 5:
            conv.gate = one_in(3) ? c.bytes : one_in(2) ? -8 : conv.dst.offset;
            return true;
        default:
            if (conv.out_starts.empty()) return false;
            conv.out_starts[0] = one_in(2) ? -1 : int64_t(1) << 62;
            return true;
    }
}

bool spoil_layer(const Case& c, ProgramLayer& l) {
    LayerJob& j = l.job;
    const bool pool = j.op == LayerOp::max_pool || j.op == LayerOp::average_pool;
    switch (between(0, 5)) {
        case 0:
            spoil_place(c, j.op == LayerOp::argmax || one_in(2) ? l.src : l.dst);
            return true;
        case 1:
            if (j.op == LayerOp::argmax)
                l.index = l.src.offset;
            else
                l.dst = l.src;
            return true;
        case 2:
            if (j.op != LayerOp::argmax && j.op != LayerOp::gather) {
                return write_over_index(l.dst, l.prologue);
            }
            if (j.op == LayerOp::gather && one_in(2))
                l.dst.offset = l.index;
            else
                l.index = one_in(2) ? c.bytes : 4;
            return true;
        case 3:
            if (!pool && j.op != LayerOp::copy) return false;
            (one_in(2) ? j.stride_h : j.stride_w) = one_in(2) ? 0 : int64_t(1) << 62;
            return true;
        case 4:
            if (!pool) return false;
            (one_in(2) ? j.pad_h : j.kernel_h) = one_in(2) ? -1 : int64_t(1) << 61;
            return true;
        default:
            if (j.op == LayerOp::linear) j.weight = nullptr;
            if (j.op == LayerOp::group_norm) j.groups = one_in(2) ? 0 : l.src.channels + 1;
            if (j.op == LayerOp::copy) j.at_channel = one_in(2) ? -1 : l.dst.channels;
            if (j.op == LayerOp::add || j.op == LayerOp::scale_rows) l.other = {};
            return j.op == LayerOp::linear || j.op == LayerOp::group_norm || j.op == LayerOp::copy ||
                   j.op == LayerOp::add || j.op == LayerOp::scale_rows;
    }
}

// An index that some step looks at.
bool spoil_index(Case& c) {
    for (const Step& step : c.steps) {
        const ProgramPrologue& p = step.prologue;
        const bool reads_rows = step.rows != nullptr && (p.scale != nullptr || p.shift != nullptr);
        for (const Value* used : {step.index, step.in_index, reads_rows ? step.rows : nullptr}) {
            for (const Step& other : c.steps) {
                const auto* load = std::get_if<Load>(&other.what);
                if (used == nullptr || other.dst != used || load == nullptr || c.samples == 0) continue;
                int64_t* indices = static_cast<int64_t*>(c.inputs[size_t(load->input)].data);
                indices[between(0, c.samples - 1)] = one_in(2) ? -between(1, 3) : int64_t(1) << between(20, 62);
                return true;
            }
        }
    }
    return false;
}

// One argument wrong. False where it happens to be right.
bool spoil(Case& c) {
    Step& step = *std::next(c.steps.begin(), between(0, int64_t(c.steps.size()) - 1));
    switch (between(0, 9)) {
        case 0:
            c.threads = one_in(2) ? int(-between(0, 2)) : kMaxThreads + int(between(1, 1 << 20));
            return true;
        case 1:
            c.samples = one_in(2) ? -between(1, 3) : int64_t(1) << between(56, 62);
            return true;
        case 2:
            if (c.samples == 0) return false;
            if (one_in(3)) {
                const bool input = one_in(2);
                c.outputs.back().data = input ? c.inputs[0].data : c.outputs[0].data;
                return input || c.outputs.size() > 1;
            }
            if (one_in(2))
                (one_in(2) ? c.inputs : c.outputs).pop_back();
            else
                c.inputs[0].strides[0] = one_in(2) ? -1 : int64_t(1) << between(60, 62);
            return c.samples > 1 || c.inputs.empty() || c.inputs[0].strides[0] < 0;
        case 3:
            return spoil_index(c);
        case 4:
        case 5:
            if (one_in(3)) {
                c.chunk = one_in(2) ? -between(0, 2) : int64_t(1) << between(32, 62);
                return true;
            }
            if (one_in(3)) {
                c.bytes += between(1, 7);
                return true;
            }
            if (c.late.first < 0) return false;
            switch (between(0, 3)) {
                case 0:
                    c.late.chunk = one_in(2) ? -between(0, 2) : int64_t(1) << between(32, 62);
                    return true;
                case 1:
                    c.late.sample_bytes = one_in(2) ? -8 : c.late.sample_bytes + between(1, 7);
                    return true;
                case 2:  // too few for the last step, which is a late one
                    c.late.sample_bytes = c.steps.back().dst->place.offset;
                    c.stores = false;
                    return true;
                default:
                    c.late.first = 3 * int64_t(c.steps.size() + c.values.size());
                    return true;
            }
        default:
            c.stores = one_in(2);
            if (auto* conv = std::get_if<ProgramConv>(&step.what)) return spoil_conv(c, *conv);
            if (auto* layer = std::get_if<ProgramLayer>(&step.what)) return spoil_layer(c, *layer);
            if (step.dst->index) return false;
            spoil_place(c, step.dst->place);
            return true;
    }
}

void run_wrong(Case& c) {
    if (!spoil(c)) return;
    try {
        if (!record(c)->run(c.samples, c.inputs, c.outputs, c.threads).empty()) return;
    } catch (const std::invalid_argument&) {
        return;
    }
    fail(c, "a wrong program was taken");
}

}  // namespace

std::string program(uint64_t seed, int64_t first, int64_t cases) {
    int64_t wrong = 0, steps = 0;
    for_cases(seed, first, cases, [&] {
        Case c;
        make(c);
        steps += int64_t(c.steps.size());
        const bool spoiled = one_in(5);
        wrong += spoiled;
        spoiled ? run_wrong(c) : run(c);
    });
    return std::to_string(cases) + " cases, " + std::to_string(wrong) + " with a wrong argument, " +
           std::to_string(steps) + " steps";
}

}  // namespace moe::fuzz
