// The operators' schemas, once for all backends: part of the CPU library, which is loaded first.
//
// The operators are functional (but for cross_entropy_backward_) and know no autograd: derivatives, and shapes of results
// without data, are told to torch in Python (megatron_ext/ops/). A result that abi.h lets be null is a tensor without
// elements: what the caller then reads instead is said there.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(megatron_ext, m) {
  m.def("layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor dx, Tensor dweight, "
      "Tensor dbias)");
  m.def(
      "add_layer_norm_forward(Tensor x, Tensor? x_bias, Tensor residual, Tensor weight, Tensor bias, float dropout, "
      "Tensor? seed, float eps) -> (Tensor sum, Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "add_layer_norm_backward(Tensor dy, Tensor? dsum, Tensor sum, Tensor weight, Tensor mean, Tensor rstd, "
      "bool has_x_bias, float dropout, Tensor? seed) -> (Tensor dresidual, Tensor dx, Tensor dweight, Tensor dbias, "
      "Tensor dx_bias)");
  m.def(
      "causal_softmax_forward(Tensor scores, float scale, float dropout, Tensor? seed) -> (Tensor probs, Tensor dropped)");
  m.def("causal_softmax_backward(Tensor dy, Tensor probs, float scale, float dropout, Tensor? seed) -> Tensor");
  m.def("bias_gelu_forward(Tensor x, Tensor? bias, bool exact) -> Tensor");
  m.def("bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias, bool exact) -> (Tensor dx, Tensor dbias)");
  m.def("bias_dropout_add_forward(Tensor x, Tensor? bias, Tensor residual, float dropout, Tensor? seed) -> Tensor");
  m.def(
      "bias_dropout_add_backward(Tensor dy, Tensor? bias, float dropout, Tensor? seed) -> (Tensor dx, Tensor dbias)");
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor labels, int first, int real) -> (Tensor maximum, Tensor total, "
      "Tensor target)");
  m.def(
      "cross_entropy_backward_(Tensor(a!) logits, Tensor labels, Tensor maximum, Tensor total, Tensor grad, int first, "
      "int real) -> ()");
  m.def("adam_variance(Tensor v) -> Tensor");
}
