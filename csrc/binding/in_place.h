// SPDX-License-Identifier: Apache-2.0
// What autograd has to know of an op that writes its arguments.
#pragma once

#include <vector>

#include "binding/check.h"

namespace kvevict {

// To be called when nothing can refuse the call anymore: raises the version counters of tensors
// that will be written, so that a backward that saved one of them fails. Throws
// std::runtime_error, with torch's words, for a tensor that autograd does not let anyone write.
void announce_writes(const char* op, const std::vector<Tensor>& tensors,
                     const std::vector<Argument>& names);

}  // namespace kvevict
