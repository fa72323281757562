// libcuda.so.1: the driver's functions that cudarc calls. All is done at the call, or when a graph that
// recorded it runs.
#include <dirent.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "run.h"

using namespace emulate;

// All of the driver, as cudarc names them (build), less what they have in common.
enum Result {
  SUCCESS,
#define X(NAME, VALUE) NAME = VALUE,
#include "errors.h"
#undef X
};

static std::recursive_mutex mutex;
std::recursive_mutex& emulate::whole() { return mutex; }
static bool begun;
static thread_local void* current;
static int primary;

// A line that says more than the code that comes back.
static Result refuse(Result code, const std::string& why) {
  fprintf(stderr, "emulator: refused: %s\n", why.c_str());
  return code;
}

#define API(NAME, ...) extern "C" __attribute__((visibility("default"))) int NAME(__VA_ARGS__)
// For what works in the context of this thread.
#define IN_CONTEXT                                    \
  std::lock_guard<std::recursive_mutex> guard(mutex); \
  if (!begun) return NOT_INITIALIZED;                 \
  if (!current) return INVALID_CONTEXT

// --- Streams, events, graphs ------------------------------------------------------------------------------

struct Graph {
  std::vector<std::function<void()>> nodes;
  std::set<void*> memory, freed;  // Allocated while it was recorded; of that, freed then or later.
  ~Graph() {
    // What is not freed is whoever's that frees it.
    for (void* at : freed) release(at);
  }
};
struct Capture {
  std::shared_ptr<Graph> graph = std::make_shared<Graph>();
  struct Stream* origin;
  std::set<struct Stream*> streams;
  int mode;
  void* thread;
  bool active = true, broken = false;
};
struct Stream {
  std::shared_ptr<Capture> capture;
};
struct Event {
  bool recorded = false, timed = true;
  std::chrono::steady_clock::time_point at;
  std::shared_ptr<Capture> capture;
};
static Stream legacy;
static thread_local Stream of_thread;
static std::set<Stream*> streams;
static std::set<Event*> events;
static std::set<std::shared_ptr<Capture>> captures;
static std::map<void*, std::weak_ptr<Graph>> graph_memory;

static Stream* stream_of(void* handle) {
  if (uintptr_t(handle) <= 1) return &legacy;
  if (uintptr_t(handle) == 2) return &of_thread;
  return streams.count(static_cast<Stream*>(handle)) ? static_cast<Stream*>(handle) : nullptr;
}

// Whether a capture forbids this thread what cannot be recorded; it is then lost.
static bool forbidden(const char* what) {
  for (const auto& capture : captures) {
    if (capture->mode == 2 || (capture->mode == 1 && capture->thread != &of_thread)) continue;
    capture->broken = true;
    refuse(STREAM_CAPTURE_UNSUPPORTED, std::string(what) + " while a stream is captured");
    return true;
  }
  return false;
}

int emulate::submit(void* handle, const char* name, std::function<void()> work) {
  IN_CONTEXT;
  Stream* const stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  if (stream->capture) {
    if (stream->capture->broken) return STREAM_CAPTURE_INVALIDATED;
    stream->capture->graph->nodes.push_back([name, work] { measured(name, work); });
  } else {
    if (stream == &legacy) {
      for (const auto& capture : captures) {
        if (capture->mode != 2) return capture->broken = true, STREAM_CAPTURE_IMPLICIT;
      }
    }
    measured(name, work);
  }
  return SUCCESS;
}

