// SPDX-License-Identifier: Apache-2.0
#include "cpu/program.h"

#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "common/plan.h"
#include "cpu/checks.h"
#include "cpu/dispatch.h"
#include "cpu/program_checks.h"

namespace moe::cpu {

// Samples begin .. begin + count - 1 of a run, in memory of their own.
struct Program::Part {
    char* memory;
    int64_t begin, count;
    const std::vector<External>* inputs;
    const std::vector<External>* outputs;
    int threads;

    // `count` of its samples from the `first` on, in other memory.
    Part range(char* other, int64_t first, int64_t count) const {
        return {other, begin + first, count, inputs, outputs, threads};
    }

    void* at(int64_t offset) const { return offset == kNowhere ? nullptr : memory + offset * count; }
    int64_t* index(int64_t offset) const { return static_cast<int64_t*>(at(offset)); }
};

namespace {

void require(const std::string& error) {
    if (!error.empty()) throw std::invalid_argument(error);
}

// Without numbers there are no rows, and nobody looks at which a sample asks for.
void forget_rows(ProgramPrologue& p) {
    if (p.scale == nullptr && p.shift == nullptr) p.expert = kNowhere;
}

// Rows of a prologue that samples ask for.
std::string check_rows(const ProgramPrologue& p, const int64_t* expert, int64_t samples) {
    if (p.scale == nullptr && p.shift == nullptr) return {};
    return check_experts({expert, p.rows, nullptr}, samples, "routing");
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class A>
A before(const ProgramPrologue& p, const int64_t* expert, int64_t sample, int64_t channel, A x) {
    const int64_t at = (expert != nullptr ? expert[sample] * p.channels : 0) + channel;
    if (p.scale != nullptr) x *= static_cast<const A*>(p.scale)[at];
    if (p.shift != nullptr) x += static_cast<const A*>(p.shift)[at];
    return p.relu && x < A(0) ? A(0) : x;
}

// Between a tensor from outside and a place. Both directions read and write each number once; images from outside have
// few channels, results few numbers.
template <class A, bool LOADS>
void move(const External& outside, int64_t begin, int64_t count, const Place& place, void* data, const ProgramPrologue& p,
          const int64_t* expert, int threads) {
    const int64_t* strides = outside.strides;
    const int64_t size = place.height * place.width * place.channels;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count * size > 32768)
    for (int64_t row = 0; row < count * place.height; ++row) {
        const int64_t s = row / place.height, y = row % place.height;
        A* out = static_cast<A*>(outside.data) + (begin + s) * strides[0] + y * strides[2];
        A* in = static_cast<A*>(data) + row * place.width * place.pixel_stride;
        for (int64_t x = 0; x < place.width; ++x, in += place.pixel_stride, out += strides[3]) {
            for (int64_t c = 0; c < place.channels; ++c) {
                if (LOADS) {
                    in[c] = out[c * strides[1]];
                } else {
                    out[c * strides[1]] = before<A>(p, expert, s, c, in[c]);
                }
            }
        }
    }
}

}  // namespace

Program::Memory::~Memory() { std::free(data); }

Program::Program(DType dtype, int64_t sample_bytes, int64_t chunk, Late late)
    : dtype_(dtype), sample_bytes_(sample_bytes), chunk_(chunk), late_(std::move(late)) {
    if (dtype != DType::float32 && dtype != DType::float64) require("dtype: expected float32 or float64");
    if (!is_memory(sample_bytes) || chunk < 1 || chunk > kMaxSize)
        require("memory: expected a multiple of 8 bytes, and 1 .. 2^31 samples of a chunk");
    require(check(late_, {dtype_, sample_bytes_}));
}

// Bytes of a sample that the next step may use. Late steps run in the memory of early ones too, where samples are few.
int64_t Program::room() const {
    const bool late = late_.first >= 0 && int64_t(steps_.size()) >= late_.first;
    return late ? smaller(sample_bytes_, late_.sample_bytes) : sample_bytes_;
}

void Program::load(int64_t input, Place dst) {
    require(check(dst, {dtype_, room()}, "dst"));
    if (input < 0) require("input: expected a number from 0 on");
    Step step{Step::Kind::load};
    step.external = input, step.place = dst;
    steps_.push_back(step);
}

void Program::store(int64_t output, Place src, ProgramPrologue prologue) {
    const Room room{dtype_, this->room()};
    forget_rows(prologue);
    require(check(src, room, "src"));
    require(check(prologue, src, room));
    if (output < 0) require("output: expected a number from 0 on");
    Step step{Step::Kind::store};
    step.external = output, step.place = src, step.prologue = prologue;
    steps_.push_back(step);
}

void Program::load_index(int64_t input, int64_t dst) {
    require(check_index(dst, {dtype_, room()}, "dst"));
    if (input < 0) require("input: expected a number from 0 on");
    Step step{Step::Kind::load_index};
    step.external = input, step.index = dst;
    steps_.push_back(step);
}

void Program::store_index(int64_t output, int64_t src) {
    require(check_index(src, {dtype_, room()}, "src"));
    if (output < 0) require("output: expected a number from 0 on");
    Step step{Step::Kind::store_index};
    step.external = output, step.index = src;
    steps_.push_back(step);
}

void Program::conv(ProgramConv conv) {
    forget_rows(conv.prologue);
    require(check(conv, {dtype_, room()}));
    Step step{Step::Kind::conv};
    step.which = convs_.size();
    Conv made;
    made.passes = forward_passes(conv.shape);
    made.given = std::move(conv);
    convs_.push_back(std::move(made));
    steps_.push_back(step);
}

void Program::layer(ProgramLayer layer) {
    forget_rows(layer.prologue);
    require(check(layer, {dtype_, room()}));
    Step step{Step::Kind::layer};
    step.which = layers_.size();
    layers_.push_back(std::move(layer));
    steps_.push_back(step);
}

std::string Program::check_run(int64_t samples, int threads) const {
    if (samples < 0) return "samples: expected a number from 0 on, got " + std::to_string(samples);
    if (late_.first > int64_t(steps_.size())) return "late: begins behind the last step";
    const std::string error = check_threads(threads);
    if (error.empty() &&
        (!addressable({samples, threads, sample_bytes_}) || !addressable({samples, threads, late_.sample_bytes})))
        return "samples: more than 2^60 bytes";
    return error;
}

// How much lies behind the pointers is the caller's word.
std::string Program::check_tensors(int64_t samples, const std::vector<External>& inputs,
                                   const std::vector<External>& outputs) const {
    std::vector<Span> read, written;
    for (const Step& step : steps_) {
        const bool loads = step.kind == Step::Kind::load || step.kind == Step::Kind::load_index;
        if (!loads && step.kind != Step::Kind::store && step.kind != Step::Kind::store_index) continue;
        const std::vector<External>& given = loads ? inputs : outputs;
        const std::string name = (loads ? "input " : "output ") + std::to_string(step.external);
        if (step.external >= int64_t(given.size())) return name + ": missing";
        const External& tensor = given[size_t(step.external)];
        const Place& p = step.place;
        const bool index = step.kind == Step::Kind::load_index || step.kind == Step::Kind::store_index;
        const int64_t sizes[] = {samples, index ? 1 : p.channels, index ? 1 : p.height, index ? 1 : p.width};
        if (tensor.data == nullptr) return name + ": missing";
        int64_t reach = 1;
        for (int i = 0; i < 4; ++i) {
            if (tensor.strides[i] < 0 || !addressable({sizes[i], tensor.strides[i]}))
                return name + ": strides of more than 2^60 bytes, or negative";
            reach += (sizes[i] - 1) * tensor.strides[i];
        }
        (loads ? read : written).push_back({tensor.data, reach * (index ? int64_t(sizeof(int64_t)) : size_of(dtype_))});
    }
    // One part of the batch is stored while another is still to be loaded.
    for (size_t i = 0; i < written.size(); ++i) {
        std::string error;
        for (const Span& input : read) {
            if (error.empty()) error = check_apart(written[i], {input});
        }
        for (size_t j = 0; j < i && error.empty(); ++j) error = check_apart(written[i], {written[j]});
        if (!error.empty()) return error;
    }
    return {};
}

// A run's parts, each taken through the network by itself; what of a part goes through the early steps at a time; and the
// bytes that a part takes, of which the early steps' come first.
struct Program::Cut {
    int64_t part, early, early_bytes, bytes;
};

// With enough samples each thread takes parts of the batch through the whole network, without waiting for the others
// between layers; otherwise all threads work on each layer. No bit depends on it.
Program::Cut Program::cut(int64_t samples, int threads) const {
    Cut cut{samples, samples, 0, 0};
    if (threads == 1 || samples >= 4 * int64_t(threads)) {
        const int64_t each = ceil_div(samples, threads);
        cut.part = ceil_div(each, ceil_div(each, late_.first < 0 ? chunk_ : late_.chunk));
        cut.early = ceil_div(cut.part, ceil_div(cut.part, chunk_));
    }
    cut.early_bytes = cut.early * sample_bytes_;
    cut.bytes = cut.early_bytes + (cut.early < cut.part ? cut.part * late_.sample_bytes : 0);
    return cut;
}

int64_t Program::memory(int64_t samples, int threads) const {
    require(check_run(samples, threads));
    if (samples == 0) return 0;
    const Cut cut = this->cut(samples, threads);
    return cut.bytes * (cut.part < samples ? threads : 1);
}

std::unique_ptr<Program::Memory> Program::take_memory(size_t bytes) const {
    std::unique_ptr<Memory> memory;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!free_.empty()) {
            memory = std::move(free_.back());
            free_.pop_back();
        }
    }
    if (memory == nullptr) memory = std::make_unique<Memory>();
    if (memory->size < bytes) {
        std::free(memory->data);
        memory->size = 0;
        memory->data = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
        if (memory->data == nullptr) throw std::bad_alloc();
        memory->size = bytes;
    }
    return memory;
}

