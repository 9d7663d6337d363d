// The count-th largest of any number of values without sorting them, a digit of their keys at a time, and the mask of
// those that are kept.
//     key        of a float its bits as an unsigned integer in the order of the values: bits + 2³¹ of x >= 0, the
//                complement of the bits of x < 0; -0 has the key of 0, NaN the largest, all ones. Likewise of a double;
//                half types are widened, exactly.
//     digits     16 bits of the key, the most significant first: two of a float, four of a double
//     histogram  counts[j] += #{i : key(x_i) has the digits `prefix` and then the digit j}
//     mask       mask[i] ← x_i > τ, or x_i = τ and fewer than `ties` values before x_i equal τ; ties -= those kept
// The largest finite and infinite values never have a first digit of ones only: counts[65535] of that digit is of NaNs.
//
// Layout      values (n), adjacent; counts (65536) int64; mask (n); ties (1) int64; all apart, owned by the caller.
// CPU         histogram: a thread owns units of kSelectUnit values and two tables of 256 KiB (one for every other
// value,
//             so that equal neighbours do not wait for each other), added to counts at its end. mask: a thread owns
//             units of kMaskUnit values, and counts their ties; the ties are dealt to the units in order; units that
//             were dealt some are read again.
// CUDA        top_select_block.h: the same, a block of threads for a thread.
// Determinism integer sums and a fixed order of ties: the same result however many threads there are.
// Cost        histogram: reads n values. mask: reads n values, twice those of units with ties kept, writes n bytes.
// Reference   sst_kernels/reference.py, digit_histogram_, threshold_mask_.
#pragma once

#include <atomic>
#include <type_traits>

#include "schedule.h"

namespace sst {

constexpr int kDigitBits = 16, kDigits = 1 << kDigitBits;
constexpr int64_t kSelectUnit = 1 << 16, kMaskUnit = 1 << 13;

template <class A>
using Key = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;

template <class A>
constexpr int kKeyDigits = 8 * static_cast<int>(sizeof(A)) / kDigitBits;

// Without a branch, so that loops vectorise.
template <class A>
SST_HOST_DEVICE inline Key<A> sort_key(A x) {
  using K = Key<A>;
  constexpr K sign = K(1) << (8 * sizeof(K) - 1);
  constexpr K infinity = sizeof(K) == 4 ? K(0x7F800000) : K(0x7FF0000000000000);
  K bits;
  memcpy(&bits, &x, sizeof bits);
  K key = bits ^ (bits & sign ? ~K(0) : sign);
  key += key == sign - 1;  // -0
  return (bits & ~sign) > infinity ? ~K(0) : key;
}

template <class T>
struct DigitHistogram {
  const T* values;
  int64_t n;
  int64_t prefix;  // the `digit` first digits
  int digit;
  int64_t* counts;

  // The key without the digits after `digit`, and whether its first digits are the prefix.
  SST_HOST_DEVICE Key<Accumulator<T>> upper(int64_t i) const {
    using A = Accumulator<T>;
    return sort_key<A>(widen(values[i])) >> (kDigitBits * (kKeyDigits<A> - 1 - digit));
  }
  SST_HOST_DEVICE bool matches(Key<Accumulator<T>> upper) const {
    return upper >> kDigitBits == static_cast<Key<Accumulator<T>>>(prefix);
  }
};

template <class T>
struct ThresholdMask {
  const T* values;
  int64_t n;
  Accumulator<T> threshold;
  uint8_t* mask;
  int64_t* unit_ties;  // mask_units(n): of each unit, first how many there are, then how many are kept
  int64_t* ties;
};

inline int64_t histogram_units(int64_t n) { return ceil_div(n, kSelectUnit); }
SST_HOST_DEVICE inline int64_t mask_units(int64_t n) { return ceil_div(n, kMaskUnit); }

// One thread's share: it takes units from `next` until none is left. `set`: panel.h.
template <class T>
void digit_histogram_cpu(int set, const DigitHistogram<T>& args, std::atomic<int64_t>& next);

// The mask in three steps: shares of mask_above; then deal_ties, by one thread, which says whether any unit has ties to
// keep; then, if so, shares of mask_ties.
template <class T>
void mask_above_cpu(int set, const ThresholdMask<T>& args, std::atomic<int64_t>& next);
template <class T>
bool deal_ties_cpu(const ThresholdMask<T>& args);
template <class T>
void mask_ties_cpu(const ThresholdMask<T>& args, std::atomic<int64_t>& next);

// Throw std::runtime_error if a launch fails. `stream` is a cudaStream_t.
template <class T>
void digit_histogram_cuda(const DigitHistogram<T>& args, void* stream);
template <class T>
void threshold_mask_cuda(const ThresholdMask<T>& args, void* stream);

}  // namespace sst
