"""The catalogue of kernelspecs: read in a thread, kept as it was read until a file changes."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import quote

from jupyter_client.kernelspec import KernelSpecManager
from traitlets import Dict, Float, List, TraitError, Unicode, validate
from traitlets.config import LoggingConfigurable

from hub_gateway._paths import launchers_dir
from hub_gateway.errors import BadRequest, Forbidden, NotFound
from hub_gateway.kernels.profiles import SEPARATOR, Entry, clash, entries_of, groups_of, shown
from hub_gateway.kernels.resources import Bounds, bounds_of
from hub_gateway.kernels.specfile import loaded
from hub_gateway.kernels.types import JSON
from hub_gateway.quotas.amounts import rate, resources_of

__all__ = ["KernelSpecFiles", "KernelSpecs", "Spec"]


NOBODY: frozenset[str] = frozenset()
LONGEST_LAUNCH = 86400.0
SCRIPTS = ("kernel.js", "kernel.css")
LOGOS = "logo-"
"""What Jupyter's clients fetch of a kernelspec's folder: these scripts, and what begins like this."""


@dataclass(frozen=True)
class Spec:
    """One kernelspec, or one profile of it, with what its metadata says to the gateway."""

    name: str
    resource_dir: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    interrupt_mode: Literal["signal", "message"]
    proxy: str | None = None
    """Name or class name of the process proxy; None is the default one."""
    proxy_config: Mapping[str, JSON] = field(default_factory=dict)
    transport: Literal["auto", "ipc", "tcp"] = "auto"
    """How the kernel and its agent, on one node, speak with each other."""
    encryption: Literal["none", "curve"] = "none"
    """What the kernel understands (`metadata.supported_encryption`, jupyter_client's field)."""
    options: Mapping[str, JSON] = field(default_factory=dict)
    """`metadata.hub_gateway`."""
    bounds: Bounds = field(default_factory=Bounds)
    authorized_users: frozenset[str] = frozenset()
    unauthorized_users: frozenset[str] = frozenset()
    groups: frozenset[str] | None = None
    """To whom it is offered; for everybody else it does not exist. None is everybody."""
    profile: str = ""
    """Name of the profile; empty for the kernelspec itself."""
    launch_seconds: float | None = None
    """How long a launch may take; None is the gateway's usual."""
    model: Mapping[str, JSON] = field(default_factory=dict)
    """The entry of `GET /api/kernelspecs`."""

    def offered(self, groups: Collection[str]) -> bool:
        """Whether it exists for a member of these groups."""
        return self.groups is None or not self.groups.isdisjoint(groups)

    def number(self, name: str) -> float | None:
        """A number from `metadata.hub_gateway`, None where it is missing or none."""
        found = self.options.get(name)
        return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


@dataclass(frozen=True)
class _Catalogue:
    specs: Mapping[str, Spec]
    broken: Mapping[str, str]
    stamp: tuple[tuple[str, int], ...]
    read_at: float


class KernelSpecFiles(KernelSpecManager):
    """jupyter_client's `KernelSpecManager`, with its search path configurable (`c.KernelSpecManager.kernel_dirs`)."""

    kernel_dirs = List(
        Unicode(),
        help="""Directories in which kernelspecs are looked for, first ones first: each holds a folder a kernelspec.

        By default `kernels` in every directory of `jupyter --paths` (data).
        """,
    ).tag(config=True)


class KernelSpecs(LoggingConfigurable):
    """The kernelspecs of this gateway, as each user may see them.

    `base_url` goes before the addresses of their resources.
    """

    allowed_kernelspecs = List(
        Unicode(),
        help="""Names of the kernelspecs that may be used; empty allows all that are found.

        A kernelspec's name allows all of its profiles; the name of a profile (`python_docker--large`) allows that one.
        Where they are found is `KernelSpecManager.kernel_dirs`.
        """,
    ).tag(config=True)
    default_kernelspec = Unicode(
        "python3",
        help="Name of the kernelspec for requests that name none. Where it does not exist, the first by name is used.",
    ).tag(config=True)
    authorized_users = List(
        Unicode(), help="Users who may start kernels; empty is everybody. A kernelspec's own list comes on top."
    ).tag(config=True)
    unauthorized_users = List(
        Unicode(),
        default_value=["root"],
        help="Users who may not start kernels, whatever `authorized_users` says.",
    ).tag(config=True)
    default_resources = Dict(
        help="""What a kernel reserves whose kernelspec (`metadata.hub_gateway.resources`) states no `cpu` or `memory`.

        Resource managers that enforce these give a kernel no more. Without it such a kernel is refused wherever a
        policy limits what nobody has stated: it would count as nothing, and take as much as it likes.

        Example::

            c.KernelSpecs.default_resources = {"cpu": 1, "memory": "2G"}
        """
    ).tag(config=True)
    refresh_seconds = Float(
        5.0, help="How often (seconds), at most, the kernelspec directories are looked at for changes."
    ).tag(config=True)

    def __init__(self, *, base_url: str = "/", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.base_url = base_url
        self.manager = KernelSpecFiles(parent=self.parent)
        self._catalogue: _Catalogue | None = None
        self._reading: asyncio.Task[_Catalogue] | None = None

    @validate("default_resources")
    def _known_resources(self, proposal: Any) -> Any:
        unknown = set(proposal["value"]) - {"cpu", "memory"}
        if unknown:
            raise TraitError(f"default_resources has no {', '.join(sorted(unknown))}; it has cpu and memory.")
        try:
            resources_of(proposal["value"], "default_resources")
        except BadRequest as error:
            raise TraitError(error.message) from error
        return proposal["value"]

    async def get(self, name: str | None, user: str, groups: Collection[str] = NOBODY) -> Spec:
        """The kernelspec of that name (None: the default). Raises `NotFound`, `Forbidden`."""
        specs = await self._specs()
        visible = {name: spec for name, spec in specs.items() if self._visible(spec, user, groups)}
        if name is None or name == "":
            name = self._default(visible)
        if name in visible:
            return visible[name]
        found = specs.get(name)
        if found is None or found.profile or not found.offered(groups):
            known = ", ".join(sorted(visible)) or "none"
            raise NotFound(f"There is no kernelspec {name[:100]!r} on this gateway; available: {known}.")
        raise Forbidden(f"{user} may not use the kernelspec {name!r}; ask the administrator of the gateway.")

    async def bounds(self) -> dict[str, tuple[str | None, Bounds]]:
        """The process proxy and the resources of every kernelspec, by name."""
        return {name: (spec.proxy, spec.bounds) for name, spec in (await self._specs()).items()}

    async def find(self, name: str) -> Spec | None:
        """The kernelspec of that name, whoever may use it."""
        return (await self._specs()).get(name)

    async def everything(self) -> tuple[Mapping[str, Spec], Mapping[str, str]]:
        """Every kernelspec and profile by name, whoever may use it; and of those that are left out, why."""
        await self._specs()
        assert self._catalogue is not None
        return self._catalogue.specs, self._catalogue.broken

    async def catalogue(self, user: str, groups: Collection[str] = NOBODY) -> dict[str, Any]:
        """What `GET /api/kernelspecs` answers to that user: `{"default", "kernelspecs": {name: model}}`.

        For who may use none, `default` is empty; jupyter_server takes no null for it.
        """
        specs = await self._specs()
        visible = {name: spec for name, spec in specs.items() if self._visible(spec, user, groups)}
        return {
            "default": self._default(visible) if visible else "",
            "kernelspecs": {name: spec.model for name, spec in visible.items()},
        }

    async def resource(self, name: str, path: str, user: str | None, groups: Collection[str] = NOBODY) -> Path:
        """A file of a kernelspec that its `resources` name, for a user or (None) for whoever asks. Raises `NotFound`.

        No other file is served: `kernel.json` tells who else gets which profiles, and with what environment.
        """
        specs = await self._specs()
        spec = specs.get(name)
        if spec is None or (user is not None and not self._visible(spec, user, groups)):
            raise NotFound(f"There is no kernelspec {name[:100]!r}.")

        def find() -> Path | None:
            root = Path(spec.resource_dir).resolve()
            file = (root / path).resolve()
            return file if file.is_relative_to(root) and file.is_file() else None

        found = await asyncio.to_thread(find) if _resource(path) else None
        if found is None:
            raise NotFound(f"The kernelspec {name!r} has no file {path[:200]!r}.")
        return found

    def _visible(self, spec: Spec, user: str, groups: Collection[str]) -> bool:
        if not spec.offered(groups) or user in self.unauthorized_users or user in spec.unauthorized_users:
            return False
        return all(not some or user in some for some in (self.authorized_users, spec.authorized_users))

    def _default(self, specs: Mapping[str, Spec]) -> str:
        return self.default_kernelspec if self.default_kernelspec in specs or not specs else next(iter(specs))

    async def _specs(self) -> Mapping[str, Spec]:
        kept = self._catalogue
        if kept is not None and time.monotonic() - kept.read_at < self.refresh_seconds:
            return kept.specs
        if self._reading is None or self._reading.done():
            self._reading = asyncio.ensure_future(asyncio.to_thread(self._read, kept))
        # What was read before stays good enough while it is read again, except the first time.
        if kept is None:
            kept = await asyncio.shield(self._reading)
            self._catalogue = kept
        else:
            self._reading.add_done_callback(self._replace)
        return kept.specs

    def _replace(self, task: asyncio.Task[_Catalogue]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._catalogue = task.result()

    async def refresh(self) -> None:
        """Read anew what has changed, now."""
        self._catalogue = await asyncio.to_thread(self._read, self._catalogue)

    def _read(self, kept: _Catalogue | None) -> _Catalogue:
        stamp = self._stamp()
        if kept is not None and kept.stamp == stamp:
            return _Catalogue(kept.specs, kept.broken, stamp, time.monotonic())
        found, folders = self.manager.get_all_specs(), self.manager.find_kernel_specs()
        specs: dict[str, Spec] = {}
        taken = set(folders)
        broken = {
            name: _unreadable(directory)
            for name, directory in folders.items()
            if name not in found and self._allowed(name, name)
        }
        for name, entry in sorted(found.items()):
            for one in entries_of(name, entry["spec"]):
                if not self._allowed(one.name, name):
                    continue
                try:
                    specs[one.name] = self._profile(one, entry["resource_dir"], taken)
                    taken.add(one.name)
                except (BadRequest, KeyError, TypeError, ValueError) as error:
                    broken[one.name] = " ".join(filter(None, (broken.get(one.name), str(error))))
        for name, why in sorted(broken.items()):
            self.log.warning("The kernelspec %s is left out: %s", name, why)
        return _Catalogue(dict(sorted(specs.items())), broken, stamp, time.monotonic())

    def offers(self, name: str) -> bool:
        """Whether `allowed_kernelspecs` lets a kernelspec, or at least a profile of it, be used."""
        allowed = self.allowed_kernelspecs
        return not allowed or any(name in (one, one.rpartition(SEPARATOR)[0]) for one in allowed)

    def _allowed(self, name: str, kernelspec: str) -> bool:
        return not self.allowed_kernelspecs or not {name, kernelspec}.isdisjoint(self.allowed_kernelspecs)

    def _profile(self, entry: Entry, directory: str, taken: Collection[str]) -> Spec:
        if why_not := entry.why_not or clash(entry, taken):
            raise BadRequest(why_not)
        return self.spec(entry, directory)

    def _stamp(self) -> tuple[tuple[str, int], ...]:
        found = []
        for name, directory in sorted(self.manager.find_kernel_specs().items()):
            for path in (Path(directory), Path(directory) / "kernel.json"):
                # A file that goes away in between changes the stamp, which is all that is asked.
                with contextlib.suppress(OSError):
                    found.append((f"{name}:{path}", path.stat().st_mtime_ns))
        return tuple(found)

    def spec(self, entry: Entry, directory: str) -> Spec:
        """What the gateway makes of an entry. Raises `BadRequest`, `KeyError`, `TypeError`, `ValueError`."""
        name, found = entry.name, entry.document
        metadata = _mapping(found.get("metadata") or {}, "metadata")
        stanza = _mapping(metadata.get("process_proxy") or {}, "metadata.process_proxy")
        config = _mapping(stanza.get("config") or {}, "metadata.process_proxy.config")
        mode = found.get("interrupt_mode") or "signal"
        if mode not in ("signal", "message"):
            raise BadRequest(f"interrupt_mode {mode!r} is neither signal nor message.")
        argv = tuple(found["argv"])
        if not argv or not all(isinstance(argument, str) for argument in argv):
            raise BadRequest("argv is empty or holds something that is not a string.")
        argv = tuple(_filled(argument, directory) for argument in argv)
        proxy = stanza.get("name") or stanza.get("class_name")
        options = _mapping(metadata.get("hub_gateway") or {}, "metadata.hub_gateway")
        return Spec(
            name=name,
            resource_dir=directory,
            argv=argv,
            env={key: str(value) for key, value in (found.get("env") or {}).items()},
            interrupt_mode=cast(Literal["signal", "message"], mode),
            proxy=None if proxy is None else str(proxy),
            proxy_config=config,
            options=options,
            transport=_transport(options.get("transport", "auto")),
            encryption="curve" if "curve" in _words(metadata.get("supported_encryption")) else "none",
            bounds=bounds_of(options, resources_of(self.default_resources, "default_resources")),
            authorized_users=_users(config.get("authorized_users")),
            unauthorized_users=_users(config.get("unauthorized_users")),
            groups=groups_of(options),
            profile=entry.profile,
            launch_seconds=_launch_seconds(options, found.get("env") or {}),
            model={"name": name, "spec": shown(found), "resources": self._resources(name, Path(directory))},
        )

    def _resources(self, name: str, directory: Path) -> dict[str, JSON]:
        prefix = f"{self.base_url.rstrip('/')}/kernelspecs/{quote(name)}/"
        found: dict[str, JSON] = {}
        for file in SCRIPTS:
            if (directory / file).is_file():
                found[file] = prefix + file
        for logo in sorted(directory.glob(f"{LOGOS}*")):
            found[logo.stem] = prefix + quote(logo.name)
        return found


def _resource(path: str) -> bool:
    """Whether it is the name of a file such as `resources` lists."""
    return path in SCRIPTS or (path.startswith(LOGOS) and not {"/", "\0"} & set(path))


def _unreadable(directory: str) -> str:
    """Why jupyter_client leaves a folder out."""
    try:
        loaded(Path(directory))
    except BadRequest as error:
        return error.message
    return "Jupyter cannot load it; the gateway's log has its reason."


def _launch_seconds(options: Mapping[str, Any], env: Mapping[str, Any]) -> float | None:
    """How long a launch may take; Enterprise Gateway's kernelspecs say it in their environment."""
    written = options.get("launch_timeout")
    if written is None:
        # There it is a variable like any other: one that says nothing of use keeps no kernelspec from being offered.
        with contextlib.suppress(BadRequest):
            return _seconds(env["KERNEL_LAUNCH_TIMEOUT"]) if "KERNEL_LAUNCH_TIMEOUT" in env else None
        return None
    return _seconds(written)


def _seconds(written: object) -> float:
    seconds = rate("launch_timeout", written)
    if not 0 < seconds <= LONGEST_LAUNCH:
        raise BadRequest(f"launch_timeout {written!r} is no number of seconds from 1 to {LONGEST_LAUNCH:.0f}.")
    return seconds


def _filled(argument: str, directory: str) -> str:
    """An argument with Jupyter's placeholders filled (and ours for the launchers), except `{connection_file}`."""
    known = {"{resource_dir}": directory, "{prefix}": sys.prefix, "{launchers_dir}": str(launchers_dir())}
    for name, value in known.items():
        argument = argument.replace(name, value)
    return argument


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest(f"{what} is not an object.")
    return value


def _transport(value: Any) -> Literal["auto", "ipc", "tcp"]:
    if value not in ("auto", "ipc", "tcp"):
        raise BadRequest(f"metadata.hub_gateway.transport {value!r} is none of auto, ipc, tcp.")
    return cast(Literal["auto", "ipc", "tcp"], value)


def _words(value: Any) -> frozenset[str]:
    """A word or a list of words, in lower case."""
    words = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return frozenset(str(word).strip().lower() for word in words)


def _users(value: Any) -> frozenset[str]:
    """A list, or Enterprise Gateway's comma-separated string."""
    names = value.split(",") if isinstance(value, str) else [] if value is None else value
    if not isinstance(names, list):
        raise BadRequest("authorized_users and unauthorized_users are lists of names, or names with commas between.")
    return frozenset(str(name).strip() for name in names) - {""}
