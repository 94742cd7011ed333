// SPDX-License-Identifier: MIT
// Stage 2 on the CPU: splits each segment's columns into a fixed number of slots, sums each slot in one thread, and
// adds the slots in order. The slots depend on the sizes alone, so the bits do not depend on the threads.
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "boundary.h"
#include "kernels.h"

namespace gs {
namespace {

constexpr int64_t kMaxSlots = 64;         // per segment
constexpr int64_t kSlotElements = 65536;  // a slot smaller than this is not worth a thread
constexpr int64_t kSlotAlignment = 64;    // columns
// How much is summed in one chain of additions: if all roundings went the same way, longer ones could exceed the error
// bound for float64.
constexpr int64_t kPartColumns = 57344;  // whole blocks of most kernels
constexpr int64_t kPartTerms = 1024;     // a term is the sum of at least 64 columns, or of a whole parameter

static_assert(GS_MAX_TASKS <= kMaxSlots * 64 && GS_MAX_TASKS <= kSlotElements);

int64_t slots_of(int64_t columns, int64_t num_tasks) {
  const int64_t limit = kMaxSlots * 64 / num_tasks;  // bounds the partial sums' bytes
  return std::clamp<int64_t>(columns / (kSlotElements / num_tasks), 1, std::min(kMaxSlots, limit));
}

// Parameters sorted by segment, and the slots of each segment.
struct Plan {
  int64_t* first_param;  // [S + 1] into params
  int64_t* first_slot;   // [S + 1]
  int64_t* columns;      // [S]
  int64_t* params;       // [P] parameter indices, in order within a segment
  int64_t parts;         // 2 if slots may be summed in parts, else 1
  double* partials;      // [slots][parts][T][T]: a slot's sum, and the sum of its earlier parts
  int64_t bytes;

  Plan(const gs_gradients& g, void* workspace) {
    Workspace space(workspace);
    const int64_t segments = g.num_segments;
    first_param = space.take<int64_t>(segments + 1);
    first_slot = space.take<int64_t>(segments + 1);
    columns = space.take<int64_t>(segments);
    params = space.take<int64_t>(g.num_params);
    int64_t total = 0;
    for (int64_t p = 0; p < g.num_params; p++) total += g.numel[p];
    // Upper bounds for every split of the columns into segments.
    int64_t most = slots_of(total, g.num_tasks), width = total / most + kSlotAlignment;
    if (segments != 1) {
      most = segments + std::min(segments * kMaxSlots, total / (kSlotElements / g.num_tasks));
      width = total;
    }
    parts = width / 64 + width / kPartColumns + g.num_params + 2 < kPartTerms ? 1 : 2;
    partials = space.take<double>(most * parts * g.num_tasks * g.num_tasks);
    bytes = space.bytes();
    if (workspace) fill(g);
  }

  void fill(const gs_gradients& g) {
    const int64_t segments = g.num_segments;
    std::fill(first_param, first_param + segments + 1, 0);
    std::fill(columns, columns + segments, 0);
    for (int64_t p = 0; p < g.num_params; p++) {
      first_param[segment_of(g, p) + 1]++;
      columns[segment_of(g, p)] += g.numel[p];
    }
    first_slot[0] = 0;
    for (int64_t s = 0; s < segments; s++) {
      first_param[s + 1] += first_param[s];
      first_slot[s + 1] = first_slot[s] + slots_of(columns[s], g.num_tasks);
    }
    for (int64_t p = 0; p < g.num_params; p++) params[first_param[segment_of(g, p)]++] = p;
    for (int64_t s = segments; s > 0; s--) first_param[s] = first_param[s - 1];
    first_param[0] = 0;
  }
};

// While this object lives, and if on, this thread's subnormal results are zeros: a subnormal float product takes the
// processor a hundred clocks, and is too small to matter (gram.inl).
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  explicit FlushSubnormals(bool on) {
    if (on) _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON);
  }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_ = _mm_getcsr();
#else
  explicit FlushSubnormals(bool) {}
#endif
};

