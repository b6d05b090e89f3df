"""Have a program's remounts fail as they do on a busy machine: its mount calls are answered from here (seccomp(2)).

dockerd mounts the secrets of a service, writes them, and remounts them read-only, which fails with EBUSY where another
of its threads is just between fork and exec. That takes hundreds of starts to happen by itself.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import select
import socket
import struct
import threading

__all__ = ["MountFaults"]

MACHINES = {"x86_64": (317, 165), "aarch64": (277, 40)}
"""The numbers of seccomp and mount."""
READ_ONLY_AGAIN = 0x21
"""MS_REMOUNT | MS_RDONLY, and nothing else."""
SET_MODE_FILTER, NEW_LISTENER = 1, 1 << 3
NOTIFY, ALLOW = 0x7FC00000, 0x7FFF0000
RECEIVE, SEND = 0xC0502100, 0xC0182101
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER_AT, FLAGS_AT = 0, 16 + 8 * 3
"""Where `struct seccomp_data` has the call's number, and its fourth argument."""
CONTINUE = 1


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


class MountFaults:
    """`install` in a child before its exec, then `serve` here. `left` remounts fail, the others are as ever."""

    def __init__(self) -> None:
        self.left = 0
        self.failed = 0
        self._seccomp, self._mount = MACHINES[platform.machine()]
        self._ours, self._theirs = socket.socketpair()

    def install(self) -> None:
        """Of the calling process and all that it will start. For root."""
        code = b"".join(
            struct.pack("HBBI", *one)
            for one in (
                (LOAD, 0, 0, NUMBER_AT),
                (EQUAL, 0, 3, self._mount),
                (LOAD, 0, 0, FLAGS_AT),
                (EQUAL, 0, 1, READ_ONLY_AGAIN),
                (RETURN, 0, 0, NOTIFY),
                (RETURN, 0, 0, ALLOW),
            )
        )
        program = _Program(len(code) // 8, code)
        libc = ctypes.CDLL(None, use_errno=True)
        listener = libc.syscall(self._seccomp, SET_MODE_FILTER, NEW_LISTENER, ctypes.byref(program))
        if listener < 0:
            raise OSError(ctypes.get_errno(), "seccomp")
        socket.send_fds(self._theirs, [b"."], [listener])

    def serve(self) -> None:
        """Answer, until none of these processes is left."""
        _, (listener,), _, _ = socket.recv_fds(self._ours, 1, 1)
        self._ours.close()
        self._theirs.close()
        threading.Thread(target=self._answer, args=(listener,), name="mount-faults", daemon=True).start()

    def _answer(self, listener: int) -> None:
        waiting = select.poll()
        waiting.register(listener, select.POLLIN)
        while not waiting.poll()[0][1] & select.POLLHUP:
            asked = bytearray(80)
            try:
                fcntl.ioctl(listener, RECEIVE, asked)
                (call,) = struct.unpack_from("Q", asked)
                fails = self.left > 0
                answer = struct.pack("QqiI", call, 0, -errno.EBUSY if fails else 0, 0 if fails else CONTINUE)
                fcntl.ioctl(listener, SEND, answer)
            except FileNotFoundError:
                continue  # whose call it was has ended
            if fails:
                self.left, self.failed = self.left - 1, self.failed + 1
        os.close(listener)
