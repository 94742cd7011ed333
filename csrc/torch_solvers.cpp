// SPDX-License-Identifier: MIT
// The operators of stage 3, and those of the rules that work on the gradients and need no stage 3.
#include <torch/library.h>

#include "solvers/philox.h"
#include "torch_binding.h"

namespace gs::binding {

gs_rule graddrop_rule(int64_t seed, const Tensor& step, const std::optional<Tensor>& leak, int64_t num_tasks,
                      const at::Device& device) {
  check_square_data(step, at::kLong, {}, device, "step");
  if (leak) check_square_data(*leak, at::kDouble, {num_tasks}, device, "leak");
  return {GS_GRADDROP, static_cast<uint64_t>(seed), written<int64_t>(step),
          leak ? leak->const_data_ptr<double>() : nullptr, 0};
}

gs_rule trimmed_mean_rule(int64_t num_trimmed) { return {GS_TRIMMED_MEAN, 0, nullptr, nullptr, num_trimmed}; }

void run_combine_by_rule(const Gradients& grads, const gs_rule& rule, bool accumulate, std::vector<void*>& out) {
  if (!grads.device) return;  // no task has a gradient
  const gs_gradients view = grads.view();
  const Target target(*grads.device);
  const Tensor workspace = target.make_workspace(target.is_cuda() ? gs_combine_by_rule_cuda_workspace_bytes(&view)
                                                                  : gs_combine_by_rule_workspace_bytes(&view));
  void* space = workspace.mutable_data_ptr();
  const int64_t bytes = workspace.numel();
  check_status(target.is_cuda()
                   ? gs_combine_by_rule_cuda(&view, &rule, out.data(), accumulate, space, bytes, target.stream())
                   : gs_combine_by_rule_cpu(&view, &rule, out.data(), accumulate, space, bytes, &kTorchThreads));
}

namespace {

void task_order(int64_t num_tasks, int64_t seed, const Tensor& step, Tensor& order) {
  check_square_data(order, at::kLong, {num_tasks, num_tasks}, order.device(), "order");
  check_square_data(step, at::kLong, {}, order.device(), "step");
  const Target target(order.device());
  const auto* now = step.const_data_ptr<int64_t>();
  auto* out = written<int64_t>(order);
  const auto key = static_cast<uint64_t>(seed);
  check_status(target.is_cuda() ? gs_task_order_cuda(num_tasks, key, now, out, target.stream())
                                : gs_task_order_cpu(num_tasks, key, static_cast<uint64_t>(*now), out));
}

void random(const Tensor& gram, int64_t seed, Tensor& step, Tensor& weights) {
  const auto [batch, num_tasks] = check_problems(gram, weights);
  check_square_data(step, at::kLong, {}, gram.device(), "step");
  const Target target(gram.device());
  const auto* g = gram.const_data_ptr<double>();
  auto* now = written<int64_t>(step);
  auto* out = written<double>(weights);
  const auto key = static_cast<uint64_t>(seed);
  check_status(target.is_cuda() ? gs_random_cuda(g, batch, num_tasks, key, now, out, target.stream())
                                : gs_random_cpu(g, batch, num_tasks, key, now, out));
}

void pcgrad(const Tensor& gram, const std::optional<Tensor>& order, int64_t seed, Tensor& step, bool advance, bool mean,
            Tensor& weights) {
  const auto [batch, num_tasks] = check_problems(gram, weights);
  if (order) check_square_data(*order, at::kLong, {num_tasks, num_tasks}, gram.device(), "order");
  check_square_data(step, at::kLong, {}, gram.device(), "step");
  const Target target(gram.device());
  const auto* g = gram.const_data_ptr<double>();
  const auto* visit = order ? order->const_data_ptr<int64_t>() : nullptr;
  auto* now = written<int64_t>(step);
  auto* out = written<double>(weights);
  const auto key = static_cast<uint64_t>(seed);
  if (target.is_cuda()) {
    return check_status(gs_pcgrad_cuda(g, batch, num_tasks, visit, key, now, advance, mean, out, target.stream()));
  }
  check_status(gs_pcgrad_cpu(g, batch, num_tasks, visit, key, static_cast<uint64_t>(*now), mean, out, &kTorchThreads));
  if (advance) *now = next_step(*now);
}

void min_norm(const Tensor& gram, bool exact, int64_t max_iter, double tol, Tensor& weights) {
  const auto [batch, num_tasks] = check_problems(gram, weights);
  const Target target(gram.device());
  const Tensor workspace = target.make_workspace(target.is_cuda() ? gs_min_norm_cuda_workspace_bytes(batch, num_tasks)
                                                                  : gs_min_norm_workspace_bytes(batch, num_tasks));
  const auto* g = gram.const_data_ptr<double>();
  auto* out = written<double>(weights);
  void* space = workspace.mutable_data_ptr();
  const int64_t bytes = workspace.numel();
  const gs_solver solver = exact ? GS_EXACT : GS_FRANK_WOLFE;
  check_status(target.is_cuda()
                   ? gs_min_norm_cuda(g, batch, num_tasks, solver, max_iter, tol, out, space, bytes, target.stream())
                   : gs_min_norm_cpu(g, batch, num_tasks, solver, max_iter, tol, out, space, bytes, &kTorchThreads));
}

void weights_of(const Tensor& gram, int64_t method, const std::optional<Tensor>& preference, double parameter,
                double limit, Tensor& weights) {
  const auto [batch, num_tasks] = check_problems(gram, weights);
  if (preference) check_square_data(*preference, at::kDouble, {num_tasks}, gram.device(), "preference");
  const Target target(gram.device());
  const auto solver = weighting_of(method);
  const Tensor workspace =
      target.make_workspace(target.is_cuda() ? gs_weights_cuda_workspace_bytes(solver, batch, num_tasks)
                                             : gs_weights_workspace_bytes(solver, batch, num_tasks));
  const auto* g = gram.const_data_ptr<double>();
  const auto* given = preference ? preference->const_data_ptr<double>() : nullptr;
  auto* out = written<double>(weights);
  void* space = workspace.mutable_data_ptr();
  const int64_t bytes = workspace.numel();
  check_status(
      target.is_cuda()
          ? gs_weights_cuda(g, batch, num_tasks, solver, given, parameter, limit, out, space, bytes, target.stream())
          : gs_weights_cpu(g, batch, num_tasks, solver, given, parameter, limit, out, space, bytes, &kTorchThreads));
}

void simplex_steps(const Tensor& matrix, double lr, double momentum, int64_t num_iter, Tensor& weights) {
  const auto [batch, num_tasks] = check_problems(matrix, weights, "matrix");
  const Target target(matrix.device());
  const Tensor workspace =
      target.make_workspace(target.is_cuda() ? gs_simplex_steps_cuda_workspace_bytes(batch, num_tasks)
                                             : gs_simplex_steps_workspace_bytes(batch, num_tasks));
  const auto* a = matrix.const_data_ptr<double>();
  auto* w = written<double>(weights);
  void* space = workspace.mutable_data_ptr();
  const int64_t bytes = workspace.numel();
  check_status(
      target.is_cuda()
          ? gs_simplex_steps_cuda(a, batch, num_tasks, lr, momentum, num_iter, w, space, bytes, target.stream())
          : gs_simplex_steps_cpu(a, batch, num_tasks, lr, momentum, num_iter, w, space, bytes, &kTorchThreads));
}

void gradvac(const Tensor& gram, const Tensor& order, double beta, Tensor& targets, Tensor& weights) {
  const auto [batch, num_tasks] = check_problems(gram, weights);
  check_square_data(order, at::kLong, {num_tasks, num_tasks}, gram.device(), "order");
  check_square_data(targets, at::kDouble, gram.sizes(), gram.device(), "targets");
  const Target target(gram.device());
  const auto* g = gram.const_data_ptr<double>();
  const auto* visit = order.const_data_ptr<int64_t>();
  auto *wanted = written<double>(targets), *out = written<double>(weights);
  check_status(target.is_cuda() ? gs_gradvac_cuda(g, batch, num_tasks, visit, beta, wanted, out, target.stream())
                                : gs_gradvac_cpu(g, batch, num_tasks, visit, beta, wanted, out, &kTorchThreads));
}

void gradnorm(const Tensor& weights, const Tensor& norms, const Tensor& losses, const Tensor& initial_losses,
              double alpha, double lr, Tensor& new_weights) {
  TORCH_CHECK_VALUE(weights.dim() >= 1 && weights.size(-1) >= 1,
                    message("weights must be [..., T], got ", weights.sizes()));
  const at::Device device = weights.device();
  check_square_data(weights, at::kDouble, weights.sizes(), device, "weights");
  check_square_data(norms, at::kDouble, weights.sizes(), device, "norms");
  check_square_data(losses, at::kDouble, weights.sizes(), device, "losses");
  check_square_data(initial_losses, at::kDouble, weights.sizes(), device, "initial_losses");
  check_square_data(new_weights, at::kDouble, weights.sizes(), device, "new_weights");
  const Target target(device);
  const auto *w = weights.const_data_ptr<double>(), *n = norms.const_data_ptr<double>();
  const auto *now = losses.const_data_ptr<double>(), *first = initial_losses.const_data_ptr<double>();
  auto* out = written<double>(new_weights);
  const int64_t tasks = weights.size(-1), batch = weights.numel() / tasks;
  check_status(target.is_cuda() ? gs_gradnorm_cuda(w, n, now, first, batch, tasks, alpha, lr, out, target.stream())
                                : gs_gradnorm_cpu(w, n, now, first, batch, tasks, alpha, lr, out));
}

void gradnorm_step(const Tensor& gram, const Tensor& losses, double alpha, double lr, Tensor& state_weights,
                   Tensor& initial_losses, Tensor& weights) {
  const auto [batch, num_tasks] = check_problems(gram, weights);
  const at::Device device = gram.device();
  check_square_data(losses, at::kDouble, weights.sizes(), device, "losses");
  check_square_data(state_weights, at::kDouble, weights.sizes(), device, "state_weights");
  check_square_data(initial_losses, at::kDouble, weights.sizes(), device, "initial_losses");
  const Target target(device);
  const auto *g = gram.const_data_ptr<double>(), *now = losses.const_data_ptr<double>();
  auto *state = written<double>(state_weights), *first = written<double>(initial_losses);
  auto* out = written<double>(weights);
  check_status(target.is_cuda()
                   ? gs_gradnorm_step_cuda(g, now, batch, num_tasks, alpha, lr, state, first, out, target.stream())
                   : gs_gradnorm_step_cpu(g, now, batch, num_tasks, alpha, lr, state, first, out));
}

using EntryList = c10::List<std::optional<Tensor>>;

void graddrop(const Tensor& grads, int64_t seed, Tensor& step, const std::optional<Tensor>& leak, bool accumulate,
              Tensor& out) {
  const Gradients g = Gradients::from_matrix(grads, {});
  const gs_rule rule = graddrop_rule(seed, step, leak, g.num_tasks, grads.device());
  std::vector<void*> pointers = cut_out(g, grads, out);
  run_combine_by_rule(g, rule, accumulate, pointers);
}

void graddrop_list(const EntryList& grads, int64_t num_tasks, int64_t seed, Tensor& step,
                   const std::optional<Tensor>& leak, bool accumulate, at::TensorList out) {
  const Gradients g = Gradients::from_list(grads, num_tasks, {}, 1);
  const gs_rule rule = graddrop_rule(seed, step, leak, num_tasks, g.device.value_or(step.device()));
  std::vector<void*> pointers = pointers_to(g, grads, out);
  run_combine_by_rule(g, rule, accumulate, pointers);
}

void trimmed_mean(const Tensor& grads, int64_t num_trimmed, bool accumulate, Tensor& out) {
  const Gradients g = Gradients::from_matrix(grads, {});
  std::vector<void*> pointers = cut_out(g, grads, out);
  run_combine_by_rule(g, trimmed_mean_rule(num_trimmed), accumulate, pointers);
}

void trimmed_mean_list(const EntryList& grads, int64_t num_tasks, int64_t num_trimmed, bool accumulate,
                       at::TensorList out) {
  const Gradients g = Gradients::from_list(grads, num_tasks, {}, 1);
  std::vector<void*> pointers = pointers_to(g, grads, out);
  run_combine_by_rule(g, trimmed_mean_rule(num_trimmed), accumulate, pointers);
}

// The same functions serve the CPU and CUDA dispatch keys: each checks where its tensors are.
void register_operators(torch::Library& m) {
  m.impl("task_order", &task_order);
  m.impl("random", &random);
  m.impl("pcgrad", &pcgrad);
  m.impl("min_norm", &min_norm);
  m.impl("weights", &weights_of);
  m.impl("simplex_steps", &simplex_steps);
  m.impl("gradvac", &gradvac);
  m.impl("gradnorm", &gradnorm);
  m.impl("gradnorm_step", &gradnorm_step);
  m.impl("graddrop", &graddrop);
  m.impl("graddrop.list", &graddrop_list);
  m.impl("trimmed_mean", &trimmed_mean);
  m.impl("trimmed_mean.list", &trimmed_mean_list);
}

}  // namespace
}  // namespace gs::binding

