// SPDX-License-Identifier: MIT
// Random rows of every dtype in buffers of their exact size, and functions that decode them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "gradsurgery/gradsurgery.h"

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      std::exit(1);                                               \
    }                                                             \
  } while (0)

constexpr gs_dtype kDtypes[] = {GS_FLOAT64, GS_FLOAT32, GS_BFLOAT16, GS_FLOAT16};

inline int64_t bytes_of(gs_dtype dtype) { return dtype == GS_FLOAT64 ? 8 : dtype == GS_FLOAT32 ? 4 : 2; }

inline double decode_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                           : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                          : std::ldexp(mantissa, -24);
  return bits >> 15 ? -magnitude : magnitude;
}

inline double decode_bfloat(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline double decode(const char* data, gs_dtype dtype) {
  if (dtype == GS_FLOAT64) {
    double value;
    std::memcpy(&value, data, 8);
    return value;
  }
  if (dtype == GS_FLOAT32) {
    float value;
    std::memcpy(&value, data, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, data, 2);
  return dtype == GS_FLOAT16 ? decode_half(bits) : decode_bfloat(bits);
}

// n random values, one element off the allocation's alignment.
struct Row {
  std::vector<char> storage;
  gs_dtype dtype;
  Row(int64_t n, gs_dtype type, double scale, std::mt19937& random) : storage((n + 1) * bytes_of(type)), dtype(type) {
    for (int64_t i = 0; i <= n; i++) {
      const double value = scale * std::normal_distribution<double>()(random);
      const float single = static_cast<float>(value);
      // Half: random sign, mantissa and an exponent near 1. Bfloat: the upper bits of a float.
      uint32_t wide;
      std::memcpy(&wide, &single, 4);
      const uint16_t narrow = type == GS_FLOAT16 ? (random() & 0x83ff) | 14 << 10 : wide >> 16;
      const void* source = type == GS_FLOAT64   ? static_cast<const void*>(&value)
                           : type == GS_FLOAT32 ? &single
                                                : (const void*)&narrow;
      std::memcpy(&storage[i * bytes_of(type)], source, bytes_of(type));
    }
  }
  const char* data() const { return storage.data() + bytes_of(dtype); }
  double at(int64_t i) const { return decode(data() + i * bytes_of(dtype), dtype); }
};
