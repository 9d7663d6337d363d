#include "launch.cuh"
#include "syrk_block.h"

namespace sst {

namespace {

using namespace cuda;

template <class Engine>
__global__ void __launch_bounds__(Engine::kThreads, Engine::kResident)
    syrk_unit_kernel(const __grid_constant__ SyrkLaunch<typename Engine::T> launch, int64_t first) {
  __shared__ alignas(16) char shared[kSharedBytes<Engine>];
  Block block{shared};
  syrk_unit<Engine>(block, launch, first + blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(SyrkSums::kThreads)
    syrk_sum_kernel(const __grid_constant__ SyrkLaunch<T> launch, int64_t first) {
  __shared__ alignas(16) char shared[SyrkSums::kSharedBytes<Accumulator<T>>];
  Block block{shared};
  syrk_sum(block, launch, first + blockIdx.x);
}

template <class Engine>
void run_units(const SyrkGroup<typename Engine::T>& group, cudaStream_t stream) {
  using T = typename Engine::T;
  for_each_launch(group, &TriangleSchedule::first_unit, unit_blocks<Engine>, [&](const SyrkLaunch<T>& launch) {
    for_each_grid("syrk_accumulate_", launch.blocks, [&](int64_t first, unsigned blocks) {
      syrk_unit_kernel<Engine><<<blocks, Engine::kThreads, 0, stream>>>(launch, first);
    });
  });
}

}  // namespace

template <class T>
GroupTotals schedule_syrk_cuda(TriangleSchedule* schedules, int64_t count) {
  for (int64_t i = 0; i < count; ++i) schedules[i].tile = syrk_tile<T>(schedules[i].d);
  return schedule_group(schedules, count, kSyrkTargetUnits, kSyrkLeastTokens);
}

template <class T>
void syrk_accumulate_cuda(const SyrkGroup<T>& group, Precision precision, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto run = [&](auto engine) { run_units<typename decltype(engine)::type>(group, cuda_stream); };
  for_each_syrk_engine<T, true>(precision, run);
  for_each_syrk_engine<T, false>(precision, run);
  for_each_launch(group, &TriangleSchedule::first_sum, sum_blocks<T>, [&](const SyrkLaunch<T>& launch) {
    for_each_grid("syrk_accumulate_", launch.blocks, [&](int64_t first, unsigned blocks) {
      syrk_sum_kernel<<<blocks, SyrkSums::kThreads, 0, cuda_stream>>>(launch, first);
    });
  });
}

#define SST_INSTANTIATE(T)                                                \
  template GroupTotals schedule_syrk_cuda<T>(TriangleSchedule*, int64_t); \
  template void syrk_accumulate_cuda(const SyrkGroup<T>&, Precision, void*);
SST_INSTANTIATE(Half)
SST_INSTANTIATE(BFloat16)
SST_INSTANTIATE(float)
SST_INSTANTIATE(double)

}  // namespace sst
