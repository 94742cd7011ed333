// SPDX-License-Identifier: MIT
// The torch operators on top of the C boundary. Each writes into outputs that the caller allocated and returns nothing,
// so torch.compile needs no fake kernel. Error messages for users come from the Python stages.
#include "torch_binding.h"

#include <torch/library.h>

#include "torch_graph.h"
#include "torch_lists.h"

namespace gs::binding {

void run_gram(const Gradients& grads, Tensor& gram) {
  const gs_gradients view = grads.view();
  const at::Device device = grads.device.value_or(gram.device());
  if (gram.dim() == 2 && view.num_segments == 1) {
    check_square_data(gram, at::kDouble, {view.num_tasks, view.num_tasks}, device, "gram");
  } else {
    check_square_data(gram, at::kDouble, {view.num_segments, view.num_tasks, view.num_tasks}, device, "gram");
  }
  const Target target(device);
  auto* out = written<double>(gram);
  const Tensor workspace =
      target.make_workspace(target.is_cuda() ? gs_gram_cuda_workspace_bytes(&view) : gs_gram_workspace_bytes(&view));
  void* space = workspace.mutable_data_ptr();
  check_status(target.is_cuda() ? gs_gram_cuda(&view, out, space, workspace.numel(), target.stream())
                                : gs_gram_cpu(&view, out, space, workspace.numel(), &kTorchThreads));
}

void run_combine(const Gradients& grads, const Tensor& weights, bool accumulate, std::vector<void*>& out) {
  const gs_gradients view = grads.view();
  const at::Device device = grads.device.value_or(weights.device());
  if (weights.dim() == 1 && view.num_segments == 1) {
    check_square_data(weights, at::kDouble, {view.num_tasks}, device, "weights");
  } else {
    check_square_data(weights, at::kDouble, {view.num_segments, view.num_tasks}, device, "weights");
  }
  const Target target(device);
  const auto* w = weights.const_data_ptr<double>();
  const Tensor workspace = target.make_workspace(target.is_cuda() ? gs_combine_cuda_workspace_bytes(&view)
                                                                  : gs_combine_workspace_bytes(&view));
  void* space = workspace.mutable_data_ptr();
  check_status(target.is_cuda()
                   ? gs_combine_cuda(&view, w, out.data(), accumulate, space, workspace.numel(), target.stream())
                   : gs_combine_cpu(&view, w, out.data(), accumulate, space, workspace.numel(), &kTorchThreads));
}

gs_solve pcgrad_solve(int64_t seed, const std::optional<Tensor>& step, bool mean, const at::Device& device) {
  if (step) check_square_data(*step, at::kLong, {}, device, "step");
  gs_solve solve = {};
  solve.method = GS_PCGRAD;
  solve.seed = static_cast<uint64_t>(seed);
  solve.step = step ? written<int64_t>(*step) : nullptr;
  solve.mean = mean;
  return solve;
}

gs_solve min_norm_solve(bool exact, int64_t max_iter, double tol) {
  gs_solve solve = {};
  solve.method = GS_MIN_NORM;
  solve.solver = exact ? GS_EXACT : GS_FRANK_WOLFE;
  solve.max_iter = max_iter;
  solve.tol = tol;
  return solve;
}

gs_solve weighting_solve(int64_t method, const std::optional<Tensor>& preference, double parameter, double limit,
                         int64_t num_tasks, const at::Device& device) {
  if (preference) check_square_data(*preference, at::kDouble, {num_tasks}, device, "preference");
  gs_solve solve = {};
  solve.method = GS_WEIGHTING;
  solve.weighting = weighting_of(method);
  solve.preference = preference ? preference->const_data_ptr<double>() : nullptr;
  solve.parameter = parameter;
  solve.limit = limit;
  return solve;
}

namespace {

int64_t aggregate_workspace_bytes(const gs_gradients& view, const gs_solve& solve, const Target& target) {
  return target.is_cuda() ? gs_aggregate_cuda_workspace_bytes(&view, &solve)
                          : gs_aggregate_workspace_bytes(&view, &solve);
}

void aggregate_into(double* gram, double* weights, void* space, int64_t bytes, const gs_gradients& view,
                    const gs_solve& solve, bool accumulate, std::vector<void*>& out, const Target& target) {
  check_status(
      target.is_cuda()
          ? gs_aggregate_cuda(&view, &solve, gram, weights, out.data(), accumulate, space, bytes, target.stream())
          : gs_aggregate_cpu(&view, &solve, gram, weights, out.data(), accumulate, space, bytes, &kTorchThreads));
}

}  // namespace

std::pair<Tensor, Tensor> run_aggregate(const Gradients& grads, const gs_solve& solve, bool accumulate,
                                        std::vector<void*>& out) {
  const auto options = at::TensorOptions().dtype(at::kDouble).device(*grads.device);
  const Tensor gram = at::empty({grads.num_segments, grads.num_tasks, grads.num_tasks}, options);
  const Tensor weights = at::empty({grads.num_segments, grads.num_tasks}, options);
  const gs_gradients view = grads.view();
  const Target target(*grads.device);
  const Tensor workspace = target.make_workspace(aggregate_workspace_bytes(view, solve, target));
  aggregate_into(written<double>(gram), written<double>(weights), workspace.mutable_data_ptr(), workspace.numel(), view,
                 solve, accumulate, out, target);
  return {gram, weights};
}

void run_aggregate_alone(const Gradients& grads, const gs_solve& solve, bool accumulate, std::vector<void*>& out) {
  const gs_gradients view = grads.view();
  const Target target(*grads.device);
  const int64_t bytes = aggregate_workspace_bytes(view, solve, target);
  TORCH_CHECK_VALUE(bytes >= 0, gs_last_error());
  // One allocation for G, the weights and, from a 64-byte boundary on, the workspace.
  const int64_t gram_size = grads.num_segments * grads.num_tasks * grads.num_tasks;
  const int64_t begin = (gram_size + grads.num_segments * grads.num_tasks + 7) / 8 * 8;
  const Tensor space = target.make_workspace(begin * int64_t{sizeof(double)} + bytes);
  auto* const gram = static_cast<double*>(space.mutable_data_ptr());
  aggregate_into(gram, gram + gram_size, gram + begin, bytes, view, solve, accumulate, out, target);
}

std::vector<void*> cut_out(const Gradients& g, const Tensor& grads, Tensor& out) {
  check_square_data(out, grads.scalar_type(), {grads.size(1)}, grads.device(), "out");
  std::vector<void*> pointers;
  auto* next = written<char>(out);
  for (const int64_t elements : g.numel) {
    pointers.push_back(next);
    next += elements * out.element_size();
  }
  return pointers;
}

std::vector<void*> pointers_to(const Gradients& g, const c10::List<std::optional<Tensor>>& grads, at::TensorList out) {
  const auto params = static_cast<int64_t>(out.size());
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(g.numel.size()) == params,
      message("out must hold one tensor per parameter, got ", params, " for ", static_cast<int64_t>(g.numel.size())));
  std::vector<void*> pointers;
  for (int64_t p = 0; p < params; p++) {
    for (int64_t t = 0; t < g.num_tasks; t++) {
      const std::optional<Tensor> entry = grads.get(t * params + p);
      if (entry && entry->defined()) Gradients::check_same_layout(out[p], *entry, p);
    }
    TORCH_CHECK_VALUE(out[p].numel() == g.numel[p],
                      message("out ", p, " must hold ", g.numel[p], " elements, got ", out[p].numel()));
    pointers.push_back(written(out[p]));
  }
  return pointers;
}

