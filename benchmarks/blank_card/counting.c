/* What card it is, and what was asked of it: by kind and name, how often and how many bytes. */
#include "card.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* --- what card it is: from the environment, so that a child's parent decides --------------------------- */

static long long number(const char *name, long long otherwise) {
  const char *given = getenv(name);
  return given && *given ? atoll(given) : otherwise;
}

const char *card_name(void) {
  const char *given = getenv("BLANK_CARD_NAME");
  return given ? given : "blank card";
}

size_t card_memory(void) {
  static size_t bytes; /* asked for with each allocation */
  if (!bytes) bytes = (size_t)number("BLANK_CARD_BYTES", 80LL << 30);
  return bytes;
}

size_t card_context(void) { return (size_t)number("BLANK_CARD_CONTEXT", 0); }

unsigned card_share(void) { return (unsigned)number("BLANK_CARD_SHARE", 30); }

int card_capability(void) { return (int)number("BLANK_CARD_CAPABILITY", 90); }

/* Table "Technical Specifications per Compute Capability" of the CUDA programming guide: KiB of a processor. */
static int shared_of_processor(void) {
  switch (card_capability()) {
    case 75: return 64;
    case 80: return 164;
    case 86: case 89: case 120: return 100;
    default: return 228;
  }
}

int card_shared(void) { return 1024 * (card_capability() == 75 ? 64 : shared_of_processor() - 1); }

static int threads_of_processor(void) {
  switch (card_capability()) {
    case 75: return 1024;
    case 86: case 89: case 120: return 1536;
    default: return 2048;
  }
}

/* Clocks, bus and cache are an H100's whatever the card: they steer heuristics and nothing is timed here. */
int card_attribute(int which) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return card_capability() / 10;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return card_capability() % 10;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return (int)number("BLANK_CARD_PROCESSORS", 132);
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return threads_of_processor();
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 48 * 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return card_shared();
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return 1024 * shared_of_processor();
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1980000;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 2619000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 5120;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return 50 << 20;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: return 1;
    default: return 0;
  }
}

/* --- what was asked of it ------------------------------------------------------------------------------ */

#define ROWS 8192 /* more kinds and names than any program has; what is beyond is not counted */
static struct { int kind; const char *name; long times; long long bytes; } rows[ROWS];
static int used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void blank_count(int kind, const char *name, long long bytes) {
  pthread_mutex_lock(&lock);
  int i = 0;
  while (i < used && !(rows[i].kind == kind && !strcmp(rows[i].name, name))) i++;
  if (i == used && used < ROWS) {
    rows[used].kind = kind;
    rows[used++].name = strdup(name);
  }
  if (i < ROWS) {
    rows[i].times++;
    rows[i].bytes += bytes;
  }
  pthread_mutex_unlock(&lock);
}

enum { EXECUTION_FAILED = 13 }; /* of cublasStatus_t */

int blank_product(const char *name) {
  blank_count(PRODUCT, name, 0);
  return card_error() ? EXECUTION_FAILED : 0;
}

int blank_absent(const char *name) {
  blank_count(ABSENT, name, 0);
  return cudaErrorNotSupported; /* CUDA_ERROR_NOT_SUPPORTED has the same number */
}

/* Read by Python. */
int blank_rows(void) { return used; }
int blank_kind(int i) { return rows[i].kind; }
const char *blank_name(int i) { return rows[i].name; }
long blank_times(int i) { return rows[i].times; }
long long blank_bytes(int i) { return rows[i].bytes; }

void blank_reset(void) {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < used; i++) rows[i].times = rows[i].bytes = 0;
  pthread_mutex_unlock(&lock);
}
