#include "syrk.h"

#include <algorithm>

#include "tile.h"

namespace sst {

namespace {

static_assert(kSyrkNarrow == kTileSide);

constexpr int64_t kTargetUnits = 64;
constexpr int64_t kLeastTokens = 4 * kTokens;

// A step has tokens enough that S is seldom read and written, and that threads seldom wait for each other, while what
// it packs stays near the size of the L3 cache: at least kLeastBlocks blocks of tokens, and as many more as fit.
constexpr int64_t kLeastBlocks = 8;
constexpr int64_t kCohortColumns = 4096;
// From this many columns on there are tiles enough of the larger size.
constexpr int64_t kManyTiles = 2048;

template <class T>
int64_t accumulate_unit(const Syrk<T>& args, const TriangleSchedule::Unit& unit, int64_t tile,
                        const TileScratch<Accumulator<T>>& scratch) {
  Rows<T> x = args.x;
  x.data += unit.member * args.x_batch_stride;
  return accumulate_tile(
      TileOperands<T>{.p = x.columns(unit.tile.row * tile, tile),
                      .q = x.columns(unit.tile.col * tile, tile),
                      .weight = args.weight ? args.weight + unit.member * args.weight_batch_stride : nullptr,
                      .tokens = unit.tokens,
                      .diagonal = unit.tile.row == unit.tile.col},
      scratch);
}

// f(row of S, row of c, width) for the rows of S inside a tile's part of the lower triangle.
template <class T, class F>
void for_rows(const Syrk<T>& args, int64_t member, BlockIndex place, int64_t tile, F f) {
  const int64_t row0 = place.row * tile, col0 = place.col * tile;
  for (int64_t i = row0; i < std::min(row0 + tile, args.x.cols); ++i) {
    f(args.s.row(member, i) + col0, i - row0, std::min(tile, i + 1 - col0));
  }
}

// S ← β S + α c on the tile's part of the lower triangle; rows of c are `stride` apart.
template <class T>
void store_tile(const Syrk<T>& args, int64_t member, BlockIndex place, int64_t tile, Accumulator<T> beta,
                const Accumulator<T>* c, int64_t stride) {
  const Accumulator<T> alpha = args.alpha;
  for_rows(args, member, place, tile, [&](Accumulator<T>* s, int64_t row, int64_t width) {
    const Accumulator<T>* const sum = c + row * stride;
    if (beta == 0) {
      for (int64_t j = 0; j < width; ++j) s[j] = alpha * sum[j];
    } else {
      for (int64_t j = 0; j < width; ++j) s[j] = beta * s[j] + alpha * sum[j];
    }
  });
}

template <class T>
int64_t panels(const SyrkSlab<T>& slab) {
  return ceil_div(slab.product->x.cols, kPanel);
}

// Elements of one block of tokens.
template <class T>
int64_t block_size(const SyrkSlab<T>& slab) {
  return panels(slab) * kPanelStride;
}

template <class T>
int64_t groups(const SyrkSlab<T>& slab) {
  return ceil_div(slab.product->x.cols, kTileSide);
}
template <class T>
int64_t tiles(const SyrkSlab<T>& slab) {
  return triangle_count(ceil_div(slab.product->x.cols, slab.tile));
}

// Block `index` of a step: its tokens, and where its operands lie, unweighted and weighted.
template <class T>
struct SlabBlock {
  TokenBlock<Accumulator<T>> tokens;
  int64_t q, p;

