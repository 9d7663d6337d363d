// A tile of Pᵀ diag(w) Q by a block of threads: the one inner loop of the CUDA kernels (tile.h is the CPU's).
//
// The tokens are taken kStep at a time. Each thread reads its chunks of a step into registers, which allows any stride,
// any alignment, missing columns and rows of weight 0; from there they go to shared memory, in the form that the engine
// (block_mma.h, block_simt.h) multiplies. There are two buffers, so that one barrier a step is enough; the next step's
// chunks are on their way while this one is multiplied.
// Groups of threads that each summed the whole tile for their share of the tokens are added in order at the end.
#pragma once

#include "block.h"
#include "block_mma.h"

namespace sst::cuda {

// Columns of two matrices for a range of tokens.
template <class T>
struct Operand {
  const T* data;  // element (t, j) at data[t · stride + j]
  int64_t stride;
  int cols;  // Engine::kTile at most

  SST_DEVICE Operand(const Rows<T>& x, int64_t col, int tile)
      : data(x.data + col), stride(x.stride), cols(static_cast<int>(least(x.cols - col, tile))) {}
};
template <class T>
struct Operands {
  Operand<T> p, q;
  const Accumulator<T>* weight;  // or null for ones; a token of weight 0 counts as zeros, whatever it holds
  Range tokens;
  bool diagonal;  // p is q
};

// One thread's share of a step: chunk column(t) of kCount tokens.
template <class Engine>
struct Share {
  using Read = typename Engine::Read;
  static constexpr int kRow = Engine::kTile / Read::kElements;
  static constexpr int kCount = Engine::kStep * kRow / Engine::kThreads;
  static constexpr int kCountQ = Engine::kSymmetric ? 1 : kCount;
  static_assert(kCount * Engine::kThreads == Engine::kStep * kRow && Engine::kThreads % kRow == 0);

  SST_DEVICE static int column(int t) { return t % kRow; }
  SST_DEVICE static int token(int t, int i) { return i * (Engine::kThreads / kRow) + t / kRow; }

  // Rows beyond the tokens (weight 0) and columns beyond the matrix (of sums that are not wanted) hold anything.
  Read p[kCount], q[kCountQ];  // q: unless it is p
  typename Engine::A weight[kCount];

  SST_DEVICE void load(const Operands<typename Engine::T>& x, int64_t first, int t) {
    const int left = static_cast<int>(least(x.tokens.end - first, Engine::kStep));
    load_operand(x.p, first, left, t, p);
    if constexpr (!Engine::kSymmetric) {
      if (!x.diagonal) load_operand(x.q, first, left, t, q);
    }
    SST_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const int k = token(t, i);
      weight[i] = k < left ? (x.weight ? x.weight[first + k] : 1) : 0;
    }
  }

  // The first `left` tokens from `first` on exist.
  SST_DEVICE static void load_operand(const Operand<typename Engine::T>& x, int64_t first, int left, int t,
                                      Read* chunks) {
    const auto* const rows = x.data + first * x.stride;
    SST_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const int64_t k = token(t, i) < left ? token(t, i) : left - 1;
      chunks[i] = load_chunk<Engine::kWhole, Read>(rows + k * x.stride, column(t) * Read::kElements, x.cols);
    }
  }

  SST_DEVICE bool weighted() const {
    bool any = false;
    SST_UNROLL
    for (int i = 0; i < kCount; ++i) any = any || (weight[i] != 0 && weight[i] != 1);
    return any;
  }
};

// The loop over steps, with its two buffers in shared memory.
template <class Engine, class Block>
struct TileLoop {
  using T = typename Engine::T;
  using A = typename Engine::A;
  static constexpr int kBufferBytes = 2 * Engine::kOperandBytes;

  Block& block;
  const Operands<T>& x;
  Each<Block, Share<Engine>> share;
  int buffer = 0;  // the one to be written next

  SST_DEVICE int p_at() const { return buffer * kBufferBytes; }
  SST_DEVICE int q_at() const { return buffer * kBufferBytes + Engine::kOperandBytes; }

