// SPDX-License-Identifier: MIT
// The torch operators over the C boundary. Each writes into outputs that the caller allocated and returns nothing, so
// torch.compile needs no fake kernel. The checks here keep a direct call of an operator memory-safe; the Python stages
// give the messages that users see.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <vector>

#include "gradsurgery/gradsurgery.h"

namespace {

using at::Tensor;

void check_status(gs_status status) {
  TORCH_CHECK_VALUE(status != GS_INVALID_ARGUMENT, gs_last_error());
  TORCH_CHECK(status == GS_OK, gs_last_error());
}

const gs_parallel kTorchThreads = {[](void*, int64_t count, void (*body)(void*, int64_t), void* arg) {
                                     at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
                                       for (int64_t i = begin; i < end; i++) body(arg, i);
                                     });
                                   },
                                   nullptr};

Tensor make_workspace(int64_t bytes) {
  TORCH_CHECK_VALUE(bytes >= 0, gs_last_error());
  return at::empty({bytes}, at::kByte);
}

int32_t dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return GS_FLOAT64;
    case at::kFloat:
      return GS_FLOAT32;
    case at::kBFloat16:
      return GS_BFLOAT16;
    case at::kHalf:
      return GS_FLOAT16;
    default:
      TORCH_CHECK_TYPE(false, "gradients must be float64, float32, bfloat16 or float16, got ", tensor.dtype());
  }
}

// Backs a gs_gradients with vectors.
struct Gradients {
  std::vector<const void*> data;
  std::vector<int64_t> numel;
  std::vector<int32_t> dtype;
  std::vector<int32_t> segment;
  int64_t num_tasks = 0;
  int64_t num_segments = 1;

  gs_gradients view() const {
    return {num_tasks,    static_cast<int64_t>(numel.size()),        num_segments, data.data(), numel.data(),
            dtype.data(), segment.empty() ? nullptr : segment.data()};
  }

  void add(int64_t elements, int32_t element_type, int64_t segment_id) {
    numel.push_back(elements);
    dtype.push_back(element_type);
    segment.push_back(static_cast<int32_t>(segment_id));
  }

  // The rows of a [T, N] matrix, cut at the offsets (none: one segment).
  static Gradients from_matrix(const Tensor& grads, at::IntArrayRef offsets) {
    TORCH_CHECK_VALUE(grads.dim() == 2 && (grads.size(1) <= 1 || grads.stride(1) == 1),
                      "grads must be [T, N] with a contiguous last dimension, got shape ", grads.sizes(),
                      " with strides ", grads.strides());
    const int64_t whole[] = {0, grads.size(1)};
    if (offsets.empty()) offsets = whole;
    TORCH_CHECK_VALUE(offsets.size() >= 2 && offsets.front() == 0 && offsets.back() == grads.size(1) &&
                          std::is_sorted(offsets.begin(), offsets.end()),
                      "segments must ascend from 0 to ", grads.size(1), ", got ", offsets);
    Gradients g;
    g.num_tasks = grads.size(0);
    g.num_segments = static_cast<int64_t>(offsets.size()) - 1;
    const auto* base = static_cast<const char*>(grads.const_data_ptr());
    const int64_t bytes = grads.element_size();
    for (int64_t s = 0; s < g.num_segments; s++) {
      g.add(offsets[s + 1] - offsets[s], dtype_of(grads), s);
      for (int64_t t = 0; t < g.num_tasks; t++) {
        g.data.push_back(base + (t * grads.stride(0) + offsets[s]) * bytes);
      }
    }
    return g;
  }

