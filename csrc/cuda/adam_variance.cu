// C interface of the statistics of Adam's second moment; kernels in adam_variance.cuh.
#include "adam_variance.cuh"

extern "C" int mx_cuda_adam_variance(int dtype, const void* v, double* result, double* workspace, int64_t partitions,
                                     int64_t count, void* stream) {
  if (count < 0 || !mx::partitions_ok(partitions) || !workspace) return MX_BAD_ARGUMENT;
  return mx::by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(v) % 16 / sizeof(T));
    int64_t head = offset == 0 ? 0 : mx::kVector<T> - offset;
    if (head > count) head = count;
    const int64_t vectors = (count - head) / mx::kVector<T>;
    MX_LAUNCH((mx::adam_variance_kernel<T>), dim3(static_cast<unsigned>(partitions)), dim3(mx::kRootsBlock), 0,
              mx::stream_of(stream), static_cast<const T*>(v), workspace, head, vectors, count);
    const int status = MX_LAST_ERROR();
    if (status != 0) return status;
    MX_LAUNCH(mx::adam_variance_total_kernel, dim3(1), dim3(mx::kRootsBlock), 0, mx::stream_of(stream), workspace,
              result, partitions);
    return MX_LAST_ERROR();
  });
}
