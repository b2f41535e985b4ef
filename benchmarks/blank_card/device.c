/* The device itself, its streams and events, and how functions are looked up: the runtime's and the driver's. */
#include "card.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* --- the device -------------------------------------------------------------------------------------------- */

static char context; /* one for all */

static void told(int *value, int what) { *value = what; }

/* Of a card that is away, or that the driver does not fit, there are none. */
static int counted(int *n) {
  int error = card_error();
  return told(n, !error), error == cudaErrorLaunchFailure ? 0 : error;
}

cudaError_t cudaGetDeviceCount(int *n) { return counted(n); }
cudaError_t cudaGetDevice(int *d) { return told(d, 0), cudaSuccess; }
cudaError_t cudaSetDevice(int d) { return d ? cudaErrorInvalidDevice : card_error(); }
cudaError_t cudaDriverGetVersion(int *v) { return told(v, CUDART_VERSION), cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *v) { return told(v, CUDART_VERSION), cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int d) {
  return told(value, card_attribute((int)which)), cudaSuccess; /* both enumerations have the same numbers */
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  return told(least, 0), told(greatest, -5), cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int d) {
  snprintf(id, (size_t)size, "0000:01:00.0");
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", card_name());
  memcpy(p->uuid.bytes, "the blank card  ", 16);
  p->totalGlobalMem = card_memory();
  p->major = card_capability() / 10;
  p->minor = card_capability() % 10;
  p->multiProcessorCount = card_attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  p->warpSize = 32;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = card_attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR);
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->sharedMemPerBlock = 48 * 1024;
  p->sharedMemPerBlockOptin = (size_t)card_shared();
  p->sharedMemPerMultiprocessor = (size_t)card_attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
  p->l2CacheSize = 50 << 20;
  p->totalConstMem = 65536;
  p->textureAlignment = 512;
  p->memPitch = 2147483647;
  p->unifiedAddressing = 1;
  return cudaSuccess;
}

CUresult cuInit(unsigned flags) { return card_error(); }
CUresult cuDriverGetVersion(int *v) { return told(v, CUDART_VERSION), CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *n) { return counted(n); }
CUresult cuDeviceGet(CUdevice *d, int i) { return told(d, i), i ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS; }
CUresult cuDeviceGetName(char *name, int size, CUdevice d) {
  snprintf(name, (size_t)size, "%s", card_name());
  return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice d) {
  *bytes = card_memory();
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice d) {
  return told(value, card_attribute((int)which)), CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *c) {
  *c = (CUcontext)&context;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext c) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *d) { return told(d, 0), CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { return cuCtxGetCurrent(c); }
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) {
  *flags = 0;
  return told(active, 1), CUDA_SUCCESS;
}

/* --- errors: each call returns its own, and what befell the card is every call's from then on ------------------ */

cudaError_t cudaGetLastError(void) { return card_error(); }
cudaError_t cudaPeekAtLastError(void) { return card_error(); }

const char *cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNotSupported: return "not supported by the blank card";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorUnknown: return "unknown error";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorSystemDriverMismatch: return "system has unsupported display driver / cuda driver combination";
    default: return "an error of the blank card";
  }
}
const char *cudaGetErrorName(cudaError_t e) {
  return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError";
}

CUresult cuGetErrorString(CUresult e, const char **text) {
  *text = cudaGetErrorString((cudaError_t)e); /* the numbers that are returned here are the same in both */
  return CUDA_SUCCESS;
}

/* --- streams and events: everything is done as soon as it is asked for ---------------------------------------- */

static cudaError_t new_stream(cudaStream_t *s) {
  static long streams = 16; /* the first numbers stand for the default streams */
  *s = (cudaStream_t)__sync_add_and_fetch(&streams, 1);
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *s) { return new_stream(s); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return new_stream(s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { return new_stream(s); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { return told(priority, 0), cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t s) { return card_error(); }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) { return cudaSuccess; }

/* Graphs of launches are not captured; asking for one is refused. */
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *n) {
#else
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                        cudaGraph_t *graph, const cudaGraphNode_t **nodes, size_t *n) {
#endif
  return cudaStreamIsCapturing(s, status);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return cudaSuccess; }

/* An event is the moment of its record on the host's clock, in milliseconds. */
static double *moment(cudaEvent_t e) { return (double *)e; }

cudaError_t cudaEventCreate(cudaEvent_t *e) {
  *e = (cudaEvent_t)calloc(1, sizeof(double));
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { return cudaEventCreate(e); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
  free(e);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  *moment(e) = 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
  return card_error();
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { return cudaEventRecord(e, s); }
cudaError_t cudaEventQuery(cudaEvent_t e) { return card_error(); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
  *ms = (float)(*moment(end) - *moment(start)) + 1e-3f; /* never 0: programs divide by it */
  return cudaSuccess;
}

/* --- where the host would wait ---------------------------------------------------------------------------------- */

static int waited(const char *name) {
  blank_count(WAIT, name, 0);
  return card_error();
}
cudaError_t cudaDeviceSynchronize(void) { return waited("cudaDeviceSynchronize"); }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return waited("cudaStreamSynchronize"); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return waited("cudaEventSynchronize"); }
CUresult cuCtxSynchronize(void) { return waited("cuCtxSynchronize"); }
CUresult cuStreamSynchronize(CUstream s) { return waited("cuStreamSynchronize"); }
CUresult cuEventSynchronize(CUevent e) { return waited("cuEventSynchronize"); }

/* --- functions asked for by name --------------------------------------------------------------------------------- */

static int nameless(void) { return blank_absent("a function that this library has no name for"); }

static void *by_name(const char *name) {
  char newer[256];
  void *found = NULL;
  for (int version = 3; version > 1 && !found; version--) {
    snprintf(newer, sizeof newer, "%s_v%d", name, version);
    found = dlsym(RTLD_DEFAULT, newer);
  }
  if (!found) found = dlsym(RTLD_DEFAULT, name);
  return found ? found : (void *)nameless;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *status) {
  *f = by_name(name);
  if (status) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

CUresult cuGetProcAddress_v2(const char *name, void **f, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *status) {
  *f = by_name(name);
  if (status) *status = CU_GET_PROC_ADDRESS_SUCCESS;
  return CUDA_SUCCESS;
}