API(cuStreamCreate, Stream** stream, unsigned) {
  IN_CONTEXT;
  streams.insert(*stream = new Stream);
  return SUCCESS;
}
API(cuStreamCreateWithPriority, Stream** stream, unsigned flags, int) {
  return cuStreamCreate(stream, flags);
}
API(cuCtxGetStreamPriorityRange, int* least, int* greatest) {
  *least = 0, *greatest = -5;
  return SUCCESS;
}
API(cuStreamDestroy_v2, Stream* stream) {
  IN_CONTEXT;
  if (!streams.erase(stream)) return INVALID_HANDLE;
  if (stream->capture) stream->capture->broken = true;
  delete stream;
  return SUCCESS;
}
API(cuStreamSynchronize, void* handle) {
  IN_CONTEXT;
  Stream* const stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  if (stream->capture) {
    stream->capture->broken = true;
    return refuse(STREAM_CAPTURE_UNSUPPORTED, "cuStreamSynchronize of a stream that is captured");
  }
  check_memory("at a synchronization");
  return SUCCESS;
}
API(cuStreamQuery, void* handle) { return cuStreamSynchronize(handle); }
API(cuCtxSynchronize, void) {
  IN_CONTEXT;
  if (forbidden("cuCtxSynchronize")) return STREAM_CAPTURE_UNSUPPORTED;
  check_memory("at a synchronization");
  return SUCCESS;
}
API(cuLaunchHostFunc, void* stream, void (*f)(void*), void* data) {
  return submit(stream, "host function", [=] { f(data); });
}

API(cuEventCreate, Event** event, unsigned flags) {
  IN_CONTEXT;
  events.insert(*event = new Event);
  (*event)->timed = !(flags & 2);
  return SUCCESS;
}
API(cuEventDestroy_v2, Event* event) {
  IN_CONTEXT;
  if (!events.erase(event)) return INVALID_HANDLE;
  delete event;
  return SUCCESS;
}
API(cuEventRecord, Event* event, void* handle) {
  IN_CONTEXT;
  Stream* const stream = stream_of(handle);
  if (!stream || !events.count(event)) return INVALID_HANDLE;
  event->recorded = true;
  event->capture = stream->capture;
  event->at = std::chrono::steady_clock::now();
  return SUCCESS;
}
API(cuEventQuery, Event* event) {
  IN_CONTEXT;
  if (!events.count(event)) return INVALID_HANDLE;
  if (event->capture) return event->capture->broken = true, CAPTURED_EVENT;
  return SUCCESS;
}
API(cuEventSynchronize, Event* event) {
  IN_CONTEXT;
  if (const int code = cuEventQuery(event)) return code;
  check_memory("at a synchronization");
  return SUCCESS;
}
API(cuEventElapsedTime, float* ms, Event* from, Event* to) {
  IN_CONTEXT;
  if (!events.count(from) || !events.count(to)) return INVALID_HANDLE;
  if (!from->timed || !to->timed || !from->recorded || !to->recorded) return INVALID_HANDLE;
  *ms = std::chrono::duration<float, std::milli>(to->at - from->at).count();
  return SUCCESS;
}
API(cuEventElapsedTime_v2, float* ms, Event* from, Event* to) { return cuEventElapsedTime(ms, from, to); }
API(cuStreamWaitEvent, void* handle, Event* event, unsigned) {
  IN_CONTEXT;
  Stream* const stream = stream_of(handle);
  if (!stream || !events.count(event)) return INVALID_HANDLE;
  if (!event->recorded || event->capture == stream->capture) return SUCCESS;
  if (stream->capture) {
    stream->capture->broken = true;
    return refuse(STREAM_CAPTURE_ISOLATION,
                  "a stream that is captured waits for an event from outside of the capture");
  }
  if (!event->capture->active) return refuse(INVALID_VALUE, "waits for an event of a capture that has ended");
  stream->capture = event->capture;
  stream->capture->streams.insert(stream);
  return SUCCESS;
}

