/* Preloaded into a process: the nth file operation beneath a folder fails, whichever library makes it.

   failing_disk(folder, nth, number) arms it; nth 0 only counts. failing_disk_count() gives the operations so far. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[PATH_MAX] = "";
static int nth = 0, number = 0, count = 0, hit = 0;
static char operation[64] = "";

void failing_disk(const char *where, int which, int with) {
    strncpy(folder, where, sizeof folder - 1);
    nth = which, number = with, count = 0, hit = 0;
}
int failing_disk_count(void) { return count; }
const char *failing_disk_operation(void) { return operation; }

static int fails(const char *what, const char *path) {
    if (!folder[0] || !path || strncmp(path, folder, strlen(folder))) return 0;
    if (++count != nth) return 0;
    strncpy(operation, what, sizeof operation - 1);
    errno = number;
    return 1;
}
static int fails_at(const char *what, int at, const char *name) {
    char link[64], full[2 * PATH_MAX] = "";
    ssize_t length = 0;
    if (name && name[0] == '/') return fails(what, name);
    if (at == AT_FDCWD) {
        if (!getcwd(full, PATH_MAX)) return 0;
        length = strlen(full);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        length = readlink(link, full, PATH_MAX);
        if (length <= 0) return 0;
        full[length] = 0;
    }
    if (name) snprintf(full + length, sizeof full - length, "/%s", name);
    return fails(what, full);
}
#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))
#define WRITES(flags) ((flags) & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC))
#define OPEN(name)                                                                         \
    int name(const char *path, int flags, ...) {                                           \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (WRITES(flags) && fails_at("open", AT_FDCWD, path)) return -1;                   \
        return REAL(int, #name, const char *, int, mode_t)(path, flags, mode);              \
    }
#define OPENAT(name)                                                                       \
    int name(int at, const char *path, int flags, ...) {                                   \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (WRITES(flags) && fails_at("open", at, path)) return -1;                         \
        return REAL(int, #name, int, const char *, int, mode_t)(at, path, flags, mode);     \
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)
ssize_t write(int file, const void *data, size_t size) {
    if (fails_at("write", file, NULL)) return -1;
    return REAL(ssize_t, "write", int, const void *, size_t)(file, data, size);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    if (fails_at("write", file, NULL)) return -1;
    return REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t)(file, data, size, at);
}
int ftruncate64(int file, off64_t size) {
    if (fails_at("ftruncate", file, NULL)) return -1;
    return REAL(int, "ftruncate64", int, off64_t)(file, size);
}
int fsync(int file) {
    if (fails_at("fsync", file, NULL)) return -1;
    return REAL(int, "fsync", int)(file);
}
int mkdir(const char *path, mode_t mode) {
    if (fails_at("mkdir", AT_FDCWD, path)) return -1;
    return REAL(int, "mkdir", const char *, mode_t)(path, mode);
}
int rename(const char *from, const char *to) {
    if (fails_at("rename", AT_FDCWD, to)) return -1;
    return REAL(int, "rename", const char *, const char *)(from, to);
}
int unlink(const char *path) {
    if (fails_at("unlink", AT_FDCWD, path)) return -1;
    return REAL(int, "unlink", const char *)(path);
}
int unlinkat(int at, const char *path, int flags) {
    if (fails_at(flags & AT_REMOVEDIR ? "rmdir" : "unlink", at, path)) return -1;
    return REAL(int, "unlinkat", int, const char *, int)(at, path, flags);
}
int rmdir(const char *path) {
    if (fails_at("rmdir", AT_FDCWD, path)) return -1;
    return REAL(int, "rmdir", const char *)(path);
}
