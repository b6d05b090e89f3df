"""A gateway without its web layer, in this process or as a process of its own (`python -m tests.contract.mini`)."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import zmq
from traitlets.config import Config, Configurable

from hub_gateway.auth.base import Caller
from hub_gateway.db import migrate
from hub_gateway.db.engine import Database
from hub_gateway.db.secrets import Vault
from hub_gateway.identity.ccaches import CredentialStore
from hub_gateway.identity.credentials import Credentials
from hub_gateway.kernels.controller import Controller
from hub_gateway.kernels.service import CreateKernel, KernelService
from hub_gateway.kernels.specs import KernelSpecs
from hub_gateway.kernels.types import KernelRecord, KernelStatus
from hub_gateway.link.relay import KernelRelay
from hub_gateway.proxies.registry import Proxies
from tests.contract.client import KernelClient

__all__ = ["MiniGateway", "Setup"]


@dataclass(frozen=True)
class Setup:
    """What outlives a gateway: where its state is, and how it is configured. JSON-able."""

    state_dir: str
    db_url: str
    kernel_dirs: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)


class MiniGateway:
    """Controller and service on a setup; as many lives as wanted, one after the other."""

    def __init__(self, setup: Setup) -> None:
        config = Config({name: dict(traits) for name, traits in setup.config.items()})
        config.KernelSpecManager.kernel_dirs = list(setup.kernel_dirs)
        config.KernelSpecManager.ensure_native_kernel = False
        config.KernelSpecs.unauthorized_users = []
        parent = Configurable(config=config)
        self.zmq = zmq.Context()
        self.db = Database(setup.db_url)
        migrate.prepare(self.db, upgrade_older=True)
        self.credentials = Credentials(store=CredentialStore(state_dir=setup.state_dir, parent=parent), parent=parent)
        self.proxies = Proxies(state_dir=setup.state_dir, credentials=self.credentials, parent=parent)
        self.controller = Controller(
            db=self.db,
            vault=Vault.from_file(Path(setup.state_dir) / "secret_keys"),
            proxies=self.proxies,
            make_relay=lambda kernel_id: KernelRelay(kernel_id, zmq_context=self.zmq),
            instance=uuid.uuid4().hex,
            replica="contract",
            parent=parent,
        )
        self.service = KernelService(controller=self.controller, specs=KernelSpecs(parent=parent), parent=parent)

    async def __aenter__(self) -> MiniGateway:
        self.credentials.start([record.id for record in await self.controller.store.live()])
        await self.controller.start(sole=True)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.controller.close()
        await self.credentials.close()
        await self.db.close()
        self.zmq.destroy(linger=0)

    @property
    def gateway_id(self) -> str:
        return self.controller.gateway_id

    async def start(self, caller: Caller, name: str = "python", timeout: float = 60, **more: Any) -> KernelRecord:
        """Create a kernel and wait until it is up, or has failed."""
        record = await self.service.create(caller, CreateKernel(name=name, **more))
        return await self.settled(record.id, timeout)

    async def settled(self, kernel_id: str, timeout: float = 60) -> KernelRecord:
        """The kernel when it is neither starting nor stopping any more."""
        moving = (KernelStatus.STARTING, KernelStatus.STOPPING)
        record = await self.controller.wait(kernel_id, lambda row: row is None or row.status not in moving, timeout)
        assert record is not None and record.status not in moving, f"still {record}"
        return record

    async def connect(self, caller: Caller, kernel_id: str, session: str | None = None) -> KernelClient:
        """A client's websocket, without the websocket."""
        return KernelClient(await self.service.relay(caller, kernel_id), session or uuid.uuid4().hex)


async def _live(setup: Setup, caller: str, spec: str) -> None:
    gateway = MiniGateway(setup)
    async with gateway:
        record = await gateway.service.create(Caller(caller), CreateKernel(name=spec))
        print(record.id, flush=True)
        record = await gateway.settled(record.id)
        print(record.status.value, flush=True)
        if sys.stdin.readline() == "stop\n":
            await gateway.service.shutdown(Caller(caller), record.id)
            print("stopped", flush=True)


def arguments(setup: Setup, caller: str, spec: str) -> list[str]:
    """The command line of a gateway process that starts one kernel and says so."""
    return [sys.executable, "-m", "tests.contract.mini", json.dumps([asdict(setup), caller, spec])]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    given, user, wanted = json.loads(sys.argv[1])
    asyncio.run(_live(Setup(**given), user, wanted))