API(cuStreamBeginCapture_v2, void* handle, int mode) {
  IN_CONTEXT;
  Stream* const stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  if (stream == &legacy) return STREAM_CAPTURE_UNSUPPORTED;
  if (stream->capture) return INVALID_VALUE;
  stream->capture = std::make_shared<Capture>();
  stream->capture->origin = stream, stream->capture->mode = mode, stream->capture->thread = &of_thread;
  stream->capture->streams.insert(stream);
  captures.insert(stream->capture);
  return SUCCESS;
}
API(cuStreamEndCapture, void* handle, std::shared_ptr<Graph>** graph) {
  IN_CONTEXT;
  *graph = nullptr;
  Stream* const stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  const std::shared_ptr<Capture> capture = stream->capture;
  if (!capture) return INVALID_VALUE;
  if (capture->origin != stream) return STREAM_CAPTURE_UNMATCHED;
  for (Stream* joined : capture->streams) {
    if (joined == stream || streams.count(joined)) joined->capture = nullptr;
  }
  capture->active = false;
  captures.erase(capture);
  if (capture->broken) return STREAM_CAPTURE_INVALIDATED;
  *graph = new std::shared_ptr<Graph>(capture->graph);
  return SUCCESS;
}
API(cuStreamIsCapturing, void* handle, int* status) {
  IN_CONTEXT;
  Stream* const stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  *status = !stream->capture ? 0 : stream->capture->broken ? 2 : 1;
  return SUCCESS;
}
API(cuGraphInstantiateWithFlags, std::shared_ptr<Graph>** exec, std::shared_ptr<Graph>* graph,
    unsigned long long) {
  *exec = new std::shared_ptr<Graph>(*graph);
  return SUCCESS;
}
API(cuGraphDestroy, std::shared_ptr<Graph>* graph) {
  IN_CONTEXT;
  delete graph;
  return SUCCESS;
}
API(cuGraphExecDestroy, std::shared_ptr<Graph>* exec) { return cuGraphDestroy(exec); }
API(cuGraphLaunch, std::shared_ptr<Graph>* exec, void* stream) {
  const std::shared_ptr<Graph> graph = *exec;
  return submit(stream, "graph", [graph] {
    for (const auto& node : graph->nodes) node();
  });
}

// --- The device and its context ---------------------------------------------------------------------------

API(cuInit, unsigned) {
  begun = true;
  return SUCCESS;
}
API(cuDriverGetVersion, int* version) {
  *version = 13000;
  return SUCCESS;
}
API(cuDeviceGetCount, int* count) {
  *count = 1;
  return begun ? SUCCESS : NOT_INITIALIZED;
}
API(cuDeviceGet, int* device, int which) {
  *device = which;
  return !begun ? NOT_INITIALIZED : which == 0 ? SUCCESS : INVALID_DEVICE;
}
API(cuDeviceGetName, char* name, int size, int) {
  snprintf(name, size_t(size), "emulated GPU");
  return SUCCESS;
}
API(cuDeviceGetUuid, char* id, int) {
  memcpy(id, "emulated GPU 000", 16);
  return SUCCESS;
}
API(cuDeviceGetUuid_v2, char* id, int device) { return cuDeviceGetUuid(id, device); }
API(cuDeviceTotalMem_v2, size_t* bytes, int) {
  size_t used, peak;
  memory_use(&used, &peak, bytes);
  return SUCCESS;
}
API(cuDeviceGetAttribute, int* value, int which, int device) {
  if (device != 0) return INVALID_DEVICE;
  // An H100's.
  static const std::map<int, int> values = {
      {1, 1024},     {2, 1024},     {3, 1024},   {4, 64},         {5, 2147483647},  {6, 65535},
      {7, 65535},    {8, 49152},    {9, 65536},  {10, 32},        {11, 2147483647}, {12, 65536},
      {13, 1980000}, {14, 512},     {15, 1},     {16, 132},       {17, 0},          {18, 0},
      {19, 1},       {20, 0},       {31, 1},     {32, 1},         {33, 1},          {34, 0},
      {35, 0},       {36, 2619000}, {37, 5120},  {38, 52428800},  {39, 2048},       {40, 3},
      {41, 1},       {50, 0},       {75, 9},     {76, 0},         {78, 1},          {79, 1},
      {80, 1},       {81, 233472},  {82, 65536}, {83, 0},         {84, 0},          {87, 2},
      {88, 0},       {89, 0},       {90, 1},     {91, 1},         {95, 1},          {97, 232448},
      {99, 1},       {102, 0},      {106, 32},   {108, 32768000}, {111, 1024},      {115, 1},
      {116, 0},      {119, 0},
  };
  const auto found = values.find(which);
  if (found == values.end()) return refuse(INVALID_VALUE, "device attribute " + std::to_string(which));
  *value = found->second;
  return SUCCESS;
}
API(cuDevicePrimaryCtxRetain, void** context, int) {
  *context = &primary;
  return begun ? SUCCESS : NOT_INITIALIZED;
}
API(cuCtxSetCurrent, void* context) {
  current = context;
  return SUCCESS;
}
API(cuCtxGetCurrent, void** context) {
  *context = current;
  return SUCCESS;
}
API(cuCtxGetLimit, size_t* value, int) {
  *value = 0;
  return SUCCESS;
}
API(cuCtxGetCacheConfig, int* config) {
  *config = 0;
  return SUCCESS;
}

