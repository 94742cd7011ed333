// SPDX-License-Identifier: MIT
// Elements of the four dtypes and how a group of lanes reads rows of them.
#pragma once
#include <type_traits>

#include "cpu/status.h"
#include "cuda/device.cuh"
#include "solvers/common.h"

namespace gs::gpu {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Rows are read 16 bytes at a time, held as the 32-bit words that loads and matrix instructions use.
template <class In>
constexpr int kVector = 16 / static_cast<int>(sizeof(In));
// Element e of an array of words.
template <class In>
GS_DEVICE In element(const uint32_t* word, int e) {
  In value;
  if constexpr (sizeof(In) == 2) {
    value.bits = static_cast<uint16_t>(word[e / 2] >> (e % 2 * 16));
  } else {
    memcpy(&value, word + e * (sizeof(In) / 4), sizeof(In));
  }
  return value;
}
template <class In>
struct alignas(16) Vector {
  uint32_t word[4];

  GS_DEVICE In get(int e) const { return element<In>(word, e); }
  // The element must be 0 before.
  GS_DEVICE void set(int e, In value) {
    if constexpr (sizeof(In) == 2) {
      word[e / 2] |= uint32_t{value.bits} << (e % 2 * 16);
    } else {
      memcpy(word + e * (sizeof(In) / 4), &value, sizeof(In));
    }
  }
};

GS_DEVICE double to_double(double x) { return x; }
GS_DEVICE double to_double(float x) { return x; }
GS_DEVICE double to_double(bfloat16 x) { return float_from_bits(uint32_t{x.bits} << 16); }
GS_DEVICE double to_double(float16 x) { return half_to_float(x.bits); }

// Rounds to nearest even.
template <class In>
GS_DEVICE In from_double(double x) {
  if constexpr (sizeof(In) >= 4) {
    return static_cast<In>(x);
  } else if constexpr (std::is_same_v<In, bfloat16>) {
    return {float_to_bfloat(static_cast<float>(x))};
  } else {
    return {float_to_half(static_cast<float>(x))};
  }
}

// Calls body(In{}) with the type of a gs_dtype.
template <class Body>
gs_status with_dtype(int32_t dtype, const Body& body) {
  switch (dtype) {
    case GS_FLOAT64:
      return body(double{});
    case GS_FLOAT32:
      return body(float{});
    case GS_BFLOAT16:
      return body(bfloat16{});
    default:
      return body(float16{});
  }
}

// A stretch of columns of one parameter, whose rows kLanes lanes read in steps of a vector each.
template <class In, int kLanes>
struct Piece {
  static constexpr int64_t kStep = kLanes * kVector<In>;

  int64_t begin, end;
  int64_t lead;  // columns before the first step
  bool aligned;

  // residue: how many elements every row starts after a 16-byte boundary, or -1 if the rows differ in that.
  GS_DEVICE Piece(int64_t residue, int64_t from, int64_t to) : begin(from), end(to), aligned(residue >= 0) {
    lead = aligned ? (kVector<In> - (residue + from) % kVector<In>) % kVector<In> : 0;
  }
};

// 16 bytes of two neighbouring vectors, beginning at element `elements` of the first one.
template <class In>
GS_DEVICE Vector<In> shifted(const Vector<In>& first, const Vector<In>& second, uint32_t elements) {
  const uint32_t bytes = elements * sizeof(In);
  uint32_t word[8];
  memcpy(word, first.word, 16);
  memcpy(word + 4, second.word, 16);
#pragma unroll
  for (int w = 0; w < 6; w++) word[w] = bytes & 8 ? word[w + 2] : word[w];
  if constexpr (sizeof(In) <= 4) {
#pragma unroll
    for (int w = 0; w < 5; w++) word[w] = bytes & 4 ? word[w + 1] : word[w];
  }
  if constexpr (sizeof(In) <= 2) {
#pragma unroll
    for (int w = 0; w < 4; w++) word[w] = bytes & 2 ? word[w] >> 16 | word[w + 1] << 16 : word[w];
  }
  Vector<In> result;
  memcpy(result.word, word, 16);
  return result;
}

// What a lane reads of the rest of a piece: a vector, one column, or nothing.
struct Unit {
  int64_t column;
  int columns;  // kVector, 1 or 0
};

// Divides a piece into whole steps of `columns` columns, and the rest into units: the remaining aligned vectors, and
// the columns beside them one by one.
template <class In>
struct Steps {
  int64_t count, units;

