// SPDX-License-Identifier: MIT
//
// The C boundary of gradsurgery. It includes neither torch nor CUDA headers, so any language with a C
// interface can call the kernels.
//
// Conventions, for every function:
//   * sizes and offsets are int64_t, in elements; T x T data is float64, row-major and contiguous;
//   * the library never allocates: the caller passes the gradients and outputs, aligned as their element type requires,
//     and a workspace, aligned to 64 bytes, of at least the size that the matching gs_*_workspace_bytes returns (-1 for
//     invalid arguments), with any contents. Gradients at wrong addresses and memory that overlaps are not noticed;
//   * a number passed by value is checked if a comment states its range, and so are the arrays of gs_gradients and, on
//     the CPU, orders. Any other number, by value or in an array, is accepted, even NaN, and gives some result;
//   * solvers are accurate if every non-zero G_ii is between 2^-900 and 2^1000 (FairGrad with alpha > 1: and at most
//     1e300 times another); otherwise the weights may belong to a different G, or be infinite;
//   * a batch has at most 2^40 problems;
//   * functions return a status; gs_last_error() is the message of the last failure on this thread;
//   * the same inputs give the same bits, whatever the number of threads behind gs_parallel or of multiprocessors on
//     the GPU. The order of summation, and so the last bits, may differ between GPUs before and since compute
//     capability 9.0, between GPUs with fast and with slow float64, and between addresses of the inputs modulo 16
//     bytes; in gs_aggregate_cuda also with the number of multiprocessors, and in gs_pcgrad_cuda on a part of a GPU
//     that cannot run eight blocks together;
//   * calls that may run at the same time, on different threads or streams, each need a workspace of their own;
//   * the _cuda functions only enqueue work, on a stream of the current device: gradients, outputs, T x T data and
//     workspace are in that device's memory, while gs_gradients with its arrays and the array of outputs are read on
//     the host during the call.
// Every thread that computes, the caller's or a worker, needs 512 KiB of stack (2 MiB when built with a sanitizer).
#ifndef GRADSURGERY_GRADSURGERY_H_
#define GRADSURGERY_GRADSURGERY_H_

#include <stdint.h>

// Define GS_API as empty when the kernels are linked into another library that should not export them.
#ifndef GS_API
#define GS_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define GS_VERSION "0.1.0"
#define GS_MAX_TASKS 256

typedef enum gs_status {
  GS_OK = 0,
  GS_INVALID_ARGUMENT = 1,
  GS_UNSUPPORTED = 2,  // this build, machine or size cannot serve the call
} gs_status;

typedef enum gs_dtype {
  GS_FLOAT64 = 0,
  GS_FLOAT32 = 1,
  GS_BFLOAT16 = 2,
  GS_FLOAT16 = 3,
} gs_dtype;

typedef enum gs_solver {
  GS_EXACT = 0,
  GS_FRANK_WOLFE = 1,
} gs_solver;

typedef enum gs_method {
  GS_PCGRAD = 0,
  GS_MIN_NORM = 1,
  GS_WEIGHTING = 2,  // one of gs_weighting
} gs_method;

// Methods whose weights depend on G, on a preference, and on up to two numbers, parameter and limit. docs/methods.md
// and the docstrings in gradsurgery/methods give the equations, scales and usual parameters. A ridge is relative to
// trace(G).
typedef enum gs_weighting {
  GS_UPGRAD = 0,    // preference; parameter: ridge > 0, finite
  GS_DUALPROJ = 1,  // preference; parameter: ridge > 0, finite
  GS_CAGRAD = 2,    // parameter: c in 0..1e30
  GS_FAIRGRAD = 3,  // parameter: alpha > 0, finite (1 is Nash-MTL); limit > 0: the largest |d|, or INFINITY for none
  GS_IMTL_G = 4,
  GS_CONFIG = 5,              // preference
  GS_ALIGNED_MTL_MIN = 6,     // preference
  GS_ALIGNED_MTL_MEDIAN = 7,  // preference
  GS_ALIGNED_MTL_RMSE = 8,    // preference
  // Whole numbers. parameter: how many gradients may be arbitrary, 0..T; limit: how many are selected, 1..T
  GS_KRUM = 9,
  // preference: each task's share of progress, [0] is ignored; NULL: parameter in 0..1 for every task. The docstring's
  // n_t are the gradients as they are. To use n_t = s_t g_t, pass s_t s_u G_tu, and multiply weight t by s_t / s_0.
  GS_PCD = 10,
} gs_weighting;