  SlabBlock(const SyrkSlab<T>& slab, int64_t step, int64_t index)
      : q(slab.packed + index * block_size(slab)), p(q + (slab.product->weight ? slab.blocks * block_size(slab) : 0)) {
    const int64_t begin = std::min((step * slab.blocks + index) * kTokens, slab.tokens);
    const auto* const weight = slab.product->weight;
    tokens = select_tokens(weight ? weight + slab.member * slab.product->weight_batch_stride : nullptr,
                           {begin, std::min(begin + kTokens, slab.tokens)});
    if (tokens.ones) p = q;
  }
};

template <class T>
const SyrkSlab<T>& slab_of(const SyrkCohort<T>& cohort, int64_t SyrkSlab<T>::* first, int64_t index) {
  const auto after = std::upper_bound(cohort.slabs.begin(), cohort.slabs.end(), index,
                                      [&](int64_t i, const SyrkSlab<T>& slab) { return i < slab.*first; });
  return *(after - 1);
}

template <class T>
bool takes_part(const SyrkSlab<T>& slab, int64_t step) {
  return step == 0 || step * slab.blocks * kTokens < slab.tokens;
}

// Sets all but the slabs' product, member, tokens and tile.
template <class T>
void lay_out(SyrkCohort<T>& cohort) {
  int64_t columns = 0, tokens = 1;
  for (const SyrkSlab<T>& slab : cohort.slabs) {
    columns += panels(slab) * kPanel;
    tokens = std::max(tokens, slab.tokens);
  }
  const int64_t all = ceil_div(tokens, kTokens);
  const int64_t blocks = std::min(all, std::max(kLeastBlocks, kLeastBlocks * kCohortColumns / columns));
  cohort.steps = ceil_div(all, blocks);
  for (SyrkSlab<T>& slab : cohort.slabs) {
    slab.blocks = blocks;
    slab.packed = cohort.workspace;
    slab.first_pack = cohort.pack_units;
    slab.first_tile = cohort.tile_units;
    cohort.workspace += block_size(slab) * blocks * (slab.product->weight ? 2 : 1);
    cohort.pack_units += groups(slab) * blocks;
    cohort.tile_units += tiles(slab);
  }
}

}  // namespace

GroupTotals schedule_syrk_cpu(TriangleSchedule* schedules, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    schedules[i].tile = std::clamp(ceil_div(schedules[i].d, kPanel) * kPanel, kPanel, kTileSide);
  }
  return schedule_group(schedules, count, kTargetUnits, kLeastTokens);
}

template <class T>
void syrk_units_cpu(const SyrkGroup<T>& group, std::atomic<int64_t>& next) {
  const TileScratch<Accumulator<T>> scratch;
  for (int64_t index = next++; index < group.totals.units; index = next++) {
    const int64_t i = find_schedule(group.schedules, group.count, &TriangleSchedule::first_unit, index);
    const Syrk<T>& product = group.products[i];
    const TriangleSchedule& schedule = group.schedules[i];
    const auto unit = schedule.unit(index - schedule.first_unit);
    const int64_t stride = accumulate_unit(product, unit, schedule.tile, scratch);
    if (schedule.splits == 1) {
      store_tile(product, unit.member, unit.tile, schedule.tile, product.beta, scratch.c, stride);
    } else {
      Accumulator<T>* const partial = group.workspace + schedule.partial(unit.member, unit.tile, unit.split);
      for_rows(product, unit.member, unit.tile, schedule.tile, [&](Accumulator<T>*, int64_t row, int64_t width) {
        std::copy_n(scratch.c + row * stride, width, partial + row * schedule.tile);
      });
    }
  }
}

template <class T>
void syrk_sum_cpu(const SyrkGroup<T>& group, std::atomic<int64_t>& next) {
  for (int64_t index = next++; index < group.totals.sums; index = next++) {
    const int64_t i = find_schedule(group.schedules, group.count, &TriangleSchedule::first_sum, index);
    const Syrk<T>& product = group.products[i];
    const TriangleSchedule& schedule = group.schedules[i];
    if (schedule.splits == 1) continue;
    const auto unit = schedule.sum(index - schedule.first_sum);
    const int64_t tile = schedule.tile;
    Accumulator<T>* const total = group.workspace + schedule.partial(unit.member, unit.tile, 0);
    for_rows(product, unit.member, unit.tile, tile, [&](Accumulator<T>*, int64_t row, int64_t width) {
      for (int64_t split = 1; split < schedule.splits; ++split) {
        const Accumulator<T>* const part = total + (split * tile + row) * tile;
        for (int64_t j = 0; j < width; ++j) total[row * tile + j] += part[j];
      }
    });
    store_tile(product, unit.member, unit.tile, tile, product.beta, total, tile);
  }
}

