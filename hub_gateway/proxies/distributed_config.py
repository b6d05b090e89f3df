"""The options of the distributed proxy, and what they come to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from traitlets import Dict, Enum, Float, Integer, List, TraitError, Unicode, Union, default, validate

from hub_gateway.kernels.types import JSON, Resources
from hub_gateway.proxies.agent_config import shutdown_option
from hub_gateway.proxies.base import Finding
from hub_gateway.proxies.names import NAMES, DirectoryNames
from hub_gateway.proxies.specconfig import Check, names, ports
from hub_gateway.proxies.ssh_hosts import Host, Placement, host_of, listed
from hub_gateway.proxies.ssh_login import LoginOptions
from hub_gateway.proxies.ssh_node import NodeOptions
from hub_gateway.proxies.ssh_pool import SshOptions

__all__ = ["DistributedOptions"]

PLACEMENTS = tuple(one.value for one in Placement)


class DistributedOptions(LoginOptions):
    """Options of `DistributedProxy`: kernels on hosts that are reached by SSH."""

    options_of = "DistributedProxy"

    hosts = List(
        Union([Unicode(), Dict()]),
        help="""The hosts: `name`, `name:port`, `[IPv6 address]:port`, or a dict with `host` and any of these:

        `name` (how kernelspecs call it), `port`, `listen` (the address of the host on which agents listen, where it
        is not the one that SSH connects to) and `reach` (where gateways reach that address, behind a NAT).

        A kernelspec can choose some of them by `metadata.process_proxy.config.hosts`, or Enterprise Gateway's
        `remote_hosts`; its users one of these by KERNEL_REMOTE_HOST.
        Example: `c.DistributedProxy.hosts = ["node1", "node2", {"host": "10.0.0.3", "listen": "192.168.7.3"}]`
        """,
    ).tag(config=True)
    placement = Enum(
        PLACEMENTS,
        default_value=Placement.ROUND_ROBIN.value,
        help="""Which host takes the next kernel: the next one (`round-robin`), the one with the fewest kernels of this
        gateway (`least-connection`), or with the lowest load average for each CPU (`least-load`).

        Hosts that could not be reached of late come last in any case.
        """,
    ).tag(config=True)
    drained_hosts = List(
        Unicode(),
        help="""Hosts that take no new kernels; those that run go on.

        To drain a host without a word to the gateway, make `drain_file` on it.
        """,
    ).tag(config=True)
    drain_file = Unicode(
        "/etc/hub-gateway/drain",
        help="""A file on the hosts: where it exists, the host takes no new kernels. What is in it tells users why.""",
    ).tag(config=True)
    lost_hosts = List(
        Unicode(),
        help="""Hosts that will never be back: the kernels that ran on them count as ended, and hold nothing any more.

        Of a host that only does not answer nothing is known: its kernels are kept until it does.
        """,
    ).tag(config=True)
    known_hosts = List(
        Unicode(),
        help="""Files with the hosts' keys, in OpenSSH's format. A host whose key is not in them is not connected to.

        By default `~/.ssh/known_hosts` and `/etc/ssh/ssh_known_hosts`.
        """,
    ).tag(config=True)
    python = Unicode(
        "python3",
        help="""Python (3.8 or newer, with pyzmq) on the hosts. It runs the launcher and the agent, and kernels whose
        command begins with `python` or `python3`.""",
    ).tag(config=True)
    path = Unicode(help="PATH of kernels. By default the directory of `python`, then the system's.").tag(config=True)
    launchers_root = Unicode(
        "/var/tmp",  # noqa: S108 (what others made there is left alone)
        help="""Directory on the hosts for the launchers, which the gateway brings there. `{user}` is the login.

        Everybody can read it, and only the login may be able to write it. Where everybody may write, they are in a
        directory `hub-gateway-LOGIN-...` in it, with a name that nobody can guess, since whoever made it first would
        keep the gateway from using the host. Name another one, such as /var/lib/hub-gateway (made by an
        administrator), where /var/tmp is cleaned.
        """,
    ).tag(config=True)
    runtime_root = Unicode(
        "/tmp",  # noqa: S108 (what is made there is 0700, has a name of its own, and is refused otherwise)
        help="""Directory on the hosts that everybody may write to, with the sticky bit.

        In it each user whose kernels run there has a directory `hub-gateway-USER-...` with the mode 0700. Nobody can
        guess its name, since whoever made it first would keep that user from starting kernels.
        """,
    ).tag(config=True)
    calls_per_user = Integer(
        4,
        min=1,
        help="""How many of one user's kernels a host starts or ends at once; further ones take their turns.

        Where a user's login shell or home directory hangs, what was begun counts until the host has ended it, so that
        no more of it is heaped up there. Other users do not wait for it.
        """,
    ).tag(config=True)
    sudo_command = List(
        Unicode(),
        default_value=["sudo", "-n", "-H", "-u", "{user}", "--"],
        help="How who logs in gets to run the launcher as another user. The how-to has the rule for sudo.",
    ).tag(config=True)
    network = Enum(
        ("direct", "tunnel"),
        default_value="direct",
        help="""How gateways reach agents: at a port of the host, or through the SSH connection (`tunnel`).

        A tunnel needs no port but that of SSH, and costs the gateway five descriptors a kernel and some speed.
        What goes through either is encrypted from the gateway to the agent.
        """,
    ).tag(config=True)
    port_range = Unicode(
        help="""The ports of hosts on which agents may listen, as `first..last`; by default any. A kernel takes one.

        A kernelspec may have its own in `metadata.process_proxy.config.port_range`.
        """
    ).tag(config=True)
    limit_command = List(
        Unicode(),
        help="""Words before each kernel's command that have limits enforced: `{memory}` (bytes), `{cpu}` (cores) and
        `{cpu_percent}` are filled in. Words with a resource that a kernel does not ask for are left out.

        Without it nothing is enforced: the gateway counts what kernels ask for, and hosts let them take more.
        Where users have a systemd of their own (`loginctl enable-linger`), cgroups limit a kernel and all it starts:
        `["systemd-run", "--user", "--scope", "--quiet", "--property=MemoryMax={memory}",
        "--property=CPUQuota={cpu_percent}%", "--"]`. Everywhere, `["prlimit", "--as={memory}", "--"]` limits the
        address space of each single process.
        """,
    ).tag(config=True)
    connect_seconds = Float(10.0, help="How long (seconds) logging in to a host may take.").tag(config=True)
    ask_seconds = Float(5.0, help="How long (seconds) a host may take to say which kernels it has.").tag(config=True)
    retry_seconds = Float(
        30.0, help="How long (seconds) a host that could not be reached takes no new kernels if there are others."
    ).tag(config=True)
    shutdown_seconds = shutdown_option(12.0)

    @default("known_hosts")
    def _default_known_hosts(self) -> list[str]:
        return [str(Path("~/.ssh/known_hosts").expanduser()), "/etc/ssh/ssh_known_hosts"]

    @default("path")
    def _default_path(self) -> str:
        own = str(Path(self.python).parent) + ":" if "/" in self.python else ""
        return f"{own}/usr/local/bin:/usr/bin:/bin"

    @validate("hosts")
    def _check_hosts(self, proposal: Any) -> Any:
        names = [_read_host(written).name for written in proposal["value"]]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise TraitError(f"DistributedProxy.hosts has {', '.join(doubled)} more than once")
        return proposal["value"]

    @validate("port_range")
    def _check_port_range(self, proposal: Any) -> Any:
        _ports(proposal["value"])
        return proposal["value"]

    @validate("limit_command")
    def _check_limit_command(self, proposal: Any) -> Any:
        if proposal["value"] and not _named(proposal["value"]):
            raise TraitError("DistributedProxy.limit_command names no resource: {memory}, {cpu} or {cpu_percent}")
        return proposal["value"]

    # What kernelspecs say

    config_keys: ClassVar[Mapping[str, Check] | None] = {"hosts": names, "remote_hosts": names, "port_range": ports}

    def check_config(self, config: Mapping[str, JSON]) -> Iterator[Finding]:
        """What is wrong with a kernelspec's `metadata.process_proxy.config`, see `ProcessProxy`."""
        known = self.configured_hosts()
        if not known:
            yield Finding("warning", "hosts", "this gateway has no hosts yet", "set DistributedProxy.hosts")
            return
        unknown = [name for name in listed(config.get("hosts") or config.get("remote_hosts")) if name not in known]
        if unknown:
            yield Finding(
                "error",
                "hosts",
                f"this gateway has no host {', '.join(unknown)}",
                f"name some of {', '.join(known)}, or add them to DistributedProxy.hosts",
            )

    # What they come to

    def configured_hosts(self) -> dict[str, Host]:
        """The hosts, by name."""
        found = [_read_host(written) for written in self.hosts]
        return {host.name: host for host in found}

    def placement_rule(self) -> Placement:
        """Which host takes the next kernel."""
        return Placement(self.placement)

    def ssh_options(self) -> SshOptions:
        """How to connect."""
        files = tuple(Path(name).expanduser() for name in self.known_hosts)
        return SshOptions(files, self.authenticate, self.connect_seconds, self.calls_per_user, self.user)

    def node_options(self) -> NodeOptions:
        """How the launcher is called."""
        return NodeOptions(self.python, self.launchers_root, tuple(self.sudo_command), self._launcher_names)

    @cached_property
    def names(self) -> DirectoryNames:
        """Names for directories on hosts."""
        return DirectoryNames(getattr(self.parent, "state_dir", ""))

    def _launcher_names(self, login: str, host: str) -> list[str]:
        return [self.names.name(login, f"launchers/{login}/{host}/{number}") for number in range(NAMES)]

    def enforced(self) -> frozenset[str]:
        """The resources that `limit_command` has enforced."""
        return frozenset(_named(self.limit_command))

    def limits(self, resources: Resources) -> list[str]:
        """The words before a kernel's command."""
        values = {
            "{memory}": str(resources.memory) if resources.memory else "",
            "{cpu}": f"{resources.cpu:g}" if resources.cpu else "",
            "{cpu_percent}": f"{resources.cpu * 100:.0f}" if resources.cpu else "",
        }
        words, limited = [], False
        for word in self.limit_command:
            used = [name for name in values if name in word]
            if not all(values[name] for name in used):
                continue
            limited = limited or bool(used)
            for name in used:
                word = word.replace(name, values[name])
            words.append(word)
        return words if limited else []

    def port_limits(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """The first and the last port for an agent; 0 and 0 for any."""
        own = config.get("port_range")
        try:
            return _ports(own) if isinstance(own, str) else _ports(self.port_range)
        except TraitError as error:
            self.log.warning("A kernelspec's port_range is not heeded: %s", error)
            return _ports(self.port_range)


def _read_host(written: Any) -> Host:
    try:
        return host_of(written)
    except (ValueError, TypeError) as error:
        raise TraitError(f"DistributedProxy.hosts: {error}") from error


def _named(words: list[str]) -> set[str]:
    """The resources that a limit_command names."""
    text = " ".join(words)
    return {
        name
        for name, marks in (("memory", ("{memory}",)), ("cpu", ("{cpu}", "{cpu_percent}")))
        for m in marks
        if m in text
    }


def _ports(text: str) -> tuple[int, int]:
    """The ends of a range of ports; Enterprise Gateway writes 0..0 for any."""
    first, dots, last = text.partition("..")
    if not text or text == "0..0":
        return 0, 0
    if not (dots and first.isdigit() and last.isdigit() and 0 < int(first) <= int(last) < 65536):
        raise TraitError(f"{text!r} is no range of ports: write first..last, as 40000..40999")
    return int(first), int(last)
