"""Another time for one program: what a machine has whose clock is wrong."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["clock_ahead"]

_SOURCE = """\
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long ahead(void) { return atol(getenv("CLOCK_AHEAD")); }

time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *into, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    into->tv_sec = now.tv_sec;
    into->tv_usec = now.tv_nsec / 1000;
    return 0;
}

int clock_gettime(clockid_t which, struct timespec *into) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(which, into);
    if (which == CLOCK_REALTIME) into->tv_sec += ahead();
    return status;
}
"""


def clock_ahead(directory: Path, seconds: int) -> dict[str, str]:
    """Variables for the environment of a program whose clock is to be so many seconds ahead."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("another time for one program takes a C compiler")
    source, library = directory / "clock.c", directory / "clock.so"
    source.write_text(_SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "CLOCK_AHEAD": str(seconds)}
