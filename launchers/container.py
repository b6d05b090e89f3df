#!/usr/bin/env python3
"""Starts the agent in a container, in this process: any image with Python 3.8 and pyzmq will do.

It is started as `python3 -I container.py [FILE]`, and in a container that runs already as
`python3 -I container.py --signal NUMBER`, which sends a signal to the kernel. The agent's configuration is read from
standard input, or from FILE where a resource manager delivers files only. The environment of the container (what its
image sets) becomes the ground on which the kernel's own is put. The command line names neither kernel nor gateway: a
gateway on the same machine knows the agents of its local kernels by such arguments, and would take this one for one.
"""

from __future__ import annotations

import json
import os
import runpy
import sys


def read_all(descriptor: int) -> bytes:
    """Everything up to the end, past Python's own buffers."""
    parts = []
    while True:
        part = os.read(descriptor, 65536)
        if not part:
            return b"".join(parts)
        parts.append(part)


def send(number: int) -> None:
    """Send a signal to the agent's children."""
    parents = {}
    agents = set()
    for name in os.listdir("/proc"):
        try:
            with open("/proc/%s/stat" % name) as stat, open("/proc/%s/cmdline" % name, "rb") as command:
                parents[int(name)] = int(stat.read().rpartition(")")[2].split()[1])
                words = command.read().split(b"\0")
        except (OSError, ValueError):
            continue  # no process, or none any more
        if os.path.abspath(__file__).encode() in words[1:3] and b"--signal" not in words:
            agents.add(int(name))
    for pid, parent in parents.items():
        if parent in agents and pid not in agents:
            os.kill(pid, number)


def main() -> None:
    """Become the agent."""
    if sys.argv[1:2] == ["--signal"]:
        send(int(sys.argv[2]))
        return
    source = os.open(sys.argv[1], os.O_RDONLY) if len(sys.argv) > 1 else 0
    given = read_all(source)
    try:
        document = json.loads(given)
        document["env"] = dict(os.environ, **document["env"])
        given = json.dumps(document).encode()
    except (ValueError, TypeError, KeyError):
        pass  # the agent says what is wrong with it
    document_file = os.memfd_create("configuration")
    view = memoryview(given)
    while view:
        view = view[os.write(document_file, view) :]
    os.lseek(document_file, 0, os.SEEK_SET)
    os.dup2(document_file, 0)
    os.close(document_file)
    del sys.argv[1:]
    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "agent.py"), run_name="__main__")


if __name__ == "__main__":
    main()
