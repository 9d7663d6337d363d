// Top select on the host: the CPU kernels, and the bodies of the CUDA kernels thread after thread, against plain loops.
#include <algorithm>

#include "emulated_block.h"
#include "kernels/panel.h"
#include "kernels/top_select_block.h"

namespace {

using namespace sst;
using namespace sst::cuda;

bool backwards = false;

template <class F>
void run_block(int threads, int shared_bytes, F f) {
  backwards = !backwards;
  EmulatedBlock block(threads, shared_bytes, backwards);
  f(block);
}

// Against plain loops: of two digits, and of the mask with ties kept across units.
template <class T>
void test_cpu(int64_t n) {
  using A = Accumulator<T>;
  const auto values = random_integers<T>(n);
  const int last = kKeyDigits<A> - 1;
  const auto upper = [&](int64_t i, int digit) { return sort_key(widen(values[i])) >> kDigitBits * (last - digit); };
  const int64_t first = sort_key(A(2)) >> kDigitBits * last;
  for (int digit : {0, 1}) {
    std::vector<int64_t> counts(kDigits, 5), expected(kDigits, 5);
    for (int64_t i = 0; i < n; ++i) {
      const bool counted = digit == 0 || static_cast<int64_t>(upper(i, 0)) == first;
      expected[upper(i, digit) % kDigits] += counted;
    }
    const DigitHistogram<T> args{values.data(), n, digit ? first : 0, digit, counts.data()};
    run_threads([&](auto& next) { digit_histogram_cpu(instruction_set_in_use(), args, next); });
    expect(counts == expected, "digit histogram");
  }
  for (int64_t kept : {int64_t{0}, n / 20, n}) {
    std::vector<uint8_t> mask(n, 9), expected(n);
    std::vector<int64_t> unit_ties(mask_units(n));
    int64_t ties = kept, left = kept;
    const ThresholdMask<T> args{values.data(), n, A(1), mask.data(), unit_ties.data(), &ties};
    run_threads([&](auto& next) { mask_above_cpu(instruction_set_in_use(), args, next); });
    if (deal_ties_cpu(args)) run_threads([&](auto& next) { mask_ties_cpu(args, next); });
    for (int64_t i = 0; i < n; ++i) {
      const bool tie = widen(values[i]) == 1 && left > 0;
      left -= tie;
      expected[i] = widen(values[i]) > 1 || tie;
    }
    expect(mask == expected && ties == left, "threshold mask");
  }
}

// What top_select.cu does, without a device: `blocks` blocks, `window` digits at a time.
template <class T>
void test_digit_histogram(const std::vector<T>& values, int64_t prefix, int digit, int64_t blocks, int window) {
  std::vector<int64_t> counts(kDigits, 5), expected(kDigits, 5);
  const DigitHistogram<T> args{values.data(), static_cast<int64_t>(values.size()), prefix, digit, counts.data()};
  for (int low = 0; low < kDigits; low += window) {
    for (int64_t i = 0; i < blocks; ++i) {
      run_block(HistogramBlock::kThreads, HistogramBlock::shared_bytes(window),
                [&](auto& block) { digit_histogram_block(block, args, low, window, i, blocks); });
    }
  }
  for (const T& value : values) {
    const auto upper = sort_key(widen(value)) >> kDigitBits * (kKeyDigits<Accumulator<T>> - 1 - digit);
    if (digit == 0 || static_cast<int64_t>(upper >> kDigitBits) == prefix) ++expected[upper % kDigits];
  }
  expect(counts == expected, "digit histogram");
}

template <class T>
void test_threshold_mask(const std::vector<T>& values, Accumulator<T> threshold, int64_t ties) {
  const int64_t n = values.size(), units = mask_units(n);
  std::vector<uint8_t> mask(n, 9), expected(n);
  std::vector<int64_t> unit_ties(units, -9);
  int64_t left = ties, expected_left = ties > 0 ? ties : 0;
  const ThresholdMask<T> args{values.data(), n, threshold, mask.data(), unit_ties.data(), &left};
  const auto run = [&](auto f) { run_block(MaskBlock::kThreads, MaskBlock::kSharedBytes, f); };
  for (int64_t u = 0; u < units; ++u) run([&](auto& block) { mask_above_unit(block, args, u); });
  run([&](auto& block) { deal_ties(block, args); });
  for (int64_t u = units; u-- > 0;) run([&](auto& block) { mask_ties_unit(block, args, u); });
  for (int64_t i = 0; i < n; ++i) {
    const auto value = widen(values[i]);
    expected[i] = value > threshold || (value == threshold && expected_left-- > 0);
    expected_left = std::max<int64_t>(expected_left, 0);
  }
  expect(mask == expected && left == expected_left, "threshold mask");
}

template <class T>
void test_blocks() {
  for (int64_t n : {0, 5, 40000}) {
    auto values = random_integers<T>(n);
    if (n > 0) std::memset(&values[n / 2], 0xFF, sizeof(T));
    test_digit_histogram(values, 0, 0, 2, kDigits);
    test_digit_histogram(values, 0, 0, 1, kDigits / 2);
    const int64_t first = sort_key(widen(encode<T>(2))) >> kDigitBits * (kKeyDigits<Accumulator<T>> - 1);
    test_digit_histogram(values, first, 1, 1, kDigits);
    for (int64_t ties : {-1, 0, 3, 2000, 1 << 20}) test_threshold_mask(values, Accumulator<T>(1), ties);
  }
  // A counter of 16 bits is emptied several times, in either half of its word.
  for (int value : {-3, 2}) test_digit_histogram(std::vector<T>(150000, encode<T>(value)), 0, 0, 1, kDigits);
}

template <class T>
void test_type() {
  for (int64_t n : {0, 1, 70, 20000, 200001}) test_cpu<T>(n);
  test_blocks<T>();
}

}  // namespace

int main() {
  test_type<Half>();
  test_type<BFloat16>();
  test_type<float>();
  test_type<double>();
  std::puts("top select tests passed");
}
