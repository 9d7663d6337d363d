// The aten calls that the solver is made of, typed. Tensors of a batch are (N, …); vectors are rows, (N, m, n).
// Exception text of aten is lost on the way here: arguments are checked before these are called.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace sst::aten {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// op(args…) through torch's dispatcher; its results are left at the front of the stack.
template <class... Args>
std::array<StableIValue, sizeof...(Args)> dispatch(const char* op, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return stack;
}
inline Tensor take(StableIValue value) { return torch::stable::detail::to<Tensor>(value); }

inline void copy_(Tensor to, const Tensor& from) { torch::stable::copy_(to, from); }
using torch::stable::matmul;
inline Tensor transposed(const Tensor& a) { return torch::stable::transpose(a, -2, -1); }
inline Tensor mul(const Tensor& a, const Tensor& b) { return take(dispatch("aten::mul", "Tensor", a, b)[0]); }
inline Tensor div(const Tensor& a, const Tensor& b) { return take(dispatch("aten::div", "Tensor", a, b)[0]); }
inline Tensor gt(const Tensor& a, const Tensor& b) { return take(dispatch("aten::gt", "Tensor", a, b)[0]); }
inline Tensor logical_and(const Tensor& a, const Tensor& b) { return take(dispatch("aten::logical_and", "", a, b)[0]); }
inline Tensor where(const Tensor& condition, const Tensor& a, const Tensor& b) {
  return take(dispatch("aten::where", "self", condition, a, b)[0]);
}
inline Tensor neg(const Tensor& a) { return take(dispatch("aten::neg", "", a)[0]); }
inline Tensor abs(const Tensor& a) { return take(dispatch("aten::abs", "", a)[0]); }
inline Tensor sqrt(const Tensor& a) { return take(dispatch("aten::sqrt", "", a)[0]); }
inline Tensor reciprocal(const Tensor& a) { return take(dispatch("aten::reciprocal", "", a)[0]); }
inline Tensor sum_over(const Tensor& a, int64_t dim) { return torch::stable::sum(a, std::vector<int64_t>{dim}); }
using torch::stable::subtract;
inline Tensor add(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }
inline Tensor to_dtype(const Tensor& a, ScalarType dtype) {
  return a.scalar_type() == dtype ? a : torch::stable::to(a, dtype);
}
inline Tensor index_select(const Tensor& a, int64_t dim, const Tensor& index) {
  return take(dispatch("aten::index_select", "", a, dim, index)[0]);
}
// Rows `index` of `to` ← `from`, in the first dimension.
inline void put_rows(const Tensor& to, const Tensor& index, const Tensor& from) {
  take(dispatch("aten::index_copy_", "", to, int64_t{0}, index, from)[0]);
}
inline Tensor gather(const Tensor& a, int64_t dim, const Tensor& index) {
  return take(dispatch("aten::gather", "", a, dim, index, false)[0]);
}
inline Tensor expand(const Tensor& a, const std::vector<int64_t>& sizes) {
  return take(dispatch("aten::expand", "", a, sizes, false)[0]);
}
inline Tensor cat(const std::vector<Tensor>& parts, int64_t dim) {
  return take(dispatch("aten::cat", "", parts, dim)[0]);
}
inline Tensor tril(const Tensor& a, int64_t diagonal = 0) { return take(dispatch("aten::tril", "", a, diagonal)[0]); }
inline Tensor diagonal(const Tensor& a) {
  return take(dispatch("aten::diagonal", "", a, int64_t{0}, int64_t{-2}, int64_t{-1})[0]);
}
inline Tensor diag_embed(const Tensor& a) {
  return take(dispatch("aten::diag_embed", "", a, int64_t{0}, int64_t{-2}, int64_t{-1})[0]);
}
// NaN and infinities become 0.
inline Tensor finite_or_zero(const Tensor& a) {
  const std::optional<double> zero = 0.0;
  return take(dispatch("aten::nan_to_num", "", a, zero, zero, zero)[0]);
}
inline Tensor amin(const Tensor& a, int64_t dim) {
  return take(dispatch("aten::amin", "", a, std::vector<int64_t>{dim}, false)[0]);
}
// The identity of order n, in the dtype and on the device of `like`.
inline Tensor eye_like(const Tensor& like, int64_t n) {
  const Tensor eye = torch::stable::new_zeros(like, {n, n});
  copy_(diagonal(eye), torch::stable::full({n}, 1.0, like.scalar_type(), std::nullopt, like.device()));
  return eye;
}
// x moved on by `shift` places in the last dimension, what falls off the end coming in at the front.
inline Tensor roll(const Tensor& x, int64_t shift) {
  return take(dispatch("aten::roll", "", x, std::vector<int64_t>{shift}, std::vector<int64_t>{-1})[0]);
}
inline Tensor unsqueeze(const Tensor& x, int64_t dim) { return torch::stable::unsqueeze(x, dim); }
inline Tensor on_host(const Tensor& x) {
  return torch::stable::to(x, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}
inline Tensor on_device_of(const Tensor& x, const Tensor& like) { return torch::stable::to(x, like.device()); }
// Places in a batch, int64, on the device of `like`.
inline Tensor index_tensor(const std::vector<int64_t>& places, const Tensor& like) {
  const Tensor host = torch::stable::empty({static_cast<int64_t>(places.size())}, ScalarType::Long);
  std::copy(places.begin(), places.end(), static_cast<int64_t*>(host.mutable_data_ptr()));
  return on_device_of(host, like);
}
// Rows [start, start + length) of dimension `dim`, a view.
inline Tensor slice(Tensor a, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(a, dim, start, length);
}

// Eigenvalues ascending (N, m) and eigenvectors as columns (N, m, m), of the lower triangles.
inline std::pair<Tensor, Tensor> linalg_eigh(const Tensor& a) {
  const auto stack = dispatch("aten::linalg_eigh", "", a, std::string("L"));
  return {take(stack[0]), take(stack[1])};
}
// Cholesky factor L of the lower triangles, and LAPACK's info (N), int32: > 0 where there is none.
inline std::pair<Tensor, Tensor> cholesky_ex(const Tensor& a) {
  const auto stack = dispatch("aten::linalg_cholesky_ex", "", a, false, false);
  return {take(stack[0]), take(stack[1])};
}
// X with A X = B (left) or X A = B, A triangular.
inline Tensor solve_triangular(const Tensor& a, const Tensor& b, bool upper, bool left) {
  return take(dispatch("aten::linalg_solve_triangular", "", a, b, upper, left, false)[0]);
}

}  // namespace sst::aten