// Rules that G does not determine: each coordinate of the direction is computed from the T values of that coordinate.
typedef enum gs_rule_kind {
  GS_GRADDROP = 0,
  GS_TRIMMED_MEAN = 1,
} gs_rule_kind;

// A rule and its options; the options of the other rule are ignored.
typedef struct gs_rule {
  gs_rule_kind kind;
  uint64_t seed;        // GradDrop: the random numbers are those of (seed, *step), and *step grows by 1
  int64_t* step;        // in memory of the call's device
  const double* leak;   // [T] in memory of the call's device; NULL: 0 for every task
  int64_t num_trimmed;  // trimmed mean: as many largest and as many smallest values are dropped, 0 <= 2 num_trimmed < T
} gs_rule;

// A solver and its options; the options of other methods are ignored.
typedef struct gs_solve {
  gs_method method;
  uint64_t seed;  // PCGrad, as in gs_pcgrad_*: the orders are those of (seed, *step), and *step grows by 1
  int64_t* step;  // in memory of the call's device; NULL: step 0
  int mean;
  gs_solver solver;  // this and the next two: min-norm, as in gs_min_norm_*
  int64_t max_iter;
  double tol;
  gs_weighting weighting;  // this and the rest: GS_WEIGHTING, as in gs_weights_*
  const double* preference;
  double parameter;
  double limit;
} gs_solve;

// The gradients of T tasks with respect to P parameter tensors, read in place.
// A dense matrix [T, N] of any row stride is the case P = 1.
typedef struct gs_gradients {
  int64_t num_tasks;        // T, 1..GS_MAX_TASKS
  int64_t num_params;       // P
  int64_t num_segments;     // S, 1..2^31-1: groups of parameters, each with a G and weights of its own
  const void* const* data;  // [P][T] device or host pointers; NULL: the task has no gradient there
  const int64_t* numel;     // [P] elements of each parameter, <= 2^52 in all; its T gradients share one dense layout
  const int32_t* dtype;     // [P] gs_dtype
  const int32_t* segment;   // [P] in 0..S-1; NULL: all in segment 0
} gs_gradients;

// A parallel loop: run(context, count, body, arg) calls body(arg, i) once for each i in 0..count-1, in any order
// and on any threads, and returns when all are done. If the gs_parallel or its run is NULL, everything runs on the
// calling thread. An exception thrown by run reaches the caller and leaves the outputs incomplete.
typedef struct gs_parallel {
  void (*run)(void* context, int64_t count, void (*body)(void* arg, int64_t index), void* arg);
  void* context;
} gs_parallel;

typedef struct CUstream_st* gs_stream;

GS_API const char* gs_version(void);
GS_API const char* gs_last_error(void);
// The instruction set in use: "amx", "avx512", "avx2" or "baseline". With "amx", the process asks Linux for the matrix
// unit at its first Gram matrix where 16, or 24 or more, tasks have a bfloat16 gradient of the same parameter. Signal
// stacks that are set up after that must have room for the unit's registers: sysconf(_SC_MINSIGSTKSZ) gives the size.
GS_API const char* gs_cpu_isa(void);
GS_API int gs_has_cuda(void);  // 1 if the CUDA kernels were compiled in

// Gram matrices G[s] = J_s J_s^T, gram is [S, T, T] float64 and exactly symmetric.
// |G_ij - exact| <= 1e-6 |g_i| |g_j| (1e-13 for float64 inputs).
GS_API int64_t gs_gram_workspace_bytes(const gs_gradients* grads);
GS_API gs_status gs_gram_cpu(const gs_gradients* grads, double* gram, void* workspace, int64_t workspace_bytes,
                             const gs_parallel* parallel);
GS_API int64_t gs_gram_cuda_workspace_bytes(const gs_gradients* grads);
GS_API gs_status gs_gram_cuda(const gs_gradients* grads, double* gram, void* workspace, int64_t workspace_bytes,
                              gs_stream stream);

