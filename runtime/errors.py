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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice, on the host or on a GPU. A library may put an error of its own in the place of the allocator's, as CUDA does
    where a capture breaks off, so that what an error came from counts too."""
    seen: BaseException | None = error
    while seen is not None:
        words = str(seen)
        if isinstance(seen, MemoryError) or any(each in words for each in _OUT_OF_MEMORY):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


# What torch says on a CPU, and CUDA, cuBLAS and Triton on a GPU.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "_ALLOC_FAILED")
