// SPDX-License-Identifier: MIT
// Stages 2 to 4 in one launch, for gradients that fit the multiprocessors' shared memory: a block copies its slot of
// columns there, sums the products, and waits for the others; then every block adds up all slots and solves the same
// T x T problem, and combines its columns from shared memory. Up to a few blocks form a cluster, whose barrier is
// short; more need one across the grid, and a launch that is only let go when all of them run at once.
#include <algorithm>

#include "cuda/fused.cuh"
#include "cuda/min_norm.cuh"
#include "cuda/pcgrad.cuh"

namespace gs::gpu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kStages = 4;  // parts of a slot, whose products are summed while the next ones are on their way
constexpr int kPairs = kFusedTasks * (kFusedTasks + 1) / 2;

// What the stages keep in shared memory beside the gradients, one after the other.
struct Scratch {
  double gram[kFusedTasks * kFusedTasks];
  double weights[kFusedTasks];
  double pcgrad[kWarps * kFusedTasks];
  union {
    double parts[kWarps][kPairs];  // of the warps' products, then of the slots
    FaceMemory<kFaceTasks> faces;
    double min_norm[min_norm_scratch_bytes(kFusedTasks) / 8];
  };
};

constexpr int64_t kScratchBytes = (int64_t{sizeof(Scratch)} + 15) / 16 * 16;

// Bytes between rows in shared memory: lanes that read a few columns of eight rows meet all banks.
template <class In>
GS_HOST_DEVICE constexpr int64_t pitch_of(int64_t width) {
  return width * int64_t{sizeof(In)} + (sizeof(In) == 8 ? 32 : 16);
}

// A block's columns, in parameters that are padded to kFusedUnit.
template <class In, class Table>
struct Columns {
  const Table& table;
  int64_t begin, end;
  unsigned char* rows;

  GS_DEVICE In* at(int t, int64_t column) const {
    return reinterpret_cast<In*>(rows + t * pitch_of<In>(table.width)) + (column - begin);
  }
  // Calls body(param, from, to) for the pieces of parameters in the columns first..last, from and to being columns of
  // the parameter.
  template <class Body>
  GS_DEVICE void each_piece(int64_t first, int64_t last, const Body& body) const {
    for (int p = table.param_of(first); p < table.params && table.first_column(p) < last; p++) {
      const int64_t start = table.first_column(p),
                    stop = p + 1 < table.params ? table.first_column(p + 1) : table.columns;
      body(p, first > start ? first - start : 0, (last < stop ? last : stop) - start);
    }
  }

  // Starts to copy the rows' columns first..last, with zeros for absent rows and padding.
  GS_DEVICE void copy(int64_t first, int64_t last) const {
    each_piece(first, last, [&](int p, int64_t from, int64_t to) {
      const int64_t numel = table.numel(p), start = table.first_column(p);
      const int vectors = static_cast<int>((to - from) / kVector<In>);
      for (int item = thread(); item < table.num_tasks * vectors; item += threads()) {
        const int t = item / vectors;
        const int64_t column = from + item % vectors * kVector<In>;
        const In* row = table.template pointer<const In>(p, t);
        auto* to_vector = reinterpret_cast<Vector<In>*>(at(t, start + column));
        if (column + kVector<In> <= numel || !row) {
          copy_to_shared(to_vector, row ? reinterpret_cast<const Vector<In>*>(row + column) : nullptr);
        } else {
          Vector<In> vector = {};
#pragma unroll
          for (int e = 0; e < kVector<In>; e++) {
            if (column + e < numel) vector.set(e, row[column + e]);
          }
          *to_vector = vector;
        }
      }
    });
  }
};

// Adds the products of the columns first..last to a warp's tiles: of rows 0..15 with rows 0..7, and with rows 8..15.
template <class In, class Table>
GS_DEVICE void add_products(const Columns<In, Table>& columns, int64_t first, int64_t last, double (&tile)[2][4]) {
  constexpr int64_t kStep = 8;
  const int lane = thread() % kWarp, g = lane / 4, k = lane % 4, num_tasks = columns.table.num_tasks;
  const auto value = [&](int row, int64_t column) {
    return row < num_tasks ? to_double(*columns.at(row, column)) : 0.0;
  };
#pragma unroll 2
  for (int64_t column = first + thread() / kWarp * kStep + k; column < last; column += kWarps * kStep) {
    const double a[4] = {value(g, column), value(g + 8, column), value(g, column + 4), value(g + 8, column + 4)};
    const double b[2][2] = {{a[0], a[2]}, {a[1], a[3]}};
    multiply_double(tile[0], a, b[0]);
    if (num_tasks > 8) multiply_double(tile[1], a, b[1]);
  }
}

