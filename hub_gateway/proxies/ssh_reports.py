"""What the answers of hosts mean for a kernel, in words for its owner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hub_gateway.proxies.base import Phase, PhaseReport, State

__all__ = ["nowhere", "phase_of"]


def phase_of(kernel_id: str, state: State, found: Mapping[str, Any] | None, why: str) -> PhaseReport:
    """The phase of a kernel, by what `launchers/node.py` found on its host, or why the host could not be asked."""
    host, pid = state.get("host"), state.get("pid")
    if found is None:
        return PhaseReport(Phase.UNKNOWN, f"its host {host} cannot be asked: {why}")
    if found.get("lost"):
        return PhaseReport(Phase.GONE, f"its host {host} is lost")
    if not isinstance(pid, int):
        return PhaseReport(Phase.PENDING)
    users = {str(one["user"]) for one in found["agents"] if (one["pid"], one["kernel_id"]) == (pid, kernel_id)}
    if state.get("user") in users:
        return PhaseReport(Phase.RUNNING)
    if any(user.isdecimal() for user in users):  # its directory service is down, perhaps
        return PhaseReport(Phase.UNKNOWN, f"{host} cannot tell whose its agent is: uid {' '.join(users)} has no name")
    if found.get("blind"):
        return PhaseReport(Phase.UNKNOWN, f"{host} does not show the processes of other users (hidepid)")
    if state.get("boot") and found.get("boot") and state["boot"] != found["boot"]:
        return PhaseReport(Phase.GONE, f"its host {host} was started anew")
    return PhaseReport(Phase.GONE, f"its agent (pid {pid}) is not on {host} any more")


def nowhere(refused: Mapping[str, str]) -> str:
    """Why no host took a kernel."""
    if len(refused) == 1:
        ((name, why),) = refused.items()
        return f"The kernel cannot run: its host {name} is not to be had: {why}. Tell the administrator."
    reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
    return f"The kernel cannot run: none of its hosts is to be had ({reasons}). Tell the administrator."