template <class T>
std::vector<SyrkCohort<T>> syrk_cohorts_cpu(const Syrk<T>* products, const TriangleSchedule* schedules, int64_t count) {
  std::vector<SyrkCohort<T>> cohorts;
  int64_t columns = kCohortColumns;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t d = schedules[i].d, tile = d < kManyTiles ? kTileSide / 2 : kTileSide;
    for (int64_t member = 0; member < schedules[i].members; ++member) {
      if (columns + d > kCohortColumns) {
        cohorts.push_back({});
        columns = 0;
      }
      cohorts.back().slabs.push_back(
          {.product = &products[i], .member = member, .tokens = schedules[i].tokens, .tile = tile});
      columns += d;
    }
  }
  for (SyrkCohort<T>& cohort : cohorts) lay_out(cohort);
  return cohorts;
}

template <class T>
void syrk_pack_cpu(const SyrkCohort<T>& cohort, int64_t step, Accumulator<T>* workspace, std::atomic<int64_t>& next) {
  for (int64_t index = next++; index < cohort.pack_units; index = next++) {
    const SyrkSlab<T>& slab = slab_of(cohort, &SyrkSlab<T>::first_pack, index);
    const int64_t unit = index - slab.first_pack, column = unit / slab.blocks * kTileSide;
    const SlabBlock<T> block(slab, step, unit % slab.blocks);
    Rows<T> x = slab.product->x.columns(column, kTileSide);
    x.data += slab.member * slab.product->x_batch_stride;
    Accumulator<T>* const out = workspace + column / kPanel * kPanelStride;
    pack_block(x, block.tokens, false, out + block.q);
    if (block.p != block.q) pack_block(x, block.tokens, true, out + block.p);
  }
}

template <class T>
void syrk_multiply_cpu(const SyrkCohort<T>& cohort, int64_t step, const Accumulator<T>* workspace,
                       std::atomic<int64_t>& next) {
  const TileScratch<Accumulator<T>> scratch;
  for (int64_t index = next++; index < cohort.tile_units; index = next++) {
    const SyrkSlab<T>& slab = slab_of(cohort, &SyrkSlab<T>::first_tile, index);
    if (!takes_part(slab, step)) continue;
    const BlockIndex place = triangle_block(index - slab.first_tile);
    const int64_t width = panels(slab) * kPanel, row = place.row * slab.tile, col = place.col * slab.tile;
    const TileSum<Accumulator<T>> sum{scratch.c, std::min(slab.tile, width - row), std::min(slab.tile, width - col),
                                      slab.tile, row == col};
    for (int64_t i = 0; i < slab.blocks; ++i) {
      const SlabBlock<T> block(slab, step, i);
      if (i > 0 && block.tokens.count == 0) continue;
      const auto operand = [&](int64_t at, int64_t column) { return workspace + at + column / kPanel * kPanelStride; };
      multiply_block<T>(operand(block.p, row), operand(block.q, col), block.tokens, sum, i > 0);
    }
    const Accumulator<T> beta = step == 0 ? slab.product->beta : Accumulator<T>(1);
    store_tile(*slab.product, slab.member, place, slab.tile, beta, sum.c, sum.stride);
  }
}

#define SST_INSTANTIATE(T)                                                                                \
  template void syrk_units_cpu(const SyrkGroup<T>&, std::atomic<int64_t>&);                               \
  template void syrk_sum_cpu(const SyrkGroup<T>&, std::atomic<int64_t>&);                                 \
  template std::vector<SyrkCohort<T>> syrk_cohorts_cpu(const Syrk<T>*, const TriangleSchedule*, int64_t); \
  template void syrk_pack_cpu(const SyrkCohort<T>&, int64_t, Accumulator<T>*, std::atomic<int64_t>&);     \
  template void syrk_multiply_cpu(const SyrkCohort<T>&, int64_t, const Accumulator<T>*, std::atomic<int64_t>&);
SST_INSTANTIATE(Half)
SST_INSTANTIATE(BFloat16)
SST_INSTANTIATE(float)
SST_INSTANTIATE(double)

}  // namespace sst
