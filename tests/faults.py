"""A disk that fails on purpose: a library to be preloaded makes the chosen system calls on files of a folder fail.

It counts the calls that write (open to write, write, fsync, rename, mkdir, truncate) and gives an error from the
``first`` to the ``last``; the write before the first is a short one, as on a disk that is filling up.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[4096];
static long first, last, count;
static int error_number, ready;

void faults(const char *where, long from, long to, int number) {
    strncpy(folder, where, sizeof folder - 1);
    first = from, last = to, error_number = number, count = 0, ready = 1;
}
long faults_count(void) { return count; }

static int fails(const char *path) {
    if (!ready) {
        const char *where = getenv("FAULTS_FOLDER");
        ready = 1;
        if (where)
            faults(where, atol(getenv("FAULTS_FIRST")), atol(getenv("FAULTS_LAST")), atoi(getenv("FAULTS_ERROR")));
    }
    if (!folder[0] || strncmp(path, folder, strlen(folder))) return 0;
    long number = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    if (number < first || number > last) return number == first - 1 ? 2 : 0;
    errno = error_number;
    return 1;
}
static int fails_fd(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    path[size < 0 ? 0 : size] = 0;
    return fails(path);
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPEN(name, ...)                                                                         \
    mode_t mode = 0;                                                                            \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); } \
    if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && fails(path) == 1) return -1;                 \
    return REAL(name)(__VA_ARGS__, flags, mode);
int open(const char *path, int flags, ...) { OPEN(open, path) }
int open64(const char *path, int flags, ...) { OPEN(open64, path) }
int openat(int at, const char *path, int flags, ...) { OPEN(openat, at, path) }
int openat64(int at, const char *path, int flags, ...) { OPEN(openat64, at, path) }
ssize_t write(int fd, const void *data, size_t size) {
    int found = fd > 2 ? fails_fd(fd) : 0;
    return found == 1 ? -1 : REAL(write)(fd, data, found == 2 && size > 1 ? size / 2 : size);
}
int fsync(int fd) { return fails_fd(fd) == 1 ? -1 : REAL(fsync)(fd); }
int ftruncate64(int fd, off64_t size) { return fails_fd(fd) == 1 ? -1 : REAL(ftruncate64)(fd, size); }
int rename(const char *from, const char *to) { return fails(to) == 1 ? -1 : REAL(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { return fails(path) == 1 ? -1 : REAL(mkdir)(path, mode); }
"""


def build_faults(folder: Path) -> Path:
    """Compile the library into ``folder``; skips the test where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here")
    source, library = folder / "faults.c", folder / "faults.so"
    source.write_text(_SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", library, source, "-ldl"], check=True)
    return library


def environment(library: Path, **faults: object) -> dict[str, str]:
    """Variables for a process that is to have the library; ``faults``: folder, first, last, error from its start on."""
    return os.environ | {"LD_PRELOAD": str(library)} | {f"FAULTS_{name.upper()}": str(v) for name, v in faults.items()}


def set_faults(folder: Path, *, first: int = 1, last: int = 1 << 40, error: int) -> None:
    """In a process that has the library: what fails from now on; the count begins anew."""
    ctypes.CDLL(None).faults(os.fsencode(folder), ctypes.c_long(first), ctypes.c_long(last), error)


def no_faults() -> int:
    """Nothing fails from now on; how many calls were counted."""
    library = ctypes.CDLL(None)
    library.faults_count.restype = ctypes.c_long
    count = int(library.faults_count())
    library.faults(b"", ctypes.c_long(1), ctypes.c_long(0), 0)
    return count
