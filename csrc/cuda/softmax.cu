// C interface of the causal softmax; mathematics and kernels in softmax.cuh.
#include "softmax.cuh"

namespace {

// Checks what both functions share. MX_OK, or the status to return.
int check(int64_t rows, int64_t sk, const void* dropped, float dropout, const int64_t* seed) {
  if (rows < 0 || sk < 1 || !mx::dropout_ok(dropout, seed)) return MX_BAD_ARGUMENT;
  if (mx::dropout_of(dropout).threshold != 0 && !dropped && rows > 0) return MX_BAD_ARGUMENT;
  return sk > mx::kMaxRegisterColumns ? MX_UNSUPPORTED : MX_OK;
}

int forward(int dtype, const void* scores, void* probs, void* dropped, float scale, float dropout, const int64_t* seed,
            const mx::AttentionRows& shape, void* stream) {
  const mx::Dropout drop = mx::dropout_of(dropout);
  const cudaStream_t on = mx::stream_of(stream);
  return mx::by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if (shape.sk % mx::kVector<T> == 0 && mx::aligned(scores, probs, dropped))
      return mx::launch_softmax_forward<T, mx::kVector<T>>(scores, probs, dropped, scale, drop, seed, shape, on);
    return mx::launch_softmax_forward<T, 1>(scores, probs, dropped, scale, drop, seed, shape, on);
  });
}

int backward(int dtype, const void* dy, const void* probs, void* dscores, float scale, float dropout,
             const int64_t* seed, const mx::AttentionRows& shape, void* stream) {
  const mx::Dropout drop = mx::dropout_of(dropout);
  const cudaStream_t on = mx::stream_of(stream);
  return mx::by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if (shape.sk % mx::kVector<T> == 0 && mx::aligned(dy, probs, dscores))
      return mx::launch_softmax_backward<T, mx::kVector<T>>(dy, probs, dscores, scale, drop, seed, shape, on);
    return mx::launch_softmax_backward<T, 1>(dy, probs, dscores, scale, drop, seed, shape, on);
  });
}

}  // namespace

extern "C" int mx_cuda_causal_softmax_forward(int dtype, const void* scores, void* probs, void* dropped, float scale,
                                              float dropout, const int64_t* seed, int64_t batch, int64_t sq, int64_t sk,
                                              void* stream) {
  if (batch < 0 || sq < 0 || sq > sk) return MX_BAD_ARGUMENT;
  const int64_t rows = batch * sq;
  const int status = check(rows, sk, dropped, dropout, seed);
  if (status != MX_OK || rows == 0) return status;
  const mx::AttentionRows shape{rows, static_cast<int>(sq), static_cast<int>(sk), static_cast<int>(sk - sq) + 1};
  return forward(dtype, scores, probs, dropped, scale, dropout, seed, shape, stream);
}

extern "C" int mx_cuda_causal_softmax_backward(int dtype, const void* dy, const void* probs, void* dscores, float scale,
                                               float dropout, const int64_t* seed, int64_t batch, int64_t sq,
                                               int64_t sk, void* stream) {
  if (batch < 0 || sq < 0 || sq > sk) return MX_BAD_ARGUMENT;
  const int64_t rows = batch * sq;
  const int status = check(rows, sk, dscores, dropout, seed);
  if (status != MX_OK || rows == 0) return status;
  const mx::AttentionRows shape{rows, static_cast<int>(sq), static_cast<int>(sk), static_cast<int>(sk - sq) + 1};
  return backward(dtype, dy, probs, dscores, scale, dropout, seed, shape, stream);
}
