// SPDX-License-Identifier: MIT
// Stages 2 to 4 in one launch, for gradients that fit the multiprocessors' shared memory: each block copies its slot of
// columns there, sums the products, and waits for the others; then every block adds up all slots, solves the same
// T x T problem, and combines its columns from shared memory. The barrier across the grid needs a launch that starts
// only if all blocks can run at once.
#include <algorithm>

#include "cuda/faces.cuh"
#include "cuda/fused_products.cuh"
#include "cuda/launch.cuh"
#include "cuda/pcgrad.cuh"

namespace gs::gpu {
namespace {

// A slot is copied in parts: the products of one are summed while the next one is being copied.
constexpr int kParts = 8;
constexpr int kMinPart = 8192;  // bytes: smaller parts would wait for memory one after the other
constexpr int kPairs = kFusedTasks * (kFusedTasks + 1) / 2;
static_assert(kFusedTasks * kFusedTasks <= kFusedThreads);  // one thread for each entry of G

// What the stages keep in shared memory beside the gradients; the members of the union are used one after the other.
struct Scratch {
  double gram[kFusedTasks * kFusedTasks];
  double weights[kFusedTasks];
  double pcgrad[kFusedWarps * kFusedTasks];
  union {
    double parts[kFusedWarps * kPairs];  // the warps' products, then partial sums over slots
    FaceMemory<kFaceTasks> faces;
  };
};

constexpr int64_t kScratchBytes = (int64_t{sizeof(Scratch)} + 15) / 16 * 16;

// Adds the slots' partial sums in order: each group of threads sums a part of the slots, then the parts are added.
GS_DEVICE void sum_slots(const double* partials, int slots, int num_tasks, Scratch& scratch) {
  constexpr int kLoads = 20;  // in flight together
  const int pairs = static_cast<int>(pairs_of(num_tasks)), fitting = kFusedThreads / pairs;
  const int groups = fitting > 16 ? 16 : fitting >= 4 ? fitting : kFusedWarps;
#pragma unroll 1
  for (int item = thread(); item < groups * pairs; item += kFusedThreads) {
    const int group = item / pairs, pair = item % pairs;
    double sum = 0;
#pragma unroll 1
    for (int first = group; first < slots; first += kLoads * groups) {
      double part[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; i++) {
        const int slot = first + i * groups;
        part[i] = slot < slots ? partials[slot * pairs + pair] : 0;
      }
#pragma unroll
      for (int i = 0; i < kLoads; i++) sum += part[i];
    }
    scratch.parts[item] = sum;
  }
  sync_block();
  if (const int pair = thread(); pair < pairs) {
    const int i = row_of_pair(pair, num_tasks), j = i + pair - pair_index(i, i, num_tasks);
    double sum = 0;
#pragma unroll 8
    for (int group = 0; group < groups; group++) sum += scratch.parts[group * pairs + pair];
    scratch.gram[i * num_tasks + j] = sum;
    scratch.gram[j * num_tasks + i] = sum;
  }
  sync_block();
}

// The tasks that this warp projects in PCGrad.
GS_DEVICE WarpTasks warp_tasks() { return {thread() / kWarp, kFusedWarps}; }

// Computes scratch.weights from scratch.gram. Not inlined: it is the same for all dtypes.
GS_RARE void solve(const FusedProblem& problem, uint64_t step, Scratch& scratch) {
  const int num_tasks = problem.num_tasks;
  const bool finite = thread() >= num_tasks * num_tasks || std::isfinite(scratch.gram[thread()]);
  const bool broken = any_of_block(!finite);
  if (problem.method == GS_PCGRAD) {
    if (!broken) {
      project_tasks<1>(scratch.gram, num_tasks, nullptr, problem.seed, step, warp_tasks(), scratch.pcgrad);
    }
    sync_block();
    if (thread() < num_tasks) {
      const double added = sum_parts(scratch.pcgrad, kFusedWarps, num_tasks, thread());
      scratch.weights[thread()] = pcgrad_weight(added, num_tasks, broken, problem.mean);
    }
  } else if (broken) {
    if (thread() < num_tasks) scratch.weights[thread()] = NAN;
  } else {
    load_gram<kFaceTasks>(scratch.faces.gram, scratch.gram, num_tasks);
    solve_min_norm_faces(scratch.faces, num_tasks, scratch.weights);
  }
  sync_block();
}

// d = sum_t w_t g_t in float64, in ascending t, kRows rows at a time; rows of weight 0 are skipped.
template <int kRows, class In, class Table>
GS_DEVICE void combine(const Columns<In, Table>& columns, const double* weights) {
  const Table& table = columns.table;
  const int num_tasks = table.num_tasks;
  columns.each_piece(columns.begin, columns.end, [&](int p, int64_t from, int64_t to) {
    In* const out = table.template pointer<In>(p, num_tasks);
    if (!out) return;
    const int64_t numel = table.numel(p), start = table.first_column(p);
    const int64_t stop = to < numel ? to : numel, whole = stop - (stop - from) % kVector<In>;
    double weight[kRows];
    const auto get_weights = [&](int first) {
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const int t = first + r;
        weight[r] = t < num_tasks && table.template pointer<const In>(p, t) ? weights[t] : 0;
      }
    };
    get_weights(0);
    constexpr int kVectors = 8 / kRows;  // vectors of a row that a thread loads together
    constexpr int64_t step = kFusedThreads * kVector<In>;
#pragma unroll 1
    for (int64_t first = from + thread() * kVector<In>; first < whole; first += kVectors * step) {
      double sum[kVectors][kVector<In>] = {};
#pragma unroll 1
      for (int t = 0; t < num_tasks; t += kRows) {
        if (num_tasks > kRows) get_weights(t);
        Vector<In> x[kVectors][kRows] = {};
#pragma unroll
        for (int v = 0; v < kVectors; v++) {
          const int64_t column = first + v * step;
#pragma unroll
          for (int r = 0; r < kRows; r++) {
            if (weight[r] != 0 && column < whole) {
              x[v][r] = *reinterpret_cast<const Vector<In>*>(columns.at(t + r, start + column));
            }
          }
        }
#pragma unroll
        for (int v = 0; v < kVectors; v++) {
#pragma unroll
          for (int r = 0; r < kRows; r++) {
#pragma unroll
            for (int e = 0; e < kVector<In>; e++) sum[v][e] += weight[r] * to_double(x[v][r].get(e));
          }
        }
      }
#pragma unroll
      for (int v = 0; v < kVectors; v++) {
        if (first + v * step >= whole) break;
        auto* const target = reinterpret_cast<Vector<In>*>(out + first + v * step);
        if (table.accumulate) {
          const Vector<In> before = load_last(target);
#pragma unroll
          for (int e = 0; e < kVector<In>; e++) sum[v][e] += to_double(before.get(e));
        }
        Vector<In> result = {};
#pragma unroll
        for (int e = 0; e < kVector<In>; e++) result.set(e, from_double<In>(sum[v][e]));
        store(target, result);
      }
    }
    for (int64_t column = whole + thread(); column < stop; column += kFusedThreads) {
      double sum = 0;
      for (int t = 0; t < num_tasks; t++) {
        const bool counts = weights[t] != 0 && table.template pointer<const In>(p, t);
        if (counts) sum += weights[t] * to_double(*columns.at(t, start + column));
      }
      if (table.accumulate) sum += to_double(out[column]);
      out[column] = from_double<In>(sum);
    }
  });
}

template <class In, class Table>
GS_KERNEL GS_BLOCKS(kFusedThreads, 1)
    fused_kernel(GS_ARGUMENT(Table) table, double* partials, double* gram, double* weights) {
  wait_for_previous_kernel();
  auto& scratch = shared<Scratch>();
  const int num_tasks = table.num_tasks, pairs = static_cast<int>(pairs_of(num_tasks));
  const int64_t begin = block() * table.width, length = table.columns - begin;
  const int64_t end = begin + (length < table.width ? length : table.width);
  const Columns<In, Table> columns{table, begin, end, reinterpret_cast<unsigned char*>(&scratch) + kScratchBytes};
  // Read before the grid's barrier, after which block 0 advances it.
  const bool is_pcgrad = table.method == GS_PCGRAD;
  const uint64_t step = is_pcgrad && table.step ? static_cast<uint64_t>(*table.step) : 0;

  const auto units = [](int64_t columns) { return (columns + kFusedUnit - 1) / kFusedUnit * kFusedUnit; };
  const int64_t share = units((end - begin + kParts - 1) / kParts);
  const int64_t least = units(kMinPart / (num_tasks * static_cast<int>(sizeof(In))));
  const int64_t part = share > least ? share : least;
  int64_t copied = begin;
  const auto copy_part = [&] {
    const int64_t next = copied + part < end ? copied + part : end;
    if (copied < next) columns.copy(copied, next);
    copied = next;
    close_copies();
  };
  // The first iteration only copies. A copy of that code before the loop would have to be fetched, which takes as long
  // as running it.
  with_products(num_tasks, [&](auto products) {
#pragma unroll 1
    for (int64_t first = begin - part; first < end; first += part) {
      copy_part();
      if (first < begin) {
        if (is_pcgrad) draw_first_orders(num_tasks, table.seed, step, warp_tasks(), scratch.pcgrad);
        continue;
      }
      wait_for_copies<1>();
      sync_block();
      products.add(columns, first, first + part < end ? first + part : end);
    }
    products.store(num_tasks, scratch.parts + thread() / kWarp * pairs);
  });
  sync_block();
  if (const int pair = thread(); pair < pairs) {
    double sum = 0;
#pragma unroll
    for (int w = 0; w < kFusedWarps; w++) sum += scratch.parts[w * pairs + pair];
    partials[block() * pairs + pair] = sum;
  }
  sync_grid();
  let_next_kernel_start();

  sum_slots(partials, table.slots, num_tasks, scratch);
  solve(table, step, scratch);
  if (block() == 0) {
    if (thread() < num_tasks * num_tasks) gram[thread()] = scratch.gram[thread()];
    if (thread() < num_tasks) weights[thread()] = scratch.weights[thread()];
    if (is_pcgrad && table.step && thread() == 0) *table.step = static_cast<int64_t>(step + 1);
  }
  if (num_tasks <= 2) {
    combine<2>(columns, scratch.weights);
  } else if (num_tasks <= 4) {
    combine<4>(columns, scratch.weights);
  } else {
    combine<8>(columns, scratch.weights);
  }
}

template <class In>
gs_status launch_with(const AnyTable& table, double* partials, double* gram, double* weights, gs_stream stream) {
  const int64_t bytes = kScratchBytes + table.num_tasks * pitch_of<In>(table.width);
  if (AnyTable::bytes_of(table.params, table.num_tasks) > kSmallTableBytes) {
    return launch_together(&fused_kernel<In, AnyTable>, table.slots, kFusedThreads, bytes, stream, table, partials,
                           gram, weights);
  }
  FusedTable<kSmallTableBytes> small;
  static_cast<FusedProblem&>(small) = table;
  std::copy(table.bytes, table.bytes + kSmallTableBytes, small.bytes);
  return launch_together(&fused_kernel<In, FusedTable<kSmallTableBytes>>, table.slots, kFusedThreads, bytes, stream,
                         small, partials, gram, weights);
}

}  // namespace

bool has_fused_solver(const gs_solve& solve, int64_t num_tasks) {
  if (solve.method == GS_PCGRAD) return num_tasks <= kFusedTasks;
  return solve.method == GS_MIN_NORM && solve.solver == GS_EXACT && num_tasks <= kFaceTasks;
}

int64_t fused_width_at_most(int32_t dtype, int64_t num_tasks, int64_t shared_bytes) {
  int64_t width = 0;
  with_dtype(dtype, [&](auto in) {
    using In = decltype(in);
    width = ((shared_bytes - kScratchBytes) / num_tasks - pitch_of<In>(0)) / int64_t{sizeof(In)};
    return GS_OK;
  });
  return width / kFusedUnit * kFusedUnit;
}

gs_status launch_fused(const AnyTable& table, int32_t dtype, double* partials, double* gram, double* weights,
                       gs_stream stream) {
  return with_dtype(dtype, [&](auto in) { return launch_with<decltype(in)>(table, partials, gram, weights, stream); });
}

}  // namespace gs::gpu
