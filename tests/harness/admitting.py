"""A process that admits kernels and gives them back, as fast as it can, beside others of its kind.

`python -m tests.harness.admitting URL KEY NAME COUNT`: it says `ready`, waits for a line, admits `COUNT` kernels of
several users one after the other, and says as JSON what came of each: `admitted`, `refused`, or the name of an error.
With the line `churn` it gives one back where a launch is refused, and never holds more than two, so that room comes and
goes.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter

from sqlalchemy import update

from hub_gateway.db.engine import Database
from hub_gateway.db.models import Kernel, utcnow
from hub_gateway.db.secrets import Vault
from hub_gateway.errors import GatewayError, LaunchRefused
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import Resources
from tests.harness.quotas import new


async def admit_and_release(url: str, key: str, name: str, count: int) -> None:
    db = Database(url, pool_size=2, timeout=60.0)
    store = KernelStore(db, Vault([key]), instance=name)
    await db.check()
    print("ready", flush=True)
    churn = sys.stdin.readline().strip() == "churn"
    outcomes: Counter[str] = Counter()
    held: list[str] = []
    for number in range(count):
        kernel = new(0, f"user{number % 5}", id=f"{name}-{number}", groups=("lab",), resources=Resources(cpu=0.1))
        full = False
        try:
            await store.admit(kernel)
            outcomes["admitted"] += 1
            held.append(kernel.id)
        except LaunchRefused:
            outcomes["refused"] += 1
            full = True
        except GatewayError as error:
            outcomes[type(error).__name__] += 1
        if churn and held and (full or len(held) > 2):
            await end(store, held.pop(0))
    print(json.dumps(outcomes), flush=True)
    await db.close()


async def end(store: KernelStore, kernel_id: str) -> None:
    def write(tx: object) -> None:
        store.admission.release(tx, kernel_id, utcnow())  # type: ignore[arg-type]
        tx.execute(update(Kernel).where(Kernel.id == kernel_id).values(status="stopped"))  # type: ignore[attr-defined]

    await store.write(write)


if __name__ == "__main__":
    asyncio.run(admit_and_release(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
