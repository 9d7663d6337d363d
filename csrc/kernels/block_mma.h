// Engines of block_tile.h for tensor cores: how a step's operands lie in shared memory, and how warps multiply them.
//
// A step's operand is kStep tokens of kTile columns, [k][column], as the matrix lies in memory. A block is 4 warps. Of
// a 128 × 128 tile each owns a quarter; a smaller tile each owns whole, for a quarter of the step's tokens (a group,
// see block_tile.h): a lone tile then keeps four warps busy without reading x more than once. A warp's 64 × 64
// accumulators take 128 registers a thread. The larger the warp's tile, the fewer bytes it reads from shared memory: a
// 128 × 128 × 32 step moves 48 KiB there, 384 cycles of 128 bytes, in the 512 cycles that the products take at the
// tensor cores' rate of 1024 a cycle; with 64 × 32 a warp it would be 512.
#pragma once

#include "block.h"

namespace sst::cuda {

// The place of a warp in its tile: rows and columns from `row` and `col`, tokens of group `group`.
template <int kTile>
struct WarpGrid {
  static constexpr int kThreads = 128, kSide = kTile == 128 ? 64 : kTile;
  static constexpr int kAcross = kTile / kSide, kGroups = 4 / (kAcross * kAcross);
  static_assert(kGroups == 1 || kGroups == 4);

  SST_DEVICE static int row(int t) { return kGroups == 1 ? t / kWarp / kAcross * kSide : 0; }
  SST_DEVICE static int col(int t) { return kGroups == 1 ? t / kWarp % kAcross * kSide : 0; }
  SST_DEVICE static int group(int t) { return kGroups == 1 ? 0 : t / kWarp; }
};

enum class Format { half, bfloat16, tf32 };
template <Format format>
struct FormatTag {};

// How elements of T are multiplied as 16-bit numbers (an infinity, split into parts, becomes NaN): as they are where
// all weights are 0 or 1 (kPlain), else in passes, each a product of one part of w p by one part of q.
struct Pass {
  int p, q;
};
template <class T>
struct Parts16;
template <>
struct Parts16<BFloat16> {  // float32's 24 bits of w p times q
  static constexpr Format kPlainFormat = Format::bfloat16;
  static constexpr bool kPlain = true;
  static constexpr int kPasses = 3;
  SST_DEVICE static Pass pass(int i) { return {i, 0}; }
};
template <>
struct Parts16<Half> {  // as bfloat16, whose range holds every w p; a half is two of them
  static constexpr Format kPlainFormat = Format::half;
  static constexpr bool kPlain = true;
  static constexpr int kPasses = 6;
  SST_DEVICE static Pass pass(int i) { return {i % 3, i / 3}; }
};
template <>
struct Parts16<float> {  // "bf16x3": all but the product of the second parts
  static constexpr Format kPlainFormat = Format::bfloat16;
  static constexpr bool kPlain = false;
  static constexpr int kPasses = 3;
  SST_DEVICE static Pass pass(int i) { return {i / 2, i % 2}; }
};

// mma.m16n8k16 on half or bfloat16. Both operands come by ldmatrix with transposition, 8 × 8 elements at a time, from
// rows of 16-byte chunks; the chunks of a row are exchanged so that those of 8 adjacent rows lie in different banks.
// `whole`: the operands hold_chunks.
template <class T_, int kTile_, bool whole>
struct Mma16 {
  using T = T_;
  using A = float;
  using Grid = WarpGrid<kTile_>;
  using Read = Chunk<T, 8>;
  using Parts = Parts16<T>;
  static constexpr int kTile = kTile_, kThreads = Grid::kThreads, kGroups = Grid::kGroups;
  static constexpr bool kSymmetric = kTile < 128;  // only ever used for products xᵀx of at most kTile columns
  static constexpr bool kWhole = whole;
  static constexpr int kStep = kTile == 128 && (sizeof(T) == 4 || !whole) ? 16 : 4096 / kTile;  // as registers allow
  static constexpr int kResident = kTile >= 64 ? 2 : 3;  // blocks of a multiprocessor
  static constexpr int kOperandBytes = kStep * kTile * 2;
  static constexpr bool kPlain = Parts::kPlain;
  static constexpr int kPasses = Parts::kPasses;
  SST_DEVICE static Pass pass(int i) { return Parts::pass(i); }

