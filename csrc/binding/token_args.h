// SPDX-License-Identifier: Apache-2.0
// The arguments that the ops on tokens share.
#pragma once

#include <optional>

#include "binding/check.h"
#include "core/token_lists.h"

namespace kvevict {

struct TokenListArgs {
  TokenLists lists{};
  std::optional<Tensor> tensor;  // keeps lists.data alive
};

// The same lists, where they can be read.
TokenListArgs on_host(const TokenListArgs& args);

// Lists [batch_size, num_heads | 1, len], of any len if that is Check::kAny, beside tokens
// [batch_size, num_heads, num_tokens, dim], the op's first tensor. If values are read, they
// are positions or -1.
TokenListArgs check_token_lists(const Check& check, const Tensor& lists, const Argument& argument,
                                const Tensor& tokens, const Argument& tokens_name,
                                int64_t len = Check::kAny);

// Groups of the tokens of a list, of its shape. If values are read, those of tokens that there
// are must not be negative and must not descend.
TokenListArgs check_token_groups(const Check& check, const Tensor& groups, const Argument& argument,
                                 const TokenListArgs& lists, const Tensor& tokens,
                                 const Argument& tokens_name);

}  // namespace kvevict
