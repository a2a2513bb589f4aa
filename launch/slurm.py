"""Slurm: a batch script whose steps are the nodes of a Ray cluster and the driver."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from symile_dist.launch.environment import plain_environment, refuse_references, taken_from_here
from symile_dist.launch.job import ENDED, Job, JobStatus, State
from symile_dist.launch.local import OUTPUT, exit_code_of, state_of
from symile_dist.launch.processes import output_of, pieces_of
from symile_dist.launch.records import state_folder
from symile_dist.storage import write_text

SCRIPT = "job.sh"
STATES: dict[str, State] = {
    "PENDING": "queued",
    "REQUEUED": "queued",
    "REQUEUE_HOLD": "queued",
    "SPECIAL_EXIT": "queued",
    "CONFIGURING": "queued",
    "RUNNING": "running",
    "COMPLETING": "running",
    "SUSPENDED": "running",
    "STOPPED": "running",
    "COMPLETED": "finished",
    "CANCELLED": "stopped",
    "PREEMPTED": "stopped",
    "FAILED": "failed",
    "TIMEOUT": "failed",
    "NODE_FAIL": "failed",
    "OUT_OF_MEMORY": "failed",
    "BOOT_FAIL": "failed",
    "DEADLINE": "failed",
}


def script_of(jobs: Sequence[Job]) -> str:
    """The batch script: of a job, or of an array of jobs whose tasks have the seeds as their numbers."""
    job = jobs[0]
    slurm, quote = job.profile.slurm, shlex.quote
    name, array = job.name, None
    folder, output = quote(str(job.folder)), str(job.folder / OUTPUT).replace("%", "%%")
    if len(jobs) > 1:
        seeds = [str(each.config.seed) for each in jobs]
        array, name = ",".join(seeds), name.removesuffix(seeds[0])
        before = str(job.config.run_directory).removesuffix(seeds[0])
        after = str(job.folder).removeprefix(before + seeds[0])
        assert [str(each.folder) for each in jobs] == [f"{before}{seed}{after}" for seed in seeds]
        folder = f'{quote(before)}"$SLURM_ARRAY_TASK_ID"{quote(after)}'
        output = "%a".join(part.replace("%", "%%") for part in (before, f"{after}/{OUTPUT}"))
    directives = {
        "job-name": name.removesuffix("-seed") if array else name,
        "array": array,
        "output": output,
        "open-mode": "append",
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(job.cpus_per_node),
        "signal": f"B:USR1@{slurm.grace_seconds}",
        "time": str(job.minutes) if job.minutes else None,
        "account": slurm.account,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "reservation": slurm.reservation,
    }
    if job.minutes and job.minutes * 60 <= slurm.grace_seconds:
        raise ValueError(
            f"--time: {job.minutes} minutes are not more than slurm.grace_seconds = {slurm.grace_seconds}, in which "
            "the job is to save"
        )
    if job.gpus_per_node:
        gres = slurm.gpu_option == "gres"
        directives[slurm.gpu_option] = f"gpu:{job.gpus_per_node}" if gres else str(job.gpus_per_node)
    lines = [f"#SBATCH --{name}={_directive(name, value)}" for name, value in directives.items() if value is not None]
    # A lost node costs ranks, not the job.
    lines += ["#SBATCH --no-kill", f"#SBATCH --{'requeue' if slurm.requeue else 'no-requeue'}"]
    lines += ["#SBATCH --exclusive"] if slurm.exclusive else []
    state = quote(str(state_folder()))
    exports = [f"export {name}={quote(value)}" for name, value in plain_environment(job).items()]
    exports += [
        f'export {name}="${{{where[4:]}}}"' for name, where in job.profile.secrets.items() if where.startswith("env:")
    ]
    modules = [f"module load {quote(module)}" for module in slurm.modules]
    srun, inside = _containers(jobs)
    arguments = shlex.join([f"--cpus={job.cpus_per_node}", f"--gpus={job.gpus_per_node}"])
    common = shlex.join(["srun", "--overlap", "--no-kill", "--kill-on-bad-exit=0", "--export=ALL", *srun])
    steps = f'on_head=({common} --nodes=1 --ntasks=1 --nodelist="${{hosts[0]}}"{inside})'
    python = job.profile.python or ("python3" if slurm.container else sys.executable)
    node = shlex.join([python, "-m", "symile_dist.launch.ray_node"])
    workers = ""
    if job.nodes > 1:
        others = f'{common} --nodes={job.nodes - 1} --ntasks={job.nodes - 1} --exclude="${{hosts[0]}}"{inside}'
        workers = f"""(trap '' USR1; exec {others} {node} worker --folder "$meeting" {arguments}) &\nnodes+=($!)\n"""
    config = f"{folder}/config.yaml"
    words = [python, "-m", "symile_dist", *job.train_arguments(config)]
    template = Template(files("symile_dist.launch").joinpath("templates/slurm.sh").read_text(encoding="utf-8"))
    return template.substitute(
        directives="\n".join(lines),
        environment="\n".join([*exports, *modules]),
        folder=folder,
        state=state,
        requeue="1" if slurm.requeue else "",
        steps=steps,
        node=node,
        workers=workers.rstrip("\n"),
        sizes=arguments,
        driver_command=" ".join(word if word == config else quote(word) for word in words),
    )


def _directive(name: str, value: str) -> str:
    """sbatch splits a directive at spaces and knows quotes."""
    if any(character in value for character in "\n\r\"'\\"):
        raise ValueError(f"sbatch --{name}={value!r}: quotes, backslashes and line ends cannot stand there")
    return f'"{value}"' if " " in value else value


def _containers(jobs: Sequence[Job]) -> tuple[list[str], str]:
    """(options of srun, what stands before the command) for the profile's container."""
    job = jobs[0]
    slurm = job.profile.slurm
    if not slurm.container:
        return [], ""
    always = [*(str(each.config.run_directory) for each in jobs), str(state_folder())]
    mounts = [part if ":" in part else f"{part}:{part}" for part in [*always, *slurm.container_mounts]]
    if slurm.container_runtime == "pyxis":
        return [f"--container-image={slurm.container}", f"--container-mounts={','.join(mounts)}"], ""
    gpus = ["--nv"] if job.gpus_per_node else []
    return [], " " + shlex.join(["apptainer", "exec", *gpus, "--bind", ",".join(mounts), slurm.container])


