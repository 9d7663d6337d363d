#include "products.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "parallel.h"
#ifdef SST_WITH_CUDA
#include "stream.h"
#endif

namespace sst {

namespace {

// The leading dimensions of two tensors are equal, those beyond the last `s_trailing` and `x_trailing`.
bool same_batch(const Tensor& s, int64_t s_trailing, const Tensor& x, int64_t x_trailing) {
  if (s.dim() - s_trailing != x.dim() - x_trailing) return false;
  for (int64_t i = 0; i < s.dim() - s_trailing; ++i) {
    if (s.size(i) != x.size(i)) return false;
  }
  return true;
}

bool is_packed(const Tensor& s, const Tensor& x) { return s.dim() == x.dim() - 1; }

void check_s(const Argument& s, const Argument& x) {
  const int64_t d = x.tensor.size(-1), packed_size = triangle_count(d);
  const bool square =
      s.tensor.dim() >= 2 && s.tensor.size(-1) == d && s.tensor.size(-2) == d && same_batch(s.tensor, 2, x.tensor, 2);
  const bool packed =
      is_packed(s.tensor, x.tensor) && s.tensor.size(-1) == packed_size && same_batch(s.tensor, 1, x.tensor, 2);
  if (!square && !packed) {
    const char* lead = x.tensor.dim() > 2 ? "…, " : "";
    fail(s.op, ": ", s.name, " must be (", lead, "d, d) = (", lead, d, ", ", d, ") to match ", x.name, " ",
         shape_of(x.tensor), ", got ", shape_of(s.tensor), "; allocate it with ", x.name, "'s leading dimensions, as ",
         x.name, ".new_zeros(*", x.name, ".shape[:-2], d, d, dtype=torch.",
         dtype_name(accumulator_dtype(x.tensor.scalar_type())), ") does, or packed, with d (d + 1) / 2 = ", packed_size,
         " elements in place of (d, d)");
  }
  check_dtype(s, accumulator_dtype(x.tensor.scalar_type()), ("for data of " + x.name + "'s dtype").c_str());
  check_same_device(s, x);
  check_unit_stride(s);
  check_no_self_overlap(s);
}

void check_weight(const Argument& weight, const Argument& x) {
  const Tensor& w = weight.tensor;
  if (w.dim() < 1 || w.size(-1) != x.tensor.size(-2) || !same_batch(w, 1, x.tensor, 2)) {
    fail(x.op, ": ", weight.name, " must be (…, T), ", x.name, "'s shape without its last dimension, to match ", x.name,
         " ", shape_of(x.tensor), ", got ", shape_of(w));
  }
  check_dtype(weight, accumulator_dtype(x.tensor.scalar_type()), ("for data of " + x.name + "'s dtype").c_str());
  check_same_device(weight, x);
  check_unit_stride(weight);
}

template <class T>
Syrk<T> syrk_arguments(const Product& product) {
  using A = Accumulator<T>;
  const Tensor &s = product.s.tensor, &x = product.x.tensor;
  const bool packed = is_packed(s, x);
  return {.s = {mutable_data<A>(s), flatten_batch(product.s, packed ? 1 : 2).stride, packed ? 0 : s.stride(-2)},
          .x = {data<T>(x), x.stride(-2), x.size(-1)},
          .x_batch_stride = flatten_batch(product.x, 2).stride,
          .weight = product.weight ? data<A>(product.weight->tensor) : nullptr,
          .weight_batch_stride = product.weight ? flatten_batch(*product.weight, 1).stride : 0,
          .alpha = static_cast<A>(product.alpha),
          .beta = static_cast<A>(product.beta)};
}

int64_t flops(const std::vector<TriangleSchedule>& schedules) {
  int64_t sum = 0;
  for (const TriangleSchedule& part : schedules) sum += part.members * part.tokens * part.d * (part.d + 1);
  return sum;
}

// The products of a group, and what is known of their shapes.
template <class T>
struct Group {
  std::vector<Syrk<T>> products;
  std::vector<TriangleSchedule> schedules;

