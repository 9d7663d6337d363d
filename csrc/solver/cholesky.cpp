#include "cholesky.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>

#include "ops/solve_thin.h"

namespace sst {

namespace {

using aten::slice, aten::to_dtype, aten::transposed;

// (min L_ii / max L_ii)² above which a factor in float32 proves B positive definite and is near enough to it, and
// rounding in B's own dtype leaves Rayleigh–Ritz accurate: eps·√cond(B) is then of the order of the tolerance.
double safe_ratio(ScalarType dtype) { return dtype == ScalarType::Float ? 1e-3 : 1e-5; }

class Cholesky : public Operator {
 public:
  explicit Cholesky(const Tensor& factor) : Cholesky(factor.is_cuda() ? factor : pack_factors(factor), Kept{}) {}
  // x L⁻ᵀ L⁻¹ in the factor's dtype: callers keep the rows of x near unit length.
  Tensor apply(const Tensor& x) const override {
    const Tensor rows = to_dtype(x, kept_.scalar_type());
    const Tensor solved = rows.is_cuda() ? solve_adjoint(kept_, solve_factor(kept_, rows))
                                         : solve_thin(kept_, torch::stable::contiguous(rows));
    return to_dtype(solved, x.scalar_type());
  }
  OperatorPtr select(const Tensor& index) const override { return make(aten::index_select(kept_, 0, index)); }
  OperatorPtr cast(ScalarType) const override { return make(kept_); }

  ScalarType dtype() const { return kept_.scalar_type(); }
  // With the factors of `other` where `condition` (N) holds.
  OperatorPtr replaced_where(const Tensor& condition, const Cholesky& other) const {
    Tensor places = condition;
    while (places.dim() < kept_.dim()) places = aten::unsqueeze(places, -1);
    return make(aten::where(places, other.kept_, kept_));
  }

 private:
  struct Kept {};
  Cholesky(Tensor kept, Kept) : kept_(std::move(kept)) {}
  static OperatorPtr make(Tensor kept) { return OperatorPtr(new Cholesky(std::move(kept), Kept{})); }
  // The rows L⁻¹x, from the left, on columns.
  static Tensor solve_factor(const Tensor& factor, const Tensor& x) {
    return transposed(aten::solve_triangular(factor, transposed(x), false, true));
  }