std::string Program::run(int64_t samples, const std::vector<External>& inputs, const std::vector<External>& outputs,
                         int threads, std::vector<double>* seconds) const {
    if (seconds != nullptr) seconds->assign(steps_.size(), 0);
    std::string error = check_run(samples, threads);
    if (!error.empty() || samples == 0) return error;
    error = check_tensors(samples, inputs, outputs);
    if (!error.empty()) return error;
    const Cut cut = this->cut(samples, threads);
    const int64_t parts = ceil_div(samples, cut.part);
    std::unique_ptr<Memory> own = take_memory(size_t(this->memory(samples, threads)));
    if (parts == 1) {
        error = run_part({static_cast<char*>(own->data), 0, samples, &inputs, &outputs, threads}, cut, seconds);
    } else {
        kernels();  // what a wrong choice of them throws must not leave a thread
        bool no_memory = false;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
        for (int64_t i = 0; i < parts; ++i) {
            std::string mine;
            try {
                char* memory = static_cast<char*>(own->data) + omp_get_thread_num() * cut.bytes;
                const int64_t begin = i * cut.part, count = smaller(cut.part, samples - begin);
                mine = run_part({memory, begin, count, &inputs, &outputs, 1}, cut, seconds);
            } catch (const std::bad_alloc&) {
#pragma omp atomic write
                no_memory = true;
            }
            if (!mine.empty()) {
#pragma omp critical(moe_program_error)
                error = mine;
            }
        }
        if (no_memory) throw std::bad_alloc();
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(own));
    return error;
}

