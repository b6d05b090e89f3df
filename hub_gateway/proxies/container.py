"""What the proxies for Docker and for swarms share: their settings, and the plan of a kernel's container."""

from __future__ import annotations

import abc
import os
import pwd
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from traitlets import Bool, Dict, Float, Integer, List, TraitError, Unicode, default, validate
from traitlets.config import Configurable

from hub_gateway._paths import launchers_dir
from hub_gateway.errors import LaunchFailed, LaunchRefused, Unavailable
from hub_gateway.kernels.types import JSON
from hub_gateway.proxies.agent_config import shutdown_option
from hub_gateway.proxies.base import ClusterObject, Finding, IdentityNeed, LaunchRequest, ProcessProxy
from hub_gateway.proxies.docker_client import DockerDaemon, errors, fault_of_logins
from hub_gateway.proxies.docker_spec import (
    FILES,
    ContainerPlan,
    Limits,
    labels,
    mount_of,
    object_name,
    working_directory,
)
from hub_gateway.proxies.specconfig import mounts, text

__all__ = ["ContainerProxy", "listed"]

SOCKET = "unix:///var/run/docker.sock"


class ContainerProxy(ProcessProxy):
    """Kernels in containers, as the unix user that their owner is mapped to."""

    identity = IdentityNeed.UNIX_USER
    enforces = frozenset({"cpu", "memory", "gpu"})
    config_keys = {"image_name": text, "image": text, "network": text, "volumes": mounts}

    url = Unicode(
        help="""Where the Docker daemon is reached.

        By default DOCKER_HOST of the gateway's environment, or else the daemon of the gateway's own machine. Who may
        speak to a daemon is root on its machine, so a remote one is reached with TLS and client certificates only:

            c.DockerProxy.url = "tcp://docker1.example.org:2376"
            c.DockerProxy.tls = {"ca": "/etc/hub-gateway/ca.pem", "cert": "...", "key": "..."}
        """
    ).tag(config=True)
    tls = Dict(
        key_trait=Unicode(),
        value_trait=Unicode(),
        help="Files (`ca`, `cert`, `key`) for a daemon behind TLS, see `url`.",
    ).tag(config=True)
    image = Unicode(
        help="Image of kernels whose kernelspec names none (`image_name` in `metadata.process_proxy.config`)."
    ).tag(config=True)
    allowed_images = List(
        Unicode(),
        help="""Patterns of the images that kernels may run, such as `registry.example.org/kernels/*`.

        A `*` stands for anything, slashes and colons included. With patterns, what a kernelspec names must match, and
        users may choose an image by KERNEL_IMAGE among those that match (`choose_images`). Empty, the default: what
        kernelspecs name may run, and nobody may choose.
        """,
    ).tag(config=True)
    choose_images = Bool(
        True,
        help="""Whether users may choose among `allowed_images` by KERNEL_IMAGE.

        Such a choice knows no groups: an image that only a profile for a group names can be had by everybody who may
        start any kernel in a container, where it matches. With False kernels run what their kernelspecs name.
        """,
    ).tag(config=True)
    pull = Bool(
        True,
        help="""Whether an image that is missing is fetched from its registry.

        The user reads how far it is. For registries with a login see `registry_logins`.
        """,
    ).tag(config=True)
    registry_logins = Unicode(
        help="""A file with the logins for registries, in the form that `docker login` writes.

        Nobody but the gateway's account (and its group) may read it. It is read anew for each image that is fetched,
        so a password can change at any time. By default what `docker login` of the gateway's own account left. To
        write one:

            docker --config /etc/hub-gateway/docker login registry.example.org

            c.ContainerProxy.registry_logins = "/etc/hub-gateway/docker/config.json"

        A login is for every image of its registry: with `allowed_images` is said which of them may run.
        """
    ).tag(config=True)
    pull_seconds = Float(900.0, help="How long (seconds) fetching an image may take.").tag(config=True)
    python = Unicode("python3", help="Python (3.8 or newer, with pyzmq) of the images.").tag(config=True)
    user = Unicode(
        "1000:1000",
        help="""Uid and gid of kernels whose owner is not mapped to a unix user.

        Kernels of all owners then share them; volumes should not be given to such kernels.
        """,
    ).tag(config=True)
    minimum_uid = Integer(1000, help="Kernels never run with a lower uid: root and system accounts.").tag(config=True)
    prohibited_uids = List(Integer(), default_value=[0, 65534], help="Uids that no kernel gets.").tag(config=True)
    prohibited_gids = List(
        Integer(),
        default_value=[0],
        help="""Gids that no kernel gets.

        A supplementary group of that gid is left out; where it is the user's primary group, the launch is refused. Add
        the group of the Docker socket: who is in it is root.
        """,
    ).tag(config=True)
    volumes = List(
        Dict(),
        help="""What kernels see of their host, as a list of `source`, `target` and, if wished, `read_only`.

        A source with a slash in front is a directory of the host, which must exist; any other is the name of a volume.
        `{username}` is the unix user's name, or the owner's where there is none. Example:

            c.DockerProxy.volumes = [{"source": "/srv/homes/{username}", "target": "/home/{username}"}]
            c.DockerProxy.allowed_host_roots = ["/srv/homes"]

        A kernelspec may add its own (`volumes` in `metadata.process_proxy.config`).
        """,
    ).tag(config=True)
    allowed_host_roots = List(
        Unicode(), help="Directories of the host below which volumes may lie. None, by default."
    ).tag(config=True)
    network = Unicode(
        help="Network of kernels, by which the gateway reaches them; a kernelspec may name another (`network`)."
    ).tag(config=True)
    extra_networks = List(Unicode(), help="Further networks that kernels join, for their data.").tag(config=True)
    home = Unicode("/home/{username}", help="Home directory in the container; in memory, where no volume is.").tag(
        config=True
    )
    read_only = Bool(
        True,
        help="""Whether the image's files are read-only.

        /tmp, the home directory and /run/hub-gateway are in memory then (`tmpfs_bytes`); nothing else can be written.
        """,
    ).tag(config=True)
    init = Bool(True, help="Whether Docker's init runs in front, which reaps what kernels leave.").tag(config=True)
    pids_limit = Integer(2048, help="How many processes and threads a container may have.").tag(config=True)
    tmpfs_bytes = Integer(2**30, help="The most (bytes) that a directory in memory may hold; it counts as memory.").tag(
        config=True
    )
    shm_bytes = Integer(256 * 2**20, help="Size (bytes) of /dev/shm, which PyTorch's workers share.").tag(config=True)
    log_driver = Unicode("json-file", help="Docker's log driver; one that can be read, not `none`.").tag(config=True)
    log_options = Dict(
        key_trait=Unicode(),
        value_trait=Unicode(),
        default_value={"max-size": "5m", "max-file": "2"},
        help="Options of the log driver: without limits a kernel fills the host's disk.",
    ).tag(config=True)
    timeout = Float(30.0, help="How long (seconds) Docker may take to answer a call.").tag(config=True)
    threads = Integer(16, help="How many calls to Docker may run at once.").tag(config=True)
    register_seconds = Float(
        45.0, help="How long (seconds) an agent may take from the start of its container until it listens."
    ).tag(config=True)
    shutdown_seconds = shutdown_option(10.0)
    launchers = Unicode(help="Directory of the agent that is shipped with kernels. By default the installed one.").tag(
        config=True
    )

    @default("url")
    def _default_url(self) -> str:
        return os.environ.get("DOCKER_HOST") or SOCKET

    @default("launchers")
    def _default_launchers(self) -> str:
        return str(launchers_dir())

    @validate("network")
    def _no_foreign_network(self, proposal: Any) -> str:
        name = str(proposal["value"])
        if _foreign(name):
            raise TraitError(
                f"{self.__class__.__name__}.network cannot be {name!r}: kernels need a network of their own"
            )
        return name

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.daemon = DockerDaemon(
            self.url, timeout=self.timeout, threads=self.threads, tls=self.tls, logins=self.registry_logins
        )
        self.wanted = self.configured()

    async def close(self) -> None:
        self.daemon.close()

    def configured(self) -> bool:
        """Whether the configuration speaks of such kernels."""
        return self.url != SOCKET or self._speaks_of(ProcessProxy)

    def _speaks_of(self, above: type[Configurable]) -> bool:
        """Whether the configuration sets options of this class, or of one between it and `above`."""
        return any(self.config.get(name) for name in {*self.section_names()} - {*above.section_names()})

    @property
    def unused(self) -> bool:
        """Whether this machine simply has no Docker, and nobody said that it should."""
        return self.url == SOCKET and not self.wanted and not Path(SOCKET.removeprefix("unix://")).exists()

    async def owned(self, gateway_id: str) -> Sequence[ClusterObject]:
        if self.unused:
            return []
        try:
            return await self.search(gateway_id)
        except (Unavailable, errors().APIError):
            if self.wanted:
                raise
            return []  # somebody else's Docker, which is not for this gateway

    @abc.abstractmethod
    async def search(self, gateway_id: str) -> Sequence[ClusterObject]:
        """What `owned` is to find. Raises `Unavailable`, `APIError`."""

    # The plan

    def plan(self, request: LaunchRequest) -> ContainerPlan:
        """What the container of a launch is to be. May block (NSS). Raises `LaunchRefused`, `LaunchFailed`."""
        uid, gid, groups = self._account(request)
        user = request.unix_user or request.owner
        names = {"username": user}
        templates = [*self.volumes, *listed(request, "volumes")]
        mounts = tuple(mount_of(one, names, tuple(self.allowed_host_roots)) for one in templates)
        home = mount_of({"source": "home", "target": self.home}, names, ()).target
        network = str(request.config.get("network") or self.network)
        if _foreign(network):
            raise LaunchFailed(
                f"The kernelspec {request.kernelspec} is not well described; ask the administrator.",
                hint=f"its network cannot be {network!r}: kernels need a network of their own",
            )
        return ContainerPlan(
            name=object_name(request.gateway_id, request.kernel_id, request.epoch),
            image=self._image(request),
            python=self.python,
            uid=uid,
            gid=gid,
            groups=groups,
            user=user,
            home=home,
            cwd=working_directory(request.cwd, home, mounts),
            labels=labels(request.gateway_id, request.kernel_id, request.epoch),
            mounts=mounts,
            networks=tuple(name for name in (network, *self.extra_networks) if name),
            resources=request.resources,
            limits=Limits(self.pids_limit, self.tmpfs_bytes, self.shm_bytes, self.log_driver, self.log_options),
            read_only=self.read_only,
            init=self.init,
        )

    def check_config(self, config: Mapping[str, JSON]) -> Iterator[Finding]:
        image = config.get("image_name") or config.get("image") or self.image
        if not image:
            yield Finding(
                "error", "image_name", "it names no image", f"name one, or set {self.__class__.__name__}.image"
            )
        elif self.allowed_images and not self._allows(str(image)):
            known = ", ".join(self.allowed_images)
            yield Finding(
                "error", "image_name", f"{image} may not run here", f"choose one of allowed_images ({known}), or add it"
            )
        if _foreign(str(config.get("network") or "")):
            yield Finding("error", "network", "kernels need a network of their own", "name one that was made for them")
        volumes: Any = config.get("volumes") or []
        for one in volumes:
            try:
                mount_of(one, {"username": "user"}, tuple(self.allowed_host_roots))
            except LaunchFailed as error:
                yield Finding("error", "volumes", error.message, error.hint)

    def _allows(self, image: str) -> bool:
        return any(fnmatchcase(image, pattern) for pattern in self.allowed_images)

    @property
    def _choice(self) -> bool:
        """Whether KERNEL_IMAGE may name another image than the kernelspec does."""
        return bool(self.allowed_images) and self.choose_images

    def _image(self, request: LaunchRequest) -> str:
        """The image of a launch; `image_name` and KERNEL_IMAGE are Enterprise Gateway's words."""
        named = str(request.config.get("image_name") or request.config.get("image") or self.image)
        wished = request.env.get("KERNEL_IMAGE") or named
        if not wished:
            raise LaunchFailed(
                f"The kernelspec {request.kernelspec} names no image for its kernels; ask the administrator.",
                hint="set image_name in metadata.process_proxy.config, or the proxy's `image`",
            )
        chosen = wished != named
        if (self.allowed_images and not self._allows(wished)) or (chosen and not self._choice):
            known = named if chosen and not self._choice else ", ".join(self.allowed_images)
            raise LaunchRefused(
                f"The image {wished[:200]!r} is not one that kernels may run here; allowed: {known}. "
                "Choose another one, or ask the administrator."
            )
        return wished

    def _account(self, request: LaunchRequest) -> tuple[int, int, tuple[int, ...]]:
        """Uid, gid and supplementary groups of a kernel."""
        if request.unix_user is None:
            uid, _, gid = self.user.partition(":")
            found = int(uid), int(gid or uid), list[int]()
            who = f"uid {uid}"
        else:
            who = f"the unix user {request.unix_user}"
            try:
                entry = pwd.getpwnam(request.unix_user)
            except KeyError as error:
                raise LaunchFailed(
                    f"There is no unix user {request.unix_user!r} on the gateway's machine, so no kernel can run as "
                    "that user; ask the administrator."
                ) from error
            found = entry.pw_uid, entry.pw_gid, os.getgrouplist(request.unix_user, entry.pw_gid)
        if found[0] < self.minimum_uid or found[0] in self.prohibited_uids or found[1] in self.prohibited_gids:
            raise LaunchRefused(
                f"Kernels never run as {who} (uid {found[0]}, gid {found[1]}); ask the administrator of the gateway."
            )
        groups = sorted({*found[2]} - {found[1], *self.prohibited_gids})
        return found[0], found[1], tuple(groups)

    def shipped(self) -> dict[str, bytes]:
        """What of launchers/ goes into each container. Blocks."""
        return {name: (Path(self.launchers) / name).read_bytes() for name in FILES}

    def check_logins(self, what: str) -> Iterator[Finding]:
        """What `check` says of the logins for registries. Blocks."""
        if self.registry_logins and (fault := fault_of_logins(self.registry_logins)):
            hint = "give the gateway's account a file as `docker login` writes it, or unset registry_logins"
            yield Finding("error", what, fault, hint)

    def not_used(self, what: str) -> list[Finding]:
        """What `check` says where there is no Docker at all."""
        return [Finding("ok", what, f"not in use: this machine has no Docker daemon ({self.url})")]


def _foreign(network: str) -> bool:
    """Whether a network is the host's, or another container's, where the agents' ports would collide; or none."""
    return network in ("host", "none") or network.startswith("container:")


def listed(request: LaunchRequest, name: str) -> list[Any]:
    """A list of a kernelspec's `metadata.process_proxy.config`. Raises `LaunchFailed`."""
    found = request.config.get(name) or []
    if not isinstance(found, list):
        raise LaunchFailed(
            f"The kernelspec {request.kernelspec} is not well described; ask the administrator.",
            hint=f"metadata.process_proxy.config.{name} must be a list",
        )
    return found
