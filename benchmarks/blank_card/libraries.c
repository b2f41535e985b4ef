/* cuBLAS, as much as PyTorch asks for. Products themselves are generated, one counting function a name. */
#include "card.h"

#include <stdlib.h>
#include <string.h>

/* --- cuBLAS: handles are blocks that nobody reads ----------------------------------------------------------------- */

static int made(void **handle) {
  *handle = malloc(64);
  return 0;
}
static int freed(void *handle) {
  free(handle);
  return 0;
}
static int zero(int *value) {
  *value = 0;
  return 0;
}

int cublasCreate_v2(void **handle) { return made(handle); }
int cublasDestroy_v2(void *handle) { return freed(handle); }
int cublasGetPointerMode_v2(void *handle, int *mode) { return zero(mode); }
int cublasSetPointerMode_v2(void *handle, int mode) { return 0; }
int cublasGetMathMode(void *handle, int *mode) { return zero(mode); }
int cublasSetMathMode(void *handle, int mode) { return 0; }
int cublasSetStream_v2(void *handle, void *stream) { return 0; }
int cublasSetWorkspace_v2(void *handle, void *workspace, size_t size) { return 0; }
int cublasSetSmCountTarget(void *handle, int n) { return 0; }

size_t cublasLtGetVersion(void) { return 10 * CUDART_VERSION + 101; }
int cublasLtMatmulDescCreate(void **d, int compute, int scale) { return made(d); }
int cublasLtMatmulDescDestroy(void *d) { return freed(d); }
int cublasLtMatmulDescSetAttribute(void *d, int which, const void *value, size_t size) { return 0; }
int cublasLtMatrixLayoutCreate(void **l, int type, unsigned long long rows, unsigned long long columns,
                               long long lead) {
  return made(l);
}
int cublasLtMatrixLayoutDestroy(void *l) { return freed(l); }
int cublasLtMatrixLayoutSetAttribute(void *l, int which, const void *value, size_t size) { return 0; }
int cublasLtMatmulPreferenceCreate(void **p) { return made(p); }
int cublasLtMatmulPreferenceDestroy(void *p) { return freed(p); }
int cublasLtMatmulPreferenceSetAttribute(void *p, int which, const void *value, size_t size) { return 0; }

/* cublasLtMatmulHeuristicResult_t: the algorithm (64 bytes), its workspace (8), state (4), waves (4), reserved (16). */
enum { HEURISTIC = 96 };

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, char *found, int *n) {
  memset(found, 0, HEURISTIC); /* one that succeeds and wants no workspace */
  *n = 1;
  return 0;
}
