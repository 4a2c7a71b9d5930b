"""A disk that does not take everything, without the right to mount one."""

import resource
import signal
from contextlib import contextmanager


@contextmanager
def file_size_limit(num_bytes):
    """No file of this process grows beyond the limit: the system call that writes it fails in the middle, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
