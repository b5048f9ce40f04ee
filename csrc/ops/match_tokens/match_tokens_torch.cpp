// SPDX-License-Identifier: Apache-2.0
#include <tuple>

#include "binding/registration.h"
#include "binding/run.h"
#include "binding/token_args.h"
#include "ops/match_tokens/match_tokens.h"

namespace kvevict {
namespace {

template <DeviceType device>
std::tuple<Tensor, Tensor> match_tokens(const Tensor& tokens, const Tensor& source_index,
                                        const Tensor& target_index,
                                        const std::optional<Tensor>& source_group,
                                        const std::optional<Tensor>& target_group, int64_t metric) {
  constexpr auto kAny = Check::kAny;
  const Check check("match_tokens", device);
  check.dtype(tokens, "tokens", {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
  check.shape(tokens, "tokens", {kAny, kAny, kAny, kAny});
  check.contiguous_last_dim(tokens, "tokens");
  const int64_t batch_size = tokens.size(0), num_heads = tokens.size(1);
  const int64_t num_tokens = tokens.size(2), dim = tokens.size(3);
  check.multiple_of_8(tokens, "tokens");
  const TokenListArgs sources =
      check_token_lists(check, source_index, "source_index", tokens, "tokens");
  const TokenListArgs targets =
      check_token_lists(check, target_index, "target_index", tokens, "tokens");
  if (source_group.has_value() != target_group.has_value()) {
    const bool has_source = source_group.has_value();
    check.fail(has_source ? "target_group" : "source_group",
               std::string("be given as ") + (has_source ? "source_group" : "target_group") + " is",
               "None");
  }
  TokenListArgs source_groups, target_groups;
  if (source_group) {
    source_groups =
        check_token_groups(check, *source_group, "source_group", sources, tokens, "tokens");
    target_groups =
        check_token_groups(check, *target_group, "target_group", targets, tokens, "tokens");
  }
  check.one_of(metric, "metric", {"COSINE", "DOT"});

  const int64_t num_sources = sources.lists.len;
  const Tensor match_index =
      new_empty(tokens, {batch_size, num_heads, num_sources}, ScalarType::Int);
  const Tensor similarity =
      new_empty(tokens, {batch_size, num_heads, num_sources}, ScalarType::Float);
  const MatchTokensParams params{
      head_tensor(tokens),
      sources.lists,
      targets.lists,
      source_groups.lists,
      target_groups.lists,
      dtype_of(tokens),
      static_cast<Metric>(metric),
      static_cast<int32_t*>(match_index.mutable_data_ptr()),
      static_cast<float*>(similarity.mutable_data_ptr()),
      batch_size,
      num_heads,
      num_tokens,
      dim,
  };
  run<MatchTokens, device>("match_tokens", params, match_index);
  return {match_index, similarity};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KVEVICT_NAMESPACE, m) {
  m.def(
      "match_tokens(Tensor tokens, Tensor source_index, Tensor target_index, *, "
      "Tensor? source_group=None, Tensor? target_group=None, int metric=0) -> (Tensor, Tensor)");
}

KVEVICT_IMPL(match_tokens)

}  // namespace kvevict
