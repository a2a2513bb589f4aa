"""What a check has found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    check: str
    level: Level
    found: str
    fix: str = ""
    """What to do about it, where it is not OK."""
    where: str = ""
    """The machine; empty where it is the same for all."""


def ok(check: str, found: str) -> Finding:
    return Finding(check, "OK", found)


def warn(check: str, found: str, fix: str) -> Finding:
    return Finding(check, "WARN", found, fix)


def fail(check: str, found: str, fix: str) -> Finding:
    return Finding(check, "FAIL", found, fix)


def checked(check: str, run: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What a check finds; that it could not be made is a finding too."""
    try:
        return list(run())
    except Exception as error:  # whatever a strange machine does: the other checks are still to be made
        words = str(error).strip().splitlines()
        return [fail(check, words[0] if words else type(error).__name__, "see the message")]
