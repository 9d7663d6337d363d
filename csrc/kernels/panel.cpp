#include "panel.h"

#include <type_traits>

#include "vector.h"

namespace sst {

namespace {

// The restricted pointers are what lets these vectorise.
template <class T>
[[gnu::always_inline]] inline void pack_row(const T* __restrict row, int64_t width, Accumulator<T> w,
                                            Accumulator<T>* __restrict out) {
  for (int64_t j = 0; j < width; ++j) out[j] = widen(row[j]) * w;
}
[[gnu::always_inline]] inline void pair_rows(const BFloat16* __restrict even, const BFloat16* __restrict odd,
                                             int64_t width, BFloat16Pair* __restrict out) {
  for (int64_t j = 0; j < width; ++j) {
    out[j].bits = even[j].bits | static_cast<uint32_t>(odd[j].bits) << 16;
  }
}

// Row by row, so that memory is read in order: each(out, first column, width) fills one row of one panel.
template <class E, class Each>
[[gnu::always_inline]] inline void pack_columns(int64_t cols, E* out, const Each& each) {
  int64_t j = 0;
  for (; j + kPanel <= cols; j += kPanel, out += kPanelStride) each(out, j, kPanel);
  if (j == cols) return;
  for (int64_t i = 0; i < kPanel; ++i) out[i] = {};
  each(out, j, cols - j);
}

template <class A>
[[gnu::always_inline]] inline int64_t token(const TokenBlock<A>& block, int64_t k) {
  return block.contiguous ? block.token[0] + k : block.token[k];
}

template <class T>
[[gnu::always_inline]] inline void pack_rows(const Rows<T>& x, const TokenBlock<Accumulator<T>>& block, bool weighted,
                                             Accumulator<T>* out) {
  using A = Accumulator<T>;
  for (int64_t k = 0, count = block.count; k < count; ++k, out += kPanel) {
    const T* const row = x.data + token(block, k) * x.stride;
    const A w = weighted && !block.ones ? block.weight[k] : A(1);
    pack_columns(x.cols, out, [&](A* to, int64_t j, int64_t width) __attribute__((always_inline)) {
      pack_row(row + j, width, w, to);
    });
  }
}

[[gnu::always_inline]] inline void pack_row_pairs(const Rows<BFloat16>& x, const TokenBlock<float>& block,
                                                  BFloat16Pair* out) {
  static constexpr BFloat16 zeros[kPanel] = {};
  for (int64_t k = 0, count = block.count; k < count; k += 2, out += kPanel) {
    const BFloat16* const even = x.data + token(block, k) * x.stride;
    const BFloat16* const odd = k + 1 < count ? x.data + token(block, k + 1) * x.stride : nullptr;
    pack_columns(x.cols, out, [&](BFloat16Pair* to, int64_t j, int64_t width) __attribute__((always_inline)) {
      pair_rows(even + j, odd ? odd + j : zeros, width, to);
    });
  }
}

// How an element of p, for every lane, and a vector of q are multiplied and added.
template <class E, int Bytes>
struct Arithmetic {
  using A = E;
  using Operand = Vector<Bytes, E>;
  using Broadcast = E;  // the product with a vector makes it one
  [[gnu::always_inline]] static void broadcast(const E& p, Broadcast& out) { out = p; }
  [[gnu::always_inline]] static void multiply_add(Vector<Bytes, A>& sum, Broadcast p, const Operand& q) {
    sum += p * q;
  }
};
#ifdef __x86_64__
// sum += p_even q_even + p_odd q_odd. In assembler, because a builtin may not be inlined into templates that are
// themselves inlined into functions of several targets.
template <int Bytes>
struct Arithmetic<BFloat16Pair, Bytes> {
  using A = float;
  using Operand = Vector<Bytes, uint32_t>;
  using Broadcast = Operand;
  [[gnu::always_inline]] static void broadcast(const BFloat16Pair& p, Broadcast& out) {
    asm("vpbroadcastd %1, %0" : "=v"(out) : "m"(p.bits));
  }
  [[gnu::always_inline]] static void multiply_add(Vector<Bytes, A>& sum, const Broadcast& p, const Operand& q) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(q), "v"(p));
  }
};
#endif

