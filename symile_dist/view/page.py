"""The run's page: a WSGI application over a run's directory, for the driver of a live run and for `symile-dist view`.

It answers GET and HEAD of a fixed table of paths, from memory: no part of a request ever names a file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from symile_dist import __version__
from symile_dist.metrics.names import PHASES
from symile_dist.metrics.panels import PANELS
from symile_dist.view.folder import RunFolder, plain
from symile_dist.view.following import RunHistory
from symile_dist.view.series import Part, Table

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
ASSETS = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/favicon.ico": ("icon.svg", "image/svg+xml"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("page", "chart", "curves", "data", "dom", "format", "tables")
    },
}
"""Path -> (file of the package, content type)."""
READ_SECONDS = 0.4
"""Of one request, for reading a long history: what is left over is read by the next ones."""
LARGEST_STEP = 10**15
COMPRESS_BYTES = 1000
HEADERS = [
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Vary", "Accept-Encoding"),
]
EXTRA_CURVES = (("train", "loss"), ("train", "samples_per_second"), ("train", "step_seconds"), ("train", "phases.*"))
"""What the page shows besides its panels."""


class BadRequest(ValueError):
    """The message says why."""


class Range(NamedTuple):
    """What a request for curves asks for."""

    first: float
    last: float
    version: str


def page_application(directory: Path) -> PageApplication:
    """Serves the page of the run in a directory, which need not exist yet. Never raises for what a run, or a request,
    holds."""
    return PageApplication(Path(directory))


class _Answer(NamedTuple):
    status: str
    kind: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = (("Cache-Control", "no-store"),)
    packed: bytes | None = None
    """The body, compressed."""


class PageApplication:
    """WSGI; see `page_application`. Safe to call from several threads."""

    def __init__(self, directory: Path) -> None:
        self.history, self.folder = RunHistory(directory), RunFolder(directory)
        self._lock = threading.Lock()
        self._process = secrets.token_hex(4)
        self._assets = {path: _asset(name, kind) for path, (name, kind) in ASSETS.items()}
        self._panels = _panels()
        self._wanted = _wanted()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        answer = self._answer(environ)
        headers = [("Content-Type", answer.kind), *HEADERS, *answer.headers]
        body = answer.body
        if "gzip" in str(environ.get("HTTP_ACCEPT_ENCODING", "")) and len(body) > COMPRESS_BYTES:
            body = answer.packed or gzip.compress(body, compresslevel=4)
            headers.append(("Content-Encoding", "gzip"))
        headers.append(("Content-Length", str(len(body))))
        start_response(answer.status, headers)
        return [] if environ.get("REQUEST_METHOD") == "HEAD" else [body]

    def _answer(self, environ: dict[str, Any]) -> _Answer:
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            allowed = (("Allow", "GET, HEAD"), ("Cache-Control", "no-store"))
            return _Answer("405 Method Not Allowed", "text/plain; charset=utf-8", b"GET and HEAD only\n", allowed)
        path, query = environ.get("PATH_INFO") or "/", str(environ.get("QUERY_STRING", ""))
        asset = self._assets.get(path)
        if asset is not None:
            same = str(environ.get("HTTP_IF_NONE_MATCH", "")) == dict(asset.headers)["ETag"]
            return asset._replace(status="304 Not Modified", body=b"", packed=None) if same else asset
        try:
            if path == "/api/run":
                return _json_answer(self.run(_words(query, "have").get("have", "")))
            if path == "/api/curves":
                return self.curves(_range(query))
        except BadRequest as error:
            return _json_answer({"error": str(error)}, "400 Bad Request")
        except Exception:
            logger.exception("%s cannot be shown", path)
            return _json_answer({"error": "this cannot be shown; the log says why"}, "503 Service Unavailable")
        return _Answer("404 Not Found", "text/plain; charset=utf-8", b"there is no such page\n")

    def read_ahead(self) -> None:
        """Reads all of the history now, beside the requests: they need not wait for it then."""
        while self.history.refresh(0):
            pass

    # What the page asks for

    def run(self, have: str = "") -> dict[str, Any]:
        """All sections, each with its version; `have` lists the versions that need not be sent again."""
        with self._lock:
            self.history.refresh(READ_SECONDS)
            folder, history = self.folder, self.history
            with history.lock:
                sections: dict[str, Callable[[], Any]] = {
                    "run": lambda: folder.run(history),
                    "progress": lambda: folder.progress(history),
                    "latest": lambda: folder.latest(history),
                    "goodput": lambda: folder.goodput(history),
                    "ranks": lambda: folder.ranks(history),
                    "checkpoints": lambda: folder.checkpoints(history),
                    "events": lambda: folder.events(history),
                    "evaluation": folder.evaluation,
                    "config": folder.config_text,
                    "panels": lambda: self._panels,
                }
                known = set(have.split(","))
                return {
                    "now": time.time(),
                    "server": self._process,
                    "code": __version__,
                    "sections": {name: _section(make(), known) for name, make in sections.items()},
                }

    def curves(self, wanted: Range) -> _Answer:
        """The panels' curves between two steps; only what is new where the version allows it, 304 where nothing is."""
        history = self.history
        with self._lock:
            history.refresh(READ_SECONDS)
            with history.lock:
                place = f"{self._process}.{history.generation}:{wanted.first:.0f}:{wanted.last:.0f}"
                before = _known_points(wanted.version, place)
                version, kinds, series = [], {}, {}
                for kind, table in history.tables.items():
                    keys = list(self._keys(kind, table))
                    if not keys:
                        continue
                    whole = Part(table, wanted.first, wanted.last)
                    version.append(f"{kind}={whole.width}/{whole.rows}/{whole.last:.0f}")
                    width, rows, since = before.get(kind, (-1, -1, 0.0))
                    if (width, rows, since) == (whole.width, whole.rows, whole.last):
                        continue
                    appended = table.replayed and width == whole.width
                    part = Part(table, wanted.first, wanted.last, since) if appended else whole
                    kinds[kind] = {**part.grid(), "appended": appended}
                    series[kind] = {key: found for key in keys if (found := part.column(key)) is not None}
        now = f"{place};{';'.join(version)}"
        if now == wanted.version:
            return _Answer("304 Not Modified", "application/json", b"")
        content = {"version": now, "kinds": kinds, "series": series, "read": round(history.complete, 4)}
        return _json_answer(content)

    def _keys(self, kind: str, table: Table) -> Iterator[str]:
        exact, prefixes = self._wanted.get(kind, (frozenset(), ()))
        if re.fullmatch(r"[\w-]{1,40}", kind):
            yield from (key for key in table.columns if key in exact or key.startswith(prefixes))


