"""The small HTTP servers of a run: every rank's metrics, and the driver's page. What goes wrong here never reaches
training."""

from __future__ import annotations

import contextlib
import functools
import hmac
import io
import logging
import os
import re
import socket
import threading
import weakref
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

logger = logging.getLogger(__name__)

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]
"""WSGI."""

CONNECTIONS = 32
"""Answered at a time; what comes beyond is turned away, so that nobody fills a rank with threads."""
PATIENCE_SECONDS = 10.0
"""For a peer that sends or takes nothing."""
REQUEST_SECONDS = 30.0
"""For a whole request and its answer, however busily a peer sends or takes."""
COOKIE = "symile_token"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_WILDCARDS = ("", "0.0.0.0", "::")


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 16

    def __init__(self, *arguments: Any) -> None:
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(*arguments)

    def server_bind(self) -> None:
        super(WSGIServer, self).server_bind()
        # Not HTTPServer's: that asks the name service for the host's full name, which may take half a minute.
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread is left
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a request of %s failed", client_address, exc_info=True)


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Quiet(io.TextIOBase):
    """Where wsgiref tells of an answer that failed: a peer that goes away in the midst is no event of the run's."""

    def write(self, text: str) -> int:
        logger.debug("%s", text.rstrip())
        return len(text)


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE_SECONDS

    def setup(self) -> None:
        super().setup()
        # `timeout` begins anew with every byte that comes; this does not.
        self._deadline = threading.Timer(REQUEST_SECONDS, self._give_up)
        self._deadline.daemon = True
        self._deadline.start()

    def _give_up(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def get_stderr(self) -> Any:
        return _Quiet()

    def finish(self) -> None:
        self._deadline.cancel()
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *arguments: Any) -> None:
        """Nothing: a line every five seconds would drown the run's own."""


class HttpServer:
    """Serves a WSGI application in threads. Safe to make anywhere: nothing that goes wrong with the network raises.

    Where `port` is taken any free one is used; where no server can be started `port` is None.
    """

    def __init__(
        self,
        application: Application,
        address: str,
        port: int = 0,
        token: str | None = None,
        host: str | None = None,
    ) -> None:
        """
        Args:
            address: the interface to bind. Beyond loopback anyone who reaches it can read what is served, unless a
                token is asked for.
            port: where to listen; 0 takes any free port.
            token: what every request must carry: as `Authorization: Bearer TOKEN` (Prometheus), or once as
                `?token=TOKEN` (a browser, which gets a cookie).
            host: how other machines call this one, where `address` is all interfaces; by default its name.
        """
        self.address = address
        self._host = host or socket.gethostname()
        self.port: int | None = None
        self._server: WSGIServer | None = None
        if token:
            guarded = asking_for(token, application)
        else:
            guarded = for_this_machine(application) if address in LOOPBACK else application
        for candidate in (port, 0) if port else (0,):
            try:
                kind = _ServerV6 if ":" in address else _Server
                self._server = make_server(address, candidate, guarded, kind, _Handler)
                # So long, in seconds, does `close` wait.
                serve = functools.partial(self._server.serve_forever, poll_interval=0.1)
                self._thread = threading.Thread(target=serve, daemon=True, name="metrics")
                self._thread.start()
            except Exception as error:
                # Whatever it is (taken, not permitted, no such address, no thread left), training matters more.
                if self._server is not None:
                    self._server.server_close()
                    self._server = None
                logger.warning("nothing is served on %s:%d: %s", address, candidate, error)
            else:
                self.port = self._server.server_port
                # A forked data loader worker would inherit the socket and hold the port after this process is gone.
                os.register_at_fork(after_in_child=functools.partial(_release_in_child, weakref.ref(self)))
                return

    def url(self, path: str = "/") -> str | None:
        """Where others find it; None where nothing is served."""
        if self.port is None:
            return None
        host = self._host if self.address in _WILDCARDS else self.address
        return f"http://[{host}]:{self.port}{path}" if ":" in host else f"http://{host}:{self.port}{path}"

    def close(self) -> None:
        """Stops and frees the port; may be called twice."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join(timeout=5)
        self._server = self.port = None

    def release_in_child(self) -> None:
        """The thread that serves does not exist in a forked child: close() would wait for it for ever."""
        if self._server is not None:
            self._server.socket.close()
        self._server = self.port = None


def _release_in_child(reference: weakref.ref[HttpServer]) -> None:
    server = reference()
    if server is not None:
        server.release_in_child()


def asking_for(token: str, application: Application) -> Application:
    """The application behind a token."""

    def guarded(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        scheme, _, bearer = str(environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
        # Browsers send a cookie to all ports of a host: each run's has a name of its own.
        cookie = f"{COOKIE}_{environ.get('SERVER_PORT', '')}"
        if scheme.lower() == "bearer" and _same(bearer.strip(), token):
            return application(environ, start_response)
        if any(_same(value, token) for value in _cookies(environ, cookie)):
            return application(environ, start_response)
        given = parse_qs(str(environ.get("QUERY_STRING", ""))).get("token", [""])[0]
        if _same(given, token):
            # Relative: a proxy may have put a path before it. Nothing of the request goes into the answer.
            set_cookie = f"{cookie}={token}; HttpOnly; SameSite=Strict; Path=/"
            start_response("303 See Other", [("Location", "./"), ("Set-Cookie", set_cookie)])
            return [b""]
        start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain")])
        return [b"this run asks for a token: Authorization: Bearer TOKEN, or ?token=TOKEN\n"]

    return guarded


def for_this_machine(application: Application) -> Application:
    """The application for whoever calls this machine by a name of loopback: a page from elsewhere that has its own name
    point here (DNS rebinding) gets nothing."""

    def guarded(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        host = str(environ.get("HTTP_HOST", "localhost"))
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        if name.strip("[]").lower() in LOOPBACK:
            return application(environ, start_response)
        start_response("421 Misdirected Request", [("Content-Type", "text/plain")])
        return [b"this page answers to localhost only; to reach it by another name set a token\n"]

    return guarded


def _cookies(environ: dict[str, Any], cookie: str) -> list[str]:
    parts = (part.strip().partition("=") for part in str(environ.get("HTTP_COOKIE", "")).split(";"))
    return [value for name, _, value in parts if name == cookie]


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())
