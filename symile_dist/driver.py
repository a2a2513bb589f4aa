"""Builds and watches the Ray Train run: what the command line calls."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

from symile_dist import run_directory
from symile_dist.checkpoint.manifest import CHECKPOINTS, CheckpointError, complete_checkpoints, read_manifest
from symile_dist.config import Config
from symile_dist.data.order import largest_world_size
from symile_dist.errors import RunFailed
from symile_dist.preflight import preflight
from symile_dist.run_directory import update_run, write_ranks
from symile_dist.view.terminal import TerminalView

logger = logging.getLogger(__name__)

RAY_ENVIRONMENT = {
    # Lost workers are seen, and the group restarted, in a second rather than in ten.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}


class _Board:
    """A Ray actor between ranks and driver: records for the view, who is there, and how it ended."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.ranks: dict[int, dict[str, Any]] = {}
        self.joins: dict[int, int] = {}
        self.outcome: dict[str, Any] | None = None

    def post(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def join(self, rank: dict[str, Any]) -> None:
        self.ranks[rank["rank"]] = rank
        self.joins[rank["rank"]] = self.joins.get(rank["rank"], 0) + 1

    def finish(self, status: str, message: str, **values: Any) -> None:
        self.outcome = self.outcome or {"status": status, "message": message, **values}

    def ended(self) -> bool:
        return self.outcome is not None

    def look(self) -> dict[str, Any]:
        """Everything since the last look."""
        records, self.records = self.records, []
        return {"records": records, "ranks": self.ranks, "joins": self.joins, "outcome": self.outcome}


class _Watcher:
    """Polls the board in a thread, feeds the view and keeps ranks.json."""

    def __init__(self, board: Any, view: TerminalView, config: Config) -> None:
        self.board, self.view, self.config = board, view, config
        self.outcome: dict[str, Any] | None = None
        self.restarts = 0
        self._joins: dict[int, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> _Watcher:
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
            seen = ray.get(self.board.look.remote(), timeout=10)
        except Exception as error:  # the view must not end the run: Ray itself tells of a lost cluster
            logger.debug("board not reached: %s", error)
            return
        if seen["joins"] != self._joins:
            self._joins = seen["joins"]
            try:
                self._ranks_joined(seen["ranks"])
            except OSError as error:  # a full disk, say: the run goes on
                logger.warning("%s: ranks.json is out of date: %s", self.config.run_directory, error)
        for record in seen["records"]:
            self.view.update(record)
        self.outcome = seen["outcome"] or self.outcome

    def _ranks_joined(self, ranks: dict[int, dict[str, Any]]) -> None:
        restarts = max(self._joins.values()) - 1
        if restarts > self.restarts:
            self.restarts = restarts
            self.view.note(f"a worker was lost: the group is restarted (restart {restarts})", level="warning")
        if list(self._joins.values()) == [restarts + 1] * self.config.world_size:
            urls = [rank["metrics_url"] for _, rank in sorted(ranks.items()) if rank["metrics_url"]]
            self.view.update({"kind": "event", "message": f"{len(ranks)} ranks are up", "metrics_urls": urls})
        write_ranks(self.config.run_directory, ranks)
        update_run(self.config.run_directory, restarts=self.restarts)


def start_ray(config: Config) -> Config:
    """Joins the cluster that RAY_ADDRESS names, or starts a local Ray. A second call finds the first one's.

    Returns the config with as many ranks as the cluster holds, where `ray.min_workers` allows fewer. Raises ValueError
    when the cluster cannot hold the run: Ray itself would wait for ever.
    """
    return fitted(config, join_ray(config.ray.cpus_per_worker * config.world_size))


def fitted(config: Config, resources: Mapping[str, float]) -> Config:
    """The config with the most ranks that the resources hold and that divide the global batch. Raises ValueError when
    these are fewer than the run may have."""
    per_worker = {"CPU": config.ray.cpus_per_worker, "GPU": config.ray.gpus_per_worker}
    room = min(int(resources.get(what, 0) / need + 1e-9) for what, need in per_worker.items() if need)
    if room >= config.world_size:
        return config
    world = largest_world_size(config.train.global_batch_size, room) if room else 0
    if config.ray.min_workers is None or world < config.ray.min_workers:
        needs = [f"{need * config.world_size:g} {what}s" for what, need in per_worker.items() if need]
        has = [f"{resources.get(what, 0):g}" for what, need in per_worker.items() if need]
        fewer = (
            "ray.min_workers lets it begin with fewer ranks"
            if config.ray.min_workers is None
            else f"it holds {world} ranks that divide the global batch, ray.min_workers is {config.ray.min_workers}"
        )
        raise ValueError(
            f"the run needs {' and '.join(needs)} (ray.num_workers x ray.cpus_per_worker and gpus_per_worker), the Ray "
            f"cluster has {' and '.join(has)}; {fewer}"
        )
    logger.warning("the cluster holds %d ranks: the run begins with %d of %d", room, world, config.world_size)
    return config.model_copy(update={"ray": config.ray.model_copy(update={"num_workers": world})})


def join_ray(need_cpus: float) -> dict[str, float]:
    """Joins the cluster that RAY_ADDRESS names, or starts a local Ray that has so many CPUs at least.

    Returns the cluster's resources. Raises ValueError when the cluster does not answer.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # Whoever reaches Ray's ports can run code, and Ray listens on every interface: a token of this process's own.
        # Ray reads both when it is imported. A cluster's own settings are left as they are.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not ray.is_initialized():
        if address:
            _check_cluster_answers(address)
            try:
                ray.init(address=address, **quiet)
            except ConnectionError as error:
                raise ValueError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from None
        else:
            # On one machine CPUs are only counted, not enforced: more ranks than cores is slow, not wrong.
            cpus = max(os.cpu_count() or 1, math.ceil(need_cpus) + 1)
            ray.init(address="local", _node_ip_address="127.0.0.1", num_cpus=cpus, include_dashboard=False, **quiet)
    return dict(ray.cluster_resources())


def _check_cluster_answers(address: str) -> None:
    """Raises ValueError when nothing listens at the cluster's address: Ray itself would take minutes to say so."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # `auto` and the like
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise ValueError(
            f"RAY_ADDRESS={address}: nothing answers there ({error.strerror or error}); start the cluster (ray start "
            "--head), correct the address, or unset RAY_ADDRESS to train on this machine"
        ) from None


def launch(
    config: Config,
    fresh: bool = False,
    resume: bool = False,
    plain: bool | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """What `symile-dist train` does: checks everything, then makes the run directory, then trains.

    Arguments as in `run_directory.check` and `run`. Returns and raises what `run` does; after a ValueError nothing has
    been written.
    """
    for warning in preflight(config, fresh)[:5]:
        logger.warning("%s", warning)
    run_directory.check(config, fresh, resume)
    done = [] if fresh else complete_checkpoints(config.run_directory / CHECKPOINTS)
    if done and done[-1][0] >= config.train.steps:
        with contextlib.suppress(CheckpointError):  # damaged: the ranks go on from the one before
            state = read_manifest(done[-1][1]).train_state
            return {"status": "finished", "message": "", **state, "restarts": 0, "seconds": 0.0}
    config = start_ray(config)
    with run_directory.locked(config.run_directory):
        run_directory.prepare(config, fresh, resume)
        return run(config, plain, console)


def run(config: Config, plain: bool | None = None, console: Console | None = None) -> dict[str, Any]:
    """Trains, with restarts, until the last step, in a directory that is prepared and on a Ray that is started.

    `console` is where the live view is drawn (standard output when left out), `plain` asks for lines in its place.

    Returns {"status": "finished", "restarts": ..., "seconds": ...} and what `TrainState` holds at the end.
    Raises ValueError for a user's mistake that only a worker could see, RunFailed when the run cannot go on.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from symile_dist.worker import run_worker

    begin = time.monotonic()
    board = ray.remote(num_cpus=0)(_Board).remote()
    use_gpu = config.ray.gpus_per_worker > 0
    resources = {"CPU": config.ray.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = config.ray.gpus_per_worker
    directory = config.run_directory
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "board": board},
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=int(config.ray.collective_timeout_seconds)
        ),
        scaling_config=ScalingConfig(num_workers=config.world_size, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            # A name of its own each time: Ray would otherwise resume by its own books, and ours are the manifests.
            name=f"{config.run.name}-{time.time_ns()}",
            storage_path=str(directory / "ray"),
            failure_config=FailureConfig(max_failures=config.ray.max_failures),
        ),
    )
    update_run(directory, status="running", pid=os.getpid())
    view = TerminalView(config.run.name, config.train.steps, console=console, plain=plain)
    view.start()
    failure: BaseException | None = None
    watcher = _Watcher(board, view, config)
    try:
        with watcher:
            try:
                with terminated_like_interrupted():
                    trainer.fit()
            except (KeyboardInterrupt, SystemExit):  # Ray Train turns SIGINT into SystemExit
                update_run(directory, status="interrupted", message="interrupted by a signal")
                raise KeyboardInterrupt from None
            except Exception as error:
                failure = error
    finally:
        view.stop()
        with contextlib.suppress(Exception):  # a cluster that is gone has no board
            ray.kill(board)
    outcome = watcher.outcome
    if outcome is None:
        message = f"the workers failed {watcher.restarts + 1} times: {_cause(failure)}; see {directory / 'logs'}"
        update_run(directory, status="failed", message=message)
        raise RunFailed(message)
    update_run(directory, **outcome)
    if outcome["status"] == "refused":
        raise ValueError(outcome["message"])
    if outcome["status"] != "finished":
        raise RunFailed(outcome["message"])
    return {**outcome, "restarts": watcher.restarts, "seconds": time.monotonic() - begin}


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, which Slurm, Kubernetes and `timeout` send, ends the work as Ctrl-C does; Ray's own handler aborts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _cause(error: BaseException | None) -> str:
    """The last line of what Ray says of a failure that names an exception: the traceback stands above it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Killed)\b", line)]
    return (named or lines or [type(error).__name__])[-1]
