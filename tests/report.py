"""A pytest plugin: which suites did not run, and why, as a table at the end; in CI that is a failure.

`@pytest.mark.needs("chromium")` skips a test where the engine is missing (see tests/engines). With CI=true
every skip fails, except where its reason starts with "not applicable": that test means nothing on this platform.

    python -m tests.report DIRECTORY

prints one table for the runs that were recorded with `--suite-report=DIRECTORY/NAME.json`.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.engines import missing

__all__ = ["in_ci"]

NOT_APPLICABLE = "not applicable"
Skips = Counter[tuple[str, str]]
SKIPS = pytest.StashKey[Skips]()


def in_ci() -> bool:
    """Whether an absent engine is a failure."""
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite-report", metavar="FILE", help="record what was run and what was skipped, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*engines): programs beside Python that the test drives for real")
    config.stash[SKIPS] = Counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a missing engine; the whole run, where it is to be on a missing PostgreSQL."""
    everywhere = ["postgresql"] if os.environ.get("HUB_GATEWAY_TEST_DB") == "postgresql" else []
    for item in items:
        needed = [*everywhere, *(name for mark in item.iter_markers("needs") for name in mark.args)]
        reasons = [reason for reason in map(missing, needed) if reason]
        if reasons:
            item.add_marker(pytest.mark.skip(reason="; ".join(reasons)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if in_ci() and not reason.startswith(NOT_APPLICABLE):
            report.outcome = "failed"
            report.longrepr = f"skipped in CI, where everything must run: {reason}"
        else:
            item.config.stash[SKIPS][item.nodeid.split("::")[0], reason] += 1
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    skips = config.stash[SKIPS]
    counts = {name: len(terminalreporter.stats.get(name, ())) for name in ("passed", "failed", "error")}
    if file := config.getoption("--suite-report"):
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [[suite, reason, count] for (suite, reason), count in sorted(skips.items())]
        path.write_text(json.dumps({"exit": int(exitstatus), **counts, "skipped": rows}, indent=1))
    elif skips:
        terminalreporter.section("skipped suites")
        for (suite, reason), count in sorted(skips.items()):
            terminalreporter.line(f"{count:4}  {suite}: {reason}")


def main(directory: str) -> int:
    """Print one table over the recorded runs."""
    files = sorted(Path(directory).glob("*.json"))
    print("\nrun          passed  failed  errors  skipped")
    rows: list[str] = []
    for file in files:
        run = json.loads(file.read_text())
        skipped = sum(row[2] for row in run["skipped"])
        print(f"{file.stem:12} {run['passed']:6}  {run['failed']:6}  {run['error']:6}  {skipped:7}")
        rows += [f"{file.stem:12} {count:4}  {suite}: {reason}" for suite, reason, count in run["skipped"]]
    print("\nskipped suites:" if rows else "\nskipped suites: none", *rows, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
