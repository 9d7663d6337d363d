#include "panel.h"

namespace sst {

namespace {

// The restricted pointers are what lets this vectorise.
template <class T>
[[gnu::always_inline]] inline void pack_row(const T* __restrict row, int64_t width,
                                            Accumulator<T> w, Accumulator<T>* __restrict out) {
  for (int64_t j = 0; j < width; ++j) out[j] = widen(row[j]) * w;
}

// One panel of `width` columns; inlined with a constant width, a row is one vector.
template <class T>
[[gnu::always_inline]] inline void pack_panel(Rows<T> x, const TokenBlock<Accumulator<T>>& block,
                                              bool weighted, int64_t width,
                                              PanelRow<Accumulator<T>>* panel) {
  using A = Accumulator<T>;
  for (int64_t k = 0, count = block.count; k < count; ++k) {
    if (width < kPanel) panel[k] = {};
    pack_row(x.data + block.token[k] * x.stride, width, weighted ? block.weight[k] : A(1),
             panel[k].value);
  }
}

template <class T>
[[gnu::always_inline]] inline void pack(Rows<T> x, const TokenBlock<Accumulator<T>>& block,
                                        bool weighted, PanelRow<Accumulator<T>>* panels) {
  for (; x.cols >= kPanel; x = x.columns(kPanel, x.cols), panels += kTokens) {
    pack_panel(x, block, weighted, kPanel, panels);
  }
  if (x.cols > 0) pack_panel(x, block, weighted, x.cols, panels);
}

// Vectors of `Bytes` bytes; `Rows` × 1 vectors of c stay in registers while k runs.
template <int Bytes, int Rows, class A>
[[gnu::always_inline]] inline void product(const PanelRow<A>* p, const PanelRow<A>* q,
                                           int64_t count, A* c, int64_t stride, bool add) {
  typedef A Vector __attribute__((vector_size(Bytes), aligned(alignof(A)), may_alias));
  constexpr int lanes = Bytes / sizeof(A);
  for (int i = 0; i < kPanel; i += Rows) {
    for (int j = 0; j < kPanel; j += lanes) {
      Vector sum[Rows] = {};
      for (int64_t k = 0; k < count; ++k) {
        const Vector qk = *reinterpret_cast<const Vector*>(q[k].value + j);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) sum[r] += p[k].value[i + r] * qk;
      }
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        Vector* const out = reinterpret_cast<Vector*>(c + (i + r) * stride + j);
        *out = add ? *out + sum[r] : sum[r];
      }
    }
  }
}

// The body, compiled for one instruction set: body<vector bytes, rows of c that fit its registers>.
#ifdef __x86_64__
template <class Body>
[[gnu::target("avx512f")]] void by_avx512(const Body& body) {
  body.template operator()<64, 16>();
}
template <class Body>
[[gnu::target("avx2,fma")]] void by_avx2(const Body& body) {
  body.template operator()<32, 8>();
}
#endif
template <class Body>
void by_baseline(const Body& body) {
  body.template operator()<16, 8>();
}

// Runs a body, a lambda that must be inlined to be compiled for the set, by kInstructionSets[set].
template <class Body>
void by_set(int set, const Body& body) {
#ifdef __x86_64__
  if (set == 0) return by_avx512(body);
  if (set == 1) return by_avx2(body);
#endif
  by_baseline(body);
}

}  // namespace

const InstructionSet kInstructionSets[] = {
#ifdef __x86_64__
    {"avx512f", [] { return __builtin_cpu_supports("avx512f") != 0; }},
    {"avx2+fma", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", [] { return true; }},
};
const int kNumInstructionSets = sizeof kInstructionSets / sizeof *kInstructionSets;

int instruction_set_in_use() {
  static const int chosen = [] {
    int set = 0;
    while (!kInstructionSets[set].supported()) ++set;
    return set;
  }();
  return chosen;
}

template <class A>
TokenBlock<A> select_tokens(const A* weight, Range tokens) {
  TokenBlock<A> block;
  block.count = 0;
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    const A w = weight ? weight[t] : A(1);
    block.token[block.count] = t;
    block.weight[block.count] = w;
    block.count += w != A(0);
  }
  return block;
}

template <class T>
void pack_panels(int set, const Rows<T>& x, const TokenBlock<Accumulator<T>>& block, bool weighted,
                 PanelRow<Accumulator<T>>* panels) {
  by_set(set, [&]<int, int>() __attribute__((always_inline)) { pack(x, block, weighted, panels); });
}

template <class A>
void panel_product(int set, const PanelRow<A>* p, const PanelRow<A>* q, int64_t count, A* c,
                   int64_t stride, bool add) {
  by_set(set, [&]<int Bytes, int Rows>() __attribute__((always_inline)) {
    product<Bytes, Rows>(p, q, count, c, stride, add);
  });
}

#define SST_INSTANTIATE_PACK(T)                                                           \
  template void pack_panels(int, const Rows<T>&, const TokenBlock<Accumulator<T>>&, bool, \
                            PanelRow<Accumulator<T>>*);
SST_INSTANTIATE_PACK(Half)
SST_INSTANTIATE_PACK(BFloat16)
SST_INSTANTIATE_PACK(float)
SST_INSTANTIATE_PACK(double)

#define SST_INSTANTIATE_PRODUCT(A)                                                               \
  template TokenBlock<A> select_tokens(const A*, Range);                                         \
  template void panel_product(int, const PanelRow<A>*, const PanelRow<A>*, int64_t, A*, int64_t, \
                              bool);
SST_INSTANTIATE_PRODUCT(float)
SST_INSTANTIATE_PRODUCT(double)

}  // namespace sst
