// A block of threads (kernels/block.h) on the host, with the semantics of the PTX ISA, that checks what a device would
// not tell: reads of unwritten shared memory, accesses that no barrier orders, accesses outside, bank conflicts.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "check.h"
#include "kernels/block_mma.h"

namespace sst {

class EmulatedBlock {
 public:
  EmulatedBlock(int threads, int shared_bytes, bool backwards)
      : threads_(threads),
        backwards_(backwards),
        shared_(shared_bytes, '\xFF'),
        words_(shared_bytes / 4),
        accesses_(threads) {}

  // Extra wavefronts: how often an access of 16 bytes a thread took more than one for each quarter of a warp.
  int64_t vector_conflicts = 0, matrix_conflicts = 0;

  template <class T>
  class Each {
   public:
    Each() : values_(512) { std::memset(static_cast<void*>(values_.data()), 0xFF, values_.size() * sizeof(T)); }
    T& operator[](int t) { return values_[t]; }
    const T& operator[](int t) const { return values_[t]; }

   private:
    std::vector<T> values_;
  };

  // Threads one after another, in either direction: a result that depends on it lacks a barrier.
  template <class F>
  void each(F f) {
    for (auto& thread : accesses_) thread.clear();
    for (int i = 0; i < threads_; ++i) f(backwards_ ? threads_ - 1 - i : i);
    count_conflicts();
  }
  void barrier() { ++epoch_; }
  template <class F>
  bool barrier_any(F f) {
    bool any = false;
    for (int t = 0; t < threads_; ++t) any = f(t) || any;
    barrier();
    return any;
  }

  template <class V>
  V load(int t, int at) {
    note(t, at, sizeof(V), false);
    return copy<V>(at);
  }
  template <class V>
  void store(int t, int at, const V& value) {
    note(t, at, sizeof(V), true);
    std::memcpy(shared_.data() + at, &value, sizeof value);
  }

  // Sums of several threads need no barrier between them, but one before and after any other access.
  uint32_t add(int t, int at, uint32_t value) {
    Word& word = words_[at / 4];
    check_place(at, 4);
    expect(word.written >= 0, "shared memory: written before it is added to");
    expect(word.written != epoch_ || word.writer == t || word.writer == kAdders, "shared memory: a barrier orders it");
    expect(word.read != epoch_ || word.reader == t, "shared memory: a barrier orders the sum after the reads");
    word.written = epoch_;
    word.writer = kAdders;
    const uint32_t before = copy<uint32_t>(at), after = before + value;
    std::memcpy(shared_.data() + at, &after, sizeof after);
    return before;
  }

  // What f reads must stay as it is while the threads run one after another.
  template <class F>
  auto shuffle(int t, int mask, F f) const {
    return f(t ^ mask);
  }

  // ldmatrix .x4 .trans: register m of a lane holds column lane / 4, rows 2 (lane % 4) and the next, of matrix m, whose
  // row r lies where lane 8 m + r says.
  template <class F>
  void load_transposed(Each<cuda::Registers<4>>& x, F at) {
    for (int warp = 0; warp < threads_; warp += 32) {
      for (int m = 0; m < 4; ++m) {
        std::array<uint16_t, 8> rows[8];
        Places places;
        for (int r = 0; r < 8; ++r) {
          const int t = warp + 8 * m + r, place = at(t);
          check_access(t, place, 16, false);
          rows[r] = copy<std::array<uint16_t, 8>>(place);
          places.at[places.count++] = place;
        }
        matrix_conflicts += wavefronts(places) - 1;
        for (int lane = 0; lane < 32; ++lane) {
          const int r = 2 * (lane % 4), c = lane / 4;
          x[warp + lane].word[m] = rows[r][c] | static_cast<uint32_t>(rows[r + 1][c]) << 16;
        }
      }
    }
  }

