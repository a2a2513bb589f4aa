"""A wish that the run stops at the end of a step, with everything saved; all ranks agree on which step that is."""

from __future__ import annotations

import threading
from collections.abc import Callable

POLL_SECONDS = 0.5


class StopRequest:
    """Any rank may be asked, at any time, by its `reason`; the loop looks at it once per step."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def poll(self, look: Callable[[], str | None]) -> None:
        """Looks for a wish every half second, in a thread, until there is one or looking fails."""
        threading.Thread(target=self._poll, args=(look,), name="stop", daemon=True).start()

    def _poll(self, look: Callable[[], str | None]) -> None:
        never = threading.Event()
        try:
            while self.reason is None:
                never.wait(POLL_SECONDS)
                self.reason = look() or self.reason
        except Exception:  # whoever was asked is gone, and so is the run
            return
