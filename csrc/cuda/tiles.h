// SPDX-License-Identifier: Apache-2.0
// The tiles that each element type is built with, and which of them a call takes.
#pragma once

#include "cuda/gemm.h"

namespace moe::MOE_GPU {

struct Copy {};    // channels lie in aligned runs of 16 bytes: asynchronous copies
struct Gather {};  // anything else: element by element

// A tile's size and how much of a multiprocessor's peak it reaches: guesses that no device has confirmed yet.
struct TileSize {
    int m, n;
    double rate;
};

template <class... Tiles>
struct TileList {
    static constexpr int kCount = int(sizeof...(Tiles));
    // Calls visitor.run<Tile>() with the tile number `index`.
    template <class Visitor>
    static Status visit(int index, Visitor visitor) {
        Status status;
        int number = 0;
        ((number++ == index ? void(status = visitor.template run<Tiles>()) : void()), ...);
        return status;
    }
};

// Of forward and input gradient. The last tile is that of calls that gather.
template <class Element>
struct ConvolutionTiles {  // bfloat16 and float16
    using Copies =
        TileList<Tile<Element, 128, 128, 2, 4, 4>, Tile<Element, 128, 64, 2, 2, 4>, Tile<Element, 64, 64, 2, 2, 4>,
                 Tile<Element, 128, 32, 4, 1, 4>, Tile<Element, 16, 64, 1, 4, 6>>;
    using Gathers = Tile<Element, 64, 64, 2, 2, 2>;
    static constexpr TileSize kSizes[] = {
        {128, 128, 1.0}, {128, 64, 0.85}, {64, 64, 0.6}, {128, 32, 0.55}, {16, 64, 0.2}};
};
template <>
struct ConvolutionTiles<device::tf32> {
    using Copies = TileList<Tile<device::tf32, 128, 64, 4, 2, 4>, Tile<device::tf32, 64, 64, 2, 2, 4>,
                            Tile<device::tf32, 16, 64, 1, 4, 6>>;
    using Gathers = Tile<device::tf32, 64, 64, 2, 2, 2>;
    static constexpr TileSize kSizes[] = {{128, 64, 1.0}, {64, 64, 0.8}, {16, 64, 0.25}};
};
template <>
struct ConvolutionTiles<float> {
    using Copies = TileList<Tile<float, 64, 64, 2, 2, 4>, Tile<float, 16, 64, 1, 4, 6>>;
    using Gathers = Tile<float, 64, 64, 2, 2, 2>;
    static constexpr TileSize kSizes[] = {{64, 64, 1.0}, {16, 64, 0.5}};
};

// Of the weight gradient: rows are output channels, columns (tap, input channel).
template <class Element>
struct GradWeightTiles {  // bfloat16 and float16
    using Copies =
        TileList<Tile<Element, 128, 128, 2, 4, 4>, Tile<Element, 64, 64, 2, 2, 4>, Tile<Element, 32, 128, 1, 4, 4>>;
    using Gathers = Tile<Element, 64, 64, 2, 2, 2>;
    static constexpr TileSize kSizes[] = {{128, 128, 1.0}, {64, 64, 0.6}, {32, 128, 0.55}};
};
template <>
struct GradWeightTiles<device::tf32> {
    using Copies = TileList<Tile<device::tf32, 64, 64, 2, 2, 4>>;
    using Gathers = Tile<device::tf32, 64, 64, 2, 2, 2>;
    static constexpr TileSize kSizes[] = {{64, 64, 1.0}};
};
template <>
struct GradWeightTiles<float> {
    using Copies = TileList<Tile<float, 64, 64, 2, 2, 4>>;
    using Gathers = Tile<float, 64, 64, 2, 2, 2>;
    static constexpr TileSize kSizes[] = {{64, 64, 1.0}};
};
constexpr TileSize kGatherSize = {64, 64, 1.0};

}  // namespace moe::MOE_GPU
