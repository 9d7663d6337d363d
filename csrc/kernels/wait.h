// How a thread of a CPU kernel waits for another one of the same kernel.
#pragma once

#include <thread>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace sst {

// Until done(): the wait is short, and a thread that yields to another library's idle one may be gone for milliseconds,
// so that it yields only after some 0.1 ms, lest what it waits for needs its processor.
template <class Done>
void wait_until(const Done& done) {
  constexpr int patience = 4096;
  for (int spins = 0; !done(); ++spins) {
    if (spins >= patience) {
      std::this_thread::yield();
      continue;
    }
#ifdef __x86_64__
    _mm_pause();
#endif
  }
}

}  // namespace sst
