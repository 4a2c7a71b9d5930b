"""What the server counts, in the text format of Prometheus: /metrics. No label holds a name that a client chose."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cllm.generate.request import Stats

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_WHOLE = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
# Gauges and counters of the engines: name, type, help, field.
_ENGINE = (
    ("requests_running", "gauge", "Answers that are being written.", "running"),
    ("requests_waiting", "gauge", "Answers that wait for a row or for memory.", "waiting"),
    ("kv_cache_pages_used", "gauge", "Pages of keys and values in use, kept beginnings included.", "pages_used"),
    ("kv_cache_pages", "gauge", "Pages of keys and values there are.", "pages_total"),
    ("prompt_tokens_total", "counter", "Prompt tokens computed.", "tokens_in"),
    ("generation_tokens_total", "counter", "Tokens generated.", "tokens_out"),
    ("prefix_cache_hit_tokens_total", "counter", "Prompt tokens that were in the cache already.", "prefix_hits"),
    ("engine_steps_total", "counter", "Steps of the engines.", "steps"),
)


class Histogram:
    """Counts of seconds up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str, help: str) -> list[str]:
        total, lines = 0, [f"# HELP {name} {help}", f"# TYPE {name} histogram"]
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sum!r}", f"{name}_count {total}"]


class Metrics:
    """Counters of requests by route and status, and how long clients waited. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._first_token, self._whole = Histogram(_FIRST_TOKEN), Histogram(_WHOLE)
        self._retired: Counter[str] = Counter()

    def answered(self, route: str, status: int, seconds: float) -> None:
        with self._lock:
            self._requests[route, status] += 1
            self._whole.add(seconds)

    @property
    def num_requests(self) -> int:
        return sum(self._requests.values())

    def first_token(self, seconds: float) -> None:
        with self._lock:
            self._first_token.add(seconds)

    def retire(self, stats: Stats) -> None:
        """Keeps the counts of an engine that is let go, because a counter may not fall."""
        with self._lock:
            for _, kind, _, field in _ENGINE:
                if kind == "counter":
                    self._retired[field] += getattr(stats, field)

    def text(self, engines: Sequence[Any]) -> str:
        """All of it; engines: the `Stats` of each."""
        with self._lock:
            lines = []
            for name, kind, help, field in _ENGINE:
                value = sum(getattr(each, field) for each in engines) + self._retired[field]
                lines += [f"# HELP cllm_{name} {help}", f"# TYPE cllm_{name} {kind}", f"cllm_{name} {value}"]
            lines += ["# HELP cllm_http_requests_total Requests answered.", "# TYPE cllm_http_requests_total counter"]
            lines += [f'cllm_http_requests_total{{route="{route}",code="{code}"}} {n}' for (route, code), n in sorted(self._requests.items())]
            lines += self._first_token.lines("cllm_time_to_first_token_seconds", "From a request to its first token.")
            lines += self._whole.lines("cllm_request_seconds", "From a request to the end of its answer.")
        return "\n".join(lines) + "\n"
