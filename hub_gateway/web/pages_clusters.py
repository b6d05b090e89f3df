"""The clusters: what each is, how many kernels it has, and whether it can be reached."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session as Transaction
from tornado.web import authenticated

from hub_gateway.auth.scopes import KERNELS_READ, powers
from hub_gateway.db.models import Kernel
from hub_gateway.errors import NotFound
from hub_gateway.kernels.types import KernelStatus
from hub_gateway.proxies.base import Finding
from hub_gateway.web.admin import cluster_findings
from hub_gateway.web.console import ConsoleHandler

__all__ = ["ClustersHandler"]

ALL = "*"


class ClustersHandler(ConsoleHandler):
    """Every process proxy; `?check=` asks one of them, or all, how they are."""

    @authenticated
    async def get(self) -> None:
        self.require(KERNELS_READ)
        proxies = dict(sorted(self.services.kernels.controller.proxies.all()))
        wanted = self.get_query_argument("check", "")[:200]
        if wanted and wanted != ALL and wanted not in proxies:
            raise NotFound(f"This gateway has no cluster {wanted[:100]!r}.")
        findings: dict[str, list[Finding]] = {}
        if wanted:
            findings = await cluster_findings(self.services, None if wanted == ALL else wanted)
        # How much goes on is for who may see everybody's kernels.
        counts = await self.services.db.read(_counts) if powers(self.caller, KERNELS_READ).everything else None
        self.page(
            "admin_clusters.html",
            "Clusters",
            "admin/clusters",
            proxies=proxies,
            findings=findings,
            counts=counts,
            state=_state,
            all=ALL,
        )


def _counts(tx: Transaction) -> dict[str, dict[str, int]]:
    """How many kernels each has, by status."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    statement = (
        select(Kernel.proxy, Kernel.status, func.count())
        .where(Kernel.status != KernelStatus.STOPPED.value)
        .group_by(Kernel.proxy, Kernel.status)
    )
    for proxy, status, count in tx.execute(statement):
        found[proxy][status] = count
    return found


def _state(findings: list[Any]) -> str:
    """The worst of what was found."""
    levels = [finding.level for finding in findings]
    return next((level for level in ("error", "warning") if level in levels), "ok")
