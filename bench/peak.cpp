// The most multiply-adds a core does: the ceiling over every product in bench/results.
//
//     g++ -O3 -march=native bench/peak.cpp -o peak && ./peak
//
// Independent chains in registers, no memory: float32 fused multiply-adds and, where the machine has them, dot products
// of bfloat16 pairs, on one core. Needs AVX-512.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

constexpr int kChains = 16;
constexpr long kRounds = 50'000'000;

// Best of three runs of `step` on every chain, in flops a second.
template <class Step>
double rate(double flops, Step step) {
  double best = 0;
  for (int run = 0; run < 3; ++run) {
    __m512 chain[kChains];
    for (int i = 0; i < kChains; ++i) chain[i] = _mm512_set1_ps(1.1f * static_cast<float>(i));
    const auto start = std::chrono::steady_clock::now();
    for (long round = 0; round < kRounds; ++round) {
      for (int i = 0; i < kChains; ++i) step(chain[i]);
      asm volatile("");  // keeps the loop a loop
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    for (int i = 0; i < kChains; ++i) asm volatile("" ::"v"(chain[i]));
    best = std::max(best, static_cast<double>(kRounds) * kChains * flops / seconds.count());
  }
  return best;
}

int main() {
  const __m512 a = _mm512_set1_ps(0.9999f), b = _mm512_set1_ps(0.5f);
  std::printf("float32         %.0f GF/s a core\n", rate(32, [&](__m512& x) { x = _mm512_fmadd_ps(x, a, b); }) * 1e-9);
#ifdef __AVX512BF16__
  const __m512bh pair = _mm512_cvtne2ps_pbh(a, b);
  std::printf("bfloat16 pairs  %.0f GF/s a core\n",
              rate(64, [&](__m512& x) { x = _mm512_dpbf16_ps(x, pair, pair); }) * 1e-9);
#endif
}