class SlurmBackend:
    """See `job.ArrayBackend`."""

    def check(self, job: Job) -> None:
        self.check_array([job])

    def check_array(self, jobs: Sequence[Job]) -> None:
        refuse_references(jobs[0], "secret")
        taken_from_here(jobs[0])
        if not shutil.which("sbatch"):
            raise ValueError("--on slurm: the command sbatch is not here; submit from one of the cluster's login nodes")
        script = script_of(jobs)
        output_of(["sbatch", "--test-only"], "--on slurm: the cluster would not take the job", script)

    def render(self, job: Job) -> str:
        return script_of([job])

    def render_array(self, jobs: Sequence[Job]) -> str:
        return script_of(jobs)

    def submit(self, job: Job) -> dict[str, Any]:
        return self.submit_array([job])[0]

    def submit_array(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        os.environ.update(taken_from_here(jobs[0]))
        state_folder().mkdir(parents=True, exist_ok=True)
        script = script_of(jobs)
        for job in jobs:
            write_text(job.folder / SCRIPT, script)
        told = output_of(["sbatch", "--parsable", str(jobs[0].folder / SCRIPT)], "--on slurm")
        number, _, cluster = told.strip().partition(";")
        where = {"cluster": cluster} if cluster else {}
        return [
            {"id": f"{number}_{job.config.seed}" if len(jobs) > 1 else number, "folder": str(job.folder)} | where
            for job in jobs
        ]

    def status(self, handle: dict[str, Any]) -> JobStatus:
        kept = exit_code_of(Path(handle["folder"]))
        try:
            text = output_of(["scontrol", "show", "job", "--oneliner", *_cluster(handle), handle["id"]], "slurm")
        except ValueError as error:
            if kept is not None:  # Slurm forgets a job minutes after its end
                return JobStatus(state_of(kept), kept, f"job {handle['id']}")
            if "Invalid job id" not in str(error):
                raise
            return self._accounted(handle)
        told = dict(pair.split("=", 1) for pair in text.split() if "=" in pair)
        state = STATES.get(told.get("JobState", ""), "unknown")
        state, code = _ended(state, told.get("ExitCode", ""))
        facts = {"id": handle["id"], "nodes": told.get("NodeList", ""), "restarts": int(told.get("Restarts", 0))}
        words = [f"job {handle['id']}", told.get("JobState", "?").lower()]
        if told.get("Reason", "None") != "None":
            words.append(told["Reason"])
        if told.get("NodeList", "(null)") != "(null)":
            words.append(f"on {told['NodeList']}")
        return JobStatus(state, code, ", ".join(words), facts)

    def _accounted(self, handle: dict[str, Any]) -> JobStatus:
        """Of a job that only Slurm's accounting knows, where there is one."""
        arguments = ["sacct", "-n", "-X", "-P", "-o", "State,ExitCode", *_cluster(handle), "-j", handle["id"]]
        try:
            state, _, code = output_of(arguments, "slurm").strip().partition("|")
        except ValueError:
            state, code = "", ""
        words = re.match(r"[A-Z_]*", state)
        known = STATES.get(words[0] if words else "", "lost")
        known, number = _ended(known, code)
        return JobStatus(known, number, f"job {handle['id']}, which Slurm no longer knows")

    def logs(self, handle: dict[str, Any], follow: bool) -> Iterator[str]:
        output = Path(handle["folder"]) / OUTPUT

        def ended() -> bool:
            try:
                return self.status(handle).state in ENDED
            except ValueError:  # slurmctld is away for a while
                return False

        return pieces_of(output, follow, ended, ask_seconds=3.0)

    def stop(self, handle: dict[str, Any], now: bool) -> None:
        waits = self.status(handle).state == "queued"
        how = [] if now or waits else ["--batch", "--signal=TERM"]
        output_of(["scancel", *how, *_cluster(handle), handle["id"]], "slurm")


def _ended(state: State, told: str) -> tuple[State, int | None]:
    """A job's state with its exit code, from Slurm's CODE:SIGNAL; only a job that is complete has the code 0."""
    if state not in ("finished", "failed", "stopped"):
        return state, None
    number, _, signal = told.partition(":")
    code = int(number) if number.isdecimal() else 0
    if state == "finished":
        return state, code
    if state == "failed" and code == 75:
        return "stopped", code
    if code == 0:
        code = 128 + int(signal) if signal.isdecimal() and signal != "0" else 75 if state == "stopped" else 1
    return state, code


def _cluster(handle: dict[str, Any]) -> list[str]:
    return [f"--clusters={handle['cluster']}"] if "cluster" in handle else []
