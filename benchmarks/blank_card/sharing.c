/* How much of the card is taken, by this process and, where they are told of one another, by others; and what befell it.
 *
 * BLANK_CARD_SHARED names a file that has a row for each process on the card. A process has a lock on the
 * byte of its own number as long as it lives: so what it had is free when it is killed, and whoever looks learns its
 * process id, as his own namespace counts.
 * Behind the rows stands the card's fate. `tests/blank_sharing.py` writes both from outside. */
#include "card.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { ROWS = CARD_USERS * sizeof(User), SIZE = ROWS + sizeof(Fate) };

static User alone[CARD_USERS], *table = alone;
static Fate fine, *fate = &fine;
static unsigned failures; /* that were before this process had a context */
static int file = -1, mine = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void look(void) {
  const char *path = getenv("BLANK_CARD_SHARED");
  if (file >= 0 || !path || !*path) return;
  int opened = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (opened < 0) abort(); /* whoever names a file wants it; the card would seem empty */
  if (ftruncate(opened, SIZE)) abort();
  void *found = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, opened, 0);
  if (found == MAP_FAILED) abort();
  table = found;
  fate = (Fate *)((char *)found + ROWS);
  file = opened;
}

static struct flock place(int i) {
  return (struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = i, .l_len = 1};
}

/* The context of this process is on the card from now on. */
static void join(void) {
  look();
  for (int i = 0; i < CARD_USERS && mine < 0; i++) {
    struct flock want = place(i);
    if (file >= 0 && fcntl(file, F_SETLK, &want)) continue;
    table[i] = (User){0, card_share(), card_context()};
    mine = i;
  }
  if (mine < 0) abort();
  failures = fate->failures;
}

/* What a process that stands still had sent to the card is done: here everything is as soon as it is asked for. */
static int stopped(unsigned pid) {
  char place[32], line[512];
  snprintf(place, sizeof place, "/proc/%u/stat", pid);
  FILE *opened = fopen(place, "r");
  if (!opened) return 0;
  char *behind = fgets(line, sizeof line, opened) ? strrchr(line, ')') : NULL; /* a program's name may hold anything */
  fclose(opened);
  return behind && (behind[2] == 'T' || behind[2] == 't');
}

static int others(User *users) {
  int n = 0;
  for (int i = 0; i < CARD_USERS && file >= 0; i++) {
    struct flock want = place(i);
    if (i == mine || fcntl(file, F_GETLK, &want) || want.l_type == F_UNLCK) continue;
    users[n] = table[i];
    users[n].pid = (unsigned)want.l_pid;
    if (stopped(users[n].pid)) users[n].share = 0;
    n++;
  }
  return n;
}

int card_users(User *users) {
  pthread_mutex_lock(&lock);
  look();
  int n = others(users);
  if (mine >= 0) {
    users[n] = table[mine];
    users[n++].pid = (unsigned)getpid();
  }
  pthread_mutex_unlock(&lock);
  return n;
}

size_t card_free(void) {
  User users[CARD_USERS];
  size_t taken = 0;
  for (int i = card_users(users); i--;) taken += users[i].bytes;
  return taken < card_memory() ? card_memory() - taken : 0;
}

void card_open(void) {
  pthread_mutex_lock(&lock);
  if (mine < 0) join();
  pthread_mutex_unlock(&lock);
}

int card_take(size_t size) {
  card_open();
  int fits = size <= card_free();
  pthread_mutex_lock(&lock);
  if (fits) table[mine].bytes += size;
  pthread_mutex_unlock(&lock);
  return fits;
}

unsigned card_state(void) {
  pthread_mutex_lock(&lock);
  look();
  pthread_mutex_unlock(&lock);
  return fate->state;
}

int card_error(void) {
  unsigned state = card_state();
  int away = state == LOST || state == REMOVED;
  if (mine < 0) return away ? cudaErrorNoDevice : state == MISMATCH ? cudaErrorSystemDriverMismatch : cudaSuccess;
  return away ? cudaErrorUnknown : failures != fate->failures ? cudaErrorLaunchFailure : cudaSuccess;
}

void card_give_back(size_t size) {
  pthread_mutex_lock(&lock);
  table[mine].bytes -= size;
  pthread_mutex_unlock(&lock);
}
