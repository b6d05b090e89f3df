"""`make engines E=ssh`: bring engines up for use by hand, say how to reach each, and end them with Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.engines.docker import IMAGE, docker_engine, swarm_engine
from tests.engines.kdc import Kdc
from tests.engines.kdc_ldap import LdapKdc
from tests.engines.ssh import LOGIN, SshNodes

__all__ = ["HAND", "main"]


def ssh(directory: Path, ending: ExitStack) -> Iterator[str]:
    """OpenSSH servers."""
    nodes = SshNodes(directory)
    ending.callback(nodes.stop)
    yield f"the key lets in {LOGIN}; c.DistributedProxy.hosts = {nodes.hosts}"
    for node in nodes.nodes:
        yield f"ssh -i {nodes.key} -o UserKnownHostsFile={nodes.known_hosts} -p {node.port} {LOGIN}@{node.address}"


def kerberos(directory: Path, ending: ExitStack) -> Iterator[str]:
    """A KDC."""
    kdc = Kdc(directory).start()
    ending.callback(kdc.stop)
    keytab = kdc.keytab("alice", "alice")
    yield f"realm {kdc.realm}; more principals: KRB5_KDC_PROFILE={directory}/kdc.conf kadmin.local"
    yield f"KRB5_CONFIG={kdc.krb5_conf} kinit -kt {keytab} alice"


def s4u(directory: Path, ending: ExitStack) -> Iterator[str]:
    """A KDC with constrained delegation."""
    kdc = LdapKdc(directory)
    ending.callback(kdc.stop)
    kdc.start()
    kdc.person("alice")
    keytab = kdc.keytab("gateway", "hub-gateway/localhost")
    kdc.keytab("service", "HTTP/localhost")
    kdc.change("hub-gateway/localhost", "+ok_to_auth_as_delegate")
    kdc.delegates("hub-gateway/localhost", "HTTP/localhost")
    yield f"realm {kdc.realm}; more principals: KRB5_KDC_PROFILE={directory}/kdc.conf kadmin.local"
    yield (
        f"export KRB5_CONFIG={kdc.krb5_conf} KRB5CCNAME=FILE:{directory}/ccache; "
        f"kinit -kt {keytab} hub-gateway/localhost && kvno -q -I alice -P HTTP/localhost"
    )


def docker(directory: Path, ending: ExitStack) -> Iterator[str]:
    """A daemon."""
    yield f"DOCKER_HOST={docker_engine().url} docker run --rm -it {IMAGE} python3"


def swarm(directory: Path, ending: ExitStack) -> Iterator[str]:
    """A swarm of one node."""
    yield f"DOCKER_HOST={swarm_engine().url} docker service create {IMAGE} sleep 600"


HAND: dict[str, Callable[[Path, ExitStack], Iterator[str]]] = {
    "ssh": ssh,
    "kerberos": kerberos,
    "s4u": s4u,
    "docker": docker,
    "swarm": swarm,
}


def main(arguments: list[str] | None = None, forever: Callable[[], object] = signal.pause) -> int:
    """Bring up those that are named, or all; 1 if none of them can be there, with the reason of each."""
    parser = argparse.ArgumentParser(prog="make engines", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="E", help=f"which: {', '.join(HAND)}; by default all")
    names = parser.parse_args(arguments).names or list(HAND)
    if unknown := set(names) - set(HAND):
        parser.error(f"there is no engine {', '.join(sorted(unknown))}; there are {', '.join(HAND)}")
    up = 0
    with ExitStack() as ending:
        directory = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="hgt-hand-", dir="/tmp")))
        directory.chmod(0o755)
        for name in names:
            try:
                for line in HAND[name](directory / name, ending):
                    print(f"{name}: {line}", flush=True)
                up += 1
            except pytest.skip.Exception as reason:
                print(f"{name}: not here: {reason}", flush=True)
        if up:
            print("Ctrl-C ends them.", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                forever()
    return 0 if up else 1


if __name__ == "__main__":
    sys.exit(main())
