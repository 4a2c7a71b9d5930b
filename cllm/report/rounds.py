"""The rounds of a training that follows text which grows, as a section of a page."""

from collections.abc import Sequence

from cllm.monitor.records import RoundRow
from cllm.report.charts import Series, line_chart
from cllm.report.markup import Html, element, table
from cllm.runtime.quantities import size

MOST_ROUNDS = 200


def rounds_section(rounds: Sequence[RoundRow]) -> Html | None:
    """A chart of what each round made of old and new text that nobody learns from, and a table of all rounds, the newest first."""
    if not rounds:
        return None
    after = [
        Series(name, [(row.round, loss) for row in rounds if (loss := getattr(row, key)) is not None], color, dots=True)
        for color, (name, key) in enumerate((("old text", "old_after"), ("new text", "new_after")))
    ]
    rows = [
        (
            row.round,
            "kept" if row.accepted else "undone",
            f"{row.documents:,}",
            size(row.bytes),
            size(row.replayed_bytes),
            f"{row.steps:,}",
            _change(row.old_before, row.old_after),
            _change(row.new_before, row.new_after),
            row.reason,
            ", ".join(f"{name} ({count:,})" for name, count in row.sources.items()),
        )
        for row in rounds[::-1][:MOST_ROUNDS]
    ]
    head = ("round", "", "new documents", "text", "replayed", "steps", "old text", "new text", "why", "from")
    return element(
        "section",
        element("h2", "Rounds"),
        element("p", "Losses of text that is never learnt, in nats per token, before and after each round. Old text is that of earlier rounds."),
        element("figure", line_chart("rounds", "Loss after each round", [each for each in after if each.points], "round")),
        table(head, rows, "Rounds", (2, 3, 4, 5)),
    )


def _change(before: float | None, after: float | None) -> str:
    return " -> ".join("?" if each is None else f"{each:.3f}" for each in (before, after)) if before is not None else f"{after:.3f}" if after else ""
