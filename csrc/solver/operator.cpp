#include "operator.h"

#include <stdexcept>

#include "ops/symm_thin.h"

namespace sst {

namespace {

using aten::matmul, aten::mul, aten::transposed, aten::to_dtype;

// What serves every pencil, of batch 1 or expanded, is not copied.
Tensor select_batch(const Tensor& x, const Tensor& index) {
  if (x.size(0) == 1) return x;
  return x.stride(0) == 0 ? aten::slice(x, 0, 0, index.size(0)) : aten::index_select(x, 0, index);
}

// An operator that is a list of tensors with a rule: `Derived` has a constructor from them, and apply.
template <class Derived, size_t kTensors>
class TensorOperator : public Operator {
 public:
  explicit TensorOperator(std::array<Tensor, kTensors> tensors) : tensors_(std::move(tensors)) {}
  OperatorPtr select(const Tensor& index) const override {
    return map([&](const Tensor& x) { return select_batch(x, index); });
  }
  OperatorPtr cast(ScalarType dtype) const override {
    return map([&](const Tensor& x) { return to_dtype(x, dtype); });
  }

 protected:
  std::array<Tensor, kTensors> tensors_;

 private:
  template <class F>
  OperatorPtr map(F f) const {
    auto copy = std::make_shared<Derived>(static_cast<const Derived&>(*this));
    for (Tensor& x : copy->tensors_) x = f(x);
    return copy;
  }
};

class Dense : public TensorOperator<Dense, 1> {
 public:
  using TensorOperator::TensorOperator;
  Tensor apply(const Tensor& x) const override { return transposed(symm_thin(matrix(), transposed(x))); }
  const Tensor& matrix() const { return tensors_[0]; }
};

class Matrix : public TensorOperator<Matrix, 1> {
 public:
  using TensorOperator::TensorOperator;
  Tensor apply(const Tensor& x) const override { return matmul(x, tensors_[0]); }
};

class Diagonal : public TensorOperator<Diagonal, 1> {
 public:
  using TensorOperator::TensorOperator;
  Tensor apply(const Tensor& x) const override { return mul(x, tensors_[0]); }
};

class LowRank : public TensorOperator<LowRank, 2> {
 public:
  using TensorOperator::TensorOperator;
  Tensor apply(const Tensor& x) const override {
    const auto& [rows, core] = tensors_;
    return matmul(matmul(matmul(x, transposed(rows)), core), rows);
  }
};

class Outer : public TensorOperator<Outer, 1> {
 public:
  using TensorOperator::TensorOperator;
  Tensor apply(const Tensor& x) const override { return matmul(matmul(x, transposed(tensors_[0])), tensors_[0]); }
};

// Each row of x (N, m, n₁n₂), a matrix C (n₁, n₂), becomes its transpose.
Tensor transpose_rows(const Tensor& x, int64_t n1, int64_t n2) {
  const Tensor parts = torch::stable::reshape(x, {x.size(0), x.size(1), n1, n2});
  return torch::stable::reshape(transposed(parts), {x.size(0), x.size(1), n2 * n1});
}

// f applied to the rows of each C (n₁, n₂).
template <class F>
Tensor map_factor_rows(const Tensor& x, int64_t n2, F f) {
  return torch::stable::reshape(f(torch::stable::reshape(x, {x.size(0), -1, n2})), {x.size(0), x.size(1), -1});
}

class Eigenbasis : public TensorOperator<Eigenbasis, 3> {
 public:
  Eigenbasis(std::array<Tensor, 3> tensors, int64_t n1, int64_t n2)
      : TensorOperator(std::move(tensors)), n1_(n1), n2_(n2) {}
  Tensor apply(const Tensor& x) const override {
    const auto& [u, w, d] = tensors_;
    return rotate(mul(rotate(x, u, w), d), transposed(u), transposed(w));
  }

 private:
  // Uᵀ C W.
  Tensor rotate(const Tensor& x, const Tensor& u, const Tensor& w) const {
    const Tensor cw = map_factor_rows(x, n2_, [&](const Tensor& rows) { return matmul(rows, w); });
    const Tensor t =
        map_factor_rows(transpose_rows(cw, n1_, n2_), n1_, [&](const Tensor& rows) { return matmul(rows, u); });
    return transpose_rows(t, n2_, n1_);
  }
  int64_t n1_, n2_;
};

class Kronecker : public Operator {
 public:
  Kronecker(int64_t n1, int64_t n2, OperatorPtr left, OperatorPtr right)
      : n1_(n1), n2_(n2), left_(std::move(left)), right_(std::move(right)) {}
  Tensor apply(const Tensor& x) const override {
    const Tensor y = map_factor_rows(x, n2_, [&](const Tensor& rows) { return right_->apply(rows); });
    const Tensor z =
        map_factor_rows(transpose_rows(y, n1_, n2_), n1_, [&](const Tensor& rows) { return left_->apply(rows); });
    return transpose_rows(z, n2_, n1_);
  }
  OperatorPtr select(const Tensor& index) const override {
    return std::make_shared<Kronecker>(n1_, n2_, left_->select(index), right_->select(index));
  }
  OperatorPtr cast(ScalarType dtype) const override {
    return std::make_shared<Kronecker>(n1_, n2_, left_->cast(dtype), right_->cast(dtype));
  }
  bool separable() const override { return left_->separable() && right_->separable(); }

