// SPDX-License-Identifier: MIT
// The operators of the rules that work on the gradients themselves.
#include <torch/library.h>

#include "torch_lists.h"

namespace gs::binding {

gs_rule graddrop_rule(int64_t seed, const Tensor& step, const std::optional<Tensor>& leak, int64_t num_tasks,
                      const at::Device& device) {
  check_square_data(step, at::kLong, {}, device, "step");
  if (leak) check_square_data(*leak, at::kDouble, {num_tasks}, device, "leak");
  return {GS_GRADDROP, static_cast<uint64_t>(seed), step.mutable_data_ptr<int64_t>(),
          leak ? leak->const_data_ptr<double>() : nullptr, 0};
}

gs_rule trimmed_mean_rule(int64_t num_trimmed) { return {GS_TRIMMED_MEAN, 0, nullptr, nullptr, num_trimmed}; }

void run_combine_rows(const Gradients& grads, const gs_rule& rule, bool accumulate, std::vector<void*>& out) {
  if (!grads.device) return;  // no task has a gradient
  const gs_gradients view = grads.view();
  const Target target(*grads.device);
  const Tensor workspace = target.make_workspace(target.is_cuda() ? gs_combine_rows_cuda_workspace_bytes(&view)
                                                                  : gs_combine_rows_workspace_bytes(&view));
  void* space = workspace.mutable_data_ptr();
  const int64_t bytes = workspace.numel();
  check_status(target.is_cuda()
                   ? gs_combine_rows_cuda(&view, &rule, out.data(), accumulate, space, bytes, target.stream())
                   : gs_combine_rows_cpu(&view, &rule, out.data(), accumulate, space, bytes, &kTorchThreads));
}

namespace {

using EntryList = c10::List<std::optional<Tensor>>;

void graddrop(const Tensor& grads, int64_t seed, Tensor& step, const std::optional<Tensor>& leak, bool accumulate,
              Tensor& out) {
  const Gradients g = Gradients::from_matrix(grads, {});
  const gs_rule rule = graddrop_rule(seed, step, leak, g.num_tasks, grads.device());
  std::vector<void*> pointers = cut_out(g, grads, out);
  run_combine_rows(g, rule, accumulate, pointers);
}

void graddrop_list(const EntryList& grads, int64_t num_tasks, int64_t seed, Tensor& step,
                   const std::optional<Tensor>& leak, bool accumulate, at::TensorList out) {
  const Gradients g = Gradients::from_list(grads, num_tasks, {}, 1);
  const gs_rule rule = graddrop_rule(seed, step, leak, num_tasks, g.device.value_or(step.device()));
  std::vector<void*> pointers = pointers_to(g, grads, out);
  run_combine_rows(g, rule, accumulate, pointers);
}

void trimmed_mean(const Tensor& grads, int64_t num_trimmed, bool accumulate, Tensor& out) {
  const Gradients g = Gradients::from_matrix(grads, {});
  std::vector<void*> pointers = cut_out(g, grads, out);
  run_combine_rows(g, trimmed_mean_rule(num_trimmed), accumulate, pointers);
}

void trimmed_mean_list(const EntryList& grads, int64_t num_tasks, int64_t num_trimmed, bool accumulate,
                       at::TensorList out) {
  const Gradients g = Gradients::from_list(grads, num_tasks, {}, 1);
  std::vector<void*> pointers = pointers_to(g, grads, out);
  run_combine_rows(g, trimmed_mean_rule(num_trimmed), accumulate, pointers);
}

// Each finds its device by the tensors.
void register_operators(torch::Library& m) {
  m.impl("graddrop", &graddrop);
  m.impl("graddrop.list", &graddrop_list);
  m.impl("trimmed_mean", &trimmed_mean);
  m.impl("trimmed_mean.list", &trimmed_mean_list);
}

}  // namespace
}  // namespace gs::binding

TORCH_LIBRARY_FRAGMENT(gradsurgery, m) {
  m.def("graddrop(Tensor grads, int seed, Tensor(a!) step, Tensor? leak, bool accumulate, Tensor(b!) out) -> ()");
  m.def(
      "graddrop.list(Tensor?[] grads, int num_tasks, int seed, Tensor(a!) step, Tensor? leak, bool accumulate, "
      "Tensor(b!)[] out) -> ()");
  m.def("trimmed_mean(Tensor grads, int num_trimmed, bool accumulate, Tensor(a!) out) -> ()");
  m.def("trimmed_mean.list(Tensor?[] grads, int num_tasks, int num_trimmed, bool accumulate, Tensor(a!)[] out) -> ()");
}

TORCH_LIBRARY_IMPL(gradsurgery, CPU, m) { gs::binding::register_operators(m); }
TORCH_LIBRARY_IMPL(gradsurgery, CUDA, m) { gs::binding::register_operators(m); }
