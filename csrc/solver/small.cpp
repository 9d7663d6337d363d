#include "small.h"

#include "ops/fused_eigh.h"
#include "ops/parallel.h"
#ifdef SST_WITH_CUDA
#include "ops/stream.h"
#endif

namespace sst {

namespace {

using torch::headeronly::ScalarType;

Tensor new_double(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Double);
}
double* doubles(const Tensor& x) { return static_cast<double*>(x.mutable_data_ptr()); }

template <class Args>
void run(const Args& args, void (*on_cpu)(const Args&, std::atomic<int64_t>&),
         [[maybe_unused]] void (*on_cuda)(const Args&, void*), int64_t work, [[maybe_unused]] const Tensor& on) {
#ifdef SST_WITH_CUDA
  if (on.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    return on_cuda(args, current_stream(on.get_device_index()));
  }
#endif
  parallel(args.batch, args.batch * work, [&](auto& next) { on_cpu(args, next); });
}

#ifdef SST_WITH_CUDA
#define SST_RUN(step, args, work, on) run(args, step##_cpu, step##_cuda, work, on)
#else
#define SST_RUN(step, args, work, on) run(args, step##_cpu, {}, work, on)
#endif

// Eigenvalues ascending, and eigenvectors as rows. On CUDA in one launch where the matrices fit: torch loops over them.
std::pair<Tensor, Tensor> standard_eigh(const Tensor& a) {
  if (a.is_cuda() && a.size(1) <= fused_eigh_limit(a)) {
    const Tensor eye = aten::expand(aten::eye_like(a, a.size(1)), {a.size(0), a.size(1), a.size(1)});
    const auto [values, vectors, info] = fused_eigh(a, eye);
    return {values, aten::transposed(vectors)};
  }
  const auto [values, vectors] = aten::linalg_eigh(a);
  return {values, aten::transposed(vectors)};
}

}  // namespace

SmallEigen ritz_pairs(const Tensor& h, const Tensor& valid) {
  const int64_t batch = h.size(0), m = h.size(1);
  const Tensor negated = new_double(h, {batch, m, m}), broken = new_double(h, {batch}),
               largest = new_double(h, {batch});
  const Tensor sorted_valid = new_double(h, {batch, m});
  const RitzMatrix args{.batch = batch,
                        .m = m,
                        .h = doubles(h),
                        .h_batch = h.stride(0),
                        .h_row = h.stride(1),
                        .valid = doubles(valid),
                        .valid_batch = valid.stride(0),
                        .out = doubles(negated),
                        .sorted_valid = doubles(sorted_valid),
                        .broken = doubles(broken),
                        .largest = doubles(largest)};
  SST_RUN(ritz_matrix, args, m * m, h);
  const auto [values, rows] = standard_eigh(negated);
  return {aten::neg(values), rows, aten::neg(negated), sorted_valid};
}

Orthonormal orthonormalizer(const Tensor& c, const Tensor& g, const Tensor* magnitude, double drop, double rounding,
                            Tensor notes) {
  const int64_t batch = g.size(0), m = c.size(1), p = g.size(1);
  const Tensor work = new_double(g, {batch, 2 * p + 3, p}), out = new_double(g, {batch, p, m + p});
  const Tensor valid = new_double(g, {batch, p}), c_rows = torch::stable::contiguous(c);
  const Tensor g_rows = torch::stable::contiguous(g);
  const Orthonormalizer args{.batch = batch,
                             .m = m,
                             .p = p,
                             .c = doubles(c_rows),
                             .g = doubles(g_rows),
                             .magnitude = magnitude ? doubles(*magnitude) : nullptr,
                             .drop = drop,
                             .rounding = rounding,
                             .work = doubles(work),
                             .out = doubles(out),
                             .valid = doubles(valid),
                             .valid_batch = valid.stride(0),
                             .notes = doubles(notes)};
  SST_RUN(orthonormalizer, args, 2 * m * p * p, g);
  return {aten::slice(out, 2, 0, m), aten::slice(out, 2, m, p), valid};
}

Judgement judge(const Tensor& theta, const Tensor& squares, int64_t window, int64_t p, double tol, double guard_tol,
                Tensor norms) {
  const int64_t batch = squares.size(0), w = squares.size(1);
  const Judgement found{.eta = new_double(theta, {batch, w}),
                        .chosen = torch::stable::new_empty(theta, {batch, p}, ScalarType::Long),
                        .scale = new_double(theta, {batch, p}),
                        .refill = new_double(theta, {batch, p}),
                        .report = new_double(theta, {batch, kReportSize})};
  const Judge args{.batch = batch,
                   .w = w,
                   .window = window,
                   .p = p,
                   .theta = doubles(theta),
                   .theta_batch = theta.stride(0),
                   .squares = doubles(squares),
                   .tol = tol,
                   .guard_tol = guard_tol,
                   .norms = doubles(norms),
                   .eta = doubles(found.eta),
                   .chosen = static_cast<int64_t*>(found.chosen.mutable_data_ptr()),
                   .scale = doubles(found.scale),
                   .refill = doubles(found.refill),
                   .report = doubles(found.report)};
  SST_RUN(judge, args, 16 * w, theta);
  return found;
}

}  // namespace sst
