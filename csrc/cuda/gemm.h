// SPDX-License-Identifier: Apache-2.0
// What the implicit GEMMs are made of: tiles of operands in shared memory, fragments, and the product of a stage.
//
// A stage holds 64 bytes of the reduction for every row of an operand: 32 elements of 16 bits or 16 of float32. An
// operand lies in shared memory as in global memory: KFast with the reduction along a row, else with the result's rows
// (or columns) along it. Chunks of 16 bytes are swizzled, or rows padded, so that the 8 rows of an ldmatrix lie in
// different banks.
//
// Accumulators are those of mma.sync m16n8 in every element type, with float32's products too: lane l holds of each
// 16 x 8 block the rows l / 4 and l / 4 + 8 and the columns 2 * (l % 4) and the next.
#pragma once

#include "cuda/device.h"

namespace moe::MOE_GPU {

using device::Shared;

template <class Element>
struct Storage {
    using type = Element;
};
template <>
struct Storage<device::tf32> {
    using type = float;
};

template <class Element>
struct Traits {
    using T = typename Storage<Element>::type;
    static constexpr int kChunk = 16 / int(sizeof(T));  // elements of one copy
    static constexpr int kDepth = 64 / int(sizeof(T));  // of the reduction, in one stage
    static constexpr int kStep = 32 / int(sizeof(T));   // of the reduction, in one fragment
};

// The place of an operand's stage: Rows of the result (its rows or its columns).
template <class Element, int Rows, bool KFast>
struct Operand {
    using T = typename Traits<Element>::T;
    static constexpr int kChunk = Traits<Element>::kChunk;
    static constexpr bool kPadded = !KFast && sizeof(T) == 4;
    static constexpr int kLines = KFast ? Rows : Traits<Element>::kDepth;  // lines in memory, and chunks of a line
    static constexpr int kChunks = KFast ? 4 : Rows / kChunk;
    static constexpr int kLine = kChunks * kChunk + (kPadded ? 8 : 0);  // elements from one line to the next
    static constexpr int kElements = kLines * kLine;

    // Where a chunk lies, in elements.
    static MOE_DEVICE int place(int line, int chunk) {
        if (kPadded) return line * kLine + chunk * kChunk;
        const int twist = kChunks >= 8 ? line % 8 : kChunks == 4 ? line / 2 % 4 : line / 4 % 2;
        return line * kLine + (chunk ^ twist) * kChunk;
    }
};

// A tile: the block's part of the result and how its warps share it.
template <class Element_, int BM, int BN, int WarpsM, int WarpsN, int Stages>
struct Tile {
    using Element = Element_;
    using T = typename Traits<Element>::T;
    static constexpr int kM = BM, kN = BN, kWarpsN = WarpsN, kStages = Stages;
    static constexpr int kThreads = 32 * WarpsM * WarpsN;
    // Blocks that a multiprocessor has registers for: while one waits at its barrier, another multiplies.
    static constexpr int kBlocks = kThreads >= 256 ? 2 : 3;
    static constexpr int kWarpM = BM / WarpsM, kWarpN = BN / WarpsN;
    static constexpr int kBlocksM = kWarpM / 16, kBlocksN = kWarpN / 8;
    static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "two blocks of columns are read at a time");

    float sum[kBlocksM][kBlocksN][4];

    MOE_DEVICE void clear() {
        MOE_UNROLL
        for (int i = 0; i < kBlocksM; ++i) {
            MOE_UNROLL
            for (int j = 0; j < kBlocksN; ++j) {
                MOE_UNROLL
                for (int e = 0; e < 4; ++e) sum[i][j][e] = 0.0f;
            }
        }
    }

    // Row and column, in the block's tile, of this lane's element `e` of block (i, j).
    static MOE_DEVICE int row(int i, int e) {
        return device::warp() / WarpsN * kWarpM + i * 16 + device::lane() / 4 + e / 2 * 8;
    }
    static MOE_DEVICE int column(int j, int e) {
        return device::warp() % WarpsN * kWarpN + j * 8 + device::lane() % 4 * 2 + e % 2;
    }
};

// --- fragments --------------------------------------------------------------------------------------------------------

MOE_DEVICE uint32_t bits_of(float x) {
    union {
        float f;
        uint32_t u;
    } value{x};
    return value.u;
}

