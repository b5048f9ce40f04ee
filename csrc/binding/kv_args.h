// SPDX-License-Identifier: Apache-2.0
// The arguments that the moving ops share.
#pragma once

#include <optional>
#include <vector>

#include "binding/check.h"
#include "core/kv_layers.h"

namespace kvevict {

// Names of list elements, "keys[3]", for messages.
std::vector<std::string> element_names(const std::string& list, size_t count);

// Checks lists of layers; all keys, then all values, as tensors of bytes. What will be written is
// asked for as such, so that a copy-on-write tensor gets memory of its own.
enum class Access : bool { kRead, kWrite };
std::vector<KvTensor> check_kv_layers(const Check& check, const std::vector<Tensor>& keys,
                                      const std::vector<Tensor>& values, Access access);
std::vector<KvTensor> kv_tensors(const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                                 Access access);

struct IndexArgs {
  IndexLists lists;
  Tensor indices;  // keep the pointers of lists alive
  std::optional<Tensor> lens;
};

// kv_lens: of each layer, or one for all. If values are read, every list must ascend within its
// layer.
IndexArgs check_kept_indices(const Check& check, const Tensor& kept_indices,
                             const std::optional<Tensor>& kept_lens, const KvShape& shape,
                             const std::vector<int64_t>& kv_lens, const Tensor& reference,
                             const std::string& reference_name);

}  // namespace kvevict
