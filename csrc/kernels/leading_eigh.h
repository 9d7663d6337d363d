// The k largest pairs of symmetric pencils of moderate order, with their certificates:
//     A v = λ B v,  λ descending,  Vᵀ B V = I
// by B = UᵀU, C = U⁻ᵀ A U⁻¹ = Q T Qᵀ, bisection on T (Barth, Martin & Wilkinson 1967), inverse iteration with
// orthogonalisation (Peters & Wilkinson 1971), V = U⁻¹ Q Y.
// Layout      A, B (batch, n, n), only the lower triangles are read, any strides; values (batch, min(k + 1, n)),
//             vectors (batch, n, k), errors (batch, k), orthogonality (batch), sound (batch), dense. No overlap; the
//             caller owns all.
// Certificate errors ‖Av − λBv‖ / ((‖A‖ + |λ|‖B‖)‖v‖) of the pairs as they are returned, norms estimated from below;
//             orthogonality max |VᵀBV − I|.
// Sound       1 where the errors are at most `tol`, k · orthogonality < 1, orthogonality at most 10 n eps and λ_k
//             stands off from λ_(k+1) by more than rounding: then no larger eigenvalue is missing, for bisection
//             has counted those of T (Sylvester), and T has those of C up to rounding. 0 otherwise (a fault, a cluster
//             at k, entries out of range, a pair not good enough): then the member's results mean nothing, and
//             another method must say why.
// CPU         a thread owns a member. All in float64. 3 n³ flops and 8 n² k; workspace 5 n² and 2 nk. The matrix is
//             updated and multiplied by the next reflector in one pass over it.
// Deterministic: a member's bits depend on its own data and the instruction set alone.
#pragma once

#include <atomic>
#include <cstdint>

#include "fused_eigh.h"

namespace sst {

template <class T>
struct LeadingEigh {
  Matrices<T> a, b;
  T *values, *vectors, *errors, *orthogonality;
  int64_t* sound;
  int64_t batch, n, k;
  double tol;
};

// One thread's share, by an instruction set of panel.h: it takes members from `next` until none is left. n >= 1,
// 1 <= k <= n.
template <class T>
void leading_eigh_cpu(int set, const LeadingEigh<T>& args, std::atomic<int64_t>& next);

}  // namespace sst
