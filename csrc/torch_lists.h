// SPDX-License-Identifier: MIT
// Task gradients as T Python lists of P tensors, or as a matrix, for calls from Python outside torch's dispatcher.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "torch_binding.h"

namespace gs::binding {

class Lists {
 public:
  // Returns nothing if the lists are unusual: the caller must take the slower path, which also reports errors.
  static std::optional<Lists> read(pybind11::handle rows);
  // Reads a matrix [T, N]. It counts as one parameter, and its direction is a tensor [N] instead of a list. select()
  // and targets() do not work for it.
  static std::optional<Lists> read_matrix(pybind11::handle matrix);

  int64_t num_tasks() const { return grads_.num_tasks; }
  int64_t num_params() const { return static_cast<int64_t>(first_.size()); }
  at::Device device() const { return *grads_.device; }
  // Byte p: the number of tasks that have a gradient of parameter p; larger numbers count as kManyTasks.
  const std::string& counts() const { return counts_; }

  // The parameters named in params, in that order, with a segment for each (empty: one segment for all).
  Lists select(const std::vector<int64_t>& params, const std::vector<int64_t>& segments, int64_t num_segments) const;
  // Whether out is a list with a tensor like the gradients for each parameter; for a matrix, whether it is one such
  // tensor. If apart, a tensor must not overlap one of its gradients in part.
  bool fits(pybind11::handle out, bool apart) const;
  // A new, uninitialised list of that kind, with None for a parameter without gradients; for a matrix, a tensor.
  pybind11::object new_out() const;
  void gram(Tensor& out) const;
  void combine(const Tensor& weights, pybind11::handle out, bool accumulate) const;
  void combine_by_rule(const gs_rule& rule, pybind11::handle out, bool accumulate) const;
  // Returns G and the weights; for a matrix, nothing.
  std::optional<std::pair<Tensor, Tensor>> aggregate(const gs_solve& solve, pybind11::handle out,
                                                     bool accumulate) const;
  // Where to write the directions of these parameters, whose numbers here are `params`. Returns a list of tensors,
  // whether to add to them, and the set of places in the list that already hold a parameter's only gradient. If no
  // parameter has a .grad, the tensors are gradients that nobody else holds, or new ones; otherwise they are the .grad
  // tensors, or zeros. Returns None if the caller must handle the case itself.
  pybind11::object targets(pybind11::handle parameters, const std::vector<int64_t>& params) const;

 private:
  static constexpr char kManyTasks = 127;

  struct Outputs {
    std::vector<pybind11::object> held;  // keeps them alive: another thread may change the list while kernels run
    std::vector<void*> pointers;
  };

  PyObject* first_of(int64_t p) const;
  Outputs outputs_of(pybind11::handle out) const;

  Gradients grads_;
  bool flat_ = false;
  std::vector<PyObject*> first_;  // the first gradient of each parameter, to compare others with; null if there is none
  std::string counts_;
  std::shared_ptr<const std::vector<pybind11::object>> held_;  // all gradients
};

// Whether two gradients of one parameter, in lists as for Lists::read, begin at the same address. Returns nothing if
// the caller must take the slower path.
std::optional<bool> shares_memory(pybind11::handle rows);

// Makes each tensor of `grads` the .grad of its parameter; for the parameters and the list of a Lists::targets call.
void assign_grads(pybind11::handle parameters, pybind11::handle grads);

}  // namespace gs::binding
