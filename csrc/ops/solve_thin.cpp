#include "solve_thin.h"

#include "checks.h"
#include "kernels/solve_thin.h"
#include "parallel.h"

namespace sst {

namespace {

template <class T>
void pack(const Tensor& factor, const Tensor& packed) {
  const int64_t n = factor.size(1), rows = ceil_div(n, kSolveTile);
  const T* const from = data<T>(factor);
  T* const to = mutable_data<T>(packed);
  parallel(factor.size(0) * rows, packed.numel(), [&](auto& next) {
    for (int64_t index = next++; index < factor.size(0) * rows; index = next++) {
      const int64_t member = index / rows;
      pack_factor(from + member * factor.stride(0), factor.stride(1), n, index % rows, to + member * packed.size(1));
    }
  });
}

template <class T>
void solve(const Tensor& packed, const Tensor& x, const Tensor& y) {
  SolveThinCpu<T> plan({data<T>(packed), data<T>(x), mutable_data<T>(y), x.size(0), x.size(2), x.size(1)});
  const Tensor workspace = torch::stable::new_empty(x, {plan.workspace()}, x.scalar_type());
  for (const bool upwards : {false, true}) {
    parallel(plan.units(), x.numel() * x.size(2),
             [&](auto& next) { plan.run(upwards, mutable_data<T>(workspace), next); });
  }
}

}  // namespace

Tensor pack_factors(const Tensor& factors) {
  const Tensor factor = torch::stable::contiguous(factors);  // LAPACK's come by columns
  const Tensor packed =
      torch::stable::new_empty(factor, {factor.size(0), packed_factor_size(factor.size(1))}, factor.scalar_type());
  visit_wide(factor.scalar_type(), [&]<class T>() { pack<T>(factor, packed); });
  return packed;
}

Tensor solve_thin(const Tensor& packed, const Tensor& x) {
  const Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  visit_wide(x.scalar_type(), [&]<class T>() { solve<T>(packed, x, y); });
  return y;
}

}  // namespace sst