  // Where the 16-byte chunk of columns [8 chunk, 8 chunk + 8) of token k lies.
  SST_DEVICE static int offset(int k, int chunk) {
    constexpr int kRow = kTile / 8, kRowsPerLine = kRow < 8 ? 8 / kRow : 1, kMask = kRow < 8 ? kRow - 1 : 7;
    return 16 * (k * kRow + (chunk ^ (k / kRowsPerLine & kMask)));
  }

  template <class Block>
  SST_DEVICE static void store_plain(Block& block, int t, int at, int k, int chunk, const Read& x, float w) {
    if constexpr (kPlain) {
      Vector v;
      SST_UNROLL
      for (int i = 0; i < 4; ++i) v.word[i] = w != 0.0f ? x.word[i] : 0u;
      block.store(t, at + offset(k, chunk), v);
    }
  }

  // Part `part` of the values that element(i) gives.
  template <class Block, class F>
  SST_DEVICE static void store_part(Block& block, int t, int at, int k, int chunk, int part, F element) {
    Vector v;
    SST_UNROLL
    for (int i = 0; i < 4; ++i) v.word[i] = bfloat16_part(element(2 * i), element(2 * i + 1), part);
    block.store(t, at + offset(k, chunk), v);
  }

  struct Fragment {
    float value[4];
  };
  static constexpr int kM = Grid::kSide / 16, kN = Grid::kSide / 8;
  template <class Block>
  struct Sums {
    Each<Block, Fragment> c[kM][kN];
  };

  // Of a symmetric tile, fragments wholly above the diagonal are left out.
  SST_DEVICE static constexpr bool wanted(int i, int j) { return !kSymmetric || 8 * j <= 16 * i + 15; }

  template <bool plain, class Block>
  SST_DEVICE static void multiply(Block& block, int p, int q, Sums<Block>& sums) {
    constexpr FormatTag<plain ? Parts::kPlainFormat : Format::bfloat16> format{};
    SST_UNROLL
    for (int slice = 0; slice < kStep / 16 / kGroups; ++slice) {
      const auto first = [=](int t) { return 16 * (slice * kGroups + Grid::group(t)); };
      Each<Block, Registers<4>> a[kM];
      SST_UNROLL
      for (int i = 0; i < kM; ++i) {  // matrices: rows 0-7 and 8-15 of tokens 0-7, then both of tokens 8-15
        block.load_transposed(a[i], [&](int t) {
          const int lane = t % kWarp, k = first(t) + lane % 8 + lane / 16 * 8;
          return p + offset(k, Grid::row(t) / 8 + 2 * i + lane / 8 % 2);
        });
      }
      SST_UNROLL
      for (int j = 0; j < kN / 2; ++j) {  // matrices: tokens 0-7 and 8-15 of columns 0-7, then both of columns 8-15
        Each<Block, Registers<4>> b;
        block.load_transposed(b, [&](int t) {
          const int lane = t % kWarp, k = first(t) + lane % 16;
          return q + offset(k, Grid::col(t) / 8 + 2 * j + lane / 16);
        });
        SST_UNROLL
        for (int i = 0; i < kM; ++i) {
          if (wanted(i, 2 * j)) block.mma(format, sums.c[i][2 * j], a[i], b, 0);
          if (wanted(i, 2 * j + 1)) block.mma(format, sums.c[i][2 * j + 1], a[i], b, 2);
        }
      }
    }
  }

