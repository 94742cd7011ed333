// SPDX-License-Identifier: MIT
// How groups of lanes share the columns of a slot.
#pragma once
#include "cuda/table.cuh"

namespace gs::gpu {

// The columns of a slot, in pieces of parameters.
struct Slot {
  const Table& table;
  Run run;
  int64_t begin, end;

  GS_DEVICE Slot(const Table& all, int64_t slot)
      : table(all), run(all.run_of(slot)), begin((slot - run.first_slot) * all.width) {
    end = begin + table.width < run.columns ? begin + table.width : run.columns;
  }
  GS_DEVICE int64_t first_param() const { return table.param_of(run, begin); }
  GS_DEVICE bool holds(int64_t p) const { return p < run.first_param + run.params && table.first_column(p) < end; }
  template <class In, int kLanes>
  GS_DEVICE Piece<In, kLanes> piece(int64_t p) const {
    const Param param = table.param(p);
    const int64_t from = begin > param.first_column ? begin - param.first_column : 0;
    const int64_t to = end - param.first_column < param.numel ? end - param.first_column : param.numel;
    return {param.residue, from, to};
  }
};

// The turns of a group of lanes in a slot. In each piece they take the whole steps, kSteps at a time, then the rest, in
// turns of as many units. Several groups share a slot: turns are numbered through all pieces and divided among them.
template <class In, int kLanes, int kSteps>
class Turns {
  using Rows = Piece<In, kLanes>;
  static constexpr int64_t kColumns = kSteps * Rows::kStep;
  static constexpr int kUnits = kSteps * kLanes;  // units of a turn in the rest

 public:
  // Takes the turns number first, first + stride, ...
  GS_DEVICE Turns(const Table& table, int64_t slot, int first, int stride)
      : table_(table), slot_(static_cast<int>(slot)), stride_(stride) {
    param_ = static_cast<int>(Slot(table, slot_).first_param());
    open(first);
  }
  GS_DEVICE bool done() const { return left_ == 0; }
  GS_DEVICE bool is_whole() const { return left_ > rest_; }
  GS_DEVICE bool aligned() const { return aligned_; }
  GS_DEVICE int64_t column() const { return column_; }  // the first column of a whole turn
  // Rows number t[0], t[1], ... of the piece's parameter; null where t is negative.
  template <class Row, int kCount>
  GS_DEVICE void get_rows(const int (&t)[kCount], Row* (&row)[kCount]) const {
    table_.get_pointers(param_, t, row);
  }

  // The number of the first column of the piece's parameter, counted over all parameters.
  GS_DEVICE int64_t coordinate() const { return table_.param(param_).coordinate; }
  // A lane's unit for each step of a turn in the rest; leaves unit as it is in a whole turn.
  GS_DEVICE void get_units(int lane, Unit (&unit)[kSteps]) const {
    if (is_whole()) return;
    const Steps<In> steps(Slot(table_, slot_).piece<In, kLanes>(param_), kColumns);
#pragma unroll
    for (int s = 0; s < kSteps; s++) unit[s] = steps.unit(int64_t{rest_ - left_} * kUnits + s * kLanes + lane);
  }
  // The column of element e of the vector that load() gives a lane for step s; -1 if there is none.
  GS_DEVICE int64_t column(int lane, int s, const Unit& unit, int e) const {
    if (!is_whole()) return e < unit.columns ? unit.column + e : -1;
    return column_ + (aligned_ ? (s * kLanes + lane) * kVector<In> + e : (s * kVector<In> + e) * kLanes + lane);
  }

  // Moves to the next turn; returns true if that is in another piece.
  GS_DEVICE bool next() {
    column_ += stride_ * kColumns;
    left_ -= stride_;
    if (left_ > 0) return false;
    param_++;
    open(-left_);
    return true;
  }

  // Loads a lane's vectors; zeros for absent rows and for elements that a unit does not have.
  template <int kRows, class Load>
  GS_DEVICE void load(const In* const (&row)[kRows], int lane, const Unit (&unit)[kSteps], const Load& load_vector,
                      Vector<In> (&x)[kSteps][kRows]) const {
    if (is_whole()) return load_steps<kLanes>(row, column_, aligned_, lane, load_vector, x);
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
#pragma unroll
      for (int r = 0; r < kRows; r++) x[s][r] = load_unit(row[r], unit[s], load_vector);
    }
  }
  // Stores a lane's vector of step s, laid out as by load().
  GS_DEVICE void store(In* out, int lane, int s, const Unit& unit, const Vector<In>& vector) const {
    if (!is_whole()) return store_unit(out, unit, vector);
    store_step<kLanes>(out + column_ + s * Rows::kStep, aligned_, lane, vector);
  }

 private:
  // Moves to turn number `turn`, counted through the pieces from param_ on.
  GS_DEVICE void open(int turn) {
    const Slot slot(table_, slot_);
    for (left_ = 0; slot.holds(param_); param_++) {
      const Rows piece = slot.piece<In, kLanes>(param_);
      const Steps<In> steps(piece, kColumns);
      rest_ = static_cast<int>((steps.units + kUnits - 1) / kUnits);
      left_ = static_cast<int>(steps.count) + rest_ - turn;
      if (left_ > 0) {
        aligned_ = piece.aligned;
        column_ = steps.step(turn);
        return;
      }
      turn = -left_;
      left_ = 0;
    }
  }

  const Table& table_;
  const int slot_, stride_;
  int param_, left_, rest_;  // left_: turns left in the piece; rest_: how many of its turns are in the rest
  bool aligned_;
  int64_t column_;
};

}  // namespace gs::gpu
