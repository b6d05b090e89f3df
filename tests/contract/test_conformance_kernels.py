"""What every process proxy must do for a kernel's user: ask for input, and say how a kernel ended."""

from __future__ import annotations

from hub_gateway.kernels.types import KernelStatus
from tests.contract.conftest import Bench
from tests.contract.test_conformance import reserved
from tests.harness.waiting import eventually

KILLED = ["/bin/sh", "-c", "echo 'loading the model' >&2; kill -9 $$", "{connection_file}"]


async def test_input(bench: Bench) -> None:
    """A cell that asks its user gets the answer."""
    async with bench.gateway() as gateway:
        record = await gateway.start(bench.alice)
        client = await gateway.connect(bench.alice, record.id)
        request = {"code": "print(input('name? ')[::-1])", "silent": False, "store_history": True, "allow_stdin": True}
        asking = client.send("execute_request", {**request, "user_expressions": {}})
        asked = await client.receive(lambda message: message["msg_type"] == "input_request")
        assert asked["channel"] == "stdin" and asked["content"]["prompt"] == "name? "
        client.send("input_reply", {"value": "grace", "status": "ok"}, "stdin")
        text, reply = await client.result(asking)
        assert text == "ecarg\n" and reply["content"]["status"] == "ok"
        await gateway.service.shutdown(bench.alice, record.id)


async def test_killed_for_its_memory(bench: Bench) -> None:
    """What the out-of-memory killer does, 137 for a shell, is said in words, with what the kernel said last."""
    bench.add_spec("killed", {"argv": KILLED, "display_name": "Killed", "language": "none"})
    async with bench.gateway() as gateway:
        record = await gateway.start(bench.alice, "killed")
        assert record.status is KernelStatus.FAILED
        assert record.exit_code == 137
        assert "SIGKILL" in record.message and "out of memory" in record.message
        assert "loading the model" in record.message
        assert await reserved(gateway) == set()
        await eventually(lambda: not bench.leftovers(gateway), f"nothing left: {bench.leftovers(gateway)}")
