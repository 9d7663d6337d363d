#include "ritz_block.h"

namespace sst {

namespace {

// A block of one thread.
struct SerialBlock {
  template <class F>
  void each(F f) {
    f(0);
  }
  void barrier() {}
};

template <class Args, class Body>
void for_each_pencil(const Args& args, std::atomic<int64_t>& next, Body body) {
  SerialBlock block;
  for (int64_t pencil = next++; pencil < args.batch; pencil = next++) body(block, args, pencil);
}

}  // namespace

void ritz_matrix_cpu(const RitzMatrix& args, std::atomic<int64_t>& next) {
  for_each_pencil(args, next, cuda::ritz_matrix<1, SerialBlock>);
}
void orthonormalizer_cpu(const Orthonormalizer& args, std::atomic<int64_t>& next) {
  for_each_pencil(args, next, cuda::orthonormalizer<1, SerialBlock>);
}
void judge_cpu(const Judge& args, std::atomic<int64_t>& next) {
  for_each_pencil(args, next, cuda::judge<1, SerialBlock>);
}

}  // namespace sst
