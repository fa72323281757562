// Runs kernels on the host, a fiber for each thread of a block, blocks one after the other; and the device's
// memory.
#include "run.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <map>
#include <string>
#include <unordered_map>

namespace emulate {

struct Fiber {
  void* sp;
};

Lane* now;
uint3 block;
dim3 block_dim, grid;
unsigned char* dynamic_shared;
unsigned long serial;

// The launch that is under way.
static const Kernel* kernel;
static const Module* module_of;
static void* const* arguments;

void fail(const char* format, ...) {
  char text[1024];
  va_list rest;
  va_start(rest, format);
  vsnprintf(text, sizeof text, format, rest);
  va_end(rest);
  if (kernel && now) {
    fprintf(stderr, "emulator: %s, block (%u, %u, %u), thread (%u, %u, %u): %s\n", kernel->name, block.x,
            block.y, block.z, now->thread.x, now->thread.y, now->thread.z, text);
  } else {
    fprintf(stderr, "emulator: %s%s%s\n", kernel ? kernel->name : "", kernel ? ": " : "", text);
  }
  fflush(stderr);
  kernel = nullptr;
  abort();
}

// --- Fibers -----------------------------------------------------------------------------------------------

extern "C" void emulate_switch(void** from, void* to);
asm(R"(
.text
.globl emulate_switch
.hidden emulate_switch
.type emulate_switch, @function
emulate_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emulate_switch, . - emulate_switch
)");

constexpr size_t PAGE = 4096, STACK = 256 << 10;

struct Warp {
  unsigned fresh, ready, waiting, barrier, done, present;
  // Of a lane that waits: what it gave, in which collective, for whom.
  void* mine[32];
  const char* what[32];
  unsigned mask[32];
};
static Warp warps[32];
static Lane lanes[1024];
static unsigned warp_count, at_warp, lanes_left;
static int barrier_line;
static std::vector<Fiber*> idle;
static void* main_sp;

// 0: lanes and warps in order. Else warps lag behind now and then, and lanes run in some order.
static uint64_t seed = getenv("QTUNE_EMULATE_SEED") ? strtoull(getenv("QTUNE_EMULATE_SEED"), nullptr, 10) : 0;
static unsigned draw() {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return unsigned(seed >> 33);
}

static Lane& lane_at(unsigned warp, unsigned mask) { return lanes[warp * 32 + __builtin_ctz(mask)]; }

// Who goes on: a lane of the same warp, else of another, else all behind the barrier; null when all have
// ended.
static Lane* next() {
  for (;;) {
    Warp& w = warps[at_warp];
    if (unsigned can = w.fresh | w.ready) {
      if (seed) {
        const unsigned turn = draw() % 32, from = can >> turn;
        can = from ? from << turn : can;
        if (draw() % 16 == 0) {
          // Another warp, if one can.
          for (unsigned i = draw() % warp_count, n = 0; n < warp_count; n++, i = (i + 1) % warp_count) {
            if (const unsigned other = warps[i].fresh | warps[i].ready) {
              at_warp = i, can = other;
              break;
            }
          }
        }
      }
      const unsigned bit = can & -can;
      warps[at_warp].fresh &= ~bit, warps[at_warp].ready &= ~bit;
      return &lane_at(at_warp, bit);
    }
    const unsigned first = seed ? draw() % warp_count : at_warp + 1 == warp_count ? 0 : at_warp + 1;
    bool found = false;
    for (unsigned n = 0; n < warp_count && !found; n++) {
      const unsigned i = first + n < warp_count ? first + n : first + n - warp_count;
      if (warps[i].fresh | warps[i].ready) at_warp = i, found = true;
    }
    if (found) continue;
    if (lanes_left == 0) return nullptr;
    // All wait: behind the barrier, unless some wait for lanes of their warp that do not come.
    for (unsigned i = 0; i < warp_count; i++) {
      Warp& w = warps[i];
      if (!w.waiting) continue;
      now = &lane_at(i, w.waiting);
      const unsigned lane = now->index % 32, absent = w.mask[lane] & ~w.waiting;
      fail("waits in %s for the lanes %08x, of which %08x do not come (%08x of them have ended)",
           w.what[lane], w.mask[lane], absent, absent & w.done);
    }
    for (unsigned i = 0; i < warp_count; i++) {
      Warp& w = warps[i];
      if (module_of->own && w.done) {
        for (unsigned j = 0; j < warp_count; j++) {
          if (warps[j].barrier) now = &lane_at(j, warps[j].barrier);
        }
        fail("waits at __syncthreads, which thread %u does not reach, since it has ended",
             lane_at(i, w.done).index);
      }
      w.ready = w.barrier, w.barrier = 0;
    }
    barrier_line = 0;
  }
}

static void fiber_main() {
  for (;;) {
    Fiber* const self = now->fiber;
    kernel->call(arguments);
    if (!now->copies.empty()) {
      size_t committed = 0;
      for (size_t n : now->groups) committed += n;
      if (committed != now->copies.size()) fail("ends with asynchronous copies that were never committed");
      copy_wait(0);
    }
    now->groups.clear();
    warps[now->index / 32].done |= 1u << now->index % 32;
    lanes_left--;
    now->fiber = nullptr;
    Lane* const other = next();
    if (other && !other->fiber) {
      other->fiber = self;
      now = other;
      continue;
    }
    idle.push_back(self);
    if (other) now = other;
    emulate_switch(&self->sp, other ? other->fiber->sp : main_sp);
  }
}

static Fiber* fiber() {
  if (idle.empty()) {
    // Below it a page that must not be touched.
    char* const stack =
        static_cast<char*>(mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (stack == MAP_FAILED) fail("no memory for stacks");
    mprotect(stack, PAGE, PROT_NONE);
    // Not all at the same place in their pages, which would be the same place in the cache.
    static size_t made;
    void** sp = reinterpret_cast<void**>(stack + STACK - made++ * 832 % (64 << 10) / 64 * 64) - 2;
    sp[0] = reinterpret_cast<void*>(fiber_main), sp[1] = nullptr;
    sp -= 6;
    idle.push_back(new Fiber{sp});
  }
  Fiber* const taken = idle.back();
  idle.pop_back();
  return taken;
}

// Leaves this lane, which waits for something, to whoever can go on.
static void leave() {
  Lane* const mine = now;
  Lane* const other = next();
  if (other == mine) return;
  if (!other->fiber) other->fiber = fiber();
  now = other;
  emulate_switch(&mine->fiber->sp, other->fiber->sp);
}

void barrier(int line) {
  if (module_of->own && barrier_line && barrier_line != line) {
    fail("waits at the __syncthreads of line %d, while others wait at that of line %d", line, barrier_line);
  }
  barrier_line = line;
  warps[now->index / 32].barrier |= 1u << now->index % 32;
  leave();
}

void collective(const char* what, unsigned mask, void* mine, void (*all)(void** of, unsigned mask)) {
  Warp& w = warps[now->index / 32];
  const unsigned lane = now->index % 32, bit = 1u << lane;
  if (!(mask & bit)) fail("calls %s, though its mask %08x excludes it", what, mask);
  if (module_of->own) {
    if (mask & ~w.present) fail("calls %s for the lanes %08x of a warp that has %08x", what, mask, w.present);
  } else {
    mask &= w.present & ~w.done;
  }
  w.mine[lane] = mine, w.what[lane] = what, w.mask[lane] = mask;
  if ((w.waiting & mask) != (mask & ~bit)) {
    w.waiting |= bit;
    leave();
    return;
  }
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    if (w.mask[i] != mask || (w.what[i] != what && strcmp(w.what[i], what) != 0)) {
      fail("calls %s for the lanes %08x, while lane %d waits in %s for %08x", what, mask, i, w.what[i],
           w.mask[i]);
    }
  }
  all(w.mine, mask);
  w.waiting &= ~mask;
  w.ready |= mask & ~bit;
  if (seed && draw() % 8 == 0) {
    w.ready |= bit;
    leave();
  }
}

// --- Shared memory ----------------------------------------------------------------------------------------

// Below 4 GB, so that an address fits the 32 bits that instructions take: what variables are placed in, then
// a page that must not be touched, then dynamic memory, which ends at another.
constexpr size_t STATIC = 64 << 10, DYNAMIC = 228 << 10, GAP = 32;
static unsigned char* arena;
struct Placed {
  unsigned char *from, *to;
};
static std::vector<Placed> placed;
static size_t static_bytes, dynamic_bytes;

static bool all_ones(const unsigned char* at, const unsigned char* end) {
  uint64_t all = ~uint64_t(0);
  for (; at + 64 <= end; at += 64) {
    uint64_t words[8];
    memcpy(words, at, 64);
    for (uint64_t word : words) all &= word;
  }
  unsigned char rest = 0xff;
  for (; at < end; at++) rest &= *at;
  return all == ~uint64_t(0) && rest == 0xff;
}

void* place(size_t bytes, size_t align) {
  // As badly aligned as its type allows.
  unsigned char* at = placed.empty() ? arena + GAP : placed.back().to + GAP;
  at = reinterpret_cast<unsigned char*>((uintptr_t(at) + 2 * align - 1) / (2 * align) * (2 * align));
  if (align < 16) at += align;
  static_bytes += (bytes + align - 1) / align * align;
  if (at + bytes + GAP > arena + STATIC || static_bytes > 48 << 10)
    fail("more than 48 KiB of static shared memory");
  placed.push_back({at, at + bytes});
  return at;
}

void* shared_pointer(unsigned address, size_t bytes) {
  unsigned char* const at = reinterpret_cast<unsigned char*>(uintptr_t(address));
  if (uintptr_t(at) % bytes) fail("an address in shared memory is no multiple of %zu", bytes);
  if (at >= dynamic_shared && at + bytes <= dynamic_shared + dynamic_bytes) return at;
  for (const Placed& p : placed) {
    if (at >= p.from && at + bytes <= p.to) return at;
  }
  fail("accesses shared memory beyond what the block has: %td of %zu", at - dynamic_shared, dynamic_bytes);
}

void copy_begin(unsigned to, const void* from, int bytes) {
  if (bytes < 0 || bytes > 16) fail("cp.async of %d bytes", bytes);
  if (bytes > 0 && uintptr_t(from) % 16) fail("cp.async from an address that is no multiple of 16");
  // Whoever still reads it, or reads too early, sees it.
  memset(shared_pointer(to, 16), 0xff, 16);
  now->copies.push_back({to, from, bytes});
}

void copy_commit() {
  size_t committed = 0;
  for (size_t n : now->groups) committed += n;
  now->groups.push_back(now->copies.size() - committed);
}

void copy_wait(size_t left) {
  if (now->groups.size() <= left) return;
  size_t done = 0;
  const size_t groups = now->groups.size() - left;
  for (size_t g = 0; g < groups; g++) {
    for (size_t i = 0; i < now->groups[g]; i++, done++) {
      const Copy& c = now->copies[done];
      unsigned char bytes[16] = {};
      memcpy(bytes, c.from, size_t(c.bytes));
      memcpy(reinterpret_cast<void*>(uintptr_t(c.to)), bytes, 16);
    }
  }
  now->copies.erase(now->copies.begin(), now->copies.begin() + ptrdiff_t(done));
  now->groups.erase(now->groups.begin(), now->groups.begin() + ptrdiff_t(groups));
}

static void check_shared() {
  for (const Placed& p : placed) {
    if (!all_ones(p.from - 16, p.from) || !all_ones(p.to, p.to + GAP)) {
      fail("a thread of the block wrote before or behind an array of %td bytes in shared memory",
           p.to - p.from);
    }
  }
  unsigned char* const end = dynamic_shared + dynamic_bytes;
  if (!all_ones(dynamic_shared - 256, dynamic_shared) || !all_ones(end, arena + STATIC + PAGE + DYNAMIC)) {
    fail("a thread of the block wrote before or behind its %zu bytes of shared memory", dynamic_bytes);
  }
}

// --- Faults -----------------------------------------------------------------------------------------------

static struct sigaction before[65];
static thread_local bool running;  // This thread, a kernel.

static void near(uintptr_t at, char* text, size_t size);

static void fault(int which, siginfo_t* info, void* context) {
  if (kernel && running) {
    char where[256] = "";
    const uintptr_t at = uintptr_t(info->si_addr);
    if (which == SIGFPE) fail("divides by 0");
    if (which == SIGILL) fail("runs into what C++ does not define");
    if (at >= uintptr_t(arena) && at < uintptr_t(arena) + STATIC + DYNAMIC + 2 * PAGE) {
      fail("touches shared memory %td bytes from its beginning, has %zu",
           reinterpret_cast<unsigned char*>(at) - dynamic_shared, dynamic_bytes);
    }
    near(at, where, sizeof where);
    fail("touches the address %p%s", info->si_addr, where);
  }
  if (before[which].sa_flags & SA_SIGINFO && before[which].sa_sigaction) {
    before[which].sa_sigaction(which, info, context);
  } else {
    sigaction(which, &before[which], nullptr);
  }
}

static void begin() {
  const size_t bytes = STATIC + PAGE + DYNAMIC + PAGE;
  void* const at =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
  if (at == MAP_FAILED) fail("no addresses below 4 GB");
  arena = static_cast<unsigned char*>(at);
  memset(arena, 0xff, bytes);
  mprotect(arena + STATIC, PAGE, PROT_NONE);
  mprotect(arena + bytes - PAGE, PAGE, PROT_NONE);
  struct sigaction ours = {};
  ours.sa_sigaction = fault;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int which : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(which, &ours, &before[which]);
}

#define API extern "C" __attribute__((visibility("default")))
// What g++ -fsanitize calls where it finds something; each begins with where in the source.
struct Place {
  const char* file;
  unsigned line, column;
};
#define FOUND(NAME, ...)                                                             \
  API void __ubsan_handle_##NAME(Place* at, size_t, size_t) {                        \
    fail("%s:%u:%u: " __VA_ARGS__, at->file ? at->file : "?", at->line, at->column); \
  }                                                                                  \
  API void __ubsan_handle_##NAME##_abort(Place* at, size_t a, size_t b) { __ubsan_handle_##NAME(at, a, b); }
