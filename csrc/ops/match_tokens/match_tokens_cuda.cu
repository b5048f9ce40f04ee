// SPDX-License-Identifier: Apache-2.0
// A block keeps a tile of sources and has targets stream by, on the tiles of mma_tiles.h; every row
// remembers its best one. Short rows stay in shared memory; long ones come in chunks, a chunk of
// sources with every chunk of targets. Where the sources are few, the targets are split among
// blocks and the best of the splits is taken at the end, which is exact.
#include "cuda/launch.h"
#include "cuda/mma_tiles.h"
#include "cuda/reductions.h"
#include "cuda/vector_loads.h"
#include "ops/match_tokens/match_tokens.h"

namespace kvevict {
namespace {

// --- Tuning --------------------------------------------------------------------------------------

constexpr int kMaxResidentDim = 128;
constexpr int kChunkDim = 64;
constexpr int kChunkStages = 3;
constexpr int64_t kBlocks = 264;  // two per multiprocessor of an H200
constexpr int64_t kMinTargetsPerSplit = 512;
constexpr int64_t kMaxSplits = 16;
constexpr int kThreads = 256;  // of the kernels around

// --- Sources and targets -------------------------------------------------------------------------

// The best target that a source has met. NaN never wins.
struct BestTarget {
  float rank = -__builtin_inff();
  int32_t place = -1;  // in the list of targets

  // Joins what has met other targets; the first of equals wins.
  __device__ __forceinline__ void join(const BestTarget& other) {
    if (other.rank > rank || (other.rank == rank && other.place < place)) *this = other;
  }
};

// Groups of tokens that are not there; they never meet.
constexpr int32_t kNoSource = -2, kNoTarget = -1;

struct MatchParams {
  MatchTokensParams op;
  float* source_norm;   // [batch_size, num_heads, source_index.len]; null if not needed
  float* inverse_norm;  // [batch_size, num_heads, target_index.len], of targets; null: 1
  BestTarget* parts;    // [batch_size, num_heads, source_index.len, num_splits]
  int64_t num_splits, targets_per_split;
  int64_t tiles_per_list;
  bool aligned;
};

// The sources or the targets of a head.
struct TokenList {
  const int32_t* index;
  const int32_t* group;  // or null
  int64_t len, num_tokens;

  static __device__ TokenList sources(const MatchTokensParams& op, int64_t list) {
    return of(op, op.source_index, op.source_group, list);
  }
  static __device__ TokenList targets(const MatchTokensParams& op, int64_t list) {
    return of(op, op.target_index, op.target_group, list);
  }

  // The token at a place, -1 if there is none.
  __device__ __forceinline__ int64_t position(int64_t place) const {
    const int64_t position = place < len ? index[place] : -1;
    return position < num_tokens ? position : -1;
  }
  __device__ __forceinline__ int32_t group_of(int64_t place, int32_t none) const {
    if (position(place) < 0) return none;
    if (!group) return 0;
    return group[place] < 0 ? none : group[place];
  }

 private:
  static __device__ TokenList of(const MatchTokensParams& op, const TokenLists& index,
                                 const TokenLists& group, int64_t list) {
    const int64_t batch = list / op.num_heads, head = list % op.num_heads;
    return {index.list(batch, head), group.list(batch, head), index.len, op.num_tokens};
  }
};

// Where the tokens of a head are.
template <int kElementBytes>
struct TokenRows {
  const char* data;
  int64_t stride_bytes;

  __device__ TokenRows(const MatchTokensParams& op, int64_t list)
      : data(static_cast<const char*>(op.tokens.data) +
             op.tokens.offset(list / op.num_heads, list % op.num_heads, 0) * kElementBytes),
        stride_bytes(op.tokens.stride_seq * kElementBytes) {}

