"""What an agent is told on its standard input, and how long it may take to end, whichever proxy starts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from traitlets import Float

from hub_gateway.proxies.base import LaunchRequest

__all__ = ["AGENT_ENVIRONMENT", "agent_config", "shutdown_option"]

# glibc would return each large buffer to the system and ask for it again: a third of the CPU for 1 MB messages.
AGENT_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(16 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20)}


def shutdown_option(seconds: float) -> Float[float, float]:
    """The option of a proxy how long its agents may take to end."""
    made: Float[float, float] = Float(
        seconds, help="How long (seconds) an agent may take to end its kernel and itself before it is killed."
    ).tag(config=True)
    return made


def agent_config(
    request: LaunchRequest,
    *,
    argv: Sequence[str],
    launchers: Path,
    runtime_dir: str,
    env: Mapping[str, str],
    cwd: str | None,
    listen: str,
    ports: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """The configuration of one kernel's agent, JSON-able, for a proxy that reads the agent's first line itself.

    `launchers` is where they lie for the agent; `ports` are the first and the last on which it may listen (0: any).
    """
    # It need not call back.
    agent = replace(request.agent, register_url="", listen=listen, port_first=ports[0], port_last=ports[1])
    return {
        "version": 1,
        "kernel_id": request.kernel_id,
        "gateway_id": request.gateway_id,
        "epoch": request.epoch,
        "argv": _unlimited(argv, launchers),
        "runtime_dir": runtime_dir,
        "kernel_name": request.kernelspec,
        "interrupt_mode": request.interrupt_mode,
        "agent": asdict(agent),
        "env": dict(env),
        "cwd": cwd,
    }


def _unlimited(argv: Sequence[str], launchers: Path) -> list[str]:
    """The command with ipykernel's own launcher replaced by ours.

    Python's usual kernelspec runs `-m ipykernel_launcher`, whose sockets drop output without a word once a
    thousand messages wait for the agent.
    """
    for at in range(len(argv) - 1):
        if argv[at] == "-m" and argv[at + 1] == "ipykernel_launcher":
            return [*argv[:at], str(launchers / "ipykernel_launcher.py"), *argv[at + 2 :]]
    return list(argv)