// The direction d_p = sum_t weights[segment(p), t] g_{t,p}, summed in float64 in ascending t and rounded once to the
// parameter's dtype (to 16-bit formats by way of float32). weights is [S, T], out is [P]. A gradient whose weight is 0
// is not read. out[p] may be NULL (skipped) or equal to one of the g_{t,p}, but must not share memory with any other
// gradient or output. With accumulate != 0 the contents of out[p] are added before that rounding.
GS_API int64_t gs_combine_workspace_bytes(const gs_gradients* grads);
GS_API gs_status gs_combine_cpu(const gs_gradients* grads, const double* weights, void* const* out, int accumulate,
                                void* workspace, int64_t workspace_bytes, const gs_parallel* parallel);
GS_API int64_t gs_combine_cuda_workspace_bytes(const gs_gradients* grads);
GS_API gs_status gs_combine_cuda(const gs_gradients* grads, const double* weights, void* const* out, int accumulate,
                                 void* workspace, int64_t workspace_bytes, gs_stream stream);

// The direction of a gs_rule, in float64; rounding, out [P] and accumulate are as above. A task without a gradient
// counts as zeros. A coordinate with a value that is not finite becomes NaN. Segments are ignored.
// GradDrop: a coordinate's result is the sum of its T values, some of them multiplied by leak_t. With P = (1 + sum g /
// sum |g|) / 2, the positive values count in full if P > u, the negative ones if P < u; every other value counts as
// leak_t g_t. u = (w + 1/2) / 2^32 with w = word i mod 4 of Philox4x32-10 with key seed and counter (*step mod 2^32,
// *step / 2^32, 2^31 + b / 2^32, b mod 2^32), b = i / 4. Coordinate i is the number of the element, counted through all
// parameters in order, each in memory order.
GS_API int64_t gs_combine_by_rule_workspace_bytes(const gs_gradients* grads);
GS_API gs_status gs_combine_by_rule_cpu(const gs_gradients* grads, const gs_rule* rule, void* const* out,
                                        int accumulate, void* workspace, int64_t workspace_bytes,
                                        const gs_parallel* parallel);
GS_API int64_t gs_combine_by_rule_cuda_workspace_bytes(const gs_gradients* grads);
GS_API gs_status gs_combine_by_rule_cuda(const gs_gradients* grads, const gs_rule* rule, void* const* out,
                                         int accumulate, void* workspace, int64_t workspace_bytes, gs_stream stream);

// PCGrad visiting orders [T, T]: row i is a permutation of 0..T-1 that depends only on (seed, step, i).
// On a GPU the step is read from device memory.
GS_API gs_status gs_task_order_cpu(int64_t num_tasks, uint64_t seed, uint64_t step, int64_t* order);
GS_API gs_status gs_task_order_cuda(int64_t num_tasks, uint64_t seed, const int64_t* step, int64_t* order,
                                    gs_stream stream);

// Random weights [batch, T]: softmax(z), the same for every problem, but NaN for a problem whose G is not finite. z_t =
// sqrt(-2 ln u) cos(2 pi v), where u and v are (w + 1/2) / 2^32 for the words w number 2t and 2t + 1 of Philox4x32-10
// with key seed and counter (step mod 2^32, step / 2^32, 2^32 - 1, block). *step, in memory of the call's device, grows
// by 1.
GS_API gs_status gs_random_cpu(const double* gram, int64_t batch, int64_t num_tasks, uint64_t seed, int64_t* step,
                               double* weights);
GS_API gs_status gs_random_cuda(const double* gram, int64_t batch, int64_t num_tasks, uint64_t seed, int64_t* step,
                                double* weights, gs_stream stream);

