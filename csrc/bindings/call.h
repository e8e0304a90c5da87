// One call of an operator: what its tensors must be, with messages that name operator, argument and remedy.
//
// A backend says before it includes this what differs: MX_DEVICE ("cpu", "cuda"), and `struct Place`, made for the device
// of the first tensor, whose resource() is the last argument of every kernel and whose failure(status) explains one.
#pragma once
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/abi.h"

namespace mx_bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another type";
  }
}

class Call {
 public:
  // `first` is the tensor whose device and dtype the others are compared with.
  Call(const char* op, const char* name, const Tensor& first)
      : op_(op), first_name_(name), device_(first.device()), place_(checked(first, name)), dtype_(code(first, name)) {
    data(first, name);
  }

  template <class... Parts>
  void check(bool holds, const Parts&... parts) const {
    if (holds) return;
    std::ostringstream message;
    message << "megatron_ext::" << op_ << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  // A contiguous tensor with elements on the call's device.
  const void* data(const Tensor& tensor, const char* name) const {
    check(tensor.device() == device_, name, " is not on the device of ", first_name_, "; move it there");
    check(tensor.is_contiguous(), name, " is not contiguous; pass ", name, ".contiguous()");
    check(tensor.numel() > 0, name, " has no elements");
    return tensor.const_data_ptr();
  }

  const void* typed(const Tensor& tensor, const char* name, ScalarType type) const {
    check(tensor.scalar_type() == type, name, " is ", name_of(tensor.scalar_type()), ", must be ", name_of(type));
    return data(tensor, name);
  }

  // A tensor of the same shape and dtype as `like`.
  const void* same(const Tensor& tensor, const char* name, const Tensor& like) const {
    check(tensor.dim() == like.dim(), name, " has ", tensor.dim(), " dimensions, must have ", like.dim());
    for (int64_t i = 0; i < like.dim(); ++i)
      check(tensor.size(i) == like.size(i), name, " has size ", tensor.size(i), " in dimension ", i, ", must have ",
            like.size(i));
    return typed(tensor, name, like.scalar_type());
  }

  // `count` values of one type.
  const void* values(const Tensor& tensor, const char* name, int64_t count, ScalarType type) const {
    check(tensor.numel() == count, name, " has ", tensor.numel(), " elements, must have ", count);
    return typed(tensor, name, type);
  }

  const float* floats(const Tensor& tensor, const char* name, int64_t count) const {
    return static_cast<const float*>(values(tensor, name, count, ScalarType::Float));
  }

  // A parameter [cols] of the call's dtype or float32.
  const void* parameter(const Tensor& tensor, const char* name, int64_t cols) const {
    const int own = code(tensor, name);
    check(own == dtype_ || own == MX_FLOAT32, name, " is ", name_of(tensor.scalar_type()), ", must be float32 or as ",
          first_name_);
    return values(tensor, name, cols, tensor.scalar_type());
  }

  const void* parameter(const std::optional<Tensor>& tensor, const char* name, int64_t cols) const {
    return tensor ? parameter(*tensor, name, cols) : nullptr;
  }

  // The seed of the dropout mask; null without dropout.
  const int64_t* seed(const std::optional<Tensor>& tensor, double dropout) const {
    check(dropout >= 0 && dropout < 1, "dropout is ", dropout, ", must be 0 or more and below 1");
    if (dropout == 0) return nullptr;
    check(tensor.has_value(), "dropout is ", dropout, " and there is no seed");
    return static_cast<const int64_t*>(values(*tensor, "seed", 1, ScalarType::Long));
  }

  void finish(int status) const {
    if (status == MX_OK) return;
    check(status != MX_UNSUPPORTED, "these shapes are not supported; use the reference");
    check(status != MX_BAD_ARGUMENT, "the kernel refused its arguments");
    check(false, Place::failure(status));
  }

  int dtype() const { return dtype_; }
  int code(const Tensor& tensor, const char* name) const {
    switch (tensor.scalar_type()) {
      case ScalarType::Float: return MX_FLOAT32;
      case ScalarType::Half: return MX_FLOAT16;
      case ScalarType::BFloat16: return MX_BFLOAT16;
      default: break;
    }
    check(false, name, " is ", name_of(tensor.scalar_type()), ", must be float32, float16 or bfloat16");
    return -1;
  }
  auto resource() const { return place_.resource(); }

 private:
  const Tensor& checked(const Tensor& first, const char* name) const {
    check(Place::holds(first), name, " is not on a device of type " MX_DEVICE);
    return first;
  }

  const char* op_;
  const char* first_name_;
  torch::stable::Device device_;
  Place place_;
  int dtype_;
};

// Rows and columns of a tensor whose last dimension is a row.
struct Matrix {
  explicit Matrix(const Tensor& tensor) : cols(tensor.dim() ? tensor.size(-1) : 1), rows(cols ? tensor.numel() / cols : 0) {}
  int64_t cols;
  int64_t rows;
};

inline Tensor floats_like(const Tensor& tensor, int64_t count) {
  return torch::stable::new_empty(tensor, {count}, ScalarType::Float);
}
inline Tensor nothing_like(const Tensor& tensor) { return torch::stable::new_empty(tensor, {0}); }
inline float* floats_of(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }
// The pointer of a result, null where it has no elements.
inline void* result(Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

}  // namespace mx_bindings
