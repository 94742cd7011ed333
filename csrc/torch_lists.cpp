// SPDX-License-Identifier: MIT
// The list form as Python holds it. Passing a thousand tensors through the dispatcher takes longer than the work on
// them, so their pointers are read directly from the Python objects, without counting references. For anything unusual
// (subclasses, sparse tensors, several layouts, but not None entries) a function returns nothing, and Python takes its
// slower path.
#include "torch_lists.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/COW.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

namespace gs::binding {
namespace {

// A list's or tuple's items, borrowed.
struct Items {
  PyObject* const* data = nullptr;
  int64_t size = -1;

  explicit Items(PyObject* sequence) {
    if (!PyList_CheckExact(sequence) && !PyTuple_CheckExact(sequence)) return;
    data = PySequence_Fast_ITEMS(sequence);
    size = PySequence_Fast_GET_SIZE(sequence);
  }
};

// The tensor behind an object, borrowed, if it is a plain one in memory of the CPU or of a CUDA device.
const Tensor* plain_tensor(PyObject* object) {
  static const c10::DispatchKeySet plain({c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCPU,
                                          c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutocastCPU,
                                          c10::DispatchKey::AutocastCUDA, c10::DispatchKey::ADInplaceOrView});
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& tensor = THPVariable_Unpack(object);
  return plain.has_all(tensor.key_set()) ? &tensor : nullptr;
}

// The same, if the tensor is dense and does not overlap itself.
const Tensor* dense_tensor(PyObject* object) {
  const Tensor* const tensor = plain_tensor(object);
  return tensor && tensor->is_non_overlapping_and_dense() ? tensor : nullptr;
}

// The same, if kernels may also write to it: it does not require grad, and is no inference tensor outside of inference
// mode.
const Tensor* target_tensor(PyObject* object) {
  const Tensor* const tensor = dense_tensor(object);
  const bool free = tensor && !tensor->requires_grad() && (!tensor->is_inference() || c10::InferenceMode::is_enabled());
  return free ? tensor : nullptr;
}

// Whether the target overlaps one of the rows without beginning at the same address.
bool overlaps_in_part(const Tensor& target, const void* const* rows, int64_t num_tasks) {
  const auto* const begin = static_cast<const char*>(target.const_data_ptr());
  const auto bytes = static_cast<int64_t>(target.nbytes());
  return std::any_of(rows, rows + num_tasks, [&](const void* data) {
    const auto* const row = static_cast<const char*>(data);
    return row && row != begin && row < begin + bytes && begin < row + bytes;
  });
}

// Whether a dispatch mode, a function transform or a tracer is active, which must see each operation.
bool is_watched() {
  return c10::impl::dispatch_mode_enabled() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer);
}

bool is_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
}

bool alike(const Tensor& a, const Tensor& b) {
  const c10::TensorImpl &x = *a.unsafeGetTensorImpl(), &y = *b.unsafeGetTensorImpl();
  if (x.dtype() != y.dtype() || x.key_set() != y.key_set() || x.dim() != y.dim()) return false;
  if (x.is_cuda() && x.device() != y.device()) return false;
  const at::IntArrayRef sizes = x.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), y.sizes().begin())) return false;
  // Strides of dimensions of size 1 do not matter, so two contiguous tensors may differ in them.
  return x.is_contiguous() ? y.is_contiguous() : !y.is_contiguous() && x.strides() == y.strides();
}

// Whether only the caller's list and the Lists object hold the tensor and its memory. The gradient of a layer's weight
// is often a transposed view; that is fine if nothing else holds its base.
bool is_unshared(PyObject* object) {
#if defined(Py_GIL_DISABLED)
  return false;  // reference counts are not reliable there
#endif
  const Tensor& tensor = THPVariable_Unpack(object);
  if (!tensor.storage().resizable()) return false;  // memory that another library owns
  if (Py_REFCNT(object) != 2 || tensor.use_count() != 1 || tensor.storage().nbytes() != tensor.nbytes()) return false;
  if (tensor.storage().use_count() == 1) return true;
  const auto* const view = torch::autograd::impl::get_view_autograd_meta(tensor);
  return view && view->has_bw_view() && view->get_backward_view().base_.use_count() == 1 &&
         tensor.storage().use_count() == 2;
}

