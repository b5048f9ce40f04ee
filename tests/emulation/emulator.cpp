// SPDX-License-Identifier: Apache-2.0
#include "emulation/emulator.h"

#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "emulation/faults.h"
#include "emulation/fiber.h"
#include "emulation/shared_arena.h"

namespace kvevict::emulation {

Controls controls;
Counters counters;
std::string last_error;

static Place place;  // of the running thread
const Place& here = place;

namespace {

constexpr int kMaxWarps = kMaxThreadsPerBlock / kWarpSize;
constexpr int kMaxIdleRounds = 100'000;

// One cp.async.
struct Copy {
  void* shared;
  const void* global;
  size_t bytes;
  bool valid;
  unsigned group;
};

struct Thread {
  uint3 index;               // in the block
  unsigned number;           // the same in one dimension
  Fiber* fiber;              // null before the thread has started
  std::vector<Copy> copies;  // in flight, oldest first
  unsigned committed_groups;
};

// A collective that some of its lanes have come to.
struct Meeting {
  const Collective* kind;
  uint32_t mask, arrived;
};

struct Warp {
  uint32_t ready, at_barrier, asleep, exited;  // sets of lanes
  int num_meetings;
  Meeting meetings[kWarpSize];
  void* lane_data[kWarpSize];  // of those who arrived
};

// xorshift64*
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 0x2545F4914F6CDD1Du) {
    if (state_ == 0) state_ = 1;
  }
  uint32_t below(uint32_t bound) {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>(((state_ * 0x2545F4914F6CDD1Du >> 32) * bound) >> 32);
  }

 private:
  uint64_t state_;
};

// The launch in progress. Each block starts from a fresh state.
struct Launch {
  Launch() : threads(kMaxThreadsPerBlock), fibers(kMaxThreadsPerBlock), random(0) {}

  std::vector<Thread> threads;
  Warp warps[kMaxWarps];
  uint32_t ready_warps;
  unsigned num_warps;
  unsigned live, at_barrier;
  int votes, last_votes;  // of __syncthreads_count
  int idle_rounds;        // how often in a row all threads slept

  Thread* running = nullptr;
  Fiber host;
  Fiber* previous;  // the fiber that switched to the running one
  FiberPool fibers;
  SharedArena shared;
  Random random;
  const std::function<void()>* run_thread;
  std::string error;
};

Launch& the_launch() {
  static auto* launch = new Launch;  // its stacks outlive every static object
  return *launch;
}
Launch* state = nullptr;  // the_launch() once there was one: spares its guard

Warp& warp_of(const Thread& thread) { return state->warps[thread.number / kWarpSize]; }
uint32_t bit_of(const Thread& thread) { return 1u << thread.number % kWarpSize; }
Thread& thread_at(unsigned warp, unsigned lane) { return state->threads[warp * kWarpSize + lane]; }

void make_ready(unsigned warp, uint32_t lanes) {
  if (lanes == 0) return;
  state->warps[warp].ready |= lanes;
  state->ready_warps |= 1u << warp;
}

void make_unready(const Thread& thread) {
  Warp& warp = warp_of(thread);
  warp.ready &= ~bit_of(thread);
  if (warp.ready == 0) state->ready_warps &= ~(1u << thread.number / kWarpSize);
}

// --- Which thread runs next ----------------------------------------------------------------------

unsigned choose(uint32_t set) {
  switch (controls.order) {
    case Order::kForward: return std::countr_zero(set);
    case Order::kReverse: return 31 - std::countl_zero(set);
    case Order::kRandom: break;
  }
  const unsigned start = state->random.below(32);
  return (std::countr_zero(std::rotr(set, static_cast<int>(start))) + start) % 32;
}

bool wake_sleepers() {
  bool any = false;
  for (unsigned w = 0; w < state->num_warps; ++w) {
    any |= state->warps[w].asleep != 0;
    make_ready(w, std::exchange(state->warps[w].asleep, 0));
  }
  return any;
}