namespace {

void combine(const Tensor& grads, const Tensor& weights, at::IntArrayRef offsets, bool accumulate, Tensor& out) {
  const Gradients g = Gradients::from_matrix(grads, offsets);
  std::vector<void*> pointers = cut_out(g, grads, out);
  run_combine(g, weights, accumulate, pointers);
}

void aggregate(const Gradients& g, const Tensor& grads, const gs_solve& solve, Tensor& out) {
  std::vector<void*> pointers = cut_out(g, grads, out);
  run_aggregate_alone(g, solve, /*accumulate=*/false, pointers);
}

void aggregate_pcgrad(const Tensor& grads, at::IntArrayRef offsets, int64_t seed, const std::optional<Tensor>& step,
                      bool mean, Tensor& out) {
  const Gradients g = Gradients::from_matrix(grads, offsets);
  aggregate(g, grads, pcgrad_solve(seed, step, mean, grads.device()), out);
}

void aggregate_min_norm(const Tensor& grads, at::IntArrayRef offsets, bool exact, int64_t max_iter, double tol,
                        Tensor& out) {
  const Gradients g = Gradients::from_matrix(grads, offsets);
  aggregate(g, grads, min_norm_solve(exact, max_iter, tol), out);
}

void aggregate_weights(const Tensor& grads, at::IntArrayRef offsets, int64_t method,
                       const std::optional<Tensor>& preference, double parameter, double limit, Tensor& out) {
  const Gradients g = Gradients::from_matrix(grads, offsets);
  aggregate(g, grads, weighting_solve(method, preference, parameter, limit, g.num_tasks, grads.device()), out);
}

void gram(const Tensor& grads, at::IntArrayRef offsets, Tensor& gram) {
  run_gram(Gradients::from_matrix(grads, offsets), gram);
}

void gram_list(const c10::List<std::optional<Tensor>>& grads, int64_t num_tasks, at::IntArrayRef segments,
               Tensor& gram) {
  run_gram(Gradients::from_list(grads, num_tasks, segments, segments_of(gram, 3, "gram")), gram);
}

void combine_list(const c10::List<std::optional<Tensor>>& grads, const Tensor& weights, at::IntArrayRef segments,
                  bool accumulate, at::TensorList out) {
  const Gradients g = Gradients::from_list(grads, weights.size(-1), segments, segments_of(weights, 2, "weights"));
  std::vector<void*> pointers = pointers_to(g, grads, out);
  run_combine(g, weights, accumulate, pointers);
}

// The same functions serve the CPU and CUDA dispatch keys: each checks where its tensors are.
void register_operators(torch::Library& m) {
  m.impl("gram", &gram);
  m.impl("gram.list", &gram_list);
  m.impl("combine", &combine);
  m.impl("combine.list", &combine_list);
  m.impl("aggregate_pcgrad", &aggregate_pcgrad);
  m.impl("aggregate_min_norm", &aggregate_min_norm);
  m.impl("aggregate_weights", &aggregate_weights);
}

}  // namespace
}  // namespace gs::binding

