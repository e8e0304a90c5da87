// Kernels that do one thing wrong, or the same thing right, for the tests of the machines that run kernels.
#include "../../../csrc/common/device.h"

namespace {

enum Case {
  kCorrect, kNoBarrier, kDivergentBarrier, kEarlyReturn, kAbsentLane, kUnwritten, kBehindTensor, kMisaligned, kBeforeTensor,
  kBlocksWriteOnePlace, kTooManyThreads, kSharedIndex, kReadThenWrite, kWarpBarrier, kNoWarpBarrier, kOwnMask, kTooMuchShared
};

}  // namespace

// to[t] = from[n - 1 - t] by way of shared memory, n = 64 threads, with a fault.
__global__ void faulty_kernel(const float* from, float* to, int which, int64_t rows) {
  MX_SHARED(float, turned, [64]);
  const int t = static_cast<int>(threadIdx.x);
  if (which == kEarlyReturn && t == 63) return;
  if (which == kUnwritten && t < 8) {
    to[t] = turned[t];
    return;
  }
  if (which == kMisaligned) {
    if (t >= 8) return;
    const mx::Pack<float, 4> pack = mx::read<float, 4>(from + 1 + 4 * t);
    to[t] = pack.word[0] + pack.word[1] + pack.word[2] + pack.word[3];
    return;
  }
  if (which == kSharedIndex) turned[t + 1] = from[t];
  if (which == kWarpBarrier || which == kNoWarpBarrier) {
    // Lanes of a warp turn their own half round.
    turned[t] = from[t];
    if (which == kWarpBarrier) __syncwarp();
    to[static_cast<int64_t>(blockIdx.x) * 64 + t] = turned[(t & 32) + 31 - (t & 31)];
    return;
  }
  turned[t] = from[t + (which == kBehindTensor ? 1 : 0) - (which == kBeforeTensor ? 1 : 0)];
  if (which != kNoBarrier && !(which == kDivergentBarrier && t < 32)) __syncthreads();
  float value = turned[63 - t];
  if (which == kReadThenWrite) turned[t] = 0.f;
  if (which == kAbsentLane && t % 2 == 0) value = __shfl_xor_sync(mx::kFullWarp, value, 2);
  if (which == kOwnMask && t % 2 == 0) value = __shfl_xor_sync(0x55555555u, value, 2);
  const int64_t row = which == kBlocksWriteOnePlace ? 0 : static_cast<int64_t>(blockIdx.x);
  if (row < rows) to[row * 64 + t] = value;
}

extern "C" int mx_cuda_faulty(const void* from, void* to, int which, int64_t rows, void* stream) {
  const int threads = which == kTooManyThreads ? 2048 : 64;
  const size_t shared = which == kTooMuchShared ? 49 << 10 : 0;
  MX_LAUNCH(faulty_kernel, dim3(static_cast<unsigned>(rows)), dim3(threads), shared, static_cast<cudaStream_t>(stream),
            static_cast<const float*>(from), static_cast<float*>(to), which, rows);
  return MX_LAST_ERROR();
}