// Null if no thread can run. In random order a warp mostly goes on, so that some run far ahead.
Thread* next_thread() {
  if (state->ready_warps == 0) {
    if (++state->idle_rounds > kMaxIdleRounds || !wake_sleepers()) return nullptr;
  }
  unsigned warp;
  if (controls.order == Order::kRandom && warp_of(*state->running).ready != 0 &&
      state->random.below(8) != 0) {
    warp = state->running->number / kWarpSize;
  } else {
    warp = choose(state->ready_warps);
  }
  return &thread_at(warp, choose(state->warps[warp].ready));
}

[[noreturn]] void end_block() {
  Fiber& fiber = *state->running->fiber;
  state->running = nullptr;
  state->fibers.give_back(&fiber);
  leave_fiber(fiber, state->host);
}

std::string list_of(unsigned count, const char* where) {
  return count == 0 ? "" : ", " + std::to_string(count) + " " + where;
}

// What every thread waits for, once none can go on.
[[noreturn]] void fail_with_deadlock() {
  unsigned asleep = 0;
  std::map<std::string, unsigned> meetings;
  for (unsigned w = 0; w < state->num_warps; ++w) {
    const Warp& warp = state->warps[w];
    asleep += std::popcount(warp.asleep);
    for (int i = 0; i < warp.num_meetings; ++i) {
      const Meeting& meeting = warp.meetings[i];
      char text[96];
      snprintf(text, sizeof(text), "in %s of mask 0x%08x", meeting.kind->name, meeting.mask);
      meetings[text] += std::popcount(meeting.arrived);
    }
  }
  std::string text = list_of(state->at_barrier, "at __syncthreads");
  for (const auto& [where, count] : meetings) text += list_of(count, where.c_str());
  text += list_of(asleep, "in __nanosleep");
  fail("deadlock: of %u threads%s", state->live, text.c_str());
}

void run_fiber();

void set_running(Thread& thread) {
  state->running = &thread;
  place.thread_index = thread.index;
}

void switch_to(Thread& next) {
  Thread& me = *state->running;
  set_running(next);
  ++counters.switches;
  state->previous = me.fiber;
  if (next.fiber == nullptr) next.fiber = state->fibers.take(run_fiber);
  switch_fiber(*me.fiber, *next.fiber);
}

// The running thread cannot go on before somebody makes it ready.
void wait() {
  Thread& me = *state->running;
  make_unready(me);
  Thread* next = next_thread();
  if (next == nullptr) fail_with_deadlock();
  if (next != &me) switch_to(*next);
}

// --- Life of a thread ----------------------------------------------------------------------------

void open_barrier_if_all_came() {
  if (state->at_barrier == 0 || state->at_barrier < state->live) return;
  for (unsigned w = 0; w < state->num_warps; ++w) {
    make_ready(w, std::exchange(state->warps[w].at_barrier, 0));
  }
  state->at_barrier = 0;
  state->last_votes = std::exchange(state->votes, 0);
  state->idle_rounds = 0;
  ++counters.barriers;
}

// Returns whether they had.
bool end_meeting_if_all_came(Warp& warp, Meeting& meeting) {
  const auto [kind, mask, arrived] = meeting;
  if (arrived != (mask & ~warp.exited)) return false;
  if (kind->whole_warp && arrived != mask) {
    fail("%s: only lanes 0x%08x of the warp take part, the others have exited", kind->name,
         arrived);
  }
  kind->complete(warp.lane_data, arrived);
  meeting = warp.meetings[--warp.num_meetings];
  make_ready(static_cast<unsigned>(&warp - state->warps), arrived);
  state->idle_rounds = 0;
  ++counters.collectives;
  return true;
}

