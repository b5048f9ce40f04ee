"""What mutate.py breaks: for every kernel, mistakes that are easily made."""

from __future__ import annotations

from dataclasses import dataclass

TILES, ATTENTION = "csrc/cuda/mma_tiles.h", "csrc/cuda/attention_kernels.h"
ROWS, FEW_ROWS = "csrc/cuda/attention_rows.h", "csrc/cuda/few_rows.h"
MOVE, REDUCTIONS = "csrc/cuda/move_rows.h", "csrc/cuda/reductions.h"
SELECT = "csrc/ops/select_topk/select_topk_cuda.cu"
THRESHOLD = "csrc/ops/select_threshold/select_threshold_cuda.cu"
NULL = "csrc/ops/null/null_cuda.cu"
ACCUMULATE = "csrc/ops/accumulate_scores/accumulate_scores_cuda.cu"
LSE = "csrc/ops/attention_lse/attention_lse_cuda.cu"
BY_TEXT = "csrc/ops/score_keys_by_text/score_keys_by_text_cuda.cu"
BROADCAST = "csrc/ops/broadcast_indices/broadcast_indices_cuda.cu"
EVICT = "csrc/ops/evict_slots/evict_slots_cuda.cu"
REROTATE = "csrc/ops/rerotate_keys/rerotate_keys_cuda.cu"
REROTATE_HEADER = "csrc/ops/rerotate_keys/rerotate_keys.h"
DIVERSITY = "csrc/ops/key_diversity/key_diversity_cuda.cu"
VECTORS = "csrc/cuda/vector_loads.h"
MIX = "csrc/ops/mix_scores/mix_scores_cuda.cu"
MATCH = "csrc/ops/match_tokens/match_tokens_cuda.cu"
MERGE, MERGE_HEADER = (
    "csrc/ops/merge_tokens/merge_tokens_cuda.cu",
    "csrc/ops/merge_tokens/merge_tokens.h",
)
POOL = "csrc/ops/score_and_compact/score_and_compact_cuda.cu"
POOL_HEADER = "csrc/ops/score_and_compact/score_and_compact.h"


@dataclass(frozen=True)
class Mutation:
    """In the sources of `op`, `text` of `file` becomes `replacement`."""

    kernel: str
    op: str
    what: str
    file: str
    text: str
    replacement: str
    equivalent: str = ""  # why no test can notice it


def _of(kernel: str, op: str, *changes: tuple[str, ...]) -> list[Mutation]:
    return [Mutation(kernel, op, *change) for change in changes]


