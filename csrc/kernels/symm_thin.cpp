#include "symm_thin.h"

#include <algorithm>

#include "symm_thin_tile.h"
#include "wait.h"

namespace sst {

namespace {

// Rows of a block: a tile of A fits the L2 cache, where each group of columns after the first finds it.
constexpr int64_t kBlock = 256;
// Members are worked on together until their panels have this many elements.
constexpr int64_t kCohortElements = 1 << 16;

template <class T>
struct View {
  T* data;
  int64_t row_stride, col_stride;
};

template <class T>
void fill_columns(Range rows, Range cols, const View<T>& to, T value) {
  if (to.col_stride == 1 && cols.begin == 0) {
    return void(std::fill(to.data + rows.begin * to.row_stride, to.data + rows.end * to.row_stride, value));
  }
  for (int64_t c = cols.begin; c < cols.end; ++c) {
    for (int64_t i = rows.begin; i < rows.end; ++i) to.data[c * to.col_stride + i * to.row_stride] = value;
  }
}

// Calls visit(first column, columns, strides) for the panels of m columns, and returns how many columns they have.
template <class T, class Visit>
int64_t for_panels(int set, int64_t m, int64_t stride, const Visit& visit) {
  int64_t padded = 0;
  by_set(set, [&]<int Bytes, int Rows>() {
    padded = for_groups<Bytes, Rows, T>(m, [&]<class Group>(int64_t col) {
      visit(col, Group::kCols, Group::kByColumns ? View<T>{nullptr, 1, stride} : View<T>{nullptr, Group::kCols, 1});
    });
  });
  return padded;
}

// In bands of rows, lest each of many far-apart columns cost a cache line an element.
template <class T>
void copy_columns(Range rows, int64_t cols, const View<const T>& from, const View<T>& to) {
  constexpr int64_t band = 16;
  for (int64_t first = rows.begin; first < rows.end; first += band) {
    const int64_t end = std::min(first + band, rows.end);
    for (int64_t c = 0; c < cols; ++c) {
      const T* const source = from.data + c * from.col_stride;
      T* const target = to.data + c * to.col_stride;
      for (int64_t i = first; i < end; ++i) target[i * to.row_stride] = source[i * from.row_stride];
    }
  }
}

// Of a panel, by one cache line more than needed, lest columns lie a power of two apart.
template <class T>
int64_t panel_stride(int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  return (ceil_div(n, line) + 1) * line;
}

int64_t block_rows(int64_t n) { return clamp(ceil_div(ceil_div(n, 4), 32) * 32, 64, kBlock); }

}  // namespace

BlockIndex Pairing::pair(int64_t round, int64_t index) const {
  if (round == 0) return {index, index};
  // The circle method: the last of an even number of players stays, the others move on by one each round.
  const int64_t circle = 2 * pairs() - 1;
  const int64_t one = (round + index) % circle, other = index == 0 ? circle : (round + circle - index) % circle;
  return {std::max(one, other), std::min(one, other)};
}

template <class T>
SymmThinCpu<T>::SymmThinCpu(const SymmThin<T>& product, int64_t threads, int set)
    : product_(product),
      set_(set),
      block_(block_rows(product.n)),
      stride_(panel_stride<T>(product.n)),
      pairing_{ceil_div(product.n, block_)} {
  padded_ = for_panels<T>(set, product.m, stride_, [](int64_t, int64_t, View<T>) {});
  member_size_ = stride_ * padded_ * (1 + product.matrices);
  const int64_t busy = ceil_div(2 * threads, std::max<int64_t>(pairing_.pairs(), 1));
  members_ = std::min(product.members, std::max(busy, kCohortElements / std::max<int64_t>(member_size_, 1)));
  rounds_done_ = std::make_unique<std::atomic<int64_t>[]>(members_ * pairing_.blocks);
}

template <class T>
struct SymmThinCpu<T>::Unit {
  int64_t member, round;
  BlockIndex tile;
};

// Round by round, and in a round member by member.
template <class T>
typename SymmThinCpu<T>::Unit SymmThinCpu<T>::unit(int64_t index, int64_t members) const {
  const int64_t diagonal = members * pairing_.blocks;
  if (index < diagonal) {
    return {index / pairing_.blocks, 0, pairing_.pair(0, index % pairing_.blocks)};
  }
  const int64_t pairs = pairing_.pairs(), rest = (index - diagonal) / pairs, round = 1 + rest / members;
  return {rest % members, round, pairing_.pair(round, (index - diagonal) % pairs)};
}

template <class T>
void SymmThinCpu<T>::pack(int64_t first, T* workspace, std::atomic<int64_t>& next) {
  const int64_t members = count(first);
  for (int64_t index = next++; index < members * pairing_.blocks; index = next++) {
    const int64_t member = index / pairing_.blocks;
    const Range rows = this->rows(index % pairing_.blocks);
    T* const panels = workspace + member * member_size_;
    for_panels<T>(set_, product_.m, stride_, [&](int64_t col, int64_t cols, View<T> panel) {
      const int64_t present = std::min(cols, product_.m - col);
      panel.data = panels + col * stride_;
      copy_columns<T>(rows, present, {product_.x.at(first + member, col), product_.x.row_stride, product_.x.col_stride},
                      panel);
      fill_columns(rows, {present, cols}, panel, T(0));
      for (int64_t k = 1; k <= product_.matrices; ++k) {
        panel.data = panels + (k * padded_ + col) * stride_;
        fill_columns(rows, {0, cols}, panel, T(0));
      }
    });
    rounds_done_[index].store(0, std::memory_order_relaxed);
  }
}

template <class T>
void SymmThinCpu<T>::multiply(int64_t first, T* workspace, std::atomic<int64_t>& next) {
  const int64_t members = count(first);
  for (int64_t index = next++; index < members * pairing_.units(); index = next++) {
    const Unit unit = this->unit(index, members);
    std::atomic<int64_t>* const done = rounds_done_.get() + unit.member * pairing_.blocks;
    T* const panels = workspace + unit.member * member_size_;
    for_blocks(unit.tile, [&](int64_t block) {
      wait_until([&] { return done[block].load(std::memory_order_acquire) == unit.round; });
    });
    if (unit.tile.row < pairing_.blocks) multiply_unit(first + unit.member, unit.tile, panels);
    for_blocks(unit.tile, [&](int64_t block) {
      if (unit.round + 1 == pairing_.rounds()) unpack(first + unit.member, block, panels);
      done[block].store(unit.round + 1, std::memory_order_release);
    });
  }
}

template <class T>
void SymmThinCpu<T>::multiply_unit(int64_t member, BlockIndex tile, T* panels) const {
  const Range rows = this->rows(tile.row), cols = this->rows(tile.col);
  by_set(set_, [&]<int Bytes, int Rows>() __attribute__((always_inline)) {
    for (int64_t k = 0; k < product_.matrices; ++k) {
      T* const y = panels + (1 + k) * padded_ * stride_;
      for_groups<Bytes, Rows, T>(product_.m, [&]<class Group>(int64_t col) __attribute__((always_inline)) {
        const Strip<T> strip{product_.a[k].at(member, 0), product_.a[k].row_stride, panels + col * stride_,
                             y + col * stride_, stride_};
        multiply_tile<Group>(strip, rows, cols, tile.row == tile.col);
      });
    }
  });
}

// Calls f(block) for the blocks that meet in a tile.
template <class T>
template <class F>
void SymmThinCpu<T>::for_blocks(BlockIndex tile, F f) const {
  f(tile.col);
  if (tile.row != tile.col && tile.row < pairing_.blocks) f(tile.row);
}

// Writes a block of the Ys.
template <class T>
void SymmThinCpu<T>::unpack(int64_t member, int64_t block, const T* panels) const {
  const Range rows = this->rows(block);
  for_panels<T>(set_, product_.m, stride_, [&](int64_t col, int64_t cols, const View<T>& panel) {
    for (int64_t k = 0; k < product_.matrices; ++k) {
      const Strided<T>& y = product_.y[k];
      const T* const from = panels + ((1 + k) * padded_ + col) * stride_;
      copy_columns<T>(rows, std::min(cols, product_.m - col), {from, panel.row_stride, panel.col_stride},
                      {y.at(member, col), y.row_stride, y.col_stride});
    }
  });
}

template class SymmThinCpu<float>;
template class SymmThinCpu<double>;

}  // namespace sst
