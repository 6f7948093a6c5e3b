// What follows a product: a bias for each column, an activation, and a matrix that is added.
#pragma once

#include <cstdint>

namespace lepton {

enum class Activation : int64_t { kNone = 0, kReLU = 1, kSiLU = 2, kGELU = 3, kGELUTanh = 4 };
constexpr int64_t kActivations = 5;

// y[m, n] = activation(y[m, n] + bias[n]) + residual[m, n]
struct Epilogue {
  const float* bias;      // [N], or null
  const float* residual;  // [M, N], or null
  Activation activation;

  bool empty() const { return bias == nullptr && residual == nullptr && activation == Activation::kNone; }
};

}  // namespace lepton
