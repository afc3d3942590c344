"""Draw the next token from a model's logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config.tasks.inference import Sampling
from engine.errors import CheckpointError

_LARGEST = 1e38
"""The largest score that a penalty makes; float32 ends at 3.4e38."""


def next_token(
    logits: Tensor, seen: Sequence[int], sampling: Sampling, generator: torch.Generator
) -> int:
    """Draw one id from logits (V,); `seen` are the ids that the repetition penalty knows.

    Any temperature, penalty and mass that the settings allow gives an id: quotients are formed in
    float64, of distances from the likeliest token. Raises `CheckpointError` for logits that are not
    numbers.
    """
    scores = logits.float().cpu()
    if not bool(torch.isfinite(scores).all()):
        raise CheckpointError(
            "The model's logits are not finite numbers. Its values do not fit its compute type, or "
            "the weights are damaged: try --dtype float32."
        )
    if sampling.repetition_penalty != 1.0 and seen:
        ids = torch.tensor(sorted(set(seen)))
        picked, penalty = scores[ids].double(), sampling.repetition_penalty
        changed = torch.where(picked > 0, picked / penalty, picked * penalty)
        scores[ids] = changed.clamp(-_LARGEST, _LARGEST).float()
    if sampling.temperature == 0:
        return int(scores.argmax())
    scores = ((scores.double() - scores.max()) / sampling.temperature).float()
    if 0 < sampling.top_k < scores.numel():
        scores[scores < scores.topk(sampling.top_k).values[-1]] = -torch.inf
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(descending=True)
        # A token stays if the mass before it is below top_p, so the most likely always does.
        before = (ordered.cumsum(-1) - ordered).double()
        ordered[before >= sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(0, order, ordered)
    if sampling.min_p > 0:
        probabilities[probabilities < sampling.min_p * probabilities.max()] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))
