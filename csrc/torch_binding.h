// SPDX-License-Identifier: MIT
// Conversion of torch tensors for the operators: the structs of the C boundary, the device and stream to run on, and
// checks that keep even a direct call of an operator memory-safe.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <vector>

#if defined(GS_WITH_CUDA)
#include <c10/cuda/CUDAStream.h>
#endif

#include "gradsurgery/gradsurgery.h"
#include "torch_message.h"

namespace gs::binding {

using at::Tensor;

inline void check_status(gs_status status) {
  TORCH_CHECK_VALUE(status != GS_INVALID_ARGUMENT, gs_last_error());
  TORCH_CHECK(status == GS_OK, gs_last_error());
}

// Whether a tensor with this address has memory: after untyped_storage().resize_(0) its storage begins at NULL.
inline bool has_memory(const Tensor& tensor, const void* data) {
  return reinterpret_cast<uintptr_t>(data) != static_cast<uintptr_t>(tensor.storage_offset()) * tensor.itemsize();
}

// ValueError if elements have no memory: kernels would take the tensor for an absent gradient. That is right only for
// torch's zero tensors (_is_zerotensor), which are allowed.
inline void check_memory(const Tensor& tensor, const void* data) {
  TORCH_CHECK_VALUE(has_memory(tensor, data) || tensor.numel() == 0 || tensor._is_zerotensor(),
                    message("tensors must have memory, got one of shape ", tensor.sizes(), " without"));
}

inline const void* address_of(const Tensor& tensor) {
  const void* const data = tensor.const_data_ptr();
  check_memory(tensor, data);
  return data;
}

// The address of a tensor that will be written to; raises its version, as torch's own functions do, for autograd.
template <class T = void>
T* written(const Tensor& tensor) {
  void* const data = tensor.mutable_data_ptr();
  check_memory(tensor, data);
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  return static_cast<T*>(data);
}

const gs_parallel kTorchThreads = {[](void*, int64_t count, void (*body)(void*, int64_t), void* arg) {
                                     at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
                                       for (int64_t i = begin; i < end; i++) body(arg, i);
                                     });
                                   },
                                   nullptr};

// Where a call runs: while this object lives its device is the current one, and CUDA kernels go to that device's
// current stream.
class Target {
 public:
  explicit Target(const at::Device& device) : device_(device), guard_(device) {
    TORCH_CHECK_VALUE(device.is_cpu() || device.is_cuda(),
                      message("tensors must be on the CPU or on a CUDA device, got ", device));
  }
  bool is_cuda() const { return device_.is_cuda(); }
  gs_stream stream() const {
#if defined(GS_WITH_CUDA)
    return reinterpret_cast<gs_stream>(c10::cuda::getCurrentCUDAStream(device_.index()).stream());
#else
    return nullptr;  // the library will report that it has no CUDA kernels
#endif
  }
  Tensor make_workspace(int64_t bytes) const {
    TORCH_CHECK_VALUE(bytes >= 0, gs_last_error());
    return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device_));
  }

 private:
  at::Device device_;
  c10::DeviceGuard guard_;
};

inline int32_t dtype_of(const Tensor& tensor) {
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
      TORCH_CHECK_TYPE(false,
                       message("gradients must be float64, float32, bfloat16 or float16, got ", tensor.scalar_type()));
  }
}

// Owns the arrays of a gs_gradients.
struct Gradients {
  std::vector<const void*> data;
  std::vector<int64_t> numel;
  std::vector<int32_t> dtype;
  std::vector<int32_t> segment;
  int64_t num_tasks = 0;
  int64_t num_segments = 1;
  std::optional<at::Device> device;  // none if no task has a gradient

  gs_gradients view() const {
    return {num_tasks,    static_cast<int64_t>(numel.size()),        num_segments, data.data(), numel.data(),
            dtype.data(), segment.empty() ? nullptr : segment.data()};
  }

