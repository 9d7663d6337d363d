// Engine of block_tile.h without tensor cores: fused multiply-add in the accumulator type, whatever the elements are.
//
// 256 threads. A thread owns kPer × kPer elements of the tile, as vectors of 16 bytes that lie kSide vectors apart; the
// kSide × kSide threads of a group own the tile, for every kGroups-th token of a step. A step's operands lie in shared
// memory as [k][column] of the accumulator type.
#pragma once

#include "block.h"
#include "block_mma.h"

namespace sst::cuda {

template <class T_, int kTile_, bool symmetric, bool whole,
          int kPer = kTile_ >= 64 && sizeof(Accumulator<T_>) == 4 ? 8 : 4>
struct Simt {
  using T = T_;
  using A = Accumulator<T>;
  static constexpr int kTile = kTile_, kThreads = 256, kVector = 16 / sizeof(A);
  using Read = Chunk<T, kVector>;
  static constexpr bool kSymmetric = symmetric, kPlain = false, kWhole = whole;
  static constexpr int kSide = kTile / kPer, kGroups = kThreads / (kSide * kSide);
  static constexpr int kOperandBytes = 8192, kStep = kOperandBytes / (kTile * static_cast<int>(sizeof(A)));
  static constexpr int kPasses = 1, kResident = 2;
  static_assert(kPer % kVector == 0 && kStep % kGroups == 0);
  SST_DEVICE static Pass pass(int) { return {0, 0}; }

  SST_DEVICE static int offset(int k, int vector) { return 16 * (k * (kTile / kVector) + vector); }

  template <class Block, class F>
  SST_DEVICE static void store_part(Block& block, int t, int at, int k, int vector, int, F element) {
    Chunk<A, kVector> v;
    SST_UNROLL
    for (int i = 0; i < kVector; ++i) v.set(i, element(i));
    block.store(t, at + offset(k, vector), v);
  }

  // A thread's place in its group. Where a group is 16 × 16, a warp is 4 × 8 of it: a quarter of a warp, whose loads of
  // 16 bytes go together, then reads 128 adjacent bytes of q and one vector of p.
  SST_DEVICE static int across(int t) { return kSide == 16 ? t / kWarp % 2 * 8 + t % 8 : t % kSide; }
  SST_DEVICE static int down(int t) { return kSide == 16 ? t / kWarp / 2 * 4 + t % kWarp / 8 : t / kSide % kSide; }
  SST_DEVICE static int group(int t) { return t / (kSide * kSide); }

  struct Elements {
    A value[kPer][kPer];
  };
  template <class Block>
  struct Sums {
    Each<Block, Elements> c;
  };

  template <bool plain, class Block>
  SST_DEVICE static void multiply(Block& block, int p, int q, Sums<Block>& sums) {
    block.each([&](int t) {
      SST_UNROLL
      for (int i = 0; i < kStep / kGroups; ++i) {
        const int k = i * kGroups + group(t);
        Chunk<A, kVector> x[kPer / kVector], y[kPer / kVector];
        SST_UNROLL
        for (int v = 0; v < kPer / kVector; ++v) {
          x[v] = block.template load<Chunk<A, kVector>>(t, p + offset(k, v * kSide + down(t)));
          y[v] = block.template load<Chunk<A, kVector>>(t, q + offset(k, v * kSide + across(t)));
        }
        SST_UNROLL
        for (int r = 0; r < kPer; ++r) {
          SST_UNROLL
          for (int c = 0; c < kPer; ++c) {
            sums.c[t].value[r][c] += x[r / kVector][r % kVector] * y[c / kVector][c % kVector];
          }
        }
      }
    });
  }

  static constexpr int kRows = kPer, kCols = kPer;
  SST_DEVICE static int row(int t, int r) { return (r / kVector * kSide + down(t)) * kVector + r % kVector; }
  SST_DEVICE static int col(int t, int c) { return (c / kVector * kSide + across(t)) * kVector + c % kVector; }
  template <class Block>
  SST_DEVICE static A& at(Sums<Block>& sums, int t, int r, int c) {
    return sums.c[t].value[r][c];
  }
};

}  // namespace sst::cuda
