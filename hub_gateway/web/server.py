"""The HTTP server, which knows where a request really came from."""

from __future__ import annotations

from collections.abc import Awaitable

from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPConnection, HTTPHeaders, HTTPMessageDelegate, RequestStartLine, ResponseStartLine

__all__ = ["GatewayServer"]


class GatewayServer(HTTPServer):
    """Tornado's server, whose clients cannot choose their own address.

    With `xheaders` the address is the last one in X-Forwarded-For that is not in `trusted_downstream`: every proxy adds
    where it was called from at the end, and what stands before it is only what a client says. X-Real-Ip, which tornado
    would prefer, is not heeded, since the Hub's proxy hands on whatever a client puts into it.
    """

    def start_request(self, server_conn: object, request_conn: HTTPConnection) -> HTTPMessageDelegate:
        """The receiver of one request."""
        return _WithoutRealIp(super().start_request(server_conn, request_conn))


class _WithoutRealIp(HTTPMessageDelegate):
    def __init__(self, delegate: HTTPMessageDelegate) -> None:
        self.data_received = delegate.data_received  # type: ignore[method-assign]
        self.finish = delegate.finish  # type: ignore[method-assign]
        self.on_connection_close = delegate.on_connection_close  # type: ignore[method-assign]
        self._headers_received = delegate.headers_received

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None] | None:
        """Hand on the headers without the one."""
        headers.pop("X-Real-Ip", None)
        return self._headers_received(start_line, headers)
