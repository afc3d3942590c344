"""Draw the next token from a model's logits."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from engine.config.tasks.inference import Sampling
from engine.errors import CheckpointError
from engine.inference.processors import corrected, shaped


def next_token(
    logits: Tensor,
    seen: Sequence[int],
    sampling: Sampling,
    generator: torch.Generator,
    *,
    made: Sequence[int] = (),
    stop_ids: Collection[int] = (),
) -> int:
    """Draw one id from logits (V,), after the prompt's ids `seen` and the answer's ids `made`.

    `stop_ids` are those that `min_new_tokens` holds back. Raises `CheckpointError` for logits that
    are not numbers.
    """
    scores = logits.to("cpu", torch.float32, copy=True)
    low, high = torch.aminmax(scores)  # one pass; either is NaN where any score is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointError(
            "The model's logits are not finite numbers. Its values do not fit its compute type, or "
            "the weights are damaged: try --dtype float32."
        )
    scores = corrected(scores, seen, made, sampling, stop_ids)
    if float(scores.max()) == -torch.inf:
        raise CheckpointError(
            "The sampling settings exclude every token of the vocabulary: allow some of the bad "
            "words, or a shorter answer."
        )
    if sampling.temperature == 0:
        return int(scores.argmax())
    probabilities = shaped(scores, sampling).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
