// SPDX-License-Identifier: Apache-2.0
#include "ops/match_tokens/match_tokens.h"

#include <limits>

#include "core/cpu/panel.h"

namespace kvevict {
namespace {

using Source = MatchScratch::Source;

// One list of sources and targets, and the block of its sources that is worked on.
struct Block {
  const MatchTokensParams& params;
  const MatchScratch& scratch;
  int64_t batch, head;
  const int32_t* source_index;  // [sources.len]
  const int32_t* target_index;  // [targets.len]
  const int32_t* source_group;  // like the indices, or null
  const int32_t* target_group;
  int64_t num_sources = 0, num_targets = 0;  // that there are, in scratch

  int32_t group_of_target(int64_t i) const {
    return target_group ? target_group[scratch.targets[i]] : 0;
  }
  int32_t group_of_source(int64_t place) const { return source_group ? source_group[place] : 0; }

  // The first target, of those that there are, whose group is at least this one.
  int32_t first_target(int64_t group) const {
    int64_t low = 0, high = num_targets;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (group_of_target(middle) < group) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return static_cast<int32_t>(low);
  }
};

void list_targets(Block& block) {
  for (int64_t place = 0; place < block.params.target_index.len; ++place) {
    if (block.target_index[place] < 0) continue;
    block.scratch.targets[block.num_targets++] = static_cast<int32_t>(place);
  }
}

// Lists the sources in [begin, end) that have targets; the others get their results.
void list_sources(Block& block, int64_t begin, int64_t end, int32_t* match_index,
                  float* similarity) {
  for (int64_t place = begin; place < end; ++place) {
    match_index[place] = -1;
    similarity[place] = -std::numeric_limits<float>::infinity();
    if (block.source_index[place] < 0) continue;
    const int32_t group = block.group_of_source(place);
    const Source* before =
        block.num_sources > 0 ? &block.scratch.sources[block.num_sources - 1] : nullptr;
    Source source{place, 0, 0, 0.0f};
    if (before && block.group_of_source(before->place) == group) {
      source.begin = before->begin;
      source.end = before->end;
    } else {
      source.begin = block.first_target(group);
      source.end = block.first_target(int64_t{group} + 1);
    }
    if (source.begin < source.end) block.scratch.sources[block.num_sources++] = source;
  }
}

template <typename Product>
Vec add_squares(Vec squares, const float* packed, int64_t depth) {
  int64_t d = 0;
  for (; d + kLanes <= depth; d += kLanes) {
    squares = Product::square_add(squares, load<Vec>(packed + d));
  }
  float tail[kLanes] = {};
  std::copy(packed + d, packed + depth, tail);
  return Product::square_add(squares, load<Vec>(tail));
}

int64_t padded_sources(const Block& block) {
  return (block.num_sources + kTileRows - 1) / kTileRows * kTileRows;
}

// Calls f(first, depth, is_last) for the chunks that rows of a depth are multiplied in.
template <typename F>
void for_chunks(int64_t depth, F&& f) {
  for (int64_t first = 0; first < depth; first += MatchScratch::kMaxDepth) {
    const int64_t end = std::min(first + MatchScratch::kMaxDepth, depth);
    f(first, end - first, end == depth);
  }
}

// Packs the sources, and zeros up to a whole tile; takes their norms.
template <DType dtype>
void pack_sources(const Block& block, int64_t depth) {
  using Product = typename ProductOf<dtype>::type;
  const int64_t num_rows = padded_sources(block);
  for (int64_t i = 0; i < num_rows; ++i) {
    Vec squares = {};
    for_chunks(depth, [&](int64_t first, int64_t chunk_depth, bool /*is_last*/) {
      float* packed = block.scratch.rows + first * num_rows + i * chunk_depth;
      if (i >= block.num_sources) {
        std::fill(packed, packed + chunk_depth, 0.0f);
        return;
      }
      const int64_t position = block.source_index[block.scratch.sources[i].place];
      pack_row<dtype>(
          element_address<dtype>(block.params.tokens, block.batch, block.head, position), first,
          chunk_depth, packed);
      squares = add_squares<Product>(squares, packed, chunk_depth);
    });
    if (i < block.num_sources)
      block.scratch.sources[i].norm = block.params.norm(reduce_add(squares));
  }
}

// Offers source i the targets [first, first + num_vecs * kLanes), of which it takes its own. Every
// lane keeps the best of those that it has met as a fraction, a / b > c / d where a * d > c * b:
// only the last one is divided. NaN never wins.
template <int num_vecs>
void offer_targets(const Block& block, int64_t i, const Vec (&products)[num_vecs],
                   const float* norms, int64_t first) {
  const MatchScratch& scratch = block.scratch;
  const Source& source = scratch.sources[i];
  const float offset = block.params.offset();
  const auto begin = static_cast<int32_t>(source.begin - first);
  const auto end = static_cast<int32_t>(source.end - first);
  const bool all = begin <= 0 && end >= num_vecs * kLanes;
  Vec best_products = load<Vec>(scratch.products + i * kLanes);
  Vec best_denominators = load<Vec>(scratch.denominators + i * kLanes);
  IntVec best = load<IntVec>(scratch.best + i * kLanes);
  for (int j = 0; j < num_vecs; ++j) {
    const Vec denominators = load<Vec>(norms + j * kLanes) * source.norm + offset;
    const IntVec lane = lane_indices() + j * kLanes;
    IntVec wins = products[j] * best_denominators > best_products * denominators;
    if (!all) wins &= (lane >= begin) & (lane < end);
    best_products = wins ? products[j] : best_products;
    best_denominators = wins ? denominators : best_denominators;
    best = wins ? lane + static_cast<int32_t>(first) : best;
  }
  store(scratch.products + i * kLanes, best_products);
  store(scratch.denominators + i * kLanes, best_denominators);
  store(scratch.best + i * kLanes, best);
}

// The best target of source i, once it has met all of its own; -1 if none is above -inf.
int32_t best_target(const Block& block, int64_t i, float& similarity) {
  constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  const MatchScratch& scratch = block.scratch;
  const auto best = load<IntVec>(scratch.best + i * kLanes);
  const Vec similarities =
      load<Vec>(scratch.products + i * kLanes) / load<Vec>(scratch.denominators + i * kLanes);
  similarity = reduce_max(best >= 0 ? similarities : broadcast(kMinusInfinity));
  if (!(similarity > kMinusInfinity)) return -1;
  int32_t target = std::numeric_limits<int32_t>::max();
  for (uint32_t lanes = to_bits(similarities == similarity); lanes; lanes &= lanes - 1) {
    target = std::min(target, best[__builtin_ctz(lanes)]);
  }
  return target;
}

template <DType dtype>
float similarity_of(const MatchTokensParams& params, int64_t batch, int64_t head, int64_t position,
                    int64_t other_position) {
  const void* row = element_address<dtype>(params.tokens, batch, head, position);
  const void* other_row = element_address<dtype>(params.tokens, batch, head, other_position);
  float product = 0.0f, squares = 0.0f, other_squares = 0.0f;
  for (int64_t d = 0; d < params.dim; ++d) {
    const float x = element_as_float<dtype>(row, d), y = element_as_float<dtype>(other_row, d);
    product += x * y;
    squares += x * x;
    other_squares += y * y;
  }
  return product / (params.norm(squares) * params.norm(other_squares) + params.offset());
}

// All sources of a block against all of their targets.
template <DType dtype>
void match_block(const Block& block) {
  using Product = typename ProductOf<dtype>::type;
  const MatchTokensParams& params = block.params;
  const MatchScratch& scratch = block.scratch;
  const bool is_cosine = params.metric == Metric::kCosine;
  const int64_t depth = params.dim / Product::kElements, num_rows = padded_sources(block);
  pack_sources<dtype>(block, depth);
  std::fill(scratch.products, scratch.products + num_rows * kLanes,
            -std::numeric_limits<float>::infinity());
  std::fill(scratch.denominators, scratch.denominators + num_rows * kLanes, 1.0f);
  std::fill(scratch.best, scratch.best + num_rows * kLanes, -1);

  int64_t first = block.num_targets, end = 0;
  for (int64_t i = 0; i < block.num_sources; ++i) {
    first = std::min<int64_t>(first, scratch.sources[i].begin);
    end = std::max<int64_t>(end, scratch.sources[i].end);
  }
  for (; first < end; first += kPanel) {
    Vec squares[kTileVecs] = {};
    for_chunks(depth, [&](int64_t first_element, int64_t chunk_depth, bool is_last) {
      pack_panel<dtype>(first_element, chunk_depth, scratch.panel, [&](int64_t i) {
        const int32_t target = scratch.targets[std::min(first + i, block.num_targets - 1)];
        return element_address<dtype>(params.tokens, block.batch, block.head,
                                      block.target_index[target]);
      });
      for (int64_t d = 0; is_cosine && d < chunk_depth; ++d) {
        for (int j = 0; j < kTileVecs; ++j) {
          const Vec lanes = load<Vec>(scratch.panel + d * kPanel + j * kLanes);
          squares[j] = Product::square_add(squares[j], lanes);
        }
      }
      if (is_last) {
        for (int j = 0; j < kTileVecs; ++j) store(scratch.norms + j * kLanes, squares[j]);
        for (int i = 0; i < kPanel; ++i) scratch.norms[i] = params.norm(scratch.norms[i]);
      }

      for (int64_t tile = 0; tile < num_rows; tile += kTileRows) {
        // The lanes that hold targets of the tile's sources.
        int64_t begin_lane = kPanel, end_lane = 0;
        for (int64_t i = tile; i < std::min(tile + kTileRows, block.num_sources); ++i) {
          begin_lane = std::min(begin_lane, scratch.sources[i].begin - first);
          end_lane = std::max(end_lane, scratch.sources[i].end - first);
        }
        begin_lane = std::max<int64_t>(begin_lane, 0);
        end_lane = std::min<int64_t>(end_lane, kPanel);
        if (begin_lane >= end_lane) continue;
        const int64_t lane = begin_lane / kLanes * kLanes;
        const auto num_vecs = static_cast<int>((end_lane - lane + kLanes - 1) / kLanes);
        const auto multiply = [&](auto vecs) {
          constexpr int kVecs = std::min<int>(vecs.value, kTileVecs);
          multiply_tile<Product, kTileRows, kVecs>(
              scratch.rows + first_element * num_rows + tile * chunk_depth, scratch.panel + lane,
              chunk_depth, [&](int i, Vec(&products)[kVecs]) {
                float* sums = scratch.sums + (tile + i) * kPanel + lane;
                for (int j = 0; first_element > 0 && j < kVecs; ++j) {
                  products[j] += load<Vec>(sums + j * kLanes);
                }
                for (int j = 0; !is_last && j < kVecs; ++j) store(sums + j * kLanes, products[j]);
                if (!is_last || tile + i >= block.num_sources) return;
                offer_targets<kVecs>(block, tile + i, products, scratch.norms + lane, first + lane);
              });
        };
        (void)dispatch_value<1, 2, 3, 4>(num_vecs, multiply);
      }
    });
  }
}

template <DType dtype>
void run(const MatchTokensParams& params, const CpuWork& work) {
  Arena arena(work.scratch);
  const MatchScratch scratch = MatchScratch::carve(arena, params, work.num_threads);
  const int64_t capacity = MatchScratch::capacity(params, work.num_threads);
  const int64_t blocks_per_list = MatchTokens::blocks_per_list(params, work.num_threads);
  for (int64_t item = work.begin; item < work.end; ++item) {
    const int64_t list = item / blocks_per_list;
    const int64_t batch = list / params.num_heads, head = list % params.num_heads;
    Block block{params,
                scratch,
                batch,
                head,
                params.source_index.list(batch, head),
                params.target_index.list(batch, head),
                params.source_group.list(batch, head),
                params.target_group.list(batch, head)};
    const int64_t len = params.source_index.len;
    int32_t* match_index = params.match_index + list * len;
    float* similarity = params.similarity + list * len;
    const int64_t begin = item % blocks_per_list * capacity;
    list_targets(block);
    list_sources(block, begin, std::min(begin + capacity, len), match_index, similarity);
    match_block<dtype>(block);
    for (int64_t i = 0; i < block.num_sources; ++i) {
      const Source& source = scratch.sources[i];
      float best_similarity = 0.0f;
      int32_t target = best_target(block, i, best_similarity);
      const int64_t position = block.source_index[source.place];
      if (target < 0) {
        target = source.begin;
        best_similarity = similarity_of<dtype>(params, batch, head, position,
                                               block.target_index[scratch.targets[target]]);
      }
      match_index[source.place] = block.target_index[scratch.targets[target]];
      similarity[source.place] = best_similarity;
    }
  }
}

}  // namespace

template <>
void MatchTokens::run_cpu<kThisIsa>(const MatchTokensParams& params, const CpuWork& work) noexcept {
  dispatch_dtype(params.dtype, [&](auto dtype) { run<dtype.value>(params, work); });
}

}  // namespace kvevict
