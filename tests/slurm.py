"""A real Slurm on this machine: munged, slurmctld and two slurmd, in a folder of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

NODES = ("n1", "n2")
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "srun")


def missing() -> list[str]:
    """Commands that are not on this machine (Debian: slurm-wlm, munge)."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [name for name in NEEDED if not shutil.which(name, path=path)]


def _ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _configuration(folder: Path) -> str:
    control, *daemons = _ports(1 + len(NODES))
    host = socket.gethostname()
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=8000 State=UNKNOWN"
        for name, port in zip(NODES, daemons, strict=True)
    )
    # cred_expire: a job that is queued again would else begin two minutes later.
    return f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
KillWait=10
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Path]:
    """Yields the configuration's path, for SLURM_CONF. Everything is ended afterwards."""
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    configuration = folder / "slurm.conf"
    configuration.write_text(_configuration(folder))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    environment = os.environ | {
        "SLURM_CONF": str(configuration),
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
    }
    places = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    munge = [f"--{option}={folder / name}" for option, name in places.items()]
    commands = [["munged", "--foreground", "--force", "--num-threads=2", *munge, f"--log-file={folder / 'munge.log'}"]]
    commands += [["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}-{len(daemons)}.out", "wb") as output:
                daemons.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
            if command[0] == "munged":
                _until(lambda: (folder / "munge.socket").exists(), "munged does not start")

        def idle() -> bool:
            asked = ["sinfo", "--noheader", "--Node", "--format=%t"]
            done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
            return done.stdout.split() == ["idle"] * len(NODES)

        _until(idle, f"Slurm's nodes do not come up, see {folder}")
        yield configuration
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _until(done: object, words: str, seconds: float = 30) -> None:
    assert callable(done)
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, words
        time.sleep(0.1)