  __device__ __forceinline__ const char* address(const TokenList& tokens, int64_t place) const {
    const int64_t position = tokens.position(place);
    return position < 0 ? nullptr : data + position * stride_bytes;
  }
};

// --- Norms ---------------------------------------------------------------------------------------

// A warp per place of a list, sources first. Places without a token get 0.
template <DType dtype>
__global__ void __launch_bounds__(kThreads) token_norm_kernel(const MatchParams params) {
  const MatchTokensParams& op = params.op;
  const int64_t num_sources = op.source_index.len, num_places = num_sources + op.target_index.len;
  const int64_t item = int64_t{blockIdx.x} * (kThreads / kWarpSize) + warp_index();
  if (item >= op.batch_size * op.num_heads * num_places) return;
  const int64_t list = item / num_places, place = item % num_places;
  const bool is_source = place < num_sources;
  const TokenList tokens = is_source ? TokenList::sources(op, list) : TokenList::targets(op, list);
  const int64_t own_place = is_source ? place : place - num_sources;
  const char* row = TokenRows<kElementBytes<dtype>>(op, list).address(tokens, own_place);

  float sum = 0.0f;
  const int row_bytes = static_cast<int>(op.dim) * kElementBytes<dtype>;
  for (int eight = lane_index(); row && eight * 8 < op.dim; eight += kWarpSize) {
    EightElements<dtype> vector;
    vector.read(row, eight, row_bytes, params.aligned);
    float elements[8];
    vector.to_floats(elements);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(elements[i], elements[i], sum);
  }
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, distance);
  }
  if (lane_index() != 0) return;
  if (is_source) {
    params.source_norm[list * tokens.len + own_place] = sqrtf(sum);
  } else {
    params.inverse_norm[list * tokens.len + own_place] = op.inverse_norm(sum);
  }
}

// --- Tiles ---------------------------------------------------------------------------------------

// What belongs to the columns of a tile.
template <int kColumns>
struct TargetColumns {
  float inverse_norm[kColumns];
  int32_t group[kColumns];

  __device__ __forceinline__ void prepare(const TokenList& targets, const float* inverse_norms,
                                          int64_t first, int64_t end) {
    if (threadIdx.x >= kColumns) return;
    const int64_t place = first + threadIdx.x;
    group[threadIdx.x] = place < end ? targets.group_of(place, kNoTarget) : kNoTarget;
    inverse_norm[threadIdx.x] = inverse_norms && place < end ? inverse_norms[place] : 1.0f;
  }
};

// A range of places or groups, also of a whole block.
struct Range {
  int32_t low = 0x7FFFFFFF, high = -1;

  __device__ __forceinline__ void add(int32_t value) {
    low = min(low, value);
    high = max(high, value);
  }
  __device__ __forceinline__ Range of_block(Range (&shared)[kTileWarps]) const {
    Range range;
    range.low = __reduce_min_sync(kFullWarp, low);
    range.high = __reduce_max_sync(kFullWarp, high);
    __syncthreads();  // nobody reads an earlier range any more
    if (lane_index() == 0) shared[warp_index()] = range;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kTileWarps; ++warp) {
      range.low = min(range.low, shared[warp].low);
      range.high = max(range.high, shared[warp].high);
    }
    return range;
  }
};

// The sources of a tile: those of this thread's products.
template <typename Shape>
struct SourceRows {
  int32_t group[Shape::kRowTiles][2];
  BestTarget best[Shape::kRowTiles][2];

  __device__ __forceinline__ SourceRows(const TokenList& sources, int64_t first) {
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t place = first + product_row<Shape>(r, half * 2);
        group[r][half] = sources.group_of(place, kNoSource);
      }
    }
  }

  // The targets that any source of the block may meet, among [begin, end).
  __device__ Range targets(const TokenList& list, int64_t begin, int64_t end,
                           Range (&shared)[kTileWarps]) const {
    Range groups, places;
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (group[r][half] != kNoSource) groups.add(group[r][half]);
      }
    }
    groups = groups.of_block(shared);
    if (!list.group) {
      if (groups.high >= 0 && begin < end) {
        places.add(static_cast<int32_t>(begin));
        places.add(static_cast<int32_t>(end - 1));
      }
      return places;
    }
    for (int64_t place = begin + threadIdx.x; place < end; place += kTileThreads) {
      const int32_t target_group = list.group_of(place, kNoTarget);
      if (target_group >= groups.low && target_group <= groups.high) {
        places.add(static_cast<int32_t>(place));
      }
    }
    return places.of_block(shared);
  }

  __device__ __forceinline__ void offer(const TileProducts<Shape>& products,
                                        const TargetColumns<Shape::kColumns>& columns,
                                        int64_t first_place) {
#pragma unroll
    for (int c = 0; c < Shape::kColumnTiles; ++c) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int column = product_column(c, side);
        const float inverse_norm = columns.inverse_norm[column];
        const int32_t target_group = columns.group[column];
        const auto place = static_cast<int32_t>(first_place + column);
#pragma unroll
        for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            BestTarget& row_best = best[r][half];
            const float rank = products[r][c][half * 2 + side] * inverse_norm;
            const bool wins = target_group == group[r][half] && rank > row_best.rank;
            row_best.rank = wins ? rank : row_best.rank;
            row_best.place = wins ? place : row_best.place;
          }
        }
      }
    }
  }

  // Joins the four lanes that share a source, and writes parts [len, num_splits].
  __device__ __forceinline__ void write(BestTarget* parts, int64_t first, int64_t len,
                                        int64_t num_splits, int64_t split) {
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        BestTarget total = best[r][half];
        for (int distance = 1; distance < 4; distance *= 2) {
          const float rank = __shfl_xor_sync(kFullWarp, total.rank, distance);
          const int32_t place = __shfl_xor_sync(kFullWarp, total.place, distance);
          total.join({rank, place});
        }
        const int64_t place = first + product_row<Shape>(r, half * 2);
        if (lane_index() % 4 == 0 && place < len) parts[place * num_splits + split] = total;
      }
    }
  }
};

