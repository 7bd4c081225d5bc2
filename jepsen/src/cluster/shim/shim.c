/* Preloaded into a controller: stands between it and its disk and clocks, and does what a page of memory says.
 *
 *   TREFOIL_SHIM         a file of 4096 bytes: the page; shim.rs has the meaning of its 64-bit numbers
 *   TREFOIL_SHIM_DATA    files below this folder are the controller's disk
 *   TREFOIL_SHIM_SYNCED  where every sync that succeeded is written down: inode, its birth, how many bytes it covers
 *
 * The Raft log's syncs are those of files that end in .log below DATA/raft-log. Only what the controller itself asks
 * of the C library passes here, and RocksDB inside it; that is all there is. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { PASS, FAIL_ONCE, PRETEND, SLOW };

/* Offset in nanoseconds; how much faster it goes, in millionths, since BASE. */
struct clock { int64_t offset, ppm, base; };

static struct page {
  int64_t current;          /* which of the two sets of clocks counts: a change is whole or not there */
  struct clock clocks[2][2]; /* each: wall clock; monotonic clocks */
  int64_t sync_mode, sync_micros, failed, pretended, slowed;
  int64_t full, refused;
  int64_t readings;
} *page;
static int synced = -1;
static const char *data;

__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("TREFOIL_SHIM"), *list = getenv("TREFOIL_SHIM_SYNCED");
  data = getenv("TREFOIL_SHIM_DATA");
  int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
  if (fd < 0) return;
  void *memory = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (memory == MAP_FAILED) return;
  page = memory;
  if (list) synced = open(list, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
}

static void count(int64_t *counter) { __atomic_add_fetch(counter, 1, __ATOMIC_RELAXED); }

/* The path of an open file if it is on the controller's disk. */
static int on_disk(int fd, char *path, size_t room) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, room - 1);
  if (length < 0 || !data) return 0;
  path[length] = 0;
  return strncmp(path, data, strlen(data)) == 0 && path[strlen(data)] == '/';
}

static int is_log(int fd) {
  char path[4096];
  if (!on_disk(fd, path, sizeof path) || !strstr(path, "/raft-log/")) return 0;
  size_t length = strlen(path);
  return length > 4 && strcmp(path + length - 4, ".log") == 0;
}

/* What was there before the sync began is what it covers. */
static int really(int fd, long call) {
  struct statx file;
  int known = synced >= 0 && statx(fd, "", AT_EMPTY_PATH, STATX_INO | STATX_BTIME | STATX_SIZE, &file) == 0;
  int result = syscall(call, fd);
  if (result == 0 && known) {
    char line[128];
    int length = snprintf(line, sizeof line, "%llu %lld.%09u %llu\n", (unsigned long long)file.stx_ino,
                          (long long)file.stx_btime.tv_sec, file.stx_btime.tv_nsec, (unsigned long long)file.stx_size);
    if (syscall(SYS_write, synced, line, length) != length) abort();
  }
  return result;
}

static int sync_file(int fd, long call) {
  int64_t fail_once = FAIL_ONCE;
  if (!page || page->sync_mode == PASS || !is_log(fd)) return really(fd, call);
  if (__atomic_compare_exchange_n(&page->sync_mode, &fail_once, PRETEND, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    count(&page->failed);
    errno = EIO;
    return -1;
  }
  if (page->sync_mode == PRETEND) {
    count(&page->pretended);
    return 0;
  }
  if (page->sync_mode == SLOW) {
    count(&page->slowed);
    usleep(page->sync_micros);
  }
  return really(fd, call);
}

int fsync(int fd) { return sync_file(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_file(fd, SYS_fdatasync); }

static int takes_nothing(int fd) {
  char path[4096];
  if (!page || !page->full || !on_disk(fd, path, sizeof path)) return 0;
  /* The database's diary, its file LOG, is refused too; that nobody stops for it is no matter. */
  if (strcmp(strrchr(path, '/'), "/LOG")) count(&page->refused);
  errno = ENOSPC;
  return 1;
}

ssize_t write(int fd, const void *bytes, size_t length) {
  return takes_nothing(fd) ? -1 : syscall(SYS_write, fd, bytes, length);
}
ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t at) {
  return takes_nothing(fd) ? -1 : syscall(SYS_pwrite64, fd, bytes, length, at);
}
ssize_t pwrite(int fd, const void *bytes, size_t length, off_t at) { return pwrite64(fd, bytes, length, at); }

int clock_gettime(clockid_t id, struct timespec *now) {
  int result = syscall(SYS_clock_gettime, id, now), which;
  if (result || !page) return result;
  switch (id) {
    case CLOCK_REALTIME: case CLOCK_REALTIME_COARSE: which = 0; break;
    case CLOCK_MONOTONIC: case CLOCK_MONOTONIC_RAW: case CLOCK_MONOTONIC_COARSE: case CLOCK_BOOTTIME: which = 1; break;
    default: return 0;
  }
  struct clock clock = page->clocks[__atomic_load_n(&page->current, __ATOMIC_SEQ_CST) & 1][which];
  if (clock.offset || clock.ppm) {
    int64_t time = now->tv_sec * 1000000000LL + now->tv_nsec;
    time += clock.offset + (int64_t)((__int128)(time - clock.base) * clock.ppm / 1000000);
    now->tv_sec = time / 1000000000;
    now->tv_nsec = time % 1000000000;
    count(&page->readings);
  }
  return 0;
}

int gettimeofday(struct timeval *now, void *zone) {
  struct timespec time;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &time);
  now->tv_sec = time.tv_sec;
  now->tv_usec = time.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
