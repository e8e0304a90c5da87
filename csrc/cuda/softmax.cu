// C interface of the causal and the masked softmax; mathematics and kernels in softmax.cuh.
#include "softmax.cuh"

namespace {

// Checks what all four functions share. MX_OK, or the status to return.
int check(int64_t rows, int64_t sk, const void* dropped, float dropout, const int64_t* seed) {
  if (rows < 0 || sk < 1 || !mx::dropout_ok(dropout, seed)) return MX_BAD_ARGUMENT;
  if (mx::dropout_of(dropout).threshold != 0 && !dropped && rows > 0) return MX_BAD_ARGUMENT;
  return sk > mx::kMaxRegisterColumns ? MX_UNSUPPORTED : MX_OK;
}

template <bool MASKED>
int forward(int dtype, const void* scores, const mx::MaskRows& mask, void* probs, void* dropped, float scale,
            float dropout, const int64_t* seed, const mx::AttentionRows& shape, void* stream) {
  const mx::Dropout drop = mx::dropout_of(dropout);
  const cudaStream_t on = mx::stream_of(stream);
  return mx::by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if (shape.sk % mx::kVector<T> == 0 && mx::aligned(scores, mask.mask, probs, dropped))
      return mx::launch_softmax_forward<T, mx::kVector<T>, MASKED>(scores, mask, probs, dropped, scale, drop, seed, shape,
                                                                   on);
    return mx::launch_softmax_forward<T, 1, MASKED>(scores, mask, probs, dropped, scale, drop, seed, shape, on);
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
  return forward<false>(dtype, scores, {nullptr, 1, 1}, probs, dropped, scale, dropout, seed, shape, stream);
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

extern "C" int mx_cuda_masked_softmax_forward(int dtype, const void* scores, const uint8_t* mask, void* probs,
                                              void* dropped, float scale, float dropout, const int64_t* seed,
                                              int64_t batch, int64_t heads, int64_t sq, int64_t sk, int64_t mask_batch,
                                              void* stream) {
  if (batch < 0 || heads < 0 || sq < 0 || (mask_batch != 1 && mask_batch != batch)) return MX_BAD_ARGUMENT;
  const int64_t rows = batch * heads * sq;
  const int status = check(rows, sk, dropped, dropout, seed);
  if (status != MX_OK || rows == 0) return status;
  if (!mask) return MX_BAD_ARGUMENT;
  if (sq >= mx::kMaxGrid) return MX_UNSUPPORTED;
  const mx::AttentionRows shape{rows, static_cast<int>(sq), static_cast<int>(sk), 0};
  return forward<true>(dtype, scores, {mask, heads * sq, mask_batch == 1 ? 1 : 0}, probs, dropped, scale, dropout, seed,
                       shape, stream);
}

extern "C" int mx_cuda_masked_softmax_backward(int dtype, const void* dy, const void* probs, void* dscores, float scale,
                                               float dropout, const int64_t* seed, int64_t rows, int64_t cols,
                                               void* stream) {
  const int status = check(rows, cols, dscores, dropout, seed);
  if (status != MX_OK || rows == 0) return status;
  const mx::AttentionRows shape{rows, 1, static_cast<int>(cols), 0};
  return backward(dtype, dy, probs, dscores, scale, dropout, seed, shape, stream);
}
