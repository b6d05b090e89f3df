"""The Grafana dashboards, as code: `python -m deploy.grafana.dashboards` writes the JSON files beside this one.

Import a JSON file in Grafana and choose the Prometheus data source that scrapes the gateways' `/metrics`. A test
holds the files equal to this module, and every expression to metrics that the gateway has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, QueryVariable, Row
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

__all__ = ["DASHBOARDS", "Plot", "rendered"]

SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
SELECTED = 'instance=~"$instance"'
DIRECTORY = Path(__file__).parent


@dataclass(frozen=True)
class Plot:
    """One panel: expressions by legend. `$S` is the selection of instances. Width in 24ths of the page."""

    title: str
    description: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    width: int = 8
    single: bool = False


def rate(metric: str, by: str = "", more: str = "") -> str:
    """Events per second, summed."""
    inner = f"rate({metric}{{$S{more}}}[$__rate_interval])"
    return f"sum by ({by}) ({inner})" if by else f"sum({inner})"


def quantile(share: float, metric: str, by: str = "") -> str:
    """A quantile of a histogram."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket{{$S}}[$__rate_interval])))"


def quantiles(metric: str) -> tuple[tuple[str, str], ...]:
    """Median and tail."""
    return (("median", quantile(0.5, metric)), ("p99", quantile(0.99, metric)))


FINISHED = rate("hubgateway_kernel_launch_duration_seconds_count", "proxy")
FAILED = rate("hubgateway_kernel_launch_duration_seconds_count", "proxy", ', status="failure"')

OPERATION: tuple[tuple[str, tuple[Plot, ...]], ...] = (
    (
        "Kernels",
        (
            Plot(
                "Kernels",
                "Kernels that gateways are linked to, by state.",
                "short",
                (("{{execution_state}}", "sum by (execution_state) (hubgateway_kernels_running{$S})"),),
            ),
            Plot(
                "Launches",
                "What became of requests for a kernel: admitted, queued, refused by a limit, failed.",
                "ops",
                (("{{outcome}}", rate("hubgateway_kernel_launches_total", "outcome")),),
            ),
            Plot(
                "Time to a usable kernel",
                "From admission until the kernel answers, or has failed.",
                "s",
                quantiles("hubgateway_kernel_launch_duration_seconds"),
            ),
            Plot(
                "Failed launches",
                "Kernels that were admitted and did not come up, as a share of all.",
                "percentunit",
                (("{{proxy}}", f"{FAILED} / {FINISHED}"),),
            ),
            Plot("Open notebooks", "Websockets.", "short", (("open", "sum(hubgateway_websockets_open{$S})"),)),
            Plot(
                "Output",
                "Messages from kernels that were handed to notebooks.",
                "ops",
                (("messages", rate("hubgateway_kernel_messages_relayed_total")),),
            ),
        ),
    ),
    (
        "Health",
        (
            Plot(
                "Event loop",
                "How late the event loop is: more than 50 ms is felt in every notebook.",
                "s",
                quantiles("hubgateway_event_loop_delay_seconds"),
            ),
            Plot(
                "HTTP errors",
                "Answers of 5xx.",
                "ops",
                (("{{method}}", rate("hubgateway_request_duration_seconds_count", "method", ', status="5xx"')),),
            ),
            Plot(
                "Errors survived",
                "Errors that a background loop swallowed and went on after; look into the log.",
                "ops",
                (("{{where}}", rate("hubgateway_errors_swallowed_total", "where")),),
            ),
            Plot(
                "Logins and tokens",
                "Look-ups of tokens. `stale` and `unavailable` mean that the Hub is away.",
                "ops",
                (("{{result}}", rate("hubgateway_authentications_total", "result")),),
            ),
            Plot(
                "Messages lost",
                "Messages that were no longer in an agent's buffer when they were asked for. Should be 0.",
                "ops",
                (("lost", rate("hubgateway_kernel_messages_lost_total")),),
            ),
            Plot(
                "Slow notebooks",
                "How often a slow websocket was paused.",
                "ops",
                (("pauses", rate("hubgateway_websocket_pauses_total")),),
            ),
        ),
    ),
)

