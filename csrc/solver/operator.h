// Symmetric linear operators as the iteration sees them: batches of vectors in, batches of vectors out.
//
// A vector is a row: apply takes X (N, m, n) to (N, m, n), X[i, j] ↦ A_i X[i, j]. vec is row-major, so that a row of a
// Kronecker product of orders n₁ and n₂ is a matrix (n₁, n₂): (P ⊗ Q) vec(C) = vec(P C Qᵀ).
#pragma once

#include <memory>
#include <vector>

#include "aten/aten.h"

namespace sst {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

class Operator {
 public:
  virtual ~Operator() = default;
  virtual Tensor apply(const Tensor& x) const = 0;
  // The operators of the pencils `index` (int64) of the batch.
  virtual std::shared_ptr<const Operator> select(const Tensor& index) const = 0;
  // The same in another dtype.
  virtual std::shared_ptr<const Operator> cast(ScalarType dtype) const = 0;
  // Whether select and cast can be called: not for functions of Python.
  virtual bool separable() const { return true; }
};
using OperatorPtr = std::shared_ptr<const Operator>;

// A batch of pencils (A, B), with its preconditioner.
struct Pencil {
  OperatorPtr a, b, inverse;  // K⁻¹ ≈ B⁻¹, symmetric positive definite
  bool separable() const { return a->separable() && b->separable() && inverse->separable(); }
};

// AX and BX; for two dense operators in one pass over X.
std::pair<Tensor, Tensor> apply_both(const Operator& a, const Operator& b, const Tensor& x);

// How sst_kernels/program.py writes an operator down: a code, then its arguments, which are places in a list of
// tensors, counts, handles or operators.
enum class Code : int64_t {
  dense,       // matrix (N, n, n), its lower triangle
  matrix,      // matrix (N, n, n), whole
  diagonal,    // entries (N, 1, n)
  kronecker,   // n₁, n₂, left, right
  sum,         // count, terms
  scaled,      // factors (N, 1, 1), operator
  low_rank,    // rows R (N, r, n), core C (N, r, r): RᵀCR
  outer,       // rows R (N, r, n): RᵀR
  eigenbasis,  // n₁, n₂, U (N, n₁, n₁), W (N, n₂, n₂), D (N, 1, n): (U ⊗ W) D (U ⊗ W)ᵀ
  function,    // handle of a Python callable
};

// Reads one operator from code[at…], and moves `at` past it. Throws std::invalid_argument.
OperatorPtr parse_operator(const std::vector<int64_t>& code, const std::vector<Tensor>& tensors, size_t& at);

// I, of the dtype and on the device of `like`.
OperatorPtr identity_operator(const Tensor& like);

// The symmetric matrix whose lower triangle is that of `matrix` (N, n, n).
OperatorPtr dense_operator(const Tensor& matrix);
// The triangle of a dense operator (N, n, n), or null.
const Tensor* dense_matrix(const Operator& op);

}  // namespace sst