MUTATIONS = [
    *_of(
        "null_kernel",
        "null",
        ("last element left out", NULL, "i < params.numel", "i + 1 < params.numel"),
        (
            "wrong stride of blocks",
            NULL,
            "{blockIdx.x} * kThreads",
            "{blockIdx.x} * (kThreads + 1)",
        ),
        ("no block for the tail", NULL, "(params.numel + kThreads - 1)", "(params.numel)"),
    ),
    *_of(
        "accumulate_scores_kernel",
        "accumulate_scores",
        (
            "last key left out",
            ACCUMULATE,
            "if (key >= params.kv_len)",
            "if (key >= params.kv_len - 1)",
        ),
        ("keys behind the row", ACCUMULATE, "if (key >= params.kv_len) return;", ""),
        (
            "scores without gaps between heads",
            ACCUMULATE,
            "head * params.stride_head",
            "head * params.kv_len",
        ),
        (
            "fused multiply-add",
            ACCUMULATE,
            "__fadd_rn(__fmul_rn(params.decay, *score), ",
            "__fmaf_rn(params.decay, *score, ",
        ),
    ),
    *_of(
        "row_normalizer_kernel",
        "attention_lse",
        (
            "wait for cp.async one group short",
            TILES,
            "cp_async_wait<kStages - 2>",
            "cp_async_wait<kStages - 1>",
        ),
        (
            "no barrier before a tile is read",
            TILES,
            "__syncthreads();  // this tile is there",
            "// this tile is there",
        ),
        (
            "no zeros behind a narrow row",
            TILES,
            "chunk * 16 < row_bytes",
            "chunk * 16 <= row_bytes",
        ),
        (
            "lanes merge at a wrong distance",
            ATTENTION,
            "merge_lanes(1, 4)",
            "merge_lanes(2, 4)",
        ),
        (
            "own key not seen",
            ATTENTION,
            "tile_key + column <= last_key[r][half]",
            "tile_key + column < last_key[r][half]",
        ),
        (
            "a key behind the last one seen",
            ATTENTION,
            "index < end_key && attention",
            "index <= end_key && attention",
            "splits end with tiles, and rows see no key behind the last one",
        ),
    ),
    *_of(
        "merge_normalizers_kernel",
        "attention_lse",
        ("second split skipped", ROWS, "int64_t split = 1;", "int64_t split = 2;"),
        (
            "wrong stride of splits",
            ROWS,
            "Normalizer total = parts[row * num_splits];",
            "Normalizer total = parts[row];",
        ),
        ("last row left out", LSE, "if (i >= num_rows)", "if (i + 1 >= num_rows)"),
    ),
    *_of(
        "column_kernel",
        "score_keys",
        (
            "wait for cp.async one group short",
            TILES,
            "cp_async_wait<kStages - 2>",
            "cp_async_wait<kStages - 1>",
        ),
        (
            "lanes merge at a wrong distance",
            ATTENTION,
            "__shfl_xor_sync(kFullWarp, score, distance)",
            "__shfl_xor_sync(kFullWarp, score, distance * 2)",
        ),
        (
            "last key left out",
            ATTENTION,
            "index < params.num_keys)",
            "index + 1 < params.num_keys)",
        ),
        (
            "own key not seen",
            ATTENTION,
            "thread_key[r][half] > shared.last_key",
            "thread_key[r][half] >= shared.last_key",
        ),
        ("wrong stride of heads", ATTENTION, "blockIdx.y * num_heads, num", "blockIdx.y, num"),
    ),
    *_of(
        "max_of_means_kernel",
        "score_keys",
        (
            "no barrier between streams",
            TILES,
            "__syncthreads();  // nobody",
            "// nobody",
        ),
        (
            "own key not seen",
            ATTENTION,
            "index <= shared.last_key[stage][column] &&",
            "index < shared.last_key[stage][column] &&",
        ),
        (
            "wrong stride of KV heads",
            ATTENTION,
            "blockIdx.y * num_kv_heads + i",
            "blockIdx.y + i",
            "a score is of one KV head or of all",
        ),
        (
            "an entry between tiles skipped",
            ATTENTION,
            "first_entry += Shape::kColumns",
            "first_entry += Shape::kColumns + 1",
        ),
    ),
    *_of(
        "column_kernel, joining parts",
        "score_keys",
        (
            "second part skipped",
            ATTENTION,
            "int64_t i = 1; i < params.parts",
            "int64_t i = 2; i < params.parts",
        ),
        (
            "wrong stride of scores",
            ATTENTION,
            "output.parts + score * params.parts_per_score * params.num_keys",
            "output.parts + score * params.num_keys",
        ),
        (
            "wrong stride of parts",
            ATTENTION,
            "__ldcg(parts + i * params.num_keys)",
            "__ldcg(parts + i)",
        ),
        (
            "a ticket for all key tiles",
            ATTENTION,
            "&params.tickets[score + blockIdx.x]",
            "&params.tickets[score]",
        ),
        ("the block before the last joins", REDUCTIONS, "== num_blocks - 1", "== num_blocks - 2"),
        ("tickets not cleared", REDUCTIONS, "data[i] = 0;", ";"),
    ),
    *_of(
        "column_kernel, text to text",
        "score_keys_by_text",
        ("a row does not see itself", ATTENTION, "(viewer) >= row", "(viewer) > row"),
        (
            "last row left out",
            ATTENTION,
            "threadIdx.x >= Shape::kRows || index >= params.num_keys",
            "threadIdx.x >= Shape::kRows || index + 1 >= params.num_keys",
        ),
        (
            "rows of the first sequence",
            ATTENTION,
            "num_viewers(params, blockIdx.z, index)",
            "num_viewers(params, 0, index)",
        ),
        (
            "tickets of texts and keys overlap",
            BY_TEXT,
            "tickets.data + workspace.num_text_tickets",
            "tickets.data",
        ),
    ),
    *_of(
        "logit_kernel",
        "score_keys",
        ("own key not seen", FEW_ROWS, "key_index[half] <= last_key", "key_index[half] < last_key"),
        (
            "lanes merge at a wrong distance",
            FEW_ROWS,
            "merge_lanes(4, kWarpSize)",
            "merge_lanes(8, kWarpSize)",
        ),
        (
            "no barrier before warps merge",
            FEW_ROWS,
            "  __syncthreads();\n  const int column",
            "  const int column",
        ),
        ("second warp skipped", FEW_ROWS, "int warp = 1;", "int warp = 2;"),
        ("wrong stride of warps", FEW_ROWS, "tile += kTileWarps * 16", "tile += kTileWarps * 8"),
        (
            "chunks of keys in another order",
            FEW_ROWS,
            "{query[c][i].x, query[c][i].y}",
            "{query[c][i].x, query[c][i].z}",
        ),
        (
            "last row left out",
            FEW_ROWS,
            "product_column(c, side) < rows.size()",
            "product_column(c, side) + 1 < rows.size()",
        ),
    ),
    *_of(
        "logit_score_kernel",
        "score_keys",
        (
            "no barrier before normalizers are read",
            FEW_ROWS,
            "  __syncthreads();\n\n  const int64_t key",
            "  const int64_t key",
        ),
        (
            "last key left out",
            FEW_ROWS,
            "if (key >= attention.kv_len)",
            "if (key + 1 >= attention.kv_len)",
        ),
        (
            "wrong stride of heads",
            FEW_ROWS,
            "head * num_rows + entry, Constant<statistic>",
            "head + entry, Constant<statistic>",
        ),
        (
            "a warp takes every other row",
            FEW_ROWS,
            "i += kScoreThreads / kWarpSize",
            "i += 2 * kScoreThreads / kWarpSize",
        ),
        (
            "second round of splits skipped",
            ROWS,
            "split < num_splits; split += 32",
            "split < min(num_splits, int64_t{1}); split += 32",
        ),
    ),
    *_of(
        "sum_unit_keys_kernel",
        "key_diversity",
        (
            "no barrier before sums are added",
            DIVERSITY,
            "shared.lens[row] = len;\n  __syncthreads();",
            "shared.lens[row] = len;",
        ),
        (
            "lanes add up at a wrong distance",
            DIVERSITY,
            "__shfl_xor_sync(kFullWarp, value, distance)",
            "__shfl_xor_sync(kFullWarp, value, distance / 2)",
        ),
        (
            "last sum left out",
            DIVERSITY,
            "i < kKeys<kLanes>; ++i) sum +=",
            "i + 1 < kKeys<kLanes>; ++i) sum +=",
        ),
        (
            "a masked key has a scale",
            DIVERSITY,
            "real ? unit_scale(squares) : 0.0f",
            "unit_scale(squares)",
        ),
        (
            "wrong stride of heads",
            DIVERSITY,
            "chunk = place.head * chunks.num_chunks + place.chunk",
            "chunk = place.head + place.chunk",
        ),
        (
            "elements behind a narrow row",
            VECTORS,
            "chunk * 16 >= row_bytes",
            "chunk * 16 > row_bytes",
        ),
        ("odd elements keep the even ones' bits", VECTORS, "each[i] & 0xFFFF0000u", "each[i]"),
        ("rows on any address", VECTORS, "address % 16 == 0 && strides", "strides"),
    ),
    *_of(
        "compare_keys_kernel",
        "key_diversity",
        (
            "no barrier before parts are added",
            DIVERSITY,
            "len = __reduce_add_sync(kFullWarp, len);\n  __syncthreads();",
            "len = __reduce_add_sync(kFullWarp, len);",
        ),
        (
            "no barrier before the mean is read",
            DIVERSITY,
            "__syncthreads();\n  if (place.chunk == 0 && threadIdx.x == 0)",
            "if (place.chunk == 0 && threadIdx.x == 0)",
        ),
        ("chunks skipped", DIVERSITY, "i += kParts", "i += kParts + 1"),
        (
            "keys of the last chunk not counted",
            DIVERSITY,
            "i < num_chunks; i += kWarpSize",
            "i + 1 < num_chunks; i += kWarpSize",
        ),
        (
            "a masked key has a similarity",
            DIVERSITY,
            "place.lane() == 0 && real",
            "place.lane() == 0 && key_index < place.end",
        ),
        (
            "every group has the first heads",
            DIVERSITY,
            "head(first_head + blockIdx",
            "head(blockIdx",
        ),
    ),
    *_of(
        "summarize_segments_kernel",
        "mix_scores",
        (
            "segments overlap",
            MIX,
            "% num_segments * kSegmentKeys",
            "% num_segments * (kSegmentKeys - 1)",
        ),
        (
            "last key of a segment left out",
            MIX,
            "min(begin + kSegmentKeys,",
            "min(begin + kSegmentKeys - 1,",
        ),
        ("wrong stride of segments", MIX, "summaries[blockIdx.x] =", "summaries[part.row] ="),
        (
            "excess over the own low",
            MIX,
            "fmaf(other_count, other.low - low, other.excess)",
            "other.excess",
        ),
    ),
    *_of(
        "mix_scores_kernel",
        "mix_scores",
        (
            "no barrier before warps are merged",
            MIX,
            "= summary;\n  __syncthreads();",
            "= summary;",
        ),
        (
            "lanes merge at a wrong distance",
            MIX,
            "summary.shuffled_down(distance)",
            "summary.shuffled_down(distance / 2)",
        ),
        ("last warp left out", MIX, "warp < kThreads / kW", "warp + 1 < kThreads / kW"),
        ("last segment left out", MIX, "i < num_segments; i", "i + 1 < num_segments; i"),
        ("higher classes are mixed", MIX, "== kOrdinary", ">= kOrdinary"),
        ("wrong stride of rows", MIX, "f(row * kv_len + key,", "f(key,"),
    ),
    *_of(
        "select_short_kernel",
        "select_topk",
        (
            "no barrier after a histogram is cleared",
            SELECT,
            "shared.histogram[i] = 0;\n  __syncthreads();",
            "shared.histogram[i] = 0;",
        ),
        (
            "no barrier after keys are stored",
            SELECT,
            "__syncthreads();\n  const Threshold threshold =",
            "const Threshold threshold =",
        ),
        (
            "no barrier after a histogram is filled",
            SELECT,
            "__syncthreads();\n    bucket =",
            "bucket =",
        ),
        (
            "no barrier after warps have counted",
            SELECT,
            "shared.warp_ties[warp] = ties;\n  }\n  __syncthreads();",
            "shared.warp_ties[warp] = ties;\n  }",
        ),
        (
            "no barrier before a prefix sum",
            REDUCTIONS,
            "warp_sums[warp] = sum;\n  __syncthreads();",
            "warp_sums[warp] = sum;",
        ),
        (
            "no barrier after a prefix sum",
            REDUCTIONS,
            ": 0u);\n  __syncthreads();",
            ": 0u);",
        ),
        (
            "prefix sum at a wrong distance",
            REDUCTIONS,
            "__shfl_up_sync(kFullWarp, sum, distance)",
            "__shfl_up_sync(kFullWarp, sum, distance - 1)",
        ),
        (
            "last entry not filled up",
            SELECT,
            "i < k; i += num_threads",
            "i + 1 < k; i += num_threads",
        ),
        (
            "a lane counts itself",
            REDUCTIONS,
            "(1u << lane_index()) - 1",
            "(2u << lane_index()) - 1",
        ),
        ("a key behind the row", SELECT, "index + 3 >= kv_len", "index + 2 >= kv_len"),
        ("ties of all digits", SELECT, "threshold.ties -= bucket.above;", ""),
    ),
    *_of(
        "count_classes_kernel",
        "select_topk",
        (
            "no barrier after counting",
            SELECT,
            "__syncthreads();\n  const uint32_t count =",
            "const uint32_t count =",
        ),
        (
            "last key of a tail left out",
            SELECT,
            "j < min(i + kVector, end)",
            "j + 1 < min(i + kVector, end)",
        ),
        (
            "wrong stride of blocks",
            SELECT,
            "begin = place.block * kBlockKeys",
            "begin = place.block * kSegmentKeys",
        ),
        (
            "keys behind the row",
            SELECT,
            "min(begin + kBlockKeys, params.kv_len), shared",
            "begin + kBlockKeys, shared",
        ),
    ),
    *_of(
        "count_digits_kernel",
        "select_topk",
        (
            "no barrier after counting",
            SELECT,
            "__syncthreads();\n  for (int i = threadIdx.x; i < kBuckets; i += kSegmentThreads)",
            "for (int i = threadIdx.x; i < kBuckets; i += kSegmentThreads)",
        ),
        (
            "last bucket left out",
            SELECT,
            "i < kBuckets; i += kSegmentThreads)",
            "i + 1 < kBuckets; i += kSegmentThreads)",
        ),
        (
            "wrong stride of segments",
            SELECT,
            "segment(block * kSegmentsPerBlock + warp_index())",
            "segment(block + warp_index())",
        ),
    ),
    *_of(
        "split_kernel",
        "select_topk",
        (
            "candidates on top of each other",
            SELECT,
            "segment.candidates[num_candidates + __popc(candidates & lanes_before())] = key",
            "segment.candidates[num_candidates] = key",
        ),
        (
            "candidates count as above",
            SELECT,
            "__ballot_sync(kFullWarp, digit > bucket)",
            "__ballot_sync(kFullWarp, digit >= bucket)",
        ),
        (
            "last words left out",
            SELECT,
            "first < kWarpSize; first += kKeysInFlight",
            "first + kKeysInFlight < kWarpSize; first += kKeysInFlight",
        ),
        ("wrong stride of rows", SELECT, "segments + row * num_segments", "segments + row"),
    ),
    *_of(
        "decide_kernel",
        "select_topk",
        (
            "no barrier before the sum over segments",
            SELECT,
            "__syncthreads();\n  // Every thread sums",
            "// Every thread sums",
        ),
        (
            "last candidate left out",
            SELECT,
            "j < segment.num_candidates; j += kWarpSize) {\n      above",
            "j + 1 < segment.num_candidates; j += kWarpSize) {\n      above",
        ),
        (
            "last segment left out",
            SELECT,
            "end = min(begin + per_thread, num_segments)",
            "end = min(begin + per_thread, num_segments - 1)",
        ),
    ),
    *_of(
        "list_kernel",
        "select_topk",
        (
            "ties of earlier segments forgotten",
            SELECT,
            "segment.above_before + min(ties, state.threshold.ties)",
            "segment.above_before",
        ),
        (
            "bits from a wrong lane",
            SELECT,
            "__shfl_sync(kFullWarp, above_bits, word)",
            "__shfl_sync(kFullWarp, above_bits, word ^ 1)",
        ),
        (
            "wrong stride of blocks that fill up",
            SELECT,
            "place.block * kSegmentThreads + threadIdx.x",
            "threadIdx.x",
        ),
        (
            "candidates of earlier words forgotten",
            SELECT,
            "num_candidates += __popc(candidates);\n    if",
            "if",
        ),
    ),
    *_of(
        "sum_candidates_kernel",
        "select_threshold",
        (
            "lanes are added up in another order",
            THRESHOLD,
            "for (int distance = kSumLanes / 2; distance > 0; distance /= 2)",
            "for (int distance = 1; distance < kSumLanes; distance *= 2)",
        ),
        (
            "no warp for the last segments",
            THRESHOLD,
            "(num_warps + kWarps - 1) / kWarps",
            "num_warps / kWarps",
        ),
        (
            "counters are not cleared",
            THRESHOLD,
            "workspace.num_evictable[place.row] = 0;",
            "",
        ),
        (
            "a lane counts only its own candidates",
            THRESHOLD,
            "num_candidates += __popc(__ballot_sync(kFullWarp, key.candidate));",
            "num_candidates += key.candidate;",
        ),
    ),
    *_of(
        "rank_keys_kernel",
        "select_threshold",
        (
            "totals of the first segments alone",
            THRESHOLD,
            "i < params.num_segments(); i += kWarpSize",
            "i < min(params.num_segments(), 32l); i += kWarpSize",
        ),
        (
            "padding of another sequence",
            THRESHOLD,
            "place.row / params.num_heads * params.kv_len",
            "place.row % params.num_heads * params.kv_len",
        ),
        (
            "padding ranks as what is kept",
            THRESHOLD,
            "key.real ? INFINITY : NAN",
            "INFINITY",
        ),
        (
            "every segment evicts up to the limit",
            THRESHOLD,
            "min(before + num_evictable, limit) - min(before, limit)",
            "min(num_evictable, limit)",
        ),
        (
            "nothing is evicted",
            THRESHOLD,
            "num_real - num_evicted",
            "num_real",
        ),
    ),
    *_of(
        "broadcast_indices_kernel",
        "broadcast_indices",
        (
            "last entry left out",
            BROADCAST,
            "if (i >= params.kept.k)",
            "if (i + 1 >= params.kept.k)",
        ),
        (
            "wrong stride of sequences",
            BROADCAST,
            "item / params.num_kv_heads % params.batch_size",
            "item % params.batch_size",
        ),
        (
            "no block for the tail",
            BROADCAST,
            "(params.kept.k + kThreads - 1) / kThreads",
            "(params.kept.k) / kThreads",
        ),
    ),
    *_of(
        "move_rows_kernel, gather",
        "gather_kv",
        (
            "wait for cp.async one group short",
            MOVE,
            "cp_async_wait<kMoveAhead>",
            "cp_async_wait<kMoveAhead + 1>",
        ),
        ("no zeros behind the kept rows", MOVE, "+ offset, copied);", "+ offset, true);"),
        (
            "wrong stride of rows",
            MOVE,
            "source_offset + place * source.rows.stride_seq",
            "source_offset + place * source.row_bytes",
        ),
        ("last column left out", MOVE, "* kSector, num_columns)", "* kSector, num_columns - 1)"),
        ("vectors wider than rows", MOVE, "rows.stride_seq | row_bytes;", "rows.stride_seq;"),
        (
            "threads that are left over copy, too",
            MOVE,
            "thread < row_step * width ? thread / width : 1u << 31",
            "thread / width",
        ),
    ),
    *_of(
        "move_rows_kernel, compact",
        "compact_kv",
        ("no barrier before writing", MOVE, "if (kInPlace) __syncthreads();", ""),
        (
            "wait for cp.async one group short",
            MOVE,
            "cp_async_wait<kMoveAhead>",
            "cp_async_wait<kMoveAhead + 1>",
        ),
        ("ring one slot short", MOVE, "kMoveSlots = kMoveAhead + 1", "kMoveSlots = kMoveAhead"),
        ("rows in place are others", MOVE, "place == read", "place == read + 1"),
        ("rows in place are copied, too", MOVE, "!valid || place == read", "!valid"),
    ),
    *_of(
        "evict_slots_kernel",
        "evict_slots",
        (
            "a search stops at the first 32 places",
            EVICT,
            "end = min(begin + part - 1, end);",
            "end = begin;",
        ),
        ("an evicted row survives", EVICT, "- middle <= place", "- middle < place"),
        (
            "holes behind the live rows",
            EVICT,
            "count_below(slots, num_evicted, new_len)",
            "count_below(slots, num_evicted, kv_len)",
        ),
        ("columns carry two rows", EVICT, "      ++move;\n", "      move += 2;\n"),
        (
            "layers of the first launch in every launch",
            EVICT,
            "(params.first_tensor + blockIdx.y)",
            "(blockIdx.y)",
        ),
        (
            "wrong stride of sequences",
            EVICT,
            "batch = stream / num_kv_heads",
            "batch = stream / params.shape.batch_size",
        ),
        (
            "last row left out",
            EVICT,
            "while (move < num_moves)",
            "while (move + 1 < num_moves)",
        ),
    ),
    *_of(
        "rerotate_keys_kernel",
        "rerotate_keys",
        ("last slot left out", REROTATE, "slot >= params.kv_len", "slot + 1 >= params.kv_len"),
        ("empty slots turn", REROTATE_HEADER, "if (move.is_empty(axis)) return false;", ""),
        (
            "slots that do not move are written",
            REROTATE_HEADER,
            "turns |= move.distance(axis) != 0;",
            "turns = true;",
        ),
        (
            "rows of two threads",
            REROTATE,
            "(split + 1) / launch.splits_per_list;",
            "(split + 1) / launch.splits_per_list + 1;",
        ),
        ("rows behind a short layer", REROTATE, " && slot < key.kv_len", ""),
        ("other heads of the same list", REROTATE, "begin_head + at % launch", "at % launch"),
        (
            "halves for neighbors",
            REROTATE,
            "values[kInterleaved ? 2 * i + 1 : kPairs + i]",
            "values[2 * i + 1]",
        ),
        (
            "vectors that are not aligned",
            REROTATE,
            "int64_t bits = params.num_freqs * (",
            "int64_t bits = 16 * (",
        ),
        (
            "distances of the first axis",
            REROTATE,
            "move.distance(axis))) * kHalfTurns",
            "move.distance(0))) * kHalfTurns",
        ),
        (
            "product of 32 bits",
            REROTATE_HEADER,
            "static_cast<int32_t>(turns_per_position * positions >> 32)",
            "static_cast<int32_t>((turns_per_position >> 32) * positions)",
        ),
    ),
    *_of(
        "token_norm_kernel",
        "match_tokens",
        (
            "lanes add up at a wrong distance",
            MATCH,
            "distance < kWarpSize; distance *= 2",
            "distance < kWarpSize / 2; distance *= 2",
        ),
        (
            "columns behind the first 256 left out",
            MATCH,
            "row && eight * 8 < op.dim;",
            "row && eight * 8 < min(op.dim, int64_t{256});",
        ),
        (
            "targets stand where sources do",
            MATCH,
            "is_source ? place : place - num_sources",
            "place",
        ),
        ("last place left out", MATCH, "item >= op.batch", "item + 1 >= op.batch"),
    ),
    *_of(
        "match_short_kernel",
        "match_tokens",
        (
            "wait for cp.async one group short",
            TILES,
            "cp_async_wait<kStages - 2>",
            "cp_async_wait<kStages - 1>",
        ),
        (
            "later target wins a tie",
            MATCH,
            "== group[r][half] && rank > row_best.rank",
            "== group[r][half] && rank >= row_best.rank",
        ),
        (
            "groups are not compared",
            MATCH,
            "target_group == group[r][half] && rank",
            "target_group >= 0 && rank",
        ),
        (
            "last target left out",
            MATCH,
            "end_target = int64_t{places.high} + 1;",
            "end_target = places.high;",
        ),
        (
            "two of four lanes join",
            MATCH,
            "distance < 4; distance *= 2",
            "distance < 2; distance *= 2",
        ),
        (
            "a lane's rank without its place",
            MATCH,
            "__shfl_xor_sync(kFullWarp, total.place, distance)",
            "total.place",
        ),
        (
            "targets of all groups are multiplied",
            MATCH,
            "target_group >= groups.low && target_group <= groups.high",
            "target_group >= 0",
        ),
        (
            "no barrier before ranges are read",
            MATCH,
            "shared[warp_index()] = range;\n    __syncthreads();",
            "shared[warp_index()] = range;",
        ),
    ),
    *_of(
        "match_long_kernel",
        "match_tokens",
        (
            "wait for cp.async one group short",
            MATCH,
            "cp_async_wait<kChunkStages - 2>",
            "cp_async_wait<kChunkStages - 1>",
        ),
        (
            "no barrier before a chunk is read",
            MATCH,
            "__syncthreads();  // this chunk",
            "// this chunk",
        ),
        (
            "chunks of a row at the wrong place",
            MATCH,
            "int64_t{fetched_chunk} * kChunkBytes",
            "int64_t{fetched_chunk}",
        ),
        (
            "columns of all tiles at one place",
            MATCH,
            "shared.columns[fetched_tile % 2]",
            "shared.columns[0]",
        ),
        (
            "last chunk left out",
            MATCH,
            "(row_bytes + kChunkBytes - 1) / kChunkBytes",
            "row_bytes / kChunkBytes",
        ),
    ),
    *_of(
        "join_splits_kernel",
        "match_tokens",
        ("second split skipped", MATCH, "int64_t split = 1;", "int64_t split = 2;"),
        (
            "later place wins a tie",
            MATCH,
            "other.place < place",
            "other.place > place",
        ),
        (
            "infinite sources have matches",
            MATCH,
            "best.place >= 0 && norm < __builtin_inff()",
            "best.place >= 0",
        ),
        (
            "norms of another list",
            MATCH,
            "params.inverse_norm[list * targets.len + best.place]",
            "params.inverse_norm[best.place]",
        ),
    ),
    *_of(
        "sort_pairs_kernel",
        "merge_tokens",
        (
            "no barrier after counts are cleared",
            MERGE,
            "% kSortWarps] = 0;\n    }\n    __syncthreads();",
            "% kSortWarps] = 0;\n    }",
        ),
        (
            "no barrier after counting",
            MERGE,
            "+= __popc(peers);\n    });\n    __syncthreads();",
            "+= __popc(peers);\n    });",
        ),
        (
            "no barrier between the digits",
            MERGE,
            "first + __popc(peers);\n    });\n    __syncthreads();",
            "first + __popc(peers);\n    });",
        ),
        (
            "pairs of a bucket on top of each other",
            MERGE,
            "to[first + __popc(peers & lanes_before())] = pair;",
            "to[first] = pair;",
        ),
        ("one digit only", MERGE, "++num_digits;", "break;"),
        (
            "stretches overlap",
            MERGE,
            "min(warp_index() * stretch, num_pairs)",
            "min(warp_index() * (stretch - 1), num_pairs)",
        ),
    ),
    *_of(
        "merge_rows_kernel",
        "merge_tokens",
        (
            "every pair of a target merges",
            MERGE,
            "(place > 0 && pairs[place - 1].target == target)",
            "false",
        ),
        ("last source left out", MERGE, "pair < end; ++pair", "pair < end - 1; ++pair"),
        (
            "weights of the first head",
            MERGE,
            "op.weights(batch, head)",
            "op.weights(batch, 0)",
        ),
        (
            "columns behind the first 128 left out",
            MERGE,
            "(widest + kColumnsPerRun - 1) / kColumnsPerRun",
            "1",
        ),
        (
            "no mean without weight",
            MERGE_HEADER,
            "if (sum_of_weights > 1e-8f)",
            "if (count > 0)",
        ),
        ("sum without the target", MERGE, "  add(sums, target);\n", ""),
    ),
    *_of(
        "pool_scores_kernel",
        "score_and_compact",
        ("last key left out", POOL, "if (key >= params.kv_len)", "if (key + 1 >= params.kv_len)"),
        (
            "window one key short",
            POOL_HEADER,
            "i <= last",
            "i < last",
        ),
        (
            "wrong stride of rows",
            POOL,
            "merged_priority[row * params.kv_len + key]",
            "merged_priority[key]",
        ),
        (
            "a masked neighbor counts",
            POOL_HEADER,
            "if (priority_of(row, i) == 1) sum",
            "sum",
        ),
    ),
]