// PCGrad's weights [batch, T] (Yu et al., NeurIPS 2020, Algorithm 1) from Gram matrices [batch, T, T]: for each i, v
// starts at g_i and visits all g_j, j != i, in the order of row i; if v . g_j < 0, v becomes v - (v . g_j / |g_j|^2)
// g_j. The direction is the sum of the final v over all i, or their mean if mean != 0. order is [T, T], or NULL for
// gs_task_order_*(seed, step). A G that is not finite yields NaN. On a GPU the step is read from device memory (NULL:
// step 0) and, with advance != 0, incremented there afterwards.
GS_API gs_status gs_pcgrad_cpu(const double* gram, int64_t batch, int64_t num_tasks, const int64_t* order,
                               uint64_t seed, uint64_t step, int mean, double* weights, const gs_parallel* parallel);
GS_API gs_status gs_pcgrad_cuda(const double* gram, int64_t batch, int64_t num_tasks, const int64_t* order,
                                uint64_t seed, int64_t* step, int advance, int mean, double* weights, gs_stream stream);

// Min-norm weights [batch, T]: argmin of w^T G w over the simplex. max_iter >= 1 and tol >= 0 apply to Frank-Wolfe only
// (Sener & Koltun, NeurIPS 2018, Algorithm 2), which ends after max_iter steps or a step shorter than tol. The exact
// solver ends by itself, after at most 8 T + 32 steps and T + 1 factorizations. A G that is not finite yields NaN.
GS_API int64_t gs_min_norm_workspace_bytes(int64_t batch, int64_t num_tasks);
GS_API gs_status gs_min_norm_cpu(const double* gram, int64_t batch, int64_t num_tasks, gs_solver solver,
                                 int64_t max_iter, double tol, double* weights, void* workspace,
                                 int64_t workspace_bytes, const gs_parallel* parallel);
GS_API int64_t gs_min_norm_cuda_workspace_bytes(int64_t batch, int64_t num_tasks);
GS_API gs_status gs_min_norm_cuda(const double* gram, int64_t batch, int64_t num_tasks, gs_solver solver,
                                  int64_t max_iter, double tol, double* weights, void* workspace,
                                  int64_t workspace_bytes, gs_stream stream);

// num_iter >= 0 projected gradient steps on weights [batch, T] in the simplex, with matrices A [batch, T, T], which
// need not be symmetric. Each step sets v = momentum v + A w, then w = P(w - lr v), where v is 0 at first and P is the
// projection on the simplex. A matrix that is not finite yields NaN.
GS_API int64_t gs_simplex_steps_workspace_bytes(int64_t batch, int64_t num_tasks);
GS_API gs_status gs_simplex_steps_cpu(const double* matrix, int64_t batch, int64_t num_tasks, double lr,
                                      double momentum, int64_t num_iter, double* weights, void* workspace,
                                      int64_t workspace_bytes, const gs_parallel* parallel);
GS_API int64_t gs_simplex_steps_cuda_workspace_bytes(int64_t batch, int64_t num_tasks);
GS_API gs_status gs_simplex_steps_cuda(const double* matrix, int64_t batch, int64_t num_tasks, double lr,
                                       double momentum, int64_t num_iter, double* weights, void* workspace,
                                       int64_t workspace_bytes, gs_stream stream);

// The weights [batch, T] of a gs_weighting. preference is [T], or NULL for 1 / T each (ConFIG: 1 each; PCD: parameter).
// Options that the weighting does not have are ignored. Every solver ends, even if it did not converge, and then
// returns its best iterate. A G that is not finite yields NaN.
GS_API int64_t gs_weights_workspace_bytes(gs_weighting weighting, int64_t batch, int64_t num_tasks);
GS_API gs_status gs_weights_cpu(const double* gram, int64_t batch, int64_t num_tasks, gs_weighting weighting,
                                const double* preference, double parameter, double limit, double* weights,
                                void* workspace, int64_t workspace_bytes, const gs_parallel* parallel);
GS_API int64_t gs_weights_cuda_workspace_bytes(gs_weighting weighting, int64_t batch, int64_t num_tasks);
GS_API gs_status gs_weights_cuda(const double* gram, int64_t batch, int64_t num_tasks, gs_weighting weighting,
                                 const double* preference, double parameter, double limit, double* weights,
                                 void* workspace, int64_t workspace_bytes, gs_stream stream);

