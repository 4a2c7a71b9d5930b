"""Every error that a user can meet. A message says what was wrong, what was expected and what to do next.

The command line turns each into one clear line and an exit status; programs can catch `CLLMError` for all of them.
"""


class CLLMError(Exception):
    """Base of all errors raised on purpose; `exit_status` is what the command line ends with."""

    exit_status = 1


class UserError(CLLMError, ValueError):
    """A wrong option, argument or configuration value (exit status 2)."""

    exit_status = 2


class DataError(CLLMError):
    """The data cannot be used: missing, empty, too short, damaged, or packed with another tokenizer."""


class CheckpointError(CLLMError):
    """A checkpoint is missing, damaged, foreign, or belongs to another configuration."""


class BackendError(CLLMError):
    """A backend or device that was asked for by name cannot serve this operation."""


class OutputError(CLLMError):
    """A file or folder could not be written: the disk is full, or the place is read-only or missing."""
