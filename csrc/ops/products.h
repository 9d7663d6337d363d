// Groups of products S ← β S + α Xᵀ diag(w) X: what every op that accumulates a factor comes down to.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "kernels/syrk.h"

namespace sst {

// One product as an op was given it. Names are those the arguments have in messages.
struct Product {
  Argument s, x;
  std::optional<Argument> weight;
  double alpha, beta;
};

// S (…, d, d), or (…, d (d + 1) / 2) packed, float32 (float64 for float64 X), to match X (…, T, d); weight (…, T) in
// S's dtype. Does not look at overlaps.
void check_product(const Product& product);
Precision parse_precision(const char* op, const std::string& precision);

// Checks all products, one by one and against each other, then accumulates them on the device they are all on.
void accumulate_products(const std::vector<Product>& products, Precision precision);

}  // namespace sst
