#include "davidson.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "basis.h"
#include "cholesky.h"
#include "correction.h"
#include "ops/residual.h"

namespace sst {

namespace {

using aten::slice, aten::to_dtype;

// Progress, in units of log η summed over the window, that counts as such; and by how many iterations it must come.
constexpr double kLeastProgress = 0.5;
constexpr int64_t kRefreshes = 1;  // times that a stagnating pencil gets random directions before it ends
constexpr double kLossy = 1e4;     // 1/pivot above which B is applied twice in an iteration
constexpr double kAccepted = 10;   // times tol: a stagnated pencil is let go at once below this

// A pencil proves hard when this many iterations for each block of wanted pairs did not solve it: then the correction
// equation is solved in steps, and, later, K ≈ ηB − A takes the place of K ≈ B.
constexpr int64_t kHard = 16, kVeryHard = 32;

// What the host knows of a pencil that is still in the batch.
struct Progress {
  int64_t original;  // place in the batch of the call
  double best = std::numeric_limits<double>::infinity();
  int64_t waited = 0, refreshed = 0;
  bool finished = false;
};

class Iteration {
 public:
  Iteration(const Pencil& pencil, const Tensor& start, const Tensor& fresh, const Tensor& norms, const Options& options,
            Counts& counts, const Observer& observer)
      : pencil_(pencil),
        fresh_(fresh),
        norms_(norms),
        running_norms_(norms),
        options_(options),
        counts_(counts),
        observer_(observer),
        basis_(start, std::max(options.capacity + (options.k > options.window ? options.k : 0), start.size(1))),
        progress_(start.size(0)) {
    const int64_t batch = start.size(0), returned = options.returned();
    for (int64_t i = 0; i < batch; ++i) progress_[i].original = i;
    found_ = {.theta = torch::stable::new_zeros(norms, {batch, returned}),
              .vectors = torch::stable::new_zeros(start, {batch, returned, start.size(2)}),
              // 1 for pairs that are never judged.
              .eta = torch::stable::full({batch, returned}, 1.0, ScalarType::Double, std::nullopt, norms.device()),
              .outcome = std::vector<Outcome>(batch, Outcome::max_iterations),
              .guard_error = std::vector<double>(batch, 0),
              .certified = std::vector<bool>(batch, false)};
    expand(start);
  }

  Found run() {
    const int64_t blocks = (options_.window + options_.block - 1) / options_.block;
    for (int64_t iteration = 0;; ++iteration) {
      const SmallEigen ritz = basis_.rayleigh_ritz();
      const Pairs pairs = residuals(ritz);
      // The one synchronisation with the device.
      const Tensor report = aten::on_host(aten::cat({pairs.judgement.report, basis_.notes()}, 1));
      const double* const reports = static_cast<const double*>(report.const_data_ptr());
      observer_(reports, active());
      const Step step = decide(reports, iteration);
      if (step.any_finished) store(ritz, pairs);
      if (step.remaining == 0) return std::move(found_);
      // Where all that is sought has converged, but cannot be locked yet, the pairs that come next.
      const int64_t block = step.block > 0 ? std::min(options_.block, step.block) : pairs.judgement.chosen.size(1);
      if (iteration == kVeryHard * blocks) shift(pairs);
      Tensor t =
          step.refresh ? fresh_rows(block) : correction(pairs, block, iteration < kHard * blocks ? 0 : options_.inner);
      if (step.lock > 0) {
        restart(ritz, std::min(step.lock + options_.keep, basis_.size()), 0);
        lock(pairs, step.lock);
      } else if (basis_.size() + block > options_.capacity) {
        restart(ritz, std::min(options_.keep, basis_.size()), block);
      }
      remember(ritz, pairs, block);
      if (2 * step.remaining <= active() && separable_) t = compact(t);
      expand(t);
      ++counts_.iterations;
    }
  }

 private:
  struct Pairs {
    Tensor rows, x, bx, residual, theta;  // coefficients (N, w, m); (N, w, n); (N, w)
    Judgement judgement;
    int64_t window;
  };
  struct Step {
    int64_t remaining = 0, block = 0, lock = 0;
    bool any_finished = false, refresh = false;
  };

  int64_t active() const { return static_cast<int64_t>(progress_.size()); }

