// The operators of schema.cpp on one backend: checks, allocation of results, and one call of a kernel each.
//
// Included by cpu.cpp and cuda.cpp after they have said what MX_KERNEL, MX_DISPATCH_KEY and Place are.
#pragma once
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "call.h"

namespace mx_bindings {

using OptionalTensor = std::optional<Tensor>;
using torch::stable::empty_like;
using torch::stable::new_empty;

// Partial column sums of `kinds` results.
struct Workspace {
  Workspace(const Tensor& tensor, int64_t kinds, Matrix shape)
      : partitions(MX_KERNEL(partitions)(shape.rows, shape.cols)),
        sums(floats_like(tensor, kinds * partitions * shape.cols)) {}
  float* data() { return floats_of(sums); }
  int64_t partitions;
  Tensor sums;
};

inline std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(Tensor x, Tensor weight, Tensor bias, double eps) {
  const Call call("layer_norm_forward", "x", x);
  const Matrix shape(x);
  const void* weights = call.parameter(weight, "weight", shape.cols);
  const void* biases = call.values(bias, "bias", shape.cols, weight.scalar_type());
  Tensor y = empty_like(x), mean = floats_like(x, shape.rows), rstd = floats_like(x, shape.rows);
  call.finish(MX_KERNEL(layer_norm_forward)(call.dtype(), call.code(weight, "weight"), x.const_data_ptr(), weights, biases,
                                            result(y), floats_of(mean), floats_of(rstd), shape.rows, shape.cols,
                                            static_cast<float>(eps), call.resource()));
  return {y, mean, rstd};
}

inline std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd) {
  const Call call("layer_norm_backward", "dy", dy);
  const Matrix shape(dy);
  const void* inputs = call.same(x, "x", dy);
  const void* weights = call.parameter(weight, "weight", shape.cols);
  const float* means = call.floats(mean, "mean", shape.rows);
  const float* rstds = call.floats(rstd, "rstd", shape.rows);
  Tensor dx = empty_like(dy), dweight = empty_like(weight), dbias = empty_like(weight);
  Workspace work(dy, 2, shape);
  call.finish(MX_KERNEL(layer_norm_backward)(call.dtype(), call.code(weight, "weight"), dy.const_data_ptr(),
                                             inputs, weights, means, rstds, result(dx), result(dweight), result(dbias),
                                             work.data(), work.partitions, shape.rows, shape.cols, call.resource()));
  return {dx, dweight, dbias};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(Tensor x, OptionalTensor x_bias, Tensor residual,
                                                                         Tensor weight, Tensor bias, double dropout,
                                                                         OptionalTensor seed, double eps) {
  const Call call("add_layer_norm_forward", "x", x);
  const Matrix shape(x);
  const void* residuals = call.same(residual, "residual", x);
  const void* weights = call.parameter(weight, "weight", shape.cols);
  const void* biases = call.values(bias, "bias", shape.cols, weight.scalar_type());
  const void* x_biases = x_bias ? call.values(*x_bias, "x_bias", shape.cols, weight.scalar_type()) : nullptr;
  const int64_t* seeds = call.seed(seed, dropout);
  Tensor sum = empty_like(x), y = empty_like(x), mean = floats_like(x, shape.rows), rstd = floats_like(x, shape.rows);
  call.finish(MX_KERNEL(add_layer_norm_forward)(
      call.dtype(), call.code(weight, "weight"), x.const_data_ptr(), x_biases, residuals, weights, biases, result(sum),
      result(y), floats_of(mean), floats_of(rstd), static_cast<float>(dropout), seeds, shape.rows, shape.cols,
      static_cast<float>(eps), call.resource()));
  return {sum, y, mean, rstd};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(Tensor dy, OptionalTensor dsum, Tensor sum,
                                                                                  Tensor weight, Tensor mean, Tensor rstd,
                                                                                  bool has_x_bias, double dropout,
                                                                                  OptionalTensor seed) {
  const Call call("add_layer_norm_backward", "dy", dy);
  const Matrix shape(dy);
  const void* sums = call.same(sum, "sum", dy);
  const void* dsums = dsum ? call.same(*dsum, "dsum", dy) : nullptr;
  const void* weights = call.parameter(weight, "weight", shape.cols);
  const float* means = call.floats(mean, "mean", shape.rows);
  const float* rstds = call.floats(rstd, "rstd", shape.rows);
  const int64_t* seeds = call.seed(seed, dropout);
  Tensor dresidual = empty_like(dy), dx = dropout > 0 ? empty_like(dy) : nothing_like(dy);
  Tensor dweight = empty_like(weight), dbias = empty_like(weight);
  Tensor dx_bias = has_x_bias ? empty_like(weight) : nothing_like(weight);
  Workspace work(dy, 3, shape);
  call.finish(MX_KERNEL(add_layer_norm_backward)(
      call.dtype(), call.code(weight, "weight"), dy.const_data_ptr(), dsums, sums, weights, means, rstds, result(dresidual),
      result(dx), result(dweight), result(dbias), result(dx_bias), work.data(), work.partitions,
      static_cast<float>(dropout), seeds, shape.rows, shape.cols, call.resource()));
  return {dresidual, dx, dweight, dbias, dx_bias};
}

inline std::tuple<Tensor, Tensor> causal_softmax_forward(Tensor scores, double scale, double dropout, OptionalTensor seed) {
  const Call call("causal_softmax_forward", "scores", scores);
  call.check(scores.dim() >= 2, "scores has ", scores.dim(), " dimensions, must have at least 2");
  const int64_t sq = scores.size(-2), sk = scores.size(-1);
  call.check(sq <= sk, "scores has ", sq, " queries and ", sk, " keys; there must be a key for every query");
  const int64_t* seeds = call.seed(seed, dropout);
  Tensor probs = empty_like(scores), dropped = dropout > 0 ? empty_like(scores) : nothing_like(scores);
  call.finish(MX_KERNEL(causal_softmax_forward)(call.dtype(), scores.const_data_ptr(), result(probs), result(dropped),
                                                static_cast<float>(scale), static_cast<float>(dropout), seeds,
                                                scores.numel() / (sq * sk), sq, sk, call.resource()));
  return {probs, dropped};
}

inline Tensor causal_softmax_backward(Tensor dy, Tensor probs, double scale, double dropout, OptionalTensor seed) {
  const Call call("causal_softmax_backward", "dy", dy);
  call.check(dy.dim() >= 2, "dy has ", dy.dim(), " dimensions, must have at least 2");
  const int64_t sq = dy.size(-2), sk = dy.size(-1);
  const void* probabilities = call.same(probs, "probs", dy);
  const int64_t* seeds = call.seed(seed, dropout);
  Tensor dscores = empty_like(dy);
  call.finish(MX_KERNEL(causal_softmax_backward)(call.dtype(), dy.const_data_ptr(), probabilities, result(dscores),
                                                 static_cast<float>(scale), static_cast<float>(dropout), seeds,
                                                 dy.numel() / (sq * sk), sq, sk, call.resource()));
  return dscores;
}

inline Tensor bias_gelu_forward(Tensor x, OptionalTensor bias, bool exact) {
  const Call call("bias_gelu_forward", "x", x);
  const Matrix shape(x);
  const void* biases = call.parameter(bias, "bias", shape.cols);
  Tensor y = empty_like(x);
  call.finish(MX_KERNEL(bias_gelu_forward)(call.dtype(), bias ? call.code(*bias, "bias") : call.dtype(), x.const_data_ptr(),
                                           biases, result(y), exact, shape.rows, shape.cols, call.resource()));
  return y;
}

inline std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor dy, Tensor x, OptionalTensor bias, bool exact) {
  const Call call("bias_gelu_backward", "dy", dy);
  const Matrix shape(dy);
  const void* inputs = call.same(x, "x", dy);
  const void* biases = call.parameter(bias, "bias", shape.cols);
  Tensor dx = empty_like(dy), dbias = bias ? empty_like(*bias) : nothing_like(dy);
  Workspace work(dy, 1, shape);
  call.finish(MX_KERNEL(bias_gelu_backward)(call.dtype(), bias ? call.code(*bias, "bias") : call.dtype(),
                                            dy.const_data_ptr(), inputs, biases, result(dx), result(dbias), work.data(),
                                            work.partitions, exact, shape.rows, shape.cols, call.resource()));
  return {dx, dbias};
}

inline Tensor bias_dropout_add_forward(Tensor x, OptionalTensor bias, Tensor residual, double dropout,
                                       OptionalTensor seed) {
  const Call call("bias_dropout_add_forward", "x", x);
  const Matrix shape(x);
  const void* residuals = call.same(residual, "residual", x);
  const void* biases = call.parameter(bias, "bias", shape.cols);
  const int64_t* seeds = call.seed(seed, dropout);
  Tensor y = empty_like(x);
  call.finish(MX_KERNEL(bias_dropout_add_forward)(call.dtype(), bias ? call.code(*bias, "bias") : call.dtype(),
                                                  x.const_data_ptr(), biases, residuals, result(y),
                                                  static_cast<float>(dropout), seeds, shape.rows, shape.cols,
                                                  call.resource()));
  return y;
}

inline std::tuple<Tensor, Tensor> bias_dropout_add_backward(Tensor dy, OptionalTensor bias, double dropout,
                                                            OptionalTensor seed) {
  const Call call("bias_dropout_add_backward", "dy", dy);
  const Matrix shape(dy);
  call.parameter(bias, "bias", shape.cols);
  const int64_t* seeds = call.seed(seed, dropout);
  Tensor dx = dropout > 0 ? empty_like(dy) : nothing_like(dy), dbias = bias ? empty_like(*bias) : nothing_like(dy);
  if (dropout == 0 && !bias) return {dx, dbias};
  Workspace work(dy, 1, shape);
  call.finish(MX_KERNEL(bias_dropout_add_backward)(call.dtype(), bias ? call.code(*bias, "bias") : call.dtype(),
                                                   dy.const_data_ptr(), result(dx), result(dbias), work.data(),
                                                   work.partitions, static_cast<float>(dropout), seeds, shape.rows,
                                                   shape.cols, call.resource()));
  return {dx, dbias};
}

inline std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(Tensor logits, Tensor labels, int64_t first, int64_t real) {
  const Call call("cross_entropy_forward", "logits", logits);
  const Matrix shape(logits);
  const void* ids = call.values(labels, "labels", shape.rows, ScalarType::Long);
  call.check(0 <= real && real <= shape.cols, "real is ", real, ", must be from 0 to ", shape.cols);
  Tensor maximum = floats_like(logits, shape.rows), total = empty_like(maximum), target = empty_like(maximum);
  call.finish(MX_KERNEL(cross_entropy_forward)(call.dtype(), logits.const_data_ptr(), static_cast<const int64_t*>(ids),
                                               floats_of(maximum), floats_of(total), floats_of(target), first, real,
                                               shape.rows, shape.cols, call.resource()));
  return {maximum, total, target};
}

inline void cross_entropy_backward_(Tensor logits, Tensor labels, Tensor maximum, Tensor total, Tensor grad, int64_t first,
                                    int64_t real) {
  const Call call("cross_entropy_backward_", "logits", logits);
  const Matrix shape(logits);
  const void* ids = call.values(labels, "labels", shape.rows, ScalarType::Long);
  call.check(0 <= real && real <= shape.cols, "real is ", real, ", must be from 0 to ", shape.cols);
  const float* maxima = call.floats(maximum, "maximum", shape.rows);
  const float* totals = call.floats(total, "total", shape.rows);
  const float* grads = call.floats(grad, "grad", shape.rows);
  call.finish(MX_KERNEL(cross_entropy_backward)(call.dtype(), result(logits), static_cast<const int64_t*>(ids), maxima,
                                                totals, grads, first, real, shape.rows, shape.cols, call.resource()));
}

inline Tensor adam_variance(Tensor v) {
  const Call call("adam_variance", "v", v);
  const int64_t partitions = MX_KERNEL(partitions)(v.numel(), 1);
  Tensor sums = new_empty(v, {2}, ScalarType::Double), work = new_empty(v, {2 * partitions}, ScalarType::Double);
  call.finish(MX_KERNEL(adam_variance)(call.dtype(), v.const_data_ptr(), static_cast<double*>(result(sums)),
                                       static_cast<double*>(result(work)), partitions, v.numel(), call.resource()));
  return sums;
}

}  // namespace mx_bindings

