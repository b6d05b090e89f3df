"""A second node of a swarm: a dockerd in a network namespace of its own, which can be cut off."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from ipaddress import IPv4Address
from typing import Any

from docker.errors import APIError

from tests.engines.docker import IMAGE, SWARM_PORT, Dockerd, make_bridge, run
from tests.engines.images import root_archive
from tests.engines.mount_faults import MountFaults
from tests.harness.waiting import until

__all__ = ["LABEL", "SwarmNode"]

LABEL = "hgt=second"
"""What the swarm's scheduler knows the node by: both have the machine's name."""
CLONE_NEWNET = 0x40000000
HIGH = 200
"""Its place in the manager's network, above those of the containers there."""


class SwarmNode(Dockerd):
    """A worker of the swarm of `manager`. Its remounts fail as `faults` says."""

    def __init__(self, manager: Dockerd) -> None:
        super().__init__(live_restore=False)
        self.manager = manager
        self.namespace = self.name
        (self.directory / "namespace").write_text(self.namespace)
        self.wire = f"{self.bridge[:-1]}v"
        self.place = str(IPv4Address(manager.address) + HIGH)
        self.faults = MountFaults()
        self._id = self.hostname = ""

    def make_network(self) -> tuple[str, str]:
        within, inside = ("-n", self.namespace), f"{self.bridge[:-1]}n"
        run("ip", "netns", "add", self.namespace)
        run("ip", *within, "link", "set", "lo", "up")
        run("ip", "link", "add", self.wire, "type", "veth", "peer", "name", inside, "netns", self.namespace)
        run("ip", "link", "set", self.wire, "master", self.manager.bridge, "up")
        run("ip", *within, "addr", "add", f"{self.place}/24", "dev", inside)
        run("ip", *within, "link", "set", inside, "up")
        return make_bridge(self.bridge, *within)

    def before_exec(self) -> None:
        # Not `ip netns exec`, which would take the cgroups away with /sys.
        namespace = os.open(f"/run/netns/{self.namespace}", os.O_RDONLY | os.O_CLOEXEC)
        if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        self.faults.install()
        super().before_exec()

    def start(self) -> SwarmNode:
        super().start()
        self.faults.serve()
        return self

    def join(self) -> SwarmNode:
        """Be a node of the swarm, with the image that kernels need."""
        self.client.api.import_image_from_file(
            str(root_archive()), *IMAGE.split(":"), changes=["ENV PATH=/usr/local/bin:/usr/bin:/bin"]
        )
        tokens = self.manager.client.swarm.attrs["JoinTokens"]
        self.client.swarm.join(
            remote_addrs=[f"{self.manager.address}:{SWARM_PORT}"],
            join_token=tokens["Worker"],
            advertise_addr=self.place,
            listen_addr=f"{self.place}:{SWARM_PORT}",
            data_path_addr=self.place,
        )
        self._id = self.client.info()["Swarm"]["NodeID"]
        until(lambda: self._facts()["Status"]["State"] == "ready", "the second node is ready", timeout=60)
        self.hostname = str(self._facts()["Description"]["Hostname"])
        until(self._labelled, "the second node has its label", timeout=60)
        return self

    def _facts(self) -> dict[str, Any]:
        return dict(self.manager.client.api.inspect_node(self._id))

    def _labelled(self) -> bool:
        """Label it; false where the manager itself has just written to the node."""
        name, value = LABEL.split("=")
        try:
            spec = {"Role": "worker", "Availability": "active", "Labels": {name: value}}
            return bool(self.manager.client.nodes.get(self._id).update(spec))
        except APIError:
            return False

    def leave(self) -> None:
        """Go, as by `docker swarm leave`."""
        self.client.swarm.leave(force=True)

    def cut(self) -> None:
        """Be heard no more, and hear nobody."""
        run("ip", "link", "set", self.wire, "down")

    def mend(self) -> None:
        """Be there again."""
        run("ip", "link", "set", self.wire, "up")

    def remove(self) -> None:
        self.stop(signal.SIGKILL)  # nothing is to be saved, and a node of a swarm takes its time
        super().remove()
        if self._id:
            with contextlib.suppress(APIError):
                self.manager.client.api.remove_node(self._id, force=True)
