"""Exceptions that cross rooms. A user's mistake is a ValueError (exit code 2) wherever it is found."""


class RunStopped(RuntimeError):
    """The run cannot go on and a restart would not help; the message says why and what to do. Same on all ranks."""


class RunPreempted(RuntimeError):
    """The run was asked to stop, and has saved everything. Same on all ranks."""


class RunFailed(RuntimeError):
    """The run ended without reaching its last step (exit code 1)."""


class StorageError(RuntimeError):
    """A disk or an object store that does not answer as it should; the message names the file or the URL."""
