// SPDX-License-Identifier: MIT
// Parts of fused.cu: a block's columns of all rows in shared memory, and the products of the rows.
#pragma once
#include "cuda/fused.cuh"

namespace gs::gpu {

constexpr int kFusedThreads = 256, kFusedWarps = kFusedThreads / kWarp;

// Bytes from row to row in shared memory, such that lanes that read a few columns of eight rows use all banks.
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
  // Calls body(param, from, to) for the pieces of parameters in the columns first..last; from and to count within the
  // parameter.
  template <class Body>
  GS_DEVICE void each_piece(int64_t first, int64_t last, const Body& body) const {
    for (int p = table.param_of(first); p < table.params && table.first_column(p) < last; p++) {
      const int64_t start = table.first_column(p),
                    stop = p + 1 < table.params ? table.first_column(p + 1) : table.columns;
      body(p, first > start ? first - start : 0, (last < stop ? last : stop) - start);
    }
  }

  // Starts to copy the rows' columns first..last, with zeros for absent rows and padding. Each row is copied by one
  // warp, or by two to eight if there are few rows.
  GS_DEVICE void copy(int64_t first, int64_t last) const {
    const int tasks = table.num_tasks, sharing = tasks > 4 ? 0 : tasks > 2 ? 1 : 4 - tasks;  // 2^sharing warps a row
    const int warp = thread() / kWarp, lanes = kWarp << sharing, lane = thread() & (lanes - 1);
    each_piece(first, last, [&](int p, int64_t from, int64_t to) {
      const int64_t numel = table.numel(p), start = table.first_column(p), there = (to < numel ? to : numel) - from;
      const int vectors = static_cast<int>((to - from) / kVector<In>);
      const int whole = there < 0 ? 0 : static_cast<int>(there / kVector<In>);
      for (int t = warp >> sharing; t < tasks; t += kFusedWarps >> sharing) {
        const In* const row = table.template pointer<const In>(p, t);
        auto* const target = reinterpret_cast<Vector<In>*>(at(t, start + from));
        const auto* const source = reinterpret_cast<const Vector<In>*>(row + (row ? from : 0));
        const int copied = row ? whole : 0;
        for (int v = lane; v < copied; v += lanes) copy_to_shared(target + v, source + v);
        for (int v = copied + lane; v < vectors; v += lanes) {
          Vector<In> vector = {};
          const int64_t column = from + int64_t{v} * kVector<In>;
#pragma unroll
          for (int e = 0; e < kVector<In>; e++) {
            if (row && column + e < numel) vector.set(e, row[column + e]);
          }
          target[v] = vector;
        }
      }
    });
  }
};

// The products of up to kTasks tasks; each lane sums those of its own columns.
template <int kTasks>
struct LaneProducts {
  static constexpr int kCount = static_cast<int>(pairs_of(kTasks)), kUnroll = 8 / kTasks;
  double sum[kCount] = {};

  template <class In, class Table>
  GS_DEVICE void add(const Columns<In, Table>& columns, int64_t first, int64_t last) {
    const int num_tasks = columns.table.num_tasks;
#pragma unroll kUnroll
    for (int64_t column = first + thread(); column < last; column += kFusedThreads) {
      double x[kTasks];
#pragma unroll
      for (int t = 0; t < kTasks; t++) x[t] = t < num_tasks ? to_double(*columns.at(t, column)) : 0;
#pragma unroll
      for (int i = 0; i < kTasks; i++) {
#pragma unroll
        for (int j = i; j < kTasks; j++) sum[pair_index(i, j, kTasks)] += x[i] * x[j];
      }
    }
  }

  // Writes the warp's sums.
  GS_DEVICE void store(int num_tasks, double* pairs) const {
    sum_lanes(sum, 0, kCount, [&](int pair, double value) {
      int i = 0;
      for (; pair >= kTasks - i; i++) pair -= kTasks - i;
      if (i + pair < num_tasks) pairs[pair_index(i, i + pair, num_tasks)] = value;
    });
  }
};

// The products of up to 8 kHalves tasks in a warp's tiles: of all rows with rows 0..7, and with rows 8..15.
template <int kHalves>
struct TileProducts {
  double tile[2][kHalves][4] = {};  // two sets, so that instructions need not wait for each other

  template <class In, class Table>
  GS_DEVICE void add(const Columns<In, Table>& columns, int64_t first, int64_t last) {
    constexpr int64_t kStep = 8;
    const int lane = thread() % kWarp, g = lane / 4, k = lane % 4, num_tasks = columns.table.num_tasks;
    const auto value = [&](int row, int64_t column) {
      return row < num_tasks ? to_double(*columns.at(row, column)) : 0.0;
    };
#pragma unroll 1
    for (int64_t column = first + thread() / kWarp * (2 * kStep) + k; column < last;
         column += kFusedWarps * (2 * kStep)) {
#pragma unroll
      for (int set = 0; set < 2; set++) {
        const int64_t at = column + set * kStep;
        double a[4] = {value(g, at), 0, value(g, at + 4), 0};
        if constexpr (kHalves == 2) {
          a[1] = value(g + 8, at);
          a[3] = value(g + 8, at + 4);
        }
#pragma unroll
        for (int half = 0; half < kHalves; half++) multiply_double(tile[set][half], a, {a[half], a[2 + half]});
      }
    }
  }

  // Writes the upper triangle.
  GS_DEVICE void store(int num_tasks, double* pairs) const {
    const int lane = thread() % kWarp, g = lane / 4, k = lane % 4;
#pragma unroll
    for (int half = 0; half < kHalves; half++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = g + e / 2 * 8, j = 8 * half + 2 * k + e % 2;
        if (i <= j && j < num_tasks) pairs[pair_index(i, j, num_tasks)] = tile[0][half][e] + tile[1][half][e];
      }
    }
  }
};

// Calls body(products) with the type that suits the number of tasks.
template <class Body>
GS_DEVICE void with_products(int num_tasks, const Body& body) {
  if (num_tasks <= 2) {
    body(LaneProducts<2>());
  } else if (num_tasks <= 4) {
    body(LaneProducts<4>());
  } else if (num_tasks <= 8) {
    body(TileProducts<1>());
  } else {
    body(TileProducts<2>());
  }
}

}  // namespace gs::gpu
