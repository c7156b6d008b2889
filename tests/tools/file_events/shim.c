// Preloaded (LD_PRELOAD): counts the calls that change files below one folder, and at the n-th kills the process or fills
// the disk. Whoever preloads it calls file_events_arm; until then every call passes through.
//
// What is not seen: writes through a shared mapping, and those that stdio makes inside glibc.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static size_t length;
static long at;
static int fills;
static atomic_long count;

// Events from now on, below `below` (resolved, without a slash at its end). At event `event`, from 1: SIGKILL, or with
// `full` this call and all later ones that take space fail with ENOSPC.
void file_events_arm(const char* below, long event, int full) {
  length = strlen(below);
  memcpy(folder, below, length + 1);
  at = event;
  fills = full;
  count = 0;
}

long file_events_count(void) { return count; }

static int is_below(const char* path) {
  return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int fd_is_below(int fd) {
  char link[40], path[PATH_MAX];
  if (!length) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return is_below(path);
}

static int path_is_below(int dirfd, const char* path) {
  char here[PATH_MAX];
  if (!length || !path) return 0;
  if (*path == '/') return is_below(path);
  return dirfd == AT_FDCWD ? getcwd(here, sizeof here) && is_below(here) : fd_is_below(dirfd);
}

enum Outcome { PASS, FAIL, HALF };
enum Kind { FREES, TAKES, MOVES };  // space: a name that moves may need some, but what puts it back does not

// What becomes of a call that changes a file below the folder.
static enum Outcome event(int below, enum Kind kind) {
  if (!below) return PASS;
  const long now = ++count;
  if (!fills && now == at) kill(getpid(), SIGKILL);
  const int fails = fills && ((kind == MOVES && now == at) || (kind == TAKES && now >= at));
  if (fails) errno = ENOSPC;
  return fails ? FAIL : PASS;
}

// A kill leaves half of what was written.
static enum Outcome write_event(int fd) {
  if (!fd_is_below(fd)) return PASS;
  if (fills || count + 1 != at) return event(1, TAKES);
  ++count;
  return HALF;
}

#define REAL(type, name, ...)       \
  static type (*real)(__VA_ARGS__); \
  if (!real) real = dlsym(RTLD_NEXT, #name)

static int opens(int dirfd, const char* path, int flags) {
  if (!(flags & (O_CREAT | O_TRUNC)) || !path_is_below(dirfd, path)) return PASS;
  const int is_new = faccessat(dirfd, path, F_OK, 0) != 0;
  return event(1, is_new ? TAKES : FREES);
}

#define MODE                                                                    \
  va_list list;                                                                 \
  va_start(list, flags);                                                        \
  const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; \
  va_end(list)

#define OPEN(name)                                                      \
  int name(const char* path, int flags, ...) {                          \
    REAL(int, name, const char*, int, ...);                             \
    MODE;                                                               \
    return opens(AT_FDCWD, path, flags) ? -1 : real(path, flags, mode); \
  }
#define OPENAT(name)                                                        \
  int name(int dirfd, const char* path, int flags, ...) {                   \
    REAL(int, name, int, const char*, int, ...);                            \
    MODE;                                                                   \
    return opens(dirfd, path, flags) ? -1 : real(dirfd, path, flags, mode); \
  }
#define FOPEN(name)                                                                   \
  FILE* name(const char* path, const char* how) {                                     \
    REAL(FILE*, name, const char*, const char*);                                      \
    return opens(AT_FDCWD, path, *how == 'r' ? 0 : O_CREAT) ? NULL : real(path, how); \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FOPEN(fopen)
FOPEN(fopen64)

static void die(void) { kill(getpid(), SIGKILL); }

ssize_t write(int fd, const void* data, size_t size) {
  REAL(ssize_t, write, int, const void*, size_t);
  const enum Outcome what = write_event(fd);
  if (what == HALF && real(fd, data, size / 2) >= -1) die();
  return what == FAIL ? -1 : real(fd, data, size);
}

#define PWRITE(name, offset_type)                                           \
  ssize_t name(int fd, const void* data, size_t size, offset_type offset) { \
    REAL(ssize_t, name, int, const void*, size_t, offset_type);             \
    const enum Outcome what = write_event(fd);                              \
    if (what == HALF && real(fd, data, size / 2, offset) >= -1) die();      \
    return what == FAIL ? -1 : real(fd, data, size, offset);                \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec* parts, int number) {
  REAL(ssize_t, writev, int, const struct iovec*, int);
  const enum Outcome what = write_event(fd);
  if (what == HALF && real(fd, parts, number / 2) >= -1) die();
  return what == FAIL ? -1 : real(fd, parts, number);
}

// The rest pass, fail or are killed before they do anything.
#define CALL(type, name, condition, kind, parameters, ...)  \
  type name parameters {                                    \
    static type(*real) parameters;                          \
    if (!real) real = dlsym(RTLD_NEXT, #name);              \
    return event(condition, kind) ? -1 : real(__VA_ARGS__); \
  }
#define SIZED(name, size) CALL(int, name, fd_is_below(fd), TAKES, (int fd, size bytes), fd, bytes)
SIZED(ftruncate, off_t)
SIZED(ftruncate64, off64_t)
CALL(int, posix_fallocate, fd_is_below(fd), TAKES, (int fd, off_t from, off_t size), fd, from, size)
CALL(int, fallocate, fd_is_below(fd), TAKES, (int fd, int mode, off_t from, off_t size), fd, mode, from, size)
CALL(int, fsync, fd_is_below(fd), TAKES, (int fd), fd)
CALL(int, fdatasync, fd_is_below(fd), TAKES, (int fd), fd)
CALL(int, mkdir, path_is_below(AT_FDCWD, path), TAKES, (const char* path, mode_t mode), path, mode)
CALL(int, mkdirat, path_is_below(dir, path), TAKES, (int dir, const char* path, mode_t mode), dir, path, mode)
CALL(int, symlink, path_is_below(AT_FDCWD, path), TAKES, (const char* to, const char* path), to, path)
CALL(int, link, path_is_below(AT_FDCWD, path), TAKES, (const char* from, const char* path), from, path)
CALL(int, rename, path_is_below(AT_FDCWD, to), MOVES, (const char* from, const char* to), from, to)
CALL(int, renameat, path_is_below(there, to), MOVES, (int here, const char* from, int there, const char* to),
     here, from, there, to)
CALL(int, renameat2, path_is_below(there, to), MOVES,
     (int here, const char* from, int there, const char* to, unsigned flags), here, from, there, to, flags)
CALL(int, unlink, path_is_below(AT_FDCWD, path), FREES, (const char* path), path)
CALL(int, unlinkat, path_is_below(dir, path), FREES, (int dir, const char* path, int flags), dir, path, flags)
CALL(int, remove, path_is_below(AT_FDCWD, path), FREES, (const char* path), path)
CALL(int, rmdir, path_is_below(AT_FDCWD, path), FREES, (const char* path), path)
CALL(int, chmod, path_is_below(AT_FDCWD, path), FREES, (const char* path, mode_t mode), path, mode)
CALL(int, fchmod, fd_is_below(fd), FREES, (int fd, mode_t mode), fd, mode)
CALL(int, fchmodat, path_is_below(dir, path), FREES, (int dir, const char* path, mode_t mode, int flags), dir,
     path, mode, flags)
CALL(ssize_t, sendfile, fd_is_below(out), TAKES, (int out, int in, off_t* from, size_t size), out, in, from,
     size)
CALL(ssize_t, sendfile64, fd_is_below(out), TAKES, (int out, int in, off64_t* from, size_t size), out, in,
     from, size)
CALL(ssize_t, copy_file_range, fd_is_below(out), TAKES,
     (int in, off64_t* from, int out, off64_t* to, size_t size, unsigned flags), in, from, out, to, size,
     flags)