// What a block works on. grid: (lists * tiles of sources, splits)
template <typename Shape>
struct TileWork {
  int64_t list, first_source, begin_target, end_target;
  TokenList sources, targets;
  const float* inverse_norms;  // of the targets
  TokenRows<Shape::kElementBytes> rows;

  __device__ explicit TileWork(const MatchParams& params)
      : list(blockIdx.x / params.tiles_per_list),
        first_source(blockIdx.x % params.tiles_per_list * Shape::kRows),
        begin_target(blockIdx.y * params.targets_per_split),
        end_target(min(begin_target + params.targets_per_split, params.op.target_index.len)),
        sources(TokenList::sources(params.op, list)),
        targets(TokenList::targets(params.op, list)),
        inverse_norms(params.inverse_norm ? params.inverse_norm + list * targets.len : nullptr),
        rows(params.op, list) {}

  // Leaves out targets that no source of the block may meet; returns how many tiles are left.
  __device__ int64_t narrow(const SourceRows<Shape>& source_rows, Range (&shared)[kTileWarps]) {
    const Range places = source_rows.targets(targets, begin_target, end_target, shared);
    begin_target = places.low;
    end_target = int64_t{places.high} + 1;
    return max((end_target - begin_target + Shape::kColumns - 1) / Shape::kColumns, int64_t{0});
  }
  __device__ __forceinline__ const char* source(int64_t i) const {
    return rows.address(sources, first_source + i);
  }
  __device__ __forceinline__ const char* target(int64_t i) const {
    const int64_t place = begin_target + i;
    return place < end_target ? rows.address(targets, place) : nullptr;
  }
  __device__ __forceinline__ void write(const MatchParams& params, SourceRows<Shape>& source_rows) {
    source_rows.write(params.parts + list * sources.len * params.num_splits, first_source,
                      sources.len, params.num_splits, blockIdx.y);
  }
};

// --- Short rows ----------------------------------------------------------------------------------

template <typename Shape>
struct MatchShared {
  TileBuffers<Shape> tiles;
  TargetColumns<Shape::kColumns> columns[Shape::kStages];
  Range ranges[kTileWarps];
};

template <typename Shape>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    match_short_kernel(const MatchParams params) {
  auto& shared = shared_memory<MatchShared<Shape>>();
  TileWork<Shape> work(params);
  SourceRows<Shape> source_rows(work.sources, work.first_source);
  const int64_t num_tiles = work.narrow(source_rows, shared.ranges);
  const auto first_place = [&](int64_t tile) { return work.begin_target + tile * Shape::kColumns; };
  stream_tiles<Shape>(
      shared.tiles, static_cast<int>(params.op.dim) * Shape::kElementBytes, params.aligned,
      num_tiles, [&](int i) { return work.source(i); }, [&](int64_t j) { return work.target(j); },
      [&](int stage, int64_t tile) {
        shared.columns[stage].prepare(work.targets, work.inverse_norms, first_place(tile),
                                      work.end_target);
      },
      [&](int stage, int64_t tile, TileProducts<Shape>& products) {
        source_rows.offer(products, shared.columns[stage], first_place(tile));
      });
  work.write(params, source_rows);
}

// --- Long rows -----------------------------------------------------------------------------------

// A chunk of a tile of sources and of a tile of targets.
template <typename Shape>
struct OneStage : Shape {
  static constexpr int kStages = 1;
};

template <typename Shape>
struct ChunkShared {
  TileBuffers<OneStage<Shape>> chunks[kChunkStages];
  TargetColumns<Shape::kColumns> columns[2];  // of even and odd tiles
  Range ranges[kTileWarps];
};

