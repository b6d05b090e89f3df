#!/usr/bin/env python3
"""Start ipykernel so that no output is ever dropped between the kernel and its agent.

    python ipykernel_launcher.py -f CONNECTION_FILE

Takes ipykernel's own arguments. ZeroMQ drops a publisher's messages without a word once a thousand of them wait
(its high-water mark); a cell that prints faster than the agent reads would lose lines, even its `idle`. Here
the limit is lifted before the sockets are bound, which is the only time it can be. Where the connection file has
CURVE keys and ipykernel is too old to know them (before 7.3), the sockets are encrypted as well.

Works with ipykernel 6 and 7, on Python 3.8 and newer.
"""

from __future__ import annotations

import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# This file's directory comes first on a script's path; the kernel's user is to find nothing that lies here.
if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]

from ipykernel.kernelapp import IPKernelApp  # noqa: E402


class KernelApp(IPKernelApp):  # type: ignore[misc,unused-ignore]
    """ipykernel's application with unlimited queues."""

    def _bind_socket(self, s: Any, port: int) -> Any:
        s.sndhwm = s.rcvhwm = 0
        if not hasattr(self, "curve_secretkey"):
            with open(self.abs_connection_file) as stream:
                connection = json.load(stream)
            if connection.get("curve_secretkey"):
                s.curve_server = True
                s.curve_secretkey = connection["curve_secretkey"].encode()
                s.curve_publickey = connection["curve_publickey"].encode()
        return super()._bind_socket(s, port)


if __name__ == "__main__":
    KernelApp.launch_instance()
