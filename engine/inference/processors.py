"""What sampling settings do to scores, in transformers' order.

Scores (V,) are fp32 logits; what a setting excludes becomes -inf. First come those that hold for
greedy answers too: logit biases, the repetition penalty (Keskar et al. 2019, arXiv 1909.05858),
the presence and frequency penalties of OpenAI's API, n-grams that may not repeat, words that may
not come, and the least length. Then those that shape a draw: temperature, `top_k`, `top_p`
(Holtzman et al. 2020, arXiv 1904.09751), `min_p` (Nguyen et al. 2024, arXiv 2407.01082) and
`typical_p` (Meister et al. 2023, arXiv 2202.00666).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from engine.config.tasks.inference import Sampling

_LARGEST = 1e38
"""The largest score that a penalty makes; float32 ends at 3.4e38."""


def corrected(
    scores: Tensor,
    prompt: Sequence[int],
    made: Sequence[int],
    sampling: Sampling,
    stop_ids: Collection[int] = (),
) -> Tensor:
    """Scores (V,) with what holds for greedy answers too; may change `scores`.

    `prompt` and `made` are the ids before; `stop_ids` cannot come before `min_new_tokens`.
    """
    for token, bias in sampling.logit_bias.items():
        if token < scores.numel():
            scores[token] += bias
    if sampling.repetition_penalty != 1.0 and (prompt or made):
        penalise_repetition(scores, {*prompt, *made}, sampling.repetition_penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = Counter(made)
        ids = torch.tensor(list(counts), dtype=torch.int64)
        often = torch.tensor(list(counts.values()), dtype=scores.dtype)
        scores[ids] -= sampling.presence_penalty + sampling.frequency_penalty * often
    size = sampling.no_repeat_ngram_size
    if size:
        exclude(scores, repeating_ends([*prompt, *made], size))
    if sampling.bad_words_ids:
        before = [*prompt, *made]
        words = [
            word for word in sampling.bad_words_ids if len(word) > 1 or word[0] not in stop_ids
        ]
        exclude(scores, {w[-1] for w in words if before[len(before) - len(w) + 1 :] == [*w[:-1]]})
    if len(made) < sampling.min_new_tokens:
        exclude(scores, stop_ids)
    return scores


def shaped(scores: Tensor, sampling: Sampling) -> Tensor:
    """Scores (V,) by whose softmax the next token is drawn.

    Any temperature and mass that the settings allow leaves at least one token: quotients are formed
    in float64, of distances from the likeliest one.
    """
    scores = ((scores.double() - scores.max()) / sampling.temperature).float()
    if 0 < sampling.top_k < scores.numel():
        scores[scores < scores.topk(sampling.top_k).values[-1]] = -torch.inf
    if sampling.top_p < 1.0:
        keep_mass(scores, sampling.top_p)
    if sampling.min_p > 0:
        probabilities = scores.softmax(-1)
        scores[probabilities < sampling.min_p * probabilities.max()] = -torch.inf
    if sampling.typical_p < 1.0:
        keep_typical(scores, sampling.typical_p)
    return scores


def penalise_repetition(scores: Tensor, seen: Collection[int], penalty: float) -> None:
    """Divide positive scores of the ids that were seen by `penalty`, multiply negative ones."""
    ids = torch.tensor(sorted(seen))
    picked = scores[ids].double()
    changed = torch.where(picked > 0, picked / penalty, picked * penalty)
    scores[ids] = changed.clamp(-_LARGEST, _LARGEST).float()


def repeating_ends(ids: Sequence[int], size: int) -> set[int]:
    """Ids that would end a run of `size` ids that is in `ids` already."""
    start = list(ids[len(ids) - size + 1 :]) if size > 1 else []
    if len(start) < size - 1:
        return set()
    whole = range(len(ids) - size + 1)
    return {ids[at + size - 1] for at in whole if list(ids[at : at + size - 1]) == start}


def exclude(scores: Tensor, ids: Collection[int]) -> None:
    """Give these ids no probability."""
    inside = [token for token in ids if token < scores.numel()]
    if inside:
        scores[torch.tensor(inside)] = -torch.inf


def keep_mass(scores: Tensor, mass: float) -> None:
    """Exclude all but the fewest likeliest tokens that have `mass` together."""
    ordered, order = scores.sort()
    excluded = ordered.softmax(-1).cumsum(-1) <= 1.0 - mass
    excluded[-1] = False
    scores[order[excluded]] = -torch.inf


def keep_typical(scores: Tensor, mass: float) -> None:
    """Exclude all but tokens of `mass` whose information is closest to the expected one."""
    logarithms = scores.log_softmax(-1)
    entropy = -(logarithms * logarithms.exp()).nansum()
    distance, order = (-logarithms - entropy).abs().sort()
    reached = scores[order].softmax(-1).cumsum(-1)
    last = min(int((reached < mass).sum()), scores.numel() - 1)
    excluded = distance > distance[last]
    excluded[0] = False
    scores[order[excluded]] = -torch.inf
