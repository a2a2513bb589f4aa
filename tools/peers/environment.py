"""`make peers`, its last step: makes the environment of the peers see this one's packages, and tries it.

Run by this project's Python. MosaicML Streaming imports torchvision for its image datasets as soon as it is imported;
no byte of this benchmark passes through it, so that environment alone gets a torchvision with just the two names.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

TORCHVISION = {
    "__init__.py": '"""A stand-in of the benchmark of data: not torchvision."""\n',
    "datasets.py": "class VisionDataset: ...\n",
    "transforms/__init__.py": "",
    "transforms/functional.py": "to_tensor = None\n",
}
VERSIONS = (
    "import importlib.metadata as m, json, litdata, moto.server, streaming, torch; "
    "print(json.dumps({n: m.version(n) for n in ('litdata', 'mosaicml-streaming', 'moto', 'torch')}))"
)


def share_packages(python: Path) -> None:
    """Puts this environment's packages behind those of the other one."""
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    packages = Path(found.stdout.strip())
    ours = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (packages / "shared.pth").write_text("\n".join(ours) + "\n", encoding="utf-8")
    for name, text in TORCHVISION.items():
        file = packages / "torchvision" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def main() -> int:
    python = Path(sys.argv[1])
    share_packages(python)
    found = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True)
    if found.returncode:
        print(f"the peers cannot be imported:\n{found.stderr}", file=sys.stderr)
        return 1
    versions: dict[str, str] = json.loads(found.stdout.splitlines()[-1])
    print("the peers are there: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