  // Read element by element, chunks on their way take a register an element: such loads do not run ahead, but come
  // right before they are stored.
  SST_DEVICE void load_ahead(int64_t next) {
    if constexpr (Engine::kWhole) load(next);
  }
  SST_DEVICE void load_late(int64_t first) {
    if constexpr (!Engine::kWhole) load(first);
  }
  SST_DEVICE void load(int64_t first) {
    if (first >= x.tokens.end) return;
    block.each([&](int t) { share[t].load(x, first, t); });
  }

  // Chunk i of q.
  SST_DEVICE typename Engine::Read other(const Share<Engine>& mine, int i) const {
    if constexpr (!Engine::kSymmetric) {
      if (!x.diagonal) return mine.q[i];
    }
    return mine.p[i];
  }

  // Elements as they are, weights being 0 or 1.
  SST_DEVICE void store_plain() {
    block.each([&](int t) {
      const Share<Engine>& mine = share[t];
      SST_UNROLL
      for (int i = 0; i < Share<Engine>::kCount; ++i) {
        const int k = mine.token(t, i), column = mine.column(t);
        Engine::store_plain(block, t, p_at(), k, column, mine.p[i], mine.weight[i]);
        if constexpr (!Engine::kSymmetric) {
          if (!x.diagonal) Engine::store_plain(block, t, q_at(), k, column, mine.q[i], mine.weight[i]);
        }
      }
    });
  }

  // Whether p and q are stored alike in a pass.
  SST_DEVICE bool alike(Pass pass) const { return x.diagonal && !x.weight && pass.p == pass.q; }

  SST_DEVICE void store_pass(Pass pass) {
    block.each([&](int t) {
      const Share<Engine>& mine = share[t];
      SST_UNROLL
      for (int i = 0; i < Share<Engine>::kCount; ++i) {
        const int k = mine.token(t, i), column = mine.column(t);
        const A w = mine.weight[i];
        Engine::store_part(block, t, p_at(), k, column, pass.p,
                           [&](int e) { return w != 0 ? w * widen(mine.p[i][e]) : A(0); });
        if (alike(pass)) continue;
        const auto q = other(mine, i);
        Engine::store_part(block, t, q_at(), k, column, pass.q, [&](int e) { return w != 0 ? widen(q[e]) : A(0); });
      }
    });
  }

  // The step from `first` on, if its weights are 0 or 1; else false, and nothing is done.
  SST_DEVICE bool plain_step(int64_t first, typename Engine::template Sums<Block>& sums) {
    if constexpr (Engine::kPlain) {
      load_late(first);
      store_plain();
      bool weighted = false;
      if (x.weight) {
        weighted = block.barrier_any([&](int t) { return share[t].weighted(); });
      } else {
        block.barrier();
      }
      if (!weighted) {
        load_ahead(first + Engine::kStep);
        Engine::template multiply<true>(block, p_at(), x.diagonal ? p_at() : q_at(), sums);
      }
      buffer ^= 1;
      return !weighted;
    }
    return false;
  }

  SST_DEVICE void step_by_parts(int64_t first, typename Engine::template Sums<Block>& sums) {
    for (int i = 0; i < Engine::kPasses; ++i) {
      const Pass pass = Engine::pass(i);
      load_late(first);
      store_pass(pass);
      block.barrier();
      if (i + 1 == Engine::kPasses) load_ahead(first + Engine::kStep);
      Engine::template multiply<false>(block, p_at(), alike(pass) ? p_at() : q_at(), sums);
      buffer ^= 1;
    }
  }
};

template <class Engine>
constexpr int kTilePitch = Engine::kTile + 8;  // of the tile in shared memory, in elements

template <class Engine>
constexpr int kSharedBytes = Engine::kGroups > 1 && kTilePitch<Engine>* Engine::kTile * sizeof(typename Engine::A) >
                                                        4 * Engine::kOperandBytes
                                 ? kTilePitch<Engine> * Engine::kTile * sizeof(typename Engine::A)
                                 : 4 * Engine::kOperandBytes;