  // A thread's elements: kRows × kCols of them.
  static constexpr int kRows = 2 * kM, kCols = 2 * kN;
  SST_DEVICE static int row(int t, int r) { return Grid::row(t) + 8 * r + t % kWarp / 4; }
  SST_DEVICE static int col(int t, int c) { return Grid::col(t) + c / 2 * 8 + t % 4 * 2 + c % 2; }
  SST_DEVICE static int group(int t) { return Grid::group(t); }
  template <class Block>
  SST_DEVICE static float& at(Sums<Block>& sums, int t, int r, int c) {
    return sums.c[r / 2][c / 2][t].value[r % 2 * 2 + c % 2];
  }
};

// mma.m16n8k8 on float32 rounded to tf32, 128 × 128 tiles. The instruction's row lane / 4 of fragment i, half h, stands
// for the warp's row 8 (lane / 4) + 2 i + h, and its column c of fragment j for 8 c + j: a thread then reads and owns
// adjacent elements, by 16-byte vectors. The vectors of a row are exchanged so that neither stores nor loads meet in a
// bank.
template <bool whole>
struct MmaTf32 {
  using T = float;
  using A = float;
  using Grid = WarpGrid<128>;
  using Read = Chunk<float, 8>;
  static constexpr int kTile = 128, kThreads = Grid::kThreads, kGroups = Grid::kGroups, kStep = 16;
  static constexpr bool kSymmetric = false, kPlain = false, kWhole = whole;
  static constexpr int kPasses = 1, kOperandBytes = kStep * kTile * 4, kResident = 2;
  SST_DEVICE static Pass pass(int) { return {0, 0}; }

  // Where columns [4 vector, 4 vector + 4) of token k lie.
  SST_DEVICE static int offset(int k, int vector) {
    return 16 * (k * kTile / 4 + (vector ^ (k & 1) ^ (k & 2) << 1 ^ (vector >> 3 & 1)));
  }

  template <class Block, class F>
  SST_DEVICE static void store_part(Block& block, int t, int at, int k, int chunk, int, F element) {
    SST_UNROLL
    for (int half = 0; half < 2; ++half) {
      Vector v;
      SST_UNROLL
      for (int i = 0; i < 4; ++i) v.word[i] = round_tf32(element(4 * half + i));
      block.store(t, at + offset(k, 2 * chunk + half), v);
    }
  }

  struct Fragment {
    float value[4];
  };
  static constexpr int kM = 4, kN = 8;
  template <class Block>
  struct Sums {
    Each<Block, Fragment> c[kM][kN];
  };

  template <bool plain, class Block>
  SST_DEVICE static void multiply(Block& block, int p, int q, Sums<Block>& sums) {
    SST_UNROLL
    for (int k0 = 0; k0 < kStep; k0 += 8) {
      Each<Block, Registers<4>> a[kM], b[kN / 2];  // of b, the registers of two fragments
      block.each([&](int t) {
        const int lane = t % kWarp;
        SST_UNROLL
        for (int h = 0; h < 2; ++h) {  // tokens 0-3 and 4-7
          SST_UNROLL
          for (int v = 0; v < 2; ++v) {
            const int k = k0 + 4 * h + lane % 4, vector = lane / 4 * 2 + v;
            const Vector x = block.template load<Vector>(t, p + offset(k, Grid::row(t) / 4 + vector));
            const Vector y = block.template load<Vector>(t, q + offset(k, Grid::col(t) / 4 + vector));
            SST_UNROLL
            for (int i = 0; i < 4; ++i) {
              a[2 * v + i / 2][t].word[2 * h + i % 2] = x.word[i];
              b[2 * v + i / 2][t].word[i % 2 * 2 + h] = y.word[i];
            }
          }
        }
      });
      SST_UNROLL
      for (int i = 0; i < kM; ++i) {
        SST_UNROLL
        for (int j = 0; j < kN; ++j) {
          block.mma(FormatTag<Format::tf32>{}, sums.c[i][j], a[i], b[j / 2], j % 2 * 2);
        }
      }
    }
  }

  static constexpr int kRows = 2 * kM, kCols = 2 * kN;
  SST_DEVICE static int row(int t, int r) { return Grid::row(t) + t % kWarp / 4 * 8 + r; }
  SST_DEVICE static int col(int t, int c) { return Grid::col(t) + t % 4 * 16 + c; }
  SST_DEVICE static int group(int) { return 0; }
  template <class Block>
  SST_DEVICE static float& at(Sums<Block>& sums, int t, int r, int c) {
    return sums.c[r / 2][c % 8][t].value[r % 2 * 2 + c / 8];
  }
};

}  // namespace sst::cuda
