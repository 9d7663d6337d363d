// The CUDA kernels of top_select.h, for a block of threads.
//
// histogram   Blocks share the values and a window of the digits, 16 bits of shared memory a digit, all 65536 where a
//             multiprocessor has 128 KiB. A counter that reaches 2¹⁵ is emptied into counts by the thread that brought
//             it there; a barrier before more than 2¹⁵ further values could come keeps it below 2¹⁶. The rest is added
//             at the end.
// mask        A block owns a unit. Ties are dealt to the units by one block, whose threads each own a run of units; a
//             unit's to its values by its block, whose threads each own a run of values.
#pragma once

#include "block.h"
#include "top_select.h"

namespace sst::cuda {

struct HistogramBlock {
  static constexpr int kThreads = 1024, kAhead = 8, kTile = kThreads * kAhead, kTiles = 4, kRound = kTile * kTiles;
  static constexpr uint32_t kFull = 1 << 15;
  static_assert(kFull - 1 + kRound < 1 << 16, "a counter does not overflow between two barriers");

  SST_HOST_DEVICE static int shared_bytes(int window) { return window * 2; }
};

struct MaskBlock {
  static constexpr int kThreads = 256, kRun = kMaskUnit / kThreads, kAhead = 8;
  static constexpr int kSharedBytes = 2 * kThreads * sizeof(int64_t);
};

template <class T, class Block>
SST_DEVICE void count_value(Block& block, const DigitHistogram<T>& args, int t, int64_t i, int low, int window) {
  const auto upper = args.upper(i);
  const int digit = static_cast<int>(upper % kDigits), j = digit - low;
  if ((args.digit > 0 && !args.matches(upper)) || j < 0 || j >= window) return;
  const int at = j / 2 * 4, shift = j % 2 * 16;
  if ((block.add(t, at, 1u << shift) >> shift & 0xFFFF) == HistogramBlock::kFull - 1) {
    block.add(t, at, ~(HistogramBlock::kFull << shift) + 1);
    add_global(args.counts + digit, HistogramBlock::kFull);
  }
}

// Counts the digits in [low, low + window) of every `blocks`-th round of values, from round `index` on.
template <class T, class Block>
SST_DEVICE void digit_histogram_block(Block& block, const DigitHistogram<T>& args, int low, int window, int64_t index,
                                      int64_t blocks) {
  using Size = HistogramBlock;
  block.each([&](int t) {
    for (int w = t; w < window / 2; w += Size::kThreads) block.store(t, 4 * w, uint32_t{0});
  });
  block.barrier();
  for (int64_t round = index * Size::kRound; round < args.n; round += blocks * Size::kRound) {
    block.each([&](int t) {
      for (int64_t first = round + t; first < least(round + Size::kRound, args.n); first += Size::kTile) {
        SST_UNROLL
        for (int i = 0; i < Size::kAhead; ++i) {
          const int64_t at = first + i * Size::kThreads;
          if (at < args.n) count_value(block, args, t, at, low, window);
        }
      }
    });
    block.barrier();
  }
  block.each([&](int t) {
    for (int w = t; w < window / 2; w += Size::kThreads) {
      const uint32_t both = block.template load<uint32_t>(t, 4 * w);
      for (int half = 0; half < 2; ++half) {
        const int64_t count = both >> 16 * half & 0xFFFF;
        if (count) add_global(args.counts + low + 2 * w + half, count);
      }
    }
  });
}

template <class T, class Block>
SST_DEVICE void mask_above_unit(Block& block, const ThresholdMask<T>& args, int64_t unit) {
  block.each([&](int t) {
    if (t == 0) block.store(t, 0, uint32_t{0});
  });
  block.barrier();
  block.each([&](int t) {
    const int64_t begin = unit * kMaskUnit, end = least(begin + kMaskUnit, args.n);
    uint32_t ties = 0;
    for (int64_t first = begin + t; first < end; first += MaskBlock::kThreads * MaskBlock::kAhead) {
      SST_UNROLL
      for (int i = 0; i < MaskBlock::kAhead; ++i) {
        const int64_t at = first + i * MaskBlock::kThreads;
        if (at >= end) continue;
        const auto value = widen(args.values[at]);
        args.mask[at] = value > args.threshold;
        ties += value == args.threshold;
      }
    }
    if (ties) block.add(t, 0, ties);
  });
  block.barrier();
  block.each([&](int t) {
    if (t == 0) args.unit_ties[unit] = block.template load<uint32_t>(t, 0);
  });
}

// before[t] ← Σ_{s < t} value[s] over the threads of a MaskBlock (Hillis and Steele 1986); returns nothing else.
template <class Block>
SST_DEVICE void sum_before(Block& block, const Each<Block, int64_t>& value, Each<Block, int64_t>& before) {
  constexpr int kThreads = MaskBlock::kThreads;
  const auto place = [](int side, int t) { return (side * kThreads + t) * static_cast<int>(sizeof(int64_t)); };
  block.each([&](int t) { block.store(t, place(0, t), value[t]); });
  block.barrier();
  int side = 0;
  for (int step = 1; step < kThreads; step *= 2, side = 1 - side) {
    block.each([&](int t) {
      int64_t sum = block.template load<int64_t>(t, place(side, t));
      if (t >= step) sum += block.template load<int64_t>(t, place(side, t - step));
      block.store(t, place(1 - side, t), sum);
    });
    block.barrier();
  }
  block.each([&](int t) { before[t] = block.template load<int64_t>(t, place(side, t)) - value[t]; });
}

template <class T, class Block>
SST_DEVICE void deal_ties(Block& block, const ThresholdMask<T>& args) {
  const int64_t units = mask_units(args.n), run = ceil_div(units, MaskBlock::kThreads);
  Each<Block, int64_t> found, before, given;
  block.each([&](int t) {
    given[t] = *args.ties > 0 ? *args.ties : 0;
    found[t] = 0;
    for (int64_t u = t * run; u < least((t + 1) * run, units); ++u) found[t] += args.unit_ties[u];
  });
  sum_before(block, found, before);  // its barriers order the reads of *ties before its change
  block.each([&](int t) {
    int64_t left = given[t] > before[t] ? given[t] - before[t] : 0;
    for (int64_t u = t * run; u < least((t + 1) * run, units); ++u) {
      const int64_t kept = least(args.unit_ties[u], left);
      args.unit_ties[u] = kept;
      left -= kept;
    }
    if (t == MaskBlock::kThreads - 1) *args.ties = left;
  });
}

template <class T, class Block>
SST_DEVICE void mask_ties_unit(Block& block, const ThresholdMask<T>& args, int64_t unit) {
  const int64_t kept = args.unit_ties[unit];
  if (kept == 0) return;
  const auto run = [&](int t, auto visit) {
    const int64_t begin = unit * kMaskUnit + t * MaskBlock::kRun;
    for (int64_t i = begin; i < least(begin + MaskBlock::kRun, args.n); ++i) {
      if (widen(args.values[i]) == args.threshold) visit(i);
    }
  };
  Each<Block, int64_t> found, before;
  block.each([&](int t) {
    found[t] = 0;
    run(t, [&](int64_t) { ++found[t]; });
  });
  sum_before(block, found, before);
  block.each([&](int t) {
    int64_t rank = before[t];
    if (rank < kept) {
      run(t, [&](int64_t i) {
        if (rank++ < kept) args.mask[i] = 1;
      });
    }
  });
}

}  // namespace sst::cuda
