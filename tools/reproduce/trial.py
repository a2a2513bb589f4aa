"""One trial of an experiment: a config trained and evaluated in one process, without Ray; and many of them at once.

A trial is a run like any other, with a directory of its own: `symile-dist view`, `resume` and `evaluate` take it. One
that was killed goes on from its last checkpoint, and one that is done is not done again.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from symile_dist.config import Config
from symile_dist.errors import RunFailed
from symile_dist.health.lease import locked
from symile_dist.metrics.history import HISTORY_FILE, read_history
from symile_dist.metrics.recorder import Recorder
from symile_dist.rank import train_rank
from symile_dist.run_directory import CONFIG_FILE, load_run, prepare, update_run
from symile_dist.storage import read_json, write_json
from symile_dist.tools.evaluate import evaluate_run
from symile_dist.tools.progress import Report

TRIAL_FILE = "trial.json"


@dataclass(frozen=True)
class Trial:
    """What is trained, and how its test split is looked at."""

    config: Config
    """With one rank; run.directory is the trial's folder."""
    evaluate: Callable[[Path], dict[str, Any]] = evaluate_run
    """From the run's directory to results that JSON can hold; stands at the top of a module."""

    @property
    def folder(self) -> Path:
        return self.config.run_directory


def best_of(folder: Path) -> dict[str, Any]:
    """Retrieval of the best checkpoint by validation."""
    return evaluate_run(folder, step="best")


def run_trials(trials: Sequence[Trial], processes: int, progress: Report) -> list[dict[str, Any]]:
    """Runs the trials, some at a time, each on a share of the cores; returns their results in order.

    With `processes = 0` they run in the calling process, which has a process group of one rank.

    A result holds `evaluation` (what `Trial.evaluate` gave), `validation` (the history's records) and `steps`.

    Raises RunFailed where a process is killed, and what a trial raises (ValueError, RunStopped).
    """
    total = sum(trial.config.train.steps for trial in trials)
    done = dict.fromkeys(range(len(trials)), 0)
    results: dict[int, dict[str, Any]] = {}
    todo = []
    for number, trial in enumerate(trials):
        if (found := _finished(trial)) is not None:
            results[number], done[number] = found, trial.config.train.steps
        else:
            todo.append(number)

    def report() -> None:
        progress("steps", sum(done.values()), total)

    report()
    if processes == 0:
        for number in todo:
            results[number] = _run(trials[number])
    elif todo:
        results |= _run_in_pool({number: trials[number] for number in todo}, processes, done, report)
    report()
    return [results[number] for number in range(len(trials))]


def _run_in_pool(
    trials: dict[int, Trial], processes: int, done: dict[int, int], report: Callable[[], None]
) -> dict[int, dict[str, Any]]:
    """Runs trials in processes of their own; keeps the steps done of each up to date."""
    results: dict[int, dict[str, Any]] = {}
    processes = min(processes, len(trials))
    threads = max(1, (os.cpu_count() or 1) // processes)
    spawn = multiprocessing.get_context("spawn")
    steps = spawn.Queue()
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_begin, initargs=(threads, steps))
    try:
        waiting: dict[Future[dict[str, Any]], int] = {
            executor.submit(_run, trial, number): number for number, trial in trials.items()
        }
        while waiting:
            finished, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                number = waiting.pop(future)
                results[number], done[number] = future.result(), trials[number].config.train.steps
            while True:
                try:
                    number, step = steps.get_nowait()
                except queue.Empty:
                    break
                done[number] = max(done[number], step)
            report()
    except BaseException as error:
        # Running trials are not waited for: they go on from their checkpoints when the command is given again.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        if not isinstance(error, BrokenProcessPool):
            raise
        raise RunFailed("a trial's process was killed (out of memory?); the same command again goes on") from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
    return results


_steps: Any = None
"""Of a process of the pool: the queue that is told (number, step)."""


def _begin(threads: int, steps: Any) -> None:
    """Makes a process of the pool ready: a process group of its own, and an end when its parent is gone."""
    global _steps
    _steps = steps
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # The host's name may lead to an interface that a sandbox does not have.
    if "lo" in [name for _, name in socket.if_nameindex()]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # DeepSpeed asks for them
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _finished(trial: Trial) -> dict[str, Any] | None:
    try:
        found = read_json(trial.folder / TRIAL_FILE)
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or not {"evaluation", "validation", "steps", "seconds"} <= set(found):
        return None
    same = found.get("config_digest") == trial.config.digest()
    return found if same and found.get("evaluated_by") == trial.evaluate.__name__ else None


def _run(trial: Trial, number: int = 0) -> dict[str, Any]:
    """Trains and evaluates."""

    def publish(record: dict[str, Any]) -> None:
        if _steps is not None:
            _steps.put((number, int(record.get("step", 0))))

    with locked(trial.folder):
        return _train_and_evaluate(trial, Recorder(publish=publish))


def _train_and_evaluate(trial: Trial, recorder: Recorder) -> dict[str, Any]:
    begin = time.monotonic()
    config, folder = trial.config, trial.folder
    another = (folder / CONFIG_FILE).exists() and load_run(folder).digest() != config.digest()
    prepare(config, fresh=another, resume=not another)
    earlier = seconds_of_steps(folder / HISTORY_FILE)
    try:
        state = train_rank(config, 0, torch.device("cpu"), recorder)
    finally:
        recorder.close()
    update_run(folder, status="finished")
    history = read_history(folder / HISTORY_FILE)
    results = {
        "config_digest": config.digest(),
        "evaluated_by": trial.evaluate.__name__,
        "steps": state.step,
        "best_step": state.best_step,
        "validation": [record for record in history if record["kind"] == "validation"],
        "evaluation": trial.evaluate(folder),
    }
    results["seconds"] = earlier + time.monotonic() - begin
    write_json(folder / TRIAL_FILE, results)
    return results


def seconds_of_steps(history: Path) -> float:
    """What the steps that a history tells of took, in all calls that trained them."""
    seconds, before = 0.0, 0
    for record in read_history(history) if history.exists() else []:
        if record["kind"] == "train":
            seconds += record["step_seconds"] * max(0, record["step"] - before)
            before = record["step"]
        elif record["kind"] == "start":
            before = record["step"] - 1
    return seconds
