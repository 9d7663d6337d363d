#include "counts.h"

namespace sst {

template <class A>
void add_counts_cpu(const Counts<A>& args) {
  double sum = args.weight ? 0.0 : static_cast<double>(args.n);
  for (int64_t t = 0; args.weight && t < args.n; ++t) sum += static_cast<double>(args.weight[t]);
  for (int i = 0; i < 2; ++i) args.counts[i] = (args.beta == 0.0 ? 0.0 : args.beta * args.counts[i]) + sum;
}

template void add_counts_cpu(const Counts<float>&);
template void add_counts_cpu(const Counts<double>&);

}  // namespace sst
