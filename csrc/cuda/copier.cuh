// SPDX-License-Identifier: MIT
// Copies of rows to shared memory, several stages ahead of their use, so that enough bytes are in flight without taking
// registers.
#pragma once
#include "cuda/turns.cuh"

namespace gs::gpu {

// A stage's mark has this bit if its rows are still to be shifted; its lower bits hold, in 3 bits for each row of a
// group of lanes, by how many elements.
constexpr uint32_t kToShift = 1u << 31;

// A thread's part in copying the stages of a slot; a stage is one turn of columns. It holds kSlices slices, each with
// one vector for each of the kLanes lanes of a row. Rows of different alignments are copied as the aligned vectors that
// contain them, one more than the lanes have, and are shifted once they have arrived. Layout defines:
//   * kLanes, lane(): the lanes that share a row, and this thread's number among them;
//   * kRows, kSlices: the most rows of a thread, and the vectors of each;
//   * kShifts: whether rows may have to be shifted;
//   * row(r), holds(r): the task of the thread's r-th row, and whether the stage has that row;
//   * place(r, slice, lane): the place in a stage of a lane's vector of a row;
//   * extra(r), mark(): the place of the additional vector, and that of the mark, the latter in words.
// The places of tasks beyond the last one get zeros or nothing; their products are not used.
template <class In, class Layout>
class Copier {
 public:
  GS_DEVICE Copier(const Table& table, int64_t slot, int num_tasks, const Layout& layout, int first, int stride)
      : turns_(table, slot, first, stride), num_tasks_(num_tasks), layout_(layout) {
    open();
  }
  GS_DEVICE bool done() const { return turns_.done(); }

  GS_DEVICE void fill(Vector<In>* stage) {
    if constexpr (!kKeepsRows) get_rows();
    uint32_t mark = 0;
    if (!turns_.is_whole()) {
      Unit unit[Layout::kSlices] = {};
      turns_.get_units(layout_.lane(), unit);
      copy_units(unit, stage);
    } else if (!Layout::kShifts || turns_.aligned()) {
      const int64_t column = turns_.column() + layout_.lane() * kVector<In>;
      each_vector([&](int r, int slice, int place) {
        const In* from = rows_[r] ? rows_[r] + column + slice * kStep : nullptr;
        copy_to_shared(stage + place, reinterpret_cast<const Vector<In>*>(from));
      });
    } else if constexpr (Layout::kShifts) {
      mark = kToShift;
#pragma unroll
      for (int r = 0; r < Layout::kRows; r++) {
        if (!layout_.holds(r)) continue;
        const In* first = rows_[r] ? rows_[r] + turns_.column() : nullptr;
        const auto shift = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(first) % 16 / sizeof(In));
        mark |= shift << 3 * r;
        const auto* from = reinterpret_cast<const Vector<In>*>(first - shift);
        const auto copy = [&](int place, int number, uint32_t elements) {
          copy_to_shared(stage + place, first ? from + number : nullptr, elements * sizeof(In));
        };
#pragma unroll
        for (int slice = 0; slice < Layout::kSlices; slice++) {
          copy(layout_.place(r, slice, layout_.lane()), slice * Layout::kLanes + layout_.lane(), kVector<In>);
        }
        // Only the needed part of the last vector is read: the rest may lie beyond the row.
        if (layout_.lane() == Layout::kLanes - 1) copy(layout_.extra(r), Layout::kSlices * Layout::kLanes, shift);
      }
    }
    if constexpr (Layout::kShifts) {
      if (layout_.lane() == 0) mark_of(layout_, stage) = mark;
    }
    if (turns_.next()) open();
  }

  // All lanes of a warp must call this after their copies to a stage have arrived.
  GS_DEVICE void straighten(Vector<In>* stage) const {
    if constexpr (Layout::kShifts) {
      sync_warp();
      const uint32_t mark = mark_of(layout_, stage);
      if (mark & kToShift) shift_rows(layout_, stage, mark);
    }
  }

 private:
  // If all lanes of a warp read the same rows, looking up the pointers each time costs less than the registers.
  static constexpr bool kKeepsRows = Layout::kLanes < kWarp;
  static constexpr int64_t kStep = Piece<In, Layout::kLanes>::kStep;