// sums = Σ_t w_t p_t q_tᵀ.
template <class Engine, class Block>
SST_DEVICE void accumulate_tile(Block& block, const Operands<typename Engine::T>& x,
                                typename Engine::template Sums<Block>& sums) {
  block.each([&](int t) {
    SST_UNROLL
    for (int r = 0; r < Engine::kRows; ++r) {
      SST_UNROLL
      for (int c = 0; c < Engine::kCols; ++c) Engine::at(sums, t, r, c) = 0;
    }
  });
  TileLoop<Engine, Block> loop{block, x, {}};
  loop.load_ahead(x.tokens.begin);
  for (int64_t first = x.tokens.begin; first < x.tokens.end; first += Engine::kStep) {
    if (!loop.plain_step(first, sums)) loop.step_by_parts(first, sums);
  }
}

// Where a tile goes: element (r, c), c < width(r), becomes beta · what row(r)[c] holds + alpha · sum.
// Many old values are asked for at a time: each is a journey to memory.
template <class Engine, class Block, class Output>
SST_DEVICE void write_own_elements(Block& block, typename Engine::template Sums<Block>& sums, const Output& output) {
  using A = typename Engine::A;
  constexpr int kBatch = 4;
  block.each([&](int t) {
    SST_UNROLL
    for (int r0 = 0; r0 < Engine::kRows; r0 += kBatch) {
      const auto visit = [&](auto f) {
        SST_UNROLL
        for (int r = 0; r < kBatch; ++r) {
          const int row = Engine::row(t, r0 + r), width = output.width(row);
          A* const out = output.row(row);
          SST_UNROLL
          for (int c = 0; c < Engine::kCols; ++c) {
            if (Engine::col(t, c) < width) f(r, c, out[Engine::col(t, c)]);
          }
        }
      };
      A old[kBatch][Engine::kCols] = {};
      if (output.beta != 0) visit([&](int r, int c, A& s) { old[r][c] = s; });
      visit([&](int r, int c, A& s) { s = output.beta * old[r][c] + output.alpha * Engine::at(sums, t, r0 + r, c); });
    }
  });
}

// The groups' sums, added in shared memory in the order of the groups.
template <class Engine, class Block>
SST_DEVICE void add_groups(Block& block, typename Engine::template Sums<Block>& sums) {
  using A = typename Engine::A;
  block.barrier();  // the operands are read no more
  for (int group = 0; group < Engine::kGroups; ++group) {
    block.each([&](int t) {
      if (Engine::group(t) != group) return;
      SST_UNROLL
      for (int r = 0; r < Engine::kRows; ++r) {
        SST_UNROLL
        for (int c = 0; c < Engine::kCols; ++c) {
          const int at = (Engine::row(t, r) * kTilePitch<Engine> + Engine::col(t, c)) * static_cast<int>(sizeof(A));
          const A sum = Engine::at(sums, t, r, c);
          block.store(t, at, group == 0 ? sum : block.template load<A>(t, at) + sum);
        }
      }
    });
    block.barrier();
  }
}

template <class Engine, class Block, class Output>
SST_DEVICE void write_tile(Block& block, typename Engine::template Sums<Block>& sums, const Output& output) {
  using A = typename Engine::A;
  if constexpr (Engine::kGroups == 1) {
    write_own_elements<Engine>(block, sums, output);
  } else {
    add_groups<Engine>(block, sums);
    block.each([&](int t) {
      for (int i = t; i < Engine::kTile * Engine::kTile; i += Engine::kThreads) {
        const int row = i / Engine::kTile, col = i % Engine::kTile;
        const int at = (row * kTilePitch<Engine> + col) * static_cast<int>(sizeof(A));
        if (col >= output.width(row)) continue;
        A& s = output.row(row)[col];
        s = (output.beta == 0 ? 0 : output.beta * s) + output.alpha * block.template load<A>(t, at);
      }
    });
  }
}

}  // namespace sst::cuda
