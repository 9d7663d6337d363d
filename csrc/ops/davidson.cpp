// The op behind sst_kernels/davidson.py: operators and options in, certified pairs out.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>

#include "checks.h"
#include "solver/cholesky.h"
#include "solver/interrupt.h"
#include "solver/solve.h"

namespace sst {

namespace {

// Option numbers by their place in the list.
enum Option { kK, kBlock, kKeep, kCapacity, kWindow, kMaxIterations, kInner, kMixed, kWarm, kOptionCount };

OperatorPtr parse_whole(const std::vector<int64_t>& code, const std::vector<Tensor>& tensors) {
  size_t at = 0;
  return parse_operator(code, tensors, at);
}

Tensor doubles(const std::vector<double>& values, const std::vector<int64_t>& sizes) {
  const Tensor x = torch::stable::empty(sizes, ScalarType::Double);
  std::copy(values.begin(), values.end(), static_cast<double*>(x.mutable_data_ptr()));
  return x;
}

// A pencil without a result: NaN, with its status.
void blank(const Solution& s, int64_t i) {
  for (const Tensor& x : {s.theta, s.vectors, s.eta}) {
    const Tensor place = aten::slice(x, 0, i, 1);
    const std::vector<int64_t> one(place.dim(), 1);
    aten::copy_(place, torch::stable::full(one, std::numeric_limits<double>::quiet_NaN(), x.scalar_type(), std::nullopt,
                                           x.device()));
  }
}

// Outputs: θ (N, r), vectors (N, r, n), η (N, r), B-orthogonality (N), status bits and the error of the guard (N, 2),
// counts of columns multiplied by A, B and K⁻¹ and of iterations, and whether η and the B-orthogonality are those of
// the pencil itself (5), history (iterations, 3): pencils in the batch, pairs not converged, the largest η.
std::vector<Tensor> davidson_op(const std::vector<Tensor>& tensors, const std::vector<int64_t>& a_code,
                                const std::vector<int64_t>& b_code, const std::vector<int64_t>& inverse_code,
                                const Tensor& rows, const Tensor& fresh, const std::vector<int64_t>& numbers,
                                const std::vector<double>& tolerances) {
  if (numbers.size() != kOptionCount || tolerances.size() != 2) fail("_davidson: wrong number of options");
  Pencil pencil{parse_whole(a_code, tensors), parse_whole(b_code, tensors), nullptr};
  const int64_t batch = rows.size(0);
  bool single = numbers[kMixed] != 0;
  std::optional<Tensor> factor;  // of an ill-conditioned B: the pencil is solved as L⁻¹AL⁻ᵀ y = θ y, x = L⁻ᵀy
  std::vector<int64_t> good;
  std::vector<double> status(batch, 0), guard_error(batch, 0);
  if (inverse_code.empty()) {
    const Tensor* const matrix = dense_matrix(*pencil.b);
    if (!matrix) fail("_davidson: without a preconditioner B must be dense");
    const CholeskyInverse found = cholesky_inverse(*matrix);
    pencil.inverse = found.inverse;
    if (!found.single && dense_matrix(*pencil.a)) factor = found.factor;
    for (int64_t i = 0; i < batch; ++i) {
      const Definiteness definiteness = found.definiteness[i];
      if (definiteness == Definiteness::positive) good.push_back(i);
      status[i] = definiteness == Definiteness::indefinite   ? static_cast<double>(Outcome::not_positive_definite)
                  : definiteness == Definiteness::not_finite ? static_cast<double>(Outcome::non_finite)
                                                             : 0;
    }
  } else {
    pencil.inverse = parse_whole(inverse_code, tensors);
    for (int64_t i = 0; i < batch; ++i) good.push_back(i);
  }
  std::vector<double> history;
  const Observer observer = [&](const double* report, int64_t pencils) {
    throw_if_interrupted();
    double unconverged = 0, worst = 0;
    for (int64_t i = 0; i < pencils; ++i) {
      unconverged += report[i * kReported + kUnconverged];
      worst = std::max(worst, report[i * kReported + kWorst]);
    }
    history.insert(history.end(), {static_cast<double>(pencils), unconverged, worst});
  };
  const Options options{.k = numbers[kK],
                        .tol = tolerances[0],
                        .guard_tol = tolerances[1],
                        .block = numbers[kBlock],
                        .keep = numbers[kKeep],
                        .capacity = numbers[kCapacity],
                        .window = numbers[kWindow],
                        .max_iterations = numbers[kMaxIterations],
                        .inner = numbers[kInner]};
  Solution s;
  const int64_t n = rows.size(2), r = options.k + std::max<int64_t>(options.keep - options.window, 1);
  s.theta = torch::stable::new_zeros(rows, {batch, r}, ScalarType::Double);
  s.eta = torch::stable::new_zeros(rows, {batch, r}, ScalarType::Double);
  s.vectors = torch::stable::new_zeros(rows, {batch, r, n});
  s.b_orthogonality = torch::stable::new_zeros(rows, {batch}, ScalarType::Double);
  if (!good.empty()) {
    const bool whole = static_cast<int64_t>(good.size()) == batch || !pencil.separable();
    Tensor start = rows, random = fresh;
    if (!whole) {
      const Tensor index = index_tensor(good, rows);
      pencil = {pencil.a->select(index), pencil.b->select(index), pencil.inverse->select(index)};
      start = aten::index_select(rows, 0, index);
      if (factor) factor = aten::index_select(*factor, 0, index);
    }
    if (factor) {
      const OperatorPtr identity = identity_operator(*factor);
      pencil = {dense_operator(congruence(*dense_matrix(*pencil.a), *factor)), identity, identity};
      start = aten::to_dtype(start, ScalarType::Double);
      random = aten::to_dtype(fresh, ScalarType::Double);
      if (numbers[kWarm] != 0) start = aten::matmul(start, *factor);
    }
    Solution found = solve(pencil, start, numbers[kWarm] != 0, random, options, single && !factor, observer);
    if (factor) found.vectors = aten::to_dtype(solve_adjoint(*factor, found.vectors), rows.scalar_type());
    s.counts = found.counts;
    for (size_t j = 0; j < good.size(); ++j) {
      const int64_t i = whole ? good[j] : static_cast<int64_t>(j);  // its place in `found`
      status[good[j]] = static_cast<double>(found.outcome[i]);
      guard_error[good[j]] = found.guard_error[i];
      const auto put = [&](const Tensor& to, const Tensor& from) {
        aten::copy_(aten::slice(to, 0, good[j], 1), aten::slice(from, 0, i, 1));
      };
      put(s.theta, found.theta);
      put(s.vectors, found.vectors);
      put(s.eta, found.eta);
      put(s.b_orthogonality, found.b_orthogonality);
    }
  }
  for (int64_t i = 0; i < batch; ++i) {
    if (is_fault(static_cast<Outcome>(status[i]))) blank(s, i);
  }
  std::vector<double> state;
  for (int64_t i = 0; i < batch; ++i) state.insert(state.end(), {status[i], guard_error[i]});
  const auto count = [](int64_t x) { return static_cast<double>(x); };
  return {s.theta,
          s.vectors,
          s.eta,
          s.b_orthogonality,
          doubles(state, {batch, 2}),
          doubles({count(s.counts.a), count(s.counts.b), count(s.counts.inverse), count(s.counts.iterations),
                   factor ? 0.0 : 1.0},
                  {5}),
          doubles(history, {static_cast<int64_t>(history.size() / 3), 3})};
}

}  // namespace

}  // namespace sst

STABLE_TORCH_LIBRARY_FRAGMENT(sst_kernels, m) {
  m.def(
      "_davidson(Tensor[] tensors, int[] a, int[] b, int[] inverse, Tensor rows, Tensor fresh, int[] options, "
      "float[] tolerances) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CPU, m) { m.impl("_davidson", TORCH_BOX(&sst::davidson_op)); }
#ifdef SST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CUDA, m) { m.impl("_davidson", TORCH_BOX(&sst::davidson_op)); }
#endif
