// What every op does before it hands pointers to a kernel: refuse what the kernel cannot take, with
// a message that names the op, the argument, the expected, the given and the remedy.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/scalar.h"

namespace sst {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::invalid_argument, which arrives in Python as ValueError.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// An argument with the names it has in messages.
struct Argument {
  const char* op;
  std::string name;
  const Tensor& tensor;
};

// One stride that steps through all leading dimensions of a tensor.
struct Batch {
  int64_t count, stride;
};

std::string shape_of(const Tensor& tensor);  // "(100, 64)"
const char* dtype_name(ScalarType dtype);    // "float32"
std::string device_name(const Tensor& tensor);
// Whether two tensors, of `dims` dimensions or more, agree in the first `dims` sizes.
bool same_sizes(const Tensor& a, const Tensor& b, int64_t dims);

// float32, float64, bfloat16 or float16.
void check_floating(const Argument& x);
// float32 or float64.
void check_wide(const Argument& x);
void check_dtype(const Argument& x, ScalarType expected, const char* reason);
void check_same_device(const Argument& x, const Argument& reference);
// Elements of a row adjacent.
void check_unit_stride(const Argument& x);
// All dimensions but the last `trailing`, as one dimension.
Batch flatten_batch(const Argument& x, int64_t trailing);
// No two elements at one address.
void check_no_self_overlap(const Argument& x);
// No memory range of `written` meets another of `written` or one of `read`.
void check_apart(const std::vector<Argument>& written, const std::vector<Argument>& read);

inline ScalarType accumulator_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// f.operator()<T>() for the element type of a dtype that check_floating has passed.
template <class F>
void visit_floating(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Half:
      return f.template operator()<Half>();
    case ScalarType::BFloat16:
      return f.template operator()<BFloat16>();
    case ScalarType::Double:
      return f.template operator()<double>();
    default:
      return f.template operator()<float>();
  }
}

// The same for a dtype that check_wide has passed.
template <class F>
void visit_wide(ScalarType dtype, F f) {
  if (dtype == ScalarType::Double) return f.template operator()<double>();
  f.template operator()<float>();
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace sst
