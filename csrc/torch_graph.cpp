// SPDX-License-Identifier: MIT
#include "torch_graph.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <cstring>
#include <typeinfo>
#include <unordered_set>

namespace gs::binding {

std::set<std::string> functions_behind(const std::vector<at::Tensor>& losses) {
  using torch::autograd::Node;
  std::set<std::string> names;
  std::unordered_set<const Node*> seen;
  std::vector<Node*> left;
  const auto visit = [&](Node* node) {
    if (node && seen.insert(node).second) left.push_back(node);
  };
  for (const at::Tensor& loss : losses) visit(loss.grad_fn().get());
  while (!left.empty()) {
    Node* const node = left.back();
    left.pop_back();
    // By name, as the class is not part of torch's interface. Of other nodes name() is slow.
    if (std::strstr(typeid(*node).name(), "PyNode")) names.insert(node->name());
    for (const auto& edge : node->next_edges()) visit(edge.function.get());
  }
  return names;
}

}  // namespace gs::binding