  // A task-major list of num_tasks x P tensors.
  static Gradients from_list(const c10::List<std::optional<Tensor>>& grads, int64_t num_tasks, at::IntArrayRef segments,
                             int64_t num_segments) {
    const auto count = static_cast<int64_t>(grads.size());
    TORCH_CHECK_VALUE(num_tasks >= 1 && count % num_tasks == 0, "grads must hold num_tasks x P entries, got ", count,
                      " entries for ", num_tasks, " tasks");
    const int64_t params = count / num_tasks;
    TORCH_CHECK_VALUE(segments.empty() || static_cast<int64_t>(segments.size()) == params,
                      "segments must name one segment per parameter, got ", segments.size(), " for ", params);
    Gradients g;
    g.num_tasks = num_tasks;
    g.num_segments = num_segments;
    g.data.resize(count);
    std::vector<Tensor> first(params);
    for (int64_t t = 0; t < num_tasks; t++) {
      for (int64_t p = 0; p < params; p++) {
        const std::optional<Tensor> entry = grads.get(t * params + p);
        if (!entry || !entry->defined()) continue;
        if (!first[p].defined()) first[p] = *entry;
        check_same_layout(*entry, first[p], p);
        g.data[p * num_tasks + t] = entry->const_data_ptr();
      }
    }
    for (int64_t p = 0; p < params; p++) {
      const bool any = first[p].defined();
      g.add(any ? first[p].numel() : 0, any ? dtype_of(first[p]) : GS_FLOAT32, segments.empty() ? 0 : segments[p]);
    }
    return g;
  }

  static void check_same_layout(const Tensor& tensor, const Tensor& first, int64_t param) {
    TORCH_CHECK_VALUE(tensor.device().is_cpu(), "gradient ", param, " must be on the CPU, got ", tensor.device());
    TORCH_CHECK_TYPE(tensor.layout() == at::kStrided && tensor.scalar_type() == first.scalar_type(), "gradient ", param,
                     " must be strided ", first.dtype(), ", got ", tensor.layout(), " ", tensor.dtype());
    // Strides of dimensions of size 1 say nothing, so contiguous tensors may differ there.
    const bool same = tensor.is_contiguous() ? first.is_contiguous() : tensor.strides() == first.strides();
    TORCH_CHECK_VALUE(tensor.sizes() == first.sizes() && same && tensor.is_non_overlapping_and_dense(), "gradient ",
                      param, " must be dense with shape ", first.sizes(), " and strides ", first.strides(), ", got ",
                      tensor.sizes(), " and ", tensor.strides());
  }
};

// T x T data: contiguous, on the CPU, of one dtype and shape.
void check_square_data(const Tensor& tensor, at::ScalarType dtype, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.dtype());
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.is_contiguous() && tensor.sizes() == shape, name,
                    " must be contiguous on the CPU with shape ", shape, ", got ", tensor.device(), " ", tensor.sizes(),
                    " with strides ", tensor.strides());
}

struct Problems {
  int64_t batch, num_tasks;
};

// gram [..., T, T] and weights [..., T]
Problems check_problems(const Tensor& gram, const Tensor& weights) {
  TORCH_CHECK_VALUE(gram.dim() >= 2 && gram.size(-1) >= 1 && gram.size(-1) == gram.size(-2),
                    "gram must be [..., T, T], got ", gram.sizes());
  check_square_data(gram, at::kDouble, gram.sizes(), "gram");
  check_square_data(weights, at::kDouble, gram.sizes().slice(0, gram.dim() - 1), "weights");
  return {gram.numel() / (gram.size(-1) * gram.size(-1)), gram.size(-1)};
}

uint64_t step_value(const Tensor& step) {
  check_square_data(step, at::kLong, {}, "step");
  return static_cast<uint64_t>(*step.const_data_ptr<int64_t>());
}

// The number of segments of gram [S, T, T] or weights [S, T]; without that dimension one.
int64_t segments_of(const Tensor& tensor, int64_t dimensions, const char* name) {
  TORCH_CHECK_VALUE(tensor.dim() == dimensions || tensor.dim() == dimensions - 1, name, " must have ", dimensions - 1,
                    " dimensions or one more for segments, got ", tensor.sizes());
  return tensor.dim() == dimensions ? tensor.size(0) : 1;
}

void run_gram(const Gradients& grads, Tensor& gram) {
  const gs_gradients view = grads.view();
  if (gram.dim() == 2 && view.num_segments == 1) {
    check_square_data(gram, at::kDouble, {view.num_tasks, view.num_tasks}, "gram");
  } else {
    check_square_data(gram, at::kDouble, {view.num_segments, view.num_tasks, view.num_tasks}, "gram");
  }
  const Tensor workspace = make_workspace(gs_gram_workspace_bytes(&view));
  check_status(gs_gram_cpu(&view, gram.mutable_data_ptr<double>(), workspace.mutable_data_ptr(), workspace.numel(),
                           &kTorchThreads));
}

void gram(const Tensor& grads, at::IntArrayRef offsets, Tensor& gram) {
  run_gram(Gradients::from_matrix(grads, offsets), gram);
}

