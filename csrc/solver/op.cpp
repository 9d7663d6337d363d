// The op behind sst_kernels/davidson.py: operators and options in, certified pairs out.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "cholesky.h"
#include "interrupt.h"
#include "ops/checks.h"
#include "solve.h"

namespace sst {

namespace {

// Option numbers by their place in the list.
enum Option { kK, kBlock, kKeep, kCapacity, kWindow, kMaxIterations, kInner, kMixed, kWarm, kOptionCount };

Options read_options(const std::vector<int64_t>& numbers, const std::vector<double>& tolerances) {
  if (numbers.size() != kOptionCount || tolerances.size() != 2) fail("_davidson: wrong number of options");
  return {.k = numbers[kK],
          .tol = tolerances[0],
          .guard_tol = tolerances[1],
          .block = numbers[kBlock],
          .keep = numbers[kKeep],
          .capacity = numbers[kCapacity],
          .window = numbers[kWindow],
          .max_iterations = numbers[kMaxIterations],
          .inner = numbers[kInner]};
}

OperatorPtr parse_whole(const std::vector<int64_t>& code, const std::vector<Tensor>& tensors) {
  size_t at = 0;
  return parse_operator(code, tensors, at);
}

Tensor doubles(const std::vector<double>& values, const std::vector<int64_t>& sizes) {
  const Tensor x = torch::stable::empty(sizes, ScalarType::Double);
  std::copy(values.begin(), values.end(), static_cast<double*>(x.mutable_data_ptr()));
  return x;
}

// The pencils of a call, those of them that have a factor of B, and the faults of the others.
struct Call {
  Pencil pencil;
  std::vector<int64_t> good;
  bool whole = true;             // whether all are solved: all are good, or the batch cannot be divided
  std::vector<double> status;    // (batch)
  std::optional<Tensor> factor;  // L of an ill-conditioned B: to be solved as L⁻¹AL⁻ᵀ y = θ y, x = L⁻ᵀy
};

double status_of(Definiteness definiteness) {
  switch (definiteness) {
    case Definiteness::indefinite:
      return static_cast<double>(Outcome::not_positive_definite);
    case Definiteness::not_finite:
      return static_cast<double>(Outcome::non_finite);
    default:
      return 0;
  }
}

// Reads the operators, and factors B where the caller gives no K⁻¹.
Call prepare(const std::vector<Tensor>& tensors, const std::vector<int64_t>& a_code, const std::vector<int64_t>& b_code,
             const std::vector<int64_t>& inverse_code, int64_t batch) {
  Call call;
  call.pencil = {parse_whole(a_code, tensors), parse_whole(b_code, tensors), nullptr};
  call.status.assign(batch, 0);
  if (inverse_code.empty()) {
    const Tensor* const matrix = dense_matrix(*call.pencil.b);
    if (!matrix) fail("_davidson: without a preconditioner B must be dense");
    const CholeskyInverse found = cholesky_inverse(*matrix);
    call.pencil.inverse = found.inverse;
    if (dense_matrix(*call.pencil.a)) call.factor = found.factor;
    for (int64_t i = 0; i < batch; ++i) call.status[i] = status_of(found.definiteness[i]);
  } else {
    call.pencil.inverse = parse_whole(inverse_code, tensors);
  }
  for (int64_t i = 0; i < batch; ++i) {
    if (call.status[i] == 0) call.good.push_back(i);
  }
  call.whole = static_cast<int64_t>(call.good.size()) == batch || !call.pencil.separable();
  return call;
}

// The good pencils of a call, or all of them, solved.
Solution solve_good(const Call& call, const Tensor& rows, const Tensor& fresh, bool warm, const Options& options,
                    bool mixed, const Observer& observer) {
  Pencil pencil = call.pencil;
  Tensor start = rows;
  std::optional<Tensor> factor = call.factor;
  if (!call.whole) {
    const Tensor index = aten::index_tensor(call.good, rows);
    pencil = {pencil.a->select(index), pencil.b->select(index), pencil.inverse->select(index)};
    start = aten::index_select(rows, 0, index);
    if (factor) factor = aten::index_select(*factor, 0, index);
  }
  if (!factor) return solve(pencil, start, warm, fresh, options, mixed, observer);
  const OperatorPtr identity = identity_operator(*factor);
  pencil = {dense_operator(congruence(*dense_matrix(*pencil.a), *factor)), identity, identity};
  start = aten::to_dtype(start, ScalarType::Double);
  if (warm) start = aten::matmul(start, aten::tril(*factor));
  Solution found = solve(pencil, start, warm, aten::to_dtype(fresh, ScalarType::Double), options, false, observer);
  found.vectors = aten::to_dtype(solve_adjoint(*factor, found.vectors), rows.scalar_type());
  return found;
}

// Keeps one line for each iteration: pencils in the batch, pairs not converged, the largest η.
Observer recorder(std::vector<double>& history) {
  return [&history](const double* report, int64_t pencils) {
    throw_if_interrupted();
    double unconverged = 0, worst = 0;
    for (int64_t i = 0; i < pencils; ++i) {
      unconverged += report[i * kReported + kUnconverged];
      worst = std::max(worst, report[i * kReported + kWorst]);
    }
    history.insert(history.end(), {static_cast<double>(pencils), unconverged, worst});
  };
}

// Outputs: θ (N, r), vectors (N, r, n), η (N, r), B-orthogonality (N), NaN for pencils that could not be solved; status
// bits and the error of the guard (N, 2); counts of columns multiplied by A, B and K⁻¹ and of iterations, and whether η
// and the B-orthogonality are those of the pencil itself (5); history (iterations, 3).
std::vector<Tensor> davidson_op(const std::vector<Tensor>& tensors, const std::vector<int64_t>& a_code,
                                const std::vector<int64_t>& b_code, const std::vector<int64_t>& inverse_code,
                                const Tensor& rows, const Tensor& fresh, const std::vector<int64_t>& numbers,
                                const std::vector<double>& tolerances) {
  const Options options = read_options(numbers, tolerances);
  const int64_t batch = rows.size(0), r = options.returned();
  Call call = prepare(tensors, a_code, b_code, inverse_code, batch);
  const auto blank = [&](const std::vector<int64_t>& sizes, ScalarType dtype) {
    return torch::stable::full(sizes, std::numeric_limits<double>::quiet_NaN(), dtype, std::nullopt, rows.device());
  };
  const Tensor theta = blank({batch, r}, ScalarType::Double), eta = blank({batch, r}, ScalarType::Double),
               vectors = blank({batch, r, rows.size(2)}, rows.scalar_type()),
               orthogonality = blank({batch}, ScalarType::Double);
  std::vector<double> guard_error(batch, 0), state, history;
  Counts counts;
  if (!call.good.empty()) {
    const Solution found =
        solve_good(call, rows, fresh, numbers[kWarm] != 0, options, numbers[kMixed] != 0, recorder(history));
    counts = found.counts;
    std::vector<int64_t> from, to;  // the solved, by their places in `found` and in the batch
    for (size_t j = 0; j < call.good.size(); ++j) {
      const int64_t i = call.good[j], place = call.whole ? i : static_cast<int64_t>(j);
      call.status[i] = static_cast<double>(found.outcome[place]);
      guard_error[i] = found.guard_error[place];
      if (is_fault(found.outcome[place])) continue;
      from.push_back(place);
      to.push_back(i);
    }
    const Tensor source = aten::index_tensor(from, rows), index = aten::index_tensor(to, rows);
    const auto put = [&](const Tensor& all, const Tensor& part) {
      aten::put_rows(all, index, aten::index_select(part, 0, source));
    };
    put(theta, found.theta);
    put(vectors, found.vectors);
    put(eta, found.eta);
    put(orthogonality, found.b_orthogonality);
  }
  for (int64_t i = 0; i < batch; ++i) state.insert(state.end(), {call.status[i], guard_error[i]});
  const std::vector<double> numbers_out{static_cast<double>(counts.a), static_cast<double>(counts.b),
                                        static_cast<double>(counts.inverse), static_cast<double>(counts.iterations),
                                        call.factor ? 0.0 : 1.0};
  return {theta,
          vectors,
          eta,
          orthogonality,
          doubles(state, {batch, 2}),
          doubles(numbers_out, {5}),
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
