#include "kernels/syrk.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <vector>

#include "products.h"

namespace sst {

namespace {

void syrk_accumulate_(const Tensor& s, const Tensor& x, const std::optional<Tensor>& weight, double alpha, double beta,
                      const std::string& precision, [[maybe_unused]] bool deterministic) {
  constexpr const char* op = "syrk_accumulate_";
  std::optional<Argument> arg_w;
  if (weight) arg_w.emplace(Argument{op, "weight", *weight});
  accumulate_products({Product{{op, "S", s}, {op, "X", x}, arg_w, alpha, beta}}, parse_precision(op, precision));
}

void grouped_syrk_accumulate_(const std::vector<Tensor>& s, const std::vector<Tensor>& x,
                              const std::optional<std::vector<Tensor>>& weights, double alpha, double beta,
                              const std::string& precision, [[maybe_unused]] bool deterministic) {
  constexpr const char* op = "grouped_syrk_accumulate_";
  const auto check_length = [&](const char* name, size_t length) {
    if (length != s.size()) {
      fail(op, ": ", name, " must have one tensor for each of S's ", s.size(), ", got ", length);
    }
  };
  check_length("X", x.size());
  if (weights) check_length("weights", weights->size());
  std::vector<Product> products;
  for (size_t i = 0; i < s.size(); ++i) {
    const std::string index = "[" + std::to_string(i) + "]";
    std::optional<Argument> weight;
    if (weights) weight.emplace(Argument{op, "weights" + index, (*weights)[i]});
    products.push_back({{op, "S" + index, s[i]}, {op, "X" + index, x[i]}, weight, alpha, beta});
  }
  accumulate_products(products, parse_precision(op, precision));
}

}  // namespace

}  // namespace sst

STABLE_TORCH_LIBRARY_FRAGMENT(sst_kernels, m) {
  m.def(
      "syrk_accumulate_(Tensor(a!) S, Tensor X, Tensor? weight=None, float alpha=1.0, float beta=1.0, *, "
      "str precision=\"ieee\", bool deterministic=True) -> ()");
  m.def(
      "grouped_syrk_accumulate_(Tensor(a!)[] S, Tensor[] X, Tensor[]? weights=None, float alpha=1.0, "
      "float beta=1.0, *, str precision=\"ieee\", bool deterministic=True) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CPU, m) {
  m.impl("syrk_accumulate_", TORCH_BOX(&sst::syrk_accumulate_));
  m.impl("grouped_syrk_accumulate_", TORCH_BOX(&sst::grouped_syrk_accumulate_));
}
#ifdef SST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CUDA, m) {
  m.impl("syrk_accumulate_", TORCH_BOX(&sst::syrk_accumulate_));
  m.impl("grouped_syrk_accumulate_", TORCH_BOX(&sst::grouped_syrk_accumulate_));
}
#endif
