"""Exact duplicates: equal texts, whatever white space they were set with."""


def digest(text: str) -> bytes:
    """16 bytes, equal for texts that differ in white space alone: XXH3-128 of the text with one space for each run of them.

    Raises DataError where xxhash is not installed.
    """
    try:
        import xxhash
    except ImportError:
        from cllm.runtime.errors import DataError

        raise DataError("finding duplicates needs xxhash, which is not installed. Install it with: pip install 'cllm[data]'") from None
    return xxhash.xxh3_128_digest(b" ".join(text.encode("utf-8", "surrogatepass").split()))
