#include "kernels/triangle.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "checks.h"
#include "parallel.h"
#ifdef SST_WITH_CUDA
#include "stream.h"
#endif

namespace sst {

namespace {

void check_accumulator(const Argument& x) {
  check_wide(x);
  check_unit_stride(x);
}

Batch check_square(const Argument& s) {
  const Tensor& t = s.tensor;
  if (t.dim() < 2 || t.size(-1) != t.size(-2)) fail(s.op, ": S must be (…, d, d), got ", shape_of(t));
  check_accumulator(s);
  return flatten_batch(s, 2);
}

template <class A>
void run(const Triangle<A>& args, TriangleCopy what, [[maybe_unused]] const Tensor& on) {
#ifdef SST_WITH_CUDA
  if (on.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    return copy_triangle_cuda(args, what, current_stream(on.get_device_index()));
  }
#endif
  const int64_t bytes = args.batch * args.d * args.d * static_cast<int64_t>(sizeof(A));
  parallel(triangle_bands(args.batch, args.d), bytes, [&](auto& next) { copy_triangle_cpu(args, what, next); });
}

// `packed` may be null.
void copy_triangle(const Tensor& square, Batch square_batch, const Tensor* packed, Batch packed_batch,
                   TriangleCopy what) {
  visit_wide(square.scalar_type(), [&]<class A>() {
    run(Triangle<A>{mutable_data<A>(square), square_batch.stride, square.stride(-2),
                    packed ? mutable_data<A>(*packed) : nullptr, packed_batch.stride, square_batch.count,
                    square.size(-1)},
        what, square);
  });
}

std::vector<int64_t> leading(const Tensor& x, int64_t trailing) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim() - trailing; ++i) sizes.push_back(x.size(i));
  return sizes;
}

void symmetrize_(const Tensor& s) {
  const Argument arg{"symmetrize_", "S", s};
  const Batch batch = check_square(arg);
  check_no_self_overlap(arg);
  copy_triangle(s, batch, nullptr, {1, 0}, TriangleCopy::symmetrize);
}

Tensor pack_lower(const Tensor& s) {
  const Batch batch = check_square({"pack_lower", "S", s});
  const int64_t size = triangle_count(s.size(-1));
  std::vector<int64_t> sizes = leading(s, 2);
  sizes.push_back(size);
  const Tensor packed = torch::stable::new_empty(s, sizes, s.scalar_type());
  copy_triangle(s, batch, &packed, {batch.count, size}, TriangleCopy::pack);
  return packed;
}

Tensor unpack_lower(const Tensor& packed) {
  const Argument arg{"unpack_lower", "P", packed};
  const int64_t size = packed.dim() < 1 ? -1 : packed.size(-1);
  const int64_t d = size < 0 ? 0 : triangle_block(size).row;
  if (size < 0 || triangle_count(d) != size) {
    fail("unpack_lower: P must be (…, d (d + 1) / 2) for some d, got ", shape_of(packed));
  }
  check_accumulator(arg);
  std::vector<int64_t> sizes = leading(packed, 1);
  sizes.push_back(d);
  sizes.push_back(d);
  const Batch batch = flatten_batch(arg, 1);
  const Tensor square = torch::stable::new_empty(packed, sizes, packed.scalar_type());
  copy_triangle(square, {batch.count, d * d}, &packed, batch, TriangleCopy::unpack);
  return square;
}

}  // namespace

}  // namespace sst

STABLE_TORCH_LIBRARY_FRAGMENT(sst_kernels, m) {
  m.def("symmetrize_(Tensor(a!) S) -> ()");
  m.def("pack_lower(Tensor S) -> Tensor");
  m.def("unpack_lower(Tensor P) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CPU, m) {
  m.impl("symmetrize_", TORCH_BOX(&sst::symmetrize_));
  m.impl("pack_lower", TORCH_BOX(&sst::pack_lower));
  m.impl("unpack_lower", TORCH_BOX(&sst::unpack_lower));
}
#ifdef SST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CUDA, m) {
  m.impl("symmetrize_", TORCH_BOX(&sst::symmetrize_));
  m.impl("pack_lower", TORCH_BOX(&sst::pack_lower));
  m.impl("unpack_lower", TORCH_BOX(&sst::unpack_lower));
}
#endif