std::string Program::run_part(const Part& part, const Cut& cut, std::vector<double>* seconds) const {
    if (cut.early == cut.part) return run_steps(part, 0, steps_.size(), seconds);
    const Part late = part.range(part.memory + cut.early_bytes, 0, part.count);
    for (int64_t first = 0; first < part.count; first += cut.early) {
        const Part early = part.range(part.memory, first, smaller(cut.early, part.count - first));
        const std::string error = run_steps(early, 0, size_t(late_.first), seconds);
        if (!error.empty()) return error;
        for (const Late::Live& live : late_.live) {
            char* to = static_cast<char*>(late.at(live.offset)) + first * live.bytes;
            std::memcpy(to, early.at(live.offset), size_t(early.count * live.bytes));
        }
    }
    return run_steps(late, size_t(late_.first), steps_.size(), seconds);
}

std::string Program::run_steps(const Part& part, size_t begin, size_t end, std::vector<double>* seconds) const {
    for (size_t i = begin; i < end; ++i) {
        const double start = seconds != nullptr ? omp_get_wtime() : 0;
        const std::string error = run_step(steps_[i], part);
        if (!error.empty()) return error;
        if (seconds != nullptr) {
            const double taken = omp_get_wtime() - start;
#pragma omp atomic
            (*seconds)[i] += taken;
        }
    }
    return {};
}

