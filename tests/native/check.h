// What the native tests share: small integers, whose float32 sums are exact and compared by ==, and threads.
#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "kernels/scalar.h"

namespace sst {

inline void expect(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  std::exit(1);
}

// An integer from -3 to 3 as an element.
template <class T>
T encode(int value) {
  return static_cast<T>(value);
}
template <>
inline BFloat16 encode(int value) {
  return {static_cast<uint16_t>(bits_from_float(static_cast<float>(value)) >> 16)};
}
template <>
inline Half encode(int value) {
  constexpr uint16_t magnitudes[] = {0, 0x3C00, 0x4000, 0x4200};
  const int sign = value < 0 ? 0x8000 : 0;
  return {static_cast<uint16_t>(sign | magnitudes[std::abs(value)])};
}

inline unsigned random_bits() {
  static unsigned state = 1;
  state = state * 1664525u + 1013904223u;
  return state >> 16;
}
inline int small_integer() { return static_cast<int>(random_bits()) % 7 - 3; }

template <class T>
std::vector<T> random_integers(int64_t count) {
  std::vector<T> values(count);
  for (T& value : values) value = encode<T>(small_integer());
  return values;
}

// share(next) on three threads at once.
template <class Share>
void run_threads(Share share) {
  std::atomic<int64_t> next{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) threads.emplace_back([&] { share(next); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace sst