STABLE_TORCH_LIBRARY_IMPL(megatron_ext, MX_DISPATCH_KEY, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&mx_bindings::layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&mx_bindings::layer_norm_backward));
  m.impl("add_layer_norm_forward", TORCH_BOX(&mx_bindings::add_layer_norm_forward));
  m.impl("add_layer_norm_backward", TORCH_BOX(&mx_bindings::add_layer_norm_backward));
  m.impl("causal_softmax_forward", TORCH_BOX(&mx_bindings::causal_softmax_forward));
  m.impl("causal_softmax_backward", TORCH_BOX(&mx_bindings::causal_softmax_backward));
  m.impl("bias_gelu_forward", TORCH_BOX(&mx_bindings::bias_gelu_forward));
  m.impl("bias_gelu_backward", TORCH_BOX(&mx_bindings::bias_gelu_backward));
  m.impl("bias_dropout_add_forward", TORCH_BOX(&mx_bindings::bias_dropout_add_forward));
  m.impl("bias_dropout_add_backward", TORCH_BOX(&mx_bindings::bias_dropout_add_backward));
  m.impl("cross_entropy_forward", TORCH_BOX(&mx_bindings::cross_entropy_forward));
  m.impl("cross_entropy_backward_", TORCH_BOX(&mx_bindings::cross_entropy_backward_));
  m.impl("adam_variance", TORCH_BOX(&mx_bindings::adam_variance));
}
