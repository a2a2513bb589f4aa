"""What stands between driver and ranks of one attempt: a Ray actor that both know, and the driver's look at it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the actor's process imports this file at every start: nothing large
    from symile_dist.config import Config
    from symile_dist.monitor import Monitor
    from symile_dist.view.terminal import TerminalView

logger = logging.getLogger(__name__)


class Board:
    """The actor: records for the view, who is there, what the driver asks for, and how an attempt ended."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.ranks: dict[int, dict[str, Any]] = {}
        self.outcome: dict[str, Any] | None = None
        self.asked: str | None = None

    def post(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def join(self, rank: dict[str, Any]) -> None:
        self.ranks[rank["rank"]] = rank

    def finish(self, status: str, message: str, **values: Any) -> None:
        self.outcome = self.outcome or {"status": status, "message": message, **values}

    def ask_to_stop(self, reason: str) -> None:
        self.asked = self.asked or reason

    def stop_asked(self) -> str | None:
        return self.asked

    def look(self) -> dict[str, Any]:
        """Everything since the last look."""
        records, self.records = self.records, []
        return {"records": records, "ranks": self.ranks, "outcome": self.outcome}


class Watcher:
    """Looks at the board in a thread, feeds view and monitor."""

    def __init__(
        self,
        board: Any,
        view: TerminalView,
        monitor: Monitor,
        config: Config,
        wish: Callable[[], str | None],
    ) -> None:
        """
        Args:
            wish: says why the ranks should save and stop, once they should; it is asked often, in the thread.
        """
        self.board, self.view, self.monitor, self.config, self.wish = board, view, monitor, config, wish
        self.outcome: dict[str, Any] | None = None
        self.ranks: dict[int, dict[str, Any]] = {}
        self._asked = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self._look()

    def _poll(self) -> None:
        while not self._stop.wait(0.25):
            self._look()

    def _look(self) -> None:
        import ray

        try:
            reason = None if self._asked else self.wish()
            if reason:
                self.board.ask_to_stop.remote(reason)
                self._asked = True
            seen = ray.get(self.board.look.remote(), timeout=10)
        except Exception as error:  # the view must not end the run: Ray itself tells of a lost cluster
            logger.debug("board not reached: %s", error)
            return
        if seen["ranks"] != self.ranks:
            self.ranks = seen["ranks"]
            self._ranks_joined()
        for record in seen["records"]:
            self.monitor.take(record)
            if record["kind"] != "ranks":
                self.view.update(record)
        self.monitor.look()
        self.view.tell(**self.monitor.told())
        self.outcome = seen["outcome"] or self.outcome

    def _ranks_joined(self) -> None:
        if len(self.ranks) == self.config.world_size:
            urls = [rank["metrics_url"] for _, rank in sorted(self.ranks.items()) if rank["metrics_url"]]
            self.view.update({"kind": "event", "message": f"{len(self.ranks)} ranks are up", "metrics_urls": urls})
        self.monitor.joined(self.ranks)
