// Vectors, and one body of code for every instruction set of panel.h.
#pragma once

namespace sst {

// At any address that suits its elements.
template <int Bytes, class A>
using Vector __attribute__((vector_size(Bytes), aligned(alignof(A)), may_alias)) = A;

// The body, compiled for one instruction set: body<vector bytes, rows of c that fit its registers two vectors wide>.
#ifdef __x86_64__
template <class Body>
[[gnu::target("avx512f,avx512bw,avx512vl")]] void by_avx512(const Body& body) {
  body.template operator()<64, 8>();
}
template <class Body>
[[gnu::target("avx2,fma")]] void by_avx2(const Body& body) {
  body.template operator()<32, 4>();
}
#endif
template <class Body>
void by_baseline(const Body& body) {
  body.template operator()<16, 4>();
}

// Runs a body, a lambda that must be inlined to be compiled for the set, by kInstructionSets[set].
template <class Body>
void by_set(int set, const Body& body) {
#ifdef __x86_64__
  if (set <= 1) return by_avx512(body);
  if (set == 2) return by_avx2(body);
#endif
  by_baseline(body);
}

}  // namespace sst