static const std::map<int, const char*> names = {
    {SUCCESS, "CUDA_SUCCESS"},
#define X(NAME, VALUE) {VALUE, "CUDA_ERROR_" #NAME},
#include "errors.h"
#undef X
};
API(cuGetErrorName, int code, const char** text) {
  const auto found = names.find(code);
  *text = found == names.end() ? "CUDA_ERROR" : found->second;
  return SUCCESS;
}
API(cuGetErrorString, int code, const char** text) { return cuGetErrorName(code, text); }

// --- Memory -----------------------------------------------------------------------------------------------

API(cuMemAlloc_v2, void** at, size_t bytes) {
  IN_CONTEXT;
  if (bytes == 0) return INVALID_VALUE;
  if (forbidden("cuMemAlloc")) return STREAM_CAPTURE_UNSUPPORTED;
  *at = allocate(bytes);
  return *at ? SUCCESS : OUT_OF_MEMORY;
}
// Of a graph: what it allocates lives as long as it does, and is poisoned whenever it allocates or frees.
API(cuMemAllocAsync, void** at, size_t bytes, void* handle) {
  IN_CONTEXT;
  Stream* const stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  *at = nullptr;
  if (bytes == 0) return SUCCESS;
  *at = allocate(bytes);
  if (!*at) return OUT_OF_MEMORY;
  if (stream->capture) {
    stream->capture->graph->memory.insert(*at);
    graph_memory[*at] = stream->capture->graph;
    submit(handle, "allocation", [p = *at] { poison(p); });
  }
  return SUCCESS;
}
API(cuMemAllocFromPoolAsync, void** at, size_t bytes, void*, void* stream) {
  return cuMemAllocAsync(at, bytes, stream);
}
API(cuMemFree_v2, void* at) {
  IN_CONTEXT;
  if (!at) return SUCCESS;
  if (forbidden("cuMemFree")) return STREAM_CAPTURE_UNSUPPORTED;
  const auto of_graph = graph_memory.find(at);
  if (of_graph != graph_memory.end()) {
    if (const auto graph = of_graph->second.lock()) return poison(at), graph->freed.insert(at), SUCCESS;
  }
  return release(at) ? SUCCESS : refuse(INVALID_VALUE, "cuMemFree of what is not allocated");
}
API(cuMemFreeAsync, void* at, void* handle) {
  IN_CONTEXT;
  Stream* const stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  if (!at) return SUCCESS;
  const auto found = graph_memory.find(at);
  const std::shared_ptr<Graph> graph = found == graph_memory.end() ? nullptr : found->second.lock();
  if (stream->capture) {
    if (graph != stream->capture->graph) {
      stream->capture->broken = true;
      return refuse(INVALID_VALUE, "cuMemFreeAsync, in a capture, of what was not allocated in it");
    }
    graph->freed.insert(at);
    return submit(handle, "release", [at] { poison(at); });
  }
  if (graph) return poison(at), graph->freed.insert(at), SUCCESS;
  return release(at) ? SUCCESS : refuse(INVALID_VALUE, "cuMemFreeAsync of what is not allocated");
}
API(cuMemGetInfo_v2, size_t* available, size_t* total) {
  IN_CONTEXT;
  size_t used, peak;
  memory_use(&used, &peak, total);
  *available = *total - used;
  return SUCCESS;
}
API(cuMemHostAlloc, void** at, size_t bytes, unsigned) {
  IN_CONTEXT;
  if (forbidden("cuMemHostAlloc")) return STREAM_CAPTURE_UNSUPPORTED;
  *at = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (!*at) return OUT_OF_MEMORY;
  memset(*at, 0xff, bytes);
  pinned(*at, bytes);
  return SUCCESS;
}
API(cuMemFreeHost, void* at) {
  IN_CONTEXT;
  pinned(at, 0);
  free(at);
  return SUCCESS;
}

