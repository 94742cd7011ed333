// SPDX-License-Identifier: MIT
// csrc/cuda/device.cuh on the host. One block runs at a time, each of its threads as a fiber that runs until it waits
// at a barrier. Shared memory has its exact size, on the heap, and starts as NaN. The order of the threads and blocks
// is chosen by the test: a missing barrier shows as a difference between orders, one that not all threads reach as a
// failure.
#pragma once
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#include "gradsurgery/gradsurgery.h"

#define GS_KERNEL inline void
#define GS_DEVICE inline
#define GS_RARE inline
#define GS_ARGUMENT(type) const type&
#define GS_BLOCKS(threads, blocks)

namespace gs::gpu {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;

// The place where a stack goes on. A jump by the C library would make the sanitizer clear the whole stack each time.
#if defined(__x86_64__)
using Context = void*;
// Saves what a call must preserve, and goes on where `to` was saved.
extern "C" void gs_switch(Context* from, Context to);
asm(R"(
  .text
gs_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
inline void switch_context(Context& from, Context& to) { gs_switch(&from, to); }
inline void make_context(Context& context, unsigned char* stack, size_t bytes, void (*start)()) {
  // As gs_switch left it, called from an aligned stack.
  auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) / 16 * 16) - 2;
  *top = reinterpret_cast<void*>(start);
  context = top - 6;
}
#else
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline void make_context(Context& context, unsigned char* stack, size_t bytes, void (*start)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  makecontext(&context, start, 0);
}
#endif

enum class Order { kForward, kBackward, kInterleaved };

class Emulator {
 public:
  static Emulator& get() {
    static Emulator emulator;
    return emulator;
  }

  Order order = Order::kForward;
  bool fast_double = true;

  void run(int64_t blocks, int threads, int64_t shared_bytes, std::function<void()> kernel) {
    kernel_ = std::move(kernel);
    threads_ = threads;
    for (int64_t i = 0; i < blocks; i++) {
      block_ = order == Order::kForward ? i : blocks - 1 - i;
      shared_ = std::make_unique<unsigned char[]>(shared_bytes);
      std::memset(shared_.get(), 0xff, shared_bytes);
      run_block();
      shared_.reset();
    }
  }

  int thread() const { return current_; }
  int threads() const { return threads_; }
  int64_t block() const { return block_; }
  unsigned char* shared() { return shared_.get(); }

  // Waits for `count` threads at barrier number `index`.
  void wait(size_t index, int count) {
    Barrier& barrier = barriers_[index];
    const int64_t generation = barrier.generation;
    if (++barrier.arrived == count) {
      barrier.arrived = 0;
      barrier.generation++;
      progress_ = true;
    }
    if (barrier.generation != generation) return;
    fibers_[current_]->barrier = index;
    fibers_[current_]->generation = generation;
    leave();  // until the barrier lets go
  }
  void wait_block() { wait(0, threads_); }
  void wait_warp() { wait(1 + current_ / kWarp, std::min(kWarp, threads_ - current_ / kWarp * kWarp)); }

  bool any_of_block(bool value) {
    votes_[current_] = value;
    wait_block();
    const bool any = std::find(votes_.begin(), votes_.end(), true) != votes_.end();
    wait_block();
    return any;
  }

  // A thread's groups of copies to shared memory.
  std::vector<std::vector<std::function<void()>>>& copies() { return fibers_[current_]->copies; }

  // Values of a thread that the others of the warp can read between two barriers.
  static constexpr int kLaneValues = 6;
  double& lane_value(int lane, int which = 0) {
    return values_[kLaneValues * (current_ / kWarp * kWarp + lane) + which];
  }

 private:
  struct Barrier {
    int arrived = 0;
    int64_t generation = 0;
  };
  struct Fiber {
    Context context{};
    std::unique_ptr<unsigned char[]> stack;
    void* fake_stack = nullptr;
    std::vector<std::vector<std::function<void()>>> copies;
    size_t barrier = 0;       // that the thread waits at,
    int64_t generation = -1;  // as long as this is the barrier's
    bool done = false;
  };
  static constexpr size_t kStackBytes = 256 * 1024;

  void run_block() {
    barriers_.assign(1 + (threads_ + kWarp - 1) / kWarp, Barrier());
    values_.assign(kLaneValues * threads_, 0);
    votes_.assign(threads_, false);
    while (static_cast<int>(fibers_.size()) < threads_) add_fiber();
    for (int t = 0; t < threads_; t++) {
      fibers_[t]->copies.assign(1, {});
      fibers_[t]->barrier = 0;
      fibers_[t]->generation = -1;
      fibers_[t]->done = false;
    }
    for (int left = threads_; left > 0;) {
      progress_ = false;
      for (int i = 0; i < threads_; i++) {
        const int t = order == Order::kForward ? i
                      : order == Order::kBackward
                          ? threads_ - 1 - i
                          : i * 37 % threads_;  // a permutation: no block has a multiple of 37 threads
        const Fiber& fiber = *fibers_[t];
        if (fiber.done || barriers_[fiber.barrier].generation == fiber.generation) continue;
        current_ = t;
        resume();
        if (fiber.done) {
          left--;
          progress_ = true;
        }
      }
      if (left > 0 && !progress_) {
        std::printf("emulated block %lld: a barrier that not all threads reach\n", static_cast<long long>(block_));
        std::exit(1);
      }
    }
  }