// A block of c, Rows × Width vectors, which stay in registers while k runs.
template <int Bytes, int Rows, int Width, class E, class A>
[[gnu::always_inline]] inline void block_product(const PanelProduct<E, A>& args, int64_t i, int64_t j) {
  using Rule = Arithmetic<E, Bytes>;
  using Operand = typename Rule::Operand;
  constexpr int lanes = Bytes / sizeof(A);
  const int64_t count = args.count, p_stride = args.p.row_stride, q_stride = args.q.row_stride;
  const E* p = args.p.data + i / kPanel * args.p.panel_stride + i % kPanel;
  const E* q[Width];
  for (int w = 0; w < Width; ++w) {
    const int64_t col = j + w * lanes;
    q[w] = args.q.data + col / kPanel * args.q.panel_stride + col % kPanel;
  }
  Vector<Bytes, A> sum[Rows][Width] = {};
  for (int64_t k = 0; k < count; ++k, p += p_stride) {
    Operand qk[Width];
#pragma GCC unroll 4
    for (int w = 0; w < Width; ++w, q[w - 1] += q_stride) qk[w] = *reinterpret_cast<const Operand*>(q[w]);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      typename Rule::Broadcast pk;
      Rule::broadcast(p[r], pk);
#pragma GCC unroll 4
      for (int w = 0; w < Width; ++w) Rule::multiply_add(sum[r][w], pk, qk[w]);
    }
  }
  const bool add = args.add;
  const int64_t stride = args.stride;
  A* c = args.c + i * stride + j;
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r, c += stride) {
#pragma GCC unroll 4
    for (int w = 0; w < Width; ++w) {
      Vector<Bytes, A>* const out = reinterpret_cast<Vector<Bytes, A>*>(c + w * lanes);
      *out = add ? *out + sum[r][w] : sum[r][w];
    }
  }
}

// q's columns of one block stay in L1 while all of p passes by.
template <int Bytes, int Rows, class E, class A>
[[gnu::always_inline]] inline void product(const PanelProduct<E, A>& args) {
  constexpr int width = 2 * Bytes / sizeof(A);
  for (int64_t j = 0; j < args.cols; j += width) {
    const int64_t first = args.part == Part::lower ? j / kPanel * kPanel : 0;
    if (args.cols - j >= width) {
      for (int64_t i = first; i < args.rows; i += Rows) block_product<Bytes, Rows, 2>(args, i, j);
    } else {
      for (int64_t i = first; i < args.rows; i += Rows) block_product<Bytes, Rows, 1>(args, i, j);
    }
  }
}

#ifdef __x86_64__
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

const InstructionSet kInstructionSets[] = {
#ifdef __x86_64__
    {"avx512_bf16", [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }, true},
    {"avx512", has_avx512, false},
    {"avx2+fma", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, false},
#endif
    {"baseline", [] { return true; }, false},
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
  block.contiguous = block.ones = true;
  block.token[0] = tokens.begin;
  if (!weight) {
    block.count = tokens.end - tokens.begin;
    return block;
  }
  block.count = 0;
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    block.token[block.count] = t;
    block.weight[block.count] = weight[t];
    block.ones &= weight[t] == A(0) || weight[t] == A(1);
    block.count += weight[t] != A(0);
  }
  block.contiguous = block.count > 0 && block.token[block.count - 1] - block.token[0] == block.count - 1;
  return block;
}

template <class T>
void pack(int set, const Rows<T>& x, const TokenBlock<Accumulator<T>>& block, bool weighted, Accumulator<T>* out) {
  by_set(set, [&]<int, int>() __attribute__((always_inline)) { pack_rows(x, block, weighted, out); });
}

void pack_pairs(int set, const Rows<BFloat16>& x, const TokenBlock<float>& block, BFloat16Pair* out) {
  by_set(set, [&]<int, int>() __attribute__((always_inline)) { pack_row_pairs(x, block, out); });
}

template <class E, class A>
void panel_product(int set, const PanelProduct<E, A>& args) {
  const auto body = [&]<int Bytes, int Rows>() __attribute__((always_inline)) { product<Bytes, Rows>(args); };
  if constexpr (!std::is_same_v<E, BFloat16Pair>) {
    by_set(set, body);
  } else {  // only the set that has the instruction takes pairs
#ifdef __x86_64__
    by_avx512(body);
#endif
  }
}

#define SST_INSTANTIATE_PACK(T) \
  template void pack(int, const Rows<T>&, const TokenBlock<Accumulator<T>>&, bool, Accumulator<T>*);
SST_INSTANTIATE_PACK(Half)
SST_INSTANTIATE_PACK(BFloat16)
SST_INSTANTIATE_PACK(float)
SST_INSTANTIATE_PACK(double)

#define SST_INSTANTIATE_PRODUCT(A)                       \
  template TokenBlock<A> select_tokens(const A*, Range); \
  template void panel_product(int, const PanelProduct<A, A>&);
SST_INSTANTIATE_PRODUCT(float)
SST_INSTANTIATE_PRODUCT(double)
template void panel_product(int, const PanelProduct<BFloat16Pair, float>&);

}  // namespace sst
