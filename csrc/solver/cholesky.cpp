#include "cholesky.h"

#include <cmath>
#include <tuple>

namespace sst {

namespace {

using aten::slice, aten::to_dtype, aten::transposed;

// (min L_ii / max L_ii)² above which a factor in float32 proves B positive definite, and is near enough to it.
constexpr double kSafe = 1e-5;

// The rows L⁻¹x.
Tensor solve_factor(const Tensor& factor, const Tensor& x) {
  return aten::solve_triangular(transposed(factor), x, true, false);
}

class Cholesky : public Operator {
 public:
  explicit Cholesky(Tensor factor) : factor_(std::move(factor)) {}
  // x L⁻ᵀ L⁻¹ in the factor's dtype: callers keep the rows of x near unit length.
  Tensor apply(const Tensor& x) const override {
    return to_dtype(solve_adjoint(factor_, solve_factor(factor_, to_dtype(x, factor_.scalar_type()))), x.scalar_type());
  }
  OperatorPtr select(const Tensor& index) const override {
    return std::make_shared<Cholesky>(aten::index_select(factor_, 0, index));
  }
  OperatorPtr cast(ScalarType) const override { return std::make_shared<Cholesky>(factor_); }

  const Tensor& factor() const { return factor_; }

 private:
  Tensor factor_;
};

std::vector<double> to_host(const Tensor& x) {
  const Tensor host = torch::stable::contiguous(aten::on_host(to_dtype(x, ScalarType::Double)));
  const auto* const data = static_cast<const double*>(host.const_data_ptr());
  return {data, data + host.numel()};
}

}  // namespace

CholeskyInverse cholesky_inverse(const Tensor& b) {
  const int64_t batch = b.size(0), n = b.size(1);
  auto [factor, info] = aten::cholesky_ex(to_dtype(b, ScalarType::Float));
  const Tensor pivots = aten::diagonal(factor);
  const std::vector<double> least = to_host(aten::amin(pivots, -1)), most = to_host(torch::stable::amax(pivots, -1, false));
  std::vector<double> failed = to_host(info);
  bool safe = true;
  for (int64_t i = 0; i < batch; ++i) safe = safe && failed[i] == 0 && least[i] * least[i] >= kSafe * most[i] * most[i];
  if (!safe) {
    std::tie(factor, info) = aten::cholesky_ex(to_dtype(b, ScalarType::Double));
    failed = to_host(info);
  }
  // The last pivot may be infinite without a failure.
  for (int64_t i = 0; i < batch; ++i) failed[i] += !std::isfinite(most[i]);
  CholeskyInverse found{nullptr, factor, std::vector<Definiteness>(batch, Definiteness::positive), safe};
  for (int64_t i = 0; i < batch; ++i) {
    if (failed[i] == 0) continue;
    const double total = to_host(aten::sum_over(aten::sum_over(aten::tril(slice(b, 0, i, 1)), -1), -1))[0];
    found.definiteness[i] = std::isfinite(total) ? Definiteness::indefinite : Definiteness::not_finite;
    const Tensor place = slice(factor, 0, i, 1);
    aten::copy_(place, aten::eye_like(place, n));
  }
  found.inverse = std::make_shared<Cholesky>(factor);
  return found;
}

Tensor solve_adjoint(const Tensor& factor, const Tensor& y) { return aten::solve_triangular(factor, y, false, false); }

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
  const auto in = [&](const Tensor& x) { return to_dtype(x, before->factor().scalar_type()); };
  const auto [factor, info] = aten::cholesky_ex(aten::subtract(aten::mul(in(b), in(eta)), in(a)));
  const Tensor failed = aten::unsqueeze(aten::unsqueeze(aten::gt(info, torch::stable::new_zeros(info, {1})), 1), 2);
  return std::make_shared<Cholesky>(aten::where(failed, before->factor(), factor));
}

}  // namespace sst
