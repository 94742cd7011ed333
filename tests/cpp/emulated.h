// SPDX-License-Identifier: MIT
// The functions of csrc/cuda/device.cuh and launch.cuh, by which kernels and launches reach a GPU, for emulated threads
// on the host.
#pragma once
#include <bit>

#include "cpu/status.h"
#include "emulator.h"

#define GS_KERNEL inline void
#define GS_DEVICE inline
#define GS_RARE inline
#define GS_ARGUMENT(type) const type&
#define GS_BLOCKS(threads, blocks)

namespace gs::gpu {

inline int thread() { return Emulator::get().thread(); }
inline int threads() { return Emulator::get().threads(); }
inline int64_t block() { return Emulator::get().block(); }
inline void sync_block() { Emulator::get().wait_block(); }
inline void sync_warp() {
  Emulator::get().warp_syncs++;
  Emulator::get().wait_warp();
}
inline void sync_grid() { Emulator::get().wait_all(); }
inline void arrive_cluster() { Emulator::get().arrive(); }
inline void wait_cluster() { Emulator::get().wait_for_others(); }
template <class T>
T* shared_of(int block_of_cluster, T* p) {
  return reinterpret_cast<T*>(Emulator::get().shared_of(block_of_cluster, reinterpret_cast<unsigned char*>(p)));
}
inline bool any_of_block(bool value) { return Emulator::get().any_of_block(value); }

inline double shuffle_xor(double value, int mask) {
  Emulator& emulator = Emulator::get();
  emulator.lane_value(emulator.thread() % kWarp) = value;
  emulator.wait_warp();
  const double other = emulator.lane_value((emulator.thread() % kWarp) ^ mask);
  emulator.wait_warp();
  return other;
}

inline double shuffle(double value, int lane) {
  Emulator& emulator = Emulator::get();
  return shuffle_xor(value, (emulator.thread() % kWarp) ^ lane);
}

inline uint32_t min_of_warp(uint32_t value) {
  Emulator& emulator = Emulator::get();
  emulator.lane_value(emulator.thread() % kWarp) = value;
  emulator.wait_warp();
  double least = value;
  for (int lane = 0; lane < kWarp; lane++) least = std::min(least, emulator.lane_value(lane));
  emulator.wait_warp();
  return static_cast<uint32_t>(least);
}

inline bool all_of_warp(bool value) {
  double all = value;
  for (int mask = 1; mask < kWarp; mask *= 2) all = std::min(all, shuffle_xor(all, mask));
  return all != 0;
}

inline uint32_t ballot_of_warp(bool value) {
  Emulator& emulator = Emulator::get();
  emulator.lane_value(emulator.thread() % kWarp) = value;
  emulator.wait_warp();
  uint32_t bits = 0;
  for (int lane = 0; lane < kWarp; lane++) bits |= uint32_t{emulator.lane_value(lane) != 0} << lane;
  emulator.wait_warp();
  return bits;
}
inline int count_bits(uint32_t bits) { return std::popcount(bits); }

inline void multiply_double(double (&d)[4], const double (&a)[4], const double (&b)[2]) {
  Emulator& emulator = Emulator::get();
  const int lane = emulator.thread() % kWarp, g = lane / 4, k = lane % 4;
  double* const lanes = &emulator.lane_value(0);
  const auto value_of = [&](int other, int word) -> double& { return lanes[Emulator::kLaneValues * other + word]; };
  for (int w = 0; w < 6; w++) value_of(lane, w) = w < 4 ? a[w] : b[w - 4];
  emulator.wait_warp();
  for (int v = 0; v < 4; v++) {
    for (int half = 0; half < 2; half++) {
      for (int i = 0; i < 4; i++) {
        d[v] += value_of(4 * g + i, v / 2 + 2 * half) * value_of(4 * (2 * k + v % 2) + i, 4 + half);
      }
    }
  }
  emulator.wait_warp();
}

// d = a b + c as by a matrix instruction with a 16 x 8 result, whose words hold kValues values each.
template <int kValues, class Decode>
void multiply_16x8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                   const Decode& decode) {
  Emulator& emulator = Emulator::get();
  const int lane = emulator.thread() % kWarp, g = lane / 4, k = lane % 4;
  double* const lanes = &emulator.lane_value(0);
  const auto value_of = [&](int other, int word, int v) -> double& {
    return lanes[Emulator::kLaneValues * other + kValues * word + v];
  };
  for (int w = 0; w < 6; w++) {
    for (int v = 0; v < kValues; v++) value_of(lane, w, v) = decode(w < 4 ? a[w] : b[w - 4], v);
  }
  emulator.wait_warp();
  for (int r = 0; r < 2; r++) {
    for (int h = 0; h < 2; h++) {
      double sum = c[2 * r + h];
      for (int i = 0; i < 4; i++) {
        for (int half = 0; half < 2; half++) {
          for (int v = 0; v < kValues; v++) {
            sum += value_of(4 * g + i, r + 2 * half, v) * value_of(4 * (2 * k + h) + i, 4 + half, v);
          }
        }
      }
      // The hardware truncates, and flushes subnormal results to zero.
      auto result = static_cast<float>(sum);
      if (std::abs(result) > std::abs(sum)) result = std::nextafter(result, 0.0f);
      d[2 * r + h] = std::abs(result) < 0x1p-126f ? 0 : result;
    }
  }
  emulator.wait_warp();
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                                         : std::ldexp(static_cast<float>(mantissa), -24);
  return bits >> 15 ? -magnitude : magnitude;
}

