// What the CUDA kernels say about a block of threads, in a form that compiles for the host too: there a block runs
// thread after thread (tests/native/test_blocks.cpp), which shows everything but the instructions themselves.
//
// A kernel is a function template on Block, written as phases between barriers:
//     Each<Block, T>                  a T in every thread's registers; value[t] is thread t's
//     block.each(f)                   f(t) for every thread t
//     block.barrier()                 all threads' shared memory accesses before it happen before those after it
//     block.barrier_any(f)            the same, and whether f(t) holds for any thread
//     block.load<V>(t, at), store     thread t's access to a V at byte `at` of shared memory
//     block.add(t, at, v)             adds to the uint32 at byte `at` and returns what it was; threads may meet there
//     block.shuffle(t, mask, f)       f(t ^ mask), of a thread of the same warp; all of which take part
//     block.load_transposed(x, f)     ldmatrix.x4.trans: thread t gives the row at byte f(t), and gets x[t]
//     block.mma(format, c, a, b, i)   c += a b by the tensor cores, for every warp; b is registers i and i + 1
// On the device (mma.cuh) `each` calls f once, for the calling thread, and all of it is inlined.
#pragma once

#include <cstdint>
#include <cstring>

#include "schedule.h"

#ifdef __CUDACC__
#define SST_DEVICE __device__ __forceinline__
#define SST_UNROLL _Pragma("unroll")
#else
#define SST_DEVICE inline
#define SST_UNROLL
#endif

namespace sst::cuda {

template <class Block, class T>
using Each = typename Block::template Each<T>;

constexpr int kWarp = 32;

// Names an engine (block_tile.h) where a value is needed.
template <class Engine>
struct EngineTag {
  using type = Engine;
};

// N registers of 32 bits.
template <int N>
struct Registers {
  uint32_t word[N];
};
struct alignas(16) Vector {  // what one instruction moves to or from shared memory
  uint32_t word[4];
};

// N adjacent elements of T, in as few registers as hold them: what a thread reads from memory at once.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Chunk {
  static constexpr int kWords = sizeof(T) * N / 4, kElements = N;
  uint32_t word[kWords];

  SST_DEVICE T operator[](int i) const {
    T value;
    if constexpr (sizeof(T) == 2) {
      const uint16_t half = static_cast<uint16_t>(word[i / 2] >> (16 * (i % 2)));
      memcpy(&value, &half, sizeof value);
    } else {
      memcpy(&value, word + i * (sizeof(T) / 4), sizeof value);
    }
    return value;
  }
  SST_DEVICE void set(int i, T value) {
    if constexpr (sizeof(T) == 2) {
      uint16_t half;
      memcpy(&half, &value, sizeof half);
      word[i / 2] =
          i % 2 ? (word[i / 2] & 0xFFFFu) | static_cast<uint32_t>(half) << 16 : (word[i / 2] & 0xFFFF0000u) | half;
    } else {
      memcpy(word + i * (sizeof(T) / 4), &value, sizeof value);
    }
  }
};

// Whether the chunks of a matrix may be read at once: rows of whole chunks, each at an address that is a multiple of
// the chunk's length. `batch_stride` leads from one member to the next.
template <class C, class T>
SST_HOST_DEVICE bool holds_chunks(const Rows<T>& x, int64_t batch_stride) {
  const auto length = static_cast<uint64_t>(x.stride | batch_stride) * sizeof(T);
  return x.cols % C::kElements == 0 && (reinterpret_cast<uintptr_t>(x.data) | length) % alignof(C) == 0;
}

// Elements [col, col + N) of a row; from `cols` on anything, and nothing is read there. `whole`: holds_chunks.
template <bool whole, class C, class T>
SST_DEVICE C load_chunk(const T* row, int col, int cols) {
  if constexpr (whole) {
    return *reinterpret_cast<const C*>(row + (col < cols ? col : 0));
  } else {
    C chunk;
    SST_UNROLL
    for (int i = 0; i < C::kElements; ++i) chunk.set(i, row[col + i < cols ? col + i : 0]);
    return chunk;
  }
}

// *sum += value for an integer in memory that threads of any block add to at once.
SST_DEVICE void add_global(int64_t* sum, int64_t value) {
#ifdef __CUDA_ARCH__
  atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(value));
#else
  *sum += value;
#endif
}

// Two floats rounded to bfloat16, to nearest, ties to even: `low` in the lower half.
SST_DEVICE uint32_t round_bfloat16(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  const auto round = [](float x) {
    const uint32_t bits = bits_from_float(x);
    return x != x ? 0x7FFFu : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
#endif
}

// A float rounded to tf32 (10 bits of fraction), to nearest, ties away from zero.
SST_DEVICE uint32_t round_tf32(float x) {
#ifdef __CUDA_ARCH__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  return x != x ? 0x7FFFFFFFu : (bits_from_float(x) + 0x1000) & 0xFFFFE000u;
#endif
}

// Part i of two floats, as bfloat16: x = part 0 + part 1 + part 2 exactly, unless x rounds to infinity or the last part
// is too small for float32. Part 0 + part 1 is within 2^-18 |x|.
SST_DEVICE uint32_t bfloat16_part(float low, float high, int i) {
  uint32_t part = round_bfloat16(low, high);
  const auto next = [&] {
    low -= float_from_bits(part << 16);
    high -= float_from_bits(part & 0xFFFF0000u);
    part = round_bfloat16(low, high);
  };
  if (i > 0) next();
  if (i > 1) next();
  return part;
}

}  // namespace sst::cuda
