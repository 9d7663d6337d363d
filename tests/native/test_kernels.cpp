// The CPU kernels against plain loops, without torch, so that sanitizers see all of it: every
// buffer ends where its data end. Inputs are small integers, so float32 sums are exact and compared
// by ==.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels/khatri_rao.h"
#include "kernels/panel.h"
#include "kernels/syrk.h"

namespace {

using namespace sst;

void expect(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  std::exit(1);
}

template <class T>
T encode(int value) {
  return static_cast<T>(value);
}
template <>
BFloat16 encode(int value) {
  const float x = static_cast<float>(value);
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return {static_cast<uint16_t>(bits >> 16)};
}
template <>
Half encode(int value) {
  constexpr uint16_t magnitudes[] = {0, 0x3C00, 0x4000, 0x4200};
  const int sign = value < 0 ? 0x8000 : 0;
  return {static_cast<uint16_t>(sign | magnitudes[std::abs(value)])};
}

unsigned state = 1;
int small_integer() {
  state = state * 1664525u + 1013904223u;
  return static_cast<int>(state >> 16) % 7 - 3;
}

template <class T>
std::vector<T> random_integers(int64_t count) {
  std::vector<T> values(count);
  for (T& value : values) value = encode<T>(small_integer());
  return values;
}

// Every half against its definition.
void test_half() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    const float value = widen(Half{static_cast<uint16_t>(bits)});
    if (exponent == 31 && fraction) {
      expect(std::isnan(value), "half: NaN");
    } else {
      const double magnitude = exponent == 31  ? INFINITY
                               : exponent == 0 ? std::ldexp(fraction, -24)
                                               : std::ldexp(1024 + fraction, exponent - 25);
      expect(value == sign * magnitude && std::signbit(value) == (sign < 0), "half: value");
    }
  }
}

void test_triangle_block() {
  int64_t index = 0;
  for (int64_t row = 0; row < 2000; ++row) {
    for (int64_t col = 0; col <= row; ++col, ++index) {
      const BlockIndex block = triangle_block(index);
      expect(block.row == row && block.col == col, "triangle_block");
    }
  }
}

template <class A>
void test_panel_product() {
  for (int set = 0; set < kNumInstructionSets; ++set) {
    if (!kInstructionSets[set].supported()) continue;
    for (int64_t count : {0, 1, 37}) {
      std::vector<PanelRow<A>> p(count), q(count);
      for (auto* panel : {&p, &q}) {
        for (auto& row : *panel) {
          for (A& x : row.value) x = static_cast<A>(small_integer());
        }
      }
      constexpr int64_t stride = kPanel + 3;
      for (bool add : {false, true}) {
        std::vector<A> c(kPanel * stride, A(5));
        panel_product(set, p.data(), q.data(), count, c.data(), stride, add);
        for (int64_t i = 0; i < kPanel; ++i) {
          for (int64_t j = 0; j < stride; ++j) {
            A sum = add || j >= kPanel ? A(5) : A(0);
            for (int64_t k = 0; j < kPanel && k < count; ++k) sum += p[k].value[i] * q[k].value[j];
            expect(c[i * stride + j] == sum, kInstructionSets[set].name);
          }
        }
      }
    }
  }
}

// Every width up to two panels and a bit, tokens picked by weight.
template <class T>
void test_pack_panels() {
  using A = Accumulator<T>;
  const std::vector<A> weight = {1, 0, -2, 3, 0};
  const TokenBlock<A> block = select_tokens(weight.data(), {0, 5});
  expect(block.count == 3 && block.token[2] == 3 && block.weight[1] == A(-2), "select_tokens");
  for (int set = 0; set < kNumInstructionSets; ++set) {
    if (!kInstructionSets[set].supported()) continue;
    for (int64_t cols = 0; cols < 2 * kPanel + 3; ++cols) {
      const auto x = random_integers<T>(5 * cols);
      std::vector<PanelRow<A>> panels(ceil_div(cols, kPanel) * kTokens);
      pack_panels(set, Rows<T>{x.data(), cols, cols}, block, true, panels.data());
      for (int64_t j = 0; j < ceil_div(cols, kPanel) * kPanel; ++j) {
        for (int64_t k = 0; k < block.count; ++k) {
          const A expected =
              j < cols ? block.weight[k] * widen(x[block.token[k] * cols + j]) : A(0);
          expect(panels[j / kPanel * kTokens + k].value[j % kPanel] == expected,
                 kInstructionSets[set].name);
        }
      }
    }
  }
}