std::string Program::run_step(const Step& step, const Part& part) const {
    const bool loads = step.kind == Step::Kind::load || step.kind == Step::Kind::load_index;
    switch (step.kind) {
        case Step::Kind::load:
        case Step::Kind::store: {
            const External& outside = (loads ? *part.inputs : *part.outputs)[size_t(step.external)];
            void* data = static_cast<char*>(part.at(step.place.offset)) + step.place.channel * size_of(dtype_);
            const auto moves = dtype_ == DType::float64 ? (loads ? move<double, true> : move<double, false>)
                                                        : (loads ? move<float, true> : move<float, false>);
            const int64_t* expert = part.index(step.prologue.expert);
            const std::string error = check_rows(step.prologue, expert, part.count);
            if (!error.empty()) return error;
            moves(outside, part.begin, part.count, step.place, data, step.prologue, expert, part.threads);
            return {};
        }
        case Step::Kind::load_index:
        case Step::Kind::store_index: {
            const External& outside = (loads ? *part.inputs : *part.outputs)[size_t(step.external)];
            int64_t* out = static_cast<int64_t*>(outside.data) + part.begin * outside.strides[0];
            int64_t* in = part.index(step.index);
            for (int64_t s = 0; s < part.count; ++s, out += outside.strides[0])
                (loads ? in[s] : *out) = loads ? *out : in[s];
            return {};
        }
        case Step::Kind::conv:
            return run_conv(convs_[step.which], part);
        case Step::Kind::layer:
            return run_layer(layers_[step.which], part);
    }
    return {};
}

std::string Program::run_conv(const Conv& conv, const Part& part) const {
    const ProgramConv& c = conv.given;
    Conv2dShape s = c.shape;
    s.V = part.count;
    const Slices slices{{part.index(c.out_expert), c.out_count, c.out_starts.empty() ? nullptr : c.out_starts.data()},
                        {part.index(c.in_expert), c.in_count, c.in_starts.empty() ? nullptr : c.in_starts.data()}};
    Plan plan;
    std::string error = make_plan(s, slices, plan);
    if (error.empty()) error = check_rows(c.prologue, part.index(c.prologue.expert), part.count);
    if (!error.empty()) return error;
    auto data = [&](const Place& place) {
        return static_cast<char*>(part.at(place.offset)) + place.channel * size_of(dtype_);
    };
    ConvJob job{};
    job.algorithm = choose_algorithm(dtype_, s.C / s.groups, conv.passes);
    job.src = data(c.src);
    job.src_h = s.H, job.src_w = s.W, job.src_c = c.src.pixel_stride;
    job.src_div = 1;
    job.dst = data(c.dst);
    job.dst_h = s.P, job.dst_w = s.Q, job.dst_c = c.dst.pixel_stride;
    job.out = s.K / s.groups, job.red = s.C / s.groups;
    job.conv_groups = s.groups;
    job.passes = conv.passes.list.data();
    job.pass_count = int64_t(conv.passes.list.size());
    job.groups = plan.groups.data();
    job.group_count = int64_t(plan.groups.size());
    job.order = plan.order.data();
    job.packed = c.packed;
    job.prologue = {c.prologue.scale, c.prologue.shift, part.index(c.prologue.expert), c.prologue.channels,
                    c.prologue.relu};
    job.epilogue = c.epilogue;
    job.epilogue.gate = part.at(c.gate);
    if (!c.residual.none()) {
        job.epilogue.residual = data(c.residual);
        job.residual_c = c.residual.pixel_stride;
    }
    job.threads = part.threads;
    if (kernels().conv(dtype_, job) == Result::out_of_memory) throw std::bad_alloc();
    return {};
}

std::string Program::run_layer(const ProgramLayer& layer, const Part& part) const {
    LayerJob job = layer.job;
    auto view = [&](const Place& p) -> View {
        if (p.none()) return {};
        char* data = static_cast<char*>(part.at(p.offset)) + p.channel * size_of(dtype_);
        return {data, p.height, p.width, p.channels, p.pixel_stride};
    };
    job.samples = part.count;
    job.src = view(layer.src), job.other = view(layer.other), job.dst = view(layer.dst);
    const ProgramPrologue& p = layer.prologue;
    job.prologue = {p.scale, p.shift, part.index(p.expert), p.channels, p.relu};
    job.index = part.index(layer.index);
    job.threads = part.threads;
    std::string error = check_rows(p, job.prologue.expert, part.count);
    if (error.empty() && job.op == LayerOp::gather)
        error = check_experts({job.index, job.src.channels, nullptr}, part.count, "gather");
    if (!error.empty()) return error;
    if (kernels().layer(dtype_, job) == Result::not_a_number) return "scores: a router gave NaN";
    return {};
}

}  // namespace moe::cpu
