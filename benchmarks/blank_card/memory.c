/* Memory of the card: address space that nothing touches, given out until the card is full. */
#include "card.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef struct Block { char *start; size_t size; int on_host; struct Block *next; } Block;

static Block *blocks;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  int error = card_error();
  if (error) return error;
  card_open(); /* as with a card: asking makes the context */
  *total = card_memory();
  *unused = card_free();
  return cudaSuccess;
}

/* --- which addresses are whose -------------------------------------------------------------------------- */

static void *map(size_t size, int access) {
  void *found = mmap(NULL, size, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return found == MAP_FAILED ? NULL : found;
}

static void *remember(void *start, size_t size, int on_host) {
  Block *b = malloc(sizeof *b);
  pthread_mutex_lock(&lock);
  *b = (Block){start, size, on_host, blocks};
  blocks = b;
  pthread_mutex_unlock(&lock);
  return start;
}

static Block forget(const void *start) {
  Block gone = {0};
  pthread_mutex_lock(&lock);
  for (Block **at = &blocks; *at; at = &(*at)->next)
    if ((*at)->start == start) {
      Block *b = *at;
      gone = *b;
      *at = b->next;
      free(b);
      break;
    }
  pthread_mutex_unlock(&lock);
  return gone;
}

static int find(const void *p, Block *found) {
  int known = 0;
  pthread_mutex_lock(&lock);
  for (Block *b = blocks; b && !known; b = b->next)
    if ((const char *)p >= b->start && (const char *)p < b->start + b->size) {
      *found = *b;
      known = 1;
    }
  pthread_mutex_unlock(&lock);
  return known;
}

static int on_card(const void *p) {
  Block b;
  return find(p, &b) && !b.on_host;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  Block b;
  memset(a, 0, sizeof *a);
  a->type = cudaMemoryTypeUnregistered;
  if (find(p, &b)) {
    a->type = b.on_host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    a->devicePointer = (void *)p;
    a->hostPointer = b.on_host ? (void *)p : NULL;
  }
  return cudaSuccess;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr p) {
  if (!on_card((void *)p)) return CUDA_ERROR_INVALID_VALUE;
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = p;
  else if (which == CU_POINTER_ATTRIBUTE_CONTEXT) cuCtxGetCurrent(value);
  else if (which == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) *(int *)value = 0;
  else return blank_absent("cuPointerGetAttribute");
  return CUDA_SUCCESS;
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr p) {
  Block b;
  if (!find((void *)p, &b)) return CUDA_ERROR_INVALID_VALUE;
  *base = (CUdeviceptr)b.start;
  *size = b.size;
  return CUDA_SUCCESS;
}

/* --- taking and freeing ---------------------------------------------------------------------------------- */

cudaError_t cudaMalloc(void **p, size_t size) {
  *p = NULL;
  if (!size) return cudaSuccess;
  int error = card_error();
  if (error) return error;
  if (!card_take(size)) return cudaErrorMemoryAllocation;
  void *start = map(size, PROT_READ | PROT_WRITE);
  if (start) *p = remember(start, size, 0);
  else card_give_back(size);
  return start ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFree(void *p) {
  if (!p) return cudaSuccess;
  Block b = forget(p);
  if (!b.start) return cudaErrorInvalidValue;
  munmap(b.start, b.size);
  card_give_back(b.size);
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void **p, size_t size, cudaStream_t s) { return cudaMalloc(p, size); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return cudaFree(p); }

cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) {
  void *start = map(size, PROT_READ | PROT_WRITE);
  if (!start) return cudaErrorMemoryAllocation;
  *p = remember(start, size, 1);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void *p) {
  Block b = forget(p);
  if (b.start) munmap(b.start, b.size);
  return b.start || !p ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaHostRegister(void *p, size_t size, unsigned flags) {
  remember(p, size, 1);
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *p) { return forget(p).start ? cudaSuccess : cudaErrorInvalidValue; }

/* Expandable segments: addresses are reserved, pieces of memory made and put there. */

CUresult cuMemAddressReserve(CUdeviceptr *p, size_t size, size_t alignment, CUdeviceptr wish,
                             unsigned long long flags) {
  void *start = map(size, PROT_NONE);
  if (!start) return CUDA_ERROR_OUT_OF_MEMORY;
  *p = (CUdeviceptr)remember(start, size, 0);
  return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr p, size_t size) {
  forget((void *)p);
  munmap((void *)p, size);
  return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *p,
                     unsigned long long flags) {
  int error = card_error();
  if (error) return error;
  if (!card_take(size)) return CUDA_ERROR_OUT_OF_MEMORY;
  *handle = (CUmemGenericAllocationHandle)size; /* all that its release needs */
  return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  card_give_back((size_t)handle);
  return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr p, size_t size, size_t offset, CUmemGenericAllocationHandle h, unsigned long long flags) {
  return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr p, size_t size) { /* mapped anew, so that what was written there takes no memory */
  mmap((void *)p, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr p, size_t size, const CUmemAccessDesc *access, size_t n) {
  return mprotect((void *)p, size, PROT_READ | PROT_WRITE) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *p,
                                       CUmemAllocationGranularity_flags which) {
  *bytes = 2 << 20;
  return CUDA_SUCCESS;
}

/* --- copies ---------------------------------------------------------------------------------------------- */

/* What a kernel would have written is zeros, or what was copied there before: numbers of tokens, mostly. On the host
 * BLANK_CARD_VALUE, a number in float32, stands for every word that is no normal float32, and 1 for a byte beside
 * words (a bool) that is 0. Without it nothing is changed. */
static void shown(char *at, size_t size) {
  const char *given = getenv("BLANK_CARD_VALUE");
  if (!given) return;
  float value = strtof(given, NULL), found;
  for (size_t i = 0; i + 4 <= size; i += 4) {
    memcpy(&found, at + i, 4);
    if (!isnormal(found)) memcpy(at + i, &value, 4);
  }
  for (size_t i = size & ~(size_t)3; i < size; i++)
    if (!at[i]) at[i] = 1;
}

/* Only what crosses to or from the card is moved: what lies on it is zeros otherwise, and moving them would fill the
 * computer's memory with them. */
static int copy(void *to, const void *from, size_t size) {
  int source = on_card(from), target = on_card(to);
  if (!(source && target)) memcpy(to, from, size);
  if (source && !target) shown(to, size);
  return source && target ? ON_CARD : source ? TO_HOST : TO_CARD;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind k) {
  blank_count(copy(to, from, size), "cudaMemcpy", (long long)size);
  blank_count(WAIT, "cudaMemcpy", 0);
  return card_error();
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind k, cudaStream_t s) {
  Block b;
  int pinned = find(from, &b) && find(to, &b);
  blank_count(copy(to, from, size), "cudaMemcpyAsync", (long long)size);
  if (!pinned) blank_count(WAIT, "cudaMemcpyAsync of memory that is not pinned", 0);
  return card_error();
}

cudaError_t cudaMemset(void *p, int value, size_t size) {
  blank_count(LAUNCH, "memset", (long long)size);
  return card_error();
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t s) { return cudaMemset(p, value, size); }

CUresult cuMemsetD32Async(CUdeviceptr p, unsigned value, size_t n, CUstream s) {
  blank_count(LAUNCH, "memset", 4LL * (long long)n);
  return card_error();
}
