"""Serves the metrics of one process (a rank, or the driver) to Prometheus.

Each process has a registry and an HTTP endpoint of its own: prometheus_client's multiprocess mode drops exemplars,
and Ray's metrics drop NaN and Inf, which are what one most wants to be told of.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import socket
import threading
import weakref
from collections.abc import Mapping, Sequence
from itertools import product
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)

from symile_dist.metrics.names import METRICS, MetricSpec, Owner

logger = logging.getLogger(__name__)

_WILDCARDS = ("", "0.0.0.0", "::")


def _release_in_child(reference: weakref.ref[Exporter]) -> None:
    exporter = reference()
    if exporter is not None:
        exporter._release_in_child()


class Exporter:
    """The metrics of one process, served at `url`.

    Nothing that goes wrong with the network raises: where `port` is taken, any free one is used, and where no
    server can be started, `port` is None and the values are kept for nobody. A wrong name, kind or label value is a bug
    of ours and fails an assertion. Safe to call from several threads.

    Gauges appear with their first value (a loss of 0 before the first step would be a lie); counters and histograms
    stand at 0 from the start, because `rate()` and `increase()` do not see a series' first value.
    """

    port: int | None
    """Where it listens; None where it does not."""

    def __init__(
        self,
        port: int = 0,
        address: str = "127.0.0.1",
        *,
        owner: Owner = "rank",
        label_values: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """
        Args:
            port: where to listen; 0 takes any free port.
            address: the interface to bind. Beyond loopback anyone who reaches it can read the metrics.
            owner: whose metrics of the table are served.
            label_values: values of the labels that the run's config bounds, e.g. {"modality": ["image", "text"]}.
                A label that is not given takes any value, and its counters are not set to 0 at the start.
        """
        # The variable PROMETHEUS_DISABLE_CREATED_SERIES is read when the client is imported, which may be long past.
        # `_created` doubles the series of every counter and is used by no panel.
        disable_created_metrics()
        self._address = address
        self._label_values = {label: tuple(values) for label, values in (label_values or {}).items()}
        self._registry = CollectorRegistry()
        self._specs = {name: spec for name, spec in METRICS.items() if spec.owner == owner}
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}
        self._lock = threading.Lock()
        for name, spec in self._specs.items():
            if spec.kind != "gauge":
                self._touch(spec, self._metric(name))
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None
        self.port = None
        self._start(port)

    def _start(self, port: int) -> None:
        for candidate in (port, 0) if port else (0,):
            try:
                self._server, self._thread = start_http_server(candidate, addr=self._address, registry=self._registry)
            except Exception as error:
                # Whatever it is (taken, not permitted, no such address, no thread left), training matters more.
                logger.warning("no metrics on %s:%d: %s", self._address, candidate, error)
            else:
                self.port = self._server.server_port
                # A forked data loader worker would inherit the socket and hold the port after this process is gone.
                os.register_at_fork(after_in_child=functools.partial(_release_in_child, weakref.ref(self)))
                return
        logger.warning("metrics are not served; training goes on without")

    def _release_in_child(self) -> None:
        # The thread that serves does not exist in the child: close() would wait for it for ever.
        if self._server is not None:
            self._server.socket.close()
        self._server = self._thread = self.port = None

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

    def _checked(self, name: str, kind: str, labels: Mapping[str, str]) -> Counter | Gauge | Histogram:
        assert name in self._specs, f"{name}: not a metric of this process (see metrics/names.py)"
        spec = self._specs[name]
        assert spec.kind == kind, f"{name} is a {spec.kind}, used as a {kind}"
        assert set(labels) == set(spec.labels), f"{name}: labels {sorted(labels)}, expected {sorted(spec.labels)}"
        for label, value in labels.items():
            allowed = self._allowed(spec, label)
            assert allowed is None or value in allowed, f"{name}: {label}='{value}' is not one of {allowed}"
        metric = self._metric(name)
        return metric.labels(**labels) if labels else metric

    def set(self, name: str, value: float, **labels: str) -> None:
        """Sets a gauge; NaN and Inf are kept, for an alert looks for them."""
        metric = self._checked(name, "gauge", labels)
        assert isinstance(metric, Gauge)
        metric.set(value)

    def increment(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Adds to a counter. `amount` must be finite and not negative: a NaN would stay in the sum for ever."""
        assert math.isfinite(amount) and amount >= 0, f"{name}: cannot add {amount} to a counter"
        metric = self._checked(name, "counter", labels)
        assert isinstance(metric, Counter)
        metric.inc(amount)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Adds one observation to a histogram, in the unit of its name. `value` must be finite."""
        assert math.isfinite(value), f"{name}: cannot observe {value}"
        metric = self._checked(name, "histogram", labels)
        assert isinstance(metric, Histogram)
        metric.observe(value)

    @property
    def url(self) -> str | None:
        """Where Prometheus finds it; None where nothing is served."""
        if self.port is None:
            return None
        host = socket.gethostname() if self._address in _WILDCARDS else self._address
        return f"http://[{host}]:{self.port}/metrics" if ":" in host else f"http://{host}:{self.port}/metrics"

    def close(self) -> None:
        """Stops the server and frees the port; may be called twice. Values can still be set, and go nowhere."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join(timeout=5)
        self._server = self._thread = self.port = None
