"""`python -m benchmarks`: measure everything in one run and print one table."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks import control, engines, tenancy, traffic
from benchmarks.bench import Bench, settle
from benchmarks.gateways import EnterpriseGateway, HubGateway
from benchmarks.report import Report, Row, machine

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "explanation" / "performance-results.md"
MEASURES: dict[str, Callable[[Bench], list[Row]]] = {
    "pass": traffic.round_trips,
    "flood": traffic.floods,
    "large": traffic.large_messages,
    "memory": traffic.memory,
    "open": control.opening,
    "list": control.listing,
    "stalls": control.stalls,
    "starts": control.starts,
    "tornado": traffic.with_tornado,
    "engines": engines.starts,
    "idle": engines.idle_kernels,
    "dead": engines.dead_host,
    "admission": tenancy.admission,
    "report": tenancy.usage_report,
    "admin": tenancy.admin_table,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--eg-python", type=os.path.abspath, help="interpreter of an environment with Enterprise Gateway 3.3.0"
    )
    parser.add_argument("--only", default=",".join(MEASURES), help="comma-separated: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a third of the rounds")
    parser.add_argument("--write", action="store_true", help=f"write the table to {PAGE.relative_to(ROOT)}")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    parser.add_argument("--keep", type=Path, help="directory for the gateways' logs; kept")
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - set(MEASURES)
    if unknown:
        parser.error(f"no such measure: {', '.join(sorted(unknown))}")
    return options


def main() -> int:
    """Run the chosen measures; 1 if one of them could not be made, whether or not aims are met."""
    options = arguments()
    # Kernels import the same byte code, whoever starts them.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    report = Report(machine(options.eg_python))
    directory = options.keep or Path(tempfile.mkdtemp(prefix="hg-bench-"))
    failed = False
    with ExitStack() as stack:
        if not options.keep:
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
        bench = Bench(
            hub=stack.enter_context(HubGateway(directory / "hub")),
            eg=None,
            eg_python=options.eg_python,
            directory=directory,
            report=report,
            quick=options.quick,
        )
        if options.eg_python:
            bench.eg = stack.enter_context(EnterpriseGateway(bench.fresh("eg"), options.eg_python))
        for name in options.only.split(","):
            report.others[name] = settle(patience=5 if options.quick else 60)
            print(f"{name} ... (others use {report.others[name]:.0f} % of the CPU)", file=sys.stderr, flush=True)
            try:
                rows = MEASURES[name](bench)
            except (AssertionError, OSError, RuntimeError) as error:
                rows = [Row(name, ours=f"failed: {error}".splitlines()[0], met=False)]
                failed = True
            report.rows += rows
            for row in rows:
                print("   ", *row.cells(), sep=" | ", file=sys.stderr, flush=True)
    print(report.text())
    print("\n" + report.surroundings())
    if options.json:
        report.write_json(options.json)
    if options.write:
        report.write(PAGE)
        report.write_json(PAGE.with_suffix(".json"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
