// SPDX-License-Identifier: MIT
// Runs the threads of a GPU on the host. One block runs at a time, or all blocks that have a barrier in common. Each
// thread is a fiber that runs until it waits at a barrier. Shared memory has its exact size, on the heap, and starts as
// NaN. The test chooses the order of threads and blocks: a missing barrier shows as a difference between orders, and a
// barrier that not all threads reach is a failure.
#pragma once
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "gradsurgery/gradsurgery.h"

namespace gs::gpu {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;

// Where a fiber continues: its stack pointer. With longjmp the sanitizer would clear the whole stack at each switch.
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

// kAhead: always runs the first thread that need not wait, so that a warp gets as far ahead as barriers allow.
enum class Order { kForward, kBackward, kInterleaved, kAhead };

class Emulator {
 public:
  static Emulator& get() {
    static Emulator emulator;
    return emulator;
  }

  Order order = Order::kForward;
  bool overlaps = true;  // as GPUs do since compute capability 9.0
  bool fast_double = true;
  bool refuses = false;  // refuses launches whose blocks must run together, as on a part of a GPU
  bool runs = true;      // if false, launches are only checked
  int processors = 3;
  int launches = 0;
  int64_t warp_syncs = 0;  // summed over all lanes

  // Runs `group` blocks at once.
  void run(int64_t blocks, int threads, int64_t shared_bytes, std::function<void()> kernel, int group) {
    launches++;
    kernel_ = std::move(kernel);
    threads_ = threads;
    group_ = group;
    for (int64_t i = 0; i < blocks; i += group_) {
      first_block_ = order == Order::kForward || order == Order::kAhead ? i : blocks - group_ - i;
      shared_.resize(group_);
      for (auto& memory : shared_) {
        memory = std::make_unique<unsigned char[]>(shared_bytes);
        std::memset(memory.get(), 0xff, shared_bytes);
      }
      run_group();
      shared_.clear();
    }
  }

  int thread() const { return thread_; }
  int threads() const { return threads_; }
  int64_t block() const { return first_block_ + block_; }
  unsigned char* shared() { return shared_[block_].get(); }
  // The address of p's counterpart in the shared memory of another block of the group.
  unsigned char* shared_of(int block, unsigned char* p) { return shared_[block].get() + (p - shared()); }

  // Waits for `count` threads at barrier number `index`.
  void wait(size_t index, int count) {
    Barrier& barrier = barriers_[index];
    const int64_t generation = barrier.generation;
    if (++barrier.arrived == count) {
      barrier.arrived = 0;
      barrier.generation++;
      progress_ = released_ = true;
    }
    if (barrier.generation != generation) return;
    fibers_[current_]->barrier = index;
    fibers_[current_]->generation = generation;
    leave();  // comes back when the barrier has released the thread
  }
  void wait_all() { wait(0, group_ * threads_); }
  void wait_block() { wait(1 + block_ * (1 + warps()), threads_); }
  void wait_warp() {
    const int warp = thread() / kWarp;
    wait(2 + block_ * (1 + warps()) + warp, std::min(kWarp, threads_ - warp * kWarp));
  }

  // A barrier of the group in two halves.
  void arrive() {
    check(!fibers_[current_]->arrived, "a thread arrives at a barrier twice");
    fibers_[current_]->arrived = true;
  }
  void wait_for_others() {
    check(fibers_[current_]->arrived, "a thread waits at a barrier where it has not arrived");
    fibers_[current_]->arrived = false;
    wait_all();
  }

  void wait_for_previous_kernel() { fibers_[current_]->waited = true; }
  void check_waited() { check(fibers_[current_]->waited, "a thread has not waited for the kernel before"); }

  bool any_of_block(bool value) {
    votes_[current_] = value;
    wait_block();
    const bool any = std::memchr(&votes_[block_ * threads_], true, threads_);
    wait_block();
    return any;
  }

  // A thread's groups of copies to shared memory.
  std::vector<std::vector<std::function<void()>>>& copies() { return fibers_[current_]->copies; }

