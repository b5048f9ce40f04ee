// SPDX-License-Identifier: Apache-2.0
// The arguments that the moving ops share.
#pragma once

#include <optional>
#include <vector>

#include "binding/check.h"
#include "core/kv_layers.h"

namespace kvevict {

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

// list[0], list[1], …
std::vector<Argument> element_names(const char* list, size_t count);

// The same lists, where they can be read.
IndexArgs on_host(const IndexArgs& args);

// Lists for every layer, sequence and head of a shape, or lists that serve all layers:
// [num_layers | 1, batch_size, num_kv_heads | 1, k], or without the first dimension.
IndexArgs check_index_lists(const Check& check, const Tensor& lists, const Argument& argument,
                            const KvShape& shape, const Tensor& reference,
                            const Argument& reference_name);

// Numbers in the same arrangement, without k, as lists of one entry.
IndexArgs check_list_lens(const Check& check, const Tensor& lens, const Argument& argument,
                          const KvShape& shape, const Tensor& reference,
                          const Argument& reference_name);

// kv_lens: of each layer, or one for all. If values are read, every list must ascend within its
// layer.
IndexArgs check_kept_indices(const Check& check, const Tensor& kept_indices,
                             const std::optional<Tensor>& kept_lens, const KvShape& shape,
                             const std::vector<int64_t>& kv_lens, const Tensor& reference,
                             const Argument& reference_name);

// To be called when nothing else can refuse the call: keys and values, which will be written, share
// memory neither with each other nor with the lists, which are read meanwhile; autograd is told.
void claim_layers(const Check& check, const std::vector<Tensor>& keys,
                  const std::vector<Tensor>& values,
                  std::initializer_list<std::pair<Argument, std::optional<Tensor>>> lists);

}  // namespace kvevict
