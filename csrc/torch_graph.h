// SPDX-License-Identifier: MIT
// Reads autograd's graph in C++, as Python objects made for its nodes would outlive the walk.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace gs::binding {

// The names of the autograd functions in Python that the losses depend on, and of those in C++ that may stand for
// several operations.
std::set<std::string> functions_behind(const std::vector<at::Tensor>& losses);

// A tensor, and for a part of a torch.stack its place in that; the graph then begins at the tensor that was stacked.
using GraphRoot = std::pair<at::Tensor, std::optional<int64_t>>;

// The arguments of `Graph` in _graph.py.
pybind11::tuple read_graph(const std::vector<GraphRoot>& roots);

}  // namespace gs::binding
