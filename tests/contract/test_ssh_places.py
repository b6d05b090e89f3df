"""Where kernels and launchers lie on a host, so that no other user there can take the place, or look in."""

from __future__ import annotations

import pwd
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hub_gateway.kernels.types import KernelStatus
from tests.contract.conftest import Bench
from tests.contract.ssh_case import SSH_SUDO, USERS, usable_python
from tests.contract.suite import marks_of
from tests.contract.test_conformance import reserved
from tests.contract.test_conformance_ssh import gateway_with, nodes_of
from tests.engines.ssh import LOGIN, SshNodes

pytestmark = [
    *marks_of(*SSH_SUDO.needs),
    pytest.mark.parametrize("bench", [SSH_SUDO.name], indirect=True),
]


def squat(path: Path) -> None:
    """What another user of the node makes in its place."""
    path.mkdir()
    path.chmod(0o777)
    shutil.chown(path, USERS[1])


@pytest.fixture
def restart(bench: Bench) -> Callable[[Path], None]:
    """The node is started anew: what was in a directory for temporary files is gone."""

    def clear(directory: Path) -> None:
        for path in directory.iterdir():
            shutil.rmtree(path)

    return clear


async def test_nobody_takes_the_place_of_another_users_kernels(bench: Bench, restart: Callable[[Path], None]) -> None:
    """Bea makes what she knows, or has seen, that Ada's kernels are to have."""
    users = bench.state_dir / "users"
    squat(users / f"hub-gateway-{USERS[0]}")
    async with gateway_with(bench, hosts=nodes_of(bench).hosts[:1]) as gateway:
        places = set()
        for _ in range(3):
            record = await gateway.start(bench.alice)
            assert record.status is KernelStatus.RUNNING, record.message
            place = Path(str(record.proxy_state["runtime_dir"])).parent
            assert place.name.startswith(f"hub-gateway-{USERS[0]}-") and place not in places
            assert (place.stat().st_uid, place.stat().st_mode & 0o777) == (pwd.getpwnam(USERS[0]).pw_uid, 0o700)
            places.add(place)
            await gateway.service.shutdown(bench.alice, record.id)
            restart(users)
            for seen in places:
                squat(seen)
        restart(users)


async def test_a_kernel_whose_place_was_taken_can_be_ended(bench: Bench, restart: Callable[[Path], None]) -> None:
    users = bench.state_dir / "users"
    async with gateway_with(bench, hosts=nodes_of(bench).hosts[:1]) as gateway:
        record = await gateway.start(bench.alice)
        assert record.status is KernelStatus.RUNNING, record.message
        restart(users)
        squat(Path(str(record.proxy_state["runtime_dir"])).parent)
        await gateway.service.shutdown(bench.alice, record.id)
        assert bench.agents(gateway) == [] and await reserved(gateway) == set()
        restart(users)


async def test_a_directory_that_others_can_look_into_is_refused(bench: Bench) -> None:
    async with gateway_with(bench, hosts=nodes_of(bench).hosts[:1]) as gateway:
        record = await gateway.start(bench.alice)
        await gateway.service.shutdown(bench.alice, record.id)
        place = Path(str(record.proxy_state["runtime_dir"])).parent
        place.chmod(0o755)
        message = (await gateway.start(bench.alice)).message
        assert f"{place} has the mode 0755, where only its owner may look (0700)" in message
        assert message.endswith(".")


async def test_nobody_takes_the_place_of_the_launchers(bench: Bench, restart: Callable[[Path], None]) -> None:
    """Where everybody may make directories, they are in one that cannot be guessed; and are brought there once."""
    nodes, root = nodes_of(bench), bench.state_dir / "open"
    root.mkdir()
    root.chmod(0o1777)
    squat(root / f"hub-gateway-{LOGIN}")
    rule(nodes, root)
    seen: set[Path] = set()
    for _ in range(2):
        async with gateway_with(bench, hosts=nodes.hosts[:1], launchers_root=str(root)) as gateway:
            for _ in range(2):
                record = await gateway.start(bench.alice)
                assert record.status is KernelStatus.RUNNING, record.message
                await gateway.service.shutdown(bench.alice, record.id)
            (made,) = [path for path in root.iterdir() if path.owner() == LOGIN]
            assert made not in seen and len([path for path in made.iterdir() if path.is_dir()]) == 1
            seen.add(made)
        restart(root)
        for path in seen:
            squat(path)
    root.chmod(0o777)
    async with gateway_with(bench, hosts=nodes.hosts[:1], launchers_root=str(root)) as gateway:
        assert "lacks the sticky bit" in (await gateway.start(bench.alice)).message


def rule(nodes: SshNodes, root: Path) -> None:
    """The rule of sudo for launchers in a directory to which everybody may write."""
    pattern = f"{root}/hub-gateway-{LOGIN}-[0-9a-f]{{16}}/[0-9a-f]{{64}}/node\\.py"
    nodes.sudo_rule(usable_python(), pattern, *USERS)
