"""Every error that the workbench raises on purpose.

    DuplexError
    ├── RequestError (ValueError)      the request was wrong: exit code 2
    │   ├── ConfigError                a config, with all of its faults at once
    │   ├── MissingInputError          an earlier stage, a file or a package that is not there
    │   └── DataFileError              a persona, scenario or prompt file that breaks its schema
    └── WorkError (RuntimeError)       the work failed: exit code 1
        ├── RecordError                one record is bad: it is rejected, the stage goes on
        ├── TransientError             may work next time: the record stays undone, not rejected
        ├── BudgetError                what may be spent is spent; all that was paid for is kept
        ├── LockedError                another run holds the run folder
        ├── CorruptFileError           a file that is not what its name or digest says
        ├── StageFailedError           a stage ended without its manifest
        ├── DeadAdapterError           an adapter that got no gradient
        ├── MergeError                 a merge that changed nothing, or changed the wrong thing
        ├── ServerError                a server that did not start, or refused a conversation
        └── PodError                   a rented pod that did not come up, or whose API is in trouble

A message says what must hold, what was found, and what to do next.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_WORK_FAILED = 1
EXIT_BAD_REQUEST = 2


class DuplexError(Exception):
    """Root of the tree. `exit_code` is what the command line returns for it."""

    exit_code = EXIT_WORK_FAILED


class RequestError(DuplexError, ValueError):
    exit_code = EXIT_BAD_REQUEST


class ConfigError(RequestError):
    """A config file is wrong. `faults` holds one line for each fault found."""

    def __init__(self, source: str, faults: list[str]):
        self.source = source
        self.faults = faults
        listing = "\n".join(f"  - {fault}" for fault in faults)
        count = f"{len(faults)} fault" + ("s" if len(faults) != 1 else "")
        super().__init__(f"{source}: {count}; nothing was written.\n{listing}")


class MissingInputError(RequestError):
    pass


class DataFileError(RequestError):
    pass


class WorkError(DuplexError, RuntimeError):
    exit_code = EXIT_WORK_FAILED


class RecordError(WorkError):
    pass


class TransientError(WorkError):
    pass


class BudgetError(WorkError):
    pass


class LockedError(WorkError):
    pass


class CorruptFileError(WorkError):
    pass


class StageFailedError(WorkError):
    pass


class DeadAdapterError(WorkError):
    pass


class MergeError(WorkError):
    pass


class ServerError(WorkError):
    pass


class PodError(WorkError):
    pass
