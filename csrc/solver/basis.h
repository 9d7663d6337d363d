// The search space of a batch of pencils: vectors S = [Q; V] as rows, Q locked, B-orthonormal, with AS and BS carried
// along, and H = V A Vᵀ.
#pragma once

#include "operator.h"
#include "small.h"

namespace sst {

class Basis {
 public:
  // Room for `capacity` vectors to a pencil, in the order, the dtype and on the device of those of `like` (N, p, n).
  Basis(const Tensor& like, int64_t capacity);

  int64_t locked() const { return locked_; }
  int64_t size() const { return size_; }  // without the locked

  // Adds the rows T (N, p, n), made B-orthonormal to all vectors and each other: T ← M [S; T] with BT carried by the
  // same M, twice; then AT. Directions that vanish become zero rows, marked as no vectors.
  // With `careful`, B is applied once more after the first of these.
  void append(Tensor t, const Operator& a, const Operator& b, bool careful);

  SmallEigen rayleigh_ritz() const;

  // The rows `coefficients` (N, w, m), float64, of V, AV or BV.
  enum Part { kVectors, kA, kB };
  Tensor combine(Part part, const Tensor& coefficients) const;

  // V ← `coefficients` V, (N, c, m) of orthonormal rows, and H from `matrix` (N, m, m), the H of now. Rows i with
  // valid[:, i] = 0 are no vectors.
  void restart(const Tensor& coefficients, const Tensor& valid, const Tensor& matrix);
  // The first `count` vectors of V, Ritz vectors after a restart, are locked.
  void lock(int64_t count);
  void select(const Tensor& index);

  Tensor locked_rows(Part part) const { return narrow_rows(part, 0, locked_); }
  const Tensor& notes() const { return notes_; }  // (N, 2) float64, of the orthonormalizer

 private:
  Tensor narrow_rows(Part part, int64_t first, int64_t count) const {
    return aten::slice(parts_[part], 1, first, count);
  }
  int64_t locked_ = 0, size_ = 0;
  Tensor parts_[3];  // (N, capacity, n)
  Tensor h_;         // (N, capacity, capacity) float64, its lower triangle, of V alone
  Tensor valid_, notes_;
  double drop_;
};

}  // namespace sst
