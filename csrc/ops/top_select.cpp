#include "kernels/top_select.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "checks.h"
#include "kernels/panel.h"
#include "parallel.h"
#ifdef SST_WITH_CUDA
#include "stream.h"
#endif

namespace sst {

namespace {

void check_contiguous(const Argument& x) {
  if (!x.tensor.is_contiguous()) {
    fail(x.op, ": ", x.name, " ", shape_of(x.tensor), " must be contiguous; pass ", x.name, ".contiguous()");
  }
}

void check_values(const Argument& values) {
  check_floating(values);
  check_contiguous(values);
}

// An int64 vector of `size` elements that the op changes.
void check_integers(const Argument& x, int64_t size, const Argument& values) {
  if (x.tensor.dim() != 1 || x.tensor.size(0) != size) {
    fail(x.op, ": ", x.name, " must be (", size, ",), got ", shape_of(x.tensor));
  }
  check_dtype(x, ScalarType::Long, "");
  check_same_device(x, values);
  check_contiguous(x);
  check_apart({x}, {values});
}

template <class T>
void run(const DigitHistogram<T>& args, [[maybe_unused]] const Tensor& on) {
#ifdef SST_WITH_CUDA
  if (on.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    return digit_histogram_cuda(args, current_stream(on.get_device_index()));
  }
#endif
  parallel(histogram_units(args.n), args.n * static_cast<int64_t>(sizeof(T)),
           [&](auto& next) { digit_histogram_cpu(instruction_set_in_use(), args, next); });
}

template <class T>
void run(const ThresholdMask<T>& args, [[maybe_unused]] const Tensor& on) {
#ifdef SST_WITH_CUDA
  if (on.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    return threshold_mask_cuda(args, current_stream(on.get_device_index()));
  }
#endif
  const int64_t units = mask_units(args.n), bytes = args.n * static_cast<int64_t>(sizeof(T));
  parallel(units, bytes, [&](auto& next) { mask_above_cpu(instruction_set_in_use(), args, next); });
  if (deal_ties_cpu(args)) parallel(units, bytes, [&](auto& next) { mask_ties_cpu(args, next); });
}

void digit_histogram_(const Tensor& counts, const Tensor& values, int64_t prefix, int64_t digit) {
  constexpr const char* op = "digit_histogram_";
  const Argument arg{op, "values", values};
  check_values(arg);
  check_integers({op, "counts", counts}, kDigits, arg);
  visit_floating(values.scalar_type(), [&]<class T>() {
    constexpr int digits = kKeyDigits<Accumulator<T>>;
    if (digit < 0 || digit >= digits) {
      fail(op, ": digit must be one of 0 to ", digits - 1, " for ", dtype_name(values.scalar_type()), ", got ", digit);
    }
    if (prefix < 0 || prefix >> kDigitBits * digit != 0) {
      fail(op, ": prefix must be the ", digit, " first digits, from 0 to 2^", kDigitBits * digit, " - 1, got ", prefix);
    }
    run(DigitHistogram<T>{data<T>(values), values.numel(), prefix, static_cast<int>(digit),
                          mutable_data<int64_t>(counts)},
        values);
  });
}

Tensor threshold_mask_(const Tensor& ties, const Tensor& values, double threshold) {
  constexpr const char* op = "threshold_mask_";
  const Argument arg{op, "values", values};
  check_values(arg);
  check_integers({op, "ties", ties}, 1, arg);
  if (std::isnan(threshold)) fail(op, ": threshold must be a number, got NaN");
  const auto sizes = values.sizes();
  const Tensor mask = torch::stable::new_empty(values, sizes, ScalarType::Bool);
  const Tensor unit_ties = torch::stable::new_empty(values, {mask_units(values.numel())}, ScalarType::Long);
  visit_floating(values.scalar_type(), [&]<class T>() {
    const auto narrow = static_cast<Accumulator<T>>(threshold);
    if (narrow != threshold) {
      fail(op, ": threshold must be a number of float32, as values of ", dtype_name(values.scalar_type()), " are, got ",
           threshold);
    }
    run(ThresholdMask<T>{data<T>(values), values.numel(), narrow, mutable_data<uint8_t>(mask),
                         mutable_data<int64_t>(unit_ties), mutable_data<int64_t>(ties)},
        values);
  });
  return mask;
}

}  // namespace

}  // namespace sst

STABLE_TORCH_LIBRARY_FRAGMENT(sst_kernels, m) {
  m.def("digit_histogram_(Tensor(a!) counts, Tensor values, int prefix=0, int digit=0) -> ()");
  m.def("threshold_mask_(Tensor(a!) ties, Tensor values, float threshold) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CPU, m) {
  m.impl("digit_histogram_", TORCH_BOX(&sst::digit_histogram_));
  m.impl("threshold_mask_", TORCH_BOX(&sst::threshold_mask_));
}
#ifdef SST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CUDA, m) {
  m.impl("digit_histogram_", TORCH_BOX(&sst::digit_histogram_));
  m.impl("threshold_mask_", TORCH_BOX(&sst::threshold_mask_));
}
#endif