def _asset(name: str, kind: str) -> _Answer:
    body = (STATIC / name).read_bytes()
    mark = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
    return _Answer("200 OK", kind, body, (("Cache-Control", "no-cache"), ("ETag", mark)), gzip.compress(body))


def _json_answer(content: Any, status: str = "200 OK") -> _Answer:
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(errors="replace")
    return _Answer(status, "application/json", body)


def _section(content: Any, known: set[str]) -> dict[str, Any]:
    content = plain(content)
    text = json.dumps(content, sort_keys=True)
    version = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]
    return {"version": version} if version in known else {"version": version, "data": content}


def _panels() -> dict[str, Any]:
    """Those that can be drawn from a history, in order."""
    rows = []
    for panel in PANELS.values():
        if panel.on_page and panel.curves:
            row = asdict(panel)
            del row["queries"]
            rows.append(row)
    return {"rows": rows, "phases": list(dict.fromkeys((*PHASES, "other")))}


def _wanted() -> dict[str, tuple[frozenset[str], tuple[str, ...]]]:
    """Kind -> (keys, how other keys begin) of what the page draws."""
    curves = [(curve.kind, curve.key) for panel in PANELS.values() if panel.on_page for curve in panel.curves]
    found: dict[str, tuple[set[str], list[str]]] = {}
    for kind, key in (*curves, *EXTRA_CURVES):
        exact, prefixes = found.setdefault(kind, (set(), []))
        if key.endswith("*"):
            prefixes.append(key[:-1])
        else:
            exact.add(key)
    return {kind: (frozenset(exact), tuple(prefixes)) for kind, (exact, prefixes) in found.items()}


def _words(query: str, *names: str) -> dict[str, str]:
    """Raises BadRequest for what is no query of these words."""
    try:
        found = parse_qs(query, keep_blank_values=True, max_num_fields=10)
    except ValueError:
        raise BadRequest("too many parameters") from None
    return {name: found[name][-1] for name in names if name in found}


def _range(query: str) -> Range:
    words = _words(query, "first", "last", "version")
    steps = []
    for name, default in (("first", 0), ("last", LARGEST_STEP)):
        word = words.get(name, "")
        if not re.fullmatch(r"[0-9]{0,16}", word, re.ASCII):
            raise BadRequest(f"{name} should be a step: a whole number from 0 to {LARGEST_STEP}")
        steps.append(min(int(word), LARGEST_STEP) if word else default)
    first, last = steps
    if first > last:
        raise BadRequest("first should not be beyond last")
    return Range(first, last, words.get("version", ""))


def _known_points(version: str, place: str) -> dict[str, tuple[int, int, float]]:
    """Kind -> (steps per point, records, last step) of what a page has; nothing where that is void."""
    head, _, rest = version.partition(";")
    if head != place or len(rest) > 10_000:
        return {}
    found = {}
    for part in rest.split(";"):
        match = re.fullmatch(r"([\w-]{1,40})=([0-9]{1,16})/([0-9]{1,12})/(-?[0-9]{1,16})", part, re.ASCII)
        if match:
            found[match[1]] = (int(match[2]), int(match[3]), float(match[4]))
    assert all(math.isfinite(since) for _, _, since in found.values())
    return found
