// SPDX-License-Identifier: MIT
#include "torch_graph.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/variable.h>

#include <cstring>
#include <typeindex>
#include <typeinfo>
#include <unordered_map>
#include <unordered_set>

namespace gs::binding {
namespace {

using torch::autograd::Edge;
using torch::autograd::Node;

// Tells by the type's name, as the class is not part of torch's interface; node.name() would be slow for other nodes.
bool is_in_python(const Node& node) { return std::strstr(typeid(node).name(), "PyNode") != nullptr; }

// Whether the node is a function in C++ with several outputs that may stand for several operations: an extension's
// autograd function, or one of TorchScript.
bool is_whole_in_cpp(const Node& node) {
  if (node.num_inputs() < 2) return false;
  const char* const name = typeid(node).name();
  return std::strstr(name, "CppNode") || std::strstr(name, "DifferentiableGraphBackward");
}

Edge edge_of(const GraphRoot& root) {
  const auto& [tensor, place] = root;
  return place ? tensor.grad_fn()->next_edge(0).function->next_edge(*place)
               : torch::autograd::impl::gradient_edge(tensor);
}

class Reader {
 public:
  // The number of the node that an edge leads to (-1 if there is none), and which of its outputs. It must have been
  // read.
  std::pair<int64_t, int64_t> number(const Edge& edge) const {
    return {edge.function ? numbers_.at(edge.function.get()) : -1, edge.input_nr};
  }

  // Read all nodes that can be reached through the edge; each comes after the nodes that its own edges lead to.
  void read(const Edge& start) {
    enter(start);
    while (!path_.empty()) {
      auto& [edge, next] = path_.back();
      if (next < edge->function->num_outputs()) {
        enter(edge->function->next_edge(next++));
      } else {
        add(*edge);
        path_.pop_back();
      }
    }
  }

  pybind11::list names;
  pybind11::list edges;
  pybind11::dict leaves;
  pybind11::dict functions;

 private:
  void enter(const Edge& edge) {
    if (edge.function && numbers_.emplace(edge.function.get(), -1).second) path_.emplace_back(&edge, 0);
  }

  void add(const Edge& edge) {
    const Node& node = *edge.function;
    const auto number_of_node = static_cast<int64_t>(names.size());
    numbers_[&node] = number_of_node;
    names.append(name_of(node));
    const size_t count = node.num_outputs();
    pybind11::tuple inputs(count);
    for (size_t i = 0; i < count; i++) inputs[i] = pybind11::cast(number(node.next_edge(i)));
    edges.append(std::move(inputs));
    if (const auto* leaf = dynamic_cast<const torch::autograd::AccumulateGrad*>(&node)) {
      leaves[pybind11::cast(number_of_node)] = leaf->variable;
    } else if (is_in_python(node)) {
      functions[pybind11::cast(number_of_node)] =
          pybind11::reinterpret_steal<pybind11::object>(torch::autograd::functionToPyObject(edge.function));
    }
  }

  // The name of the node's type in Python, without the namespace.
  pybind11::str name_of(const Node& node) {
    if (is_in_python(node)) return node.name();
    const auto [found, is_new] = type_names_.try_emplace(typeid(node));
    if (is_new) {
      const std::string name = node.name();
      found->second = name.substr(name.rfind(':') + 1);
    }
    return found->second;
  }

  std::unordered_map<const Node*, int64_t> numbers_;
  std::unordered_map<std::type_index, pybind11::str> type_names_;
  // The path of the depth-first walk: each edge, and the number of its node's next edge to follow.
  std::vector<std::pair<const Edge*, size_t>> path_;
};

}  // namespace

std::set<std::string> functions_behind(const std::vector<at::Tensor>& losses) {
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
    if (is_in_python(*node)) names.insert(node->name());
    if (is_whole_in_cpp(*node)) names.insert(typeid(*node).name());
    for (const auto& edge : node->next_edges()) visit(edge.function.get());
  }
  return names;
}

pybind11::tuple read_graph(const std::vector<GraphRoot>& roots) {
  std::vector<Edge> starts;  // own the nodes: that of a leaf may have no other owner
  for (const GraphRoot& root : roots) starts.push_back(edge_of(root));
  Reader reader;
  std::vector<std::pair<int64_t, int64_t>> numbers;
  for (const Edge& start : starts) {
    reader.read(start);
    numbers.push_back(reader.number(start));
  }
  return pybind11::make_tuple(numbers, reader.names, reader.edges, reader.leaves, reader.functions);
}

}  // namespace gs::binding