// Writes a tile's upper triangle to the pairs of a warp.
GS_DEVICE void store_pairs(const double (&tile)[2][4], int num_tasks, double* pairs) {
  const int lane = thread() % kWarp, g = lane / 4, k = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int i = g + e / 2 * 8, j = 8 * half + 2 * k + e % 2;
      if (i <= j && j < num_tasks) pairs[pair_index(i, j, num_tasks)] = tile[half][e];
    }
  }
}

// Sums the slots' partial sums in order: each warp a part of the slots, then the parts.
GS_DEVICE void sum_slots(const double* partials, int slots, int num_tasks, Scratch& scratch) {
  const int lane = thread() % kWarp, warp = thread() / kWarp, pairs = static_cast<int>(pairs_of(num_tasks));
  for (int pair = lane; pair < pairs; pair += kWarp) {
    double sum = 0;
#pragma unroll 16
    for (int slot = warp; slot < slots; slot += kWarps) sum += partials[int64_t{slot} * pairs + pair];
    scratch.parts[warp][pair] = sum;
  }
  sync_block();
  for (int e = thread(); e < num_tasks * num_tasks; e += threads()) {
    const int row = e / num_tasks, column = e % num_tasks;
    const auto pair = pair_index(row < column ? row : column, row < column ? column : row, num_tasks);
    double sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w++) sum += scratch.parts[w][pair];
    scratch.gram[e] = sum;
  }
  sync_block();
}

// From scratch.gram to scratch.weights. Called, not inlined: it is the same for all dtypes.
template <gs_method kMethod>
GS_RARE void solve(const FusedProblem& problem, uint64_t step, Scratch& scratch) {
  const int num_tasks = problem.num_tasks, entries = num_tasks * num_tasks;
  bool finite = true;
  for (int e = thread(); e < entries; e += threads()) finite = finite && std::isfinite(scratch.gram[e]);
  const bool broken = any_of_block(!finite);
  if constexpr (kMethod == GS_PCGRAD) {
    solve_pcgrad<1>(scratch.gram, num_tasks, nullptr, problem.seed, step, broken, problem.mean, scratch.pcgrad,
                    scratch.weights);
  } else if (problem.exact && num_tasks <= kFaceTasks && !broken) {
    for (int e = thread(); e < kFaceTasks * kFaceTasks; e += threads()) {
      const int i = e / kFaceTasks, j = e % kFaceTasks;
      scratch.faces.gram[e] = i < num_tasks && j < num_tasks ? scratch.gram[i * num_tasks + j] : 0;
    }
    sync_block();
    solve_faces(scratch.faces, num_tasks, scratch.weights);
  } else if (thread() < kWarp) {
    solve_min_norm(WarpTeam{}, scratch.gram, num_tasks, !broken, problem.exact, problem.max_iter, problem.tol,
                   scratch.weights, scratch.min_norm);
  }
  sync_block();
}

// d = sum_t w_t g_t in float64, in ascending t, from shared memory; a row of weight 0 does not count.
template <class In, class Table>
GS_DEVICE void combine(const Columns<In, Table>& columns, const double* weights) {
  const Table& table = columns.table;
  columns.each_piece(columns.begin, columns.end, [&](int p, int64_t from, int64_t to) {
    In* const out = table.template pointer<In>(p, table.num_tasks);
    const int64_t numel = table.numel(p), start = table.first_column(p);
    const int64_t stop = to < numel ? to : numel;
    if (!out) return;
    for (int64_t column = from + thread() * kVector<In>; column < stop; column += threads() * kVector<In>) {
      double sum[kVector<In>] = {};
      for (int t = 0; t < table.num_tasks; t++) {
        const double weight = weights[t];
        if (weight == 0 || !table.template pointer<const In>(p, t)) continue;
        const auto x = *reinterpret_cast<const Vector<In>*>(columns.at(t, start + column));
#pragma unroll
        for (int e = 0; e < kVector<In>; e++) sum[e] += weight * to_double(x.get(e));
      }
      if (column + kVector<In> <= numel) {
        auto* const target = reinterpret_cast<Vector<In>*>(out + column);
        const Vector<In> before = table.accumulate ? load_last(target) : Vector<In>{};
        Vector<In> result = {};
#pragma unroll
        for (int e = 0; e < kVector<In>; e++) {
          result.set(e, from_double<In>(table.accumulate ? to_double(before.get(e)) + sum[e] : sum[e]));
        }
        *target = result;
      } else {
#pragma unroll
        for (int e = 0; e < kVector<In>; e++) {
          if (column + e >= numel) break;
          out[column + e] = from_double<In>(table.accumulate ? to_double(out[column + e]) + sum[e] : sum[e]);
        }
      }
    }
  });
}