// Rows first .. first + 15 of the left operand, `step` of the stage's two parts of the reduction.
template <class Element, int Rows, bool KFast>
MOE_DEVICE void left_fragment(uint32_t (&a)[4], Shared<typename Traits<Element>::T> stage, int first, int step) {
    using Place = Operand<Element, Rows, KFast>;
    const int lane = device::lane();
    if constexpr (KFast) {
        device::load_matrices(a, stage.at(Place::place(first + lane % 16, step * 2 + lane / 16)));
    } else if constexpr (!Place::kPadded) {
        const int k = step * 16 + lane % 8 + lane / 16 * 8;
        device::load_matrices_transposed(a, stage.at(Place::place(k, first / 8 + lane / 8 % 2)));
    } else {
        const int at = (step * 8 + lane % 4) * Place::kLine + first + lane / 4;
        a[0] = bits_of(stage.load(at));
        a[1] = bits_of(stage.load(at + 8));
        a[2] = bits_of(stage.load(at + 4 * Place::kLine));
        a[3] = bits_of(stage.load(at + 4 * Place::kLine + 8));
    }
}

// Columns first .. first + 15 of the right operand: the fragments of two blocks.
template <class Element, int Rows, bool KFast>
MOE_DEVICE void right_fragments(uint32_t (&b)[2][2], Shared<typename Traits<Element>::T> stage, int first, int step) {
    using Place = Operand<Element, Rows, KFast>;
    const int lane = device::lane();
    if constexpr (Place::kPadded) {
        MOE_UNROLL
        for (int j = 0; j < 2; ++j) {
            const int at = (step * 8 + lane % 4) * Place::kLine + first + j * 8 + lane / 4;
            b[j][0] = bits_of(stage.load(at));
            b[j][1] = bits_of(stage.load(at + 4 * Place::kLine));
        }
    } else {
        uint32_t r[4];
        if constexpr (KFast) {
            const int n = first + lane % 8 + lane / 16 * 8;
            device::load_matrices(r, stage.at(Place::place(n, step * 2 + lane / 8 % 2)));
        } else {
            const int k = step * 16 + lane % 8 + lane / 8 % 2 * 8;
            device::load_matrices_transposed(r, stage.at(Place::place(k, first / 8 + lane / 16)));
        }
        b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
    }
}

// --- the product of one stage -----------------------------------------------------------------------------------------

// On the matrix unit.
template <bool KFastA, bool KFastB, class Tile>
MOE_DEVICE void multiply_on_matrix_unit(Tile& tile, Shared<typename Tile::T> a, Shared<typename Tile::T> b) {
    using Element = typename Tile::Element;
    const int first_m = device::warp() / Tile::kWarpsN * Tile::kWarpM;
    const int first_n = device::warp() % Tile::kWarpsN * Tile::kWarpN;
    MOE_UNROLL
    for (int step = 0; step < 2; ++step) {
        uint32_t left[Tile::kBlocksM][4];
        uint32_t right[Tile::kBlocksN / 2][2][2];
        MOE_UNROLL
        for (int i = 0; i < Tile::kBlocksM; ++i) {
            left_fragment<Element, Tile::kM, KFastA>(left[i], a, first_m + i * 16, step);
        }
        MOE_UNROLL
        for (int j = 0; j < Tile::kBlocksN / 2; ++j) {
            right_fragments<Element, Tile::kN, KFastB>(right[j], b, first_n + j * 16, step);
        }
        if constexpr (sizeof(typename Tile::T) == 4) {  // the unit would cut the bits off, which has a bias
            MOE_UNROLL
            for (int i = 0; i < Tile::kBlocksM; ++i) {
                MOE_UNROLL
                for (int e = 0; e < 4; ++e) left[i][e] = device::to_tf32(left[i][e]);
            }
            MOE_UNROLL
            for (int j = 0; j < Tile::kBlocksN; ++j) {
                MOE_UNROLL
                for (int e = 0; e < 2; ++e) right[j / 2][j % 2][e] = device::to_tf32(right[j / 2][j % 2][e]);
            }
        }
        MOE_UNROLL
        for (int i = 0; i < Tile::kBlocksM; ++i) {
            MOE_UNROLL
            for (int j = 0; j < Tile::kBlocksN; ++j) {
                device::multiply_accumulate(tile.sum[i][j], left[i], right[j / 2][j % 2], Element{});
            }
        }
    }
}

