// SPDX-License-Identifier: Apache-2.0
#include "ops/merge_tokens/merge_tokens.h"

#include "core/cpu/move_rows.h"

namespace kvevict {
namespace {

// Counting sort of the pairs of a list; `next` has room for num_tokens + 1.
void sort_pairs(const MergeTokensParams& params, int64_t list, const MergeTables& tables,
                int32_t* next) {
  const int64_t num_sources = params.num_sources(), num_tokens = params.num_tokens;
  std::fill(next, next + num_tokens + 1, 0);
  for (int64_t place = 0; place < num_sources; ++place) ++next[params.pair(list, place).target];
  int32_t before = 0;
  for (int64_t token = 0; token < num_tokens; ++token) {
    const int32_t count = next[token];
    next[token] = before;
    before += count;
  }
  tables.num_pairs[list] = before;
  MergePair* pairs = tables.pairs + list * num_sources;
  for (int64_t place = 0; place < num_sources; ++place) {
    const MergePair pair = params.pair(list, place);
    if (pair.target < num_tokens) pairs[next[pair.target]++] = pair;
  }
}

// A target and its sources.
struct Run {
  const MergePair *begin, *end;
  const float* weights;  // [num_tokens]
  MergeScale scale;

  float weight(int32_t token) const { return scale.plain ? 1.0f : weights[token]; }
};

// Merges num_vecs vectors of columns, or the first `count` columns of one that is not whole.
template <DType dtype, int num_vecs>
void merge_columns(const Run& run, char* rows, int64_t row_bytes, int64_t column, int64_t count) {
  constexpr bool kWhole = num_vecs > 0;
  constexpr int kVecs = kWhole ? num_vecs : 1;
  const auto read = [&](int32_t token, int j) {
    const char* row = rows + token * row_bytes;
    return kWhole ? load_as_float<dtype>(row, column + j * kLanes)
                  : load_some_as_float<dtype>(row, column, count);
  };
  const int32_t target = run.begin->target;
  Vec sums[kVecs];
  for (int j = 0; j < kVecs; ++j) sums[j] = read(target, j) * run.weight(target);
  for (const MergePair* pair = run.begin; pair < run.end; ++pair) {
    const float weight = run.weight(pair->source);
    for (int j = 0; j < kVecs; ++j) sums[j] += read(pair->source, j) * weight;
  }
  for (int j = 0; j < kVecs; ++j) {
    const Vec merged = sums[j] / run.scale.divisor;
    if constexpr (kWhole) {
      store_rounded<dtype>(rows + target * row_bytes, column + j * kLanes, merged);
    } else {
      store_some_rounded<dtype>(rows + target * row_bytes, column, count, merged);
    }
  }
}

template <DType dtype>
void merge_run(const Run& run, char* rows, int64_t row_bytes, int64_t dim) {
  constexpr int kVecs = 8;
  int64_t column = 0;
  for (; column + kVecs * kLanes <= dim; column += kVecs * kLanes) {
    merge_columns<dtype, kVecs>(run, rows, row_bytes, column, kVecs * kLanes);
  }
  for (; column + kLanes <= dim; column += kLanes) {
    merge_columns<dtype, 1>(run, rows, row_bytes, column, kLanes);
  }
  if (column < dim) merge_columns<dtype, 0>(run, rows, row_bytes, column, dim - column);
}

// Merges the runs that begin among the pairs [begin, end) of a tensor and head.
template <DType dtype>
void merge_pairs(const MergeTokensParams& params, const MergedTensor& tensor, int64_t batch,
                 int64_t head, const MergePair* pairs, int64_t num_pairs, int64_t begin,
                 int64_t end) {
  constexpr int64_t kBytes = kElementBytes<dtype>;
  constexpr int64_t kLongRow = 1024;  // the hardware fetches the rest of it in time
  const int64_t stride_bytes = tensor.rows.stride_seq * kBytes, row_bytes = tensor.dim * kBytes;
  auto* rows = static_cast<char*>(tensor.rows.data) + tensor.rows.offset(batch, head, 0) * kBytes;
  const float* weights = params.weights(batch, head);
  while (begin > 0 && begin < end && pairs[begin].target == pairs[begin - 1].target) ++begin;
  while (begin < end) {
    const int32_t target = pairs[begin].target;
    float sum = weights[target];
    int64_t next = begin;
    for (; next < num_pairs && pairs[next].target == target; ++next) {
      sum += weights[pairs[next].source];
      if (next + kPrefetchRows < num_pairs) {
        const MergePair ahead = pairs[next + kPrefetchRows];
        prefetch_row(rows + ahead.source * stride_bytes, std::min(row_bytes, kLongRow));
        prefetch_row(rows + ahead.target * stride_bytes, std::min(row_bytes, kLongRow));
      }
    }
    const Run run{pairs + begin, pairs + next, weights,
                  MergeScale::of(params.normalize, sum, next - begin + 1)};
    merge_run<dtype>(run, rows, stride_bytes, tensor.dim);
    begin = next;
  }
}

}  // namespace

template <>
void MergeTokens::run_cpu<kThisIsa>(const MergeTokensParams& params, const CpuWork& work) noexcept {
  Arena arena(work.shared);
  const MergeTables tables = MergeTables::carve(arena, params);
  if (work.phase == 0) {
    for (int64_t list = work.begin; list < work.end; ++list) {
      sort_pairs(params, list, tables, reinterpret_cast<int32_t*>(work.scratch));
    }
    return;
  }
  const int64_t parts = parts_per_list(params, work.num_threads);
  for (int64_t item = work.begin; item < work.end; ++item) {
    const int64_t part = item % parts, stream = item / parts;
    const int64_t head = stream % params.num_heads;
    const int64_t batch = stream / params.num_heads % params.batch_size;
    const MergedTensor& tensor = params.tensors[stream / params.num_heads / params.batch_size];
    const int64_t list = params.list_of(batch, head), num_pairs = tables.num_pairs[list];
    dispatch_dtype(tensor.dtype, [&](auto dtype) {
      merge_pairs<dtype.value>(params, tensor, batch, head,
                               tables.pairs + list * params.num_sources(), num_pairs,
                               num_pairs * part / parts, num_pairs * (part + 1) / parts);
    });
  }
}

}  // namespace kvevict