// Gradient Vaccine's weights [batch, T] (Wang et al., ICLR 2021, Algorithm 1): like PCGrad, but each pair has a target
// cosine r_ij in place of 0. If cos(v, g_j) < r_ij, v moves along g_j until the cosine is r_ij. targets [batch, T, T]
// holds r: after each visit r_ij moves towards the cosine found, by the fraction beta in 0..1 (not if v or g_j is
// zero); if G is not finite, targets stays as it was. Targets begin at 0. order is [T, T] as for PCGrad, but not NULL,
// a row per task, the same for every problem.
GS_API gs_status gs_gradvac_cpu(const double* gram, int64_t batch, int64_t num_tasks, const int64_t* order, double beta,
                                double* targets, double* weights, const gs_parallel* parallel);
GS_API gs_status gs_gradvac_cuda(const double* gram, int64_t batch, int64_t num_tasks, const int64_t* order,
                                 double beta, double* targets, double* weights, gs_stream stream);

// Stages 2 to 4 in one call: gram [S, T, T], the solver's weights [S, T], and the direction out [P], as from gs_gram_*,
// then gs_pcgrad_*, gs_min_norm_* or gs_weights_*, then gs_combine_*. On a GPU, one launch that reads the gradients
// once does all of it for PCGrad of up to 16 tasks and exact min-norm of up to 8, under these conditions: one segment,
// one dtype, pointers aligned to 16 bytes, a GPU with fast float64, and gradients that fit the multiprocessors' shared
// memory (16-bit formats: at most 16 MB). Each multiprocessor then sums a part of the columns.
GS_API int64_t gs_aggregate_workspace_bytes(const gs_gradients* grads, const gs_solve* solve);
GS_API gs_status gs_aggregate_cpu(const gs_gradients* grads, const gs_solve* solve, double* gram, double* weights,
                                  void* const* out, int accumulate, void* workspace, int64_t workspace_bytes,
                                  const gs_parallel* parallel);
GS_API int64_t gs_aggregate_cuda_workspace_bytes(const gs_gradients* grads, const gs_solve* solve);
GS_API gs_status gs_aggregate_cuda(const gs_gradients* grads, const gs_solve* solve, double* gram, double* weights,
                                   void* const* out, int accumulate, void* workspace, int64_t workspace_bytes,
                                   gs_stream stream);

// One closed-form GradNorm step (Chen et al., ICML 2018, equations 1 and 2) on weights [batch, T]; all inputs are
// [batch, T]. With norms n_i, losses L_i, G_i = w_i n_i, r_i = (L_i / L_i(0)) / mean_k (L_k / L_k(0)) and the target
// mean(G) r_i^alpha held constant, w_i moves by -lr sign(G_i - target_i) n_i, but not below 0; then the weights are
// scaled to sum to T. If all would reach 0, they stay as they were. alpha >= 0, lr >= 0, both finite; norms >= 0,
// losses >= 0, initial losses > 0. new_weights may be the same array as weights.
GS_API gs_status gs_gradnorm_cpu(const double* weights, const double* norms, const double* losses,
                                 const double* initial_losses, int64_t batch, int64_t num_tasks, double alpha,
                                 double lr, double* new_weights);
GS_API gs_status gs_gradnorm_cuda(const double* weights, const double* norms, const double* losses,
                                  const double* initial_losses, int64_t batch, int64_t num_tasks, double alpha,
                                  double lr, double* new_weights, gs_stream stream);

// One step of GradNorm training: weights [batch, T] receives a copy of state_weights (1 each at the start), which is
// then updated with the norms sqrt(G_ii). An initial loss that is not positive and finite (NaN at the start) is
// replaced by the current loss. A step with values that are not finite leaves state_weights as they were; where G's
// diagonal is not finite, weights is NaN.
GS_API gs_status gs_gradnorm_step_cpu(const double* gram, const double* losses, int64_t batch, int64_t num_tasks,
                                      double alpha, double lr, double* state_weights, double* initial_losses,
                                      double* weights);
GS_API gs_status gs_gradnorm_step_cuda(const double* gram, const double* losses, int64_t batch, int64_t num_tasks,
                                       double alpha, double lr, double* state_weights, double* initial_losses,
                                       double* weights, gs_stream stream);

#ifdef __cplusplus
}
#endif

#endif  // GRADSURGERY_GRADSURGERY_H_
