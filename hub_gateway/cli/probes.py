"""What `jupyter hubgateway check` looks at: each probe gives findings, and none changes anything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPResponse

from hub_gateway._paths import launchers_dir
from hub_gateway.app import HubGateway
from hub_gateway.auth.scopes import SERVICE_SCOPES
from hub_gateway.db import migrate
from hub_gateway.db.engine import Database
from hub_gateway.db.models import utcnow
from hub_gateway.db.secrets import Vault, VaultError
from hub_gateway.deadlines import within
from hub_gateway.errors import GatewayError
from hub_gateway.identity.ccaches import CredentialStore
from hub_gateway.identity.credentials import Credentials
from hub_gateway.kernels.specs import KernelSpecs
from hub_gateway.proxies.base import Finding
from hub_gateway.proxies.registry import Proxies
from hub_gateway.quotas.policies import PolicyStore
from hub_gateway.quotas.service import spec_facts
from hub_gateway.quotas.validate import check_all
from hub_gateway.statedir import StateDir

__all__ = ["everything", "websocket_url_trap"]

CLOCK_WARNING, CLOCK_ERROR = 5.0, 60.0
"""Seconds of difference to the Hub. Tokens expire and activity is judged by its clock."""


async def everything(gateway: HubGateway) -> AsyncIterator[Finding]:
    """All findings on the set-up that the configuration and the environment describe."""
    environ = dict(os.environ)
    async for finding in hub(gateway, environ):
        yield finding
    for finding in addresses(gateway, environ):
        yield finding
    for finding in state(gateway):
        yield finding
    yield await asyncio.to_thread(database, gateway)
    async for finding in kernelspecs(gateway):
        yield finding
    async for finding in limits(gateway):
        yield finding
    yield await agent(sys.executable)
    async for finding in proxies(gateway):
        yield finding


async def hub(gateway: HubGateway, environ: Mapping[str, str]) -> AsyncIterator[Finding]:
    """Whether the Hub can be reached, the token works, its scopes are there, and the clocks agree."""
    if gateway.token_file:
        for finding in token_file(Path(gateway.token_file).expanduser()):
            yield finding
        return
    url, token = environ.get("JUPYTERHUB_API_URL", ""), environ.get("JUPYTERHUB_API_TOKEN", "")
    if not url or not token:
        missing = "JUPYTERHUB_API_URL" if not url else "JUPYTERHUB_API_TOKEN"
        yield Finding(
            "error",
            "hub",
            f"{missing} is not set, and there is no token file",
            "run this with the environment of the service, or set HubGateway.token_file for a gateway without a Hub",
        )
        return
    url = url.rstrip("/")
    try:
        answer = await _get(f"{url}/", {})
    except (OSError, HTTPClientError) as error:
        yield Finding("error", "hub", f"{url} cannot be reached: {error}", "is the Hub up, and reachable from here?")
        return
    yield Finding("ok", "hub", f"JupyterHub {_json(answer).get('version', '(unknown version)')} answers at {url}")
    yield clock(answer.headers.get("Date"), time.time())
    try:
        model = _json(await _get(f"{url}/user", {"Authorization": f"token {token}"}))
    except (OSError, HTTPClientError) as error:
        yield Finding(
            "error",
            "token",
            f"the Hub does not accept JUPYTERHUB_API_TOKEN: {error}",
            "give the service in c.JupyterHub.services the same api_token as in this environment",
        )
        return
    for finding in identity(model, environ.get("JUPYTERHUB_SERVICE_NAME", "")):
        yield finding


def identity(model: Mapping[str, Any], service: str) -> Iterator[Finding]:
    """Whether the Hub's model of the token is that of our service, with what it may do."""
    name, kind = str(model.get("name")), str(model.get("kind"))
    if kind != "service":
        yield Finding(
            "error", "token", f"it belongs to the {kind} {name}, not to a service", "use the service's own api_token"
        )
    elif service and name != service:
        yield Finding(
            "error",
            "token",
            f"it belongs to the service {name}, but JUPYTERHUB_SERVICE_NAME is {service}",
            f"set JUPYTERHUB_SERVICE_NAME={name}",
        )
    else:
        yield Finding("ok", "token", f"the Hub knows it as the service {name}")
    scopes = {str(scope).split("!")[0] for scope in model.get("scopes", [])}
    if "users:activity" in scopes:
        yield Finding("ok", "scopes", "users:activity is there")
    else:
        yield Finding(
            "warning",
            "scopes",
            "users:activity is missing: the Hub does not learn that kernels work, and may cull their servers",
            f'add it to a role of the service: c.JupyterHub.load_roles = [{{"name": "gateway", "services": ["{name}"], '
            '"scopes": ["users:activity"]}]',
        )
    # The Hub tells what a scope includes, too: `list:users` is there where `admin:users` was given.
    if missing := sorted(set(SERVICE_SCOPES) - scopes - {"users:activity"}):
        yield Finding(
            "warning",
            "people",
            f"{', '.join(missing)} missing: leads of groups, and the pages of administrators, need users and groups",
            "add them to the role of the service, see jupyterhub_config/managed.py",
        )
    else:
        yield Finding("ok", "people", "the Hub lets it look up users and groups")


