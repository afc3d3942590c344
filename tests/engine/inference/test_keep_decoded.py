"""`engine generate --keep-decoded`: the same logits, and every weight is decoded once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config.tasks.inference import GenerateSettings
from engine.inference.loading import load_decoder
from engine.model_sources.open import open_model_source
from kernels.linear import decode as decode_module
from models.cache.one_sequence import KVCache
from models.decoder import Decoder

PROMPT = [5, 9, 17, 3, 40]


def steps(model: Decoder) -> list[Tensor]:
    """Logits after a prompt, and after each of three more tokens."""
    cache = KVCache(model.config, 16, model.dtype, model.device)
    return [model.decode(torch.tensor(ids), cache) for ids in (PROMPT, [7], [8], [9])]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_generation_decodes_each_weight_once_and_changes_no_bit(
    quantize: str, dtype: str, golden: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[tuple[int, ...]] = []
    decode_weight = decode_module.decode_weight

    def counting(weight: Any, kind: torch.dtype, out: Tensor | None = None) -> Tensor:
        decoded.append(tuple(weight.shape))
        return decode_weight(weight, kind, out)

    monkeypatch.setattr(decode_module, "decode_weight", counting)
    source = open_model_source(golden("llama"))
    logits, counts = [], []
    for keep in (False, True):
        decoded.clear()
        asked = {"quantize": quantize, "dtype": dtype, "device": "cpu", "keep_decoded": keep}
        settings = GenerateSettings.model_validate(
            {"model": str(golden("llama")), "prompt": "x", **asked}
        )
        model = load_decoder(source, settings)
        logits.append(steps(model))
        counts.append(len(decoded))
    projections = 7 * len(model.layers)
    assert counts == [4 * projections, projections]
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))