  void expand(const Tensor& t) {
    basis_.append(t, *pencil_.a, *pencil_.b, careful_);
    counts_.a += t.size(1);
    counts_.b += careful_ ? 2 * t.size(1) : t.size(1);
  }

  // The leading Ritz pairs, as many as are needed to judge the window and to fill a block, with residuals.
  Pairs residuals(const SmallEigen& ritz) {
    const int64_t missing = options_.k - basis_.locked(), window = std::min(options_.window, missing);
    const bool last = window == missing;
    const int64_t exist = fresh_.size(2) - basis_.locked();
    const int64_t w = std::min({std::max(window + 1, options_.block), basis_.size(), exist});
    Pairs pairs;
    pairs.rows = slice(ritz.rows, 1, 0, w);
    pairs.theta = slice(ritz.theta, 1, 0, w);
    pairs.window = std::min(window, w);
    pairs.x = basis_.combine(Basis::kVectors, pairs.rows);
    pairs.bx = basis_.combine(Basis::kB, pairs.rows);
    const auto [r, squares] =
        residual(basis_.combine(Basis::kA, pairs.rows), pairs.bx, pairs.x, torch::stable::contiguous(pairs.theta));
    pairs.residual = r;
    pairs.judgement = judge(pairs.theta, squares, pairs.window, std::min(options_.block, w), options_.tol,
                            last ? options_.guard_tol : std::numeric_limits<double>::infinity(), running_norms_);
    return pairs;
  }

  // What to do next, from the reports of the pencils.
  Step decide(const double* reports, int64_t iteration) {
    Step step;
    const int64_t missing = options_.k - basis_.locked(), window = std::min(options_.window, missing);
    int64_t leading = window;
    for (int64_t i = 0; i < active(); ++i) {
      Progress& pencil = progress_[i];
      if (pencil.finished) continue;
      const double* const report = reports + i * kReported;
      careful_ = careful_ || report[kReportSize + 1] > kLossy;
      const bool found = report[kLeading] >= static_cast<double>(missing);
      if (report[kBroken] > 0) {
        finish(i, Outcome::non_finite);
      } else if (report[kReportSize] > 0) {
        finish(i, Outcome::not_positive_definite);
      } else if (found && report[kGuard] == 0) {
        finish(i, Outcome::converged);
        found_.certified[pencil.original] = iteration == 0;
      } else if (iteration >= options_.max_iterations) {
        finish(i, found ? Outcome::converged : Outcome::max_iterations);
      } else if (const bool stuck = stagnates(pencil, report);
                 stuck && (found || report[kWorst] <= kAccepted * options_.tol || pencil.refreshed == kRefreshes)) {
        finish(i, found ? Outcome::converged : Outcome::stagnated);
      } else {
        if (stuck) ++pencil.refreshed;
        step.refresh = step.refresh || stuck;
        leading = std::min(leading, static_cast<int64_t>(report[kLeading]));
        step.block = std::max(step.block, static_cast<int64_t>(report[kUnconverged] + report[kGuard]));
        ++step.remaining;
        continue;
      }
      found_.guard_error[pencil.original] = report[kGuardError];
      step.any_finished = true;
    }
    const bool worthwhile = missing > window && 2 * leading >= window;
    if (worthwhile && basis_.size() > leading + options_.window) step.lock = leading;
    return step;
  }

  void finish(int64_t i, Outcome outcome) {
    progress_[i].finished = true;
    found_.outcome[progress_[i].original] = outcome;
  }

  // Whether η has not fallen for the time that two restarts take.
  bool stagnates(Progress& pencil, const double* report) const {
    const int64_t patience = 8 + 2 * (options_.capacity - options_.keep) / options_.block;
    if (report[kProgress] < pencil.best - kLeastProgress) {
      pencil.best = report[kProgress];
      pencil.waited = 0;
      return false;
    }
    if (++pencil.waited <= patience) return false;
    pencil.waited = 0;
    return true;
  }