template <class T, class Index>
void test_khatri_rao(int64_t tokens, int64_t r_a, int64_t r_b, const std::vector<Index>& offsets) {
  using A = Accumulator<T>;
  const auto a = random_integers<T>(tokens * r_a), b = random_integers<T>(tokens * r_b);
  const auto weight = random_integers<A>(tokens);
  const int64_t sequences = static_cast<int64_t>(offsets.size()) - 1;
  std::vector<A> out(sequences * r_a * r_b, A(NAN));
  const KhatriRao<T> args{{a.data(), r_a, r_a},
                          {b.data(), r_b, r_b},
                          weight.data(),
                          {offsets.data(), sizeof(Index) == 8},
                          tokens,
                          sequences,
                          out.data()};
  khatri_rao_rows_cpu(args, {0, sequences / 2});
  khatri_rao_rows_cpu(args, {sequences / 2, sequences});
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t begin = clamp(offsets[s], 0, tokens), end = clamp(offsets[s + 1], 0, tokens);
    for (int64_t i = 0; i < r_b; ++i) {
      for (int64_t j = 0; j < r_a; ++j) {
        A sum = 0;
        for (int64_t t = begin; t < end; ++t) {
          sum += weight[t] * widen(b[t * r_b + i]) * widen(a[t * r_a + j]);
        }
        expect(out[(s * r_b + i) * r_a + j] == sum, "khatri_rao_rows");
      }
    }
  }
}

template <class T>
void test_syrk(int64_t batch, int64_t tokens, int64_t d) {
  using A = Accumulator<T>;
  const auto x = random_integers<T>(batch * tokens * d);
  const auto weight = random_integers<A>(batch * tokens);
  const auto before = random_integers<A>(batch * d * d);
  auto s = before;
  const Syrk<T> args{.s = s.data(),
                     .s_batch_stride = d * d,
                     .s_row_stride = d,
                     .x = {x.data(), d, d},
                     .x_batch_stride = tokens * d,
                     .weight = weight.data(),
                     .weight_batch_stride = tokens,
                     .batch = batch,
                     .tokens = tokens,
                     .alpha = A(2),
                     .beta = A(-1)};
  const int64_t blocks = syrk_blocks_cpu(args), middle = blocks / 3;
  syrk_accumulate_cpu(args, {0, middle});
  syrk_accumulate_cpu(args, {middle, blocks});
  for (int64_t m = 0; m < batch; ++m) {
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j < d; ++j) {
        A sum = 0;
        for (int64_t t = m * tokens; t < (m + 1) * tokens; ++t) {
          sum += weight[t] * widen(x[t * d + i]) * widen(x[t * d + j]);
        }
        const int64_t at = (m * d + i) * d + j;
        expect(s[at] == (j <= i ? A(2) * sum - before[at] : before[at]), "syrk_accumulate_");
      }
    }
  }
}

template <class T>
void test_ops() {
  test_pack_panels<T>();
  test_khatri_rao<T, int64_t>(300, 17, 35, {0, 5, 5, 290, 300});
  test_khatri_rao<T, int32_t>(10, 16, 16, {-4, 3, 1, 99, 200});
  test_khatri_rao<T, int64_t>(0, 3, 3, {0, 0});
  test_khatri_rao<T, int64_t>(4, 0, 3, {0, 4});
  test_syrk<T>(3, 300, 37);
  test_syrk<T>(1, 0, 5);
  test_syrk<T>(2, 9, 1);
}

}  // namespace

int main() {
  test_half();
  test_triangle_block();
  test_panel_product<float>();
  test_panel_product<double>();
  test_ops<Half>();
  test_ops<BFloat16>();
  test_ops<float>();
  test_ops<double>();
  std::puts("native tests passed");
}