FOUND(out_of_bounds, "an index is out of bounds")
FOUND(shift_out_of_bounds, "shifts by too much")
#undef FOUND
API void __ubsan_handle_type_mismatch_v1(Place* at, size_t address) {
  fail("%s:%u:%u: an access to %p, which is not aligned or null", at->file ? at->file : "?", at->line,
       at->column, reinterpret_cast<void*>(address));
}
API void __ubsan_handle_type_mismatch_v1_abort(Place* at, size_t address) {
  __ubsan_handle_type_mismatch_v1(at, address);
}

// --- Launches ---------------------------------------------------------------------------------------------

static std::deque<const char*> latest;  // Kernels since memory was checked.

size_t run(const Module& module, const Kernel& which, dim3 grid_dim, dim3 dim, size_t shared,
           void* const* parameters) {
  if (!arena) begin();
  if (latest.empty() || latest.back() != which.name) latest.push_back(which.name);
  if (latest.size() > 8) latest.pop_front();
  kernel = &which, module_of = &module, arguments = parameters, now = nullptr, running = true;
  for (size_t i = 0; i < which.count; i++) {
    if (!which.parameters[i].pointer) continue;
    void* at;
    memcpy(&at, parameters[i], sizeof at);
    if (at && !device_pointer(at)) fail("its parameter %zu, %p, is not in the device's memory", i, at);
  }
  const unsigned threads = dim.x * dim.y * dim.z;
  if (dim.x != block_dim.x || dim.y != block_dim.y || dim.z != block_dim.z || !lanes[threads - 1].index) {
    for (unsigned i = 0; i < threads; i++) {
      lanes[i].index = i;
      lanes[i].thread = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
    }
  }
  grid = grid_dim, block_dim = dim, warp_count = (threads + 31) / 32;
  dynamic_bytes = shared;
  dynamic_shared = arena + STATIC + PAGE + DYNAMIC - (shared + 15) / 16 * 16;
  size_t most = 0;
  for (unsigned z = 0; z < grid.z; z++) {
    for (unsigned y = 0; y < grid.y; y++) {
      for (unsigned x = 0; x < grid.x; x++) {
        block = {x, y, z}, serial++;
        placed.clear(), static_bytes = 0;
        memset(dynamic_shared, 0xff, shared);
        for (unsigned i = 0; i < warp_count; i++) {
          const unsigned count = threads - i * 32, present = count >= 32 ? ~0u : (1u << count) - 1;
          warps[i].fresh = warps[i].present = present;
          warps[i].ready = warps[i].waiting = warps[i].barrier = warps[i].done = 0;
        }
        at_warp = seed ? draw() % warp_count : 0, lanes_left = threads, barrier_line = 0;
        now = next();
        now->fiber = fiber();
        emulate_switch(&main_sp, now->fiber->sp);
        if (shared || !placed.empty()) check_shared();
        most = std::max(most, static_bytes);
        if (shared) memset(dynamic_shared, 0xff, shared);
        for (const Placed& p : placed) memset(p.from, 0xff, size_t(p.to - p.from));
      }
    }
  }
  now = nullptr;
  static const bool each = getenv("QTUNE_EMULATE_CHECK");
  if (each) check_memory("after it");
  kernel = nullptr, running = false;
  return most;
}

