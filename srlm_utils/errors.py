"""The kit's errors: each message says what was found, what was expected and what to do next.

Every class also inherits the builtin it refines, so ``except ValueError`` keeps working.
"""


class SrlmError(Exception):
    """Base of all errors the kit raises on purpose; the command line turns it into exit code 2."""


class ParamError(SrlmError, ValueError):
    """A parameter is unknown, misspelt, of the wrong type or out of range."""


class DataError(SrlmError, ValueError):
    """A file or a row is malformed."""


class MissingInputError(SrlmError, FileNotFoundError):
    """A step's input does not exist yet; the message names the step that makes it."""


class ModelError(SrlmError, OSError):
    """A model folder, hub id or embedded model cannot be used."""


class StorageError(SrlmError, OSError):
    """A file cannot be written: the disk is full, or the folder read-only."""


class ResourceError(SrlmError, MemoryError):
    """A step cannot fit into the memory or onto the disk; the message names the parameter to lower."""


class LockedError(SrlmError, RuntimeError):
    """Another process writes this step, or runs this run or sweep."""


class StepFailed(SrlmError, RuntimeError):
    """A notebook ended with an error that was not about its input; exit code 1."""


class Interrupted(StepFailed):
    """The user stopped a notebook; what comes after it is not begun."""


def first_line(e: Exception) -> str:
    """What an error of a library says, in one line; some say nothing."""
    return (str(e).splitlines() or [""])[0]


def cut(value) -> str:
    """A value as a message shows it, 80 characters at most."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