TORCH_LIBRARY_FRAGMENT(gradsurgery, m) {
  m.def("task_order(int num_tasks, int seed, Tensor step, Tensor(a!) order) -> ()");
  m.def("random(Tensor gram, int seed, Tensor(a!) step, Tensor(b!) weights) -> ()");
  m.def(
      "pcgrad(Tensor gram, Tensor? order, int seed, Tensor(a!) step, bool advance, bool mean, Tensor(b!) weights) -> "
      "()");
  m.def("min_norm(Tensor gram, bool exact, int max_iter, float tol, Tensor(a!) weights) -> ()");
  m.def(
      "weights(Tensor gram, int method, Tensor? preference, float parameter, float limit, Tensor(a!) weights) -> "
      "()");
  m.def("simplex_steps(Tensor matrix, float lr, float momentum, int num_iter, Tensor(a!) weights) -> ()");
  m.def("gradvac(Tensor gram, Tensor order, float beta, Tensor(a!) targets, Tensor(b!) weights) -> ()");
  m.def(
      "gradnorm(Tensor weights, Tensor norms, Tensor losses, Tensor initial_losses, float alpha, float lr, "
      "Tensor(a!) new_weights) -> ()");
  m.def(
      "gradnorm_step(Tensor gram, Tensor losses, float alpha, float lr, Tensor(a!) state_weights, "
      "Tensor(b!) initial_losses, Tensor(c!) weights) -> ()");
  m.def("graddrop(Tensor grads, int seed, Tensor(a!) step, Tensor? leak, bool accumulate, Tensor(b!) out) -> ()");
  m.def(
      "graddrop.list(Tensor?[] grads, int num_tasks, int seed, Tensor(a!) step, Tensor? leak, bool accumulate, "
      "Tensor(b!)[] out) -> ()");
  m.def("trimmed_mean(Tensor grads, int num_trimmed, bool accumulate, Tensor(a!) out) -> ()");
  m.def("trimmed_mean.list(Tensor?[] grads, int num_tasks, int num_trimmed, bool accumulate, Tensor(a!)[] out) -> ()");
}

TORCH_LIBRARY_IMPL(gradsurgery, CPU, m) { gs::binding::register_operators(m); }
TORCH_LIBRARY_IMPL(gradsurgery, CUDA, m) { gs::binding::register_operators(m); }