struct Cost {
  size_t count = 0;
  double seconds = 0;
};
static std::map<std::string, Cost> costs;
static const bool stats = getenv("QTUNE_EMULATE_STATS");

void measured(const char* name, const std::function<void()>& work) {
  if (!stats) return work();
  const auto begun = std::chrono::steady_clock::now();
  work();
  Cost& cost = costs[name];
  cost.count++;
  cost.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
}

// --- The device's memory ----------------------------------------------------------------------------------

// Pages of its own, the last bytes at a page that must not be touched. All that is not in use is ones: a NaN.
struct Piece {
  unsigned char* pages;
  size_t count, bytes;
};
static std::map<uintptr_t, Piece> pieces;
static std::unordered_map<size_t, std::deque<unsigned char*>> unused;  // By pages.
static std::map<uintptr_t, size_t> host;
static size_t used, peak, allocations, kept;
// Pretended, and what this machine can bear.
static const size_t total = size_t(80) << 30,
                    limit = std::min(total, size_t(sysconf(_SC_PHYS_PAGES)) * PAGE / 8 * 7);

static std::string kernels() {
  std::string names;
  for (const char* name : latest) names += (names.empty() ? "" : ", ") + std::string(name);
  return names.empty() ? "no kernel" : names;
}

void* allocate(size_t bytes) {
  const size_t padded = (bytes + 255) / 256 * 256, count = (padded + PAGE - 1) / PAGE, size = count * PAGE;
  if (size > limit || used + size > limit) return nullptr;
  unsigned char* pages = nullptr;
  auto& same = unused[count];
  if (!same.empty()) {
    pages = same.front();
    same.pop_front();
    kept -= size;
    if (!all_ones(pages, pages + size)) {
      fail("memory of %zu bytes or less was written after it was freed; the latest: %s", size,
           kernels().c_str());
    }
  } else {
    void* const at = mmap(nullptr, size + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    pages = static_cast<unsigned char*>(at);
    mprotect(pages + size, PAGE, PROT_NONE);
    memset(pages, 0xff, size);
  }
  unsigned char* const at = pages + size - padded;
  pieces[uintptr_t(at)] = {pages, count, bytes};
  used += size, peak = std::max(peak, used), allocations++;
  return at;
}

static void check(uintptr_t at, const Piece& p, const char* when) {
  const unsigned char *from = reinterpret_cast<unsigned char*>(at), *to = from + p.bytes;
  const unsigned char* const end = p.pages + p.count * PAGE;
  const bool below = all_ones(std::max<const unsigned char*>(p.pages, from - 256), from),
             above = all_ones(to, end);
  if (below && above) return;
  fail("found %s: something wrote %s an allocation of %zu bytes; the latest: %s", when,
       below ? "behind" : "before", p.bytes, kernels().c_str());
}

bool release(void* at) {
  const auto found = pieces.find(uintptr_t(at));
  if (found == pieces.end()) return false;
  const Piece p = found->second;
  const size_t size = p.count * PAGE;
  check(uintptr_t(at), p, "when it was freed");
  pieces.erase(found);
  used -= size;
  if (kept + size > size_t(1) << 30) {
    munmap(p.pages, size + PAGE);
  } else {
    memset(p.pages, 0xff, size);
    unused[p.count].push_back(p.pages);
    kept += size;
  }
  return true;
}

static std::map<uintptr_t, Piece>::iterator piece(const void* at) {
  auto after = pieces.upper_bound(uintptr_t(at));
  if (after == pieces.begin()) return pieces.end();
  --after;
  // The end of one is a pointer too.
  return uintptr_t(at) <= after->first + after->second.bytes ? after : pieces.end();
}

bool device_range(const void* at, size_t bytes) {
  const auto found = piece(at);
  return found != pieces.end() && uintptr_t(at) + bytes <= found->first + found->second.bytes;
}

bool device_pointer(const void* at) {
  if (piece(at) != pieces.end()) return true;
  const auto after = host.upper_bound(uintptr_t(at));
  return after != host.begin() && uintptr_t(at) <= std::prev(after)->first + std::prev(after)->second;
}

void pinned(void* at, size_t bytes) {
  if (bytes) {
    host[uintptr_t(at)] = bytes;
  } else {
    host.erase(uintptr_t(at));
  }
}

void poison(void* at) { memset(at, 0xff, pieces.at(uintptr_t(at)).bytes); }

void memory_use(size_t* in_use, size_t* most, size_t* all) { *in_use = used, *most = peak, *all = total; }

void check_memory(const char* when) {
  for (const auto& [at, p] : pieces) check(at, p, when);
  latest.clear();
}

static void near(uintptr_t at, char* text, size_t size) {
  auto after = pieces.upper_bound(at);
  if (after == pieces.begin()) return;
  --after;
  snprintf(text, size, ", %zd bytes from the beginning of an allocation of %zu bytes",
           ssize_t(at - after->first), after->second.bytes);
}

// At exit, of the whole process.
static struct Report {
  ~Report() {
    if (!stats) return;
    fprintf(stderr, "emulator: %zu allocations, at most %.1f MiB at a time, %.1f MiB at the end\n",
            allocations, double(peak) / 1048576, double(used) / 1048576);
    std::vector<std::pair<std::string, Cost>> sorted(costs.begin(), costs.end());
    std::sort(sorted.begin(), sorted.end(),
              [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
    for (size_t i = 0; i < sorted.size() && i < 40; i++) {
      fprintf(stderr, "emulator: %9.3f s %8zu times %s\n", sorted[i].second.seconds, sorted[i].second.count,
              sorted[i].first.c_str());
    }
  }
} report;

}  // namespace emulate
