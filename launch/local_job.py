"""Watches over a job on this machine: starts its nodes and its driver, passes signals on, keeps the exit code, and
leaves no process behind. `python -m symile_dist.launch.local_job FOLDER`."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from symile_dist.launch.local import EXIT_CODE, specification
from symile_dist.launch.processes import POLL_SECONDS, adopt_orphans, end_descendants, sigterm_with_parent
from symile_dist.launch.ray_node import ADDRESS
from symile_dist.run_directory import tell_run
from symile_dist.storage import write_text


class Signals:
    """Those that the driver is to get: SIGTERM to save and stop, SIGINT to end at once."""

    def __init__(self) -> None:
        self.come: list[int] = []
        self.asked = False
        """To save and stop: more than once would be to stop without."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            self.come.append(number)
        elif not self.asked:
            self.asked = True
            self.come.append(signal.SIGTERM)

    def pass_on(self, process: subprocess.Popen[bytes]) -> None:
        while self.come:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(self.come.pop(0))


def start_nodes(what: dict[str, Any], folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Starts the nodes of a Ray, whose address will stand in the folder; returns the head."""
    command = [sys.executable, "-m", "symile_dist.launch.ray_node"]
    nodes = []
    for number in range(what["nodes"]):
        sizes = [f"--cpus={what['cpus_per_node']}", f"--gpus={what['gpus_per_node']}", f"--folder={folder}"]
        devices = range(number * what["gpus_per_node"], (number + 1) * what["gpus_per_node"])
        own = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))} if what["gpus_per_node"] else {}
        role = "head" if number == 0 else "worker"
        nodes.append(subprocess.Popen([*command, role, *sizes], env=environment | own, stdout=subprocess.DEVNULL))
    return nodes[0]


def run(folder: Path, signals: Signals) -> int:
    """Returns the driver's exit code."""
    what, head = specification(folder), None
    environment = dict(os.environ) | what["environment"]
    meeting = Path(tempfile.mkdtemp(prefix="symile-job-"))
    try:
        if what["nodes"] > 1:
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            head = start_nodes(what, meeting, environment)
            while not (meeting / ADDRESS).exists():
                if signals.come:
                    return 75
                if head.poll() is not None:
                    raise RuntimeError("the job's Ray does not start")
                time.sleep(POLL_SECONDS)
            environment["RAY_ADDRESS"] = (meeting / ADDRESS).read_text()
        else:
            environment.pop("RAY_ADDRESS", None)
        driver = subprocess.Popen(what["command"], env=environment, preexec_fn=sigterm_with_parent)
        while driver.poll() is None:
            signals.pass_on(driver)
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.wait(POLL_SECONDS)
            if head and head.poll() is not None and driver.poll() is None:
                driver.kill()  # it would wait for Ray for a minute, and could not save without
                tell_run(folder.parent.parent, status="failed", message="the head of the job's Ray has ended")
                raise RuntimeError("the head of the job's Ray has ended; symile-dist resume goes on")
        if driver.returncode == -signal.SIGTERM and signals.asked:  # it came before the driver was ready
            return 75
        return driver.returncode if driver.returncode >= 0 else 128 - driver.returncode
    finally:
        end_descendants()
        shutil.rmtree(meeting, ignore_errors=True)


def main() -> int:
    signals = Signals()
    adopt_orphans()
    folder = Path(sys.argv[1])
    code = 1
    try:
        code = run(folder, signals)
    except RuntimeError as error:
        print(f"failed: {error}", file=sys.stderr)
    finally:
        write_text(folder / EXIT_CODE, f"{code}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
