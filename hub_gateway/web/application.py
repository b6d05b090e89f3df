"""Every address of the gateway, in one table."""

from __future__ import annotations

from typing import Any

from tornado.web import Application, url

from hub_gateway.services import Services
from hub_gateway.web.base import NotFoundHandler, log_request
from hub_gateway.web.channels import ChannelsHandler
from hub_gateway.web.health import (
    APIRootHandler,
    HealthHandler,
    MetricsHandler,
    ReadyHandler,
    RootHandler,
    SpecHandler,
)
from hub_gateway.web.kernels import InterruptHandler, KernelHandler, KernelsHandler, LaunchHandler, RestartHandler
from hub_gateway.web.kernelspecs import KernelSpecHandler, KernelSpecsHandler, ResourceHandler
from hub_gateway.web.pages import CallbackHandler, HomeHandler
from hub_gateway.web.sessions import SessionHandler, SessionsHandler

__all__ = ["ROUTES", "make_application"]

KERNEL = "/api/kernels/([^/]+)"
ROUTES: tuple[tuple[str, Any], ...] = (
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
)
"""Path below base_url, and handler."""

PAGES: tuple[tuple[str, Any], ...] = (("/home", HomeHandler), ("/oauth_callback", CallbackHandler))
"""The same for pages, which need a Hub."""


def make_application(services: Services, *, base_url: str = "/") -> Application:
    """The tornado application, with every address below `base_url`."""
    prefix = base_url.rstrip("/")
    routes = (*ROUTES, *PAGES) if services.hub is not None else ROUTES
    arguments = {"services": services}
    return Application(
        [url(f"{prefix}{path}/?" if path else f"{prefix}/?", handler, arguments) for path, handler in routes],
        default_handler_class=NotFoundHandler,
        default_handler_args=arguments,
        log_function=log_request,
        cookie_secret=services.web.cookie_secret,
        # Not xsrf_cookies: the REST API believes no cookie, and pages are protected by HubOAuth itself.
        websocket_max_message_size=services.web.max_message_bytes,
        websocket_ping_interval=services.web.ws_ping_interval,
    )
