// A block of threads on the device (block.h), and its tensor core instructions (PTX ISA, "Warp-level matrix
// instructions").
#pragma once

#include "block_mma.h"

namespace sst::cuda {

struct Block {
  char* shared;  // aligned to 16 bytes

  template <class T>
  struct Each {
    T value;
    __device__ __forceinline__ T& operator[](int) { return value; }
    __device__ __forceinline__ const T& operator[](int) const { return value; }
  };

  template <class F>
  __device__ __forceinline__ void each(F f) {
    f(static_cast<int>(threadIdx.x));
  }
  __device__ __forceinline__ void barrier() { __syncthreads(); }
  template <class F>
  __device__ __forceinline__ bool barrier_any(F f) {
    return __syncthreads_or(f(static_cast<int>(threadIdx.x)));
  }

  template <class V>
  __device__ __forceinline__ V load(int, int at) const {
    return *reinterpret_cast<const V*>(shared + at);
  }
  template <class V>
  __device__ __forceinline__ void store(int, int at, const V& value) {
    *reinterpret_cast<V*>(shared + at) = value;
  }

  __device__ __forceinline__ uint32_t add(int, int at, uint32_t value) {
    return atomicAdd(reinterpret_cast<uint32_t*>(shared + at), value);
  }

  template <class F>
  __device__ __forceinline__ auto shuffle(int t, int mask, F f) const {
    return __shfl_xor_sync(0xFFFFFFFFu, f(t), mask);
  }

  template <class F>
  __device__ __forceinline__ void load_transposed(Each<Registers<4>>& x, F at) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared + at(static_cast<int>(threadIdx.x))));
    uint32_t (&w)[4] = x.value.word;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(address)
                 : "memory");
  }

#define SST_MMA(SHAPE)                                                                                                \
  asm("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                    \
      : "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3])                                                                \
      : "r"(a.value.word[0]), "r"(a.value.word[1]), "r"(a.value.word[2]), "r"(a.value.word[3]), "r"(b.value.word[i]), \
        "r"(b.value.word[i + 1]))

  template <Format format, class Fragment>
  __device__ __forceinline__ void mma(FormatTag<format>, Each<Fragment>& c, const Each<Registers<4>>& a,
                                      const Each<Registers<4>>& b, int i) {
    float (&v)[4] = c.value.value;
    if constexpr (format == Format::half) {
      SST_MMA("m16n8k16.row.col.f32.f16.f16.f32");
    } else if constexpr (format == Format::bfloat16) {
      SST_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
    } else {
      SST_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
    }
  }
#undef SST_MMA
};

}  // namespace sst::cuda
