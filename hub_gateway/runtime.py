"""The parts of a running gateway, opened and closed in the right order."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from hub_gateway import __version__
from hub_gateway.audit import COMMITTED, AuditLog
from hub_gateway.db.engine import Database
from hub_gateway.db.revision import prepare_at_start
from hub_gateway.db.secrets import Vault
from hub_gateway.errors import BadRequest
from hub_gateway.events import Events
from hub_gateway.identity.ccaches import CredentialStore
from hub_gateway.identity.credentials import Credentials
from hub_gateway.identity.mapper import IdentityMapper
from hub_gateway.identity.unix import UnixUsers
from hub_gateway.kernels.activity import ActivityReporter
from hub_gateway.kernels.controller import Controller
from hub_gateway.kernels.culler import Culler
from hub_gateway.kernels.service import KernelService
from hub_gateway.kernels.specs import KernelSpecs
from hub_gateway.link import KernelRelay
from hub_gateway.metrics import METRICS, LoopWatch
from hub_gateway.proxies.registry import Proxies
from hub_gateway.quotas.admission import Admission
from hub_gateway.quotas.notices import Notifier
from hub_gateway.quotas.reports import Reports
from hub_gateway.quotas.runner import QuotaRunner
from hub_gateway.quotas.service import QuotaService
from hub_gateway.services import Services, WebSettings

if TYPE_CHECKING:
    from tornado.web import Application

    from hub_gateway.app import HubGateway
    from hub_gateway.auth.base import Authenticator
    from hub_gateway.auth.hub import HubService
    from hub_gateway.statedir import StateDir

__all__ = ["SWITCH_SECONDS", "Runtime"]

SWITCH_SECONDS = 0.0005
"""After how long a thread that computes lets another one of the interpreter go on, if one waits.

