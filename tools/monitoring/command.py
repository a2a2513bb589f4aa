"""symile-dist monitoring: a Prometheus over all runs that are known here, and files for one of one's own."""

from __future__ import annotations

import contextlib
import fcntl
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from symile_dist.signals import terminated_like_interrupted
from symile_dist.storage import write_text
from symile_dist.tools.monitoring.alerts import RUNBOOK, alerts, rules_text
from symile_dist.tools.monitoring.grafana import dashboard_text, dashboards
from symile_dist.tools.monitoring.prometheus import (
    ALERTMANAGER,
    CONFIG_FILE,
    PROMETHEUS,
    RULES_FILE,
    TARGETS_FILE,
    Prometheus,
    config_text,
    find,
    refuse_taken,
    scrape_config,
    start_alertmanager,
)
from symile_dist.tools.monitoring.targets import write_merged

FOLLOW_SECONDS = 1.0
"""From one look at the runs' lists to the next."""
SCRAPE_SECONDS = 2.0
"""By default; with five seconds in Prometheus itself a new endpoint is found within ten."""
REFRESH_SECONDS = 5.0
ALERTMANAGER_OFFSET = 3
"""From Prometheus's port to Alertmanager's, as 9090 and 9093 are theirs."""
LOCK_FILE, ALERTMANAGER_FILE = "lock", "alertmanager.yml"

Known = Callable[[Sequence[str]], list[Path]]
"""The directories of the named runs, or of all that are known here."""


CONFIG_HEAD = """\
# For a Prometheus of your own, 2.42 or newer, beside rules.yml. The labels run, run_id, role, rank and host come with
# the endpoints; keep them: rules and dashboards go by them. The list of endpoints, all runs' in one file:
#   symile-dist monitoring targets --out targets/runs.json --follow
# or one run's: RUN/targets.json, or, without a shared disk, from its driver (metrics.driver_port, `page` in run.json):
#   http_sd_configs: [{url: "http://HOST:PORT/targets", refresh_interval: 5s}]
# With metrics.token_file:
#   authorization: {credentials_file: /path/to/the/token}
"""


def files_of_rules(time_scale: float = 1.0, runbook: str = RUNBOOK) -> dict[str, str]:
    """What Prometheus and Alertmanager read, by name. Raises ValueError for a wrong time scale."""
    content = scrape_config("targets/*.json", alertmanager="127.0.0.1:9093")
    return {
        RULES_FILE: rules_text(time_scale, runbook),
        CONFIG_FILE: f"{CONFIG_HEAD}\n{config_text(content)}",
        ALERTMANAGER_FILE: shipped(ALERTMANAGER_FILE),
    }


def files_of_dashboards() -> dict[str, str]:
    """What Grafana reads, by name."""
    return {f"{name}.json": dashboard_text(content) for name, content in dashboards().items()}


def files_of_configs() -> dict[str, str]:
    """Those files of configs/monitoring that are made from the tables, by their path there."""
    made = {f"grafana/dashboards/{name}": text for name, text in files_of_dashboards().items()}
    return made | {name: text for name, text in files_of_rules().items() if name != ALERTMANAGER_FILE}


def shipped(name: str) -> str:
    """A file of configs/monitoring."""
    return (files("symile_dist.configs") / "monitoring" / name).read_text(encoding="utf-8")


