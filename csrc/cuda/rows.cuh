// SPDX-License-Identifier: MIT
// Elements of the four dtypes and how a group of lanes reads rows of them.
#pragma once
#include <type_traits>

#include "cuda/device.cuh"
#include "solvers/common.h"

namespace gs::gpu {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// 16 bytes of a row, in the words that loads and matrix instructions have.
template <class In>
constexpr int kVector = 16 / static_cast<int>(sizeof(In));
template <class In>
struct alignas(16) Vector {
  uint32_t word[4];

  GS_DEVICE In get(int e) const {
    In value;
    if constexpr (sizeof(In) == 2) {
      value.bits = static_cast<uint16_t>(word[e / 2] >> (e % 2 * 16));
    } else {
      memcpy(&value, word + e * (sizeof(In) / 4), sizeof(In));
    }
    return value;
  }
  // Where the element was 0.
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

// To nearest even.
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
  int64_t lead, tail;  // columns before the first step and, at least, behind the last one
  bool aligned;

  // residue: of every row, in elements from a boundary of 16 bytes, or -1 if the rows differ. Where they do, so many
  // columns are kept behind the steps.
  GS_DEVICE Piece(int64_t residue, int64_t from, int64_t to, int64_t kept)
      : begin(from), end(to), aligned(residue >= 0) {
    lead = aligned ? (kVector<In> - (residue + from) % kVector<In>) % kVector<In> : 0;
    tail = aligned ? 0 : kept;
  }
};

// 16 bytes of two neighbouring vectors, from so many elements on.
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

// The steps of a piece that are whole, of so many columns each, and the rest of the columns.
struct Steps {
  int64_t count, rest;

  template <class Piece>
  GS_DEVICE Steps(const Piece& piece, int64_t columns) : begin_(piece.begin), columns_(columns) {
    const int64_t length = piece.end - piece.begin;
    count = length > piece.lead + piece.tail ? (length - piece.lead - piece.tail) / columns : 0;
    lead_ = count > 0 ? piece.lead : 0;
    rest = length - count * columns;
  }
  GS_DEVICE int64_t step(int64_t i) const { return begin_ + lead_ + i * columns_; }
  GS_DEVICE int64_t rest_column(int64_t i) const { return begin_ + i + (i < lead_ ? 0 : count * columns_); }

 private:
  int64_t begin_, lead_, columns_;
};

// A lane's vectors of kSteps whole steps from column `step` on; zeros in rows that are absent. A vector is 16
// neighbouring bytes where the rows are aligned. Elsewhere the lanes take elements in turns; which columns meet in a
// vector does not matter, as long as it is the same in all rows.
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

// A lane's vector of the rest, from its i-th column on; zeros beyond the last one.
template <int kLanes, class In>
GS_DEVICE Vector<In> load_rest(const In* row, const Steps& steps, int64_t i, int lane) {
  Vector<In> vector = {};
#pragma unroll
  for (int e = 0; e < kVector<In>; e++) {
    const int64_t own = i + e * kLanes + lane;
    if (row && own < steps.rest) vector.set(e, row[steps.rest_column(own)]);
  }
  return vector;
}

}  // namespace gs::gpu