TENANCY: tuple[tuple[str, tuple[Plot, ...]], ...] = (
    (
        "Now",
        (
            Plot(
                "Kernels held",
                "Live kernels, pending ones too.",
                "short",
                (("", 'max(hubgateway_resources_held{resource="kernels", $S})'),),
                6,
                True,
            ),
            Plot("Queued", "Kernels that wait.", "short", (("", "max(hubgateway_kernels_queued{$S})"),), 6, True),
            Plot(
                "Policies",
                "Policies and grants that hold now.",
                "short",
                (("", "max(hubgateway_policies_active{$S})"),),
                6,
                True,
            ),
            Plot(
                "Maintenance",
                "1: nothing is launched.",
                "bool_yes_no",
                (("", "max(hubgateway_maintenance_enabled{$S})"),),
                6,
                True,
            ),
        ),
    ),
    (
        "Limits",
        (
            Plot(
                "Use of shared limits",
                "Use of each limit that is counted together, as a share of its hard limit.",
                "percentunit",
                (("{{policy}}", "max by (policy) (hubgateway_quota_use_ratio{$S})"),),
                12,
            ),
            Plot(
                "Refusals",
                "Launches that a limit refused, by what was limited.",
                "ops",
                (("{{resource}}", rate("hubgateway_quota_refusals_total", "resource")),),
                12,
            ),
            Plot(
                "Resources held",
                "What live kernels hold: cores and GPUs.",
                "short",
                (("{{resource}}", 'max by (resource) (hubgateway_resources_held{resource=~"cpu|gpu", $S})'),),
            ),
            Plot(
                "Memory held",
                "What live kernels hold of memory.",
                "bytes",
                (("memory", 'max(hubgateway_resources_held{resource="memory", $S})'),),
            ),
            Plot(
                "Wait in queues",
                "How long kernels waited that were admitted from a queue.",
                "s",
                quantiles("hubgateway_queue_wait_duration_seconds"),
            ),
            Plot(
                "Admission",
                "Duration of the transaction that admits a kernel.",
                "s",
                quantiles("hubgateway_admission_duration_seconds"),
            ),
            Plot(
                "Notices",
                "Notices about limits.",
                "ops",
                (("{{channel}} {{outcome}}", rate("hubgateway_notices_sent_total", "channel, outcome")),),
            ),
            Plot(
                "Records",
                "Lines of the ledger and of the audit trail.",
                "ops",
                (
                    ("ledger", rate("hubgateway_ledger_entries_written_total")),
                    ("audit", rate("hubgateway_audit_entries_written_total")),
                ),
            ),
        ),
    ),
)

DASHBOARDS = {
    "operation": ("Hub Gateway: operation", OPERATION),
    "tenancy": ("Hub Gateway: limits and use", TENANCY),
}


def rendered(name: str) -> str:
    """The JSON of a dashboard."""
    title, rows = DASHBOARDS[name]
    board = (
        Dashboard(title)
        .uid(f"hub-gateway-{name}")
        .tags(["hub-gateway", "jupyterhub"])
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("browser")
        .with_variable(DatasourceVariable("source").label("Data source").type("prometheus"))
        .with_variable(
            QueryVariable("instance")
            .label("Replica")
            .datasource(SOURCE)
            .query("label_values(hubgateway_kernels_queued, instance)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    )
    for row, plots in rows:
        board = board.with_row(Row(row))
        for plot in plots:
            board = board.with_panel(panel(plot))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def panel(plot: Plot) -> stat.Panel | timeseries.Panel:
    """One panel."""
    made: stat.Panel | timeseries.Panel
    if plot.single:
        made = stat.Panel().height(4)
    else:
        legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
        made = timeseries.Panel().legend(legend.show_legend(True)).min(0).fill_opacity(8).height(8)
    made = made.title(plot.title).description(plot.description).unit(plot.unit).datasource(SOURCE).span(plot.width)
    for number, (legend_text, expression) in enumerate(plot.queries):
        query = prometheus.Dataquery().expr(expression.replace("$S", SELECTED)).legend_format(legend_text)
        made = made.with_target(query.ref_id(chr(ord("A") + number)))
    return made


def main(names: Sequence[str] = tuple(DASHBOARDS)) -> None:
    """Write the files."""
    for name in names:
        (DIRECTORY / f"{name}.json").write_text(rendered(name))


if __name__ == "__main__":
    main()
