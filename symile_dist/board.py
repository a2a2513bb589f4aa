"""What stands between ranks and driver: a Ray actor that both know, and the driver's look at it."""

from __future__ import annotations

import logging
import threading
from typing import Any

from symile_dist.config import Config
from symile_dist.run_directory import write_ranks
from symile_dist.view.terminal import TerminalView

logger = logging.getLogger(__name__)


class Board:
    """The actor: records for the view, who is there, what the driver asks for, and how an attempt ended."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.ranks: dict[int, dict[str, Any]] = {}
        self.outcome: dict[str, Any] | None = None
        self.asked: str | None = None

    def begin(self) -> None:
        """A new attempt."""
        self.ranks, self.outcome, self.asked = {}, None, None

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
    """Looks at the board in a thread, feeds the view and keeps ranks.json."""

    def __init__(self, board: Any, view: TerminalView, config: Config) -> None:
        self.board, self.view, self.config = board, view, config
        self.outcome: dict[str, Any] | None = None
        self.ranks: dict[int, dict[str, Any]] = {}
        self._to_ask: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self._look()

    def ask_to_stop(self, reason: str) -> None:
        """Asks the ranks to save and stop; may be called where Ray may not, as in a signal's handler."""
        self._to_ask = reason

    def _poll(self) -> None:
        while not self._stop.wait(0.25):
            self._look()

    def _look(self) -> None:
        import ray

        try:
            if self._to_ask:
                self.board.ask_to_stop.remote(self._to_ask)
                self._to_ask = None
            seen = ray.get(self.board.look.remote(), timeout=10)
        except Exception as error:  # the view must not end the run: Ray itself tells of a lost cluster
            logger.debug("board not reached: %s", error)
            return
        if seen["ranks"] != self.ranks:
            self.ranks = seen["ranks"]
            try:
                self._ranks_joined()
            except OSError as error:  # a full disk, say: the run goes on
                logger.warning("%s: ranks.json is out of date: %s", self.config.run_directory, error)
        for record in seen["records"]:
            self.view.update(record)
        self.outcome = seen["outcome"] or self.outcome

    def _ranks_joined(self) -> None:
        if len(self.ranks) == self.config.world_size:
            urls = [rank["metrics_url"] for _, rank in sorted(self.ranks.items()) if rank["metrics_url"]]
            self.view.update({"kind": "event", "message": f"{len(self.ranks)} ranks are up", "metrics_urls": urls})
        write_ranks(self.config.run_directory, self.ranks)
