"""What Ray runs on each rank."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import time
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist

from symile_dist.cluster import own_address
from symile_dist.config import Config
from symile_dist.environment import take_secrets
from symile_dist.errors import RunPreempted, RunStopped
from symile_dist.failpoints import VARIABLE as FAILPOINTS
from symile_dist.health.attempt import Attempt
from symile_dist.health.beat import Beat, place_of
from symile_dist.health.stop import StopRequest
from symile_dist.health.watchdog import flight_recorder, start_watchdog
from symile_dist.metrics.exporter import Exporter, token_of
from symile_dist.metrics.recorder import Recorder
from symile_dist.positions import Place, Position

logger = logging.getLogger(__name__)


class TrainingRank:
    """The actor of a rank: a process of its own, which trains in its main thread."""

    def place(self) -> Place:
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU")
        return Place(context.get_node_id(), str(gpus[0]) if gpus else None)

    def rendezvous(self, world_size: int) -> tuple[str, int]:
        """Address and port at which the ranks meet, with the one that is asked."""
        address = ray.util.get_node_ip_address()
        self.store = dist.TCPStore(address, 0, world_size, is_master=True, wait_for_workers=False)
        return address, self.store.port

    def train(self, settings: dict[str, Any], position: Position, meeting: tuple[str, int]) -> None:
        """Trains to the end.

        Args:
            settings: the config as plain data, the driver's board, what an `Attempt` is made of.

        A mistake of the user or a run that cannot go on is told to the driver, and no restart goes on from it; anything
        else raises, and the driver restarts the group.
        """
        # Not at the top: the driver imports this file too, and needs none of it.
        from symile_dist.rank import train_rank

        take_secrets()
        config = Config.model_validate(settings["config"])
        board, attempt, rank = settings["board"], Attempt(**settings["attempt"]), position.rank
        os.environ.update(position.environment)
        device = _device(position)
        if device.type == "cuda":
            os.environ.update(flight_recorder(config.run_directory, attempt.fence))
        _set_up_process(config, rank, settings["failpoints"])
        _join(config, device, position, meeting)
        # By the clocks of two machines, perhaps: a figure for people, on which nothing depends.
        attempt.phases["workers"] = max(0.0, time.time() - settings["began"])
        place = place_of(ray.get_runtime_context().get_node_id())
        beat = Beat(config.run_directory, rank, attempt.fence, place)
        if position.local_rank == 0 and config.ray.hang_seconds:
            start_watchdog(config.run_directory, attempt.fence, place, config.ray.hang_seconds)
        recorder = _make_recorder(config, position, board, device)
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
                raise  # the others may wait for this rank in a collective: the driver ends them
        except Exception:
            recorder.tell_end("failed")
            logger.exception("rank %d fails; the driver restarts the group while ray.max_failures allows", rank)
            raise
        else:
            if rank == 0:
                ray.get(board.finish.remote("finished", "", **state.summary()))
        finally:
            recorder.close()


def _join(config: Config, device: torch.device, position: Position, meeting: tuple[str, int]) -> None:
    """The process group of all ranks; DeepSpeed takes it over."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = meeting[0], str(meeting[1])
    timeout = timedelta(seconds=config.ray.collective_timeout_seconds)
    store = dist.TCPStore(*meeting, position.world_size, is_master=False, timeout=timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=position.rank,
        world_size=position.world_size,
        timeout=timeout,
    )


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


def _make_recorder(config: Config, position: Position, board: Any, device: torch.device) -> Recorder:
    metrics, local_rank = config.metrics, position.local_rank
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
            "rank": position.rank,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "node": ray.get_runtime_context().get_node_id(),
            "metrics_url": exporter.url if exporter else None,
        }
    )
    on_gpu = device.type == "cuda"
    return Recorder(exporter, publish=board.post.remote, tells_node=local_rank == 0, on_gpu=on_gpu)


def _device(position: Position) -> torch.device:
    if not position.gpus:
        return torch.device("cpu")
    device = torch.device("cuda", position.local_rank)
    torch.cuda.set_device(device)  # collectives of plain objects use the current device
    return device
