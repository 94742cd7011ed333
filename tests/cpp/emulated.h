// SPDX-License-Identifier: MIT
// csrc/cuda/device.cuh on the host. One block runs at a time, each of its threads as a fiber that runs until it waits at a
// barrier. Shared memory has its exact size, on the heap, and starts as NaN. The order of the threads and blocks is
// chosen by the test: a missing barrier shows as a difference between orders, one that not all threads reach as a failure.
#pragma once
#include <ucontext.h>

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

#define GS_KERNEL inline void
#define GS_DEVICE inline

namespace gs::gpu {

constexpr int kWarp = 32;

enum class Order { kForward, kBackward, kInterleaved };

class Emulator {
 public:
  static Emulator& get() {
    static Emulator emulator;
    return emulator;
  }

  Order order = Order::kForward;

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
    while (barrier.generation == generation) leave();
  }
  void wait_block() { wait(0, threads_); }
  void wait_warp() { wait(1 + current_ / kWarp, std::min(kWarp, threads_ - current_ / kWarp * kWarp)); }

  // A value per thread that the others of the warp can read between two barriers.
  double& lane_value(int lane) { return values_[current_ / kWarp * kWarp + lane]; }

 private:
  struct Barrier {
    int arrived = 0;
    int64_t generation = 0;
  };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<unsigned char[]> stack;
    void* fake_stack = nullptr;
    bool done = false;
  };
  static constexpr size_t kStackBytes = 256 * 1024;

  void run_block() {
    barriers_.assign(1 + (threads_ + kWarp - 1) / kWarp, Barrier());
    values_.assign(threads_, 0);
    while (static_cast<int>(fibers_.size()) < threads_) {
      fibers_.emplace_back();
      fibers_.back().stack = std::make_unique<unsigned char[]>(kStackBytes);
    }
    for (int t = 0; t < threads_; t++) {
      Fiber& fiber = fibers_[t];
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Emulator::enter, 0);
    }
    for (int left = threads_; left > 0;) {
      progress_ = false;
      for (int i = 0; i < threads_; i++) {
        const int t = order == Order::kForward    ? i
                      : order == Order::kBackward ? threads_ - 1 - i
                                                  : static_cast<int>(i * 37LL % threads_);
        if (order == Order::kInterleaved && threads_ % 37 == 0) std::abort();
        if (fibers_[t].done) continue;
        current_ = t;
        start_switch(&scheduler_fake_stack_, fibers_[t].stack.get(), kStackBytes);
        swapcontext(&scheduler_, &fibers_[t].context);
        finish_switch(scheduler_fake_stack_);
        if (fibers_[t].done) {
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

  static void enter() {
    Emulator& emulator = get();
    emulator.finish_switch(nullptr);
    emulator.kernel_();
    emulator.fibers_[emulator.current_].done = true;
    emulator.leave();
  }

  // From a thread back to the scheduler.
  void leave() {
    const int t = current_;
    Fiber& fiber = fibers_[t];
    start_switch(fiber.done ? nullptr : &fiber.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
    swapcontext(&fiber.context, &scheduler_);
    finish_switch(fiber.fake_stack);
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
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

inline int thread() { return Emulator::get().thread(); }
inline int threads() { return Emulator::get().threads(); }
inline int64_t block() { return Emulator::get().block(); }
inline void sync_block() { Emulator::get().wait_block(); }
inline void sync_warp() { Emulator::get().wait_warp(); }

inline double shuffle_xor(double value, int mask) {
  Emulator& emulator = Emulator::get();
  emulator.lane_value(emulator.thread() % kWarp) = value;
  emulator.wait_warp();
  const double other = emulator.lane_value((emulator.thread() % kWarp) ^ mask);
  emulator.wait_warp();
  return other;
}

template <class T>
T& shared() {
  return *reinterpret_cast<T*>(Emulator::get().shared());
}

inline bool is_last_arrival(uint32_t* counter, uint32_t arrivals) {
  const bool last = *counter == arrivals - 1;
  *counter = last ? 0 : *counter + 1;
  return last;
}

template <class V>
V load_once(const V* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V) != 0) {
    std::printf("misaligned load of %zu bytes\n", sizeof(V));
    std::exit(1);
  }
  return *p;
}

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

template <class... P, class... A>
gs_status launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, gs_stream, A... arguments) {
  Emulator::get().run(blocks, threads, shared_bytes, [=] { kernel(arguments...); });
  return GS_OK;
}

}  // namespace gs::gpu