def write_files(folder: Path, made: dict[str, str]) -> list[str]:
    """Returns their paths. Raises ValueError where the folder is a file, OSError where it cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: is a file, not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(folder / name, text)
    return [str(folder / name) for name in made]


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Raises ValueError where another `monitoring up` has the folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: is a file, not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {folder}: another `symile-dist monitoring up` is at work there") from None
        yield


def up(
    folder: Path,
    known: Known,
    runs: Sequence[str] = (),
    *,
    port: int = 9090,
    with_alertmanager: bool = False,
    token_file: str | None = None,
    time_scale: float = 1.0,
    scrape_seconds: float = SCRAPE_SECONDS,
    ready: Callable[[dict[str, Any]], None] = lambda told: None,
    ended: Callable[[], bool] = lambda: False,
) -> None:
    """Serves until SIGTERM, Ctrl-C or `ended`; returns once no process of it is left.

    Args:
        folder: for configuration, log and data, which are kept.
        runs: only these; by default all that are known, as they come and go.
        token_file: what metrics.token_file of the runs is.
        ready: told where everything is, once it answers.

    Raises ValueError for what is in the way before anything is written (a program that is not here, a taken port, a
    run that is not known), RunFailed where a server ends by itself.
    """
    programs = {"Prometheus": (PROMETHEUS, port)}
    if with_alertmanager:
        programs["Alertmanager"] = (ALERTMANAGER, port + ALERTMANAGER_OFFSET)
    for name, (program, its_port) in programs.items():
        find(program)
        if not 0 < its_port < 65536:
            raise ValueError(f"--port {port}: {name} would listen on {its_port}; should be from 1 to 65535")
        refuse_taken(its_port, name)
    if token_file and not Path(token_file).is_file():
        raise ValueError(f"--token-file {token_file}: no such file")
    if not 0.1 <= scrape_seconds <= 60:
        raise ValueError(f"--scrape-seconds {scrape_seconds:g}: should be from 0.1 to 60")
    rules = rules_text(time_scale)
    if runs:
        known(runs)
    with _alone_in(folder), terminated_like_interrupted(), contextlib.suppress(KeyboardInterrupt):
        targets, folder = folder.absolute() / TARGETS_FILE, folder.absolute()
        content = scrape_config(
            str(targets),
            rule_files=[str(folder / RULES_FILE)],
            scrape_seconds=scrape_seconds,
            refresh_seconds=REFRESH_SECONDS,
            alertmanager=f"127.0.0.1:{port + ALERTMANAGER_OFFSET}" if with_alertmanager else None,
            token_file=str(Path(token_file).absolute()) if token_file else None,
        )
        write_files(folder, {RULES_FILE: rules, CONFIG_FILE: config_text(content)})
        endpoints = write_merged(targets, known(runs))
        told = {"folder": str(folder), "endpoints": endpoints, "alerts": [alert.name for alert in alerts()]}
        with contextlib.ExitStack() as stack:
            if with_alertmanager:
                if not (folder / ALERTMANAGER_FILE).exists():  # the user's, from then on
                    write_files(folder, {ALERTMANAGER_FILE: shipped(ALERTMANAGER_FILE)})
                manager = stack.enter_context(
                    start_alertmanager(folder, folder / ALERTMANAGER_FILE, port + ALERTMANAGER_OFFSET)
                )
                told |= {"alertmanager": manager.url, "alertmanager_pid": manager.process.pid}
            server = stack.enter_context(Prometheus(folder, port))
            ready({"prometheus": server.url, "pid": server.process.pid, **told})
            servers = [server, *([manager] if with_alertmanager else [])]
            while not ended():
                time.sleep(FOLLOW_SECONDS)
                for each in servers:
                    each.check()
                _follow(targets, known, runs)


def _follow(targets: Path, known: Known, runs: Sequence[str]) -> None:
    """What cannot be read or written now may be a moment later: the list stays as it was."""
    with contextlib.suppress(OSError, ValueError):
        write_merged(targets, known(runs))


def follow(path: Path, known: Known, runs: Sequence[str], ended: Callable[[], bool] = lambda: False) -> None:
    """Keeps a list of endpoints up to date for a Prometheus of one's own, until SIGTERM, Ctrl-C or `ended`."""
    with terminated_like_interrupted(), contextlib.suppress(KeyboardInterrupt):
        while not ended():
            _follow(path, known, runs)
            time.sleep(FOLLOW_SECONDS)


def up_text(told: dict[str, Any], asked: Callable[[str], bool]) -> str:
    """Where everything is. `asked` says whether a page is there: Debian's Prometheus has the classic pages alone."""
    url = told["prometheus"]
    pages = f"{url}/classic" if asked(f"{url}/classic/graph") else url
    lines = [
        f"Prometheus    {pages}/graph   alerts: {pages}/alerts   endpoints: {pages}/targets",
        f"  endpoints   {told['endpoints']} now; runs that come and go are followed",
        f"  kept in     {told['folder']}",
    ]
    if "alertmanager" in told:
        lines.append(f"Alertmanager  {told['alertmanager']}   its receivers: {told['folder']}/{ALERTMANAGER_FILE}")
    lines.append("  for Grafana  symile-dist monitoring dashboards --out DIR; the data source is the URL above")
    lines.append("Ctrl-C ends it")
    return "\n".join(lines)


def answers(url: str) -> bool:
    """Whether a page is there."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False
