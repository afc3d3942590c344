"""Check that a written model computes what it was made from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.errors import CheckpointError, ConfigError, DataError
from engine.inference.layerwise import layerwise_logits
from engine.model_sources.interface.model_source import ModelSource
from engine.tokenization.tokenizer import load_tokenizer

TOKENS = 64
_TEXT = (
    "The committee met on 14 March to read the report. def mean(values): return sum(values) / "
    "len(values) # of a list. In 1911 the river froze for 23 days, and nobody could cross it by "
    "boat; people walked. What is the capital of Portugal? Lisbon. E = m c^2, as every child knows."
)
_LIMITS = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest relative difference, for what a weight's rounding to the type comes to in logits."""


def sample_ids(source: ModelSource) -> Tensor:
    """64 tokens (64,) of prose and code in the model's own tokens.

    Without a tokenizer they are spread over the vocabulary.
    """
    size = source.config.vocab_size
    try:
        ids = load_tokenizer(source).encode(_TEXT, add_special_tokens=False)
    except (CheckpointError, ConfigError, DataError):
        ids = []
    ids = [index for index in ids if 0 <= index < size] or [
        (7 * n + 1) % size for n in range(TOKENS)
    ]
    return torch.tensor((ids * TOKENS)[:TOKENS])


def difference(expected: Tensor, actual: Tensor) -> float:
    """Root mean square of the difference of two logits (T, V), over the spread of `expected`.

    A constant in a token's logits changes no probability, so it does not count.
    """
    centred = [logits - logits.mean(1, keepdim=True) for logits in (expected, actual)]
    spread = float(centred[0].square().mean().sqrt())
    apart = float((centred[0] - centred[1]).square().mean().sqrt())
    return apart / max(spread, 1e-9)


def require_agreement(
    meant: ModelSource,
    pairs: Mapping[str, tuple[Tensor, ...]],
    scales: Mapping[str, float],
    written: ModelSource,
) -> float:
    """Raise `CheckpointError` unless `written` gives the logits of `meant` with its `pairs`.

    Returns the relative difference on 64 tokens. What it may be follows from the type of the
    written weights. One layer of either is in memory at a time.
    """
    ids = sample_ids(meant)
    expected = layerwise_logits(meant, ids, pairs, scales)
    actual = layerwise_logits(written, ids)
    apart = difference(expected, actual)
    kinds = {written.dtype(name) for name in written.names()}
    limit = max(_LIMITS.get(kind, 0.0) for kind in kinds)
    if not apart <= limit:
        raise CheckpointError(
            f"The merged model does not compute what {meant.path} and the adapter do: on "
            f"{len(ids)} tokens their logits differ by {apart:.3g} of their spread, where rounding "
            f"to the written type explains at most {limit:g}. Nothing was written. Write it in a "
            "wider type (--dtype float32); if that does not help, this is a fault of the program."
        )
    return apart
