"""Numbers in sentences, as people read them."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """1 document, 1,200 documents; `plural` where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def size(num_bytes: int) -> str:
    """512 bytes, 1.20 kB, 34.5 MB, 120 GB: three digits, in powers of ten."""
    if num_bytes < 1000:
        return counted(num_bytes, "byte")
    value, units = num_bytes / 1e3, ["kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1e3
        units.pop(0)
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{digits}f} {units[0]}"