// One value of each of this lane's rows (or columns) of an operand, at `k` of the stage.
template <int Rows, bool KFast>
MOE_DEVICE float value_at(Shared<float> stage, int row, int k) {
    using Place = Operand<float, Rows, KFast>;
    return KFast ? stage.load(Place::place(row, k / 4) + k % 4) : stage.load(k * Place::kLine + row);
}

// Full float32 products. Along the reduction four values of a row are read at once where they lie together.
template <bool KFastA, bool KFastB, class Tile>
MOE_DEVICE void multiply_in_full(Tile& tile, Shared<float> a, Shared<float> b) {
    constexpr int at_once = 4;
    MOE_UNROLL
    for (int chunk = 0; chunk < Traits<float>::kDepth / at_once; ++chunk) {
        float left[Tile::kBlocksM][2][at_once];
        MOE_UNROLL
        for (int i = 0; i < Tile::kBlocksM; ++i) {
            MOE_UNROLL
            for (int h = 0; h < 2; ++h) {
                const int row = Tile::row(i, h * 2);
                if constexpr (KFastA) {
                    const auto four = a.template load_vector<at_once>(Operand<float, Tile::kM, true>::place(row, chunk));
                    MOE_UNROLL
                    for (int k = 0; k < at_once; ++k) left[i][h][k] = four.v[k];
                } else {
                    MOE_UNROLL
                    for (int k = 0; k < at_once; ++k) {
                        left[i][h][k] = value_at<Tile::kM, false>(a, row, chunk * at_once + k);
                    }
                }
            }
        }
        MOE_UNROLL
        for (int j = 0; j < Tile::kBlocksN; ++j) {
            float right[2][at_once];
            const int column = Tile::column(j, 0);
            if constexpr (KFastB) {
                MOE_UNROLL
                for (int e = 0; e < 2; ++e) {
                    const auto four =
                        b.template load_vector<at_once>(Operand<float, Tile::kN, true>::place(column + e, chunk));
                    MOE_UNROLL
                    for (int k = 0; k < at_once; ++k) right[e][k] = four.v[k];
                }
            } else {
                MOE_UNROLL
                for (int k = 0; k < at_once; ++k) {
                    const auto two = b.template load_vector<2>(
                        (chunk * at_once + k) * Operand<float, Tile::kN, false>::kLine + column);
                    right[0][k] = two.v[0], right[1][k] = two.v[1];
                }
            }
            MOE_UNROLL
            for (int k = 0; k < at_once; ++k) {
                MOE_UNROLL
                for (int i = 0; i < Tile::kBlocksM; ++i) {
                    MOE_UNROLL
                    for (int e = 0; e < 4; ++e) {
                        tile.sum[i][j][e] = device::multiply_add(left[i][e / 2][k], right[e % 2][k], tile.sum[i][j][e]);
                    }
                }
            }
        }
    }
}

template <bool KFastA, bool KFastB, class Tile>
MOE_DEVICE void multiply(Tile& tile, Shared<typename Tile::T> a, Shared<typename Tile::T> b) {
    if constexpr (std::is_same_v<typename Tile::Element, float>) {
        multiply_in_full<KFastA, KFastB>(tile, a, b);
    } else {
        multiply_on_matrix_unit<KFastA, KFastB>(tile, a, b);
    }
}

// The main loop: `load(stage, step)` fetches, copies are committed here, `multiply_stage(stage)` uses what is there.
template <int Stages, class Load, class Multiply>
MOE_DEVICE void pipeline(int begin, int end, Load load, Multiply multiply_stage) {
    MOE_UNROLL
    for (int s = 0; s < Stages - 1; ++s) {
        if (begin + s < end) load(s, begin + s);
        device::commit_copies();
    }
    int current = 0;
    for (int step = begin; step < end; ++step) {
        device::wait_copies<Stages - 2>();
        device::sync_threads();  // this stage is there for all; and all are done with the one that is loaded next
        const int next = step + Stages - 1;
        if (next < end) load(current == 0 ? Stages - 1 : current - 1, next);
        device::commit_copies();
        multiply_stage(current);
        current = current == Stages - 1 ? 0 : current + 1;
    }
    device::wait_copies<0>();
    device::sync_threads();  // shared memory may be used for something else
}

}  // namespace moe::MOE_GPU
