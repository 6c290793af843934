// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d.h"

#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fuzz/cases.h"
#include "fuzz/fuzz.h"

namespace moe::fuzz {

namespace {

using namespace moe::cpu;

int64_t numel(const Call& call) {
    const WeightLayout& w = call.weight;
    return 1 + (w.total_out - 1) * w.strides[0] + (w.total_in - 1) * w.strides[1] + (call.shape.R - 1) * w.strides[2] +
           (call.shape.S - 1) * w.strides[3];
}

struct Case {
    Call call{};
    int64_t weight_numel;  // elements of the weight's memory
    std::vector<int64_t> out_expert, in_expert, out_starts, in_starts;

    int64_t out_start(int64_t v) const { return start(call.slices.out, out_starts, v, call.shape.K); }
    int64_t in_start(int64_t v) const { return start(call.slices.in, in_starts, v, call.shape.C); }

  private:
    static int64_t start(const Side& side, const std::vector<int64_t>& starts, int64_t v, int64_t width) {
        if (side.expert == nullptr) return 0;
        return starts.empty() ? side.expert[v] * width : starts[size_t(side.expert[v])];
    }
};

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dil) {
    const int64_t room = size + 2 * pad - dil * (kernel - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
}

WeightLayout dense(const Case& c, bool channels_last) {
    const int64_t out = c.call.weight.total_out, in = c.call.weight.total_in, R = c.call.shape.R, S = c.call.shape.S;
    if (channels_last) return {out, in, {R * S * in, 1, S * in, in}};
    return {out, in, {in * R * S, R * S, S, 1}};
}

// Dense, channels_last, with gaps, turned over, or the same number for all input channels.
void make_layout(Case& c) {
    WeightLayout& w = c.call.weight;
    const int64_t kind = between(0, 7);
    w = dense(c, kind % 2 != 0);
    if (kind == 2 || kind == 3) w.strides[0] += between(1, 3);
    if (kind == 4) std::swap(w.strides[2], w.strides[3]);
    if (kind == 5)
        w = {w.total_out, w.total_in, {1, w.total_out, 7 * w.total_out * w.total_in, w.total_out * w.total_in}};
    if (kind == 6) w.strides[1] = 0;
    c.weight_numel = numel(c.call);
}

void make(Case& c) {
    Conv2dShape& s = c.call.shape;
    const DType dtypes[] = {DType::float32, DType::float32, DType::float64, DType::bfloat16, DType::float16};
    c.call.dtype = dtypes[between(0, 4)];
    c.call.threads = int(between(1, 3));
    s.k = one_in(4) ? between(2, 3) : 1;
    s.V = between(0, 6) * s.k;
    s.groups = one_in(6) ? between(2, 4) : 1;
    const bool blocks = one_in(2);  // channels as networks have them
    s.C = s.groups * (blocks ? 16 * between(1, 4) : between(1, 40));
    s.K = s.groups * (blocks ? 8 * between(1, 8) : between(1, 40));
    s.R = s.S = one_in(2) ? 3 : between(1, 4);
    if (one_in(4)) s.S = between(1, 5);
    s.stride_h = s.stride_w = one_in(2) ? 1 : between(1, 3);
    if (one_in(6)) s.stride_w = between(1, 3);
    s.dil_h = one_in(5) ? 2 : 1, s.dil_w = one_in(5) ? 2 : 1;
    s.pad_h = between(0, 2), s.pad_w = between(0, 2);
    s.H = between(1, 14), s.W = between(1, 14);
    s.P = output_size(s.H, s.R, s.stride_h, s.pad_h, s.dil_h);
    s.Q = output_size(s.W, s.S, s.stride_w, s.pad_w, s.dil_w);
    make_side(c.call.slices.out, c.out_expert, c.out_starts, c.call.weight.total_out, s.K, s.V,
              s.groups > 1 || one_in(4));
    make_side(c.call.slices.in, c.in_expert, c.in_starts, c.call.weight.total_in, s.C / s.groups, s.V,
              s.groups > 1 || !one_in(4));
    make_layout(c);
}

[[noreturn]] void fail(const Case& c, const std::string& what) {
    const Conv2dShape& s = c.call.shape;
    const WeightLayout& w = c.call.weight;
    std::string sizes;
    for (const auto& [name, value] : std::vector<std::pair<const char*, int64_t>>{{"dtype", int64_t(c.call.dtype)},
                                                                                  {"threads", c.call.threads},
                                                                                  {"V", s.V},
                                                                                  {"k", s.k},
                                                                                  {"C", s.C},
                                                                                  {"H", s.H},
                                                                                  {"W", s.W},
                                                                                  {"K", s.K},
                                                                                  {"P", s.P},
                                                                                  {"Q", s.Q},
                                                                                  {"R", s.R},
                                                                                  {"S", s.S},
                                                                                  {"stride_h", s.stride_h},
                                                                                  {"stride_w", s.stride_w},
                                                                                  {"pad_h", s.pad_h},
                                                                                  {"pad_w", s.pad_w},
                                                                                  {"dil_h", s.dil_h},
                                                                                  {"dil_w", s.dil_w},
                                                                                  {"groups", s.groups},
                                                                                  {"out slices", c.call.slices.out.count},
                                                                                  {"in slices", c.call.slices.in.count},
                                                                                  {"total_out", w.total_out},
                                                                                  {"total_in", w.total_in},
                                                                                  {"strides", w.strides[0]},
                                                                                  {"", w.strides[1]},
                                                                                  {"", w.strides[2]},
                                                                                  {"", w.strides[3]}})
        sizes += std::string(" ") + name + " " + std::to_string(value);
    throw std::runtime_error(what + ":" + sizes);
}

void require_close(const Case& c, const char* what, double got, const Sum& expected, int roundings) {
    if (!close(c.call.dtype, got, expected, roundings))
        fail(c, std::string(what) + " " + std::to_string(got) + ", expected " + std::to_string(expected.value));
}

void require_none(const Case& c, const std::string& error) {
    if (!error.empty()) fail(c, error);
}

// Calls f(r, s) for each tap of the kernel.
template <class F>
void taps(const Conv2dShape& s, const F& f) {
    for (int64_t r = 0; r < s.R; ++r) {
        for (int64_t t = 0; t < s.S; ++t) f(r, t);
    }
}

void run(Case& c) {
    const Conv2dShape& s = c.call.shape;
    const DType dtype = c.call.dtype;
    const int64_t cg = s.C / s.groups, kg = s.K / s.groups;
    const WeightLayout layout = c.call.weight;
    Buffer x(dtype, s.V / s.k * s.H * s.W * s.C, true), weight(dtype, c.weight_numel, true);
    Buffer y(dtype, s.V * s.P * s.Q * s.K, false), grad(dtype, s.V * s.P * s.Q * s.K, true);
    Buffer grad_input(dtype, s.V * s.H * s.W * s.C, false),
        grad_weight(dtype, c.call.weight.total_out * c.call.weight.total_in * s.R * s.S, false);
    Buffer bias(accumulator(dtype), c.call.weight.total_out, true), gate(accumulator(dtype), s.V, true);
    Buffer residual(dtype, s.V * s.P * s.Q * s.K, true);
    const bool per_slice = one_in(2);
    Buffer scale(accumulator(dtype), per_slice ? layout.total_out : s.K, true);
    Buffer shift(accumulator(dtype), per_slice ? layout.total_out : s.K, true);
    auto w_at = [&](int64_t v, int64_t o, int64_t i, int64_t r, int64_t t) {
        return (c.out_start(v) + o) * layout.strides[0] + (c.in_start(v) + i) * layout.strides[1] +
               r * layout.strides[2] + t * layout.strides[3];
    };
    auto x_at = [&](int64_t v, int64_t h, int64_t w, int64_t i) { return ((v / s.k * s.H + h) * s.W + w) * s.C + i; };
    auto y_at = [&](int64_t v, int64_t p, int64_t q, int64_t o) { return ((v * s.P + p) * s.Q + q) * s.K + o; };

    Epilogue epilogue;
    if (one_in(2)) epilogue.bias = bias.data();
    if (one_in(2)) epilogue.gate = gate.data();
    if (one_in(3)) epilogue.scale = scale.data();
    if (one_in(3)) epilogue.shift = shift.data();
    epilogue.affine_per_slice = per_slice;
    if (one_in(3)) epilogue.residual = residual.data();
    epilogue.relu = one_in(3);
    for (const Direction direction : {Direction::forward, Direction::grad_input}) {
        const bool forward = direction == Direction::forward;
        const int64_t numel = pack_numel(direction, c.call);
        Buffer packed(accumulator(dtype), numel, false);
        const bool packs = one_in(2);
        if (packs) require_none(c, pack(direction, c.call, weight.data(), packed.data()));
        const Packed given{packs ? packed.data() : nullptr, numel};
        require_none(c, forward ? conv2d_forward(c.call, x.data(), weight.data(), given, y.data(), epilogue)
                                : conv2d_grad_input(c.call, grad.data(), weight.data(), given, grad_input.data()));
        if (packs) {
            const Packed wrong{packed.data(), numel + 1};
            const std::string said =
                forward ? conv2d_forward(c.call, x.data(), weight.data(), wrong, y.data(), epilogue)
                        : conv2d_grad_input(c.call, grad.data(), weight.data(), wrong, grad_input.data());
            if (said.empty()) fail(c, "packed weights of another size were taken");
        }
    }
    Call gradient = c.call;
    gradient.weight = dense(c, one_in(2));
    const int64_t* const written = gradient.weight.strides;
    require_none(c, conv2d_grad_weight(gradient, grad.data(), x.data(), grad_weight.data()));
    if (s.V * s.H * s.W > 0 && s.P * s.Q > 0) {
        const Packed none{nullptr, 0};
        const int missing = int(between(0, 2));
        void *a = x.data(), *b = weight.data(), *to = y.data(), *gradients = grad.data(), *dw = grad_weight.data();
        (missing == 0 ? a : missing == 1 ? b : to) = nullptr;
        (missing == 0 ? gradients : dw) = nullptr;
        if (conv2d_forward(c.call, a, b, none, to, {}).empty() ||
            conv2d_grad_weight(gradient, gradients, x.data(), dw).empty() ||
            pack(Direction::forward, c.call, missing == 1 ? nullptr : weight.data(), missing == 1 ? y.data() : nullptr)
                .empty())
            fail(c, "a missing tensor was taken");
        if (conv2d_forward(c.call, x.data(), weight.data(), none, x.data(), {}).empty() ||
            conv2d_grad_input(c.call, grad.data(), weight.data(), none, weight.data()).empty() ||
            conv2d_grad_weight(gradient, grad.data(), x.data(), grad.data()).empty())
            fail(c, "an output over an input was taken");
        Epilogue onto;
        const void** const values[] = {&onto.bias, &onto.gate, &onto.scale, &onto.shift, &onto.residual};
        *values[between(0, 4)] = y.data();
        const Packed over{y.data(), pack_numel(Direction::forward, c.call)};
        if (conv2d_forward(c.call, x.data(), weight.data(), none, y.data(), onto).empty() ||
            conv2d_forward(c.call, x.data(), weight.data(), over, y.data(), {}).empty() ||
            pack(Direction::forward, c.call, weight.data(), weight.data()).empty())
            fail(c, "an output over what is read with it was taken");
        for (const Side& side : {c.call.slices.out, c.call.slices.in}) {
            void* const index = const_cast<int64_t*>(one_in(2) ? side.expert : side.starts);
            if (index != nullptr && (conv2d_forward(c.call, x.data(), weight.data(), none, index, {}).empty() ||
                                     conv2d_grad_weight(gradient, grad.data(), x.data(), index).empty()))
                fail(c, "an output over its call's indices was taken");
        }
    }

    for (int sample = 0; sample < 12 && s.V * s.P * s.Q > 0; ++sample) {
        const int64_t v = between(0, s.V - 1), o = between(0, s.K - 1), p = between(0, s.P - 1), q = between(0, s.Q - 1);
        Sum sum;
        taps(s, [&](int64_t r, int64_t t) {
            const int64_t h = p * s.stride_h - s.pad_h + r * s.dil_h, w = q * s.stride_w - s.pad_w + t * s.dil_w;
            if (h < 0 || h >= s.H || w < 0 || w >= s.W) return;
            for (int64_t i = 0; i < cg; ++i)
                sum.add(x.get(x_at(v, h, w, o / kg * cg + i)) * weight.get(w_at(v, o, i, r, t)));
        });
        if (epilogue.bias != nullptr) sum.add(bias.get(c.out_start(v) + o));
        if (epilogue.gate != nullptr) sum.value *= gate.get(v);
        const int64_t row = per_slice ? c.out_start(v) + o : o;
        if (epilogue.scale != nullptr) sum.value *= scale.get(row);
        if (epilogue.shift != nullptr) sum.add(shift.get(row));
        if (epilogue.residual != nullptr) sum.add(residual.get(y_at(v, p, q, o)));
        if (epilogue.relu && sum.value < 0) sum.value = 0;
        require_close(c, "output", y.get(y_at(v, p, q, o)), sum, 2);
    }
    for (int sample = 0; sample < 12 && s.V > 0; ++sample) {
        const int64_t v = between(0, s.V - 1), i = between(0, s.C - 1), h = between(0, s.H - 1), w = between(0, s.W - 1);
        Sum sum;
        taps(s, [&](int64_t r, int64_t t) {
            const int64_t a = h + s.pad_h - r * s.dil_h, b = w + s.pad_w - t * s.dil_w;
            if (a < 0 || b < 0 || a % s.stride_h != 0 || b % s.stride_w != 0) return;
            const int64_t p = a / s.stride_h, q = b / s.stride_w;
            if (p >= s.P || q >= s.Q) return;
            for (int64_t o = i / cg * kg; o < (i / cg + 1) * kg; ++o)
                sum.add(grad.get(y_at(v, p, q, o)) * weight.get(w_at(v, o, i % cg, r, t)));
        });
        const double got = grad_input.get(((v * s.H + h) * s.W + w) * s.C + i);
        require_close(c, "input gradient", got, sum, 1);
    }
    for (int sample = 0; sample < 6; ++sample) {
        const int64_t o = between(0, c.call.weight.total_out - 1), i = between(0, c.call.weight.total_in - 1);
        const int64_t r = between(0, s.R - 1), t = between(0, s.S - 1);
        Sum sum;
        for (int64_t v = 0; v < s.V; ++v) {
            const int64_t mine = o - c.out_start(v), inner = i - c.in_start(v);
            if (mine < 0 || mine >= s.K || inner < 0 || inner >= cg) continue;
            for (int64_t p = 0; p < s.P; ++p) {
                for (int64_t q = 0; q < s.Q; ++q) {
                    const int64_t h = p * s.stride_h - s.pad_h + r * s.dil_h, w = q * s.stride_w - s.pad_w + t * s.dil_w;
                    if (h < 0 || h >= s.H || w < 0 || w >= s.W) continue;
                    sum.add(grad.get(y_at(v, p, q, mine)) * x.get(x_at(v, h, w, mine / kg * cg + inner)));
                }
            }
        }
        const int64_t at = o * written[0] + i * written[1] + r * written[2] + t * written[3];
        require_close(c, "weight gradient", grad_weight.get(at), sum, 1);
    }
}

// One argument wrong: an answer that says so, before any memory is touched. False where it happens to be right.
bool spoil(Case& c) {
    Conv2dShape& s = c.call.shape;
    WeightLayout& w = c.call.weight;
    const bool of_output = one_in(2);
    Side& side = of_output ? c.call.slices.out : c.call.slices.in;
    std::vector<int64_t>& starts = of_output ? c.out_starts : c.in_starts;
    std::vector<int64_t>& expert = of_output ? c.out_expert : c.in_expert;
    const int64_t total = of_output ? w.total_out : w.total_in, width = of_output ? s.K : s.C;
    int64_t* const sizes[] = {&s.C,     &s.K,     &s.R,      &s.S, &s.stride_h,  &s.stride_w,
                              &s.dil_h, &s.dil_w, &s.groups, &s.k, &w.total_out, &w.total_in};
    int64_t* const counts[] = {&s.V, &s.H, &s.W, &s.P, &s.Q, &s.pad_h, &s.pad_w};
    int64_t* const tops[] = {&s.H, &s.W, &s.R, &s.S, &s.stride_h, &s.stride_w, &s.dil_h, &s.dil_w, &s.pad_h, &s.pad_w};
    switch (between(0, 9)) {
        case 0:
            *sizes[between(0, 11)] = -between(0, 3);
            return true;
        case 1:
            *counts[between(0, 6)] = -between(1, 3);
            return true;
        case 2:
            c.call.threads = int(-between(0, 2));
            return true;
        case 3:
            *tops[between(0, 9)] = int64_t(1) << between(32, 62);
            return true;
        case 4:  // more bytes than there are
            *(one_in(2) ? &s.V : one_in(2) ? &s.C : &s.K) = int64_t(1) << between(58, 62);
            return true;
        case 5:
            *(one_in(2) ? &s.P : &s.Q) += between(1, 2);
            return true;
        case 6: {
            const int64_t i = between(0, 3);
            w.strides[i] = one_in(2) ? -between(1, 9) : int64_t(1) << between(60, 62);
            return w.strides[i] < 0 || (i == 0 ? w.total_out : i == 1 ? w.total_in : i == 2 ? s.R : s.S) > 1;
        }
        case 7:
            if (side.starts != nullptr) {
                starts[size_t(between(0, side.count - 1))] = one_in(2) ? -1 : total - width + between(1, 2);
            } else {
                side.count = side.count > 0 ? side.count + between(1, 2) : -1;
            }
            return true;
        case 8:
            w.total_out = one_in(2) ? s.K - 1 : int64_t(1) << between(60, 62);
            if (w.total_out > s.K) w.strides[0] = 0;  // far, and in no more memory
            return true;
        default:
            if (expert.empty() || s.V == 0) return false;
            if (one_in(4))
                side.expert = nullptr;
            else
                expert[size_t(between(0, s.V - 1))] = one_in(2) ? -1 : side.count + between(0, 2);
            return true;
    }
}

void run_wrong(Case& c) {
    if (one_in(2)) c.call.weight = dense(c, one_in(2));  // as gradients are written
    if (!spoil(c)) return;
    const DType dtype = c.call.dtype;
    // a number each, of what is looked at too late, and farther apart than any case's tensors reach
    constexpr size_t apart = size_t(1) << 30;
    Buffer from(dtype, 1, true, apart), weight(dtype, 1, true, apart), to(dtype, 1, false, apart);
    const Packed none{nullptr, 0};
    for (const std::string& said : {conv2d_forward(c.call, from.data(), weight.data(), none, to.data(), {}),
                                    conv2d_grad_input(c.call, from.data(), weight.data(), none, to.data()),
                                    conv2d_grad_weight(c.call, from.data(), weight.data(), to.data())}) {
        if (said.empty()) fail(c, "wrong arguments were taken");
        if (said.find("overlaps") != std::string::npos) fail(c, "refused for another reason, " + said);
    }
}

}  // namespace

std::string conv2d(uint64_t seed, int64_t first, int64_t cases) {
    int64_t wrong = 0, winograd = 0;
    for_cases(seed, first, cases, [&] {
        Case c;
        make(c);
        winograd += algorithm(Direction::forward, c.call) == Algorithm::winograd;
        const bool spoiled = one_in(5);
        wrong += spoiled;
        spoiled ? run_wrong(c) : run(c);
    });
    return std::to_string(cases) + " cases, " + std::to_string(wrong) + " with a wrong argument, " +
           std::to_string(winograd) + " by Winograd's algorithm";
}

}  // namespace moe::fuzz