  template <int kLanes>
  GS_DEVICE Steps(const Piece<In, kLanes>& piece, int64_t columns) : begin_(piece.begin), columns_(columns) {
    const int64_t length = piece.end - piece.begin;
    lead_ = piece.lead;  // may be longer than the piece, by less than a vector
    const int64_t usable = length - lead_;
    count = usable > 0 ? usable / columns : 0;
    vectors_ = piece.aligned ? (length - lead_ - count * columns) / kVector<In> : 0;
    units = length - count * columns - vectors_ * (kVector<In> - 1);
  }
  GS_DEVICE int64_t step(int64_t i) const { return begin_ + lead_ + i * columns_; }
  GS_DEVICE Unit unit(int64_t i) const {
    if (i < vectors_) return {step(count) + i * kVector<In>, kVector<In>};
    const int64_t single = i - vectors_;
    const int64_t skipped = single < lead_ ? 0 : count * columns_ + vectors_ * kVector<In>;
    return {begin_ + single + skipped, i < units ? 1 : 0};
  }

 private:
  int64_t begin_, lead_, columns_, vectors_;
};

// A lane's vectors of kSteps whole steps from column `step` on; zeros for absent rows. If the rows are aligned, a
// vector is 16 neighbouring bytes. Otherwise it collects single elements, and neighbours go to different lanes; which
// columns form a vector does not matter, as long as it is the same for all rows.
template <int kLanes, int kSteps, int kRows, class In, class Load>
GS_DEVICE void load_steps(const In* const (&row)[kRows], int64_t step, bool aligned, int lane, const Load& load_vector,
                          Vector<In> (&x)[kSteps][kRows]) {
#pragma unroll
  for (int s = 0; s < kSteps; s++) {
#pragma unroll
    for (int r = 0; r < kRows; r++) x[s][r] = {};
  }
  if (aligned) {
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        if (row[r]) x[s][r] = load_vector(reinterpret_cast<const Vector<In>*>(row[r] + step) + s * kLanes + lane);
      }
    }
  } else {
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
#pragma unroll
      for (int r = 0; r < kRows; r++) {
#pragma unroll
        for (int e = 0; e < kVector<In>; e++) {
          if (row[r]) x[s][r].set(e, row[r][step + (s * kVector<In> + e) * kLanes + lane]);
        }
      }
    }
  }
}

template <int kLanes, class In>
GS_DEVICE void store_step(In* row, bool aligned, int lane, const Vector<In>& vector) {
  if (aligned) {
    reinterpret_cast<Vector<In>*>(row)[lane] = vector;
  } else {
#pragma unroll
    for (int e = 0; e < kVector<In>; e++) row[e * kLanes + lane] = vector.get(e);
  }
}

template <class In, class Load>
GS_DEVICE Vector<In> load_unit(const In* row, const Unit& unit, const Load& load_vector) {
  Vector<In> vector = {};
  if (row && unit.columns == kVector<In>) vector = load_vector(reinterpret_cast<const Vector<In>*>(row + unit.column));
  if (row && unit.columns == 1) vector.set(0, row[unit.column]);
  return vector;
}

template <class In>
GS_DEVICE void store_unit(In* row, const Unit& unit, const Vector<In>& vector) {
  if (unit.columns == kVector<In>) *reinterpret_cast<Vector<In>*>(row + unit.column) = vector;
  if (unit.columns == 1) row[unit.column] = vector.get(0);
}

}  // namespace gs::gpu
