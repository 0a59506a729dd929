/* Preloaded into a process, records in order what it does to files below $RECORD_UNDER: see test_power_loss.py.

   A record in $RECORD_TO is a header, the path, and the data: W write, T truncate (offset: new size), S sync, C create,
   U unlink, D make folder, R rename (data: the new path). The test's own marks are M. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

struct header {
    uint64_t offset;
    uint32_t path_bytes, data_bytes;
    uint64_t kind;
};

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void record(char kind, const char *path, uint64_t offset, const void *data, size_t bytes) {
    static int file = -1;
    const char *under = getenv("RECORD_UNDER"), *to = getenv("RECORD_TO");
    if (!under || !to || strncmp(path, under, strlen(under)) != 0)
        return;
    if (file < 0)
        file = REAL(open)(to, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    struct header header = {offset, strlen(path), bytes, kind};
    struct iovec parts[] = {{&header, sizeof header}, {(void *)path, header.path_bytes}, {(void *)data, bytes}};
    if (writev(file, parts, 3) < 0)
        abort();
}

static void record_file(char kind, int file, uint64_t offset, const void *data, size_t bytes) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length > 0) {
        path[length] = 0;
        record(kind, path, offset, data, bytes);
    }
}

#define WRITE(name, position)                                                     \
    ssize_t name(int file, const void *data, size_t bytes, position offset) {     \
        ssize_t done = REAL(name)(file, data, bytes, offset);                     \
        if (done > 0)                                                             \
            record_file('W', file, offset, data, done);                           \
        return done;                                                              \
    }
WRITE(pwrite, off_t)
WRITE(pwrite64, off64_t)

ssize_t write(int file, const void *data, size_t bytes) {
    off_t offset = lseek(file, 0, SEEK_CUR);
    ssize_t done = REAL(write)(file, data, bytes);
    if (done > 0 && offset >= 0)
        record_file('W', file, offset, data, done);
    return done;
}

#define TRUNCATE(name, position)               \
    int name(int file, position size) {        \
        int failed = REAL(name)(file, size);   \
        if (!failed)                           \
            record_file('T', file, size, 0, 0); \
        return failed;                         \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define SYNC(name)                          \
    int name(int file) {                    \
        int failed = REAL(name)(file);      \
        if (!failed)                        \
            record_file('S', file, 0, 0, 0); \
        return failed;                      \
    }
SYNC(fsync)
SYNC(fdatasync)

#define OPEN(name)                                                  \
    int name(const char *path, int flags, ...) {                    \
        va_list rest;                                               \
        va_start(rest, flags);                                      \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;   \
        va_end(rest);                                               \
        int is_new = flags & O_CREAT && access(path, F_OK) != 0;    \
        int file = REAL(name)(path, flags, mode);                   \
        if (file >= 0 && is_new)                                    \
            record('C', path, 0, 0, 0);                             \
        return file;                                                \
    }
OPEN(open)
OPEN(open64)

int unlink(const char *path) {
    int failed = REAL(unlink)(path);
    if (!failed)
        record('U', path, 0, 0, 0);
    return failed;
}

int mkdir(const char *path, mode_t mode) {
    int failed = REAL(mkdir)(path, mode);
    if (!failed)
        record('D', path, 0, 0, 0);
    return failed;
}

int rename(const char *from, const char *to) {
    int failed = REAL(rename)(from, to);
    if (!failed)
        record('R', from, 0, to, strlen(to));
    return failed;
}
