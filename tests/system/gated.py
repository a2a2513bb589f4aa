"""An encoder that waits or dies where a test says so, by files in a folder that both know."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from torch import Tensor, nn


class GatedEncoder(nn.Module):
    """A linear map of (n, input_dim).

    Before a batch it dies by SIGKILL for every file `die-*` in the folder, which it removes first. Where
    there is a file `wait` it writes its process id to `waiting` before its fourth batch, and waits for ever.
    """

    loads_weights = True

    def __init__(self, embedding_dim: int, input_dim: int, folder: str) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, embedding_dim)
        self.folder, self.batches = Path(folder), 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.batches += 1
        for path in sorted(self.folder.glob("die-*")):
            path.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.batches == 4 and (self.folder / "wait").exists():
            (self.folder / "waiting.part").write_text(str(os.getpid()))
            (self.folder / "waiting.part").rename(self.folder / "waiting")
            time.sleep(3600)
        return self.linear(inputs)
