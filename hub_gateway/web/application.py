"""Every address of the gateway, in one table."""

from __future__ import annotations

from typing import Any

from tornado.httputil import HTTPServerRequest
from tornado.web import Application, RequestHandler, _HandlerDelegate, url

from hub_gateway.services import Services
from hub_gateway.web.admin import (
    AdminKernelsHandler,
    AdminStopHandler,
    ClustersHandler,
    MaintenanceHandler,
    PeopleHandler,
)
from hub_gateway.web.base import BaseHandler, NotFoundHandler, TooLargeHandler, log_request
from hub_gateway.web.channels import ChannelsHandler
from hub_gateway.web.health import (
    APIRootHandler,
    HealthHandler,
    MetricsHandler,
    ReadyHandler,
    RootHandler,
    SpecHandler,
)
from hub_gateway.web.incoming import Incoming
from hub_gateway.web.kernels import InterruptHandler, KernelHandler, KernelsHandler, LaunchHandler, RestartHandler
from hub_gateway.web.kernelspecs import KernelSpecHandler, KernelSpecsHandler, ResourceHandler
from hub_gateway.web.limits import AnswerHandler, LimitsHandler, OneRequestHandler, QueueHandler, RequestsHandler
from hub_gateway.web.quota import (
    ApplyHandler,
    DiffHandler,
    ExplainHandler,
    ExportHandler,
    PoliciesHandler,
    PolicyHandler,
    PreviewHandler,
    SimulateHandler,
)
from hub_gateway.web.sessions import SessionHandler, SessionsHandler
from hub_gateway.web.trail import AuditHandler, IdentityHandler, ReleaseHandler, VerifyHandler
from hub_gateway.web.usage import CloseHandler, CorrectionsHandler, EntriesHandler, PricesHandler, UsageHandler

__all__ = ["ROUTES", "GatewayApplication", "make_application", "pages"]

KERNEL = "/api/kernels/([^/]+)"
ROUTES: tuple[tuple[str, type[BaseHandler]], ...] = (
    ("", RootHandler),
    ("/healthz", HealthHandler),
    ("/readyz", ReadyHandler),
    ("/metrics", MetricsHandler),
    ("/api", APIRootHandler),
    (r"/api/swagger\.(json|yaml)", SpecHandler),
    ("/api/kernelspecs", KernelSpecsHandler),
    ("/api/kernelspecs/([^/]+)", KernelSpecHandler),
    ("/kernelspecs/([^/]+)/(.+)", ResourceHandler),
    ("/api/kernels", KernelsHandler),
    (KERNEL, KernelHandler),
    (f"{KERNEL}/interrupt", InterruptHandler),
    (f"{KERNEL}/restart", RestartHandler),
    (f"{KERNEL}/channels", ChannelsHandler),
    ("/api/sessions", SessionsHandler),
    ("/api/sessions/([^/]+)", SessionHandler),
    ("/api/launch/([^/]+)", LaunchHandler),
    ("/api/limits", LimitsHandler),
    ("/api/queue", QueueHandler),
    ("/api/requests", RequestsHandler),
    ("/api/requests/([^/]+)", OneRequestHandler),
    ("/api/requests/([^/]+)/answer", AnswerHandler),
    ("/api/quota/policies", PoliciesHandler),
    ("/api/quota/policies/([^/]+)", PolicyHandler),
    ("/api/quota/policies/([^/]+)/preview", PreviewHandler),
    ("/api/quota/export", ExportHandler),
    ("/api/quota/diff", DiffHandler),
    ("/api/quota/apply", ApplyHandler),
    ("/api/quota/explain", ExplainHandler),
    ("/api/quota/simulate", SimulateHandler),
    ("/api/usage", UsageHandler),
    ("/api/prices", PricesHandler),
    ("/api/ledger/close", CloseHandler),
    ("/api/ledger/corrections", CorrectionsHandler),
    ("/api/ledger/entries", EntriesHandler),
    ("/api/audit", AuditHandler),
    ("/api/audit/verify", VerifyHandler),
    ("/api/identity", IdentityHandler),
    ("/api/identity/([^/]+)", ReleaseHandler),
    ("/api/maintenance", MaintenanceHandler),
    ("/api/admin/kernels", AdminKernelsHandler),
    ("/api/admin/kernels/stop", AdminStopHandler),
    ("/api/admin/people", PeopleHandler),
    ("/api/admin/clusters", ClustersHandler),
)
"""Path below base_url, and handler."""


