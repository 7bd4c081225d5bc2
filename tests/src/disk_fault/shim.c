/* Preloaded into a controller: one sync fails when a file asks for it, and later ones only seem to succeed.
 *
 *   DISK_FAULT_ASK    while this file exists, the next sync fails with EIO and renames it to ASK.done
 *   DISK_FAULT_FILES  which files are meant: part of the path of write-ahead logs, which end in .log
 *
 * Each sync after that adds a byte to ASK.done and returns success without doing anything. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int is_meant(int fd) {
  const char *files = getenv("DISK_FAULT_FILES");
  char link[64], path[4096];
  if (!files) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return strstr(path, files) && length > 4 && strcmp(path + length - 4, ".log") == 0;
}

static int sync_file(int fd, long call) {
  const char *ask = getenv("DISK_FAULT_ASK");
  char done[4096];
  if (!ask || !is_meant(fd)) return syscall(call, fd);
  snprintf(done, sizeof done, "%s.done", ask);
  int count = open(done, O_WRONLY | O_APPEND | O_CLOEXEC);
  if (count >= 0) {
    ssize_t written = write(count, ".", 1);
    close(count);
    return written == 1 ? 0 : -1;
  }
  if (rename(ask, done) == 0) {
    errno = EIO;
    return -1;
  }
  return syscall(call, fd);
}

int fsync(int fd) { return sync_file(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_file(fd, SYS_fdatasync); }
