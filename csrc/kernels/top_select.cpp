#include "top_select.h"

#include <algorithm>
#include <vector>

#include "panel.h"
#include "vector.h"

namespace sst {

namespace {

constexpr int64_t kBatch = 64;  // keys computed at once

// Calls count(digit, parity of the place) for each value in [begin, end) that has the prefix. Where one is looked for,
// few have it: a batch without any is passed over whole.
template <class T, class Count>
[[gnu::always_inline]] inline void count_digits(const DigitHistogram<T>& args, int64_t begin, int64_t end,
                                                const Count& count) {
  using K = Key<Accumulator<T>>;
  const bool all = args.digit == 0;
  K upper[kBatch];
  for (int64_t first = begin; first < end; first += kBatch) {
    const int64_t size = std::min(kBatch, end - first);
    if (size == kBatch) {
      for (int64_t i = 0; i < kBatch; ++i) upper[i] = args.upper(first + i);
    } else {
      for (int64_t i = 0; i < size; ++i) upper[i] = args.upper(first + i);
    }
    if (all) {
      for (int64_t i = 0; i < size; ++i) count(upper[i] % kDigits, i % 2);
      continue;
    }
    K any = 0;
    for (int64_t i = 0; i < size; ++i) any |= args.matches(upper[i]);
    for (int64_t i = 0; any && i < size; ++i) {
      if (args.matches(upper[i])) count(upper[i] % kDigits, i % 2);
    }
  }
}

// Two tables of counts of 32 bits.
class Tables {
 public:
  void add(uint64_t digit, int64_t parity) { ++table_[parity * kDigits + digit]; }
  void flush(int64_t* counts) {
    for (int64_t j = 0; j < kDigits; ++j) {
      const int64_t sum = int64_t{table_[j]} + table_[kDigits + j];
      if (sum) std::atomic_ref<int64_t>(counts[j]).fetch_add(sum, std::memory_order_relaxed);
    }
    std::fill(table_.begin(), table_.end(), 0);
  }

 private:
  std::vector<uint32_t> table_ = std::vector<uint32_t>(2 * kDigits);
};

template <class T>
[[gnu::always_inline]] inline void count_units(const DigitHistogram<T>& args, std::atomic<int64_t>& next) {
  if (args.n <= kSelectUnit) {  // one thread, and not enough for tables of its own
    if (next++ == 0) count_digits(args, 0, args.n, [&](uint64_t digit, int64_t) { ++args.counts[digit]; });
    return;
  }
  constexpr int64_t most = int64_t{1} << 31;  // units' values that 32 bits are sure to count
  Tables tables;
  int64_t counted = 0;
  for (int64_t unit = next++; unit < histogram_units(args.n); unit = next++) {
    const int64_t begin = unit * kSelectUnit, end = std::min(begin + kSelectUnit, args.n);
    count_digits(args, begin, end, [&](uint64_t digit, int64_t parity) { tables.add(digit, parity); });
    counted += end - begin;
    if (counted >= most) {
      tables.flush(args.counts);
      counted = 0;
    }
  }
  if (counted) tables.flush(args.counts);
}

template <class T>
[[gnu::always_inline]] inline void mask_units_above(const ThresholdMask<T>& args, std::atomic<int64_t>& next) {
  const Accumulator<T> threshold = args.threshold;
  for (int64_t unit = next++; unit < mask_units(args.n); unit = next++) {
    const int64_t size = std::min(kMaskUnit, args.n - unit * kMaskUnit);
    const T* __restrict values = args.values + unit * kMaskUnit;
    uint8_t* __restrict mask = args.mask + unit * kMaskUnit;
    for (int64_t i = 0; i < size; ++i) mask[i] = widen(values[i]) > threshold;
    uint32_t ties = 0;
    for (int64_t i = 0; i < size; ++i) ties += widen(values[i]) == threshold;
    args.unit_ties[unit] = ties;
  }
}

}  // namespace

template <class T>
void digit_histogram_cpu(int set, const DigitHistogram<T>& args, std::atomic<int64_t>& next) {
  by_set(set, [&]<int, int>() __attribute__((always_inline)) { count_units(args, next); });
}

template <class T>
void mask_above_cpu(int set, const ThresholdMask<T>& args, std::atomic<int64_t>& next) {
  by_set(set, [&]<int, int>() __attribute__((always_inline)) { mask_units_above(args, next); });
}

template <class T>
bool deal_ties_cpu(const ThresholdMask<T>& args) {
  const int64_t given = std::max<int64_t>(*args.ties, 0);
  int64_t left = given;
  for (int64_t unit = 0; unit < mask_units(args.n); ++unit) {
    args.unit_ties[unit] = std::min(args.unit_ties[unit], left);
    left -= args.unit_ties[unit];
  }
  *args.ties = left;
  return left < given;
}

template <class T>
void mask_ties_cpu(const ThresholdMask<T>& args, std::atomic<int64_t>& next) {
  for (int64_t unit = next++; unit < mask_units(args.n); unit = next++) {
    int64_t left = args.unit_ties[unit];
    for (int64_t i = unit * kMaskUnit; left > 0; ++i) {
      if (widen(args.values[i]) != args.threshold) continue;
      args.mask[i] = 1;
      --left;
    }
  }
}

#define SST_INSTANTIATE(T)                                                                 \
  template void digit_histogram_cpu(int, const DigitHistogram<T>&, std::atomic<int64_t>&); \
  template void mask_above_cpu(int, const ThresholdMask<T>&, std::atomic<int64_t>&);       \
  template bool deal_ties_cpu(const ThresholdMask<T>&);                                    \
  template void mask_ties_cpu(const ThresholdMask<T>&, std::atomic<int64_t>&);
SST_INSTANTIATE(Half)
SST_INSTANTIATE(BFloat16)
SST_INSTANTIATE(float)
SST_INSTANTIATE(double)

}  // namespace sst