constexpr size_t kAhead = 4;

// Prefetch the TensorImpl that a tensor's Python object points to, and the storage that this points to.
void prefetch_tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return;
  const auto* const impl = reinterpret_cast<const char*>(THPVariable_Unpack(object).unsafeGetTensorImpl());
  for (size_t line = 0; line < sizeof(c10::TensorImpl); line += 64) __builtin_prefetch(impl + line);
}
void prefetch_storage(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return;
  const Tensor& tensor = THPVariable_Unpack(object);
  if (tensor.has_storage()) __builtin_prefetch(tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
}

}  // namespace

std::optional<Lists> Lists::read(pybind11::handle rows) {
  const Items tasks(rows.ptr());
  if (tasks.size < 1 || is_watched()) return std::nullopt;
  const int64_t num_tasks = tasks.size, params = std::max<int64_t>(0, Items(tasks.data[0]).size);
  Lists lists;
  Gradients& g = lists.grads_;
  g.num_tasks = num_tasks;
  g.data.resize(num_tasks * params);
  lists.first_.resize(params);
  lists.counts_.resize(params);
  struct Entry {
    int64_t task, param;
    PyObject* object;
  };
  std::vector<Entry> entries;
  for (int64_t t = 0; t < num_tasks; t++) {
    const Items row(tasks.data[t]);
    if (row.size != params) return std::nullopt;
    for (int64_t p = 0; p < params; p++) {
      if (row.data[p] != Py_None) entries.push_back({t, p, row.data[p]});
    }
  }
  std::vector<pybind11::object> held;
  held.reserve(entries.size());
  const size_t count = entries.size();
  for (size_t i = 0; i < count; i++) {
    // After a backward pass few of its tensors are still in the processor's cache, and reading each takes three
    // dependent loads.
    if (i + 3 * kAhead < count) __builtin_prefetch(entries[i + 3 * kAhead].object);
    if (i + 2 * kAhead < count) prefetch_tensor(entries[i + 2 * kAhead].object);
    if (i + kAhead < count) prefetch_storage(entries[i + kAhead].object);
    const auto& [t, p, object] = entries[i];
    const Tensor* const tensor = dense_tensor(object);
    if (!tensor || tensor->requires_grad()) return std::nullopt;
    PyObject*& first = lists.first_[p];
    if (!first) {
      if (!is_dtype(tensor->scalar_type())) return std::nullopt;
      if (!g.device) g.device = tensor->device();
      if (tensor->device() != *g.device) return std::nullopt;
      first = object;
    } else if (!alike(*tensor, THPVariable_Unpack(first))) {
      return std::nullopt;
    }
    g.data[p * num_tasks + t] = address_of(*tensor);
    if (lists.counts_[p] < kManyTasks) lists.counts_[p]++;
    held.push_back(pybind11::reinterpret_borrow<pybind11::object>(object));
  }
  if (!g.device) return std::nullopt;
  for (PyObject* const first : lists.first_) {
    const Tensor* const tensor = first ? &THPVariable_Unpack(first) : nullptr;
    g.add(tensor ? tensor->numel() : 0, tensor ? dtype_of(*tensor) : GS_FLOAT32, 0);
  }
  lists.held_ = std::make_shared<const std::vector<pybind11::object>>(std::move(held));
  return lists;
}

std::optional<Lists> Lists::read_matrix(pybind11::handle matrix) {
  const Tensor* const tensor = is_watched() ? nullptr : plain_tensor(matrix.ptr());
  if (!tensor || tensor->requires_grad() || !is_dtype(tensor->scalar_type()) || tensor->dim() != 2 ||
      tensor->size(0) < 1 || (tensor->size(1) > 1 && tensor->stride(1) != 1)) {
    return std::nullopt;
  }
  Lists lists;
  lists.flat_ = true;
  lists.grads_ = Gradients::from_matrix(*tensor, {});
  lists.first_ = {matrix.ptr()};
  lists.counts_ = {static_cast<char>(std::min<int64_t>(tensor->size(0), kManyTasks))};
  lists.held_ =
      std::make_shared<const std::vector<pybind11::object>>(1, pybind11::reinterpret_borrow<pybind11::object>(matrix));
  return lists;
}