void gram_list(const c10::List<std::optional<Tensor>>& grads, int64_t num_tasks, at::IntArrayRef segments,
               Tensor& gram) {
  run_gram(Gradients::from_list(grads, num_tasks, segments, segments_of(gram, 3, "gram")), gram);
}

void run_combine(const Gradients& grads, const Tensor& weights, bool accumulate, std::vector<void*>& out) {
  const gs_gradients view = grads.view();
  if (weights.dim() == 1 && view.num_segments == 1) {
    check_square_data(weights, at::kDouble, {view.num_tasks}, "weights");
  } else {
    check_square_data(weights, at::kDouble, {view.num_segments, view.num_tasks}, "weights");
  }
  const Tensor workspace = make_workspace(gs_combine_workspace_bytes(&view));
  check_status(gs_combine_cpu(&view, weights.const_data_ptr<double>(), out.data(), accumulate,
                              workspace.mutable_data_ptr(), workspace.numel(), &kTorchThreads));
}

void combine(const Tensor& grads, const Tensor& weights, at::IntArrayRef offsets, bool accumulate, Tensor& out) {
  const Gradients g = Gradients::from_matrix(grads, offsets);
  check_square_data(out, grads.scalar_type(), {grads.size(1)}, "out");
  std::vector<void*> pointers;
  auto* next = static_cast<char*>(out.mutable_data_ptr());
  for (const int64_t elements : g.numel) {
    pointers.push_back(next);
    next += elements * out.element_size();
  }
  run_combine(g, weights, accumulate, pointers);
}

void combine_list(const c10::List<std::optional<Tensor>>& grads, const Tensor& weights, at::IntArrayRef segments,
                  bool accumulate, at::TensorList out) {
  const int64_t num_segments = segments_of(weights, 2, "weights"), num_tasks = weights.size(-1);
  const auto params = static_cast<int64_t>(out.size());
  const Gradients g = Gradients::from_list(grads, num_tasks, segments, num_segments);
  TORCH_CHECK_VALUE(static_cast<int64_t>(g.numel.size()) == params, "out must hold one tensor per parameter, got ",
                    params, " for ", g.numel.size());
  std::vector<void*> pointers;
  for (int64_t p = 0; p < params; p++) {
    for (int64_t t = 0; t < num_tasks; t++) {
      const std::optional<Tensor> entry = grads.get(t * params + p);
      if (entry && entry->defined()) Gradients::check_same_layout(out[p], *entry, p);
    }
    TORCH_CHECK_VALUE(out[p].numel() == g.numel[p], "out ", p, " must hold ", g.numel[p], " elements, got ",
                      out[p].numel());
    pointers.push_back(out[p].mutable_data_ptr());
  }
  run_combine(g, weights, accumulate, pointers);
}

void task_order(int64_t num_tasks, int64_t seed, const Tensor& step, Tensor& order) {
  check_square_data(order, at::kLong, {num_tasks, num_tasks}, "order");
  check_status(
      gs_task_order_cpu(num_tasks, static_cast<uint64_t>(seed), step_value(step), order.mutable_data_ptr<int64_t>()));
}

void pcgrad(const Tensor& gram, const std::optional<Tensor>& order, int64_t seed, Tensor& step, bool advance, bool mean,
            Tensor& weights) {
  const auto [batch, num_tasks] = check_problems(gram, weights);
  if (order) check_square_data(*order, at::kLong, {num_tasks, num_tasks}, "order");
  check_status(gs_pcgrad_cpu(gram.const_data_ptr<double>(), batch, num_tasks,
                             order ? order->const_data_ptr<int64_t>() : nullptr, static_cast<uint64_t>(seed),
                             step_value(step), mean, weights.mutable_data_ptr<double>(), &kTorchThreads));
  if (advance) ++*step.mutable_data_ptr<int64_t>();
}

void min_norm(const Tensor& gram, bool exact, int64_t max_iter, double tol, Tensor& weights) {
  const auto [batch, num_tasks] = check_problems(gram, weights);
  const Tensor workspace = make_workspace(gs_min_norm_workspace_bytes(batch, num_tasks));
  check_status(gs_min_norm_cpu(gram.const_data_ptr<double>(), batch, num_tasks, exact ? GS_EXACT : GS_FRANK_WOLFE,
                               max_iter, tol, weights.mutable_data_ptr<double>(), workspace.mutable_data_ptr(),
                               workspace.numel(), &kTorchThreads));
}