  // mma: the lanes' registers become matrices, which are multiplied, and the result goes back to the lanes.
  template <cuda::Format format, class Fragment>
  void mma(cuda::FormatTag<format>, Each<Fragment>& c, const Each<cuda::Registers<4>>& a,
           const Each<cuda::Registers<4>>& b, int first) {
    constexpr int kPerWord = format == cuda::Format::tf32 ? 1 : 2, kDepth = 8 * kPerWord;
    for (int warp = 0; warp < threads_; warp += 32) {
      double p[16][kDepth], q[kDepth][8];
      for (int lane = 0; lane < 32; ++lane) {
        const int group = lane / 4, k0 = lane % 4 * kPerWord;
        for (int e = 0; e < kPerWord; ++e) {
          for (int i = 0; i < 4; ++i) {
            p[group + i % 2 * 8][k0 + e + i / 2 * (kDepth / 2)] = decode<format>(a[warp + lane].word[i], e);
          }
          for (int i = 0; i < 2; ++i) {
            q[k0 + e + i * (kDepth / 2)][group] = decode<format>(b[warp + lane].word[first + i], e);
          }
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
          const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
          double sum = c[warp + lane].value[i];
          for (int k = 0; k < kDepth; ++k) sum += p[row][k] * q[k][col];
          c[warp + lane].value[i] = static_cast<float>(sum);
        }
      }
    }
  }

 private:
  static constexpr int kAdders = -2;
  struct Word {
    int64_t written = -1, read = -1;  // epochs
    int writer = 0, reader = 0;       // reader -1: several threads; writer kAdders: by add()
  };
  template <cuda::Format format>
  static double decode(uint32_t word, int e) {
    if (format == cuda::Format::tf32) {
      const float value = float_from_bits(word);
      expect((word & 0x1FFF) == 0 || value != value, "tf32 operand is rounded");
      return value;
    }
    const auto bits = static_cast<uint16_t>(word >> 16 * e);
    return format == cuda::Format::half ? widen(Half{bits}) : widen(BFloat16{bits});
  }

  template <class V>
  V copy(int at) const {
    V value;
    std::memcpy(&value, shared_.data() + at, sizeof value);
    return value;
  }

  void note(int t, int at, int size, bool write) {
    check_access(t, at, size, write);
    if (size == 16) accesses_[t].push_back(at);
  }

  void check_place(int at, int size) const {
    expect(at >= 0 && at % size == 0 && at + size <= static_cast<int>(shared_.size()), "shared memory: place");
  }

  void check_access(int t, int at, int size, bool write) {
    check_place(at, size);
    for (int i = at / 4; i < (at + size) / 4; ++i) {
      Word& word = words_[i];
      expect(word.written != epoch_ || word.writer == t, "shared memory: a barrier orders it after the write");
      if (write) {
        expect(word.read != epoch_ || word.reader == t, "shared memory: a barrier orders the write after the reads");
        word.written = epoch_;
        word.writer = t;
      } else {
        expect(word.written >= 0, "shared memory: written before it is read");
        word.reader = word.read == epoch_ && word.reader != t ? -1 : t;
        word.read = epoch_;
      }
    }
  }

  // Of accesses of 16 bytes that go together, how many go to one bank at most, counting those to one place as one.
  struct Places {
    int at[8], count = 0;
  };
  static int wavefronts(const Places& places) {
    int per_line[8] = {}, most = 0;  // 16 bytes are four banks
    for (int i = 0; i < places.count; ++i) {
      const int* const end = places.at + i;
      if (std::find(places.at, end, *end) != end) continue;
      most = std::max(most, ++per_line[*end / 16 % 8]);
    }
    return most;
  }

  // The n-th accesses of the threads of a warp are one instruction; those of 16 bytes go by quarters of a warp.
  void count_conflicts() {
    for (int first = 0; first < threads_; first += 8) {
      for (size_t n = 0;; ++n) {
        Places places;
        for (int t = first; t < first + 8; ++t) {
          if (n < accesses_[t].size()) places.at[places.count++] = accesses_[t][n];
        }
        if (places.count == 0) break;
        vector_conflicts += wavefronts(places) - 1;
      }
    }
  }

  int threads_;
  bool backwards_;
  std::vector<char> shared_;
  std::vector<Word> words_;
  int64_t epoch_ = 0;
  std::vector<std::vector<int>> accesses_;  // places of 16 bytes, by thread
};

}  // namespace sst