 private:
  int64_t n1_, n2_;
  OperatorPtr left_, right_;
};

class Sum : public Operator {
 public:
  explicit Sum(std::vector<OperatorPtr> terms) : terms_(std::move(terms)) {}
  Tensor apply(const Tensor& x) const override {
    Tensor y = terms_[0]->apply(x);
    for (size_t i = 1; i < terms_.size(); ++i) y = aten::add(y, terms_[i]->apply(x));
    return y;
  }
  OperatorPtr select(const Tensor& index) const override {
    return map([&](const Operator& term) { return term.select(index); });
  }
  OperatorPtr cast(ScalarType dtype) const override {
    return map([&](const Operator& term) { return term.cast(dtype); });
  }
  bool separable() const override {
    for (const auto& term : terms_) {
      if (!term->separable()) return false;
    }
    return true;
  }

 private:
  template <class F>
  OperatorPtr map(F f) const {
    std::vector<OperatorPtr> terms;
    for (const auto& term : terms_) terms.push_back(f(*term));
    return std::make_shared<Sum>(std::move(terms));
  }
  std::vector<OperatorPtr> terms_;
};

class Scaled : public Operator {
 public:
  Scaled(Tensor factors, OperatorPtr op) : factors_(std::move(factors)), operator_(std::move(op)) {}
  Tensor apply(const Tensor& x) const override { return mul(operator_->apply(x), factors_); }
  OperatorPtr select(const Tensor& index) const override {
    return std::make_shared<Scaled>(select_batch(factors_, index), operator_->select(index));
  }
  OperatorPtr cast(ScalarType dtype) const override {
    return std::make_shared<Scaled>(to_dtype(factors_, dtype), operator_->cast(dtype));
  }
  bool separable() const override { return operator_->separable(); }

 private:
  Tensor factors_;
  OperatorPtr operator_;
};

class Function : public Operator {
 public:
  explicit Function(int64_t handle) : handle_(handle) {}
  Tensor apply(const Tensor& x) const override {
    return aten::take(aten::dispatch("sst_kernels::_apply", "", x, handle_)[0]);
  }
  OperatorPtr select(const Tensor&) const override { throw std::logic_error("a function has no parts"); }
  OperatorPtr cast(ScalarType) const override { throw std::logic_error("a function has one dtype"); }
  bool separable() const override { return false; }

 private:
  int64_t handle_;
};

}  // namespace

OperatorPtr parse_operator(const std::vector<int64_t>& code, const std::vector<Tensor>& tensors, size_t& at) {
  const auto number = [&] {
    if (at >= code.size()) throw std::invalid_argument("_davidson: the code of an operator ends early");
    return code[at++];
  };
  const auto tensor = [&] {
    const int64_t i = number();
    if (i < 0 || i >= static_cast<int64_t>(tensors.size())) {
      throw std::invalid_argument("_davidson: the code of an operator names a tensor that is not there");
    }
    return tensors[i];
  };
  switch (static_cast<Code>(number())) {
    case Code::dense:
      return std::make_shared<Dense>(std::array{tensor()});
    case Code::matrix:
      return std::make_shared<Matrix>(std::array{tensor()});
    case Code::diagonal:
      return std::make_shared<Diagonal>(std::array{tensor()});
    case Code::kronecker: {
      const int64_t n1 = number(), n2 = number();
      const OperatorPtr left = parse_operator(code, tensors, at);
      return std::make_shared<Kronecker>(n1, n2, left, parse_operator(code, tensors, at));
    }
    case Code::sum: {
      const int64_t count = number();
      if (count < 1) throw std::invalid_argument("_davidson: a sum of operators must have terms");
      std::vector<OperatorPtr> terms(count);
      for (auto& term : terms) term = parse_operator(code, tensors, at);
      return std::make_shared<Sum>(std::move(terms));
    }
    case Code::scaled: {
      const Tensor factors = tensor();
      return std::make_shared<Scaled>(factors, parse_operator(code, tensors, at));
    }
    case Code::low_rank: {
      const Tensor rows = tensor();
      return std::make_shared<LowRank>(std::array{rows, tensor()});
    }
    case Code::outer:
      return std::make_shared<Outer>(std::array{tensor()});
    case Code::eigenbasis: {
      const int64_t n1 = number(), n2 = number();
      const Tensor u = tensor(), w = tensor();
      return std::make_shared<Eigenbasis>(std::array{u, w, tensor()}, n1, n2);
    }
    case Code::function:
      return std::make_shared<Function>(number());
  }
  throw std::invalid_argument("_davidson: unknown code of an operator");
}

OperatorPtr identity_operator(const Tensor& like) {
  const Tensor one = torch::stable::full({1, 1, 1}, 1.0, like.scalar_type(), std::nullopt, like.device());
  return std::make_shared<Diagonal>(std::array{one});
}

OperatorPtr dense_operator(const Tensor& matrix) { return std::make_shared<Dense>(std::array{matrix}); }

const Tensor* dense_matrix(const Operator& op) {
  const auto* dense = dynamic_cast<const Dense*>(&op);
  return dense ? &dense->matrix() : nullptr;
}

std::pair<Tensor, Tensor> apply_both(const Operator& a, const Operator& b, const Tensor& x) {
  const Tensor *const p = dense_matrix(a), *const q = dense_matrix(b);
  if (!p || !q) return {a.apply(x), b.apply(x)};
  const auto [y, z] = symm_thin_pair(*p, *q, transposed(x));
  return {transposed(y), transposed(z)};
}

}  // namespace sst