  void add(int64_t elements, int32_t element_type, int64_t segment_id) {
    TORCH_CHECK_VALUE(segment_id >= 0 && segment_id < num_segments,
                      message("segments must be in 0..", num_segments - 1, ", got ", segment_id));
    numel.push_back(elements);
    dtype.push_back(element_type);
    segment.push_back(static_cast<int32_t>(segment_id));
  }

  // The rows of a [T, N] matrix, cut at the offsets (none: one segment).
  static Gradients from_matrix(const Tensor& grads, at::IntArrayRef offsets) {
    TORCH_CHECK_VALUE(grads.dim() == 2 && (grads.size(1) <= 1 || grads.stride(1) == 1),
                      message("grads must be [T, N] with a contiguous last dimension, got shape ", grads.sizes(),
                              " with strides ", grads.strides()));
    const int64_t whole[] = {0, grads.size(1)};
    if (offsets.empty()) offsets = whole;
    TORCH_CHECK_VALUE(offsets.size() >= 2 && offsets.front() == 0 && offsets.back() == grads.size(1) &&
                          std::is_sorted(offsets.begin(), offsets.end()),
                      message("segments must ascend from 0 to ", grads.size(1), ", got ", offsets));
    Gradients g;
    g.device = grads.device();
    g.num_tasks = grads.size(0);
    g.num_segments = static_cast<int64_t>(offsets.size()) - 1;
    const auto* base = static_cast<const char*>(address_of(grads));
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
    TORCH_CHECK_VALUE(num_tasks >= 1 && count % num_tasks == 0, message("grads must hold num_tasks x P entries, got ",
                                                                        count, " entries for ", num_tasks, " tasks"));
    const int64_t params = count / num_tasks;
    TORCH_CHECK_VALUE(segments.empty() || static_cast<int64_t>(segments.size()) == params,
                      message("segments must name one segment per parameter, got ",
                              static_cast<int64_t>(segments.size()), " for ", params));
    Gradients g;
    g.num_tasks = num_tasks;
    g.num_segments = num_segments;
    g.data.resize(count);
    std::vector<Tensor> first(params);
    for (int64_t i = 0; i < count; i++) {
      const int64_t t = i / params, p = i % params;
      const std::optional<Tensor> entry = grads.get(i);
      if (!entry || !entry->defined()) continue;
      if (!g.device) g.device = entry->device();
      if (!first[p].defined()) first[p] = *entry;
      TORCH_CHECK_VALUE(entry->device() == *g.device,
                        message("gradient ", p, " must be on ", *g.device, ", got ", entry->device()));
      check_same_layout(*entry, first[p], p);
      g.data[p * num_tasks + t] = address_of(*entry);
    }
    for (int64_t p = 0; p < params; p++) {
      const bool any = first[p].defined();
      g.add(any ? first[p].numel() : 0, any ? dtype_of(first[p]) : GS_FLOAT32, segments.empty() ? 0 : segments[p]);
    }
    return g;
  }

  static void check_same_layout(const Tensor& tensor, const Tensor& first, int64_t param) {
    TORCH_CHECK_VALUE(tensor.device() == first.device(),
                      message("gradient ", param, " must be on ", first.device(), ", got ", tensor.device()));
    TORCH_CHECK_TYPE(tensor.layout() == at::kStrided && tensor.scalar_type() == first.scalar_type(),
                     message("gradient ", param, " must be strided ", first.scalar_type(), ", got ",
                             tensor.layout() == at::kStrided ? "" : "not strided ", tensor.scalar_type()));
    // Strides of dimensions of size 1 do not matter, so two contiguous tensors may differ in them.
    const bool same = tensor.is_contiguous() ? first.is_contiguous() : tensor.strides() == first.strides();
    TORCH_CHECK_VALUE(tensor.sizes() == first.sizes() && same && tensor.is_non_overlapping_and_dense(),
                      message("gradient ", param, " must be dense with shape ", first.sizes(), " and strides ",
                              first.strides(), ", got ", tensor.sizes(), " and ", tensor.strides()));
  }
};

