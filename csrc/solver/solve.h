// From a pencil to certified pairs: start, a phase in float32 if the data allow it, the iteration, and its repetition
// from fresh products until nothing that is returned rests on products carried along.
#pragma once

#include "davidson.h"

namespace sst {

struct Solution {
  Tensor theta;                     // (N, r) float64, descending
  Tensor vectors;                   // (N, r, n)
  Tensor eta;                       // (N, r) float64, from products with the vectors themselves
  Tensor b_orthogonality;           // (N) float64: max |VBVᵀ − I| of the first k
  std::vector<Outcome> outcome;     // of each pencil
  std::vector<double> guard_error;  // see Found
  Counts counts;
};

// `rows` (N, p, n): the start itself if `warm`, else random rows, of which K⁻¹A is taken. `fresh` (1, q, n) is random.
// With `mixed`, float64 pencils are first solved in float32 as far as that goes.
Solution solve(const Pencil& pencil, const Tensor& rows, bool warm, const Tensor& fresh, const Options& options,
               bool mixed, const Observer& observer);

}  // namespace sst
