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
  // None: the caller has to look closer, be it for an error.
  static std::optional<Lists> read(pybind11::handle rows);
  // Of a matrix [T, N], whose only parameter's direction is a tensor [N] in place of a list. It has no selections and
  // targets.
  static std::optional<Lists> read_matrix(pybind11::handle matrix);

  int64_t num_tasks() const { return grads_.num_tasks; }
  int64_t num_params() const { return static_cast<int64_t>(first_.size()); }
  at::Device device() const { return *grads_.device; }
  // Byte p: the number of tasks with a gradient of parameter p, at most kManyTasks.
  const std::string& counts() const { return counts_; }

  // Some of the parameters, in this order, with a segment for each (empty: one for all).
  Lists select(const std::vector<int64_t>& params, const std::vector<int64_t>& segments, int64_t num_segments) const;
  // Whether out is a list with a tensor like the gradients for each parameter; of a matrix, such a tensor. If apart,
  // none may overlap one of its gradients in part.
  bool fits(pybind11::handle out, bool apart) const;
  // Such a list, uninitialised, with None for a parameter without gradients; of a matrix, such a tensor.
  pybind11::object new_out() const;
  void gram(Tensor& out) const;
  void combine(const Tensor& weights, pybind11::handle out, bool accumulate) const;
  void combine_by_rule(const gs_rule& rule, pybind11::handle out, bool accumulate) const;
  // G and the weights; nothing of a matrix.
  std::optional<std::pair<Tensor, Tensor>> aggregate(const gs_solve& solve, pybind11::handle out,
                                                     bool accumulate) const;
  // For the directions of these parameters, which are `params` here: a list of tensors, whether to add to them, and the
  // set of places where a parameter's only gradient stands. Where no parameter has a .grad, the tensors are gradients
  // that nobody else holds, or new ones, else those of .grad. None: the caller has to see to it.
  pybind11::object targets(pybind11::handle parameters, const std::vector<int64_t>& params) const;

 private:
  static constexpr char kManyTasks = 127;

  struct Outputs {
    std::vector<pybind11::object> held;  // another thread may take them from the list while kernels run
    std::vector<void*> pointers;
  };

  PyObject* first_of(int64_t p) const;
  Outputs outputs_of(pybind11::handle out) const;

  Gradients grads_;
  bool flat_ = false;
  std::vector<PyObject*> first_;  // of each parameter's gradients, to compare others with; null where there is none
  std::string counts_;
  std::shared_ptr<const std::vector<pybind11::object>> held_;  // all gradients
};

// Whether any parameter's gradients, of lists as Lists::read takes them, begin at the same address. None: the caller
// has to look closer.
std::optional<bool> shares_memory(pybind11::handle rows);

// Makes each tensor of a list the .grad of its parameter; for lists that Lists::targets took and made.
void assign_grads(pybind11::handle parameters, pybind11::handle grads);

}  // namespace gs::binding