void exit_thread() {
  Thread& me = *state->running;
  if (!me.copies.empty()) {
    fail("the thread exits with %zu cp.async in flight", me.copies.size());
  }
  Warp& warp = warp_of(me);
  make_unready(me);
  warp.exited |= bit_of(me);
  --state->live;
  state->idle_rounds = 0;
  open_barrier_if_all_came();
  for (int i = 0; i < warp.num_meetings;) {
    if (!end_meeting_if_all_came(warp, warp.meetings[i])) ++i;
  }
}

// Runs threads from start to end; one that has not begun yet gets the stack of the one that ended.
void run_fiber() {
  arrive_in_fiber(*state->previous);
  for (;;) {
    (*state->run_thread)();
    exit_thread();
    if (state->live == 0) end_block();
    Thread* next = next_thread();
    if (next == nullptr) fail_with_deadlock();
    Thread& me = *state->running;
    if (next->fiber != nullptr) {
      state->fibers.give_back(me.fiber);
      set_running(*next);
      ++counters.switches;
      leave_fiber(*me.fiber, *next->fiber);
    }
    next->fiber = std::exchange(me.fiber, nullptr);
    set_running(*next);
  }
}

// --- Life of a launch ----------------------------------------------------------------------------

void start_block(const cudaLaunchConfig_t& config) {
  const dim3 dim = config.blockDim;
  const unsigned count = dim.x * dim.y * dim.z;
  state->num_warps = (count + kWarpSize - 1) / kWarpSize;
  state->live = count;
  state->at_barrier = 0;
  state->votes = state->idle_rounds = 0;
  state->ready_warps = 0;
  for (unsigned w = 0; w < state->num_warps; ++w) {
    const unsigned rest = count - w * kWarpSize;
    const uint32_t lanes = rest >= kWarpSize ? ~0u : (1u << rest) - 1;
    Warp& warp = state->warps[w];
    warp.ready = warp.at_barrier = warp.asleep = 0;
    warp.exited = ~lanes;
    warp.num_meetings = 0;
    make_ready(w, lanes);
  }
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = state->threads[i];
    thread.index = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
    thread.number = i;
    thread.fiber = nullptr;
    thread.copies.clear();
    thread.committed_groups = 0;
  }
  counters.threads += count;
  ++counters.blocks;
}

void run_block(const cudaLaunchConfig_t& config, uint3 block_index) {
  start_block(config);
  place = {{}, block_index, config.blockDim, config.gridDim};
  state->shared.start_block(config.dynamicSmemBytes);
  state->running = &state->threads[0];  // for next_thread
  Thread* first = next_thread();
  first->fiber = state->fibers.take(run_fiber);
  set_running(*first);
  state->previous = &state->host;
  ++counters.switches;
  switch_fiber(state->host, *first->fiber);
  if (state->error.empty() && !state->shared.is_intact()) {
    char text[128];
    snprintf(text, sizeof(text), "block (%u, %u, %u) has written behind its shared memory",
             block_index.x, block_index.y, block_index.z);
    state->error = text;
  }
}

std::vector<uint32_t> order_of_blocks(uint64_t count) {
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (controls.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (controls.order == Order::kRandom) {
    for (uint32_t i = static_cast<uint32_t>(count); i > 1; --i) {
      std::swap(order[i - 1], order[state->random.below(i)]);
    }
  }
  return order;
}

cudaError_t refuse(cudaError_t error, std::string why) {
  last_error = "launch refused: " + std::move(why);
  return error;
}

std::string text_of(dim3 dim) {
  return "(" + std::to_string(dim.x) + ", " + std::to_string(dim.y) + ", " + std::to_string(dim.z) +
         ")";
}

std::map<const void*, size_t>& shared_limits() {
  static std::map<const void*, size_t> limits;
  return limits;
}

// What a GPU would refuse.
cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel, size_t parameter_bytes) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || block.x > 1024 || block.y > 1024 || block.z > 64 ||
      threads > kMaxThreadsPerBlock) {
    return refuse(cudaErrorInvalidConfiguration, "blocks of " + text_of(block) + " threads");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFF || grid.y > 65535 ||
      grid.z > 65535) {
    return refuse(cudaErrorInvalidConfiguration, "a grid of " + text_of(grid) + " blocks");
  }
  const auto limit = shared_limits().find(kernel);
  const size_t most = limit == shared_limits().end() ? kMaxPlainSharedBytes : limit->second;
  if (config.dynamicSmemBytes > most) {
    return refuse(cudaErrorInvalidValue, std::to_string(config.dynamicSmemBytes) +
                                             " bytes of dynamic shared memory, but " +
                                             std::to_string(most) +
                                             " are allowed by cudaFuncSetAttribute");
  }
  if (parameter_bytes > kMaxParameterBytes) {
    return refuse(cudaErrorInvalidValue, std::to_string(parameter_bytes) + " bytes of parameters");
  }
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeProgrammaticStreamSerialization) {
      return refuse(cudaErrorInvalidValue, "an unknown launch attribute");
    }
  }
  return cudaSuccess;
}

