// The CUDA kernels of syrk.h, for a block of threads: a unit, and the sum of a split tile's partial tiles.
//
// Launches    one for each engine (block_mma.h, block_simt.h) that the group needs, by tile and alignment, and one for
//             the sums if there are any. Descriptors travel as kernel parameters: nothing is copied to the device,
//             nothing waits, and a CUDA graph may hold the launches. Parameters may take 4 KiB on every device and
//             driver (32 KiB need CUDA 12.1 and driver 530): 25 products; more take several launches.
// Tiles       16, 32, 64 for products of as many columns, else 128 (float64: 64).
// Memory      32 KiB of shared memory at most; 255 registers a thread at most, none spilled.
#pragma once

#include <type_traits>

#include "block_mma.h"
#include "block_simt.h"
#include "block_tile.h"
#include "syrk.h"

namespace sst::cuda {

// A multiprocessor holds two blocks with the largest tiles (64 Ki registers), so that these are two waves of them on
// the devices of today. A unit of fewer tokens would spend more on its partial tile than on its products (by
// arithmetic; not measured).
constexpr int64_t kSyrkTargetUnits = 512;
constexpr int64_t kSyrkLeastTokens = 512;

template <class T>
int64_t syrk_tile(int64_t d) {
  constexpr int64_t kMost = std::is_same_v<T, double> ? 64 : 128;
  int64_t tile = 16;
  while (tile < d && tile < kMost) tile *= 2;
  return tile;
}

// Calls visit(EngineTag) for the engines that take all products between them. Small tiles are bound by memory: of the
// precisions that tensor cores have, the more exact one serves both.
template <class T, bool whole, class Visit>
void for_each_syrk_engine(Precision precision, Visit visit) {
  if constexpr (std::is_same_v<T, double>) {
    visit(EngineTag<Simt<T, 16, true, whole>>());
    visit(EngineTag<Simt<T, 32, true, whole>>());
    visit(EngineTag<Simt<T, 64, false, whole>>());
  } else {
    if constexpr (std::is_same_v<T, float>) {
      if (precision == Precision::ieee) {
        visit(EngineTag<Simt<T, 16, true, whole>>());
        visit(EngineTag<Simt<T, 32, true, whole>>());
        visit(EngineTag<Simt<T, 64, true, whole>>());
        return visit(EngineTag<Simt<T, 128, false, whole>>());
      }
    }
    visit(EngineTag<Mma16<T, 16, whole>>());
    visit(EngineTag<Mma16<T, 32, whole>>());
    visit(EngineTag<Mma16<T, 64, whole>>());
    if constexpr (std::is_same_v<T, float>) {
      if (precision == Precision::tf32) return visit(EngineTag<MmaTf32<whole>>());
    }
    visit(EngineTag<Mma16<T, 128, whole>>());
  }
}

template <class T>
struct SyrkLaunch {
  static constexpr int64_t kMost = (4096 - 64) / (sizeof(Syrk<T>) + sizeof(TriangleSchedule));

  Syrk<T> products[kMost];
  TriangleSchedule schedules[kMost];  // first_unit and first_sum count through this launch
  Accumulator<T>* workspace;
  int64_t count, blocks;  // products; blocks of threads, a unit or some rows of a sum each
};
static_assert(sizeof(SyrkLaunch<float>) + sizeof(int64_t) <= 4096 &&
              sizeof(SyrkLaunch<double>) + sizeof(int64_t) <= 4096);

// Calls launch(SyrkLaunch) until all of a group's products are covered. blocks_of(product, schedule) is how many blocks
// a product takes, 0 to leave it out; they are counted by `first`.
template <class T, class BlocksOf, class Launch>
void for_each_launch(const SyrkGroup<T>& group, int64_t TriangleSchedule::* first, BlocksOf blocks_of, Launch launch) {
  SyrkLaunch<T> part;
  part.workspace = group.workspace;
  part.count = part.blocks = 0;
  for (int64_t i = 0; i < group.count; ++i) {
    const int64_t blocks = blocks_of(group.products[i], group.schedules[i]);
    if (blocks > 0) {
      part.products[part.count] = group.products[i];
      part.schedules[part.count] = group.schedules[i];
      part.schedules[part.count++].*first = part.blocks;
      part.blocks += blocks;
    }
    if (part.count > 0 && (part.count == SyrkLaunch<T>::kMost || i + 1 == group.count)) {
      launch(part);
      part.count = part.blocks = 0;
    }
  }
}

// A tile's place in S, or its partial tile in the workspace, as write_tile takes it.
template <class A>
struct SyrkOutput {
  LowerTriangle<A> to;
  int64_t member, row0, col0, d, tile;
  bool is_partial;
  A alpha, beta;

