// The products of symmetric matrices with thin blocks, and residuals, against plain loops, on the CPU with several
// threads and by every instruction set, and as the CUDA kernels do it, thread after thread (emulated_block.h). Small
// integers, compared by ==; what is not to be read is NaN, every buffer ends where its data end.
#include <cmath>
#include <cstdio>
#include <set>
#include <vector>

#include "emulated_block.h"
#include "kernels/residual_block.h"
#include "kernels/symm_thin_block.h"

namespace {

using namespace sst;

// In every round but the first each block meets at most one other, and over all rounds each pair meets once.
void test_pairing() {
  for (int64_t blocks = 1; blocks < 20; ++blocks) {
    const Pairing pairing{blocks};
    std::set<std::pair<int64_t, int64_t>> met;
    for (int64_t round = 1; round < pairing.rounds(); ++round) {
      std::set<int64_t> busy;
      for (int64_t index = 0; index < pairing.pairs(); ++index) {
        const BlockIndex pair = pairing.pair(round, index);
        expect(pair.col < pair.row && pair.row <= blocks, "a pair is below the diagonal");
        expect(busy.insert(pair.row).second && busy.insert(pair.col).second, "a block meets one other in a round");
        if (pair.row < blocks) expect(met.insert({pair.row, pair.col}).second, "a pair meets once");
      }
      expect(busy.size() == static_cast<size_t>(2 * pairing.pairs()), "every block takes part in every round");
    }
    expect(met.size() == static_cast<size_t>(blocks * (blocks - 1) / 2), "all pairs meet");
  }
}

// Matrices and blocks with all they point to; `columns`: X and Y column-major.
template <class T>
struct Case {
  int64_t members, n, m, stride;
  std::vector<T> a[2], x, y[2];
  SymmThin<T> product;

  Case(int64_t matrices, int64_t members, int64_t n, int64_t m, bool columns)
      : members(members), n(n), m(m), stride(n % 4 == 0 ? n : n + 1), x(random_integers<T>(members * n * m)) {
    const int64_t row_stride = columns ? 1 : m, col_stride = columns ? n : 1;
    product = {.matrices = matrices,
               .a = {},
               .x = {x.data(), n * m, row_stride, col_stride},
               .y = {},
               .members = members,
               .n = n,
               .m = m};
    for (int64_t k = 0; k < matrices; ++k) {
      a[k] = random_integers<T>(members * n * stride - (stride - n));
      for (int64_t i = 0; i < static_cast<int64_t>(a[k].size()); ++i) {
        if (i % stride > i / stride % n) a[k][i] = NAN;
      }
      y[k].assign(members * n * m, NAN);
      product.a[k] = {a[k].data(), n * stride, stride, 1};
      product.y[k] = {y[k].data(), n * m, row_stride, col_stride};
    }
  }

  void check(const char* what) const {
    for (int64_t k = 0; k < product.matrices; ++k) {
      for (int64_t member = 0; member < members; ++member) {
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t c = 0; c < m; ++c) {
            T sum = 0;
            for (int64_t j = 0; j < n; ++j) {
              const int64_t row = std::max(i, j), col = std::min(i, j);
              sum += a[k][(member * n + row) * stride + col] * product.x.at(member, c)[j * product.x.row_stride];
            }
            expect(product.y[k].at(member, c)[i * product.y[k].row_stride] == sum, what);
          }
        }
      }
    }
  }
};

template <class T>
void test_cpu(Case<T> test, int set) {
  SymmThinCpu<T> plan(test.product, 3, set);
  std::vector<T> workspace(plan.workspace(), NAN);
  for (int64_t first = 0; first < test.members; first += plan.members()) {
    run_threads([&](auto& next) { plan.pack(first, workspace.data(), next); });
    run_threads([&](auto& next) { plan.multiply(first, workspace.data(), next); });
  }
  test.check(kInstructionSets[set].name);
}

// f(block) as a block of threads.
template <class F>
void run_block(int threads, int shared_bytes, F f) {
  static bool backwards = false;
  backwards = !backwards;
  EmulatedBlock block(threads, shared_bytes, backwards);
  f(block);
  expect(block.vector_conflicts == 0, "accesses of 16 bytes meet in no bank");
}