TORCH_LIBRARY(gradsurgery, m) {
  m.def("gram(Tensor grads, int[] offsets, Tensor(a!) gram) -> ()");
  m.def("gram.list(Tensor?[] grads, int num_tasks, int[] segments, Tensor(a!) gram) -> ()");
  m.def("combine(Tensor grads, Tensor weights, int[] offsets, bool accumulate, Tensor(a!) out) -> ()");
  m.def("combine.list(Tensor?[] grads, Tensor weights, int[] segments, bool accumulate, Tensor(a!)[] out) -> ()");
  m.def("aggregate_pcgrad(Tensor grads, int[] offsets, int seed, Tensor(a!)? step, bool mean, Tensor(b!) out) -> ()");
  m.def("aggregate_min_norm(Tensor grads, int[] offsets, bool exact, int max_iter, float tol, Tensor(a!) out) -> ()");
  m.def(
      "aggregate_weights(Tensor grads, int[] offsets, int method, Tensor? preference, float parameter, float limit, "
      "Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(gradsurgery, CPU, m) { gs::binding::register_operators(m); }
TORCH_LIBRARY_IMPL(gradsurgery, CUDA, m) { gs::binding::register_operators(m); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace gs::binding;
  m.doc() = "The compiled operators of gradsurgery, under torch.ops.gradsurgery, and what is not one.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["version"] = gs_version();
    info["isa"] = gs_cpu_isa();
    info["cuda"] = gs_has_cuda() != 0;
#if defined(INTRA_OP_PARALLEL)
    info["parallel"] = true;
#else
    info["parallel"] = false;
#endif
    info["max_tasks"] = GS_MAX_TASKS;
    return info;
  });
  // The values of the argument `method` of the operators `weights` and `aggregate_weights`.
  m.def("weightings", [] {
    return std::map<std::string, int>{{"upgrad", GS_UPGRAD},
                                      {"dualproj", GS_DUALPROJ},
                                      {"cagrad", GS_CAGRAD},
                                      {"fairgrad", GS_FAIRGRAD},
                                      {"imtl_g", GS_IMTL_G},
                                      {"config", GS_CONFIG},
                                      {"aligned_mtl_min", GS_ALIGNED_MTL_MIN},
                                      {"aligned_mtl_median", GS_ALIGNED_MTL_MEDIAN},
                                      {"aligned_mtl_rmse", GS_ALIGNED_MTL_RMSE},
                                      {"krum", GS_KRUM},
                                      {"pcd", GS_PCD}};
  });
  m.def("functions_behind", &functions_behind);
  m.def("read_graph", &read_graph);
  pybind11::class_<Lists>(m, "Lists")
      .def_static("read", &Lists::read)
      .def_static("read_matrix", &Lists::read_matrix)
      .def_property_readonly("num_tasks", &Lists::num_tasks)
      .def_property_readonly("num_params", &Lists::num_params)
      .def_property_readonly("device", &Lists::device)
      .def_property_readonly("counts", [](const Lists& lists) { return pybind11::bytes(lists.counts()); })
      .def("select", &Lists::select)
      .def("fits", &Lists::fits, pybind11::arg("out"), pybind11::arg("apart") = false)
      .def("new_out", &Lists::new_out)
      .def("gram", &Lists::gram)
      .def("combine", &Lists::combine)
      .def("combine_graddrop",
           [](const Lists& lists, int64_t seed, const Tensor& step, const std::optional<Tensor>& leak,
              pybind11::handle out, bool accumulate) {
             const gs_rule rule = graddrop_rule(seed, step, leak, lists.num_tasks(), lists.device());
             lists.combine_by_rule(rule, out, accumulate);
           })
      .def("combine_trimmed_mean",
           [](const Lists& lists, int64_t num_trimmed, pybind11::handle out, bool accumulate) {
             lists.combine_by_rule(trimmed_mean_rule(num_trimmed), out, accumulate);
           })
      .def("aggregate_pcgrad",
           [](const Lists& lists, int64_t seed, const std::optional<Tensor>& step, bool mean, pybind11::handle out,
              bool accumulate) {
             return lists.aggregate(pcgrad_solve(seed, step, mean, lists.device()), out, accumulate);
           })
      .def("aggregate_min_norm",
           [](const Lists& lists, bool exact, int64_t max_iter, double tol, pybind11::handle out, bool accumulate) {
             return lists.aggregate(min_norm_solve(exact, max_iter, tol), out, accumulate);
           })
      .def("aggregate_weights",
           [](const Lists& lists, int64_t method, const std::optional<Tensor>& preference, double parameter,
              double limit, pybind11::handle out, bool accumulate) {
             const gs_solve solve =
                 weighting_solve(method, preference, parameter, limit, lists.num_tasks(), lists.device());
             return lists.aggregate(solve, out, accumulate);
           })
      .def("targets", &Lists::targets);
  m.def("shares_memory", &shares_memory);
  m.def("assign_grads", &assign_grads);
}
