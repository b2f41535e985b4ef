/* What the parts of the blank card share. `__init__.py` says what it is and is not. */
#ifndef BLANK_CARD_H
#define BLANK_CARD_H

#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stddef.h>

/* --- counting.c: what card it is, and what was asked of it -------------------------------------------- */

/* The names of these kinds stand in `__init__.py` in the same order. */
enum { LAUNCH, INVALID, PRODUCT, WAIT, TO_HOST, TO_CARD, ON_CARD, BINARY, ABSENT };

void blank_count(int kind, const char *name, long long bytes);
int blank_product(const char *name); /* one of cuBLAS; returns success */
int blank_absent(const char *name);  /* notes a call of what is not stood in for; returns "not supported" */

#define CARD_UUID "GPU-74686520-626c-616e-6b20-636172642020" /* "the blank card  " */

const char *card_name(void);
size_t card_memory(void);  /* bytes, as sold */
size_t card_context(void); /* bytes that the driver's own context takes of it */
unsigned card_share(void); /* percent of the card's time that this process is said to use */
int card_capability(void); /* 90 for sm_90 */
int card_shared(void);     /* bytes of shared memory that one block can have */
int card_attribute(int which);

/* --- sharing.c: how much of it is taken, and by whom ------------------------------------------------------ */

enum { CARD_USERS = 64 }; /* at most */
typedef struct {
  unsigned pid, share; /* percent of the card's time, as NVML tells it */
  size_t bytes;
} User;

void card_open(void); /* this process has a context from now on */
int card_take(size_t bytes); /* whether there was room */
void card_give_back(size_t bytes);
size_t card_free(void); /* bytes that nobody has */
int card_users(User *users); /* how many there are now; `users` has room for CARD_USERS */

/* What befell the card since; the numbers stand in `tests/blank_sharing.py`. */
enum { FINE, LOST, REMOVED, UNTOLD, MISMATCH };
typedef struct {
  unsigned state;
  unsigned failures; /* how often all that was on it was ended, as by an Xid 13 */
} Fate;

unsigned card_state(void);
int card_error(void); /* what a call of this process returns for it; the runtime's and the driver's number, 0 for none */

#endif
