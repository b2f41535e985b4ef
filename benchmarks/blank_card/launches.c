/* Kernels: those that nvcc compiled into a library, and those that are loaded at run time. None is run. */
#include "card.h"

#include <stdlib.h>
#include <string.h>

static int launch(const char *kernel, dim3 grid, dim3 block, size_t shared) {
  size_t threads = (size_t)block.x * block.y * block.z;
  int fits = grid.x && grid.y && grid.z && grid.x <= 2147483647u && grid.y <= 65535 && grid.z <= 65535 && threads &&
             threads <= 1024 && block.z <= 64 && shared <= (size_t)card_shared();
  blank_count(LAUNCH, kernel, 0);
  if (!fits) blank_count(INVALID, kernel, 0);
  return fits ? card_error() : cudaErrorInvalidConfiguration;
}

/* --- nvcc's: a library registers each kernel under the address of its host function ---------------------- */

typedef struct Known { const void *host; char *name; struct Known *next; } Known;
static Known *known[4096];

static unsigned slot(const void *host) { return ((size_t)host >> 4) & 4095; }

static const char *name_of(const void *host) {
  for (Known *k = known[slot(host)]; k; k = k->next)
    if (k->host == host) return k->name;
  return "a kernel without a name";
}

void **__cudaRegisterFatBinary(void *binary) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **handle, char *host, char *address, const char *name, int external, size_t size,
                       int constant, int global) {}

void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, void *thread,
                            void *block, void *block_size, void *grid, int *warp) {
  Known *k = malloc(sizeof *k);
  *k = (Known){host, strdup(name), known[slot(host)]};
  known[slot(host)] = k;
}

/* `kernel<<<grid, block, shared, stream>>>(...)` pushes its configuration; the host function pops and launches. */
static __thread struct { dim3 grid, block; size_t shared; void *stream; } pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  pushed.grid = grid;
  pushed.block = block;
  pushed.shared = shared;
  pushed.stream = stream;
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *(void **)stream = pushed.stream;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *host, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t s) {
  return launch(name_of(host), grid, block, shared);
}

cudaError_t __cudaLaunchKernel(const void *host, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t s) {
  return launch(name_of(host), grid, block, shared);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *host, void **args) {
  return launch(name_of(host), c->gridDim, c->blockDim, c->dynamicSmemBytes);
}

cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t function, void *data) {
  function(data); /* all that was queued before it is done */
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) {
  *kernel = (cudaKernel_t)host; /* what __cudaLaunchKernel gets is the host function then */
  return cudaSuccess;
}

cudaError_t __cudaInitModule(void **handle) { return cudaSuccess; }

cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) {
  static char space[1 << 20]; /* read by kernels, which do not run */
  *p = space;
  return cudaSuccess;
}

/* --- Triton's and NVRTC's: a module, and a function of it by its name ------------------------------------- */

static char module; /* one for all: what is in it is never looked at */

CUresult cuModuleLoadData(CUmodule *m, const void *image) {
  blank_count(BINARY, "cuModuleLoadData", 0);
  *m = (CUmodule)&module;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoad(CUmodule *m, const char *file) { return cuModuleLoadData(m, NULL); }

CUresult cuModuleLoadDataEx(CUmodule *m, const void *image, unsigned n, CUjit_option *options, void **values) {
  return cuModuleLoadData(m, image);
}

CUresult cuModuleUnload(CUmodule m) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  *f = (CUfunction)strdup(name);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream s, void **args, void **extra) {
  int why_not = launch((const char *)f, (dim3){gx, gy, gz}, (dim3){bx, by, bz}, shared);
  return why_not == cudaErrorInvalidConfiguration ? CUDA_ERROR_INVALID_VALUE : why_not;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **args, void **extra) {
  return cuLaunchKernel(f, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                        c->sharedMemBytes, c->hStream, args, extra);
}

/* --- what kernels are said to need: no binary is read, `python -m benchmarks.kernels --compile-only` does ---- */

enum { REGISTERS = 32 };

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction f) {
  int threads = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
  *value = threads ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? REGISTERS : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute which, int value) {
  int too_much = which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > card_shared();
  if (too_much) blank_count(INVALID, (const char *)f, 0);
  return too_much ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) {
  *n = card_attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  return CUDA_SUCCESS;
}

/* PyTorch is not compiled for sm_89, which takes what was compiled for sm_86; CUB looks its kernels up by that. */
static int binary_version(void) { return card_capability() == 89 ? 86 : card_capability(); }

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *host) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = REGISTERS;
  a->binaryVersion = a->ptxVersion = binary_version();
  a->maxDynamicSharedSizeBytes = card_shared();
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *host, enum cudaFuncAttribute which, int value) {
  int too_much = which == cudaFuncAttributeMaxDynamicSharedMemorySize && value > card_shared();
  if (too_much) blank_count(INVALID, name_of(host), 0);
  return too_much ? cudaErrorInvalidValue : cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *host, int threads, size_t shared) {
  *n = 2;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *host, int threads,
                                                                   size_t shared, unsigned flags) {
  *n = 2;
  return cudaSuccess;
}

/* --- descriptors of the tensor memory accelerator: refused where a card would refuse them -------------------- */

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *at,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  int fine = rank >= 1 && rank <= 5 && (size_t)at % 16 == 0;
  for (unsigned i = 0; fine && i < rank; i++)
    fine = sizes[i] && sizes[i] <= 1ULL << 32 && box[i] && box[i] <= 256;
  for (unsigned i = 0; fine && i + 1 < rank; i++) fine = strides[i] % 16 == 0 && strides[i] < 1ULL << 40;
  if (!fine) blank_count(INVALID, "cuTensorMapEncodeTiled", 0);
  return fine ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