def token_file(path: Path) -> Iterator[Finding]:
    """Whether the token file is there, and closed to others."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        yield Finding(
            "error", "token file", f"{path}: {error.strerror}", "add a user: jupyter hubgateway token NAME --file=..."
        )
        return
    if mode & 0o077:
        yield Finding("warning", "token file", f"{path} can be read by others (mode {mode:o})", f"chmod 600 {path}")
    else:
        yield Finding("ok", "token file", str(path))


def clock(date: str | None, now: float) -> Finding:
    """How far this machine's clock is from that of the Hub (an HTTP Date has whole seconds)."""
    if not date:
        return Finding("warning", "clock", "the Hub's answer has no Date", "compare the clocks yourself")
    skew = now - parsedate_to_datetime(date).timestamp()
    if abs(skew) <= CLOCK_WARNING:
        return Finding("ok", "clock", "agrees with the Hub's")
    words = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the Hub's"
    return Finding(
        "error" if abs(skew) > CLOCK_ERROR else "warning", "clock", words, "run an NTP client on both machines"
    )


def addresses(gateway: HubGateway, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether single-user servers can find the gateway by the addresses that are configured."""
    service = environ.get("JUPYTERHUB_SERVICE_NAME", "")
    prefix = environ.get("JUPYTERHUB_SERVICE_PREFIX", "")
    if service and prefix and not prefix.rstrip("/").endswith(f"/services/{service}"):
        yield Finding(
            "error",
            "base_url",
            f"JUPYTERHUB_SERVICE_PREFIX is {prefix}, but the Hub's proxy sends /services/{service}/ here",
            f"set JUPYTERHUB_SERVICE_PREFIX to the Hub's base_url followed by services/{service}/",
        )
    elif prefix and gateway.base_url.rstrip("/") != prefix.rstrip("/"):
        yield Finding(
            "error",
            "base_url",
            f"HubGateway.base_url is {gateway.base_url}, but the Hub's proxy sends requests for {prefix}",
            "remove HubGateway.base_url from the configuration",
        )
    else:
        yield Finding("ok", "base_url", gateway.base_url)
    for name in ("JUPYTER_GATEWAY_URL", "JUPYTERHUB_PUBLIC_URL"):
        if url := environ.get(name):
            yield websocket_url_trap(name, url, environ.get("JUPYTER_GATEWAY_WS_URL", ""))


def websocket_url_trap(name: str, url: str, ws_url: str) -> Finding:
    """Whether jupyter_server's gateway client would find the websockets of the gateway at `url`.

    Left to itself, it lower-cases the whole address and replaces every "http" in it (jupyter_server's
    gateway_client.py), which is a different address if there are capitals or another "http".
    """
    right = "ws" + url[4:] if url.startswith("http") else ""
    used = ws_url or url.lower().replace("http", "ws")
    if not right:
        return Finding("error", name, f"{url} does not begin with http", "give the whole address of the gateway")
    if ws_url and urlsplit(ws_url).path.rstrip("/") != urlsplit(url).path.rstrip("/"):
        return Finding("error", "JUPYTER_GATEWAY_WS_URL", f"{ws_url} has another path than {url}", f"set it to {right}")
    if used.rstrip("/") != right.rstrip("/") and not ws_url:
        return Finding(
            "error", name, f"jupyter_server makes {used} of it for websockets", f"set JUPYTER_GATEWAY_WS_URL={right}"
        )
    return Finding("ok", name, f"{url}, websockets at {used}")


def state(gateway: HubGateway) -> Iterator[Finding]:
    """Whether the state directory can be written and is closed to others, and the keys in it are usable."""
    path = StateDir(gateway.state_dir).path
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield Finding(
            "error",
            "state_dir",
            f"{path} cannot be written by uid {os.geteuid()}",
            "change its owner, or HubGateway.state_dir",
        )
        return
    if existing != path:
        yield Finding("ok", "state_dir", f"{path} will be made")
    elif stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield Finding("warning", "state_dir", f"{path} can be read by others", f"chmod 700 {path}")
    else:
        holder = StateDir(path).lock_holder() if _locked(path) else None
        yield Finding("ok", "state_dir", f"{path}{f', in use by the gateway with pid {holder}' if holder else ''}")
    keys = Path(gateway.secret_keys_file).expanduser()
    if not keys.exists():
        yield Finding("ok", "keys", f"{keys} will be made")
        return
    try:
        Vault.from_file(keys)
    except VaultError as error:
        yield Finding("error", "keys", error.message, error.hint)
    else:
        yield Finding("ok", "keys", str(keys))


def database(gateway: HubGateway) -> Finding:
    """Whether the database answers, at the revision that this version needs."""
    try:
        db = Database(gateway.db_url, pool_size=1)
    except GatewayError as error:
        return Finding("error", "database", error.message, error.hint)
    shown = db.url.render_as_string(hide_password=True)
    try:
        if db.sqlite and db.url.database and not Path(db.url.database).exists():
            return Finding("ok", "database", f"{shown} will be made")
        if migrate.current(db) is None:
            return Finding("ok", "database", f"{shown} is empty and will be set up")
        migrate.check_revision(db)
    except GatewayError as error:
        return Finding("error", "database", f"{error.message} ({shown})", error.hint)
    finally:
        asyncio.run(db.close())
    return Finding("ok", "database", f"{shown}, revision {migrate.head()}")


async def kernelspecs(gateway: HubGateway) -> AsyncIterator[Finding]:
    """Whether there are kernelspecs, and the programs that they name."""
    catalogue = KernelSpecs(parent=gateway, base_url=gateway.base_url)
    # The entries as every user would see them who is not singled out by name.
    found = (await catalogue.catalogue(""))["kernelspecs"]
    if not found:
        yield Finding(
            "error",
            "kernelspecs",
            "none was found",
            "name their directories: c.KernelSpecManager.kernel_dirs = [...]",
        )
        return
    _, broken = await catalogue.everything()
    for name, why in sorted(broken.items()):
        yield Finding("warning", "kernelspecs", f"{name} is left out: {why}", "jupyter hubgateway kernelspec validate")
    programs = {name: entry["spec"]["argv"][0] for name, entry in found.items()}
    missing = {name: program for name, program in programs.items() if not _runnable(program)}
    for name, program in missing.items():
        yield Finding(
            "warning",
            "kernelspecs",
            f"{name} starts {program!r}, which is not on this machine",
            "right if its kernels run elsewhere, else correct argv in its kernel.json",
        )
    usable = sorted(set(found) - set(missing))
    yield Finding("ok", "kernelspecs", f"{', '.join(usable) or 'none'} can be started here")


async def limits(gateway: HubGateway) -> AsyncIterator[Finding]:
    """What is odd about the policies, beside each other, the kernelspecs and what process proxies enforce."""
    try:
        db = Database(gateway.db_url, pool_size=1)
    except GatewayError:
        return  # which the database's own probe has said
    registry = Proxies(parent=gateway, state_dir=gateway.state_dir)
    try:
        if (db.sqlite and not Path(str(db.url.database)).exists()) or await asyncio.to_thread(
            migrate.current, db
        ) is None:
            return
        await asyncio.to_thread(migrate.check_revision, db)
        policies = await db.read(PolicyStore().all)
        specs = await spec_facts(KernelSpecs(parent=gateway, base_url=gateway.base_url), registry)
        enforced = {name: proxy.enforces for name, proxy in registry.all()}
    except GatewayError:
        return
    finally:
        await registry.close()
        await db.close()
    for problem in check_all(policies, proxies=enforced, specs=specs, now=utcnow()):
        yield Finding(problem.level, "limits", problem.sentence, "see docs/howto/limits.md")
    yield Finding("ok", "limits", f"{len(policies)} polic{'y' if len(policies) == 1 else 'ies'}")


async def proxies(gateway: HubGateway) -> AsyncIterator[Finding]:
    """What the process proxies find of their clusters: those of this package, and those that are configured."""
    store = CredentialStore(parent=gateway, state_dir=gateway.state_dir)  # nothing is kept in it
    credentials = Credentials(parent=gateway, store=store)
    registry = Proxies(parent=gateway, state_dir=gateway.state_dir, credentials=credentials)
    try:
        named = set()
        with contextlib.suppress(GatewayError):
            specs = await spec_facts(KernelSpecs(parent=gateway, base_url=gateway.base_url), registry)
            named = {spec.proxy for spec in specs.values()}
        for name, proxy in registry.all():
            proxy.wanted = proxy.wanted or name in named
            for finding in await proxy.check():
                yield Finding(finding.level, f"{name}: {finding.what}", finding.message, finding.hint)
    finally:
        await registry.close()


async def agent(python: str) -> Finding:
    """Whether the kernels' agent can run with this Python: its file, and pyzmq with CURVE."""
    file = launchers_dir() / "agent.py"
    if not file.is_file():
        return Finding("error", "agent", f"{file} is missing", "install the wheel again")
    program = (
        "import sys, zmq\n"
        "compile(open(sys.argv[1], encoding='utf-8').read(), sys.argv[1], 'exec')\n"
        "print(zmq.pyzmq_version(), 'curve' if zmq.has('curve') else '-')"
    )
    process = await asyncio.create_subprocess_exec(
        python, "-I", "-c", program, str(file), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await within(process.communicate(), 60)
    if process.returncode:
        last = err.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        return Finding("error", "agent", f"{python} cannot run it: {last[0]}", f"{python} -m pip install pyzmq")
    version, curve = out.decode().split()
    if curve != "curve":
        return Finding("error", "agent", f"pyzmq {version} was built without CURVE", "install pyzmq's own wheel")
    return Finding("ok", "agent", f"runs with pyzmq {version}")


def _runnable(program: str) -> bool:
    return program.startswith("{") or program in ("python", "python3") or shutil.which(program) is not None


def _locked(path: Path) -> bool:
    """Whether a gateway holds the directory; its lock is taken and let go at once where none does."""
    lock = StateDir(path)
    if not (path / "gateway.lock").exists():
        return False
    if lock.try_lock():
        lock.unlock()
        return False
    return True


async def _get(url: str, headers: Mapping[str, str]) -> HTTPResponse:
    return await AsyncHTTPClient().fetch(url, headers=dict(headers), request_timeout=20, connect_timeout=10)


def _json(answer: HTTPResponse) -> dict[str, Any]:
    try:
        found = json.loads(answer.body or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
