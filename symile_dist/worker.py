"""What Ray runs on each rank."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import time
from typing import Any

import ray.train
import ray.train.torch
import torch

from symile_dist.cluster import own_address
from symile_dist.config import Config
from symile_dist.environment import take_secrets
from symile_dist.errors import RunPreempted, RunStopped
from symile_dist.failpoints import VARIABLE as FAILPOINTS
from symile_dist.health.attempt import Attempt
from symile_dist.health.beat import Beat, place_of
from symile_dist.health.stop import StopRequest
from symile_dist.health.watchdog import start_watchdog
from symile_dist.metrics.exporter import Exporter, token_of
from symile_dist.metrics.recorder import Recorder

logger = logging.getLogger(__name__)


def run_worker(settings: dict[str, Any]) -> None:
    """Entry point of a rank. `settings`: the config as plain data, the driver's board, what an `Attempt` is made of.

    A mistake of the user or a run that cannot go on is told to the driver, and no restart goes on from it; anything
    else raises, and the driver restarts the group.
    """
    from symile_dist.rank import train_rank  # Ray's controller imports this file before any rank, and needs none of it

    take_secrets()
    config = Config.model_validate(settings["config"])
    board, attempt = settings["board"], Attempt(**settings["attempt"])
    # By the clocks of two machines, perhaps: a figure for people, on which nothing depends.
    attempt.phases["workers"] = max(0.0, time.time() - settings["began"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    _set_up_process(config, rank, settings["failpoints"])
    place = place_of(ray.get_runtime_context().get_node_id())
    beat = Beat(config.run_directory, rank, attempt.fence, place)
    if context.get_local_rank() == 0 and config.ray.hang_seconds:
        start_watchdog(config.run_directory, attempt.fence, place, config.ray.hang_seconds)
    device = _device()  # before anything asks CUDA for its current one
    recorder = _make_recorder(config, rank, board, device)
    stop = StopRequest()
    if rank == 0:
        stop.poll(lambda: ray.get(board.stop_asked.remote()))
    try:
        state = train_rank(config, rank, device, recorder, attempt, stop, beat)
    except RunPreempted as error:
        if rank == 0:
            assert stop.reason is not None
            ray.get(board.finish.remote(stop.reason, str(error)))
    except (RunStopped, ValueError) as error:
        # Told by any rank, as it may be the only one to see it; the first to tell is kept.
        logger.error("%s", error, exc_info=not isinstance(error, RunStopped))
        recorder.tell_end("failed")
        ray.get(board.finish.remote("stopped" if isinstance(error, RunStopped) else "refused", str(error)))
        if not isinstance(error, RunStopped):
            raise  # the others may wait for this rank in a collective: Ray ends them, and a restart returns at once
    except Exception:
        recorder.tell_end("failed")
        logger.exception("rank %d fails; the driver restarts the group while ray.max_failures allows", rank)
        raise
    else:
        if rank == 0:
            ray.get(board.finish.remote("finished", "", **state.summary()))
    finally:
        recorder.close()


def _set_up_process(config: Config, rank: int, failpoints: str | None) -> None:
    if failpoints:
        os.environ[FAILPOINTS] = failpoints
    threads = config.ray.threads_per_worker or max(1, int(config.ray.cpus_per_worker))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    logs = config.run_directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"rank-{rank:05d}.log"
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("symile_dist").addHandler(handler)
    logging.getLogger("symile_dist").setLevel(logging.INFO)
    file = open(path, "a")  # noqa: SIM115 - as long as the process lives
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR2, file)  # the watchdog's last resort
    logger.info("rank %d starts, pid %d on %s", rank, os.getpid(), socket.gethostname())


def _make_recorder(config: Config, rank: int, board: Any, device: torch.device) -> Recorder:
    metrics, local_rank = config.metrics, ray.train.get_context().get_local_rank()
    port = metrics.port + local_rank if metrics.port else 0
    exporter = None
    if metrics.enabled:
        exporter = Exporter(
            port,
            metrics.address,
            token=token_of(config),
            host=own_address(),
            label_values={"modality": list(config.modalities), "dataset": list(config.data.train)},
        )
    board.join.remote(
        {
            "rank": rank,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "node": ray.get_runtime_context().get_node_id(),
            "metrics_url": exporter.url if exporter else None,
        }
    )
    on_gpu = device.type == "cuda"
    return Recorder(exporter, publish=board.post.remote, tells_node=local_rank == 0, on_gpu=on_gpu)


def _device() -> torch.device:
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # collectives of plain objects use the current device
        os.environ["LOCAL_RANK"] = str(device.index)  # where DeepSpeed looks for it
    return device
