// SPDX-License-Identifier: MIT
// What stands in autograd's graph, read where it lies: objects in Python for its nodes would outlive the walk.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace gs::binding {

// The names of the functions in Python that the losses depend on, and of those whole in C++.
std::set<std::string> functions_behind(const std::vector<at::Tensor>& losses);

// A tensor, and of a part of a torch.stack its place there, where the graph then begins at what was stacked.
using GraphRoot = std::pair<at::Tensor, std::optional<int64_t>>;

// The arguments of `Graph` in _graph.py.
pybind11::tuple read_graph(const std::vector<GraphRoot>& roots);

}  // namespace gs::binding
