"""Two hosts on one machine: network namespaces with their own addresses on a bridge. Processes and files are shared."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from symile_dist.launch.ray_node import ADDRESS, answers


def why_not() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"symile-try-{os.getpid()}"
    try:
        done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "the command `ip` is not here (Debian: iproute2)"
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return done.stderr.strip() or None


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Hosts:
    """Names h0, h1, ...; the test itself stands on the bridge, with an address of its own."""

    def __init__(self, count: int) -> None:
        number = os.getpid() % 60000
        self._tag, self._net = f"{number:05d}", f"10.{180 + number // 250 % 60}.{number % 250}"
        self.names = [f"h{index}" for index in range(count)]
        self._processes: list[subprocess.Popen[bytes]] = []
        _ip("link", "add", f"sb{self._tag}", "type", "bridge")
        _ip("addr", "add", f"{self._net}.254/24", "dev", f"sb{self._tag}")
        _ip("link", "set", f"sb{self._tag}", "up")
        for index in range(count):
            space, inner, outer = self._space(index), f"si{index}{self._tag}", self._outer(index)
            _ip("netns", "add", space)
            _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            _ip("link", "set", inner, "netns", space)
            _ip("link", "set", outer, "master", f"sb{self._tag}", "up")
            for words in (["addr", "add", f"{self.address(index)}/24", "dev", inner], ["link", "set", inner, "up"]):
                _ip("-n", space, *words)
            _ip("-n", space, "link", "set", "lo", "up")

    def _space(self, index: int) -> str:
        return f"symile-{self._tag}-{index}"

    def _outer(self, index: int) -> str:
        return f"so{index}{self._tag}"

    def address(self, index: int) -> str:
        return f"{self._net}.{index + 1}"

    def start(
        self, index: int, command: Sequence[str], environment: dict[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        """Starts a process on a host."""
        with open(log, "ab") as output:
            process = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self._space(index)}", *command],
                # What the test's own Ray has set is not theirs.
                env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def cut(self, index: int) -> None:
        """Pulls the host's cable."""
        _ip("link", "set", self._outer(index), "down")

    def heal(self, index: int) -> None:
        _ip("link", "set", self._outer(index), "up")

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """The host's power is gone: every process that this one has started, at once."""
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(45)
            except subprocess.TimeoutExpired:
                self.kill(process)
        for index in range(len(self.names)):
            subprocess.run(["ip", "netns", "del", self._space(index)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"sb{self._tag}"], capture_output=True, check=False)


@contextlib.contextmanager
def hosts(count: int = 2) -> Iterator[Hosts]:
    made = Hosts(count)
    try:
        yield made
    finally:
        made.close()


class RayHosts:
    """A Ray over hosts, with a token: its head, with the dashboard, on h0."""

    def __init__(self, on: Hosts, folder: Path, cpus: int, environment: dict[str, str]) -> None:
        self.hosts, self.folder, self._cpus = on, folder, cpus
        self.token = folder / "token"
        self.token.write_text("00112233445566778899aabbccddeeff" * 2)
        self.token.chmod(0o600)
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token), **environment}
        self.nodes = [self._start(index) for index in range(len(on.names))]
        _until(lambda: (folder / ADDRESS).exists(), f"Ray's head does not start, see {folder}")
        self.address = (folder / ADDRESS).read_text()
        self.dashboard = (folder / "dashboard").read_text()
        _until(lambda: answers(self.dashboard.removeprefix("http://")), "Ray's dashboard does not start")

    def _start(self, index: int) -> subprocess.Popen[bytes]:
        role = ["head", "--dashboard"] if index == 0 else ["worker"]
        command = [sys.executable, "-m", "symile_dist.launch.ray_node", *role, "--folder", str(self.folder)]
        command += [f"--cpus={self._cpus}", f"--toward={self.hosts.address(1 - min(index, 1))}"]
        return self.hosts.start(index, command, self.environment, self.folder / f"node-{index}.log")

    def restart(self, index: int) -> None:
        """A host comes back."""
        self.nodes[index] = self._start(index)


def _until(done: object, words: str, seconds: float = 90) -> None:
    assert callable(done)
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, words
        time.sleep(0.2)