Lists Lists::select(const std::vector<int64_t>& params, const std::vector<int64_t>& segments,
                    int64_t num_segments) const {
  TORCH_CHECK_VALUE(!flat_, "a matrix has no parameters to select");
  TORCH_CHECK_VALUE(segments.empty() || segments.size() == params.size(), "segments must name one per parameter");
  Lists lists;
  Gradients& g = lists.grads_;
  g.device = grads_.device;
  g.num_tasks = grads_.num_tasks;
  g.num_segments = num_segments;
  lists.held_ = held_;
  for (size_t i = 0; i < params.size(); i++) {
    const int64_t p = params[i];
    lists.first_.push_back(first_of(p));
    g.add(grads_.numel[p], grads_.dtype[p], segments.empty() ? 0 : segments[i]);
    const auto row = grads_.data.begin() + p * g.num_tasks;
    g.data.insert(g.data.end(), row, row + g.num_tasks);
    lists.counts_.push_back(counts_[p]);
  }
  return lists;
}

bool Lists::fits(pybind11::handle out, bool apart) const {
  if (flat_) {
    const Tensor *const target = target_tensor(out.ptr()), &matrix = THPVariable_Unpack(first_[0]);
    return target && target->dim() == 1 && target->size(0) == matrix.size(1) && target->dtype() == matrix.dtype() &&
           target->device() == matrix.device() &&
           !(apart && overlaps_in_part(*target, grads_.data.data(), grads_.num_tasks));
  }
  const Items targets(out.ptr());
  if (targets.size != num_params()) return false;
  for (int64_t p = 0; p < targets.size; p++) {
    if (!first_[p]) return false;
    const Tensor* const target = target_tensor(targets.data[p]);
    if (!target || !alike(*target, THPVariable_Unpack(first_[p]))) return false;
    if (apart && overlaps_in_part(*target, &grads_.data[p * grads_.num_tasks], grads_.num_tasks)) return false;
  }
  return true;
}

pybind11::object Lists::new_out() const {
  if (flat_) {
    const Tensor& matrix = THPVariable_Unpack(first_[0]);
    return pybind11::cast(at::empty({matrix.size(1)}, matrix.options()));
  }
  pybind11::list out(num_params());
  for (int64_t p = 0; p < num_params(); p++) {
    out[p] = first_[p] ? pybind11::cast(at::empty_like(THPVariable_Unpack(first_[p]))) : pybind11::none();
  }
  return std::move(out);
}

void Lists::gram(Tensor& out) const {
  RECORD_FUNCTION("gradsurgery::gram", {});
  const pybind11::gil_scoped_release release;
  run_gram(grads_, out);
}

void Lists::combine(const Tensor& weights, pybind11::handle out, bool accumulate) const {
  RECORD_FUNCTION("gradsurgery::combine", {});
  Outputs outputs = outputs_of(out);
  const pybind11::gil_scoped_release release;
  run_combine(grads_, weights, accumulate, outputs.pointers);
}

void Lists::combine_by_rule(const gs_rule& rule, pybind11::handle out, bool accumulate) const {
  RECORD_FUNCTION("gradsurgery::combine_by_rule", {});
  Outputs outputs = outputs_of(out);
  const pybind11::gil_scoped_release release;
  run_combine_by_rule(grads_, rule, accumulate, outputs.pointers);
}

std::optional<std::pair<Tensor, Tensor>> Lists::aggregate(const gs_solve& solve, pybind11::handle out,
                                                          bool accumulate) const {
  RECORD_FUNCTION("gradsurgery::aggregate", {});
  Outputs outputs = outputs_of(out);
  const pybind11::gil_scoped_release release;
  if (!flat_) return run_aggregate(grads_, solve, accumulate, outputs.pointers);
  run_aggregate_alone(grads_, solve, accumulate, outputs.pointers);
  return std::nullopt;
}