  // Puts the pencils that have just finished into `found_`.
  void store(const SmallEigen& ritz, const Pairs& pairs) {
    std::vector<int64_t> here, there;  // their places in this batch and in that of the call
    for (int64_t i = 0; i < active(); ++i) {
      if (!progress_[i].finished || progress_[i].original < 0) continue;
      here.push_back(i);
      there.push_back(std::exchange(progress_[i].original, -1));
    }
    const Tensor from = aten::index_tensor(here, norms_), to = aten::index_tensor(there, norms_);
    // The rows [first, first + rows) of `whole` ← the first of `part`.
    const auto put = [&](const Tensor& whole, int64_t first, const Tensor& part, int64_t rows) {
      aten::put_rows(slice(whole, 1, first, rows), to, aten::index_select(slice(part, 1, 0, rows), 0, from));
    };
    const int64_t returned = options_.returned();
    const int64_t locked = basis_.locked(), count = std::min(returned - locked, basis_.size());
    if (locked > 0) {
      put(found_.vectors, 0, basis_.locked_rows(Basis::kVectors), locked);
      put(found_.theta, 0, locked_theta_, locked);
      put(found_.eta, 0, locked_eta_, locked);
    }
    put(found_.vectors, locked, basis_.combine(Basis::kVectors, slice(ritz.rows, 1, 0, count)), count);
    put(found_.theta, locked, ritz.theta, count);
    put(found_.eta, locked, pairs.judgement.eta, std::min(pairs.judgement.eta.size(1), count));
    // Where the basis holds too few, random ones: they are judged, and improved, as any others.
    for (int64_t first = locked + count; first < returned; first += fresh_.size(1)) {
      const int64_t rows = std::min(fresh_.size(1), returned - first);
      put(found_.vectors, first, fresh_rows(rows), rows);
    }
    aten::put_rows(norms_, to, aten::index_select(running_norms_, 0, from));
  }

  // V ← the leading Ritz vectors and, of the block before, what lies outside of them (GD+k).
  void restart(const SmallEigen& ritz, int64_t kept, int64_t block) {
    Tensor coefficients = slice(ritz.rows, 1, 0, kept), valid = slice(ritz.valid, 1, 0, kept);
    if (block > 0 && previous_ && kept + previous_->size(1) + block <= options_.capacity) {
      const int64_t count = previous_->size(1), m = basis_.size();
      const Tensor zeros = torch::stable::new_zeros(*previous_, {active(), count, m - previous_->size(2)});
      Tensor p = aten::cat({*previous_, zeros}, 2), p_valid;
      Tensor unused = torch::stable::new_zeros(valid, {active(), 2});
      for (int pass = 0; pass < 2; ++pass) {
        const Tensor columns = aten::transposed(p);
        const Orthonormal o = orthonormalizer(aten::matmul(coefficients, columns), aten::matmul(p, columns), nullptr,
                                              pass == 0 ? 1e-8 : 1e-3, 0, unused);
        p = aten::add(aten::matmul(o.of_basis, coefficients), aten::matmul(o.of_block, p));
        p_valid = o.valid;
      }
      coefficients = aten::cat({coefficients, p}, 1);
      valid = aten::cat({valid, p_valid}, 1);
    }
    basis_.restart(coefficients, valid, ritz.matrix);
    previous_.reset();
    restarted_ = true;
  }

  void lock(const Pairs& pairs, int64_t count) {
    const auto append = [&](Tensor& to, const Tensor& from) {
      const Tensor part = slice(from, 1, 0, count);
      to = basis_.locked() > 0 ? aten::cat({to, part}, 1) : torch::stable::clone(part);
    };
    append(locked_theta_, pairs.theta);
    append(locked_eta_, pairs.judgement.eta);
    basis_.lock(count);
    for (Progress& pencil : progress_) pencil.best = std::numeric_limits<double>::infinity();
  }

  // Keeps the coefficients of the Ritz vectors that are expanded by, in terms of the basis as it is now.
  void remember(const SmallEigen& ritz, const Pairs& pairs, int64_t block) {
    if (std::exchange(restarted_, false)) return;
    // Rows that are no vectors become zero, lest a restart take them for directions.
    const Tensor valid = gather_rows(aten::unsqueeze(ritz.valid, 2), pairs, block);
    previous_ = aten::mul(gather_rows(ritz.rows, pairs, block), valid);
  }

  Tensor gather_rows(const Tensor& x, const Pairs& pairs, int64_t block) const {
    const Tensor chosen = slice(pairs.judgement.chosen, 1, 0, block);
    return aten::gather(x, 1, aten::expand(aten::unsqueeze(chosen, 2), {active(), block, x.size(2)}));
  }

