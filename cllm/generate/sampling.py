"""From the logits of the next token to a token: repetition penalty, temperature, top-k, top-p, min-p, then one draw.

Each filter takes log-probabilities or logits (V,) float64 and sets what it excludes to -inf. They apply in the order
above, which is Hugging Face's. Ties are broken towards the lower token id, so that a filter keeps exactly as many
tokens as it says.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cllm.config.sampling import Sampling
from cllm.runtime.errors import CLLMError

NOT_FINITE = "the model's logits are not finite, so no token can be chosen: its weights are damaged or training diverged. Try an earlier checkpoint."


def penalise_repetition(logits: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """Divides the positive and multiplies the negative logits of tokens that occurred (Keskar et al. 2019, CTRL,
    section 4.1)."""
    if penalty == 1.0 or not history:
        return logits
    seen = torch.tensor(sorted(set(history)), dtype=torch.int64)
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keeps the k most probable tokens."""
    if k >= logits.numel():
        return logits
    return _keep(logits, torch.sort(logits, descending=True, stable=True).indices[:k])


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the smallest set of most probable tokens whose mass reaches p (nucleus sampling, Holtzman et al. 2020)."""
    ordered, tokens = torch.sort(logits, descending=True, stable=True)
    mass_before = torch.softmax(ordered, 0).cumsum(0).roll(1)
    mass_before[0] = 0.0
    return _keep(logits, tokens[mass_before < p])


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the tokens at least p times as probable as the most probable one (Nguyen et al. 2024)."""
    probabilities = torch.softmax(logits, 0)
    return logits.masked_fill(probabilities < p * probabilities.max(), -torch.inf)


def distribution(logits: Tensor, history: Sequence[int], sampling: Sampling) -> Tensor:
    """logits (V,) of the next token, ids that occurred so far -> the probabilities (V,) float64 that a draw uses."""
    if logits.isnan().any() or logits.max() == torch.inf or logits.max() == -torch.inf:
        raise CLLMError(NOT_FINITE)
    logits = penalise_repetition(logits.to("cpu", torch.float64), history, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
    logits = (logits - logits.max()) / sampling.temperature  # the largest is 0: a tiny temperature cannot overflow upwards
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, sampling.min_p)
    return torch.softmax(logits, 0)


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """One token by inversion of the cumulative distribution: one uniform number per token, the same on every
    machine."""
    cumulative = probabilities.cumsum(0)
    uniform = torch.rand((), dtype=torch.float64, generator=generator)
    # "right": a token of probability 0 can never be hit, not even by a uniform of exactly 0. The last bound guards
    # against rounding.
    token = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    return min(token, int(probabilities.nonzero()[-1]))


def sample(logits: Tensor, history: Sequence[int], sampling: Sampling, generator: torch.Generator) -> int:
    """The next token for logits (V,). Greedy draws nothing from the generator."""
    probabilities = distribution(logits, history, sampling)
    return int(probabilities.argmax()) if sampling.temperature == 0 else draw(probabilities, generator)


def sample_rows(logits: Tensor, sampling: Sampling, uniforms: Tensor, seen: Tensor | None = None) -> Tensor:
    """`sample` for all rows of logits (B, V) at once, where they lie: (B,) int64, without a word to the host.

    uniforms (B,) float64 are what `draw` would draw; greedy does not look at them. seen (B, V) bool says which tokens occurred in each row; it may be
    left out where the repetition penalty is 1. A row that is not finite gives -1, for which the caller raises what `distribution` raises.
    """
    z = logits.double()
    top = z.amax(-1, keepdim=True)
    broken = z.isnan().any(-1) | ~torch.isfinite(top[:, 0])
    if seen is not None:
        penalty = sampling.repetition_penalty
        z = torch.where(seen, torch.where(z > 0, z / penalty, z * penalty), z)
        top = z.amax(-1, keepdim=True)
    if sampling.temperature == 0:
        return torch.where(broken, -1, z.argmax(-1))
    z = (z - top) / sampling.temperature
    ordered, tokens = torch.sort(z, dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ordered = ordered.masked_fill(torch.arange(z.shape[1], device=z.device) >= sampling.top_k, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        mass = torch.softmax(ordered, -1).cumsum(-1)
        before = torch.cat((torch.zeros_like(mass[:, :1]), mass[:, :-1]), dim=-1)
        ordered = ordered.masked_fill(before >= sampling.top_p, -torch.inf)
    if sampling.min_p:
        probabilities = torch.softmax(ordered, -1)
        ordered = ordered.masked_fill(probabilities < sampling.min_p * probabilities[:, :1], -torch.inf)
    kept = torch.full_like(z, -torch.inf).scatter(1, tokens, ordered)
    probabilities = torch.softmax(kept, -1)
    cumulative = probabilities.cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniforms.to(z.device).unsqueeze(1) * cumulative[:, -1:], right=True)[:, 0]
    places = torch.arange(z.shape[1], device=z.device)
    last = torch.where(probabilities > 0, places, 0).amax(-1)
    return torch.where(broken, -1, torch.minimum(drawn, last))


def _keep(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.full_like(logits, -torch.inf).index_copy(0, tokens, logits[tokens])