  SST_DEVICE int width(int r) const { return row0 + r < d ? static_cast<int>(clamp(row0 + r + 1 - col0, 0, tile)) : 0; }
  SST_DEVICE A* row(int r) const { return is_partial ? to.data + r * tile : to.row(member, row0 + r) + col0; }
};

// `partial`: null for S.
template <class T>
SST_DEVICE SyrkOutput<Accumulator<T>> syrk_output(const Syrk<T>& product, const TriangleSchedule& schedule,
                                                  const TriangleSchedule::Unit& unit, Accumulator<T>* partial) {
  const int64_t row0 = unit.tile.row * schedule.tile, col0 = unit.tile.col * schedule.tile;
  if (partial) return {{partial, 0, 0}, 0, row0, col0, schedule.d, schedule.tile, true, 1, 0};
  return {product.s, unit.member, row0, col0, schedule.d, schedule.tile, false, product.alpha, product.beta};
}

// The units that Engine takes: products of its tile, whose rows hold_chunks if it needs them to.
template <class Engine>
int64_t unit_blocks(const Syrk<typename Engine::T>& product, const TriangleSchedule& schedule) {
  const bool whole = holds_chunks<typename Engine::Read>(product.x, product.x_batch_stride);
  return schedule.tile == Engine::kTile && whole == Engine::kWhole ? schedule.units() : 0;
}

template <class Engine, class Block>
SST_DEVICE void syrk_unit(Block& block, const SyrkLaunch<typename Engine::T>& launch, int64_t index) {
  using T = typename Engine::T;
  const int64_t i = find_schedule(launch.schedules, launch.count, &TriangleSchedule::first_unit, index);
  const Syrk<T>& product = launch.products[i];
  const TriangleSchedule& schedule = launch.schedules[i];
  const TriangleSchedule::Unit unit = schedule.unit(index - schedule.first_unit);
  Rows<T> x = product.x;
  x.data += unit.member * product.x_batch_stride;
  const Operands<T> operands{{x, unit.tile.row * Engine::kTile, Engine::kTile},
                             {x, unit.tile.col * Engine::kTile, Engine::kTile},
                             product.weight ? product.weight + unit.member * product.weight_batch_stride : nullptr,
                             unit.tokens,
                             unit.tile.row == unit.tile.col};
  typename Engine::template Sums<Block> sums;
  accumulate_tile<Engine>(block, operands, sums);
  Accumulator<T>* const partial =
      schedule.splits > 1 ? launch.workspace + schedule.partial(unit.member, unit.tile, unit.split) : nullptr;
  write_tile<Engine>(block, sums, syrk_output(product, schedule, unit, partial));
}

// Sums of partial tiles: a block of 8 warps takes 8 rows of a tile, or, of a tile in many splits, one: each warp then
// sums every eighth split, and the eight sums are added in order.
struct SyrkSums {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp, kManySplits = 16, kMostTile = 128;

  SST_HOST_DEVICE static int groups(const TriangleSchedule& schedule) {
    return schedule.splits < kManySplits ? 1 : kWarps;
  }
  SST_HOST_DEVICE static int64_t bands(const TriangleSchedule& schedule) {
    return schedule.tile * groups(schedule) / kWarps;
  }
  template <class A>
  static constexpr int kSharedBytes = kWarps * kMostTile * sizeof(A);
};

template <class T>
int64_t sum_blocks(const Syrk<T>&, const TriangleSchedule& schedule) {
  return schedule.splits > 1 ? schedule.sums() * SyrkSums::bands(schedule) : 0;
}

template <class T, class Block>
SST_DEVICE void syrk_sum(Block& block, const SyrkLaunch<T>& launch, int64_t index) {
  using A = Accumulator<T>;
  constexpr int kRowBytes = SyrkSums::kMostTile * sizeof(A);
  const int64_t i = find_schedule(launch.schedules, launch.count, &TriangleSchedule::first_sum, index);
  const Syrk<T>& product = launch.products[i];
  const TriangleSchedule& schedule = launch.schedules[i];
  const int64_t bands = SyrkSums::bands(schedule), local = index - schedule.first_sum, tile = schedule.tile;
  const int groups = SyrkSums::groups(schedule);
  const int row0 = static_cast<int>(local % bands) * (SyrkSums::kWarps / groups);
  const TriangleSchedule::Unit unit = schedule.sum(local / bands);
  const A* const partials = launch.workspace + schedule.partial(unit.member, unit.tile, 0);
  const SyrkOutput<A> output = syrk_output<T>(product, schedule, unit, nullptr);

  block.each([&](int t) {
    const int warp = t / kWarp, row = row0 + warp / groups, width = output.width(row);
    for (int col = t % kWarp; col < width; col += kWarp) {
      A sum = 0;
      const A* from = partials + row * tile + col;
      for (int64_t split = warp % groups; split < schedule.splits; split += groups) sum += from[split * tile * tile];
      block.store(t, warp * kRowBytes + col * static_cast<int>(sizeof(A)), sum);
    }
  });
  block.barrier();
  block.each([&](int t) {
    const int warp = t / kWarp, row = row0 + warp / groups, width = output.width(row);
    if (warp % groups != 0) return;
    for (int col = t % kWarp; col < width; col += kWarp) {
      A sum = 0;
      for (int g = 0; g < groups; ++g) {
        sum += block.template load<A>(t, (warp + g) * kRowBytes + col * static_cast<int>(sizeof(A)));
      }
      A& s = output.row(row)[col];
      s = (output.beta == 0 ? 0 : output.beta * s) + output.alpha * sum;
    }
  });
}

}  // namespace sst::cuda
