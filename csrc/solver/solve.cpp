#include "solve.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "small.h"

namespace sst {

namespace {

using aten::slice, aten::to_dtype;

constexpr int64_t kPowerSteps = 3, kPowerRows = 2;  // of the norm estimates
constexpr int64_t kRounds = 4;                      // times that the iteration may start anew from its own result

Pencil map(const Pencil& pencil, const std::function<OperatorPtr(const Operator&)>& f) {
  return {f(*pencil.a), f(*pencil.b), f(*pencil.inverse)};
}

Tensor row_norms(const Tensor& x) {
  const Tensor wide = to_dtype(x, ScalarType::Double);
  return aten::sqrt(aten::sum_over(aten::mul(wide, wide), 2));
}

// ‖op‖₂ of each pencil (N, 1) from below, by power steps from the rows x.
Tensor norm_estimate(const Operator& op, Tensor x) {
  Tensor norm;
  for (int64_t step = 0; step <= kPowerSteps; ++step) {
    const Tensor scale =
        to_dtype(aten::unsqueeze(aten::finite_or_zero(aten::reciprocal(row_norms(x))), 2), x.scalar_type());
    x = op.apply(aten::mul(x, scale));
    norm = row_norms(x);
  }
  return torch::stable::amax(norm, -1, true);
}

// The float32 phase: the start of the phase in float64.
Tensor solve_in_single(const Pencil& pencil, const Tensor& start, const Tensor& fresh, const Tensor& norms,
                       Options options, Counts& counts, const Observer& observer) {
  const double n = static_cast<double>(start.size(2));
  options.tol = std::max(options.tol, 0.5 * std::sqrt(n) * std::numeric_limits<float>::epsilon());
  options.guard_tol = std::numeric_limits<double>::infinity();
  const Pencil single = map(pencil, [](const Operator& op) { return op.cast(ScalarType::Float); });
  const Tensor own_norms = torch::stable::clone(norms);
  const Found found = davidson(single, to_dtype(start, ScalarType::Float), to_dtype(fresh, ScalarType::Float),
                               own_norms, options, counts, observer);
  const Tensor vectors = to_dtype(found.vectors, ScalarType::Double);
  // Where float32 came to nothing, the start serves again.
  for (int64_t i = 0; i < start.size(0); ++i) {
    if (!is_fault(found.outcome[i])) continue;
    const Tensor place = slice(vectors, 0, i, 1);
    aten::copy_(place, torch::stable::new_zeros(place, {1, place.size(1), place.size(2)}));
    const int64_t rows = std::min(start.size(1), place.size(1));
    aten::copy_(slice(place, 1, 0, rows), slice(slice(start, 0, i, 1), 1, 0, rows));
  }
  return vectors;
}

// From the second round on the start holds all k: nothing is locked, and each pair is judged. The last round only
// judges what is there, from fresh products.
Options options_of_round(Options options, int64_t round, bool last, int64_t iterations) {
  if (round > 0) {
    const int64_t locked = options.k - options.window;
    options.window += locked;
    options.keep += locked;
    options.capacity += locked;
  }
  options.max_iterations = last ? 0 : std::max<int64_t>(options.max_iterations - iterations, 0);
  return options;
}

// max |VBVᵀ − I| (N) of the rows V.
Tensor b_orthogonality(const Operator& b, const Tensor& v) {
  const Tensor gram =
      aten::matmul(to_dtype(b.apply(v), ScalarType::Double), aten::transposed(to_dtype(v, ScalarType::Double)));
  const Tensor excess = aten::abs(aten::subtract(gram, aten::eye_like(gram, v.size(1))));
  return torch::stable::amax(torch::stable::amax(excess, -1, false), -1, false);
}

}  // namespace

Solution solve(const Pencil& pencil, const Tensor& rows, bool warm, const Tensor& fresh, const Options& options,
               bool mixed, const Observer& observer) {
  Solution all;
  const int64_t batch = rows.size(0);
  const Tensor few = slice(rows, 1, 0, std::min(kPowerRows, rows.size(1)));
  const Tensor norms = aten::cat({norm_estimate(*pencil.a, few), norm_estimate(*pencil.b, few)}, 1);
  all.counts.a += few.size(1) * (kPowerSteps + 1);
  all.counts.b += few.size(1) * (kPowerSteps + 1);
  Tensor start = rows;
  if (!warm) {
    start = pencil.inverse->apply(pencil.a->apply(rows));
    all.counts.a += rows.size(1);
    all.counts.inverse += rows.size(1);
  }
  if (mixed) start = solve_in_single(pencil, start, fresh, norms, options, all.counts, observer);

  std::vector<int64_t> todo(batch);
  std::iota(todo.begin(), todo.end(), 0);
  all.outcome.assign(batch, Outcome::max_iterations);
  all.guard_error.assign(batch, 0);
  bool last = false;
  for (int64_t round = 0; !todo.empty(); ++round) {
    const bool whole = static_cast<int64_t>(todo.size()) == batch;
    const Tensor index = aten::index_tensor(todo, rows);
    const Pencil part = whole ? pencil : map(pencil, [&](const Operator& op) { return op.select(index); });
    const Tensor part_norms = whole ? norms : aten::index_select(norms, 0, index);
    const Options now = options_of_round(options, round, last, all.counts.iterations);
    const Found found = davidson(part, start, fresh, part_norms, now, all.counts, observer);
    if (round == 0) {
      all.theta = torch::stable::new_zeros(found.theta, {batch, found.theta.size(1)});
      all.vectors = torch::stable::new_zeros(found.vectors, {batch, found.vectors.size(1), found.vectors.size(2)});
      all.eta = torch::stable::new_zeros(found.eta, {batch, found.eta.size(1)});
    }
    aten::put_rows(all.theta, index, found.theta);
    aten::put_rows(all.vectors, index, found.vectors);
    aten::put_rows(all.eta, index, found.eta);
    std::vector<int64_t> rest;
    bool hopeful = false;
    for (size_t i = 0; i < todo.size(); ++i) {
      if (is_fault(all.outcome[todo[i]])) continue;  // it is here because the batch cannot be divided
      all.guard_error[todo[i]] = found.guard_error[i];
      if (!last || found.outcome[i] != Outcome::max_iterations) all.outcome[todo[i]] = found.outcome[i];
      if (is_fault(found.outcome[i]) || found.certified[i] || last) continue;
      rest.push_back(todo[i]);
      hopeful = hopeful || found.outcome[i] == Outcome::converged || round == 0;
    }
    last = round + 1 >= kRounds || !hopeful || all.counts.iterations >= options.max_iterations;
    if (rest.empty() || pencil.separable()) todo = std::move(rest);
    if (!todo.empty()) start = aten::index_select(all.vectors, 0, aten::index_tensor(todo, rows));
  }
  const int64_t k = std::min(options.k, all.vectors.size(1));
  all.b_orthogonality = b_orthogonality(*pencil.b, slice(all.vectors, 1, 0, k));
  all.counts.b += k;
  return all;
}

}  // namespace sst
