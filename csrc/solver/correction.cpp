#include "correction.h"

namespace sst {

namespace {

using aten::add, aten::div, aten::matmul, aten::mul, aten::subtract, aten::to_dtype, aten::transposed;

constexpr double kTenfold = 0.01;  // of the squared residual

// Σ_j x_j y_j of each row, (N, p, 1), summed in float64.
Tensor dots(const Tensor& x, const Tensor& y) {
  return aten::unsqueeze(aten::sum_over(mul(to_dtype(x, ScalarType::Double), to_dtype(y, ScalarType::Double)), 2), 2);
}

class Projected {
 public:
  Projected(const OperatorPtr& inverse, const Tensor& q, const Tensor& bq) : inverse_(inverse), q_(q), bq_(bq) {
    z_ = inverse_->apply(bq);
    // QᵀBZ = (BQ)ᵀ K⁻¹ (BQ) is symmetric positive definite.
    Tensor m = matmul(to_dtype(bq_, ScalarType::Double), transposed(to_dtype(z_, ScalarType::Double)));
    // Rows of Q that are no vectors are zero: ones in their place on the diagonal.
    const Tensor diagonal = aten::diagonal(m), none = torch::stable::new_zeros(m, {1});
    const Tensor one = torch::stable::full({1}, 1.0, ScalarType::Double, std::nullopt, m.device());
    m = add(m, aten::diag_embed(aten::where(aten::gt(diagonal, none), none, one)));
    const auto [factor, info] = aten::cholesky_ex(m);
    factor_ = factor;
    failed_ = aten::unsqueeze(aten::unsqueeze(aten::gt(info, torch::stable::new_zeros(info, {1})), 1), 2);
  }
  // K̃⁻¹g.
  Tensor precondition(const Tensor& g) const {
    const Tensor y = inverse_->apply(g);
    const Tensor c = matmul(to_dtype(y, ScalarType::Double), transposed(to_dtype(bq_, ScalarType::Double)));
    // c (LLᵀ)⁻¹, rows from the right.
    const Tensor half = aten::solve_triangular(transposed(factor_), c, true, false);
    const Tensor solved = aten::solve_triangular(factor_, half, false, false);
    const Tensor coefficients = aten::where(failed_, torch::stable::new_zeros(solved, {1, 1, 1}), solved);
    return subtract(y, matmul(to_dtype(coefficients, y.scalar_type()), z_));
  }
  // (I − BQQᵀ) y.
  Tensor project(const Tensor& y) const { return subtract(y, matmul(matmul(y, transposed(q_)), bq_)); }

 private:
  OperatorPtr inverse_;
  Tensor q_, bq_, z_, factor_, failed_;  // failed (N, 1, 1): no factor, and no projection of K⁻¹
};

}  // namespace

Tensor solve_correction(const Pencil& pencil, const Tensor& q, const Tensor& bq, const Tensor& theta,
                        const Tensor& residual, int64_t steps) {
  const ScalarType dtype = residual.scalar_type();
  const Projected projected(pencil.inverse, q, bq);
  Tensor g = projected.project(residual), z = projected.precondition(g);
  const Tensor first = z;
  Tensor t = torch::stable::new_zeros(g, {g.size(0), g.size(1), g.size(2)}), d = z, rho = dots(g, z);
  const Tensor zero = torch::stable::new_zeros(rho, {1, 1, 1});
  const Tensor enough =
      mul(dots(g, g), torch::stable::full({1, 1, 1}, kTenfold, ScalarType::Double, std::nullopt, g.device()));
  const Tensor shift = to_dtype(theta, dtype);
  for (int64_t step = 0; step < steps; ++step) {
    const auto [ad, bd] = apply_both(*pencil.a, *pencil.b, d);
    const Tensor w = projected.project(subtract(mul(bd, shift), ad)), curvature = dots(d, w);
    const Tensor alive = aten::logical_and(aten::gt(curvature, zero), aten::gt(dots(g, g), enough));
    const Tensor alpha = aten::where(alive, div(rho, curvature), zero), along = to_dtype(alpha, dtype);
    t = add(t, mul(d, along));
    g = subtract(g, mul(w, along));
    if (step + 1 == steps) break;
    z = projected.precondition(g);
    const Tensor next = dots(g, z), beta = to_dtype(aten::where(alive, div(next, rho), zero), dtype);
    d = add(z, mul(d, beta));
    rho = next;
  }
  // A row without any step keeps the preconditioned residual.
  return aten::where(aten::gt(dots(t, t), zero), t, first);
}

}  // namespace sst
