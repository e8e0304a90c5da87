// The kernels' C interface: what every backend (CUDA, the CPU) exports, without torch.
//
// Each function exists twice with the same arguments: mx_cuda_NAME launches on a stream, mx_cpu_NAME runs on an executor.
// They return 0, MX_UNSUPPORTED or MX_BAD_ARGUMENT before anything was done, or (CUDA) a positive cudaError_t.
//
// Matrices are contiguous, row by row. `dtype` is that of activations, `weight_dtype` that of parameters and their
// gradients: the same, or float32. Sums, statistics and partial results are float32 whatever the dtype, and are added in
// an order that depends on the shape alone, so results do not change from run to run or with the number of threads.
//
// Dropout: element i (its index in the output tensor) is kept where word i % 4 of Philox4x32-10 with
// key = (low, high) of *seed and counter = (low, high of i / 4, 0, 0) is at least floor(dropout * 2^32); kept values are
// multiplied by 1 / (1 - dropout). `seed` is read by the kernel, from the device's memory; null where dropout is 0.
//
// `workspace` holds the column sums of `partitions` groups of rows; mx_partitions(rows, cols) is how many to take.
#pragma once
#include <stdint.h>

enum mx_dtype { MX_FLOAT32 = 0, MX_FLOAT16 = 1, MX_BFLOAT16 = 2 };
enum mx_status { MX_OK = 0, MX_UNSUPPORTED = -1, MX_BAD_ARGUMENT = -2 };

// Runs body(begin, end, context) over [begin, end) in pieces of at least `grain`; a serial loop is one.
typedef void (*mx_parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                void* context);

#define MX_DECLARE(NAME, ...)                                       \
  int mx_cuda_##NAME(__VA_ARGS__, void* stream);                    \
  int mx_cpu_##NAME(__VA_ARGS__, mx_parallel_for executor)

#ifdef __cplusplus
extern "C" {
#endif

int64_t mx_cuda_partitions(int64_t rows, int64_t cols);
int64_t mx_cpu_partitions(int64_t rows, int64_t cols);

// y = (x - mean) * rstd * weight + bias over the last dimension. mean and rstd: [rows].
MX_DECLARE(layer_norm_forward, int dtype, int weight_dtype, const void* x, const void* weight, const void* bias, void* y,
           float* mean, float* rstd, int64_t rows, int64_t cols, float eps);

// dweight and dbias: [cols]; workspace [2][partitions][cols].
MX_DECLARE(layer_norm_backward, int dtype, int weight_dtype, const void* dy, const void* x, const void* weight,
           const float* mean, const float* rstd, void* dx, void* dweight, void* dbias, float* workspace,
           int64_t partitions, int64_t rows, int64_t cols);

// sum = residual + dropout(x + x_bias), y = layer_norm(sum). x_bias [cols] may be null.
MX_DECLARE(add_layer_norm_forward, int dtype, int weight_dtype, const void* x, const void* x_bias, const void* residual,
           const void* weight, const void* bias, void* sum, void* y, float* mean, float* rstd, float dropout,
           const int64_t* seed, int64_t rows, int64_t cols, float eps);

// dresidual = dsum + d layer_norm; dx = dropout'(dresidual); dx_bias = column sums of dx. dsum may be null (nothing else
// reads sum); dx is null where dropout is 0 (it equals dresidual); dx_bias may be null. workspace [3][partitions][cols].
MX_DECLARE(add_layer_norm_backward, int dtype, int weight_dtype, const void* dy, const void* dsum, const void* sum,
           const void* weight, const float* mean, const float* rstd, void* dresidual, void* dx, void* dweight,
           void* dbias, void* dx_bias, float* workspace, int64_t partitions, float dropout, const int64_t* seed,
           int64_t rows, int64_t cols);

// probs = softmax(scale * scores) over columns 0 .. i + sk - sq of row i, 0 beyond, of scores [batch, sq, sk], sq <= sk;
// what lies beyond the diagonal is not read. dropped = dropout(probs), null where dropout is 0.
MX_DECLARE(causal_softmax_forward, int dtype, const void* scores, void* probs, void* dropped, float scale, float dropout,
           const int64_t* seed, int64_t batch, int64_t sq, int64_t sk);

// dy is the gradient of dropped (of probs without dropout); dscores may be dy itself.
MX_DECLARE(causal_softmax_backward, int dtype, const void* dy, const void* probs, void* dscores, float scale,
           float dropout, const int64_t* seed, int64_t batch, int64_t sq, int64_t sk);

// y = gelu(x + bias), in the tanh form or (exact) with erf. bias [cols] may be null.
MX_DECLARE(bias_gelu_forward, int dtype, int weight_dtype, const void* x, const void* bias, void* y, int exact,
           int64_t rows, int64_t cols);

// dbias = column sums of dx; may be null. workspace [partitions][cols]. dx may be dy itself.
MX_DECLARE(bias_gelu_backward, int dtype, int weight_dtype, const void* dy, const void* x, const void* bias, void* dx,
           void* dbias, float* workspace, int64_t partitions, int exact, int64_t rows, int64_t cols);

// y = residual + dropout(x + bias). bias [cols] may be null.
MX_DECLARE(bias_dropout_add_forward, int dtype, int weight_dtype, const void* x, const void* bias, const void* residual,
           void* y, float dropout, const int64_t* seed, int64_t rows, int64_t cols);

// dx = dropout'(dy), null where dropout is 0 (it equals dy, as does the gradient of residual); dbias = column sums of
// dx, may be null. workspace [partitions][cols].
MX_DECLARE(bias_dropout_add_backward, int dtype, int weight_dtype, const void* dy, void* dx, void* dbias,
           float* workspace, int64_t partitions, float dropout, const int64_t* seed, int64_t rows, int64_t cols);

// One tensor rank's slice of the vocabulary: logits [rows, cols] of which the first `real` columns are ids first ..
// first + real - 1 and the rest padding. maximum = max logit, total = sum exp(logit - maximum), target = the label's
// logit (0 where another rank holds it); -inf, 0, 0 where real is 0. Logits are only read. labels, results: [rows].
MX_DECLARE(cross_entropy_forward, int dtype, const void* logits, const int64_t* labels, float* maximum, float* total,
           float* target, int64_t first, int64_t real, int64_t rows, int64_t cols);

// logits become their gradient: grad * (exp(logit - maximum) / total - [id == label]), 0 in the padding, with maximum and
// total of the whole vocabulary.
MX_DECLARE(cross_entropy_backward, int dtype, void* logits, const int64_t* labels, const float* maximum,
           const float* total, const float* grad, int64_t first, int64_t real, int64_t rows, int64_t cols);

// result[0] = sum of sqrt(v), result[1] = max of sqrt(v) over v [count], both float64; workspace [2][partitions] float64.
MX_DECLARE(adam_variance, int dtype, const void* v, double* result, double* workspace, int64_t partitions,
           int64_t count);

#ifdef __cplusplus
}
#endif