__device__ __forceinline__ int next_of(int i, int count) { return i + 1 == count ? 0 : i + 1; }

template <typename Shape>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    match_long_kernel(const MatchParams params) {
  constexpr int kChunkBytes = Shape::kChunks * 16;
  auto& shared = shared_memory<ChunkShared<Shape>>();
  TileWork<Shape> work(params);
  SourceRows<Shape> source_rows(work.sources, work.first_source);
  const int64_t num_tiles = work.narrow(source_rows, shared.ranges);
  const auto first_place = [&](int64_t tile) { return work.begin_target + tile * Shape::kColumns; };
  const int64_t row_bytes = params.op.dim * Shape::kElementBytes;
  // Long rows have as many chunks as are under way or more: then no two tiles of the same parity
  // are.
  const auto num_chunks = static_cast<int>((row_bytes + kChunkBytes - 1) / kChunkBytes);

  int64_t fetched_tile = 0;
  int fetched_chunk = 0, fetched_stage = 0;
  const auto fetch = [&] {
    if (fetched_tile < num_tiles) {
      auto& stage = shared.chunks[fetched_stage];
      const int64_t offset = int64_t{fetched_chunk} * kChunkBytes;
      const auto bytes = static_cast<int>(min(row_bytes - offset, int64_t{kChunkBytes}));
      const auto shifted = [&](const char* row) { return row ? row + offset : nullptr; };
      load_rows<OneStage<Shape>>(stage.a, bytes, params.aligned,
                                 [&](int i) { return shifted(work.source(i)); });
      load_rows<OneStage<Shape>>(stage.b[0], bytes, params.aligned, [&](int i) {
        return shifted(work.target(fetched_tile * Shape::kColumns + i));
      });
      if (fetched_chunk == 0) {
        shared.columns[fetched_tile % 2].prepare(work.targets, work.inverse_norms,
                                                 first_place(fetched_tile), work.end_target);
      }
    }
    cp_async_commit();
    fetched_stage = next_of(fetched_stage, kChunkStages);
    fetched_chunk = next_of(fetched_chunk, num_chunks);
    if (fetched_chunk == 0) ++fetched_tile;
  };

  for (int i = 0; i < kChunkStages - 1; ++i) fetch();
  int stage = 0;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    TileProducts<Shape> products = {};
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      cp_async_wait<kChunkStages - 2>();
      __syncthreads();  // this chunk is there, and everybody is done with the one before
      fetch();
      TileMultiplier<OneStage<Shape>> multiplier;
      multiplier.load(shared.chunks[stage]);
      multiplier.multiply(shared.chunks[stage], 0, products);
      stage = next_of(stage, kChunkStages);
    }
    source_rows.offer(products, shared.columns[tile % 2], first_place(tile));
  }
  cp_async_wait<0>();
  work.write(params, source_rows);
}

// --- Results -------------------------------------------------------------------------------------

// The first target of a group, -1 if there is none.
__device__ int32_t first_target(const TokenList& targets, int32_t group) {
  for (int64_t place = 0; place < targets.len; ++place) {
    if (targets.group_of(place, kNoTarget) == group) return static_cast<int32_t>(place);
  }
  return -1;
}

// One thread per source; splits in ascending order.
__global__ void __launch_bounds__(kThreads) join_splits_kernel(const MatchParams params) {
  const MatchTokensParams& op = params.op;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, len = op.source_index.len;
  if (i >= op.batch_size * op.num_heads * len) return;
  BestTarget best = params.parts[i * params.num_splits];
  for (int64_t split = 1; split < params.num_splits; ++split) {
    best.join(params.parts[i * params.num_splits + split]);
  }
  const int64_t list = i / len;
  const TokenList targets = TokenList::targets(op, list);
  const float norm = params.source_norm ? params.source_norm[i] : 0.0f;
  float similarity = -__builtin_inff();
  if (best.place >= 0 && norm < __builtin_inff()) {
    const bool has_norms = params.inverse_norm != nullptr;
    similarity = op.similarity_of(
        best.rank, norm, has_norms ? params.inverse_norm[list * targets.len + best.place] : 1.0f);
  } else {
    const int32_t group = TokenList::sources(op, list).group_of(i % len, kNoSource);
    best.place = first_target(targets, group);
    if (best.place >= 0) similarity = __builtin_nanf("");
  }
  op.match_index[i] = best.place < 0 ? -1 : targets.index[best.place];
  op.similarity[i] = similarity;
}

