#include "checks.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

namespace sst {

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  const std::string type = tensor.is_cuda() ? "cuda" : "another device type";
  return type + ":" + std::to_string(tensor.get_device_index());
}

bool same_sizes(const Tensor& a, const Tensor& b, int64_t dims) {
  for (int64_t i = 0; i < dims; ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

void check_floating(const Argument& x) {
  const ScalarType dtype = x.tensor.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double && dtype != ScalarType::BFloat16 &&
      dtype != ScalarType::Half) {
    fail(x.op, ": ", x.name, " must be float32, float64, bfloat16 or float16, got ", dtype_name(dtype),
         "; convert it with ", x.name, ".to(torch.float32)");
  }
}

void check_wide(const Argument& x) {
  if (x.tensor.scalar_type() != ScalarType::Double) check_dtype(x, ScalarType::Float, "or float64");
}

void check_dtype(const Argument& x, ScalarType expected, const char* reason) {
  if (x.tensor.scalar_type() != expected) {
    fail(x.op, ": ", x.name, " must be ", dtype_name(expected), " ", reason, ", got ",
         dtype_name(x.tensor.scalar_type()), "; convert it with ", x.name, ".to(torch.", dtype_name(expected), ")");
  }
}

void check_same_device(const Argument& x, const Argument& reference) {
  if (x.tensor.device() != reference.tensor.device()) {
    fail(x.op, ": ", x.name, " must be on the device of ", reference.name, " (", device_name(reference.tensor),
         "), got ", device_name(x.tensor), "; move it with ", x.name, ".to(", reference.name, ".device)");
  }
}

void check_unit_stride(const Argument& x) {
  const int64_t last = x.tensor.dim() - 1;
  if (x.tensor.numel() > 0 && x.tensor.size(last) > 1 && x.tensor.stride(last) != 1) {
    fail(x.op, ": ", x.name, " must have adjacent elements in its last dimension (stride 1), got ", "stride ",
         x.tensor.stride(last), "; pass a contiguous tensor, as ", x.name, ".contiguous() is");
  }
}

Batch flatten_batch(const Argument& x, int64_t trailing) {
  Batch batch{1, 0};
  for (int64_t i = x.tensor.dim() - trailing - 1; i >= 0; --i) {
    const int64_t size = x.tensor.size(i), stride = x.tensor.stride(i);
    if (size != 1 && batch.count == 1) batch.stride = stride;
    if (size != 1 && stride != batch.stride * batch.count && x.tensor.numel() > 0) {
      fail(x.op, ": the leading dimensions of ", x.name, " ", shape_of(x.tensor),
           " must be evenly strided, as view() needs to flatten them; pass a contiguous tensor, as ", x.name,
           ".contiguous() is");
    }
    batch.count *= size;
  }
  return batch;
}

void check_no_self_overlap(const Argument& x) {
  if (x.tensor.numel() == 0) return;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t i = 0; i < x.tensor.dim(); ++i) {
    if (x.tensor.size(i) > 1) dims.emplace_back(x.tensor.stride(i), x.tensor.size(i));
  }
  std::sort(dims.begin(), dims.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < extent) {
      fail(x.op, ": ", x.name, " ", shape_of(x.tensor),
           " is written in place, but several of its elements share one address (an expanded "
           "tensor?); pass ",
           x.name, ".clone()");
    }
    extent += stride * (size - 1);
  }
}

namespace {

// The bytes from a tensor's first to its last element.
struct Extent {
  const char *begin, *end;
  const Argument* argument;
  bool written;
};

Extent extent_of(const Argument& x, bool written) {
  const char* begin = static_cast<const char*>(x.tensor.const_data_ptr());
  int64_t last = 0;
  for (int64_t i = 0; i < x.tensor.dim(); ++i) last += (x.tensor.size(i) - 1) * x.tensor.stride(i);
  return {begin, begin + (last + 1) * static_cast<int64_t>(x.tensor.element_size()), &x, written};
}

}  // namespace

void check_apart(const std::vector<Argument>& written, const std::vector<Argument>& read) {
  std::vector<Extent> extents;
  for (const auto* list : {&written, &read}) {
    for (const Argument& x : *list) {
      if (x.tensor.numel() > 0) extents.push_back(extent_of(x, list == &written));
    }
  }
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  // Of those that begin earlier, the one that reaches furthest, among all and among the written.
  const Extent *any = nullptr, *in_place = nullptr;
  for (const Extent& x : extents) {
    const Extent* const other = x.written ? any : in_place;
    if (other && other->end > x.begin) {
      const Argument& changed = *(x.written ? x : *other).argument;
      const Argument& met = *(x.written ? *other : x).argument;
      fail(changed.op, ": ", changed.name, " is written in place and must not share memory with ", met.name, "; pass ",
           met.name, ".clone()");
    }
    if (!any || x.end > any->end) any = &x;
    if (x.written && (!in_place || x.end > in_place->end)) in_place = &x;
  }
}

}  // namespace sst
