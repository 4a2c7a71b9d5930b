"""From the logits of the next token to a token: bias, penalties, temperature, top-k, top-p, min-p, typical-p, then one draw.

Each filter takes log-probabilities or logits (V,) float64 and sets what it excludes to -inf. They apply in the order above, which
is Hugging Face's (`cllm.config.sampling` says which tokens the penalties count). Ties are broken towards the lower token id, so that a filter keeps
exactly as many tokens as it says.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cllm.config.sampling import Sampling
from cllm.runtime.errors import CLLMError, UserError

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


def keep_typical(logits: Tensor, p: float) -> Tensor:
    """Keeps the smallest set of tokens whose mass reaches p, those first whose surprise -log(probability) is nearest to the entropy (Meister et al.
    2023, Locally Typical Sampling)."""
    log_probabilities = torch.log_softmax(logits, 0)
    probabilities = log_probabilities.exp()
    entropy = -(probabilities * log_probabilities).nansum()
    order = torch.sort((-log_probabilities - entropy).abs(), stable=True).indices
    mass_before = probabilities[order].cumsum(0).roll(1)
    mass_before[0] = 0.0
    return _keep(logits, order[mass_before < p])


def check_finite(logits: Tensor) -> None:
    """CLLMError for logits (V,) that no model should give. A token at -inf is one that is never chosen; not all may be."""
    if logits.isnan().any() or logits.max() == torch.inf or logits.max() == -torch.inf:
        raise CLLMError(NOT_FINITE)


def adjust(logits: Tensor, history: Sequence[int], sampling: Sampling, generated: Sequence[int] = ()) -> Tensor:
    """logits (V,) -> (V,) float64 on the CPU with the bias and the penalties, of which each changes a few tokens alone.

    history: ids that occurred so far, prompt and generated ones; generated: the latter, which presence and frequency count. With c the count of a
    token, logit - c * frequency_penalty - (c > 0) * presence_penalty, as the reference of OpenAI's API defines them; bias, repetition, frequency and
    presence follow each other as in vLLM.
    """
    logits = logits.to("cpu", torch.float64)
    if sampling.logit_bias:
        index = torch.tensor(list(sampling.logit_bias), dtype=torch.int64)
        logits = logits.index_add(0, index, torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float64))
    logits = penalise_repetition(logits, history, sampling.repetition_penalty)
    if generated and (sampling.presence_penalty or sampling.frequency_penalty):
        tokens, counts = torch.tensor(list(generated), dtype=torch.int64).unique(return_counts=True)
        values = logits[tokens] - sampling.frequency_penalty * counts.double()
        logits = logits.index_copy(0, tokens, values - sampling.presence_penalty)
    return logits


def distribution(logits: Tensor, history: Sequence[int], sampling: Sampling, generated: Sequence[int] = ()) -> Tensor:
    """logits (V,) of the next token, ids that occurred so far -> the probabilities (V,) float64 that a draw uses."""
    check_finite(logits)
    return filtered(adjust(logits, history, sampling, generated), sampling)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Adjusted logits (V,) float64 -> the probabilities (V,) float64 that a draw uses."""
    if sampling.temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
    logits = (logits - logits.max()) / sampling.temperature  # the largest is 0: a tiny temperature cannot overflow upwards
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, sampling.min_p)
    if sampling.typical_p is not None and sampling.typical_p < 1:
        logits = keep_typical(logits, sampling.typical_p)
    return torch.softmax(logits, 0)


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """One token by inversion of the cumulative distribution: one uniform number per token, the same on every
    machine."""
    return draw_at(probabilities, uniform(generator))


def uniform(generator: torch.Generator) -> float:
    """The random number of one token, in [0, 1)."""
    return float(torch.rand((), dtype=torch.float64, generator=generator))


def draw_at(probabilities: Tensor, uniform: float) -> int:
    """The token that a uniform number in [0, 1) stands for."""
    cumulative = probabilities.cumsum(0)
    # "right": a token of probability 0 can never be hit, not even by a uniform of exactly 0. The last bound guards
    # against rounding.
    token = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    return min(token, int(probabilities.nonzero()[-1]))


