"""`symile-dist view` and `symile-dist watch`: a run as a web page, and in the terminal."""

from __future__ import annotations

import argparse
import ipaddress
import secrets
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

PORT = 8790


def add_view_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="name or directory of a run, live or ended")
    parser.add_argument("--port", type=int, metavar="N", help=f"where to listen (default: {PORT}, or any free one)")
    parser.add_argument(
        "--address",
        default="127.0.0.1",
        metavar="A",
        help="interface to listen on (default: 127.0.0.1); others: behind a token, which is printed",
    )


def add_watch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="name or directory of a run, live or ended")
    parser.add_argument("--once", action="store_true", help="show how it stands, and end")
    parser.add_argument(
        "--plain", action="store_true", help="lines in the place of a panel, as where output is no terminal"
    )


def visible(run: str, directory: str | Path) -> Path:
    """The directory of a run that was found by its name. Raises ValueError where this machine does not see it."""
    from symile_dist.metrics.history import HISTORY_FILE
    from symile_dist.run_directory import CONFIG_FILE, RUN_FILE

    path = Path(directory)
    if not any((path / name).exists() for name in (RUN_FILE, CONFIG_FILE, HISTORY_FILE)):
        raise ValueError(f"{run}: its directory {path} is not to be seen from this machine; go to one that sees it")
    return path


def view(directory: Path, options: argparse.Namespace, until: Callable[[], Any] | None = None) -> int:
    """Serves a run's page until Ctrl-C.

    Args:
        until: returns when it is to end; by default never.

    Raises ValueError for an address or port that cannot be had.
    """
    from symile_dist.metrics.http import HttpServer
    from symile_dist.view.page import page_application

    if options.port is not None and not 0 <= options.port <= 65535:
        raise ValueError(f"--port {options.port}: should be from 0 to 65535 (0: any free one)")
    token = None if _is_loopback(options.address) else secrets.token_urlsafe(24)
    application = page_application(directory)
    server = HttpServer(application, options.address, PORT if options.port is None else options.port, token)
    url = server.url("/")
    if url is None:
        raise ValueError(f"--address {options.address}: nothing can be served there; is it one of this machine's?")
    if options.port and server.port != options.port:
        server.close()
        raise ValueError(f"--port {options.port}: is taken; name another, or leave it out for any free one")
    threading.Thread(target=application.read_ahead, daemon=True, name="history").start()
    try:
        print(f"{directory.name}: {url}{f'?token={token}' if token else ''}\nCtrl-C ends it", flush=True)
        (until or threading.Event().wait)()
    except KeyboardInterrupt:
        print("", file=sys.stderr)
    finally:
        server.close()
    return 0


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def watch(directory: Path, options: argparse.Namespace) -> int:
    """Shows a run in the terminal until it has ended, or Ctrl-C."""
    from rich.console import Console

    from symile_dist.view.watch import watch as watch_run

    # A pipe or a file has no width: wide enough for one line per row.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    try:
        watch_run(directory, console, options.plain or None, options.once)
    except KeyboardInterrupt:
        return 0
    return 0
