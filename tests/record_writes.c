/* Preloaded into a process, records in order what it does to files below $RECORD_UNDER: see test_power_loss.py.

   A record in $RECORD_TO is a header, the path, and the data: W write, T truncate (offset: new size), S sync, C create,
   U unlink, D make folder, R rename, L link (data: the new path). The test's own marks are M. */

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

static int path_of(int file, char path[4096]) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, 4095);
    path[length > 0 ? length : 0] = 0;
    return length > 0;
}

static void record_file(char kind, int file, uint64_t offset, const void *data, size_t bytes) {
    char path[4096];
    if (path_of(file, path))
        record(kind, path, offset, data, bytes);
}

/* Return the path of a name in an open folder. */
static const char *in(int folder, const char *name, char path[8192]) {
    if (name[0] == '/' || folder == AT_FDCWD || !path_of(folder, path))
        return name;
    strcat(strcat(path, "/"), name);
    return path;
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

#define OPEN(name, ...)                                             \
    {                                                               \
        va_list rest;                                               \
        va_start(rest, flags);                                      \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;   \
        va_end(rest);                                               \
        char buffer[8192];                                          \
        const char *whole = in(folder, path, buffer);               \
        int is_new = flags & O_CREAT && access(whole, F_OK) != 0;   \
        int file = REAL(name)(__VA_ARGS__, flags, mode);            \
        if (file >= 0 && is_new)                                    \
            record('C', whole, 0, 0, 0);                            \
        return file;                                                \
    }
enum { folder = AT_FDCWD };  /* of the calls that name none */
int open(const char *path, int flags, ...) OPEN(open, path)
int open64(const char *path, int flags, ...) OPEN(open64, path)
int openat(int folder, const char *path, int flags, ...) OPEN(openat, folder, path)
int openat64(int folder, const char *path, int flags, ...) OPEN(openat64, folder, path)

int unlinkat(int folder, const char *path, int flags) {
    char buffer[8192];
    int failed = REAL(unlinkat)(folder, path, flags);
    if (!failed)
        record('U', in(folder, path, buffer), 0, 0, 0);
    return failed;
}

int unlink(const char *path) {
    return unlinkat(AT_FDCWD, path, 0);
}

int mkdir(const char *path, mode_t mode) {
    int failed = REAL(mkdir)(path, mode);
    if (!failed)
        record('D', path, 0, 0, 0);
    return failed;
}

static int renamed(char kind, int failed, int from_folder, const char *from, int to_folder, const char *to) {
    char old[8192], new[8192];
    if (!failed) {
        to = in(to_folder, to, new);
        record(kind, in(from_folder, from, old), 0, to, strlen(to));
    }
    return failed;
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    return renamed('R', REAL(renameat)(from_folder, from, to_folder, to), from_folder, from, to_folder, to);
}

int rename(const char *from, const char *to) {
    return renameat(AT_FDCWD, from, AT_FDCWD, to);
}

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    return renamed('L', REAL(linkat)(from_folder, from, to_folder, to, flags), from_folder, from, to_folder, to);
}

int link(const char *from, const char *to) {
    return linkat(AT_FDCWD, from, AT_FDCWD, to, 0);
}
