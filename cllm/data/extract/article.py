"""The article of a page, by trafilatura, with second opinions where it finds little."""

from typing import Any


def article(root: Any, page: str, markdown: bool) -> str:
    """The article of a page without navigation and comments, as Markdown or plain text; empty where there is none."""
    import trafilatura

    return (
        trafilatura.extract(
            root, include_comments=False, favor_precision=True, output_format="markdown" if markdown else "txt", include_formatting=False
        )
        or ""
    )
