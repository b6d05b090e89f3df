"""A process proxy that cannot read its agents' first line: they must call back, as on a remote node."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hub_gateway.proxies.base import LaunchRequest, State
from hub_gateway.proxies.local import LocalProxy

__all__ = ["PostingProxy"]


class PostingProxy(LocalProxy):
    """LocalProxy without the registration that it reads from the pipe."""

    def _config(
        self, request: LaunchRequest, directory: Path, env: Mapping[str, str], cwd: str | None
    ) -> dict[str, Any]:
        return {**super()._config(request, directory, env, cwd), "agent": asdict(request.agent)}

    async def launch(self, request: LaunchRequest) -> AsyncIterator[State]:
        async for state in super().launch(request):
            yield {name: value for name, value in state.items() if name != "registration"}
