"""Kerberos tickets of kernels on hosts: handed over at launch, and newer ones before these end.

Whoever polls a kernel sees to its tickets, so that another replica, or the next process, goes on with them: what is in
memory here is only what was handed over last. A kernel whose tickets cannot be renewed lives on without.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from logging import Logger, LoggerAdapter
from typing import TYPE_CHECKING, Any

from hub_gateway.errors import GatewayError, LaunchFailed
from hub_gateway.identity import kerberos
from hub_gateway.identity.decide import SERVICES
from hub_gateway.identity.types import Identity
from hub_gateway.kernels.types import JSON
from hub_gateway.proxies.base import Finding, IdentityNeed, LaunchRequest, State
from hub_gateway.proxies.ssh_pool import SshError

if TYPE_CHECKING:
    from hub_gateway.identity.credentials import Credentials

__all__ = ["CCACHE", "Given", "KernelTickets", "check_tickets"]

CCACHE = "krb5cc"
"""The name of the credential cache in a kernel's directory, as `launchers/node.py` has it."""
RETRY_SECONDS = 30.0
RENEWALS = 2
"""How many kernels get newer tickets at once: launches wait for the same places at the KDC."""
FORGET_SECONDS = 600.0
"""A kernel that was not polled for so long is another replica's."""

Deliver = Callable[[State, str], Awaitable[None]]
"""Put tickets (a credential cache, base64) in the place of those that a kernel has."""


@dataclass(frozen=True)
class Given:
    """What one kernel gets: a credential cache (base64), which is secret, and when its tickets end."""

    text: str = field(default="", repr=False)
    ends: float = 0.0
    life: float = 0.0
    renew_till: float = 0.0

    def renewal(self, path: str) -> dict[str, JSON] | None:
        """What the agent needs to renew them on the node; None where that is not possible, or the gateway's task."""
        if self.renew_till <= self.ends:
            return None
        return {"path": path, "ends": self.ends, "life": self.life, "renew_till": self.renew_till}

    def until(self, renewed: object) -> float | None:
        """When they end for good, if nobody at the gateway sees to newer ones; `renewed` is until when the node does.

        An agent that an earlier launch has started goes on with the tickets that came with that one.
        """
        if not self.renew_till:
            return None
        return float(renewed) if isinstance(renewed, int | float) else self.ends


@dataclass
class _Tended:
    ends: float | None = None
    """When what the kernel has ends, as far as this process has handed it over."""
    task: asyncio.Task[None] | None = None
    not_before: float = 0.0
    forgetting: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        """Do nothing more for it."""
        for begun in (self.task, self.forgetting):
            if begun is not None:
                begun.cancel()