// Sums the products of columns begin..end of a segment in the upper triangle of sum; `earlier` is scratch for slots of
// several parts.
void sum_columns(const gs_gradients& g, const Plan& plan, int64_t segment, int64_t begin, int64_t end, double* sum,
                 double* earlier) {
  const int64_t square = g.num_tasks * g.num_tasks;
  const void* rows[GS_MAX_TASKS];
  int32_t index[GS_MAX_TASKS];
  int64_t start = 0, terms = 0;
  bool has_earlier = false;
  const auto add_earlier = [&] {
    for (int64_t i = 0; i < square; i++) sum[i] += earlier[i];
  };
  std::fill(sum, sum + square, 0.0);
  for (int64_t i = plan.first_param[segment]; i < plan.first_param[segment + 1] && start < end; i++) {
    const int64_t p = plan.params[i], stop = start + g.numel[p], to = std::min(end, stop);
    for (int64_t from = std::max(begin, start); from < to; from += kPartColumns) {
      const int64_t columns = std::min(kPartColumns, to - from);
      if (terms >= kPartTerms) {
        if (has_earlier) add_earlier();
        std::copy(sum, sum + square, earlier);
        std::fill(sum, sum + square, 0.0);
        has_earlier = true;
        terms = 0;
      }
      terms += 1 + columns / 64;
      int64_t present = 0;
      for (int64_t t = 0; t < g.num_tasks; t++) {
        const void* data = g.data[p * g.num_tasks + t];
        if (!data) continue;
        rows[present] = offset(data, g.dtype[p], from - start);
        index[present++] = static_cast<int32_t>(t);
      }
      if (present == 0) continue;
      const auto dtype = static_cast<gs_dtype>(g.dtype[p]);
      const FlushSubnormals flush(dtype != GS_FLOAT64);
      kernels().gram(rows, index, present, dtype, columns, sum, g.num_tasks);
    }
    start = stop;
  }
  if (has_earlier) add_earlier();
}

}  // namespace
}  // namespace gs

int64_t gs_gram_workspace_bytes(const gs_gradients* grads) {
  return gs::check(grads) == GS_OK ? gs::Plan(*grads, nullptr).bytes : -1;
}

gs_status gs_gram_cpu(const gs_gradients* grads, double* gram, void* workspace, int64_t workspace_bytes,
                      const gs_parallel* parallel) {
  using namespace gs;
  GS_REQUIRE(grads && gram, "grads and gram must not be NULL");
  if (const gs_status status = check(*grads)) return status;
  const gs_gradients& g = *grads;
  if (const gs_status status = gs::check_workspace(workspace, workspace_bytes, Plan(g, nullptr).bytes)) return status;
  const Plan plan(g, workspace);
  const int64_t tasks = g.num_tasks, square = tasks * tasks, segments = g.num_segments;

  const auto sum_slot = [&](int64_t slot) {
    const int64_t s = std::upper_bound(plan.first_slot, plan.first_slot + segments + 1, slot) - plan.first_slot - 1;
    const int64_t k = slot - plan.first_slot[s], count = plan.first_slot[s + 1] - plan.first_slot[s];
    const int64_t step = (plan.columns[s] + count - 1) / count;
    const int64_t width = (step + kSlotAlignment - 1) / kSlotAlignment * kSlotAlignment;
    const int64_t begin = std::min(k * width, plan.columns[s]), end = std::min(begin + width, plan.columns[s]);
    double* const sum = plan.partials + slot * plan.parts * square;
    sum_columns(g, plan, s, begin, end, sum, sum + square);
  };
  parallel_for(parallel, plan.first_slot[segments], sum_slot);

  const auto add_slots = [&](int64_t row) {
    const int64_t s = row / tasks, i = row % tasks;
    double* const out = gram + s * square + i * tasks;
    std::fill(out + i, out + tasks, 0.0);
    for (int64_t slot = plan.first_slot[s]; slot < plan.first_slot[s + 1]; slot++) {
      const double* const sum = plan.partials + slot * plan.parts * square + i * tasks;
      for (int64_t j = i; j < tasks; j++) out[j] += sum[j];
    }
  };
  const bool serial = plan.first_slot[segments] * square < kSlotElements;
  parallel_for(serial ? nullptr : parallel, segments * tasks, add_slots);
  for (int64_t s = 0; s < segments; s++) {
    for (int64_t i = 0; i < tasks; i++) {
      for (int64_t j = 0; j < i; j++) gram[s * square + i * tasks + j] = gram[s * square + j * tasks + i];
    }
  }
  return GS_OK;
}