template <class In, gs_method kMethod, Blocks kBlocks, class Table>
GS_KERNEL GS_BLOCKS(kThreads, 1)
    fused_kernel(GS_ARGUMENT(Table) table, double* partials, double* gram, double* weights) {
  wait_for_previous_kernel();
  auto& scratch = shared<Scratch>();
  const int64_t begin = block() * table.width, length = table.columns - begin;
  const int64_t end = begin + (length < table.width ? length : table.width);
  const Columns<In, Table> columns{table, begin, end, reinterpret_cast<unsigned char*>(&scratch) + kScratchBytes};
  // Ahead of the barrier: block 0 will advance it.
  const uint64_t step = kMethod == GS_PCGRAD ? static_cast<uint64_t>(*table.step) : 0;

  const int64_t part = (end - begin + kStages * kFusedUnit - 1) / (kStages * kFusedUnit) * kFusedUnit;
  const auto edge = [&](int stage) { return begin + stage * part < end ? begin + stage * part : end; };
  for (int stage = 0; stage < kStages; stage++) {
    if (edge(stage) < edge(stage + 1)) columns.copy(edge(stage), edge(stage + 1));
    close_copies();
  }
  if (kMethod == GS_PCGRAD) draw_first_orders(table.num_tasks, table.seed, step, scratch.pcgrad);
  double tile[2][4] = {};
  const auto add = [&](auto open) {
    constexpr int kOpen = decltype(open)::value;
    wait_for_copies<kOpen>();
    sync_block();
    add_products(columns, edge(kStages - 1 - kOpen), edge(kStages - kOpen), tile);
  };
  static_assert(kStages == 4);
  add(std::integral_constant<int, 3>{});
  add(std::integral_constant<int, 2>{});
  add(std::integral_constant<int, 1>{});
  add(std::integral_constant<int, 0>{});

  const int num_tasks = table.num_tasks, pairs = static_cast<int>(pairs_of(num_tasks));
  store_pairs(tile, num_tasks, scratch.parts[thread() / kWarp]);
  sync_block();
  for (int pair = thread(); pair < pairs; pair += threads()) {
    double sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w++) sum += scratch.parts[w][pair];
    partials[block() * pairs + pair] = sum;
  }
  if constexpr (kBlocks == Blocks::kCluster) {
    sync_cluster();
  } else {
    sync_grid();
  }
  let_next_kernel_start();

  sum_slots(partials, table.slots, num_tasks, scratch);
  solve<kMethod>(table, step, scratch);
  if (block() == 0) {
    for (int e = thread(); e < num_tasks * num_tasks; e += threads()) gram[e] = scratch.gram[e];
    if (thread() < num_tasks) weights[thread()] = scratch.weights[thread()];
    if (kMethod == GS_PCGRAD && thread() == 0) *table.step = static_cast<int64_t>(step + 1);
  }
  combine(columns, scratch.weights);
}

template <class In, gs_method kMethod>
gs_status launch_with(const AnyTable& table, Blocks blocks, double* partials, double* gram, double* weights,
                      gs_stream stream) {
  const int64_t bytes = kScratchBytes + table.num_tasks * pitch_of<In>(table.width);
  if (blocks == Blocks::kGrid) {
    return launch_as(blocks, &fused_kernel<In, kMethod, Blocks::kGrid, AnyTable>, table.slots, kThreads, bytes, stream,
                     table, partials, gram, weights);
  }
  FusedTable<kSmallTableBytes> small;
  static_cast<FusedProblem&>(small) = table;
  std::copy(table.bytes, table.bytes + kSmallTableBytes, small.bytes);
  return launch_as(blocks, &fused_kernel<In, kMethod, Blocks::kCluster, FusedTable<kSmallTableBytes>>, table.slots,
                   kThreads, bytes, stream, small, partials, gram, weights);
}

}  // namespace

int64_t fused_width_at_most(int32_t dtype, int64_t num_tasks, int64_t shared_bytes) {
  int64_t width = 0;
  with_dtype(dtype, [&](auto in) {
    using In = decltype(in);
    width = ((shared_bytes - kScratchBytes) / num_tasks - pitch_of<In>(0)) / int64_t{sizeof(In)};
    return GS_OK;
  });
  return width / kFusedUnit * kFusedUnit;
}

gs_status launch_fused(const AnyTable& table, const FusedPlan& plan, gs_method method, double* partials, double* gram,
                       double* weights, gs_stream stream) {
  return with_dtype(plan.dtype, [&](auto in) {
    using In = decltype(in);
    return method == GS_PCGRAD ? launch_with<In, GS_PCGRAD>(table, plan.blocks, partials, gram, weights, stream)
                               : launch_with<In, GS_MIN_NORM>(table, plan.blocks, partials, gram, weights, stream);
  });
}

}  // namespace gs::gpu
