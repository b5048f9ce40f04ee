// SPDX-License-Identifier: Apache-2.0
#include <vector>

#include "binding/in_place.h"
#include "binding/kv_args.h"
#include "binding/registration.h"
#include "binding/run.h"
#include "binding/token_args.h"
#include "core/validate.h"
#include "ops/merge_tokens/merge_tokens.h"

namespace kvevict {
namespace {

void check_tensors(const Check& check, const std::vector<Tensor>& tensors) {
  constexpr auto kAny = Check::kAny;
  check.at_least(static_cast<int64_t>(tensors.size()), "len(tensors)", 1);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    const Argument name("tensors", i);
    check.device(tensor, name, tensors[0], "tensors[0]");
    check.dtype(tensor, name, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
    if (i == 0) {
      check.shape(tensor, name, {kAny, kAny, kAny, kAny});
    } else {
      check.shape(tensor, name, {tensors[0].size(0), tensors[0].size(1), tensors[0].size(2), kAny});
    }
    check.contiguous_last_dim(tensor, name);
    check.multiple_of_8(tensor, name);
  }
}

// No token of a list is a merged source and a target.
void check_roles(const Check& check, const MergeTokensParams& params, const Tensor& match_index) {
  std::vector<bool> is_source(params.num_tokens + 1);
  for (int64_t list = 0; list < params.num_lists(); ++list) {
    const auto for_pairs = [&](auto&& f) {
      for (int64_t place = 0; place < params.num_sources(); ++place) {
        const MergePair pair = params.pair(list, place);
        if (pair.target < params.num_tokens) f(pair, place);
      }
    };
    is_source.assign(is_source.size(), false);
    for_pairs([&](MergePair pair, int64_t) { is_source[pair.source] = true; });
    for_pairs([&](MergePair pair, int64_t place) {
      if (!is_source[pair.target]) return;
      const int64_t heads = match_index.size(1);
      const int64_t lists = heads == 1 && !params.shares_lists() ? list / params.num_heads : list;
      check.fail("match_index", "not be a merged source",
                 element_text(match_index, lists * params.num_sources() + place, pair.target));
    });
  }
}

template <DeviceType device>
void merge_tokens_(const std::vector<Tensor>& tensors, const Tensor& source_index,
                   const Tensor& match_index, const Tensor& weight, bool normalize) {
  const Check check("merge_tokens_", device);
  check_tensors(check, tensors);
  const Tensor& tokens = tensors[0];
  const int64_t batch_size = tokens.size(0), num_heads = tokens.size(1);
  const int64_t num_tokens = tokens.size(2);
  const TokenListArgs sources =
      check_token_lists(check, source_index, "source_index", tokens, "tensors[0]");
  const TokenListArgs targets =
      check_token_lists(check, match_index, "match_index", tokens, "tensors[0]", sources.lists.len);
  check.companion(weight, "weight", ScalarType::Float, {batch_size, {num_heads, 1}, num_tokens},
                  tokens, "tensors[0]");
  const Tensor dense_weight = dense(weight);
  const auto* weights = static_cast<const float*>(dense_weight.const_data_ptr());
  if (check.reads_values()) {
    const Tensor host = on_host(dense_weight);
    const auto* values = static_cast<const float*>(host.const_data_ptr());
    const int64_t bad = find_not_finite(values, host.numel());
    if (bad >= 0) check.fail("weight", "be finite", element_text(host, bad, values[bad]));
  }

  MergeTokensParams params{
      nullptr,
      sources.lists,
      targets.lists,
      weights,
      weight.size(1) * num_tokens,
      weight.size(1) == 1 ? 0 : num_tokens,
      normalize,
      static_cast<int64_t>(tensors.size()),
      batch_size,
      num_heads,
      num_tokens,
  };
  if (check.reads_values()) {
    const TokenListArgs host_sources = on_host(sources), host_targets = on_host(targets);
    MergeTokensParams readable = params;
    readable.source_index = host_sources.lists;
    readable.match_index = host_targets.lists;
    check_roles(check, readable, *host_targets.tensor);
  }
  claim(check, tensors, element_names("tensors", tensors.size()),
        {{"source_index", sources.tensor},
         {"match_index", targets.tensor},
         {"weight", dense_weight}});

  std::vector<MergedTensor> merged;
  for (const Tensor& tensor : tensors) {
    merged.push_back({mutable_head_tensor(tensor), tensor.size(3), dtype_of(tensor)});
  }
  params.tensors = merged.data();
  run<MergeTokens, device>("merge_tokens_", params, tokens);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KVEVICT_NAMESPACE, m) {
  m.def(
      "merge_tokens_(Tensor(a!)[] tensors, Tensor source_index, Tensor match_index, Tensor weight, "
      "*, "
      "bool normalize=True) -> ()");
}

KVEVICT_IMPL(merge_tokens_)

}  // namespace kvevict