class KernelTickets:
    """Sees to the tickets of kernels. All methods are for one event loop."""

    def __init__(self, need: IdentityNeed, deliver: Deliver, log: Logger | LoggerAdapter[Any]) -> None:
        self.need = need
        self.deliver = deliver
        self.log = log
        self._tended: dict[str, _Tended] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._turns = asyncio.Semaphore(RENEWALS)

    async def first(self, credentials: Credentials | None, request: LaunchRequest) -> Given:
        """The tickets for a kernel that starts; nothing where it gets none. Raises `LaunchFailed`."""
        if self.need is IdentityNeed.NONE:
            return Given()
        if credentials is None:
            raise LaunchFailed("This gateway has no Kerberos tickets to give. Ask the administrator.")
        identity = Identity(
            request.owner,
            request.owner.removeprefix(SERVICES),
            principal=request.principal,
            unix_user=request.unix_user,
            offered=request.tickets,
        )
        try:
            found = await credentials.obtain(identity, self.need, request.kernel_id)
            text = _text(await credentials.store.read(request.kernel_id))
        except GatewayError as error:
            raise LaunchFailed(
                f"The kernel cannot get the Kerberos tickets that it is to have. {error.message}", hint=error.hint
            ) from error
        finally:
            if self.need is IdentityNeed.USER_TGT:
                await credentials.ended(request.kernel_id)  # the kernel's copy is the only one
        if self.need is IdentityNeed.SERVICE_TICKET:
            if before := self._tended.get(request.kernel_id):  # of a launch that was given up
                before.cancel()
            tended = self._tended[request.kernel_id] = _Tended(found.ends)
            self._seen(credentials, request.kernel_id, tended)
        return Given(text, found.ends or 0.0, found.life, found.renew_till or 0.0)

    def tend(self, credentials: Credentials | None, kernel_id: str, state: State) -> None:
        """Have a kernel that runs keep tickets; what takes time goes on beside."""
        if credentials is None or state.get("tickets") != IdentityNeed.SERVICE_TICKET.value or "pid" not in state:
            return
        tended = self._tended.setdefault(kernel_id, _Tended())
        self._seen(credentials, kernel_id, tended)
        now = time.monotonic()
        ends = credentials.store.ends(kernel_id)
        fresh = ends is not None and ends == tended.ends
        if not fresh and now >= tended.not_before and (tended.task is None or tended.task.done()):
            tended.task = asyncio.ensure_future(self._renew(credentials, kernel_id, state, tended))

    async def ended(self, credentials: Credentials | None, kernel_id: str) -> None:
        """Renew no more, and keep nothing of it here."""
        tended = self._tended.pop(kernel_id, None)
        if tended is not None:
            tended.cancel()
        if credentials is not None:
            with contextlib.suppress(ValueError):  # of what only looks like a kernel of ours, nothing was ever kept
                await credentials.ended(kernel_id)

    def close(self) -> None:
        """Begin nothing more; what kernels have stays."""
        for tended in self._tended.values():
            tended.cancel()

    def _seen(self, credentials: Credentials, kernel_id: str, tended: _Tended) -> None:
        """Keep nothing of a kernel that is another replica's by then."""
        if tended.forgetting is not None:
            tended.forgetting.cancel()

        def forget() -> None:
            task = asyncio.ensure_future(self.ended(credentials, kernel_id))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

        tended.forgetting = asyncio.get_running_loop().call_later(FORGET_SECONDS, forget)

    async def _renew(self, credentials: Credentials, kernel_id: str, state: State, tended: _Tended) -> None:
        try:
            async with self._turns:
                ends = credentials.store.ends(kernel_id)
                if ends is None:  # an earlier process had them
                    ends = (await credentials.obtain(_owner(state), IdentityNeed.SERVICE_TICKET, kernel_id)).ends
            await self.deliver(state, _text(await credentials.store.read(kernel_id)))
            tended.ends = ends
        except (GatewayError, SshError) as error:
            tended.not_before = time.monotonic() + RETRY_SECONDS
            why = getattr(error, "hint", "") or str(error)
            self.log.warning("Kernel %s gets no newer Kerberos tickets now: %s", kernel_id, why)
        except Exception:  # of a provider that a site has brought along
            tended.not_before = time.monotonic() + RETRY_SECONDS
            self.log.exception("Kernel %s gets no newer Kerberos tickets now", kernel_id)


async def check_tickets(
    credentials: Credentials | None, need: IdentityNeed, user: str, principal: str
) -> list[Finding]:
    """Whether kernels would get their tickets: those of `user`, where one is given."""
    if need is IdentityNeed.NONE or credentials is None:
        return []
    if not user:
        if why := await asyncio.to_thread(credentials.problem, need):
            return [Finding("error", "tickets", "kernels would get no Kerberos tickets", why)]
        hint = "set DistributedProxy.check_user to have it tried"
        return [Finding("ok", "tickets", "kernels get Kerberos tickets of their owners", hint)]
    principal = await asyncio.to_thread(kerberos.in_default_realm, principal or user)
    identity = Identity(user, user, principal=principal, unix_user=user)
    try:
        await credentials.attempt(identity, need)
        served, sentence = credentials.says(identity, need)
    except GatewayError as error:
        return [Finding("error", "tickets", error.message, error.hint)]
    return [Finding("ok" if served else "error", "tickets", f"kernels get {sentence.rstrip('.')}")]


def _owner(state: State) -> Identity:
    owner, principal, user = (str(state[key]) if state.get(key) else None for key in ("owner", "principal", "user"))
    return Identity(owner or "", (owner or "").removeprefix(SERVICES), principal=principal, unix_user=user)


def _text(tickets: bytes) -> str:
    return base64.b64encode(tickets).decode()