static Result in_device(const void* at, size_t bytes, const char* what) {
  if (device_range(at, bytes)) return SUCCESS;
  return refuse(INVALID_VALUE, std::string(what) + ": " + std::to_string(bytes) +
                                   " bytes that are not all in one allocation of the device");
}
static int copy(void* stream, void* to, const void* from, size_t bytes, bool to_device, bool from_device,
                const char* name) {
  IN_CONTEXT;
  if (bytes == 0) return SUCCESS;
  if (to_device && in_device(to, bytes, name)) return INVALID_VALUE;
  if (from_device && in_device(from, bytes, name)) return INVALID_VALUE;
  return submit(stream, name, [=] {
    memmove(to, from, bytes);
    if (!to_device) check_memory("at a copy to the host");
  });
}
API(cuMemcpyHtoD_v2, void* to, const void* from, size_t bytes) {
  return copy(nullptr, to, from, bytes, true, false, "copy to the device");
}
API(cuMemcpyDtoH_v2, void* to, const void* from, size_t bytes) {
  return copy(nullptr, to, from, bytes, false, true, "copy to the host");
}
API(cuMemcpyDtoD_v2, void* to, const void* from, size_t bytes) {
  return copy(nullptr, to, from, bytes, true, true, "copy on the device");
}
API(cuMemcpyHtoDAsync_v2, void* to, const void* from, size_t bytes, void* stream) {
  return copy(stream, to, from, bytes, true, false, "copy to the device");
}
API(cuMemcpyDtoHAsync_v2, void* to, const void* from, size_t bytes, void* stream) {
  return copy(stream, to, from, bytes, false, true, "copy to the host");
}
API(cuMemcpyDtoDAsync_v2, void* to, const void* from, size_t bytes, void* stream) {
  return copy(stream, to, from, bytes, true, true, "copy on the device");
}
API(cuMemcpyPeerAsync, void* to, void*, const void* from, void*, size_t bytes, void* stream) {
  return copy(stream, to, from, bytes, true, true, "copy on the device");
}
API(cuMemsetD8Async, void* at, unsigned char value, size_t bytes, void* stream) {
  IN_CONTEXT;
  if (bytes == 0) return SUCCESS;
  if (in_device(at, bytes, "memset")) return INVALID_VALUE;
  return submit(stream, "memset", [=] { memset(at, value, bytes); });
}
API(cuMemsetD8_v2, void* at, unsigned char value, size_t bytes) {
  return cuMemsetD8Async(at, value, bytes, nullptr);
}

static uint64_t threshold;
API(cuDeviceGetDefaultMemPool, void** pool, int) {
  *pool = &threshold;
  return SUCCESS;
}
API(cuDeviceGetMemPool, void** pool, int device) { return cuDeviceGetDefaultMemPool(pool, device); }
API(cuMemPoolGetAttribute, void*, int which, void* value) {
  IN_CONTEXT;
  size_t used, peak, total;
  memory_use(&used, &peak, &total);
  if (which <= 3) return *static_cast<int*>(value) = 1, SUCCESS;
  const uint64_t values[] = {threshold, used, peak, used, peak};
  if (which > 8) return INVALID_VALUE;
  memcpy(value, &values[which - 4], 8);
  return SUCCESS;
}
API(cuMemPoolSetAttribute, void*, int which, void* value) {
  if (which == 4) memcpy(&threshold, value, 8);
  return SUCCESS;
}

// --- Modules and functions --------------------------------------------------------------------------------

struct Library {
  std::string name;
  const Module* module;
};
struct Function {
  const Module* module;
  const Kernel* kernel;
  size_t static_bytes = 0, most_dynamic = 48 << 10;
};
// What an image stands for: one module, or, if it is a real one, all of candle's or of this project's.
struct Image {
  std::vector<const Module*> modules;
};
static std::map<std::string, const Module*> loaded;
static std::map<const Kernel*, std::unique_ptr<Function>> functions;

// FAMILY.NAME.so beside this library.
static const Module* module_named(const std::string& file) {
  const auto found = loaded.find(file);
  if (found != loaded.end()) return found->second;
  Dl_info self;
  dladdr(reinterpret_cast<void*>(&cuInit), &self);
  const std::string path = std::string(self.dli_fname);
  void* const library =
      dlopen((path.substr(0, path.rfind('/') + 1) + "modules/" + file).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) return refuse(INVALID_IMAGE, dlerror()), nullptr;
  return loaded[file] = static_cast<const Module*>(dlsym(library, "emulate_module"));
}