  Tensor fresh_rows(int64_t count) {
    const int64_t n = fresh_.size(2);
    const Tensor rows = aten::roll(slice(fresh_, 1, 0, count), (7919 * ++rolls_) % n);
    return aten::expand(rows, {active(), count, n});
  }

  Tensor correction(const Pairs& pairs, int64_t block, int64_t steps) {
    const ScalarType dtype = pairs.residual.scalar_type();
    const auto factors = [&](const Tensor& x) { return to_dtype(aten::unsqueeze(slice(x, 1, 0, block), 2), dtype); };
    const Tensor r = aten::mul(gather_rows(pairs.residual, pairs, block), factors(pairs.judgement.scale));
    Tensor t;
    if (steps == 0) {
      t = pencil_.inverse->apply(r);
      counts_.inverse += block;
    } else {
      const Tensor theta = gather_rows(aten::unsqueeze(pairs.theta, 2), pairs, block);
      const int64_t locked = basis_.locked();
      const auto joined = [&](const Tensor& rows, const Tensor& x) { return locked > 0 ? aten::cat({rows, x}, 1) : x; };
      const Tensor q = joined(basis_.locked_rows(Basis::kVectors), pairs.x);
      t = solve_correction(pencil_, q, joined(basis_.locked_rows(Basis::kB), pairs.bx), theta, r, steps);
      counts_.a += steps * block;
      counts_.b += steps * block;
      counts_.inverse += steps * block + q.size(1);
    }
    t = aten::finite_or_zero(t);
    return aten::add(t, aten::mul(fresh_rows(block), factors(pairs.judgement.refill)));
  }

  // K ← ηB − A where A and B are dense, η a little above θ₁.
  void shift(const Pairs& pairs) {
    const Tensor *const a = dense_matrix(*pencil_.a), *const b = dense_matrix(*pencil_.b);
    if (!a || !b) return;
    const Tensor first = slice(pairs.theta, 1, 0, 1), last = slice(pairs.theta, 1, pairs.window - 1, 1);
    const Tensor margin = aten::subtract(aten::subtract(first, last), aten::abs(first), -0.01);
    const Tensor eta = aten::unsqueeze(aten::subtract(first, margin, -0.1), 2);
    pencil_.inverse = shifted_inverse(*a, *b, eta, pencil_.inverse);
  }

  // The pencils that are finished leave the batch.
  Tensor compact(const Tensor& t) {
    std::vector<Progress> rest;
    std::vector<int64_t> kept;
    for (int64_t i = 0; i < active(); ++i) {
      if (progress_[i].finished) continue;
      kept.push_back(i);
      rest.push_back(progress_[i]);
    }
    const Tensor index = aten::index_tensor(kept, t);
    progress_ = std::move(rest);
    pencil_ = {pencil_.a->select(index), pencil_.b->select(index), pencil_.inverse->select(index)};
    basis_.select(index);
    running_norms_ = aten::index_select(running_norms_, 0, index);
    if (previous_) previous_ = aten::index_select(*previous_, 0, index);
    if (basis_.locked() > 0) {
      locked_theta_ = aten::index_select(locked_theta_, 0, index);
      locked_eta_ = aten::index_select(locked_eta_, 0, index);
    }
    return aten::index_select(t, 0, index);
  }

  Pencil pencil_;
  Tensor fresh_, norms_, running_norms_;  // fresh_ (1, q, n)
  const Options& options_;
  Counts& counts_;
  const Observer& observer_;
  Basis basis_;
  std::vector<Progress> progress_;
  int64_t rolls_ = 0;
  Found found_;
  std::optional<Tensor> previous_;    // (N, p, m of then): coefficients of the block before
  Tensor locked_theta_, locked_eta_;  // (N, locked)
  bool restarted_ = false, careful_ = false;
  bool separable_ = pencil_.separable();
};

}  // namespace

Found davidson(const Pencil& pencil, const Tensor& start, const Tensor& fresh, const Tensor& norms,
               const Options& options, Counts& counts, const Observer& observer) {
  return Iteration(pencil, start, fresh, norms, options, counts, observer).run();
}

}  // namespace sst
