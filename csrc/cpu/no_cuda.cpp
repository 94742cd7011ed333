// SPDX-License-Identifier: MIT
// A library built without CUDA still defines the CUDA entry points.
#if !defined(GS_WITH_CUDA)
#include "status.h"

namespace {

gs_status unsupported() { return gs::fail(GS_UNSUPPORTED, "this library was built without CUDA kernels"); }

}  // namespace

int gs_has_cuda(void) { return 0; }

int64_t gs_gram_cuda_workspace_bytes(const gs_gradients*) { return unsupported(), -1; }

gs_status gs_gram_cuda(const gs_gradients*, double*, void*, int64_t, gs_stream) { return unsupported(); }

int64_t gs_combine_cuda_workspace_bytes(const gs_gradients*) { return unsupported(), -1; }

gs_status gs_combine_cuda(const gs_gradients*, const double*, void* const*, int, void*, int64_t, gs_stream) {
  return unsupported();
}

int64_t gs_combine_by_rule_cuda_workspace_bytes(const gs_gradients*) { return unsupported(), -1; }

gs_status gs_combine_by_rule_cuda(const gs_gradients*, const gs_rule*, void* const*, int, void*, int64_t, gs_stream) {
  return unsupported();
}

gs_status gs_task_order_cuda(int64_t, uint64_t, const int64_t*, int64_t*, gs_stream) { return unsupported(); }

gs_status gs_pcgrad_cuda(const double*, int64_t, int64_t, const int64_t*, uint64_t, int64_t*, int, int, double*,
                         gs_stream) {
  return unsupported();
}

int64_t gs_min_norm_cuda_workspace_bytes(int64_t, int64_t) { return unsupported(), -1; }

gs_status gs_min_norm_cuda(const double*, int64_t, int64_t, gs_solver, int64_t, double, double*, void*, int64_t,
                           gs_stream) {
  return unsupported();
}

gs_status gs_random_cuda(const double*, int64_t, int64_t, uint64_t, int64_t*, double*, gs_stream) {
  return unsupported();
}

int64_t gs_simplex_steps_cuda_workspace_bytes(int64_t, int64_t) { return unsupported(), -1; }

gs_status gs_simplex_steps_cuda(const double*, int64_t, int64_t, double, double, int64_t, double*, void*, int64_t,
                                gs_stream) {
  return unsupported();
}

int64_t gs_weights_cuda_workspace_bytes(gs_weighting, int64_t, int64_t) { return unsupported(), -1; }

gs_status gs_weights_cuda(const double*, int64_t, int64_t, gs_weighting, const double*, double, double, double*, void*,
                          int64_t, gs_stream) {
  return unsupported();
}

gs_status gs_gradvac_cuda(const double*, int64_t, int64_t, const int64_t*, double, double*, double*, gs_stream) {
  return unsupported();
}

int64_t gs_aggregate_cuda_workspace_bytes(const gs_gradients*, const gs_solve*) { return unsupported(), -1; }

gs_status gs_aggregate_cuda(const gs_gradients*, const gs_solve*, double*, double*, void* const*, int, void*, int64_t,
                            gs_stream) {
  return unsupported();
}

gs_status gs_gradnorm_cuda(const double*, const double*, const double*, const double*, int64_t, int64_t, double, double,
                           double*, gs_stream) {
  return unsupported();
}

gs_status gs_gradnorm_step_cuda(const double*, const double*, int64_t, int64_t, double, double, double*, double*,
                                double*, gs_stream) {
  return unsupported();
}
#endif
