// The factor between a weight and its normalized form.
#pragma once
#include <cmath>
#include <optional>

namespace wx::sn {

// s(sigma) and s'(sigma) of reference.py.
struct Scale {
  double s = 1, ds = 0;
  Scale(double sigma, std::optional<double> bound) {
    const double c = bound.value_or(1.0);
    if (std::isnan(sigma) || (bound ? sigma > c : sigma != 0)) s = c / sigma, ds = -c / (sigma * sigma);
  }
};

}  // namespace wx::sn