  Tensor kept_;  // the factors: on CUDA L (N, n, n), on the CPU packed (N, size)
};

std::vector<double> to_host(const Tensor& x) {
  const Tensor host = torch::stable::contiguous(aten::on_host(to_dtype(x, ScalarType::Double)));
  const auto* const data = static_cast<const double*>(host.const_data_ptr());
  return {data, data + host.numel()};
}

// S ← S − XᵀX, the lower triangles of S (N, d, d), X (N, m, d).
void subtract_gram_(const Tensor& s, const Tensor& x) {
  const std::optional<Tensor> weight;
  aten::dispatch("sst_kernels::syrk_accumulate_", "", s, x, weight, -1.0, 1.0, std::string("ieee"), true);
}

// Rows and columns of a block of `factorize_in_blocks`; below some of them torch's own is as fast.
constexpr int64_t kBlock = 192, kFewBlocks = 6;

// L (N, n, n) of the lower triangles of B, its upper triangle without meaning, and info (N), > 0 where there is no
// factor. By blocks of columns: the factor L_jj of a diagonal block, L_ij = A_ij L_jj⁻ᵀ below it, and A_ii ← A_ii −
// L_ij L_ijᵀ by our own symmetric update, which is what the time goes into.
std::pair<Tensor, Tensor> factorize_in_blocks(const Tensor& b, ScalarType dtype) {
  const int64_t n = b.size(1);
  const Tensor a = torch::stable::new_empty(b, {b.size(0), n, n}, dtype);
  const auto block = [&](const Tensor& of, int64_t row, int64_t rows, int64_t col, int64_t cols) {
    return slice(slice(of, 1, row, rows), 2, col, cols);
  };
  const auto blocks = [&](const auto& visit) {
    for (int64_t first = 0; first < n; first += kBlock) visit(first, std::min(kBlock, n - first));
  };
  // The lower blocks alone: memory that is never touched costs nothing.
  blocks([&](int64_t first, int64_t size) {
    aten::copy_(block(a, first, n - first, first, size), block(b, first, n - first, first, size));
  });
  Tensor info;
  blocks([&](int64_t first, int64_t size) {
    const int64_t rest = n - first - size;
    const Tensor corner = block(a, first, size, first, size);
    const auto [factor, failed] = aten::cholesky_ex(corner);
    const Tensor counted = to_dtype(failed, ScalarType::Double);
    info = first == 0 ? counted : aten::add(info, counted);
    aten::copy_(corner, factor);
    if (rest == 0) return;
    const Tensor inverse = aten::solve_triangular(factor, aten::eye_like(factor, size), false, true);
    const Tensor below = block(a, first + size, rest, first, size), rows = aten::matmul(inverse, transposed(below));
    aten::copy_(below, transposed(rows));
    subtract_gram_(block(a, first + size, rest, first + size, rest), rows);
  });
  return {a, info};
}

struct Factor {
  Tensor factor;                    // (N, n, n)
  std::vector<bool> failed;         // whether there is none, or none that is finite
  std::vector<double> least, most;  // of its diagonal
};

Factor factorize(const Tensor& b, ScalarType dtype) {
  Tensor factor, info;
  if (!b.is_cuda() && b.size(1) >= kFewBlocks * kBlock) {
    std::tie(factor, info) = factorize_in_blocks(b, dtype);
  } else {
    std::tie(factor, info) = aten::cholesky_ex(to_dtype(b, dtype));
  }
  const Tensor pivots = aten::diagonal(factor);
  Factor found{factor, {}, to_host(aten::amin(pivots, -1)), to_host(torch::stable::amax(pivots, -1, false))};
  const std::vector<double> infos = to_host(info);
  for (size_t i = 0; i < infos.size(); ++i) {
    // The root of infinity is no failure to LAPACK.
    found.failed.push_back(infos[i] != 0 || !std::isfinite(found.least[i]) || !std::isfinite(found.most[i]));
  }
  return found;
}

}  // namespace

CholeskyInverse cholesky_inverse(const Tensor& b) {
  const int64_t batch = b.size(0), n = b.size(1);
  Factor made = factorize(b, ScalarType::Float);
  const auto hardly_any = [&](int64_t i) {
    return made.least[i] * made.least[i] < safe_ratio(b.scalar_type()) * made.most[i] * made.most[i];
  };
  bool safe = true;
  for (int64_t i = 0; i < batch; ++i) safe = safe && !made.failed[i] && !hardly_any(i);
  if (!safe) {
    made = factorize(b, ScalarType::Double);
    safe = true;  // unless a pencil that has a factor needs it in float64: those without one are solved no further
    for (int64_t i = 0; i < batch; ++i) safe = safe && (made.failed[i] || !hardly_any(i));
  }
  const Tensor factor = safe ? to_dtype(made.factor, ScalarType::Float) : made.factor;
  CholeskyInverse found{nullptr, std::nullopt, std::vector<Definiteness>(batch, Definiteness::positive)};
  for (int64_t i = 0; i < batch; ++i) {
    if (!made.failed[i]) continue;
    const double total = to_host(aten::sum_over(aten::sum_over(aten::tril(slice(b, 0, i, 1)), -1), -1))[0];
    found.definiteness[i] = std::isfinite(total) ? Definiteness::indefinite : Definiteness::not_finite;
    const Tensor place = slice(factor, 0, i, 1);
    aten::copy_(place, aten::eye_like(place, n));
  }
  found.inverse = std::make_shared<Cholesky>(factor);
  if (!safe) found.factor = factor;
  return found;
}

Tensor solve_adjoint(const Tensor& factor, const Tensor& y) {
  return transposed(aten::solve_triangular(transposed(factor), transposed(y), true, true));
}

Tensor congruence(const Tensor& a, const Tensor& factor) {
  const Tensor lower = aten::tril(to_dtype(a, factor.scalar_type()));
  const Tensor whole = aten::add(lower, transposed(aten::tril(lower, -1)));
  const Tensor half = aten::solve_triangular(factor, whole, false, true);
  // Symmetric, so its transpose is as good, and has adjacent rows.
  return torch::stable::contiguous(transposed(aten::solve_triangular(factor, transposed(half), false, true)));
}

OperatorPtr shifted_inverse(const Tensor& a, const Tensor& b, const Tensor& eta, const OperatorPtr& old) {
  const auto* const before = dynamic_cast<const Cholesky*>(old.get());
  if (!before) return old;
  const auto in = [&](const Tensor& x) { return to_dtype(x, before->dtype()); };
  const auto [factor, info] = aten::cholesky_ex(aten::subtract(aten::mul(in(b), in(eta)), in(a)));
  const Tensor failed = aten::gt(info, torch::stable::new_zeros(info, {1}));
  return Cholesky(factor).replaced_where(failed, *before);
}

}  // namespace sst
