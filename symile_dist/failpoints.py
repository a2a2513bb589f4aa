"""Faults at named places, asked for by the environment: how tests show what a fault costs. Without it, nothing.

    SYMILE_DIST_FAILPOINTS='[{"at": "checkpoint.half_written", "rank": 1, "step": 20, "do": "kill", "once": "/tmp/x"}]'

`do`: kill (SIGKILL), stop (SIGSTOP), hang (sleeps, holding the GIL), raise (OSError ENOSPC). `rank` and `step` may be
left out: any. `once` names a file that is made when the fault happens: it happens once, in whichever process. `while`
names a file: only as long as it is there. `after`: so many seconds later, wherever the process is then (kill and
stop).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import signal
import threading
from typing import Any

VARIABLE = "SYMILE_DIST_FAILPOINTS"


@functools.cache
def _asked_for(text: str) -> list[dict[str, Any]]:
    faults: list[dict[str, Any]] = json.loads(text)
    return faults


def failpoint(at: str, rank: int, step: int) -> None:
    """Does here what the environment asks for; where it asks for nothing this is one look into a dict."""
    text = os.environ.get(VARIABLE)
    if not text:
        return
    for fault in _asked_for(text):
        if fault["at"] != at or fault.get("rank", rank) != rank or fault.get("step", step) != step:
            continue
        if "while" in fault and not os.path.exists(fault["while"]):
            continue
        if "once" in fault:
            try:
                os.close(os.open(fault["once"], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
        if "after" in fault:
            timer = threading.Timer(fault["after"], _do, (fault["do"], at))
            timer.daemon = True
            timer.start()
        else:
            _do(fault["do"], at)


def _do(action: str, at: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        # To this thread: any other that took the signal would let this one go on for a few instructions.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    elif action == "hang":
        ctypes.PyDLL(None).sleep(3600)  # PyDLL keeps the GIL: no thread of this process goes on
    elif action == "raise":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (failpoint {at})")
    else:
        raise ValueError(f"{VARIABLE}: unknown action {action!r}")