  template <class Visit>
  GS_DEVICE void each_vector(const Visit& visit) const {
#pragma unroll
    for (int r = 0; r < Layout::kRows; r++) {
      if (!layout_.holds(r)) continue;
#pragma unroll
      for (int slice = 0; slice < Layout::kSlices; slice++) visit(r, slice, layout_.place(r, slice, layout_.lane()));
    }
  }
  // Copies the rest of rows beside whole steps: vectors asynchronously; single columns with all loads issued before the
  // first value is used.
  GS_DEVICE void copy_units(const Unit (&unit)[Layout::kSlices], Vector<In>* stage) const {
    each_vector([&](int r, int slice, int place) {
      const bool exists = rows_[r] && unit[slice].columns == kVector<In>;
      const In* from = exists ? rows_[r] + unit[slice].column : nullptr;
      if (unit[slice].columns != 1) copy_to_shared(stage + place, reinterpret_cast<const Vector<In>*>(from));
    });
#pragma unroll
    for (int slice = 0; slice < Layout::kSlices; slice++) {
      if (unit[slice].columns != 1) continue;
      In single[Layout::kRows] = {};
#pragma unroll
      for (int r = 0; r < Layout::kRows; r++) {
        if (layout_.holds(r) && rows_[r]) single[r] = rows_[r][unit[slice].column];
      }
#pragma unroll
      for (int r = 0; r < Layout::kRows; r++) {
        Vector<In> vector = {};
        vector.set(0, single[r]);
        if (layout_.holds(r)) stage[layout_.place(r, slice, layout_.lane())] = vector;
      }
    }
  }
  GS_DEVICE static uint32_t& mark_of(const Layout& layout, Vector<In>* stage) {
    return reinterpret_cast<uint32_t*>(stage)[layout.mark()];
  }
  GS_DEVICE static void shift_rows(const Layout& layout, Vector<In>* stage, uint32_t mark) {
#pragma unroll 1
    for (int r = 0; r < Layout::kRows; r++) {
#pragma unroll 1
      for (int slice = 0; slice < Layout::kSlices; slice++) {
        Vector<In> own = {}, next = {};
        const int place = layout.place(r, slice, layout.lane());
        if (layout.holds(r)) {
          own = stage[place];
          next = stage[layout.lane() + 1 < Layout::kLanes ? layout.place(r, slice, layout.lane() + 1)
                       : slice + 1 < Layout::kSlices      ? layout.place(r, slice + 1, 0)
                                                          : layout.extra(r)];
        }
        sync_warp();  // all lanes have read their vectors before one is overwritten
        if (layout.holds(r)) stage[place] = shifted(own, next, mark >> 3 * r & 7);
      }
    }
  }
  GS_DEVICE void open() {
    if (kKeepsRows && !done()) get_rows();
  }
  GS_DEVICE void get_rows() {
    int task[Layout::kRows];
#pragma unroll
    for (int r = 0; r < Layout::kRows; r++) {
      task[r] = layout_.holds(r) && layout_.row(r) < num_tasks_ ? layout_.row(r) : -1;
    }
    turns_.get_rows(task, rows_);
  }

  Turns<In, Layout::kLanes, Layout::kSlices> turns_;
  const int num_tasks_;
  const Layout layout_;
  const In* rows_[Layout::kRows];
};

// Fills a ring of kStages stages and calls use(stage) for each, in order. By then the thread's own copies have arrived;
// before_use(), called just before, must synchronize if use() reads the copies of other threads.
template <int kStages, class In, class Layout, class BeforeUse, class Use>
GS_DEVICE void for_each_stage(Copier<In, Layout>& ahead, Vector<In>* ring, int stage_vectors,
                              const BeforeUse& before_use, const Use& use) {
  int filled = 0, at = 0;
  for (int n = 1 - kStages; n < filled; n++) {
    if (n >= 0) {
      wait_for_copies<kStages - 2>();
      ahead.straighten(ring + (at + 1 == kStages ? 0 : at + 1) * stage_vectors);
      before_use();
    }
    // Fills the stage that was used in the last iteration.
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
