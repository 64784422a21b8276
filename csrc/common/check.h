// The dtypes of the kernels, and argument checks whose errors name the tensor, the expectation and
// the actual value. The checks are for the host only (voxkern/triton/checks.py repeats their
// messages): device code and the per-instruction-set CPU builds must not see torch.
#pragma once

#include <cstdint>

#ifndef VOX_ISA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>
#endif

#ifdef __CUDACC__
#define VOX_HOST_DEVICE __host__ __device__
#else
#define VOX_HOST_DEVICE
#endif

namespace voxkern {

enum class Dtype : int32_t { f32, bf16 };

#ifndef VOX_ISA

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws a RuntimeError in Python. The message is the parts concatenated; it names the argument.
template <typename... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_string(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    default: return "another dtype";
  }
}

// Matches any size in check_shape.
constexpr int64_t kAny = -1;

inline void check_dim(const Tensor& t, const char* name, int64_t dim) {
  check(t.dim() == dim, name, ": expected ", dim, " dimensions, got shape ", shape_string(t));
}

// `letters` spells the expected shape symbolically, for the error message.
inline void check_sizes(const Tensor& t, const char* name, const char* letters,
                        const int64_t* sizes, int64_t dim) {
  bool matches = t.dim() == dim;
  std::string expected = "[";
  for (int64_t i = 0; i < dim; ++i) {
    const int64_t size = sizes[i];
    matches = matches && (size == kAny || t.size(i) == size);
    expected += (i ? ", " : "") + (size == kAny ? std::string("any") : std::to_string(size));
  }
  check(matches, name, ": expected shape ", letters, " = ", expected, "], got ", shape_string(t));
}

// check_shape(w, "weight", "[C]", {C})
inline void check_shape(const Tensor& t, const char* name, const char* letters,
                        std::initializer_list<int64_t> sizes) {
  check_sizes(t, name, letters, sizes.begin(), static_cast<int64_t>(sizes.size()));
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType type) {
  check(t.scalar_type() == type, name, ": expected ", dtype_name(type), ", got ",
        dtype_name(t.scalar_type()));
}

inline void check_contiguous(const Tensor& t, const char* name) {
  check(t.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check_device(const Tensor& t, const char* name, const Tensor& like) {
  check(t.defined(), name, ": expected a tensor, got None");
  check(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), name,
        ": on another device than the op's first tensor");
}

// The kernels' Dtype of a float32 or bfloat16 tensor.
inline Dtype float_dtype(const Tensor& t, const char* name) {
  const auto type = t.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16, name,
        ": expected float32 or bfloat16, got ", dtype_name(type));
  return type == ScalarType::Float ? Dtype::f32 : Dtype::bf16;
}

// Checks that t is contiguous, on the device of `like` and of dtype `type`, as most operands must
// be.
inline void check_operand(const Tensor& t, const char* name, const Tensor& like, ScalarType type) {
  check_device(t, name, like);
  check_dtype(t, name, type);
  check_contiguous(t, name);
}

#endif

}  // namespace voxkern
