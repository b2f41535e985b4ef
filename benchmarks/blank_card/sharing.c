/* How much of the card is taken, by this process and, where they are told of one another, by others.
 *
 * BLANK_CARD_SHARED names a file that has a row for each process on the card. A process has a lock on the
 * byte of its own number as long as it lives: so what it had is free when it is killed, and whoever looks learns its
 * process id, as his own namespace counts. */
#include "card.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SIZE = CARD_USERS * sizeof(User) };

static User alone[CARD_USERS], *table = alone;
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
}

static int others(User *users) {
  int n = 0;
  for (int i = 0; i < CARD_USERS && file >= 0; i++) {
    struct flock want = place(i);
    if (i == mine || fcntl(file, F_GETLK, &want) || want.l_type == F_UNLCK) continue;
    users[n] = table[i];
    users[n++].pid = (unsigned)want.l_pid;
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

void card_give_back(size_t size) {
  pthread_mutex_lock(&lock);
  table[mine].bytes -= size;
  pthread_mutex_unlock(&lock);
}
