// SPDX-License-Identifier: MIT
// Copies of rows to shared memory, several stages ahead of their use, so that enough bytes are under way whatever the
// registers hold.
#pragma once
#include "cuda/tiles.cuh"
#include "cuda/turns.cuh"

namespace gs::gpu {

// A thread's part of the stages of a slot, of which each is a turn. A stage holds, for each row, kHalves neighbouring
// vectors of each of its kRowLanes lanes. Layout says where:
//   * kRows, kHalves: the rows of a thread at most, the vectors of each;
//   * row(r), holds(r): the task of the thread's r-th row, and whether the stage has one;
//   * place(r, half): of its vector in a stage.
// What a stage has of tasks beyond the last one is not written, nor are their products.
template <class In, class Layout>
class Copier {
 public:
  GS_DEVICE Copier(const Table& table, int64_t slot, int num_tasks, const Layout& layout, int first, int stride)
      : turns_(table, slot, first, stride), num_tasks_(num_tasks), layout_(layout) {
    open();
  }
  GS_DEVICE bool done() const { return turns_.done(); }

  GS_DEVICE void fill(Vector<In>* stage) {
    if (!turns_.is_whole()) {
      const Steps steps = turns_.rest_steps();
      each_vector(
          [&](int r, int half, int place) { stage[place] = turns_.load_rest(rows_[r], steps, row_lane(), half); });
    } else if (turns_.aligned()) {
      const int64_t column = turns_.column() + row_lane() * kVector<In>;
      each_vector([&](int r, int half, int place) {
        const In* from = rows_[r] ? rows_[r] + column + half * kStep : nullptr;
        copy_to_shared(stage + place, reinterpret_cast<const Vector<In>*>(from));
      });
    } else {
#pragma unroll 1
      for (int e = 0; e < kVector<In>; e++) {
        const int64_t column = turns_.column() + row_lane() + e * kRowLanes;
        each_vector([&](int r, int half, int place) {
          const In* from = rows_[r] ? rows_[r] + column + half * kStep : nullptr;
          copy_element(reinterpret_cast<In*>(stage + place) + e, from);
        });
      }
    }
    if (turns_.next()) open();
  }

 private:
  static constexpr int64_t kStep = Piece<In, kRowLanes>::kStep;

  template <class Visit>
  GS_DEVICE void each_vector(const Visit& visit) const {
#pragma unroll
    for (int r = 0; r < Layout::kRows; r++) {
      if (!layout_.holds(r)) continue;
#pragma unroll
      for (int half = 0; half < Layout::kHalves; half++) visit(r, half, layout_.place(r, half));
    }
  }
  GS_DEVICE static void copy_element(In* to, const In* from) {
    if constexpr (sizeof(In) >= 4) {
      copy_to_shared(to, from);
    } else {
      *to = from ? *from : In{};  // copies have at least 4 bytes
    }
  }
  GS_DEVICE void open() {
    if (done()) return;
    int task[Layout::kRows];
#pragma unroll
    for (int r = 0; r < Layout::kRows; r++) {
      task[r] = layout_.holds(r) && layout_.row(r) < num_tasks_ ? layout_.row(r) : -1;
    }
    turns_.get_rows(task, rows_);
  }

  Turns<In, kRowLanes, Layout::kHalves> turns_;
  const int num_tasks_;
  const Layout layout_;
  const In* rows_[Layout::kRows];
};

// Fills a ring of kStages stages and calls use(stage) for each, in order. The copies of a thread have arrived when it
// uses them, and before_use() is called ahead of that, where it shall see those of others as well.
template <int kStages, class In, class Layout, class BeforeUse, class Use>
GS_DEVICE void for_each_stage(Copier<In, Layout>& ahead, Vector<In>* ring, int stage_vectors,
                              const BeforeUse& before_use, const Use& use) {
  int filled = 0, at = 0;
  for (int n = 1 - kStages; n < filled; n++) {
    if (n >= 0) {
      wait_for_copies<kStages - 2>();
      before_use();
    }
    // The stage that is filled was used in the last turn.
    if (!ahead.done()) {
      ahead.fill(ring + at * stage_vectors);
      filled++;
    }
    close_copies();
    at = at + 1 == kStages ? 0 : at + 1;
    if (n >= 0) use(ring + at * stage_vectors);
  }
}

}  // namespace gs::gpu
