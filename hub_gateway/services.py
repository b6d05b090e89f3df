"""What the web layer is given: the parts of a running gateway, wired by the application."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hub_gateway.auth.cache import LookupCache

if TYPE_CHECKING:
    from hub_gateway.auth.base import Authenticator
    from hub_gateway.auth.hub import HubService
    from hub_gateway.db.engine import Database
    from hub_gateway.kernels.service import KernelService
    from hub_gateway.quotas.types import Verdict
    from hub_gateway.web.parts import AuditPart, IdentityPart, QuotaPart, ReportsPart

__all__ = ["Services", "WebSettings"]

ROOM_SECONDS = 2.0


@dataclass(frozen=True)
class WebSettings:
    """Settings of the web layer. Sizes in bytes, durations in seconds."""

    cookie_secret: bytes
    max_body_bytes: int = 1 * 2**20
    max_message_bytes: int = 64 * 2**20
    incoming_bytes_per_user: int = 128 * 2**20
    websockets_per_kernel: int = 100
    websockets_per_user: int = 500
    ws_ping_interval: float = 30.0
    replica: str = ""


@dataclass
class Services:
    """The parts of one running gateway. `hub` is None stand-alone."""

    kernels: KernelService
    authenticator: Authenticator
    db: Database
    web: WebSettings
    hub: HubService | None = None
    quotas: QuotaPart | None = None
    identity: IdentityPart | None = None
    audit: AuditPart | None = None
    reports: ReportsPart | None = None
    rooms: LookupCache[Mapping[str, Verdict]] = field(
        default_factory=lambda: LookupCache(10_000, lambda _: ROOM_SECONDS)
    )
    """Which kernelspecs a user has no room for: kernelspecs are polled by every open page."""
    ready: bool = field(default=False)
    """Whether this process has taken over its kernels and serves requests."""
    draining: bool = field(default=False)
    """Whether it is about to end: new requests are better sent elsewhere."""