A launch asks the database some fifteen times and waits anew each time: Python's own 5 ms would add up to a tenth of a
second while the enforcer looks at ten thousand kernels in another thread.
"""
MAX_SOCKETS = 65536  # one ZeroMQ socket a kernel; the default of 1023 would be the limit of the gateway


class Runtime:
    """What `jupyter hubgateway` runs: database, authentication, kernels and the web application."""

    def __init__(self, app: HubGateway, state: StateDir, *, instance: str) -> None:
        self.app = app
        self.state = state
        self.instance = instance
        self.url = ""
        self._port = 0
        self.services: Services | None = None
        self._loop_watch = LoopWatch(METRICS)
        self._controller: Controller | None = None
        self._credentials: Credentials | None = None
        self._culler: Culler | None = None
        self._quotas: QuotaRunner | None = None
        self._activity: ActivityReporter | None = None
        self._proxies: Proxies | None = None
        self._zmq: zmq.Context[zmq.Socket[bytes]] | None = None
        self._db: Database | None = None

    async def open(self, *, port: int) -> Application:
        """Open everything up to the web application; nothing is taken over yet."""
        from hub_gateway.web.application import make_application

        app = self.app
        self._loop_watch.start()
        scheme = "https" if app.certfile else "http"
        host = app.ip if app.ip not in ("", "0.0.0.0", "::", "*") else "127.0.0.1"  # noqa: S104
        self._port = port
        self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{app.base_url}"
        cookie_secret = await asyncio.to_thread(self._cookie_secret)
        hub, authenticator = self._authentication(cookie_secret)
        db = self._db = Database(app.db_url)
        await asyncio.to_thread(prepare_at_start, db, upgrade_older=app.upgrade_db)
        vault = await asyncio.to_thread(Vault.from_file, app.secret_keys_file)
        context = self._zmq = zmq.Context(io_threads=1)
        context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)

        def make_relay(kernel_id: str) -> KernelRelay:
            return KernelRelay(
                kernel_id,
                zmq_context=context,
                replica=app.replica,
                backlog_bytes=app.ws_backlog_bytes,
                count=METRICS.count_link,
            )

        people = authenticator.people
        credentials = self._credentials = Credentials(
            parent=app,
            store=CredentialStore(parent=app, state_dir=self.state.path),
            auth_state=None if people is None else people.auth_state,
        )
        self._proxies = Proxies(parent=app, state_dir=str(self.state.path), credentials=credentials)
        audit = AuditLog(parent=app)
        events = Events(parent=app)
        db.on_commit = lambda info: events.audited(info.get(COMMITTED, ()))
        controller = self._controller = Controller(
            parent=app,
            admission=Admission(where=app.limits_url),
            db=db,
            vault=vault,
            proxies=self._proxies,
            make_relay=make_relay,
            instance=self.instance,
            replica=app.replica,
            service_url=app.service_url or self.url,
            on_swallowed=METRICS.count_swallowed,
        )
        specs = KernelSpecs(parent=app, base_url=app.base_url)
        identity = IdentityMapper(
            parent=app,
            db=db,
            unix_users=UnixUsers(parent=app),
            credentials=credentials,
            people=people,
            hints_of=None if people is None else people.auth_state,
        )
        identity.proxies = {name: proxy.identity for name, proxy in self._proxies.all()}
        identity.tickets = {name: proxy.tickets for name, proxy in self._proxies.all()}
        identity.ways = {name: proxy.says for name, proxy in self._proxies.all()}
        kernels = KernelService(parent=app, controller=controller, specs=specs, identity=identity)
        self._quotas = QuotaRunner(
            parent=app,
            service=kernels,
            notifier=Notifier(parent=app),
            audit_days=audit.retention_days,
        )
        quotas = QuotaService(
            parent=app,
            db=db,
            admitter=controller.store.admitter,
            specs=specs,
            proxies=self._proxies,
            half_life=self._quotas.fair_share_half_life,
            on_change=self._quotas.wake,
            people=people,
        )
        self.services = Services(
            kernels=kernels,
            authenticator=authenticator,
            db=db,
            hub=hub,
            quotas=quotas,
            identity=identity,
            audit=audit,
            reports=Reports(parent=app),
            web=WebSettings(
                cookie_secret=cookie_secret,
                max_body_bytes=app.max_body_bytes,
                max_message_bytes=app.max_message_bytes,
                incoming_bytes_per_user=app.incoming_bytes_per_user,
                websockets_per_kernel=app.websockets_per_kernel,
                websockets_per_user=app.websockets_per_user,
                ws_ping_interval=app.ws_ping_interval,
                replica=app.replica,
            ),
        )
        await authenticator.start()
        if quotas.initial_policies:
            text = await asyncio.to_thread(_text, "QuotaService.initial_policies", quotas.initial_policies)
            made = await quotas.first_start(text)
            if made:
                app.log.info("%d policies were set from %s", made, quotas.initial_policies)
        self._culler = Culler(parent=app, service=kernels, on_swallowed=METRICS.count_swallowed)
        if hub is not None:
            self._activity = ActivityReporter(
                parent=app, service=kernels, report=hub.report_activity, on_swallowed=METRICS.count_swallowed
            )
        return make_application(self.services, base_url=app.base_url)

    async def take_over(self) -> None:
        """Take over the kernels that an earlier process left, and be ready."""
        assert self.services is not None
        assert self._controller is not None
        assert self._quotas is not None
        await self._quotas.recount()
        assert self._credentials is not None
        live = [record.id for record in await self._controller.store.live()]
        await asyncio.to_thread(self._credentials.start, live)
        await self._controller.start(sole=True)
        self._quotas.start()
        if self._culler is not None:
            self._culler.start()
        if self._activity is not None:
            self._activity.start()
        self.services.ready = True
        self.state.write_address(
            {
                "url": self.url,
                "port": self._port,
                "pid": os.getpid(),
                "version": __version__,
                "gateway_id": self._controller.gateway_id,
            }
        )

    def drain(self) -> None:
        """Say from now on, to whoever asks whether this gateway is ready, that it is stopping."""
        if self.services is not None:
            self.services.ready = False
            self.services.draining = True

    async def close(self) -> None:
        """Close everything; kernels go on. May be called at any stage."""
        self.drain()
        for part in (self._loop_watch, self._culler, self._activity, self._quotas, self._controller, self._proxies):
            if part is not None:
                await part.close()
        if self._credentials is not None:
            await self._credentials.close()
        if self.services is not None:
            await self.services.authenticator.close()
        if self._db is not None:
            await self._db.close()
        if self._zmq is not None:
            self._zmq.destroy(linger=0)

    def _authentication(self, cookie_secret: bytes) -> tuple[HubService | None, Authenticator]:
        if self.app.token_file:
            from hub_gateway.auth.tokenfile import TokenFile

            return None, TokenFile(parent=self.app, path=self.app.token_file)
        if not os.environ.get("JUPYTERHUB_API_TOKEN"):
            raise BadRequest(
                "Nobody says who is calling: there is neither a token file nor a JupyterHub.",
                hint="give --token-file, or run the gateway as a JupyterHub service (JUPYTERHUB_* environment)",
            )
        from hub_gateway.auth.hub import HubService

        hub = HubService(parent=self.app, cookie_secret=cookie_secret, base_url=self.app.base_url)
        return hub, hub.authenticator

    def _cookie_secret(self) -> bytes:
        if not self.app.cookie_secret_file:
            return self.state.secret("cookie_secret")
        option = "HubGateway.cookie_secret_file"
        try:
            secret = bytes.fromhex(_text(option, self.app.cookie_secret_file).strip())
        except ValueError:
            secret = b""
        if len(secret) < 32:
            raise BadRequest(
                f"The file {self.app.cookie_secret_file} does not hold a cookie secret of 64 hex digits or more.",
                hint=f"{option} names it; `openssl rand -hex 32` makes one",
            )
        return secret


def _text(option: str, path: str) -> str:
    """A file that an option names. Raises `BadRequest`."""
    try:
        return Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else "it is not text"
        raise BadRequest(f"The file {path} cannot be read: {why}.", hint=f"{option} names it") from error