API(cuModuleLoadData, Image** image, const void* data) {
  IN_CONTEXT;
  if (forbidden("cuModuleLoadData")) return STREAM_CAPTURE_UNSUPPORTED;
  const unsigned char* const bytes = static_cast<const unsigned char*>(data);
  const bool own = memcmp(bytes, "\x50\xed\x55\xba", 4) == 0;
  const char* const text = static_cast<const char*>(data) + (own ? 4 : 0);
  const std::string family = own ? "qtune." : "candle.";
  if (!own && (bytes[0] < 9 || bytes[0] > 126)) return INVALID_IMAGE;
  // What the fake compiler writes names the source.
  static const char mark[] = "// emulated: ";
  std::vector<std::string> wanted;
  if (strncmp(text, mark, strlen(mark)) == 0) {
    const char* const name = text + strlen(mark);
    wanted.push_back(family + std::string(name, strcspn(name, "\n")) + ".so");
  } else {
    Dl_info self;
    dladdr(reinterpret_cast<void*>(&cuInit), &self);
    const std::string path = std::string(self.dli_fname),
                      folder = path.substr(0, path.rfind('/') + 1) + "modules";
    if (DIR* const all = opendir(folder.c_str())) {
      while (const dirent* entry = readdir(all)) {
        if (strncmp(entry->d_name, family.c_str(), family.size()) == 0) wanted.push_back(entry->d_name);
      }
      closedir(all);
    }
  }
  auto made = std::make_unique<Image>();
  for (const std::string& file : wanted) {
    const Module* const module = module_named(file);
    // Candle has some that the emulator leaves out.
    if (module) made->modules.push_back(module);
  }
  *image = made.release();
  return SUCCESS;
}
API(cuModuleLoad, Image**, const char*) { return FILE_NOT_FOUND; }
API(cuModuleUnload, Image* image) {
  delete image;
  return SUCCESS;
}
API(cuModuleGetFunction, Function** function, Image* image, const char* name) {
  IN_CONTEXT;
  for (const Module* module : image->modules) {
    for (size_t i = 0; i < module->count; i++) {
      if (strcmp(module->kernels[i].name, name) != 0) continue;
      auto& known = functions[&module->kernels[i]];
      if (!known) known.reset(new Function{module, &module->kernels[i]});
      *function = known.get();
      return SUCCESS;
    }
  }
  return refuse(NOT_FOUND, std::string("no kernel ") + name);
}
API(cuModuleGetGlobal_v2, void**, size_t*, Image*, const char* name) {
  return refuse(NOT_FOUND, std::string("no variable ") + name);
}

API(cuFuncGetAttribute, int* value, int which, Function* f) {
  const int values[] = {
      f->kernel->threads, int(f->static_bytes), 0, 0, 32, 90, 90, 0, int(f->most_dynamic), -1};
  if (which < 0 || which > 9) return INVALID_VALUE;
  *value = values[which];
  return SUCCESS;
}
API(cuFuncSetAttribute, Function* f, int which, int value) {
  IN_CONTEXT;
  if (which == 9) return SUCCESS;
  if (which != 8 || value < 0 || size_t(value) + f->static_bytes > 232448) {
    return refuse(INVALID_VALUE, std::string(f->kernel->name) + ": attribute " + std::to_string(which) +
                                     " cannot be " + std::to_string(value));
  }
  f->most_dynamic = size_t(value);
  return SUCCESS;
}