class GatewayApplication(Application):
    """Refuses bodies that are too large with a sentence, where tornado would answer a bare 400."""

    def __init__(self, routes: list[Any], services: Services, **settings: Any) -> None:
        super().__init__(routes, **settings)
        self.services = services
        self.incoming = Incoming(services.web)

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> _HandlerDelegate:
        """The handler that was asked for, or the one that says that the body is too large."""
        found = super().find_handler(request, **kwargs)
        meant: type[RequestHandler] = found.handler_class
        limit = self.services.web.max_body_bytes
        if issubclass(meant, BaseHandler) and meant.max_body_bytes is not None:
            limit = min(limit, meant.max_body_bytes)
        length = request.headers.get("Content-Length", "")
        announced = int(length) if length.isascii() and length.isdigit() and len(length) < 19 else 0
        connection = request.connection
        set_limit = getattr(connection, "set_max_body_size", None)
        if set_limit is not None:
            # Above what is allowed, so that a body in chunks, which announces no length, meets our own limit too.
            set_limit(max(announced, 2 * limit))
        if announced <= limit:
            return found
        arguments = {"services": self.services, "limit": limit, "announced": announced}
        return self.get_handler_delegate(request, TooLargeHandler, arguments)


def pages() -> tuple[tuple[str, type[BaseHandler]], ...]:
    """The same for pages, which need a Hub; without one, jupyterhub's client (13 MB) is not even imported."""
    from hub_gateway.web import pages_admin as admin
    from hub_gateway.web import pages_identity as identity
    from hub_gateway.web import pages_ledger as ledger
    from hub_gateway.web import pages_people as people
    from hub_gateway.web import pages_policies as policies
    from hub_gateway.web import pages_user as user
    from hub_gateway.web.pages import CallbackHandler
    from hub_gateway.web.pages_clusters import ClustersHandler as ClustersPage
    from hub_gateway.web.pages_policyfile import PolicyFileHandler
    from hub_gateway.web.static import StaticHandler

    return (
        ("/home", user.HomeHandler),
        ("/kernels/([^/]+)/stop", user.StopHandler),
        ("/limits", user.LimitsHandler),
        (r"/requests/(\d{1,9})/withdraw", user.WithdrawHandler),
        ("/history", user.HistoryHandler),
        ("/admin/kernels", admin.KernelsHandler),
        ("/admin/kernels/stop", admin.StopKernelsHandler),
        ("/admin/policies", policies.PoliciesHandler),
        (r"/admin/policies/(?:\+|%2B)file", PolicyFileHandler),
        ("/admin/policies/([^/]+)", policies.PolicyHandler),
        ("/admin/people", people.PeopleHandler),
        ("/admin/people/([^/]+)", people.PersonHandler),
        ("/admin/groups", people.GroupsHandler),
        ("/admin/identity", identity.IdentityPage),
        ("/admin/identity/([^/]+)/release", identity.ReleasePage),
        ("/admin/clusters", ClustersPage),
        ("/admin/ledger", ledger.LedgerHandler),
        ("/admin/ledger/prices", ledger.PricesPage),
        ("/admin/ledger/close", ledger.ClosePage),
        ("/admin/ledger/correct", ledger.CorrectPage),
        ("/admin/requests", admin.RequestsHandler),
        (r"/admin/requests/(\d{1,9})", admin.AnswerHandler),
        ("/admin/queue", admin.QueueHandler),
        ("/admin/usage", admin.UsageHandler),
        ("/admin/audit", admin.AuditHandler),
        ("/admin/maintenance", admin.MaintenanceHandler),
        ("/oauth_callback", CallbackHandler),
        ("/static/(.+)", StaticHandler),
    )


def missing() -> type[BaseHandler]:
    """What answers at any other address where there are pages."""
    from hub_gateway.web.pages import MissingHandler

    return MissingHandler


def make_application(services: Services, *, base_url: str = "/") -> GatewayApplication:
    """The tornado application, with every address below `base_url`."""
    prefix = base_url.rstrip("/")
    routes = (*ROUTES, *pages()) if services.hub is not None else ROUTES
    arguments = {"services": services}
    return GatewayApplication(
        [url(f"{prefix}{path}/?" if path else f"{prefix}/?", handler, arguments) for path, handler in routes],
        services,
        default_handler_class=missing() if services.hub is not None else NotFoundHandler,
        default_handler_args=arguments,
        log_function=log_request,
        cookie_secret=services.web.cookie_secret,
        # Not xsrf_cookies: the REST API believes no cookie, and pages are protected by HubOAuth itself.
        websocket_max_message_size=services.web.max_message_bytes,
        websocket_ping_interval=services.web.ws_ping_interval,
        # Whether the client lives is judged by the FrameWriter: tornado would end a large message to a slow one.
        websocket_ping_timeout=0,
    )
