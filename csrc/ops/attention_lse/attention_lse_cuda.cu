// SPDX-License-Identifier: Apache-2.0
#include "cuda/attention_kernels.h"
#include "ops/attention_lse/attention_lse.h"

namespace kvevict {
namespace {

constexpr int kThreads = 256;

VotingRows all_rows(const AttentionParams& attention) {
  return {nullptr, nullptr, false, nullptr, attention.qo_len};
}

// One thread per row.
__global__ void merge_normalizers_kernel(const AttentionLseParams params,
                                         const RowNormalizers normalizers, int64_t num_rows) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= num_rows) return;
  params.lse[i] = normalizers.merged(i).lse();
}

}  // namespace

int64_t AttentionLse::cuda_workspace_bytes(const AttentionLseParams& params) {
  return RowSplits::num_parts(params.attention, params.attention.qo_len) *
         int64_t{sizeof(Normalizer)};
}

int AttentionLse::launch_cuda(const AttentionLseParams& params, void* workspace,
                              void* stream) noexcept {
  const AttentionParams& attention = params.attention;
  const int64_t num_rows = attention.batch_size * attention.num_qo_heads * attention.qo_len;
  if (num_rows == 0) return cudaSuccess;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  auto* parts = static_cast<Normalizer*>(workspace);
  const cudaError_t error =
      launch_normalizers(attention, all_rows(attention), parts, /*tickets=*/{}, cuda_stream);
  if (error != cudaSuccess) return error;
  const RowNormalizers normalizers{parts, RowSplits::count(attention, attention.qo_len)};
  const LaunchShape shape{dim3(static_cast<unsigned>((num_rows + kThreads - 1) / kThreads)),
                          dim3(kThreads)};
  return launch(merge_normalizers_kernel, shape, cuda_stream, params, normalizers, num_rows);
}

}  // namespace kvevict