  // Values of a thread that the others of the warp can read between two barriers.
  static constexpr int kLaneValues = 12;
  double& lane_value(int lane, int which = 0) {
    const int first = current_ - thread_ % kWarp;
    return values_[kLaneValues * (first + lane) + which];
  }

 private:
  struct Barrier {
    int arrived = 0;
    int64_t generation = 0;
  };
  struct Fiber {
    Context context{};
    std::unique_ptr<unsigned char[]> stack;
    std::vector<std::vector<std::function<void()>>> copies;
    size_t barrier = 0;       // the thread waits at this barrier
    int64_t generation = -1;  // while the barrier has this generation
    bool done = false, arrived = false, waited = false;
  };
  static constexpr size_t kStackBytes = 256 * 1024;

  int warps() const { return (threads_ + kWarp - 1) / kWarp; }

  void run_group() {
    const int all = group_ * threads_;
    barriers_.assign(1 + group_ * (1 + warps()), Barrier());
    values_.assign(kLaneValues * all, 0);
    votes_.assign(all, false);
    while (static_cast<int>(fibers_.size()) < all) add_fiber();
    for (int t = 0; t < all; t++) {
      fibers_[t]->copies.assign(1, {});
      fibers_[t]->barrier = 0;
      fibers_[t]->generation = -1;
      fibers_[t]->done = fibers_[t]->arrived = fibers_[t]->waited = false;
    }
    left_ = all;
    place_ = -1;
    progress_ = true;
    find_next();
    switch_context(scheduler_, fibers_[current_]->context);
    check(left_ == 0, "a barrier that not all threads reach");
  }

  void check(bool holds, const char* what) const {
    if (holds) return;
    std::printf("emulated block %lld: %s\n", static_cast<long long>(first_block_), what);
    std::exit(1);
  }

  // Makes the next thread (in the order) that need not wait the current one; returns false if there is none.
  bool find_next() {
    // Threads that waited before still wait, unless a barrier has released some.
    if (order == Order::kAhead && released_) place_ = -1;
    released_ = false;
    for (;;) {
      if (++place_ == group_ * threads_) {
        if (!progress_ || order == Order::kAhead) return false;
        progress_ = false;
        place_ = 0;
      }
      const int t = thread_at(place_);
      const Fiber& fiber = *fibers_[t];
      if (fiber.done || barriers_[fiber.barrier].generation == fiber.generation) continue;
      current_ = t;
      thread_ = t % threads_;
      block_ = t / threads_;
      return true;
    }
  }
  int thread_at(int place) const {
    const int all = group_ * threads_;
    if (order == Order::kBackward) return all - 1 - place;
    // A permutation, as no launch has a multiple of 37 threads.
    return order == Order::kInterleaved ? place * 37 % all : place;
  }

  void add_fiber() {
    fibers_.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers_.back();
    fiber.stack = std::make_unique_for_overwrite<unsigned char[]>(kStackBytes);
    make_context(fiber.context, fiber.stack.get(), kStackBytes, &Emulator::loop);
  }

  static void loop() {
    Emulator& emulator = get();
    for (;;) {
      emulator.kernel_();
      emulator.fibers_[emulator.current_]->done = true;
      emulator.left_--;
      emulator.progress_ = true;
      emulator.leave();
    }
  }

  // Switches to the next thread, or back to run_group() if there is none.
  __attribute__((noinline)) void leave() {
    Fiber& fiber = *fibers_[current_];
    Context& next = find_next() ? fibers_[current_]->context : scheduler_;
    if (&next != &fiber.context) switch_context(fiber.context, next);
  }

  std::function<void()> kernel_;
  int threads_ = 0, group_ = 1;
  int current_ = 0, thread_ = 0, block_ = 0;  // the current thread: number in the group, number in its block, its block
  int64_t first_block_ = 0;
  int place_ = 0;  // of the current thread in the order
  int left_ = 0;   // the number of threads that are not done
  bool progress_ = false, released_ = false;
  std::vector<std::unique_ptr<unsigned char[]>> shared_;
  std::vector<Barrier> barriers_;
  std::vector<double> values_;
  std::vector<unsigned char> votes_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Context scheduler_{};
};

}  // namespace gs::gpu
