// Between what runs kernels (run.cpp), the driver's functions (driver.cpp) and the kernels (device.h).
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <mutex>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#pragma GCC visibility push(default)
namespace emulate {

// 16 bytes under way to shared memory, the first `bytes` of them from `from`.
struct Copy {
  unsigned to;
  const void* from;
  int bytes;
};

// A CUDA thread. A fiber is made for it when it begins, and goes on with another when it has ended.
struct Lane {
  uint3 thread;
  unsigned index;
  struct Fiber* fiber;
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // How many of the copies each group has.
};

struct Parameter {
  size_t bytes;
  bool pointer;
};
struct Kernel {
  const char* name;
  void (*call)(void* const* parameters);
  int threads;  // Of __launch_bounds__, else 1024.
  size_t count;
  const Parameter* parameters;
};
// What a module's library exports as `emulate_module`.
struct Module {
  const Kernel* kernels;
  size_t count;
  bool own;  // Of this project: more is demanded of it than of candle's.
};

// Kernels of one launch, one block and one thread run at a time, so these are plain variables.
extern Lane* now;
extern uint3 block;
extern dim3 block_dim, grid;
extern unsigned char* dynamic_shared;
extern unsigned long serial;  // Of this block among all.

// Prints a line that names the kernel, block and thread, and aborts.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void barrier(int line);
// Waits until every lane of the mask has called with the same `what`; then `all` is called once, with what
// each lane gave.
void collective(const char* what, unsigned mask, void* mine, void (*all)(void** of, unsigned mask));
// A place in shared memory for a variable of this block.
void* place(size_t bytes, size_t align);
struct Variable {
  unsigned long of = 0;
  void* at = nullptr;
  // In place of `__shared__ T`, declared to be aligned to `align`.
  template <typename T>
  T& as(size_t align) {
    if (of != serial) at = place(sizeof(T), align > alignof(T) ? align : alignof(T)), of = serial;
    return *static_cast<T*>(at);
  }
};
void* shared_pointer(unsigned address, size_t bytes);

void copy_begin(unsigned to, const void* from, int bytes);
void copy_commit();
void copy_wait(size_t left);

// Runs at once. `parameters` are those of a launch. Bytes of static shared memory come back.
size_t run(const Module& module, const Kernel& kernel, dim3 grid, dim3 block, size_t shared,
           void* const* parameters);

// Device memory: 256-byte aligned, poisoned, no other memory near it.
void* allocate(size_t bytes);
bool release(void* at);
bool device_range(const void* at, size_t bytes);
std::recursive_mutex& whole();  // Held by every call of the driver; for whoever else looks at memory.
bool device_pointer(const void* at);
void pinned(void* at, size_t bytes);  // Of the host, but for kernels too; 0 bytes: no more.
void poison(void* at);
void memory_use(size_t* used, size_t* peak, size_t* total);
// Whether nothing was written behind or before any allocation.
void check_memory(const char* when);

// Does it now, or when the graph runs that the stream records. `name` counts in the statistics.
int submit(void* stream, const char* name, std::function<void()> work);
void measured(const char* name, const std::function<void()>& work);

}  // namespace emulate
#pragma GCC visibility pop
