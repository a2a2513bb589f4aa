"""Serves the metrics of one process (a rank, or the driver) to Prometheus.

Each process has a registry and an HTTP endpoint of its own: prometheus_client's multiprocess mode drops exemplars,
and Ray's metrics drop NaN and Inf, which are what one most wants to be told of.
"""

from __future__ import annotations

import logging
import math
import re
import socket
import threading
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    make_wsgi_app,
)

from symile_dist.config import Config
from symile_dist.metrics.http import Application, HttpServer
from symile_dist.metrics.names import METRICS, MetricSpec, Owner

logger = logging.getLogger(__name__)


class Exporter:
    """The metrics of one process, served at `url`.

    Nothing that goes wrong with the network raises: where `port` is taken, any free one is used, and where no
    server can be started, `port` is None and the values are kept for nobody. A wrong name, kind or label value is a bug
    of ours and fails an assertion. Safe to call from several threads.

    Gauges appear with their first value (a loss of 0 before the first step would be a lie); counters and histograms
    stand at 0 from the start, because `rate()` and `increase()` do not see a series' first value.
    """

    def __init__(
        self,
        port: int | None = 0,
        address: str = "127.0.0.1",
        *,
        owner: Owner = "rank",
        label_values: Mapping[str, Sequence[str]] | None = None,
        token: str | None = None,
        host: str | None = None,
    ) -> None:
        """
        Args:
            port: where to listen; 0 takes any free port, None leaves it to whoever serves `application`.
            address: the interface to bind. Beyond loopback anyone who reaches it can read the metrics.
            owner: whose metrics of the table are served.
            label_values: values of the labels that the run's config bounds, e.g. {"modality": ["image", "text"]}.
                A label that is not given takes any value, and its counters are not set to 0 at the start.
            token: what every request must carry; see `HttpServer`.
            host: how other machines call this one, where it listens on all interfaces.
        """
        # The variable PROMETHEUS_DISABLE_CREATED_SERIES is read when the client is imported, which may be long past.
        # `_created` doubles the series of every counter and is used by no panel.
        disable_created_metrics()
        self._label_values = {label: tuple(values) for label, values in (label_values or {}).items()}
        self._registry = CollectorRegistry()
        self._specs = {name: spec for name, spec in METRICS.items() if spec.owner == owner}
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}
        self._children: dict[tuple[str, ...], Any] = {}
        self._lock = threading.Lock()
        for name, spec in self._specs.items():
            if spec.kind != "gauge":
                self._touch(spec, self._metric(name))
        ProcessCollector(registry=self._registry)
        self.application: Application = make_wsgi_app(self._registry)
        self._server = None if port is None else HttpServer(self.application, address, port, token, host)
        if self._server and self._server.port is None:
            logger.warning("metrics are not served; training goes on without")

    @property
    def port(self) -> int | None:
        """Where it listens; None where it does not."""
        return self._server.port if self._server else None

    def _metric(self, name: str) -> Counter | Gauge | Histogram:
        with self._lock:
            if name not in self._metrics:
                spec = self._specs[name]
                if spec.kind == "counter":
                    self._metrics[name] = Counter(name, spec.help, spec.labels, registry=self._registry)
                elif spec.kind == "gauge":
                    self._metrics[name] = Gauge(name, spec.help, spec.labels, registry=self._registry)
                else:
                    self._metrics[name] = Histogram(
                        name, spec.help, spec.labels, registry=self._registry, buckets=spec.buckets
                    )
            return self._metrics[name]

    def _allowed(self, spec: MetricSpec, label: str) -> tuple[str, ...] | None:
        return spec.label_values.get(label, self._label_values.get(label))

    def _touch(self, spec: MetricSpec, metric: Counter | Gauge | Histogram) -> None:
        allowed = [self._allowed(spec, label) for label in spec.labels]
        if spec.labels and None not in allowed:
            for values in product(*(values for values in allowed if values is not None)):
                metric.labels(*values)

    def _checked(self, name: str, kind: str, labels: Mapping[str, str]) -> Any:
        key = (name, kind, *labels.values())
        if key in self._children:  # in every step, a dozen times: checked once is enough
            return self._children[key]
        assert name in self._specs, f"{name}: not a metric of this process (see metrics/names.py)"
        spec = self._specs[name]
        assert spec.kind == kind, f"{name} is a {spec.kind}, used as a {kind}"
        assert tuple(labels) == spec.labels, f"{name}: labels {list(labels)}, expected {list(spec.labels)}"
        for label, value in labels.items():
            allowed = self._allowed(spec, label)
            assert allowed is None or value in allowed, f"{name}: {label}='{value}' is not one of {allowed}"
        metric = self._metric(name)
        child = metric.labels(**labels) if labels else metric
        self._children[key] = child
        return child

    def set(self, name: str, value: float, **labels: str) -> None:
        """Sets a gauge; NaN and Inf are kept, for an alert looks for them. Labels in the order of the table."""
        self._checked(name, "gauge", labels).set(value)

    def increment(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Adds to a counter. `amount` must be finite and not negative: a NaN would stay in the sum for ever."""
        assert math.isfinite(amount) and amount >= 0, f"{name}: cannot add {amount} to a counter"
        self._checked(name, "counter", labels).inc(amount)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Adds one observation to a histogram, in the unit of its name. `value` must be finite."""
        assert math.isfinite(value), f"{name}: cannot observe {value}"
        self._checked(name, "histogram", labels).observe(value)

    @property
    def url(self) -> str | None:
        """Where Prometheus finds it; None where nothing is served."""
        return self._server.url("/metrics") if self._server else None

    def close(self) -> None:
        """Stops the server and frees the port; may be called twice. Values can still be set, and go nowhere."""
        if self._server is not None:
            self._server.close()


def token_of(config: Config) -> str | None:
    """What metrics.token_file holds. Raises ValueError where it cannot be read, or is none."""
    path = config.metrics.token_file
    if path is None:
        return None
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        words = getattr(error, "strerror", None) or error
        raise ValueError(f"metrics.token_file: {path}: {words}; it should be a file that holds one word") from None
    if not re.fullmatch(r"[!-:<-~]+", token):  # as it stands in a header, and in a cookie
        raise ValueError(f"metrics.token_file: {path} should hold one word of ASCII, without ';'")
    return token


def check_address(config: Config) -> None:
    """Raises ValueError where nothing can listen on metrics.address, whichever machine it is."""
    try:
        socket.getaddrinfo(config.metrics.address or "?", None)
    except OSError:
        raise ValueError(
            f"metrics.address: '{config.metrics.address}' is no address; 127.0.0.1, or 0.0.0.0 for all interfaces"
        ) from None