inline gs_weighting weighting_of(int64_t method) {
  TORCH_CHECK_VALUE(method == static_cast<int32_t>(method), message("weighting must be a gs_weighting, got ", method));
  return static_cast<gs_weighting>(method);
}

// T x T data: contiguous, of one dtype and shape, on the device of the call.
inline void check_square_data(const Tensor& tensor, at::ScalarType dtype, at::IntArrayRef shape,
                              const at::Device& device, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, message(name, " must be ", dtype, ", got ", tensor.scalar_type()));
  TORCH_CHECK_VALUE(tensor.device() == device && tensor.is_contiguous() && tensor.sizes() == shape,
                    message(name, " must be contiguous on ", device, " with shape ", shape, ", got ", tensor.device(),
                            " ", tensor.sizes(), " with strides ", tensor.strides()));
  TORCH_CHECK_VALUE(!tensor.is_neg(), message(name, " must not be a negated view"));
}

struct Problems {
  int64_t batch, num_tasks;
};

// gram [..., T, T] and weights [..., T], on one device
inline Problems check_problems(const Tensor& gram, const Tensor& weights, const char* name = "gram") {
  TORCH_CHECK_VALUE(gram.dim() >= 2 && gram.size(-1) >= 1 && gram.size(-1) == gram.size(-2),
                    message(name, " must be [..., T, T], got ", gram.sizes()));
  check_square_data(gram, at::kDouble, gram.sizes(), gram.device(), name);
  check_square_data(weights, at::kDouble, gram.sizes().slice(0, gram.dim() - 1), gram.device(), "weights");
  return {gram.numel() / (gram.size(-1) * gram.size(-1)), gram.size(-1)};
}

// The number of segments of gram [S, T, T] or weights [S, T]; 1 if the first dimension is missing.
inline int64_t segments_of(const Tensor& tensor, int64_t dimensions, const char* name) {
  TORCH_CHECK_VALUE(
      tensor.dim() == dimensions || tensor.dim() == dimensions - 1,
      message(name, " must have ", dimensions - 1, " dimensions or one more for segments, got ", tensor.sizes()));
  return tensor.dim() == dimensions ? tensor.size(0) : 1;
}

// Check the outputs and return their addresses: for the flat form, cut like the gradients, and for the list form.
std::vector<void*> cut_out(const Gradients& g, const Tensor& grads, Tensor& out);
std::vector<void*> pointers_to(const Gradients& g, const c10::List<std::optional<Tensor>>& grads, at::TensorList out);

// Run a stage, after checking its outputs.
void run_gram(const Gradients& grads, Tensor& gram);
void run_combine(const Gradients& grads, const Tensor& weights, bool accumulate, std::vector<void*>& out);

// The rules that run_combine_by_rule takes. Their tensors must live as long as the call.
gs_rule graddrop_rule(int64_t seed, const Tensor& step, const std::optional<Tensor>& leak, int64_t num_tasks,
                      const at::Device& device);
gs_rule trimmed_mean_rule(int64_t num_trimmed);
void run_combine_by_rule(const Gradients& grads, const gs_rule& rule, bool accumulate, std::vector<void*>& out);

// The solvers that run_aggregate takes. The step counter and the preference must live as long as the call.
gs_solve pcgrad_solve(int64_t seed, const std::optional<Tensor>& step, bool mean, const at::Device& device);
gs_solve min_norm_solve(bool exact, int64_t max_iter, double tol);
gs_solve weighting_solve(int64_t method, const std::optional<Tensor>& preference, double parameter, double limit,
                         int64_t num_tasks, const at::Device& device);

// Run stages 2 to 4 in one call. The first returns the Gram matrices [S, T, T] and the weights [S, T]; the second
// computes the direction only, with fewer allocations.
std::pair<Tensor, Tensor> run_aggregate(const Gradients& grads, const gs_solve& solve, bool accumulate,
                                        std::vector<void*>& out);
void run_aggregate_alone(const Gradients& grads, const gs_solve& solve, bool accumulate, std::vector<void*>& out);

}  // namespace gs::binding