// --- Launches ------------------------------------------------------------------------------------

// Calls f with the shape of the tiles and whether rows are short.
template <typename F>
cudaError_t dispatch_tiles(const MatchTokensParams& params, F&& f) {
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_dtype(params.dtype, [&](auto dtype) {
    constexpr DType kDType = decltype(dtype)::value;
    if (params.dim <= kMaxResidentDim / 2) {
      error = f(TileShape<kDType, kMaxResidentDim / 2>{}, std::true_type{});
    } else if (params.dim <= kMaxResidentDim) {
      error = f(TileShape<kDType, kMaxResidentDim>{}, std::true_type{});
    } else {
      error = f(TileShape<kDType, kChunkDim>{}, std::false_type{});
    }
  });
  return error;
}

int64_t num_lists(const MatchTokensParams& params) { return params.batch_size * params.num_heads; }

// Enough blocks to fill a large GPU, while each still meets targets worth its start.
int64_t count_splits(const MatchTokensParams& params) {
  const int64_t tiles = (params.source_index.len + 127) / 128;
  const int64_t blocks = std::max<int64_t>(num_lists(params) * tiles, 1);
  const int64_t wanted = (kBlocks + blocks - 1) / blocks;
  const int64_t possible =
      (params.target_index.len + kMinTargetsPerSplit - 1) / kMinTargetsPerSplit;
  return std::clamp<int64_t>(std::min(wanted, possible), 1, kMaxSplits);
}

MatchParams carve(Arena& arena, const MatchTokensParams& params) {
  MatchParams result{};
  result.op = params;
  result.num_splits = count_splits(params);
  const int64_t num_sources = num_lists(params) * params.source_index.len;
  result.parts = arena.take<BestTarget>(num_sources * result.num_splits);
  if (params.metric == Metric::kCosine) {
    result.source_norm = arena.take<float>(num_sources);
    result.inverse_norm = arena.take<float>(num_lists(params) * params.target_index.len);
  }
  return result;
}

dim3 blocks_for(int64_t items, int64_t items_per_block) {
  return dim3(static_cast<unsigned>((items + items_per_block - 1) / items_per_block));
}

}  // namespace

int64_t MatchTokens::cuda_workspace_bytes(const MatchTokensParams& params) {
  Arena arena;
  carve(arena, params);
  return arena.bytes();
}

int MatchTokens::launch_cuda(const MatchTokensParams& op, void* workspace, void* stream) noexcept {
  const int64_t num_sources = num_lists(op) * op.source_index.len;
  if (num_sources == 0) return cudaSuccess;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  Arena arena(static_cast<std::byte*>(workspace));
  MatchParams params = carve(arena, op);
  params.aligned = rows_aligned(op.tokens, op.dtype == DType::kFloat32 ? 4 : 2);

  cudaError_t error = cudaSuccess;
  if (op.metric == Metric::kCosine) {
    const int64_t warps = num_sources + num_lists(op) * op.target_index.len;
    dispatch_dtype(op.dtype, [&](auto dtype) {
      error =
          launch(token_norm_kernel<decltype(dtype)::value>,
                 {blocks_for(warps, kThreads / kWarpSize), dim3(kThreads)}, cuda_stream, params);
    });
  }
  if (error != cudaSuccess) return error;
  error = dispatch_tiles(op, [&](auto shape, auto is_short) {
    using Shape = decltype(shape);
    const int64_t targets = (op.target_index.len + params.num_splits - 1) / params.num_splits;
    params.targets_per_split = (targets + Shape::kColumns - 1) / Shape::kColumns * Shape::kColumns;
    params.tiles_per_list = (op.source_index.len + Shape::kRows - 1) / Shape::kRows;
    const dim3 grid(static_cast<unsigned>(num_lists(op) * params.tiles_per_list),
                    static_cast<unsigned>(params.num_splits));
    if constexpr (decltype(is_short)::value) {
      return launch(match_short_kernel<Shape>,
                    {grid, dim3(kTileThreads), sizeof(MatchShared<Shape>)}, cuda_stream, params);
    } else {
      return launch(match_long_kernel<Shape>,
                    {grid, dim3(kTileThreads), sizeof(ChunkShared<Shape>)}, cuda_stream, params);
    }
  });
  if (error != cudaSuccess) return error;
  return launch(join_splits_kernel, {blocks_for(num_sources, kThreads), dim3(kThreads)},
                cuda_stream, params);
}

}  // namespace kvevict
