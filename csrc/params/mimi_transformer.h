// mimi_transformer: the codec's transformer over T steps of each stream, with a sliding window of
// keys. The keys of a stream form a ring: position p is in slot p % capacity.
#pragma once

#include "common/weight.h"

namespace voxkern {

enum class Activation : int32_t { gelu, gelu_tanh, relu, silu };

struct MimiTransformerParams {
  int64_t B, T, C, L, F, Hq, Hkv, D;
  const float* x;            // [B, T, C]
  const int64_t* positions;  // [B]
  const float* norms;        // [L, 4, C]: scale, bias of the norm before attention, then after
  Weight qkv;                // [L, (Hq + 2 Hkv) D, C]
  const float* qkv_bias;     // [L, (Hq + 2 Hkv) D]
  Weight o;                  // [L, C, Hq D]
  const float* o_bias;       // [L, C]
  Weight up;                 // [L, F, C]
  Weight down;               // [L, C, F]
  float eps, scale;
  Activation activation;
  int64_t capacity, window;
  float* keys;             // [B, L, Hkv, capacity, D]
  float* values;           // [B, L, Hkv, capacity, D]
  float* out;              // [B, T, C]
  const float* rotations;  // [B, T, D], cosines | sines
};

#ifndef VOX_ISA

inline Activation activation_of(const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  check(name == "silu", "activation: expected gelu, gelu_tanh, relu or silu, got ", name);
  return Activation::silu;
}

// All tensors contiguous. Leaves `out` and `rotations` null and does not read the values of
// positions.
inline MimiTransformerParams mimi_transformer_params(
    const Tensor& x, const Tensor& positions, const Tensor& frequencies, const Tensor& norms,
    const Tensor& qkv, const Tensor& qkv_bias, const Tensor& o, const Tensor& o_bias,
    const Tensor& up, const Tensor& down, double eps, const std::string& activation,
    const Tensor& keys, const Tensor& values, int64_t window) {
  check_dtype(x, "x", ScalarType::Float);
  check_dim(x, "x", 3);
  check_dim(frequencies, "frequencies", 1);
  check_dim(norms, "norms", 3);
  check_dim(qkv_bias, "qkv_bias", 2);
  check_dim(keys, "keys", 5);
  check_dim(down, "down", 3);
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2), L = norms.size(0);
  const int64_t D = 2 * frequencies.size(0), Hkv = keys.size(2), capacity = keys.size(3);
  const int64_t F = weight_columns(down);
  check(C >= 1, "x: expected [B, T, C] with C >= 1, got ", shape_string(x));
  check(D >= 2, "frequencies: expected one or more, got none");
  const char* const ring = "[B, L, Hkv, capacity, D]";
  check(Hkv >= 1, "keys: expected ", ring, " with Hkv >= 1, got ", shape_string(keys));
  check(F >= 1, "down: expected F >= 1, got shape ", shape_string(down));
  const int64_t Hq = qkv_bias.size(1) / D - 2 * Hkv;
  check(Hq >= 1 && Hq % Hkv == 0 && qkv_bias.size(1) == (Hq + 2 * Hkv) * D,
        "qkv_bias: expected [L, (Hq + 2 Hkv) D] with Hq a multiple of Hkv, got ",
        shape_string(qkv_bias));
  check(window >= 1, "window: expected 1 or more, got ", window);
  check(capacity >= window - 1 + T, "keys: expected ", ring,
        " with capacity >= window - 1 + T = ", window - 1 + T, ", got ", shape_string(keys));
  const auto floats = [&](const Tensor& t, const char* name, const char* letters,
                          std::initializer_list<int64_t> sizes) {
    check_operand(t, name, x, ScalarType::Float);
    check_shape(t, name, letters, sizes);
    return static_cast<const float*>(t.const_data_ptr());
  };
  check_operand(positions, "positions", x, ScalarType::Long);
  check_shape(positions, "positions", "[B]", {B});
  floats(frequencies, "frequencies", "[D / 2]", {D / 2});
  floats(keys, "keys", ring, {B, L, Hkv, capacity, D});
  floats(values, "values", ring, {B, L, Hkv, capacity, D});
  return {
      .B = B,
      .T = T,
      .C = C,
      .L = L,
      .F = F,
      .Hq = Hq,
      .Hkv = Hkv,
      .D = D,
      .x = static_cast<const float*>(x.const_data_ptr()),
      .positions = static_cast<const int64_t*>(positions.const_data_ptr()),
      .norms = floats(norms, "norms", "[L, 4, C]", {L, 4, C}),
      .qkv = mixed_weight_of(qkv, "qkv", x, "[L, (Hq + 2 Hkv) D, C]", {L, (Hq + 2 * Hkv) * D, C}),
      .qkv_bias = floats(qkv_bias, "qkv_bias", "[L, (Hq + 2 Hkv) D]", {L, (Hq + 2 * Hkv) * D}),
      .o = mixed_weight_of(o, "o", x, "[L, C, Hq D]", {L, C, Hq * D}),
      .o_bias = floats(o_bias, "o_bias", "[L, C]", {L, C}),
      .up = mixed_weight_of(up, "up", x, "[L, F, C]", {L, F, C}),
      .down = mixed_weight_of(down, "down", x, "[L, C, F]", {L, C, F}),
      .eps = static_cast<float>(eps),
      .scale = static_cast<float>(1 / std::sqrt(static_cast<double>(D))),
      .activation = activation_of(activation),
      .capacity = capacity,
      .window = window,
      .keys = static_cast<float*>(keys.mutable_data_ptr()),
      .values = static_cast<float*>(values.mutable_data_ptr()),
      .out = nullptr,
      .rotations = nullptr,
  };
}

#endif

}  // namespace voxkern
