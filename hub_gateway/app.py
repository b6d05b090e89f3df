"""`jupyter hubgateway`: configuration and wiring, nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import ssl
import sys
import uuid
from pathlib import Path
from typing import Any, NoReturn, cast
from urllib.parse import urlsplit

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_core.application import JupyterApp
from tornado.netutil import bind_sockets
from traitlets import Bool, CaselessStrEnum, Float, Integer, List, TraitError, Unicode, default, validate

from hub_gateway import __version__
from hub_gateway.cli import subcommands
from hub_gateway.cli.strict import StrictApp
from hub_gateway.deadlines import within
from hub_gateway.errors import BadRequest, GatewayError
from hub_gateway.logs import configure_logging
from hub_gateway.runtime import SWITCH_SECONDS, Runtime
from hub_gateway.statedir import StateDir
from hub_gateway.web.server import GatewayServer

__all__ = ["HubGateway", "main"]

ALIASES = {
    "ip": "HubGateway.ip",
    "port": "HubGateway.port",
    "base-url": "HubGateway.base_url",
    "state-dir": "HubGateway.state_dir",
    "db-url": "HubGateway.db_url",
    "token-file": "HubGateway.token_file",
    "certfile": "HubGateway.certfile",
    "keyfile": "HubGateway.keyfile",
}


class HubGateway(StrictApp):
    """A multi-tenant gateway for remote Jupyter kernels.

    It runs as a JupyterHub service (started by the Hub, or by anything else with the same
    JUPYTERHUB_* environment), or stand-alone with a token file.
    """

    name = "jupyter-hubgateway"
    version = __version__
    description = __doc__
    examples = """
    jupyter hubgateway --generate-config             # write jupyter_hubgateway_config.py
    jupyter hubgateway --token-file=tokens.json      # stand-alone, without a Hub
    jupyter hubgateway check                         # what is wrong with my set-up?
    jupyter hubgateway kernels list                  # my kernels
    jupyter hubgateway demo                          # a whole Hub with it, on this machine
    """
    subcommands = subcommands
    aliases = {**JupyterApp.aliases, **ALIASES}
    classes = [*JupyterApp.classes, KernelSpecManager]

    ip = Unicode(
        help="""Address to listen on. By default the host of JUPYTERHUB_SERVICE_URL, or 127.0.0.1 without a Hub.

        Agents of kernels on other nodes post their registration to this gateway, so a gateway with remote
        kernels listens on an address that the nodes can reach.
        """
    ).tag(config=True)
    port = Integer(
        min=0,
        max=65535,
        help="""Port to listen on; 0 lets the system choose. By default the port of JUPYTERHUB_SERVICE_URL, or 8899.""",
    ).tag(config=True)
    base_url = Unicode(
        help="""Prefix of every URL, by default JUPYTERHUB_SERVICE_PREFIX, or / without a Hub.

        Keep it lower case and without the letters "http": jupyter_server derives the websocket address from
        the gateway's by lower-casing all of it and replacing each "http".
        """
    ).tag(config=True)
    certfile = Unicode(help="TLS certificate (PEM). Empty: plain HTTP, as behind the Hub's proxy.").tag(config=True)
    keyfile = Unicode(help="Key of `certfile`.").tag(config=True)
    trust_xheaders = Bool(
        help="""Whether to believe X-Forwarded-For, X-Forwarded-Proto and X-Scheme. By default True with a Hub, whose
        proxy sets them, and False stand-alone, where any client could choose its own address with them.

        The limit on guessed tokens, the log and the audit trail go by that address. Set it to True where a proxy of
        your own stands in front of a stand-alone gateway, and let nobody reach the gateway around it.
        """
    ).tag(config=True)
    trusted_proxies = List(
        Unicode(),
        help="""Addresses of proxies between people and the proxy that calls this gateway, such as a load balancer in
        front of the Hub's.

        The address of a request is the last one in X-Forwarded-For that is not one of these.
        Example: `c.HubGateway.trusted_proxies = ["10.0.0.5"]`
        """,
    ).tag(config=True)

    state_dir = Unicode(
        help="""Directory (mode 0700) for what must outlive the gateway: the SQLite database, keys, kernels' logs.

        One gateway at a time holds it. A second one waits `lock_timeout` seconds for the first to end.
        """
    ).tag(config=True)
    lock_timeout = Float(
        30.0, help="How long (seconds) to wait for an earlier gateway that still holds `state_dir`."
    ).tag(config=True)
    db_url = Unicode(
        help="""SQLAlchemy URL of the database. By default SQLite in `state_dir`.

        Example: `postgresql://gateway@db.example.org/hub_gateway` (give the password in a `.pgpass` file or
        PGPASSWORD, not here). Several replicas need PostgreSQL.
        """
    ).tag(config=True)
    upgrade_db = Bool(
        True,
        help="""Whether to bring an older database to this version's revision at start.

        A new, empty database is always set up. SQLite files are copied first. With several replicas set
        this to False and run `jupyter hubgateway db upgrade` once.
        """,
    ).tag(config=True)
    token_file = Unicode(
        help="""Stand-alone mode: a YAML or JSON file that maps hashed tokens to users; no Hub is asked.

        `jupyter hubgateway token alice --file=tokens.yaml` adds a user.
        """
    ).tag(config=True)
    secret_keys_file = Unicode(
        help="""File with the keys (one Fernet key a line) that encrypt secrets in the database.

        The first key encrypts, all of them decrypt. To rotate: put a new key first, restart, run
        `jupyter hubgateway db rotate-keys`, remove the old one. By default `secret_keys` in `state_dir`,
        made on first use; replicas need the same file.
        """
    ).tag(config=True)
    cookie_secret_file = Unicode(
        help="File with the secret (64 hex digits or more) that signs browser cookies. By default in `state_dir`."
    ).tag(config=True)
    replica = Unicode(
        help="Name of this replica in leases and logs: stable over restarts, different for each replica."
    ).tag(config=True)
    service_url = Unicode(
        help="""URL by which kernels on other nodes reach this gateway, prefix included.

        Agents post their registration there. By default made from ip, port and base_url.
        """
    ).tag(config=True)
    public_url = Unicode(
        help="""URL by which people reach this gateway's pages, prefix included; it stands in messages to them.

        By default JUPYTERHUB_PUBLIC_URL (which the Hub sets where it knows), or the prefix alone.
        """
    ).tag(config=True)
    follow_parent = Bool(
        help="""Whether to end when the parent process does. By default True for a Hub-managed service:
        a Hub that was killed leaves its services running, and the next Hub's copy would find the port taken.
        """
    ).tag(config=True)
    drain_timeout = Float(
        5.0, help="How long (seconds) to let requests finish after SIGTERM. Kernels are never stopped by it."
    ).tag(config=True)
    max_body_bytes = Integer(1 * 2**20, help="Largest accepted request body (bytes).").tag(config=True)
    max_message_bytes = Integer(
        64 * 2**20,
        help="""Largest message (bytes) that a client may send to a kernel.

        A message is in this process's memory before it is passed on. Messages of kernels are not meant: those
        may have 512 MiB.
        """,
    ).tag(config=True)
    incoming_bytes_per_user = Integer(
        128 * 2**20,
        help="""How much (bytes) of one user's messages may be on its way into this process.

        Counted are messages over 64 KiB, and those in fragments, until they are complete. More of them wait.
        At least one message of `max_message_bytes` is always let in.
        """,
    ).tag(config=True)
    websockets_per_kernel = Integer(
        100, help="How many websockets one kernel may have open in this process; further ones are refused with 429."
    ).tag(config=True)
    websockets_per_user = Integer(500, help="The same for all kernels of one user together.").tag(config=True)
    ws_ping_interval = Float(
        30.0,
        help="""Seconds between pings on kernel websockets; load balancers close silent connections.

        A websocket is closed when for twice that time nothing has come from its client, and nothing of what it was
        sent has moved. A slow client that takes a large message lives; for what may still be in buffers on the way
        (16 MiB at most) it has as long as it takes at 64 KiB a second.
        """,
    ).tag(config=True)
    ws_backlog_bytes = Integer(
        2 * 2**20,
        help="""How much (bytes) may wait for one slow websocket in the gateway.

        Beyond it the rest waits at the kernel's agent, in its bounded buffer, and other websockets go on.
        """,
    ).tag(config=True)
    log_format_style = CaselessStrEnum(
        ["text", "json"], "text", help="`text`: key=value lines for people; `json`: one object a line."
    ).tag(config=True)

    @default("ip")
    def _default_ip(self) -> str:
        return self._hub_service_url().hostname or "127.0.0.1"

    @default("port")
    def _default_port(self) -> int:
        return self._hub_service_url().port or 8899

    @default("base_url")
    def _default_base_url(self) -> str:
        return os.environ.get("JUPYTERHUB_SERVICE_PREFIX", "/")

    @default("state_dir")
    def _default_state_dir(self) -> str:
        return str(Path(self.data_dir) / "hub-gateway")

    @default("db_url")
    def _default_db_url(self) -> str:
        return f"sqlite:///{Path(self.state_dir).expanduser().absolute() / 'hub-gateway.sqlite'}"

    @default("secret_keys_file")
    def _default_secret_keys_file(self) -> str:
        return str(Path(self.state_dir).expanduser() / "secret_keys")

    @default("replica")
    def _default_replica(self) -> str:
        return f"{socket.gethostname()}:{Path(self.state_dir).expanduser().absolute()}"

    @default("trust_xheaders")
    def _default_trust_xheaders(self) -> bool:
        return not self.token_file

    @default("follow_parent")
    def _default_follow_parent(self) -> bool:
        # Only a service that the Hub starts itself is told where to send its OAuth callbacks *and* is its child.
        return bool(os.environ.get("JUPYTERHUB_SERVICE_NAME")) and not self.token_file and os.getppid() != 1

    @property
    def limits_url(self) -> str:
        """Where users see their limits; empty without pages."""
        if self.token_file:
            return ""
        return f"{(self.public_url or self.base_url).rstrip('/')}/limits"

    @default("public_url")
    def _default_public_url(self) -> str:
        # Of a service, the Hub says its own address: https://hub.example.org/services/hub-gateway/
        return os.environ.get("JUPYTERHUB_PUBLIC_URL", "")

    @validate("base_url")
    def _validate_base_url(self, proposal: Any) -> str:
        value = "/" + str(proposal.value).strip("/")
        if value != value.lower() or "http" in value:
            raise TraitError(
                f"base_url {value!r} must be lower case and must not contain 'http': jupyter_server's gateway client "
                "derives the websocket address by lower-casing the URL and replacing each 'http'."
            )
        return value if value.endswith("/") else value + "/"

    @staticmethod
    def _hub_service_url() -> Any:
        return urlsplit(os.environ.get("JUPYTERHUB_SERVICE_URL", ""))

    def initialize(self, argv: Any = None) -> None:
        super().initialize(argv)
        if self._dispatching or self.subapp is not None:
            return
        configure_logging(self.log, cast("int | str", self.log_level), self.log_format_style, self.replica)

    def start(self) -> None:
        super().start()  # subcommands, --generate-config
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            asyncio.run(self._serve())
        except GatewayError as error:
            self._refuse(error.message, error.hint)
        except TraitError as error:
            self._refuse(str(error), "see the configuration file")

    def _refuse(self, message: str, hint: str = "") -> NoReturn:
        """Say in one line why the gateway does not start, and end."""
        self.log.critical("The gateway does not start: %s%s", message, f" ({hint})" if hint else "")
        sys.exit(1)

    def bind(self) -> list[socket.socket]:
        """Bind before anything else is touched: a taken port must change nothing."""
        try:
            return bind_sockets(self.port, self.ip or None)
        except OSError as error:
            hint = "HubGateway.ip (--ip) must be an address, or the name of one, of this machine"
            if error.errno == errno.EADDRINUSE:
                hint = "another gateway may still be running; stop it or choose another --port"
            elif error.errno == errno.EACCES:
                hint = "ports below 1024 are for root; choose another --port"
            raise BadRequest(f"{self.ip}:{self.port} cannot be bound: {error.strerror or error}.", hint=hint) from error

    def tls(self) -> ssl.SSLContext | None:
        """What `certfile` and `keyfile` say; None without them. Raises `BadRequest`."""
        if not self.certfile:
            return None
        for name, path in (("certfile", self.certfile), ("keyfile", self.keyfile)):
            if path and not os.access(path, os.R_OK):
                raise BadRequest(
                    f"The file {path} cannot be read, or does not exist.", hint=f"HubGateway.{name} (--{name}) names it"
                )
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.certfile, self.keyfile or None)
        except (OSError, ValueError) as error:  # among them ssl.SSLError
            raise BadRequest(
                f"The certificate in {self.certfile} cannot be used: {error.strerror or error}."
                if isinstance(error, OSError)
                else f"The certificate in {self.certfile} cannot be used: {error}.",
                hint="HubGateway.certfile and keyfile are PEM files, and the key must be the certificate's",
            ) from error
        return context

    async def _serve(self) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        # Set explicitly: a Hub that was started with SIGINT ignored hands that down, and its stop would hang.
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, stop.set)
        tls = self.tls()
        state = StateDir(self.state_dir)
        state.create()
        await self._lock(state, stop)
        if stop.is_set():
            return
        sockets = self.bind()
        runtime = Runtime(self, state, instance=uuid.uuid4().hex)
        try:
            application = await runtime.open(port=sockets[0].getsockname()[1])
            server = GatewayServer(
                application,
                xheaders=self.trust_xheaders,
                trusted_downstream=self.trusted_proxies,
                max_buffer_size=max(self.max_message_bytes, self.max_body_bytes) + 2**20,
                max_body_size=self.max_body_bytes,
                ssl_options=tls,
            )
            server.add_sockets(sockets)
            await runtime.take_over()
            self.log.info("Listening on %s (version %s, pid %d)", runtime.url, __version__, os.getpid())
            watch = loop.create_task(self._watch_parent(stop)) if self.follow_parent else None
            await stop.wait()
            self.log.info("Stopping; kernels go on running")
            if watch is not None:
                watch.cancel()
            runtime.drain()
            server.stop()
            with contextlib.suppress(asyncio.TimeoutError):
                await within(server.close_all_connections(), self.drain_timeout)
        finally:
            await runtime.close()
            state.unlock()

    async def _lock(self, state: StateDir, stop: asyncio.Event) -> None:
        deadline = asyncio.get_running_loop().time() + self.lock_timeout
        said = False
        while not state.try_lock() and not stop.is_set():
            if not said:
                self.log.warning("Waiting for the gateway with pid %s to leave %s", state.lock_holder(), state.path)
                said = True
            if asyncio.get_running_loop().time() > deadline:
                self._refuse(
                    f"another gateway (pid {state.lock_holder()}) still holds {state.path}.",
                    "stop it, or give this one a state_dir of its own",
                )
            with contextlib.suppress(asyncio.TimeoutError):
                await within(stop.wait(), 0.2)

    async def _watch_parent(self, stop: asyncio.Event) -> None:
        """End when whoever started this service is gone (a killed Hub leaves its services behind)."""
        parent = os.getppid()
        while os.getppid() == parent:
            await asyncio.sleep(1.0)
        self.log.warning("The process that started this service (pid %d) is gone; ending", parent)
        stop.set()


def main(argv: list[str] | None = None) -> None:
    """Entry point of `jupyter-hubgateway`."""
    logging.captureWarnings(True)
    HubGateway.launch_instance(argv)
