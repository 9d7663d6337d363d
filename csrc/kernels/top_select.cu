#include "launch.cuh"
#include "top_select_block.h"

namespace sst {

namespace {

using namespace cuda;

template <class T>
__global__ void __launch_bounds__(HistogramBlock::kThreads)
    digit_histogram_kernel(const __grid_constant__ DigitHistogram<T> args, int low, int window) {
  extern __shared__ __align__(16) char shared[];
  Block block{shared};
  digit_histogram_block(block, args, low, window, blockIdx.x, gridDim.x);
}

template <class T>
__global__ void __launch_bounds__(MaskBlock::kThreads)
    mask_above_kernel(const __grid_constant__ ThresholdMask<T> args, int64_t first) {
  __shared__ alignas(16) char shared[MaskBlock::kSharedBytes];
  Block block{shared};
  mask_above_unit(block, args, first + blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(MaskBlock::kThreads) deal_ties_kernel(const __grid_constant__ ThresholdMask<T> args) {
  __shared__ alignas(16) char shared[MaskBlock::kSharedBytes];
  Block block{shared};
  deal_ties(block, args);
}

template <class T>
__global__ void __launch_bounds__(MaskBlock::kThreads)
    mask_ties_kernel(const __grid_constant__ ThresholdMask<T> args, int64_t first) {
  __shared__ alignas(16) char shared[MaskBlock::kSharedBytes];
  Block block{shared};
  mask_ties_unit(block, args, first + blockIdx.x);
}

constexpr const char* kHistogram = "digit_histogram_";

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(kHistogram) + ": CUDA: " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

}  // namespace

// A block to a multiprocessor; as many readings of the values as it takes windows to cover the digits.
template <class T>
void digit_histogram_cuda(const DigitHistogram<T>& args, void* stream) {
  int window = kDigits;
  const int available = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  while (HistogramBlock::shared_bytes(window) > available) window /= 2;
  const int bytes = HistogramBlock::shared_bytes(window);
  check(cudaFuncSetAttribute(digit_histogram_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const int64_t blocks =
      least(attribute(cudaDevAttrMultiProcessorCount), ceil_div(args.n, int64_t{HistogramBlock::kRound}));
  for (int low = 0; low < kDigits; low += window) {
    for_each_grid(kHistogram, blocks, [&](int64_t, unsigned grid) {
      digit_histogram_kernel<<<grid, HistogramBlock::kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(args, low,
                                                                                                           window);
    });
  }
}

template <class T>
void threshold_mask_cuda(const ThresholdMask<T>& args, void* stream) {
  constexpr const char* op = "threshold_mask_";
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  for_each_grid(op, mask_units(args.n), [&](int64_t first, unsigned blocks) {
    mask_above_kernel<<<blocks, MaskBlock::kThreads, 0, cuda_stream>>>(args, first);
  });
  for_each_grid(op, 1, [&](int64_t, unsigned blocks) {
    deal_ties_kernel<<<blocks, MaskBlock::kThreads, 0, cuda_stream>>>(args);
  });
  for_each_grid(op, mask_units(args.n), [&](int64_t first, unsigned blocks) {
    mask_ties_kernel<<<blocks, MaskBlock::kThreads, 0, cuda_stream>>>(args, first);
  });
}

#define SST_INSTANTIATE(T)                                             \
  template void digit_histogram_cuda(const DigitHistogram<T>&, void*); \
  template void threshold_mask_cuda(const ThresholdMask<T>&, void*);
SST_INSTANTIATE(Half)
SST_INSTANTIATE(BFloat16)
SST_INSTANTIATE(float)
SST_INSTANTIATE(double)

}  // namespace sst