  void add_fiber() {
    fibers_.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers_.back();
    fiber.stack = std::make_unique<unsigned char[]>(kStackBytes);
    make_context(fiber.context, fiber.stack.get(), kStackBytes, &Emulator::loop);
  }

  static void loop() {
    Emulator& emulator = get();
    emulator.finish_switch(nullptr);
    for (;;) {
      emulator.kernel_();
      emulator.fibers_[emulator.current_]->done = true;
      emulator.leave();
    }
  }

  __attribute__((noinline)) void resume() {
    Fiber& fiber = *fibers_[current_];
    start_switch(&scheduler_fake_stack_, fiber.stack.get(), kStackBytes);
    switch_context(scheduler_, fiber.context);
    finish_switch(scheduler_fake_stack_);
  }

  // From a thread back to the scheduler.
  __attribute__((noinline)) void leave() {
    Fiber& fiber = *fibers_[current_];
    start_switch(&fiber.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
    switch_context(fiber.context, scheduler_);
    finish_switch(fibers_[current_]->fake_stack);
  }

#if defined(__SANITIZE_ADDRESS__)
  void start_switch(void** fake_stack, const void* stack, size_t bytes) {
    __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
  }
  void finish_switch(void* fake_stack) {
    const void* from = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fake_stack, &from, &bytes);
    if (!fake_stack && !scheduler_stack_) {
      scheduler_stack_ = from;
      scheduler_stack_bytes_ = bytes;
    }
  }
#else
  void start_switch(void**, const void*, size_t) {}
  void finish_switch(void*) {}
#endif

  std::function<void()> kernel_;
  int threads_ = 0, current_ = 0;
  int64_t block_ = 0;
  bool progress_ = false;
  std::unique_ptr<unsigned char[]> shared_;
  std::vector<Barrier> barriers_;
  std::vector<double> values_;
  std::vector<bool> votes_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Context scheduler_{};
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

inline int thread() { return Emulator::get().thread(); }
inline int threads() { return Emulator::get().threads(); }
inline int64_t block() { return Emulator::get().block(); }
inline void sync_block() { Emulator::get().wait_block(); }
inline void sync_warp() { Emulator::get().wait_warp(); }
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
  for (int w = 0; w < 6; w++) emulator.lane_value(lane, w) = w < 4 ? a[w] : b[w - 4];
  emulator.wait_warp();
  for (int v = 0; v < 4; v++) {
    for (int half = 0; half < 2; half++) {
      for (int i = 0; i < 4; i++) {
        d[v] +=
            emulator.lane_value(4 * g + i, v / 2 + 2 * half) * emulator.lane_value(4 * (2 * k + v % 2) + i, 4 + half);
      }
    }
  }
  emulator.wait_warp();
}

// d = a b + c of a 16 x 8 instruction whose words hold kValues values each.
template <int kValues, class Decode>
void multiply_16x8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                   const Decode& decode) {
  Emulator& emulator = Emulator::get();
  const int lane = emulator.thread() % kWarp, g = lane / 4, k = lane % 4;
  for (int w = 0; w < 6; w++) emulator.lane_value(lane, w) = w < 4 ? a[w] : b[w - 4];
  emulator.wait_warp();
  for (int r = 0; r < 2; r++) {
    for (int h = 0; h < 2; h++) {
      double sum = c[2 * r + h];
      for (int i = 0; i < 4; i++) {
        for (int half = 0; half < 2; half++) {
          const auto x = static_cast<uint32_t>(emulator.lane_value(4 * g + i, r + 2 * half));
          const auto y = static_cast<uint32_t>(emulator.lane_value(4 * (2 * k + h) + i, 4 + half));
          for (int v = 0; v < kValues; v++) sum += double{decode(x, v)} * double{decode(y, v)};
        }
      }
      // The hardware truncates, and flushes what is subnormal.
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

template <class V>
V load_first(const V* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V) != 0) {
    std::printf("misaligned load of %zu bytes\n", sizeof(V));
    std::exit(1);
  }
  return *p;
}
template <class V>
V load_last(const V* p) {
  return load_first(p);
}

inline uint64_t load_word(const void* p) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  return word;
}

// A copy takes place when its thread waits for it, as late as it can.
template <class V>
void copy_to_shared(V* shared, const V* p) {
  Emulator::get().copies().back().emplace_back([=] { *shared = p ? load_first(p) : V{}; });
}
inline void close_copies() { Emulator::get().copies().emplace_back(); }
template <int kOpen>
void wait_for_copies() {
  auto& groups = Emulator::get().copies();  // the last one is not closed
  while (groups.size() > kOpen + 1) {
    for (const auto& copy : groups.front()) copy();
    groups.erase(groups.begin());
  }
}

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

struct Traits {
  bool overlaps, fast_double;
};
inline gs_status get_traits(Traits& traits) {
  traits = {true, Emulator::get().fast_double};
  return GS_OK;
}

inline gs_status clear(double* values, int64_t count, gs_stream) {
  std::fill(values, values + count, 0.0);
  return GS_OK;
}

template <class... P>
gs_status launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, gs_stream,
                 const std::type_identity_t<P>&... arguments) {
  Emulator::get().run(blocks, threads, shared_bytes, [=] { kernel(arguments...); });
  return GS_OK;
}

}  // namespace gs::gpu
