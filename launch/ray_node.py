"""A node of the Ray cluster that a job brings with it: on Slurm, and for trying several nodes on one machine.

    python -m symile_dist.launch.ray_node head --folder F --nodes N --toward HOST
    python -m symile_dist.launch.ray_node worker --folder F

The head writes its address into the folder, which all nodes see; the others wait for it. Each runs until it is asked to
end (SIGTERM) or its parent has ended, and leaves no process behind. Every port is one that nobody had a moment before,
so that several jobs may share a machine. Whoever reaches Ray's ports can run code: RAY_AUTH_MODE=token and the token
have to be in the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from symile_dist.launch.processes import Asked, adopt_orphans, end_descendants, ends_with_parent

ADDRESS, DASHBOARD = "address", "dashboard"
ADDRESS_SECONDS = 600.0
"""How long a worker waits for the head's address."""
GONE_SECONDS = 60.0
"""A head that does not answer for so long has ended: so does the worker."""
RESTARTS = 3
"""Of a head whose ports were taken meanwhile."""


def free_ports(count: int, address: str) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((address, 0))
        return [each.getsockname()[1] for each in sockets]


def own_address(toward: str | None) -> str:
    """This node's address, as `toward` sees it; the loopback's where it names nobody else."""
    if not toward:
        return "127.0.0.1"
    try:
        where = socket.getaddrinfo(toward, 9, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        raise SystemExit(f"{toward}: the name of this node's neighbour is not known here ({error})") from None
    with socket.socket(where[0], socket.SOCK_DGRAM) as probe:
        probe.connect(where[4])
        return str(probe.getsockname()[0])


def use_network_of(ip: str) -> None:
    """gloo takes the interface that the host's name leads to, which is often the loopback's: it is told this one."""
    for interface, addresses in psutil.net_if_addrs().items():
        if any(address.address == ip for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def ray_start(ip: str, temporary: Path, arguments: list[str], options: argparse.Namespace) -> tuple[list[str], str]:
    """(the command that runs a node until it is ended, the address at which the node answers once it is up)."""
    kinds = ["node-manager", "object-manager", "dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent"]
    ports = free_ports(len(kinds) + 1, ip)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    command += [f"--node-ip-address={ip}", f"--temp-dir={temporary}", *arguments]
    command += [f"--{kind}-port={port}" for kind, port in zip(kinds, ports, strict=False)]
    command += [f"--metrics-export-port={ports[-1]}", f"--num-cpus={options.cpus}", f"--num-gpus={options.gpus}"]
    return command, f"{ip}:{ports[0]}"


def run_head(options: argparse.Namespace, asked: Asked, temporary: Path) -> int:
    ip = own_address(options.toward)
    use_network_of(ip)
    for _ in range(RESTARTS):
        port, client, dashboard = free_ports(3, ip)
        arguments = ["--head", f"--port={port}", f"--ray-client-server-port={client}", "--include-dashboard=false"]
        if options.dashboard:
            arguments[-1:] = ["--include-dashboard=true", f"--dashboard-host={ip}", f"--dashboard-port={dashboard}"]
        command, own = ray_start(ip, temporary, arguments, options)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and not asked() and not (answers(f"{ip}:{port}") and answers(own)):
            time.sleep(0.2)
        if process.poll() is not None and not asked():
            end_descendants()  # a port was taken meanwhile, or the machine was too busy
            continue
        if options.dashboard:
            (options.folder / DASHBOARD).write_text(f"http://{ip}:{dashboard}")
        (options.folder / f".{ADDRESS}").write_text(f"{ip}:{port}")
        os.replace(options.folder / f".{ADDRESS}", options.folder / ADDRESS)
        return ends_with_parent(process, asked) or 0
    print("Ray's head does not start: what it says stands above", file=sys.stderr)
    return 1


def run_worker(options: argparse.Namespace, asked: Asked, temporary: Path) -> int:
    """Joins, and joins again when the connection was cut: a node that was given up by the head ends by itself."""
    file, deadline = options.folder / ADDRESS, time.monotonic() + ADDRESS_SECONDS
    while not file.exists() and not asked():
        if time.monotonic() > deadline:
            print(f"{file}: the head has not written its address for {ADDRESS_SECONDS:g} s", file=sys.stderr)
            return 1
        time.sleep(0.2)
    while not asked():
        head = file.read_text()
        ip = own_address(head.rpartition(":")[0]) if not head.startswith("127.") else "127.0.0.1"
        use_network_of(ip)
        deadline = time.monotonic() + GONE_SECONDS
        while not answers(head):
            if asked() or time.monotonic() > deadline:
                return 0
            time.sleep(1)
        command, _ = ray_start(ip, temporary, [f"--address={head}"], options)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        if ends_with_parent(process, asked) is None:
            return 0
        end_descendants()
        time.sleep(1)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="ray_node", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("role", choices=["head", "worker"])
    parser.add_argument("--folder", type=Path, required=True, help="where the head leaves its address")
    parser.add_argument("--toward", help="of another node, to choose the network by; none: loopback")
    parser.add_argument("--cpus", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--dashboard", action="store_true", help="with Ray's dashboard")
    options = parser.parse_args()
    asked = Asked()
    adopt_orphans()
    # Short: a path of sockets may have 107 characters.
    temporary = Path(tempfile.mkdtemp(prefix="symile-"))
    try:
        return run_head(options, asked, temporary) if options.role == "head" else run_worker(options, asked, temporary)
    finally:
        end_descendants()
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