// What symm_thin.cu does, without a device, with bands of `rows` rows.
template <class T>
void test_cuda(Case<T> test, int64_t rows) {
  cuda::SymmThinGrid<T> grid(test.product);
  using Grid = cuda::SymmThinGrid<T>;
  grid.rows = rows;
  grid.row_bands = ceil_div(test.n, rows);
  const SymmThin<T>& product = test.product;
  std::vector<T> workspace(product.matrices * test.members * grid.units_each() * grid.partial(), NAN);
  for (int k = 0; k < product.matrices; ++k) {
    for (int64_t i = 0; i < test.members * grid.units_each(); ++i) {
      run_block(Grid::kThreads, Grid::kSharedBytes, [&](auto& block) {
        if (cuda::holds_vectors(product, k)) {
          cuda::symm_thin_unit<true>(block, product, grid, workspace.data(), k, i);
        } else {
          cuda::symm_thin_unit<false>(block, product, grid, workspace.data(), k, i);
        }
      });
    }
  }
  const int64_t sums = product.matrices * test.members * cuda::SymmThinSums<T>::blocks_each(grid);
  for (int64_t i = 0; i < sums; ++i) {
    run_block(cuda::SymmThinSums<T>::kThreads, 0,
              [&](auto& block) { cuda::symm_thin_sum(block, product, grid, workspace.data(), i); });
  }
  test.check("symm_thin on a device");
}

template <class T>
void test_residual(int64_t batch, int64_t rows, int64_t n) {
  const int64_t stride = n + 3, size = batch * rows * stride;
  const auto ax = random_integers<T>(size), bx = random_integers<T>(size), x = random_integers<T>(size);
  const auto theta = random_integers<double>(batch * rows);
  std::vector<T> r(batch * rows * n, NAN);
  std::vector<double> norms(batch * rows * kResidualNorms, NAN);
  const auto vectors = [&](const std::vector<T>& v) { return Vectors<T>{v.data(), rows * stride, stride}; };
  const Residual<T> args{vectors(ax), vectors(bx), vectors(x), {theta.data(), rows, 1}, r.data(), norms.data(),
                         batch,       rows,        n};
  const auto check = [&](const char* what) {
    for (int64_t row = 0; row < batch * rows; ++row) {
      double sums[kResidualNorms] = {};
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = row * stride + i;
        const double values[] = {ax[at] - theta[row] * bx[at], ax[at], bx[at], x[at]};
        expect(r[row * n + i] == values[0], what);
        for (int k = 0; k < kResidualNorms; ++k) sums[k] += values[k] * values[k];
      }
      for (int k = 0; k < kResidualNorms; ++k) expect(norms[row * kResidualNorms + k] == sums[k], what);
    }
    std::fill(r.begin(), r.end(), NAN);
    std::fill(norms.begin(), norms.end(), NAN);
  };
  for (int set = 0; set < kNumInstructionSets; ++set) {
    if (!kInstructionSets[set].supported()) continue;
    run_threads([&](auto& next) { residual_cpu(args, next, set); });
    check(kInstructionSets[set].name);
  }
  for (int64_t i = 0; i < batch * rows; ++i) {
    run_block(cuda::ResidualBlock::kThreads, cuda::ResidualBlock::kSharedBytes,
              [&](auto& block) { cuda::residual_row(block, args, i); });
  }
  check("residual on a device");
}

template <class T>
void test_blocks() {
  for (int64_t n : {0, 1, 16, 37, 1500}) test_residual<T>(2, 3, n);
  for (int64_t n : {1, 5, 32, 63, 70, 129, 140}) {
    test_cuda(Case<T>(1 + n % 2, 2, n, 9, false), 32);
    test_cuda(Case<T>(1, 1, n, 3, true), 64);
  }
  test_cuda(Case<T>(2, 1, 530, 8, true), 256);  // rows in several bands, columns in several groups of strips
  test_cuda(Case<T>(1, 2, 300, 20, false), 512);
}

template <class T>
void test_type() {
  for (int set = 0; set < kNumInstructionSets; ++set) {
    if (!kInstructionSets[set].supported()) continue;
    for (int64_t n : {1, 2, 9, 64, 65, 131}) {
      for (int64_t m : {1, 2, 4, 7, 8, 17, 31, 34}) test_cpu(Case<T>(1 + n % 2, 2, n, m, m % 2 == 0), set);
    }
    test_cpu(Case<T>(2, 1, 530, 3, true), set);
    test_cpu(Case<T>(1, 40, 70, 20, false), set);  // several cohorts
  }
}

}  // namespace

int main() {
  test_pairing();
  test_type<float>();
  test_type<double>();
  test_blocks<float>();
  test_blocks<double>();
  std::puts("product tests passed");
}
