"""Tables of numbers whose places have names: what a kernel's task function reads, and what the Python side writes.

    class Arguments(NamedTuple):
        x: int
        columns: int

    P, arguments = fields(Arguments)

In a task function `p[P.columns]` is as fast as `p[1]`, because `P.columns` is a constant to the compiler. On the Python side
`arguments(x=..., columns=...)` makes the table. A number cannot get into another one's place: a name that is missing, unknown or given twice is a
TypeError. A field with a default, 0 as a rule, may be left out.
"""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

_Names = ParamSpec("_Names")
_Fields = TypeVar("_Fields")


def fields(names: Callable[_Names, _Fields], start: int = 0) -> tuple[_Fields, Callable[_Names, tuple[Any, ...]]]:
    """(the place of each field, a function that takes the fields by name and returns the table) of a NamedTuple.

    start: the place of the first field, where this table follows another one.
    """
    declared: Any = names
    places = declared(*range(start, start + len(declared._fields)))
    defaults = declared._field_defaults
    parameters = ", ".join(f"{name}={defaults[name]!r}" if name in defaults else name for name in declared._fields)
    # A plain function with keyword-only parameters: a NamedTuple takes its fields by name too, but ten times as slowly.
    table = eval(f"lambda *, {parameters}: ({', '.join(declared._fields)},)")
    table.__name__ = table.__qualname__ = declared.__name__
    return places, table
