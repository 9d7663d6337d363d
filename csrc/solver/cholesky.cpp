#include "cholesky.h"

#include <cmath>

namespace sst {

namespace {

using aten::slice, aten::to_dtype, aten::transposed;

// (min L_ii / max L_ii)² above which a factor in float32 proves B positive definite.
constexpr double kSafe = 1e-4;

class Cholesky : public Operator {
 public:
  explicit Cholesky(Tensor factor) : factor_(std::move(factor)) {}
  // x L⁻ᵀ L⁻¹ in float32: callers keep the rows of x near unit length.
  Tensor apply(const Tensor& x) const override {
    const Tensor y = aten::solve_triangular(transposed(factor_), to_dtype(x, factor_.scalar_type()), true, false);
    return to_dtype(aten::solve_triangular(factor_, y, false, false), x.scalar_type());
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
  const Tensor diagonal = aten::diagonal(factor);
  const std::vector<double> failed = to_host(info), least = to_host(aten::amin(diagonal, -1)),
                            most = to_host(torch::stable::amax(diagonal, -1, false));
  CholeskyInverse found{nullptr, std::vector<Definiteness>(batch, Definiteness::positive)};
  bool any = false;
  for (int64_t i = 0; i < batch; ++i) {
    const double ratio = least[i] / most[i];
    if (failed[i] == 0 && ratio * ratio >= kSafe) {
      any = true;
      continue;
    }
    const Tensor one = slice(b, 0, i, 1), place = slice(factor, 0, i, 1);
    const auto [exact, exact_info] = aten::cholesky_ex(to_dtype(one, ScalarType::Double));
    if (to_host(exact_info)[0] == 0) {
      any = true;
      aten::copy_(place, exact);
      continue;
    }
    const double total = to_host(aten::sum_over(aten::sum_over(aten::tril(one), -1), -1))[0];
    found.definiteness[i] = std::isfinite(total) ? Definiteness::indefinite : Definiteness::not_finite;
    aten::copy_(place, aten::eye_like(place, n));
  }
  if (any) found.inverse = std::make_shared<Cholesky>(factor);
  return found;
}

OperatorPtr shifted_inverse(const Tensor& a, const Tensor& b, const Tensor& eta, const OperatorPtr& old) {
  const auto* const before = dynamic_cast<const Cholesky*>(old.get());
  if (!before) return old;
  const auto single = [](const Tensor& x) { return to_dtype(x, ScalarType::Float); };
  const auto [factor, info] =
      aten::cholesky_ex(aten::subtract(aten::mul(single(b), single(eta)), single(a)));
  const Tensor failed = aten::unsqueeze(aten::unsqueeze(aten::gt(info, torch::stable::new_zeros(info, {1})), 1), 2);
  return std::make_shared<Cholesky>(aten::where(failed, before->factor(), factor));
}

}  // namespace sst
