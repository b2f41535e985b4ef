/* NVML, as much as PyTorch and this project ask for: what the card is, who is on it, and that it is cool and idle. */
#include "card.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

enum { DONE = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, IS_LOST = 15, OTHER_VERSION = 18, UNKNOWN = 999 };

/* Why nothing at all is told. */
static int silent(void) {
  unsigned state = card_state();
  return state == UNTOLD ? UNKNOWN : state == MISMATCH ? OTHER_VERSION : DONE;
}

/* A card that has fallen off the bus is counted and does not answer; one that was taken out is not there. */
static char the_card;
static int here(void **device) {
  unsigned state = card_state();
  *device = &the_card;
  return silent() ? silent() : state == LOST ? IS_LOST : state == REMOVED ? NOT_FOUND : DONE;
}
static int told(unsigned *value, unsigned what) {
  *value = what;
  return DONE;
}
static int text(char *to, unsigned size, const char *what) {
  snprintf(to, size, "%s", what);
  return DONE;
}

int nvmlInit_v2(void) { return silent(); }
int nvmlInitWithFlags(unsigned flags) { return silent(); }
int nvmlShutdown(void) { return DONE; }
const char *nvmlErrorString(int error) {
  switch (error) {
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case IS_LOST: return "GPU is lost";
    case OTHER_VERSION: return "Driver/library version mismatch";
    case UNKNOWN: return "Unknown Error";
    default: return "an error of the blank card";
  }
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) { return told((unsigned *)version, CUDART_VERSION); }
int nvmlSystemGetDriverVersion(char *to, unsigned size) {
  return text(to, size, CUDART_VERSION >= 13000 ? "580.65.06" : "560.28.03"); /* of CUDA 13.0 and 12.6 */
}

/* --- which card -------------------------------------------------------------------------------------------- */

int nvmlDeviceGetCount_v2(unsigned *n) {
  told(n, card_state() != REMOVED);
  return silent();
}
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **device) { return i ? 2 : here(device); }
int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **device) { return here(device); }
int nvmlDeviceGetHandleByUUID(const char *id, void **device) { return strcmp(id, CARD_UUID) ? 6 : here(device); }
int nvmlDeviceGetName(void *device, char *to, unsigned size) { return text(to, size, card_name()); }
int nvmlDeviceGetUUID(void *device, char *to, unsigned size) { return text(to, size, CARD_UUID); }
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
  *major = card_capability() / 10;
  *minor = card_capability() % 10;
  return DONE;
}
int nvmlDeviceGetDisplayActive(void *device, unsigned *active) { return told(active, 0); }
int nvmlDeviceGetMigMode(void *device, unsigned *now, unsigned *then) { return NOT_SUPPORTED; }
int nvmlDeviceGetGpuFabricInfoV(void *device, void *info) { return NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemoteDeviceType(void *device, unsigned link, int *type) { return NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *device, unsigned link, void *pci) { return NOT_SUPPORTED; }
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *energy) { return NOT_SUPPORTED; }

/* --- who is on it ---------------------------------------------------------------------------------------------- */

int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *total_free_used) {
  total_free_used[0] = card_memory();
  total_free_used[1] = card_free();
  total_free_used[2] = total_free_used[0] - total_free_used[1];
  return DONE;
}

typedef struct { unsigned pid; unsigned long long bytes; unsigned instance, part; } Process;

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *n, Process *found) {
  User users[CARD_USERS];
  unsigned room = *n;
  *n = (unsigned)card_users(users);
  for (unsigned i = 0; i < *n && i < room; i++) found[i] = (Process){users[i].pid, users[i].bytes, ~0u, ~0u};
  return *n > room ? TOO_SMALL : DONE;
}

int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *n, void *found) { /* PyTorch's, for an error's text */
  *n = 0;
  return DONE;
}

/* Nothing is run, so how busy each keeps the card is what it is said to. */
typedef struct { unsigned pid; unsigned long long at; unsigned share, memory, encoder, decoder; } Sample;

int nvmlDeviceGetProcessUtilization(void *device, Sample *found, unsigned *n, unsigned long long since) {
  User users[CARD_USERS];
  unsigned room = found ? *n : 0;
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  unsigned long long at = 1000000ULL * (unsigned long long)now.tv_sec + (unsigned long long)now.tv_nsec / 1000;
  *n = (unsigned)card_users(users);
  for (unsigned i = 0; i < *n && i < room; i++) found[i] = (Sample){users[i].pid, at, users[i].share, 0, 0, 0};
  return !found || *n > room ? TOO_SMALL : DONE;
}

int nvmlDeviceGetUtilizationRates(void *device, unsigned *card_and_memory) {
  User users[CARD_USERS];
  unsigned share = 0;
  for (int i = card_users(users); i--;) share += users[i].share;
  card_and_memory[0] = share > 100 ? 100 : share;
  return told(card_and_memory + 1, 0);
}

/* --- how it is ------------------------------------------------------------------------------------------------- */

int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *milliwatts) { return told(milliwatts, 300000); }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons) {
  *reasons = 0;
  return DONE;
}
int nvmlDeviceGetClockInfo(void *device, int which, unsigned *mhz) { return told(mhz, 1980); }
int nvmlDeviceGetMaxClockInfo(void *device, int which, unsigned *mhz) { return told(mhz, 1980); }
int nvmlDeviceGetTemperature(void *device, int which, unsigned *celsius) { return told(celsius, 40); }
