// SPDX-License-Identifier: MIT
// Copies of rows to shared memory, several stages ahead of their use, so that enough bytes are under way whatever the
// registers hold.
#pragma once
#include "cuda/tiles.cuh"

namespace gs::gpu {

// A thread's part of the stages of a slot, through all of its pieces: whole steps, then the rest. A stage holds, for
// each row, kHalves neighbouring vectors of each of its kRowLanes lanes. Layout says where:
//   * kRows, kHalves: the rows of a thread at most, the vectors of each;
//   * row(r), holds(r): the task of the thread's r-th row, and whether the stage has one;
//   * place(r, half): of its vector in a stage.
// What a stage has of tasks beyond the last one is not written, nor are their products.
template <class In, class Layout>
class Copier {
  using Rows = Piece<In, kRowLanes>;
  static constexpr int64_t kColumns = Layout::kHalves * Rows::kStep;

 public:
  // Of the slot's stages, those number first, first + stride, ...
  GS_DEVICE Copier(const Table& table, int slot, int num_tasks, const Layout& layout, int first, int stride)
      : table_(table), slot_(slot), num_tasks_(num_tasks), stride_(stride), layout_(layout) {
    param_ = static_cast<int>(Slot(table, slot).first_param());
    open(first);
  }
  GS_DEVICE bool done() const { return left_ == 0; }

  GS_DEVICE void fill(Vector<In>* stage) {
    if (left_ <= rest_) {
      fill_rest(stage);
    } else if (aligned_) {
      each_vector([&](int r, int half, int place) {
        const In* from = rows_[r] ? rows_[r] + column_ + half * Rows::kStep : nullptr;
        copy_to_shared(stage + place, reinterpret_cast<const Vector<In>*>(from));
      });
    } else {
#pragma unroll 1
      for (int e = 0; e < kVector<In>; e++) {
        const int64_t column = column_ + e * kRowLanes;
        each_vector([&](int r, int half, int place) {
          const In* from = rows_[r] ? rows_[r] + column + half * Rows::kStep : nullptr;
          copy_element(reinterpret_cast<In*>(stage + place) + e, from);
        });
      }
    }
    column_ += stride_ * kColumns;
    left_ -= stride_;
    if (left_ > 0) return;
    param_++;
    open(-left_);
  }

 private:
  template <class Visit>
  GS_DEVICE void each_vector(const Visit& visit) const {
#pragma unroll
    for (int r = 0; r < Layout::kRows; r++) {
      if (!layout_.holds(r)) continue;
#pragma unroll
      for (int half = 0; half < Layout::kHalves; half++) visit(r, half, layout_.place(r, half));
    }
  }
  GS_DEVICE const In* row_of(const Rows& piece, int r) const {
    return layout_.holds(r) && layout_.row(r) < num_tasks_ ? piece.row(layout_.row(r)) : nullptr;
  }

  GS_DEVICE static void copy_element(In* to, const In* from) {
    if constexpr (sizeof(In) >= 4) {
      copy_to_shared(to, from);
    } else {
      *to = from ? *from : In{};  // copies have at least 4 bytes
    }
  }

  // The first piece from param_ on that has a stage number `turn`, counted through the pieces.
  GS_DEVICE void open(int turn) {
    const Slot slot(table_, slot_);
    for (left_ = 0; slot.holds(param_); param_++) {
      const Rows piece = slot.piece<In, kRowLanes>(param_);
      const Steps steps(piece, kColumns);
      rest_ = static_cast<int>((steps.rest + kColumns - 1) / kColumns);
      left_ = static_cast<int>(steps.count) + rest_ - turn;
      if (left_ > 0) {
        aligned_ = piece.aligned;
        column_ = steps.step(turn) + row_lane() * (aligned_ ? kVector<In> : 1);
#pragma unroll
        for (int r = 0; r < Layout::kRows; r++) rows_[r] = row_of(piece, r);
        return;
      }
      turn = -left_;
      left_ = 0;
    }
  }
  GS_DEVICE void fill_rest(Vector<In>* stage) const {
    const Rows piece = Slot(table_, slot_).piece<In, kRowLanes>(param_);
    const Steps steps(piece, kColumns);
    each_vector([&](int r, int half, int place) {
      const int64_t i = (rest_ - left_) * kColumns + half * Rows::kStep;
      stage[place] = load_rest<kRowLanes>(row_of(piece, r), steps, i, row_lane());
    });
  }

  const Table& table_;
  const int slot_, num_tasks_, stride_;
  const Layout layout_;
  int param_, left_, rest_;  // stages of the piece, and how many of them are not whole steps
  bool aligned_;
  int64_t column_;  // of the lane's first element, in steps as load_steps has them
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
