// SPDX-License-Identifier: Apache-2.0
// What autograd has to know of an op that writes its arguments.
#pragma once

#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "binding/check.h"

namespace kvevict {

// To be called when nothing can refuse the call anymore: raises the version counters of tensors
// that will be written, so that a backward that saved one of them fails. Throws
// std::runtime_error, with torch's words, for a tensor that autograd does not let anyone write.
void announce_writes(const char* op, const std::vector<Tensor>& tensors,
                     const std::vector<Argument>& names);

// The last check of an op in place: tensors that will be written share memory neither with each
// other nor with what is read meanwhile, and autograd is told.
void claim(const Check& check, const std::vector<Tensor>& written, std::vector<Argument> names,
           std::initializer_list<std::pair<Argument, std::optional<Tensor>>> read);

}  // namespace kvevict