void gradnorm(const Tensor& weights, const Tensor& norms, const Tensor& losses, const Tensor& initial_losses,
              double alpha, double lr, Tensor& new_weights) {
  TORCH_CHECK_VALUE(weights.dim() >= 1 && weights.size(-1) >= 1, "weights must be [..., T], got ", weights.sizes());
  check_square_data(weights, at::kDouble, weights.sizes(), "weights");
  check_square_data(norms, at::kDouble, weights.sizes(), "norms");
  check_square_data(losses, at::kDouble, weights.sizes(), "losses");
  check_square_data(initial_losses, at::kDouble, weights.sizes(), "initial_losses");
  check_square_data(new_weights, at::kDouble, weights.sizes(), "new_weights");
  check_status(gs_gradnorm_cpu(weights.const_data_ptr<double>(), norms.const_data_ptr<double>(),
                               losses.const_data_ptr<double>(), initial_losses.const_data_ptr<double>(),
                               weights.numel() / weights.size(-1), weights.size(-1), alpha, lr,
                               new_weights.mutable_data_ptr<double>()));
}

void gradnorm_step(const Tensor& gram, const Tensor& losses, double alpha, double lr, Tensor& state_weights,
                   Tensor& initial_losses, Tensor& weights) {
  const auto [batch, num_tasks] = check_problems(gram, weights);
  check_square_data(losses, at::kDouble, weights.sizes(), "losses");
  check_square_data(state_weights, at::kDouble, weights.sizes(), "state_weights");
  check_square_data(initial_losses, at::kDouble, weights.sizes(), "initial_losses");
  check_status(gs_gradnorm_step_cpu(gram.const_data_ptr<double>(), losses.const_data_ptr<double>(), batch, num_tasks,
                                    alpha, lr, state_weights.mutable_data_ptr<double>(),
                                    initial_losses.mutable_data_ptr<double>(), weights.mutable_data_ptr<double>()));
}

}  // namespace

TORCH_LIBRARY(gradsurgery, m) {
  m.def("gram(Tensor grads, int[] offsets, Tensor(a!) gram) -> ()");
  m.def("gram.list(Tensor?[] grads, int num_tasks, int[] segments, Tensor(a!) gram) -> ()");
  m.def("combine(Tensor grads, Tensor weights, int[] offsets, bool accumulate, Tensor(a!) out) -> ()");
  m.def("combine.list(Tensor?[] grads, Tensor weights, int[] segments, bool accumulate, Tensor(a!)[] out) -> ()");
  m.def("task_order(int num_tasks, int seed, Tensor step, Tensor(a!) order) -> ()");
  m.def(
      "pcgrad(Tensor gram, Tensor? order, int seed, Tensor(a!) step, bool advance, bool mean, Tensor(b!) weights) -> "
      "()");
  m.def("min_norm(Tensor gram, bool exact, int max_iter, float tol, Tensor(a!) weights) -> ()");
  m.def(
      "gradnorm(Tensor weights, Tensor norms, Tensor losses, Tensor initial_losses, float alpha, float lr, "
      "Tensor(a!) new_weights) -> ()");
  m.def(
      "gradnorm_step(Tensor gram, Tensor losses, float alpha, float lr, Tensor(a!) state_weights, "
      "Tensor(b!) initial_losses, Tensor(c!) weights) -> ()");
}

TORCH_LIBRARY_IMPL(gradsurgery, CPU, m) {
  m.impl("gram", &gram);
  m.impl("gram.list", &gram_list);
  m.impl("combine", &combine);
  m.impl("combine.list", &combine_list);
  m.impl("task_order", &task_order);
  m.impl("pcgrad", &pcgrad);
  m.impl("min_norm", &min_norm);
  m.impl("gradnorm", &gradnorm);
  m.impl("gradnorm_step", &gradnorm_step);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled operators of gradsurgery, under torch.ops.gradsurgery.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["version"] = gs_version();
    info["isa"] = gs_cpu_isa();
    info["cuda"] = gs_has_cuda() != 0;
    info["max_tasks"] = GS_MAX_TASKS;
    return info;
  });
}
