// The CUDA kernel of khatri_rao.h, for a block of threads: it owns a square tile of one out[s].
#pragma once

#include <type_traits>

#include "block_simt.h"
#include "block_tile.h"
#include "khatri_rao.h"

namespace sst::cuda {

// A tile's place in out, as write_tile takes it.
template <class A>
struct KhatriRaoOutput {
  A* first;
  int64_t stride;
  int height, breadth;  // of the part inside out
  A alpha = 1, beta = 0;

  SST_DEVICE int width(int r) const { return r < height ? breadth : 0; }
  SST_DEVICE A* row(int r) const { return first + r * stride; }
};

template <class Engine>
SST_HOST_DEVICE int64_t khatri_rao_tiles(const KhatriRao<typename Engine::T>& args) {
  return ceil_div(args.b.cols, Engine::kTile) * ceil_div(args.a.cols, Engine::kTile);
}

// Calls visit(EngineTag) for the engine that takes all of it: the smallest tile that holds out[s], 64 × 64 at most.
template <class T, class Visit>
void visit_khatri_rao_engine(const KhatriRao<T>& args, Visit visit) {
  const auto by_size = [&](auto whole) {
    const int64_t size = args.a.cols > args.b.cols ? args.a.cols : args.b.cols;
    if (size <= 16) return visit(EngineTag<Simt<T, 16, false, whole.value>>());
    if (size <= 32) return visit(EngineTag<Simt<T, 32, false, whole.value>>());
    visit(EngineTag<Simt<T, 64, false, whole.value, 4>>());
  };
  using Read = typename Simt<T, 16, false, true>::Read;
  if (holds_chunks<Read>(args.a, 0) && holds_chunks<Read>(args.b, 0)) return by_size(std::true_type());
  by_size(std::false_type());
}

template <class Engine, class Block>
SST_DEVICE void khatri_rao_unit(Block& block, const KhatriRao<typename Engine::T>& args, int64_t index) {
  const int64_t tiles = khatri_rao_tiles<Engine>(args), across = ceil_div(args.a.cols, Engine::kTile);
  const int64_t s = index / tiles, row0 = index % tiles / across * Engine::kTile;
  const int64_t col0 = index % tiles % across * Engine::kTile;
  const Operands<typename Engine::T> operands{{args.b, row0, Engine::kTile},
                                              {args.a, col0, Engine::kTile},
                                              args.weight,
                                              sequence_range(args.offsets, s, args.tokens),
                                              false};
  typename Engine::template Sums<Block> sums;
  accumulate_tile<Engine>(block, operands, sums);
  const KhatriRaoOutput<typename Engine::A> output{args.out + (s * args.b.cols + row0) * args.a.cols + col0,
                                                   args.a.cols, operands.p.cols, operands.q.cols};
  write_tile<Engine>(block, sums, output);
}

}  // namespace sst::cuda
