// SPDX-License-Identifier: Apache-2.0
#include "binding/token_args.h"

namespace kvevict {
namespace {

TokenListArgs lists_of(const Tensor& tensor) {
  TokenListArgs args{{}, dense(tensor)};
  const int64_t heads = tensor.size(1), len = tensor.size(2);
  args.lists = {data_or_null<int32_t>(args.tensor), len, heads * len, heads == 1 ? 0 : len};
  return args;
}

// Tokens that there are not have no group.
void check_group_values(const Check& check, const TokenListArgs& groups, const Argument& argument,
                        const TokenListArgs& lists) {
  const TokenListArgs host_groups = on_host(groups), host_lists = on_host(lists);
  const Tensor& tensor = *host_groups.tensor;
  const int64_t len = groups.lists.len;
  const int32_t *index = host_lists.lists.data, *group = host_groups.lists.data;
  for (int64_t list = 0; list < tensor.numel(); list += len) {
    int32_t last = 0;
    for (int64_t i = list; i < list + len; ++i) {
      if (index[i] < 0) continue;
      if (group[i] < 0) check.fail(argument, "be at least 0", element_text(tensor, i, group[i]));
      if (group[i] < last) {
        check.fail(argument, "not descend",
                   element_text(tensor, i, group[i]) + " after " + std::to_string(last));
      }
      last = group[i];
    }
  }
}

}  // namespace

TokenListArgs on_host(const TokenListArgs& args) {
  TokenListArgs host{args.lists, on_host(*args.tensor)};
  host.lists.data = data_or_null<int32_t>(host.tensor);
  return host;
}

TokenListArgs check_token_lists(const Check& check, const Tensor& lists, const Argument& argument,
                                const Tensor& tokens, const Argument& tokens_name, int64_t len) {
  check.companion(lists, argument, ScalarType::Int, {tokens.size(0), {tokens.size(1), 1}, len},
                  tokens, tokens_name);
  TokenListArgs args = lists_of(lists);
  check.values_in_range(*args.tensor, argument, -1, tokens.size(2));
  return args;
}

TokenListArgs check_token_groups(const Check& check, const Tensor& groups, const Argument& argument,
                                 const TokenListArgs& lists, const Tensor& tokens,
                                 const Argument& tokens_name) {
  const auto sizes = lists.tensor->sizes();
  check.companion(groups, argument, ScalarType::Int, {sizes.begin(), sizes.end()}, tokens,
                  tokens_name);
  TokenListArgs args = lists_of(groups);
  if (check.reads_values()) check_group_values(check, args, argument, lists);
  return args;
}

}  // namespace kvevict