std::mutex& one_launch_at_a_time() {
  static std::mutex mutex;
  return mutex;
}

}  // namespace

// --- Host side -----------------------------------------------------------------------------------

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, size_t parameter_bytes,
                   const std::function<void()>& run_thread) {
  const std::lock_guard lock(one_launch_at_a_time());
  const cudaError_t refusal = check(config, kernel, parameter_bytes);
  if (refusal != cudaSuccess) return refusal;
  state = &the_launch();
  state->run_thread = &run_thread;
  state->error.clear();
  state->random = Random(controls.seed);
  ++counters.launches;

  const FaultHandler faults;
  const dim3 grid = config.gridDim;
  for (const uint64_t i : order_of_blocks(uint64_t{grid.x} * grid.y * grid.z)) {
    const uint3 block_index = {static_cast<unsigned>(i % grid.x),
                               static_cast<unsigned>(i / grid.x % grid.y),
                               static_cast<unsigned>(i / grid.x / grid.y)};
    run_block(config, block_index);
    if (!state->error.empty()) {
      state->fibers.give_back_all();
      last_error = state->error;
      return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(one_launch_at_a_time());
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > controls.max_shared_bytes) {
    return refuse(cudaErrorInvalidValue, std::to_string(value) + " bytes of shared memory, but " +
                                             std::to_string(controls.max_shared_bytes) +
                                             " are all there is");
  }
  shared_limits()[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t get_attribute(int* value, cudaDeviceAttr attribute) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = kMaxThreadsPerBlock; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kMaxPlainSharedBytes; return cudaSuccess;
    case cudaDevAttrWarpSize: *value = kWarpSize; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = controls.num_multiprocessors; return cudaSuccess;
    case cudaDevAttrL2CacheSize: *value = kL2Bytes; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 8; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(controls.max_shared_bytes);
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

// --- Thread side ---------------------------------------------------------------------------------

void fail(const char* format, ...) {
  char what[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof(what), format, arguments);
  va_end(arguments);
  if (state == nullptr || state->running == nullptr) {  // in host code there is nothing to end
    fprintf(stderr, "kvevict emulation: %s\n", what);
    std::abort();
  }
  const uint3 block = here.block_index, thread = here.thread_index;
  char where[128];
  snprintf(where, sizeof(where), "block (%u, %u, %u) thread (%u, %u, %u): ", block.x, block.y,
           block.z, thread.x, thread.y, thread.z);
  state->error = std::string(where) + what;
  end_block();
}

int barrier(bool predicate) {
  Thread& me = *state->running;
  warp_of(me).at_barrier |= bit_of(me);
  ++state->at_barrier;
  state->votes += predicate;
  open_barrier_if_all_came();
  if (warp_of(me).at_barrier & bit_of(me)) wait();
  return state->last_votes;
}

void sleep() {
  Thread& me = *state->running;
  warp_of(me).asleep |= bit_of(me);
  wait();
}

void* shared_memory(size_t bytes, size_t alignment) {
  if (bytes > state->shared.bytes()) {
    fail("shared_memory: the struct has %zu bytes, the launch gave %zu", bytes,
         state->shared.bytes());
  }
  check_aligned(state->shared.begin(), alignment, "shared_memory");
  return state->shared.begin();
}

void check_aligned(const void* address, size_t alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fail("%s: the address %p is not a multiple of %zu", what, address, alignment);
  }
}

void check_shared(const void* address, size_t bytes, const char* what) {
  if (!state->shared.contains(address, bytes)) {
    fail("%s: %zu bytes at %p, not in the %zu bytes of shared memory at %p", what, bytes, address,
         state->shared.bytes(), static_cast<void*>(state->shared.begin()));
  }
}

namespace {

void land(const Copy& copy) {
  if (copy.valid) {
    memcpy(copy.shared, copy.global, copy.bytes);
  } else {
    memset(copy.shared, 0, copy.bytes);
  }
}

}  // namespace

void copy_async(void* shared, const void* global, size_t bytes, bool valid) {
  check_aligned(shared, bytes, "cp.async to shared memory");
  check_aligned(global, bytes, "cp.async from global memory");
  check_shared(shared, bytes, "cp.async");
  Thread& me = *state->running;
  const Copy copy{shared, global, bytes, valid, me.committed_groups};
  me.copies.push_back(copy);
  counters.copied_bytes += bytes;
  if (controls.copies == CopyMode::kEager) {
    land(copy);
  } else {
    memset(shared, kGarbage, bytes);
  }
}

void commit_copies() { ++state->running->committed_groups; }

void wait_for_copies(unsigned pending_groups) {
  Thread& me = *state->running;
  auto end = me.copies.begin();
  for (; end != me.copies.end() && end->group + pending_groups < me.committed_groups; ++end) {
    if (controls.copies == CopyMode::kLazy) land(*end);
  }
  me.copies.erase(me.copies.begin(), end);
}

namespace {

// The meeting of that kind and mask, which a lane comes to. Lanes that it has to wait for must not
// wait for it elsewhere.
Meeting& meeting_of(Warp& warp, const Collective& kind, uint32_t mask, uint32_t lane) {
  Meeting* found = nullptr;
  for (int i = 0; i < warp.num_meetings; ++i) {
    Meeting& other = warp.meetings[i];
    if (other.kind == &kind && other.mask == mask) {
      found = &other;
    } else if ((other.arrived & mask) && (other.mask & lane)) {
      fail("divergent collectives: %s of mask 0x%08x, but lanes 0x%08x are in %s of mask 0x%08x",
           kind.name, mask, other.arrived, other.kind->name, other.mask);
    }
  }
  if (found != nullptr) return *found;
  warp.meetings[warp.num_meetings] = {&kind, mask, 0};
  return warp.meetings[warp.num_meetings++];
}

}  // namespace

void collective(const Collective& kind, uint32_t mask, void* lane_data) {
  Thread& me = *state->running;
  Warp& warp = warp_of(me);
  const uint32_t lane = bit_of(me);
  if (!(mask & lane)) fail("%s: the thread is not in its own mask 0x%08x", kind.name, mask);
  Meeting& meeting = meeting_of(warp, kind, mask, lane);
  meeting.arrived |= lane;
  warp.lane_data[me.number % kWarpSize] = lane_data;
  if (!end_meeting_if_all_came(warp, meeting)) wait();
}

// --- For faults.cpp ------------------------------------------------------------------------------

const Fiber* running_fiber() {
  return state == nullptr || state->running == nullptr ? nullptr : state->running->fiber;
}

bool is_behind_shared_memory(const void* address) { return state->shared.is_guard(address); }

}  // namespace kvevict::emulation

const uint3& threadIdx = kvevict::emulation::place.thread_index;
const uint3& blockIdx = kvevict::emulation::place.block_index;
const dim3& blockDim = kvevict::emulation::place.block_dim;
const dim3& gridDim = kvevict::emulation::place.grid_dim;