def sample(logits: Tensor, history: Sequence[int], sampling: Sampling, generator: torch.Generator, generated: Sequence[int] = ()) -> int:
    """The next token for logits (V,). Greedy draws nothing from the generator."""
    probabilities = distribution(logits, history, sampling, generated)
    return int(probabilities.argmax()) if sampling.temperature == 0 else draw(probabilities, generator)


def sample_rows(
    logits: Tensor, sampling: Sampling, uniforms: Tensor, seen: Tensor | None = None, counts: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`sample` for all rows of logits (B, V) at once, where they lie: (B,) int64, without a word to the host.

    uniforms (B,) float64 are what `draw` would draw; greedy does not look at them. seen (B, V) bool says which tokens occurred in each row; it may be
    left out where the repetition penalty is 1. counts (B, V) says how often each was generated; it may be left out where the presence and frequency
    penalties are 0. bias (V,) float64 is the logit bias as `dense_bias` lays it out. A row that is not finite gives -1, for which the caller raises
    what `distribution` raises.
    """
    z = logits.double()
    top = z.amax(-1, keepdim=True)
    broken = z.isnan().any(-1) | ~torch.isfinite(top[:, 0])
    if bias is not None:
        z = z + bias
    if seen is not None:
        penalty = sampling.repetition_penalty
        z = torch.where(seen, torch.where(z > 0, z / penalty, z * penalty), z)
    if counts is not None:
        z = z - sampling.frequency_penalty * counts.double() - torch.where(counts > 0, sampling.presence_penalty, 0.0)
    top = z.amax(-1, keepdim=True)
    if sampling.temperature == 0:
        return torch.where(broken, -1, z.argmax(-1))
    z = (z - top) / sampling.temperature
    ordered, tokens = torch.sort(z, dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ordered = ordered.masked_fill(torch.arange(z.shape[1], device=z.device) >= sampling.top_k, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered = ordered.masked_fill(_mass_before(torch.softmax(ordered, -1)) >= sampling.top_p, -torch.inf)
    if sampling.min_p:
        probabilities = torch.softmax(ordered, -1)
        ordered = ordered.masked_fill(probabilities < sampling.min_p * probabilities[:, :1], -torch.inf)
    kept = torch.full_like(z, -torch.inf).scatter(1, tokens, ordered)
    if sampling.typical_p is not None and sampling.typical_p < 1:
        log_probabilities = torch.log_softmax(kept, -1)
        entropy = -(log_probabilities.exp() * log_probabilities).nansum(-1, keepdim=True)
        order = torch.sort((-log_probabilities - entropy).abs(), dim=-1, stable=True).indices
        dropped = _mass_before(log_probabilities.exp().gather(1, order)) >= sampling.typical_p
        kept = kept.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)
    probabilities = torch.softmax(kept, -1)
    cumulative = probabilities.cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniforms.to(z.device).unsqueeze(1) * cumulative[:, -1:], right=True)[:, 0]
    places = torch.arange(z.shape[1], device=z.device)
    last = torch.where(probabilities > 0, places, 0).amax(-1)
    return torch.where(broken, -1, torch.minimum(drawn, last))


def dense_bias(sampling: Sampling, vocab_size: int) -> Tensor | None:
    """The logit bias as (V,) float64, or None where there is none. Raises UserError for ids that the vocabulary does not have."""
    check_bias(sampling, vocab_size)
    if not sampling.logit_bias:
        return None
    bias = torch.zeros(vocab_size, dtype=torch.float64)
    bias[list(sampling.logit_bias)] = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float64)
    return bias


def check_bias(sampling: Sampling, vocab_size: int) -> None:
    """UserError for a logit bias of ids that the vocabulary does not have."""
    beyond = next((token for token in sampling.logit_bias if token >= vocab_size), None)
    if beyond is not None:
        raise UserError(f"logit_bias names token {beyond}, but the vocabulary has the ids 0 to {vocab_size - 1}.")


def _mass_before(probabilities: Tensor) -> Tensor:
    """(B, V) in some order -> (B, V): the probability of all that come before."""
    mass = probabilities.cumsum(-1)
    return torch.cat((torch.zeros_like(mass[:, :1]), mass[:, :-1]), dim=-1)


def _keep(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.full_like(logits, -torch.inf).index_copy(0, tokens, logits[tokens])
