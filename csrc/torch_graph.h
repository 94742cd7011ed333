// SPDX-License-Identifier: MIT
// What stands in autograd's graph, read where it lies.
#pragma once
#include <ATen/core/Tensor.h>

#include <set>
#include <string>
#include <vector>

namespace gs::binding {

// The names of the functions in Python that the losses depend on.
std::set<std::string> functions_behind(const std::vector<at::Tensor>& losses);

}  // namespace gs::binding