inline void multiply_bfloat(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  multiply_16x8<2>(d, a, b, c,
                   [](uint32_t word, int v) { return float_from_bits(v ? word & 0xffff0000 : word << 16); });
}
inline void multiply_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  multiply_16x8<2>(d, a, b, c,
                   [](uint32_t word, int v) { return half_to_float(static_cast<uint16_t>(v ? word >> 16 : word)); });
}
inline void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  multiply_16x8<1>(d, a, b, c, [](uint32_t word, int) { return float_from_bits(word & 0xffffe000); });
}
inline void load_matrices(uint32_t (&word)[4], const void* row) {
  Emulator& emulator = Emulator::get();
  const int lane = emulator.thread() % kWarp;
  std::memcpy(&emulator.lane_value(lane), &row, sizeof(row));
  emulator.wait_warp();
  for (int m = 0; m < 4; m++) {
    const char* other;
    std::memcpy(&other, &emulator.lane_value(8 * m + lane / 4), sizeof(other));
    std::memcpy(&word[m], other + lane % 4 * 4, 4);
  }
  emulator.wait_warp();
}
inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline uint16_t float_to_half(float value) {
  const float magnitude = std::abs(value);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7e00;
  if (magnitude >= 65520) return sign | 0x7c00;
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  const auto mantissa = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  // A mantissa of 2048 carries into the exponent, as does a subnormal one of 1024.
  return sign | static_cast<uint16_t>(((exponent + 14) << 10) + mantissa);
}
inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = bits_of_float(value);
  return std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <class T>
T& shared() {
  return *reinterpret_cast<T*>(Emulator::get().shared());
}

// A vector, which must be aligned.
template <class V>
V& vector_at(V* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V) != 0) {
    std::printf("misaligned access of %zu bytes\n", sizeof(V));
    std::exit(1);
  }
  return *p;
}
template <class V>
V load_first(const V* p) {
  return vector_at(p);
}
template <class V>
V load_last(const V* p) {
  return vector_at(p);
}
template <class V>
void store(V* p, const V& value) {
  vector_at(p) = value;
}

inline uint64_t load_word(const void* p) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  return word;
}

// A copy takes place as late as possible, when its thread waits for it; in one of the orders it takes place at once.
template <class V>
void copy_to_shared(V* shared, const V* p, uint32_t bytes = 16) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) std::abort();
  const auto copy = [=] {
    *shared = {};
    if (p) std::memcpy(static_cast<void*>(shared), p, bytes);
  };
  if (Emulator::get().order == Order::kBackward) return copy();
  Emulator::get().copies().back().emplace_back(copy);
}
inline void close_copies() { Emulator::get().copies().emplace_back(); }
template <int kOpen>
void wait_for_copies() {
  auto& groups = Emulator::get().copies();  // the last group is not closed yet
  while (groups.size() > kOpen + 1) {
    for (const auto& copy : groups.front()) copy();
    groups.erase(groups.begin());
  }
}

inline void wait_for_previous_kernel() { Emulator::get().wait_for_previous_kernel(); }
inline void let_next_kernel_start() {}

struct Traits {
  bool overlaps;
  bool fast_double;
  int processors;
  int64_t shared_bytes;
};
inline gs_status get_traits(Traits& traits) {
  const Emulator& emulator = Emulator::get();
  traits = {emulator.overlaps, emulator.fast_double, emulator.processors, 64 * 1024};
  return GS_OK;
}

inline gs_status clear(double* values, int64_t count, gs_stream) {
  std::fill(values, values + count, 0.0);
  return GS_OK;
}

template <class... P>
gs_status launch_as(bool together, int cluster, void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes,
                    gs_stream, const std::type_identity_t<P>&... arguments) {
  // The least shared memory of GPUs with fast float64, and that of the others.
  const int64_t most = (Emulator::get().fast_double ? 163 : 99) * 1024;
  if (shared_bytes > most) {
    return gs::fail(GS_UNSUPPORTED, "a block may have %lld bytes, got %lld", (long long)most, (long long)shared_bytes);
  }
  const auto group = together ? static_cast<int>(blocks) : cluster;
  Emulator& emulator = Emulator::get();
  if (emulator.refuses && (together || group > 1)) return gs::fail(GS_UNSUPPORTED, "no room for blocks together");
  const auto run = [=, &emulator] {
    kernel(arguments...);
    emulator.check_waited();
  };
  if (emulator.runs) emulator.run(blocks, threads, shared_bytes, run, group);
  return GS_OK;
}

}  // namespace gs::gpu
