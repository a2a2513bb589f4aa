"""The small servers: tokens, silent and greedy peers."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from symile_dist.metrics import http
from symile_dist.metrics.http import HttpServer


def hello(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]


def get(url: str | None, **headers: str) -> tuple[int, str]:
    assert url is not None
    request = urllib.request.Request(url, headers={name.replace("_", "-"): value for name, value in headers.items()})
    opener = urllib.request.build_opener(NoRedirect, urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("Set-Cookie", "")


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return None


@pytest.fixture
def guarded() -> Iterator[HttpServer]:
    server = HttpServer(hello, "127.0.0.1", token="s3cret")
    yield server
    server.close()


def test_a_token_is_asked_for(guarded: HttpServer) -> None:
    url = guarded.url()
    assert get(url)[0] == 401
    assert get(url, Authorization="Bearer wrong")[0] == 401
    assert get(url, Authorization="Bearer ")[0] == 401
    assert get(url, Authorization="s3cret")[0] == 401
    assert get(url, Authorization="Bearer s3cret") == get(url, Authorization="bearer s3cret") == (200, "hello")


def test_a_browser_gets_a_cookie_for_its_token(guarded: HttpServer) -> None:
    status, cookie = get(f"{guarded.url()}?token=s3cret")
    assert status == 303 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert get(guarded.url(), Cookie=cookie.partition(";")[0]) == (200, "hello")
    assert get(guarded.url(), Cookie=f"symile_token_{guarded.port}=wrong")[0] == 401
    assert get(f"{guarded.url()}?token=wrong")[0] == 401
    assert get(f"{guarded.url()}?token=s%ff%00")[0] == 401


def test_more_peers_than_are_served_are_turned_away_and_the_rest_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "CONNECTIONS", 4)
    server = HttpServer(hello, "127.0.0.1")
    silent = [socket.create_connection(("127.0.0.1", server.port or 0)) for _ in range(4)]
    try:
        for connection in silent:  # until the server has taken it, there is room
            connection.sendall(b"GET / HT")
        turned_away = 0
        for _ in range(50):
            with socket.create_connection(("127.0.0.1", server.port or 0)) as late:
                late.settimeout(10)
                try:
                    late.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    turned_away += late.recv(100) == b""
                except OSError:
                    turned_away += 1
            if turned_away:
                break
        assert turned_away, "every peer gets a thread of the rank"
        for connection in silent:
            connection.close()
        for _ in range(200):
            try:
                assert get(server.url()) == (200, "hello")
                break
            except OSError:
                continue
        else:
            raise AssertionError("it does not answer any more")
    finally:
        for connection in silent:
            connection.close()
        server.close()


def test_a_peer_that_sends_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http._Handler, "timeout", 0.2)
    server = HttpServer(hello, "127.0.0.1")
    with socket.create_connection(("127.0.0.1", server.port or 0)) as silent:
        silent.settimeout(10)
        assert silent.recv(1) == b"", "it waits for ever"
    server.close()


@pytest.mark.parametrize(
    "junk", [b"\x00" * 100, b"GET " + b"a" * 200_000, b"\xff\xfe\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"]
)
def test_junk_is_survived(junk: bytes) -> None:
    server = HttpServer(hello, "127.0.0.1")
    try:
        with socket.create_connection(("127.0.0.1", server.port or 0)) as peer:
            peer.sendall(junk)
        assert get(server.url()) == (200, "hello")
    finally:
        server.close()


def raw(port: int | None, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port or 0)) as peer:
        peer.settimeout(10)
        peer.sendall(request)
        answer = b""
        while part := peer.recv(65536):
            answer += part
    return answer


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8790", b"200"),
        ("127.0.0.1", b"200"),
        ("[::1]:80", b"200"),
        ("evil.example:8790", b"421"),
        ("127.0.0.1.evil.example", b"421"),
        ("", b"421"),
    ],
)
def test_a_page_from_elsewhere_reads_nothing(host: str, status: bytes) -> None:
    """Whose name it has pointed at this machine."""
    server = HttpServer(hello, "127.0.0.1")
    try:
        answer = raw(server.port, f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert answer.split(b" ", 2)[1] == status, answer
    finally:
        server.close()


def test_nothing_of_a_request_stands_in_the_answer(guarded: HttpServer) -> None:
    answer = raw(guarded.port, b"GET /%0d%0aX-Evil:%201/?token=s3cret HTTP/1.0\r\n\r\n")
    assert b" 303 " in answer and b"X-Evil" not in answer and b"Location: ./" in answer


def test_two_runs_of_a_host_keep_their_cookies() -> None:
    first, second = (HttpServer(hello, "127.0.0.1", token=token) for token in ("one", "two"))
    cookies = [get(f"{server.url()}?token={token}")[1] for server, token in ((first, "one"), (second, "two"))]
    both = "; ".join(cookie.partition(";")[0] for cookie in cookies)
    try:
        assert get(first.url(), Cookie=both)[0] == get(second.url(), Cookie=both)[0] == 200
    finally:
        first.close()
        second.close()


def test_a_peer_that_drips_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REQUEST_SECONDS", 0.5)
    server = HttpServer(hello, "127.0.0.1")
    try:
        with socket.create_connection(("127.0.0.1", server.port or 0)) as peer:
            peer.settimeout(0.1)
            for _ in range(200):
                try:
                    peer.sendall(b"G")
                    if peer.recv(1) == b"":
                        break
                except TimeoutError:
                    continue
                except OSError:
                    break
            else:
                pytest.fail("it listens for ever")
    finally:
        server.close()