static int resident(const Function* f, int threads, size_t dynamic) {
  if (threads <= 0 || threads > f->kernel->threads) return 0;
  const size_t shared = (f->static_bytes + dynamic + 1024 + 127) / 128 * 128;
  const int by_threads = 2048 / ((threads + 31) / 32 * 32), by_shared = int(233472 / shared);
  return std::min(32, std::min(by_threads, by_shared));
}
API(cuOccupancyMaxActiveBlocksPerMultiprocessor, int* count, Function* f, int threads, size_t dynamic) {
  *count = resident(f, threads, dynamic);
  return SUCCESS;
}
API(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, int* count, Function* f, int threads,
    size_t dynamic, unsigned) {
  *count = resident(f, threads, dynamic);
  return SUCCESS;
}
API(cuOccupancyMaxPotentialBlockSize, int* least_grid, int* threads, Function* f, size_t (*of)(int),
    size_t dynamic, int most) {
  *threads = most > 0 ? std::min(most, f->kernel->threads) : f->kernel->threads;
  *least_grid = 132 * resident(f, *threads, of ? of(*threads) : dynamic);
  return SUCCESS;
}
API(cuOccupancyMaxPotentialBlockSizeWithFlags, int* least_grid, int* threads, Function* f, size_t (*of)(int),
    size_t dynamic, int most, unsigned) {
  return cuOccupancyMaxPotentialBlockSize(least_grid, threads, f, of, dynamic, most);
}
API(cuOccupancyAvailableDynamicSMemPerBlock, size_t* bytes, Function* f, int blocks, int) {
  const size_t each = 233472 / size_t(blocks) / 128 * 128;
  *bytes = each > 1024 + f->static_bytes ? std::min(each - 1024 - f->static_bytes, f->most_dynamic) : 0;
  return SUCCESS;
}

API(cuLaunchKernel, Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned shared, void* stream, void** parameters, void** extra) {
  IN_CONTEXT;
  const Kernel& kernel = *f->kernel;
  const auto no = [&](const std::string& why) {
    return refuse(INVALID_VALUE, std::string(kernel.name) + ": " + why);
  };
  const auto three = [](unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
  };
  if (gx == 0 || gy == 0 || gz == 0 || gx > 2147483647 || gy > 65535 || gz > 65535) {
    return no("a grid of " + three(gx, gy, gz));
  }
  const uint64_t threads = uint64_t(bx) * by * bz;
  if (bx > 1024 || by > 1024 || bz > 64 || threads == 0 || threads > 1024)
    return no("a block of " + three(bx, by, bz));
  if (threads > uint64_t(kernel.threads)) {
    return no(std::to_string(threads) + " threads, of " + std::to_string(kernel.threads) +
              " that its bounds allow");
  }
  if (shared > f->most_dynamic || shared + f->static_bytes > 232448) {
    return no(std::to_string(shared) + " bytes of shared memory, of " + std::to_string(f->most_dynamic) +
              " that were asked for");
  }
  if (extra || (kernel.count && !parameters)) return no("no parameters");
  // In one piece, each where 16 divides its place.
  std::vector<size_t> places;
  size_t size = 0;
  for (size_t i = 0; i < kernel.count; i++)
    places.push_back(size), size += (kernel.parameters[i].bytes + 15) / 16 * 16;
  auto copied = std::make_shared<std::vector<max_align_t>>(size / sizeof(max_align_t) + 1);
  char* const bytes = reinterpret_cast<char*>(copied->data());
  for (size_t i = 0; i < kernel.count; i++)
    memcpy(bytes + places[i], parameters[i], kernel.parameters[i].bytes);
  return submit(stream, kernel.name, [=] {
    std::vector<void*> at;
    for (size_t place : places) at.push_back(reinterpret_cast<char*>(copied->data()) + place);
    f->static_bytes = run(*f->module, *f->kernel, dim3{gx, gy, gz}, dim3{bx, by, bz}, shared, at.data());
  });
}
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned count;
};
API(cuLaunchKernelEx, const Config* c, Function* f, void** parameters, void** extra) {
  if (c->count) return refuse(INVALID_VALUE, "cuLaunchKernelEx with attributes");
  return cuLaunchKernel(f, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2],
                        c->shared, c->stream, parameters, extra);
}

// What needs nothing done. Further arguments are not looked at.
#define NOTHING(NAME) \
  API(NAME) { return SUCCESS; }
NOTHING(cuStreamAttachMemAsync)
NOTHING(cuGraphUpload)
NOTHING(cuDevicePrimaryCtxRelease_v2)
NOTHING(cuCtxSetFlags)
NOTHING(cuCtxSetLimit)
NOTHING(cuCtxSetCacheConfig)
NOTHING(cuProfilerStart)
NOTHING(cuProfilerStop)
NOTHING(cuDeviceSetMemPool)
NOTHING(cuMemPoolTrimTo)
NOTHING(cuFuncSetCacheConfig)
