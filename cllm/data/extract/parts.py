"""Large files of records are read in parts, by several tasks: as much of a file as one of them reads, and what it says beside its documents.

How a file is read is decided once, from its beginning (`records.divide`), and every part is told. A part of a file of lines is whole lines, in
UTF-8, where no line changes what another one means; of Parquet it is row groups.
"""

from dataclasses import dataclass, field
from typing import Any

from cllm.data.documents.files import Skipped


@dataclass
class Left:
    """What the records of a file, or of a part of it, gave beside documents, and how many of those there were."""

    damaged: Skipped = field(default_factory=Skipped)
    empty: Skipped = field(default_factory=Skipped)
    documents: int = 0

    def update(self, other: "Left") -> None:
        """Adds what a later part has left."""
        self.damaged.update(other.damaged)
        self.empty.update(other.empty)
        self.documents += other.documents

    @property
    def reason(self) -> str:
        """What is told of the file behind its documents: damaged before empty records. Empty where all is well."""
        if self.damaged.total:
            return f"damaged ({'; '.join(self.damaged.lines()[:3])})"
        if self.empty.total:
            return f"empty ({'; '.join(self.empty.lines()[:3])})"
        return "" if self.documents else "empty"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"damaged": self.damaged.to_dict(), "empty": self.empty.to_dict(), "documents": self.documents}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Left":
        return cls(Skipped.from_dict(values["damaged"]), Skipped.from_dict(values["empty"]), int(values["documents"]))


@dataclass(frozen=True)
class Part:
    """Bytes `begin` to `end` of a file, whole lines of which the first has the number `line`; of Parquet, row groups `begin` to `end`."""

    how: dict[str, Any]
    """What `records.divide` has said of the file."""
    begin: int
    end: int
    line: int = 1

    @property
    def is_groups(self) -> bool:
        """Whether it is of Parquet."""
        return "groups" in self.how

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"how": self.how, "begin": self.begin, "end": self.end, "line": self.line}