Lists::Outputs Lists::outputs_of(pybind11::handle out) const {
  TORCH_CHECK_VALUE(fits(out, /*apart=*/false), "out must be a list of tensors like the gradients, one per parameter");
  const Items items(out.ptr());
  PyObject* const whole = out.ptr();
  PyObject* const* const targets = flat_ ? &whole : items.data;
  const int64_t count = flat_ ? 1 : items.size;
  Outputs outputs;
  outputs.held.reserve(count);
  outputs.pointers.reserve(count);
  for (int64_t p = 0; p < count; p++) {
    outputs.held.push_back(pybind11::reinterpret_borrow<pybind11::object>(targets[p]));
    outputs.pointers.push_back(written(THPVariable_Unpack(targets[p])));
  }
  return outputs;
}

pybind11::object Lists::targets(pybind11::handle parameters, const std::vector<int64_t>& params) const {
  const Items owners(parameters.ptr());
  const auto count = static_cast<int64_t>(params.size());
  TORCH_CHECK_VALUE(!flat_ && owners.size == count, "params must name one of the parameters each");
  bool accumulate = false;
  for (int64_t i = 0; i < count; i++) {
    PyObject* const first = first_of(params[i]);
    if (!first || !THPVariable_CheckExact(owners.data[i])) return pybind11::none();
    const Tensor &owner = THPVariable_Unpack(owners.data[i]), &grad = owner.grad();
    if (!alike(grad.defined() ? grad : owner, THPVariable_Unpack(first))) return pybind11::none();
    if (grad.defined()) check_memory(grad, grad.const_data_ptr());  // raises before anything is written
    accumulate = accumulate || grad.defined();
  }
  pybind11::list out(count);
  pybind11::set done;
  for (int64_t i = 0; i < count; i++) {
    PyObject* const first = first_of(params[i]);
    const Tensor &grad = THPVariable_Unpack(owners.data[i]).grad(), &like = THPVariable_Unpack(first);
    if (grad.defined()) {
      out[i] = pybind11::cast(grad);
    } else if (accumulate) {
      out[i] = pybind11::cast(at::zeros_like(like));
    } else if (is_unshared(first)) {
      // detach() turns a view into a tensor that does not keep its base.
      out[i] = like.is_view() ? pybind11::cast(like.detach()) : pybind11::reinterpret_borrow<pybind11::object>(first);
      if (counts_[params[i]] == 1) done.add(pybind11::int_(i));
    } else {
      out[i] = pybind11::cast(at::empty_like(like));
    }
  }
  return pybind11::make_tuple(out, accumulate, done);
}

PyObject* Lists::first_of(int64_t p) const {
  TORCH_CHECK_VALUE(p >= 0 && p < num_params(), message("there are ", num_params(), " parameters, got index ", p));
  return first_[p];
}

std::optional<bool> shares_memory(pybind11::handle rows) {
  const Items tasks(rows.ptr());
  if (tasks.size < 1 || is_watched()) return std::nullopt;
  const std::vector<Items> each(tasks.data, tasks.data + tasks.size);
  const int64_t params = each[0].size;
  if (params < 0 || std::any_of(each.begin(), each.end(), [&](const Items& row) { return row.size != params; })) {
    return std::nullopt;
  }
  std::vector<const void*> addresses;
  for (int64_t p = 0; p < params; p++) {
    addresses.clear();
    for (const Items& row : each) {
      if (row.data[p] == Py_None) continue;
      const Tensor* const tensor = plain_tensor(row.data[p]);
      // A copy-on-write tensor has the address of the tensors it shares with until it is written to.
      if (!tensor || c10::impl::cow::is_cow_data_ptr(tensor->storage().data_ptr())) return std::nullopt;
      const void* const data = tensor->const_data_ptr();
      if (tensor->numel() > 0 && has_memory(*tensor, data)) addresses.push_back(data);
    }
    std::sort(addresses.begin(), addresses.end(), std::less<>());
    if (std::adjacent_find(addresses.begin(), addresses.end()) != addresses.end()) return true;
  }
  return false;
}

void assign_grads(pybind11::handle parameters, pybind11::handle grads) {
  const Items owners(parameters.ptr()), values(grads.ptr());
  TORCH_CHECK_VALUE(owners.size == values.size, "there must be as many gradients as parameters");
  for (int64_t p = 0; p < owners.size; p++) {
    THPVariable_Unpack(owners.data[p]).mutable_grad() = THPVariable_Unpack(values.data[p]);
  }
}

}  // namespace gs::binding
