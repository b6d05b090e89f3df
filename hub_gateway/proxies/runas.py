"""Calls `launchers/runas.py`: one JSON document in, one out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from hub_gateway.errors import LaunchFailed, Unavailable

__all__ = ["call"]

TIMEOUT = 60.0


def call(command: Sequence[str], request: Mapping[str, Any]) -> dict[str, Any]:
    """Have a request carried out as another user. Blocks. Raises `LaunchFailed`, `Unavailable`."""
    user = request["user"]
    try:
        done = subprocess.run(
            list(command),
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
            cwd="/",
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"The gateway's node does not answer in time when asked to act as {user}.") from error
    except OSError as error:
        raise LaunchFailed(f"The gateway cannot act as {user} on its node: {error.strerror}.") from error
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        said = done.stderr.decode("utf-8", "replace").strip()[-300:]
        raise LaunchFailed(
            f"The gateway may not act as the unix user {user} on its node; ask the administrator.",
            hint=f"{command[0]} ended with {done.returncode}: {said}; check the sudo rule",
        ) from error
    if not isinstance(answer, dict) or not answer.get("ok"):
        raise LaunchFailed(f"The kernel cannot run as the unix user {user}: {answer.get('error', 'no reason given')}.")
    return answer