  SyrkGroup<T> arguments(const GroupTotals& totals, const Tensor& workspace) const {
    return {products.data(), schedules.data(), static_cast<int64_t>(products.size()),
            mutable_data<Accumulator<T>>(workspace), totals};
  }
};

Tensor new_workspace(const Tensor& on, int64_t elements) {
  return torch::stable::new_empty(on, {elements}, accumulator_dtype(on.scalar_type()));
}

template <class T>
void run_narrow(Group<T>& group, const Tensor& on) {
  const GroupTotals totals = schedule_syrk_cpu(group.schedules.data(), static_cast<int64_t>(group.schedules.size()));
  const Tensor workspace = new_workspace(on, totals.workspace);
  const SyrkGroup<T> arguments = group.arguments(totals, workspace);
  parallel(totals.units, flops(group.schedules), [&](auto& next) { syrk_units_cpu(arguments, next); });
  if (totals.workspace == 0) return;
  parallel(totals.sums, totals.workspace, [&](auto& next) { syrk_sum_cpu(arguments, next); });
}

template <class T>
void run_wide(const Group<T>& group, const Tensor& on) {
  const auto cohorts =
      syrk_cohorts_cpu(group.products.data(), group.schedules.data(), static_cast<int64_t>(group.products.size()));
  int64_t elements = 0;
  for (const auto& cohort : cohorts) elements = std::max(elements, cohort.workspace);
  const Tensor workspace = new_workspace(on, elements);
  auto* const packed = mutable_data<Accumulator<T>>(workspace);
  const int64_t work = flops(group.schedules);
  for (const auto& cohort : cohorts) {
    for (int64_t step = 0; step < cohort.steps; ++step) {
      parallel(cohort.pack_units, work, [&](auto& next) { syrk_pack_cpu(cohort, step, packed, next); });
      parallel(cohort.tile_units, work, [&](auto& next) { syrk_multiply_cpu(cohort, step, packed, next); });
    }
  }
}

template <class T>
void run_cpu(const Group<T>& group, const Tensor& on) {
  Group<T> narrow, wide;
  for (size_t i = 0; i < group.products.size(); ++i) {
    Group<T>& kind = group.schedules[i].d <= kSyrkNarrow ? narrow : wide;
    kind.products.push_back(group.products[i]);
    kind.schedules.push_back(group.schedules[i]);
  }
  run_narrow(narrow, on);
  run_wide(wide, on);
}

#ifdef SST_WITH_CUDA
template <class T>
void run_cuda(Group<T>& group, Precision precision, const Tensor& on) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  const GroupTotals totals =
      schedule_syrk_cuda<T>(group.schedules.data(), static_cast<int64_t>(group.schedules.size()));
  const Tensor workspace = new_workspace(on, totals.workspace);
  syrk_accumulate_cuda(group.arguments(totals, workspace), precision, current_stream(on.get_device_index()));
}
#endif

}  // namespace

void check_product(const Product& product) {
  const Argument& x = product.x;
  if (x.tensor.dim() < 2) fail(x.op, ": ", x.name, " must be (…, T, d), got ", shape_of(x.tensor));
  check_floating(x);
  check_unit_stride(x);
  check_s(product.s, x);
  if (product.weight) check_weight(*product.weight, x);
  flatten_batch(product.s, is_packed(product.s.tensor, x.tensor) ? 1 : 2);
  flatten_batch(x, 2);
  if (product.weight) flatten_batch(*product.weight, 1);
}

Precision parse_precision(const char* op, const std::string& precision) {
  if (precision == "ieee") return Precision::ieee;
  if (precision == "tf32") return Precision::tf32;
  if (precision == "bf16x3") return Precision::bf16x3;
  fail(op, ": precision must be 'ieee', 'tf32' or 'bf16x3', got '", precision, "'");
}

void accumulate_products(const std::vector<Product>& products, [[maybe_unused]] Precision precision) {
  if (products.empty()) return;
  const Argument& first = products.front().x;
  std::vector<Argument> written, read;
  for (const Product& product : products) {
    check_product(product);
    check_dtype(product.x, first.tensor.scalar_type(), ("to match " + first.name).c_str());
    check_same_device(product.x, first);
    written.push_back(product.s);
    read.push_back(product.x);
    if (product.weight) read.push_back(*product.weight);
  }
  check_apart(written, read);
  visit_floating(first.tensor.scalar_type(), [&]<class T>() {
    Group<T> group;
    for (const Product& product : products) {
      const Tensor& x = product.x.tensor;
      group.products.push_back(syrk_arguments<T>(product));
      group.schedules.push_back({.members = flatten_batch(product.x, 2).count, .d = x.size(-1), .tokens = x.size(-2)});
    }
#ifdef SST_WITH_CUDA
    if (first.tensor.is_cuda()) return run_cuda(group, precision, first.tensor);
#endif
    run_cpu(group, first.tensor);
  });
}

}  // namespace sst
