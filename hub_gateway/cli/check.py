"""`jupyter hubgateway check`: the doctor."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict

from traitlets import Bool

from hub_gateway.cli import probes
from hub_gateway.cli.base import Command
from hub_gateway.proxies.base import Finding

__all__ = ["Check"]


class Check(Command):
    """Look at everything that the gateway needs, and say in one line each what is wrong and what to do.

    Run it as the user, with the environment and with the configuration file of the gateway. It touches no
    data and starts no kernel, and may run beside a gateway. The exit code is 1 if there is an error.
    """

    name = "jupyter-hubgateway-check"
    description = __doc__
    flags = {
        **Command.flags,
        "json": ({"Check": {"as_json": True}}, "Print JSON, for programs."),
    }

    as_json = Bool(False, help="Print JSON, for programs.").tag(config=True)

    def run(self) -> int:
        """Print the findings as they come."""
        found = asyncio.run(self.findings())
        if self.as_json:
            print(json.dumps([asdict(finding) for finding in found], indent=2))
        return 1 if any(finding.level == "error" for finding in found) else 0

    async def findings(self) -> list[Finding]:
        """Every probe, one after the other: what the first say explains the later."""
        gateway = self.gateway()
        found: list[Finding] = []
        async for finding in probes.everything(gateway):
            found.append(finding)
            if not self.as_json:
                print(line(finding), flush=True)
        return found


def line(finding: Finding) -> str:
    """One finding as one line."""
    advice = f" -> {finding.hint}" if finding.hint else ""
    return f"{finding.level:7} {finding.what}: {finding.message}{advice}"
