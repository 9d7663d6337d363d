#include "basis.h"

namespace sst {

namespace {

using aten::add, aten::matmul, aten::slice, aten::to_dtype, aten::transposed;

// Squared: directions of a block that are nearer than this to the span of the others are dropped.
constexpr double kDropDouble = 1e-8, kDropFloat = 1e-5, kDropSecond = 1e-2;
constexpr double kRounding = 1e-13;  // of tᵀBt / (‖t‖ ‖Bt‖) in float64; 1e-5 in float32

Tensor in_double(const Tensor& x) { return to_dtype(x, ScalarType::Double); }

// T made B-orthogonal to S, by (BS)Tᵀ, and orthonormal, before B is applied to it: so BT does not lose digits when it
// is carried through the B-orthonormalisation.
Tensor spread(const Tensor& t, const Tensor& s, const Tensor& bs) {
  const Tensor c = matmul(in_double(t), transposed(in_double(bs)));
  const Tensor rest = aten::subtract(t, matmul(to_dtype(c, t.scalar_type()), s)), wide = in_double(rest);
  const Tensor none = torch::stable::new_empty(c, {c.size(0), 0, c.size(1)}),
               unused = torch::stable::new_zeros(c, {c.size(0), 2});
  const Orthonormal m = orthonormalizer(none, matmul(wide, transposed(wide)), nullptr, kDropDouble, 0, unused);
  return matmul(to_dtype(m.of_block, t.scalar_type()), rest);
}

}  // namespace

Basis::Basis(const Tensor& like, int64_t capacity)
    : h_(torch::stable::new_empty(like, {like.size(0), capacity, capacity}, ScalarType::Double)),
      valid_(torch::stable::new_zeros(like, {like.size(0), capacity}, ScalarType::Double)),
      notes_(torch::stable::new_zeros(like, {like.size(0), 2}, ScalarType::Double)),
      drop_(like.scalar_type() == ScalarType::Double ? kDropDouble : kDropFloat) {
  for (Tensor& part : parts_) {
    part = torch::stable::new_empty(like, {like.size(0), capacity, like.size(2)}, like.scalar_type());
  }
}

void Basis::append(Tensor t, const Operator& a, const Operator& b, bool careful) {
  const ScalarType dtype = t.scalar_type();
  const int64_t p = t.size(1), all = locked_ + size_;
  const Tensor s = narrow_rows(kVectors, 0, all), bs = narrow_rows(kB, 0, all), s_double = in_double(s);
  t = spread(t, s, bs);
  Tensor bt = b.apply(t), valid, unused = torch::stable::new_zeros(notes_, {notes_.size(0), 2});
  for (int pass = 0; pass < 2; ++pass) {
    const Tensor bt_double = in_double(bt), t_double = in_double(t), columns = transposed(bt_double);
    Tensor magnitude;
    if (pass == 0) {
      magnitude = aten::mul(aten::sum_over(aten::mul(t_double, t_double), 2),
                            aten::sum_over(aten::mul(bt_double, bt_double), 2));
    }
    const Orthonormal m = orthonormalizer(matmul(s_double, columns), matmul(t_double, columns),
                                          pass == 0 ? &magnitude : nullptr, pass == 0 ? drop_ : kDropSecond,
                                          dtype == ScalarType::Double ? kRounding : 1e-5, pass == 0 ? notes_ : unused);
    const Tensor of_basis = to_dtype(m.of_basis, dtype), of_block = to_dtype(m.of_block, dtype);
    t = add(matmul(of_basis, s), matmul(of_block, t));
    bt = careful && pass == 0 ? b.apply(t) : add(matmul(of_basis, bs), matmul(of_block, bt));
    valid = m.valid;
  }
  const Tensor at = a.apply(t);
  aten::copy_(narrow_rows(kVectors, all, p), t);
  aten::copy_(narrow_rows(kA, all, p), at);
  aten::copy_(narrow_rows(kB, all, p), bt);
  aten::copy_(slice(valid_, 1, all, p), valid);
  const Tensor at_double = in_double(at);
  const Tensor old = matmul(at_double, transposed(slice(s_double, 1, locked_, size_)));
  aten::copy_(slice(slice(h_, 1, size_, p), 2, 0, size_), old);
  aten::copy_(slice(slice(h_, 1, size_, p), 2, size_, p), matmul(at_double, transposed(in_double(t))));
  size_ += p;
}

SmallEigen Basis::rayleigh_ritz() const {
  return ritz_pairs(slice(slice(h_, 1, 0, size_), 2, 0, size_), slice(valid_, 1, locked_, size_));
}

Tensor Basis::combine(Part part, const Tensor& coefficients) const {
  const Tensor v = narrow_rows(part, locked_, size_);
  return matmul(to_dtype(coefficients, v.scalar_type()), v);
}

void Basis::restart(const Tensor& coefficients, const Tensor& valid, const Tensor& matrix) {
  const int64_t kept = coefficients.size(1);
  for (const Part part : {kVectors, kA, kB}) {
    aten::copy_(narrow_rows(part, locked_, kept), combine(part, coefficients));
  }
  const Tensor h = matmul(matmul(coefficients, matrix), transposed(coefficients));
  aten::copy_(slice(slice(h_, 1, 0, kept), 2, 0, kept), h);
  aten::copy_(slice(valid_, 1, locked_, kept), valid);
  size_ = kept;
}

void Basis::lock(int64_t count) {
  locked_ += count;
  size_ -= count;
  const Tensor h = torch::stable::clone(slice(slice(h_, 1, count, size_), 2, count, size_));
  aten::copy_(slice(slice(h_, 1, 0, size_), 2, 0, size_), h);
}

void Basis::select(const Tensor& index) {
  for (Tensor& part : parts_) part = aten::index_select(part, 0, index);
  h_ = aten::index_select(h_, 0, index);
  valid_ = aten::index_select(valid_, 0, index);
  notes_ = aten::index_select(notes_, 0, index);
}

}  // namespace sst
