// Element types the kernels read, and how each becomes the type it is accumulated in.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define SST_HOST_DEVICE __host__ __device__
#else
#define SST_HOST_DEVICE
#endif

namespace sst {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};

// float32 for half, bfloat16 and float32 elements; float64 for float64.
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

SST_HOST_DEVICE inline float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
SST_HOST_DEVICE inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

SST_HOST_DEVICE inline float widen(float x) { return x; }
SST_HOST_DEVICE inline double widen(double x) { return x; }
SST_HOST_DEVICE inline float widen(BFloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }

// Exact for every half, NaN and subnormals included. Two candidates and a mask, no branch, so that
// loops vectorise: normals are rebiased by a product with 2^-112, subnormals by a subtraction of
// 0.5 (the method of github.com/Maratyszcza/FP16).
SST_HOST_DEVICE inline float widen(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
  const uint32_t twice = word + word;
  const uint32_t normal = bits_from_float(float_from_bits((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f);
  const uint32_t subnormal = bits_from_float(float_from_bits((twice >> 17) | (126u << 23)) - 0.5f);
  const uint32_t is_subnormal = -static_cast<uint32_t>(twice < (1u << 27));
  return float_from_bits((word & 0x80000000u) | (subnormal & is_subnormal) | (normal & ~is_subnormal));
#endif
}

}  // namespace sst
