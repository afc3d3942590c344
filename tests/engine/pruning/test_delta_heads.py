"""Heads of DeltaNet layers: scored by their own rule, removed exactly, kept off, cut uniformly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.config.tasks.pruning import PruneSettings
from engine.data.examples import Example
from engine.errors import ConfigError
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from engine.model_sources.pruning_record import PRUNING, read_pruning
from engine.pruning.calibration import activations, gradients
from engine.pruning.keep_pruned import hold_pruned
from engine.verbs.models.prune import prune
from models.decoder import Decoder
from optim import AdamW8bit

Golden = Callable[[str], Path]
Logits = Callable[..., torch.Tensor]
HYBRIDS = ["qwen3_5", "qwen3_next", "qwen3_5_vl"]


def run(model: Path, output: Path | None, fraction: float = 0.5, **changes: Any) -> dict[str, Any]:
    settings = PruneSettings(fraction=fraction, heads="delta", scope="layer", **changes)
    return prune(model, output, settings).record


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def by_hand(model: Path, record: dict[str, Any]) -> Decoder:
    """The model with the chosen heads' columns of out_proj at zero, and nothing else."""
    decoder = load_model(model, dtype=torch.float64)
    for layer in record["layers"]:
        mixer = decoder.layers[layer["layer"]].linear_attn
        assert mixer is not None and isinstance(mixer.out_proj.weight, torch.Tensor)
        columns = mixer.out_proj.weight.data.unflatten(1, (layer["heads"], -1))
        columns[:, layer["pruned"]] = 0
    return decoder


@pytest.mark.parametrize("granularity", ["head", "kv-group"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_every_mode_gives_the_logits_of_the_heads_alone_removed(
    golden: Golden, tmp_path: Path, logits: Logits, family: str, granularity: str
) -> None:
    model, ids = golden(family), (torch.arange(72) * 7 % 61 + 3).reshape(2, 36)
    per_key = 3 if family == "qwen3_next" else 2
    fraction = 1 / per_key if granularity == "head" else 0.5
    for mode in ("zero", "mask", "structural"):
        record = run(model, tmp_path / mode, fraction, mode=mode, granularity=granularity)
        heads = 2 * per_key
        assert record["heads"]["before"] == heads * len(record["layers"])
        assert record["units"]["removed"] == record["units"]["asked"] > 0
        with torch.no_grad():
            want = by_hand(model, record)(ids)
        assert torch.allclose(logits(tmp_path / mode), want, rtol=0, atol=1e-10), mode
    assert float((logits(model) - want).abs().max()) > 1e-4


@pytest.mark.parametrize("family", HYBRIDS)
def test_survivors_are_the_same_bytes_and_other_layers_untouched(
    golden: Golden, tmp_path: Path, family: str
) -> None:
    run(golden(family), tmp_path / "out")
    before, after = weights(golden(family)), weights(tmp_path / "out")
    touched = set()
    for name, tensor in after.items():
        changed = tensor != before[name]
        assert bool((tensor[changed] == 0).all()), name
        if bool(changed.any()):
            touched.add(name.rpartition(".linear_attn.")[2])
    assert "out_proj.weight" in touched
    assert touched <= {f"{leaf}.weight" for leaf in
                       ("out_proj", "in_proj_qkv", "in_proj_z", "in_proj_qkvz")}  # fmt: skip


@pytest.mark.parametrize("metric", ["l2", "ov"])
def test_weights_score_by_the_output_and_the_norm_alone(golden: Golden, metric: Any) -> None:
    record = run(golden("qwen3_5"), None, metric=metric)
    stored = weights(golden("qwen3_5"))
    for layer in record["layers"]:
        prefix = f"model.layers.{layer['layer']}.linear_attn."
        o = stored[f"{prefix}out_proj.weight"].double().unflatten(1, (4, -1))
        want = (o * stored[f"{prefix}norm.weight"].double()).square().sum((0, 2)).sqrt()
        assert layer["scores"] == pytest.approx(want.tolist(), rel=1e-6)


@pytest.mark.parametrize("family", HYBRIDS[:2])
def test_measured_scores_are_those_of_taking_a_head_out(golden: Golden, family: str) -> None:
    """The slope of the loss in a head's size, and what the layer's output lacks without it."""
    model = load_model(golden(family), dtype=torch.float64)
    rows = [np.random.default_rng(n).integers(3, 60, 20) for n in (1, 2)]
    examples = [Example(row, [True] * len(row), "row") for row in rows]
    (lengths,), (slopes,) = activations(model, [0], examples), gradients(model, [0], examples)
    mixer, step = model.layers[0].linear_attn, 1e-6
    assert mixer is not None and isinstance(mixer.out_proj.weight, torch.Tensor)
    columns = mixer.out_proj.weight.data.unflatten(1, (mixer.value_heads, -1))
    caught: list[torch.Tensor] = []
    inner = mixer.forward

    def listen(*arguments: Any) -> Any:
        result = inner(*arguments)
        caught.append(result[0])
        return result

    mixer.forward = listen  # type: ignore[method-assign,assignment]

    @torch.no_grad()
    def outcome() -> tuple[torch.Tensor, torch.Tensor]:
        caught.clear()
        ids = [torch.tensor(row)[None] for row in rows]
        losses = torch.stack([model.loss(row, row, num_items=1) for row in ids])
        return torch.cat(caught), losses

    whole, _ = outcome()
    for head in range(mixer.value_heads):
        before = columns[:, head].clone()
        columns[:, head] = 0
        added = (whole - outcome()[0]).norm(dim=1).mean()
        slope = torch.zeros(2, dtype=torch.float64)
        for sign in (1, -1):
            columns[:, head] = before * (1 + sign * step)
            slope += sign * outcome()[1] / (2 * step)
        columns[:, head] = before
        assert float(lengths[head]) == pytest.approx(float(added), rel=1e-5)
        assert float(slopes[head]) == pytest.approx(float(slope.abs().sum()) / 38, rel=1e-5)


def test_pruning_both_kinds_keeps_both_off(golden: Golden, tmp_path: Path, logits: Logits) -> None:
    model = golden("qwen3_5")
    for mode in ("zero", "mask"):
        first = prune(model, tmp_path / f"{mode}1", PruneSettings(fraction=0.5, mode=mode)).record
        second = run(tmp_path / f"{mode}1", tmp_path / f"{mode}2", mode=mode)
        assert first["kind"] == "attention" and second["kind"] == "delta"
        pruning = read_pruning(tmp_path / f"{mode}2")
        assert pruning is not None
        assert set(pruning.heads) == {
            layer["layer"] for layer in first["layers"] + second["layers"]
        }
    assert torch.allclose(logits(tmp_path / "zero2"), logits(tmp_path / "mask2"), atol=1e-12)
    (tmp_path / "mask2" / PRUNING).unlink()
    assert torch.equal(logits(tmp_path / "mask2"), logits(model))


def test_a_pruned_head_stays_pruned_in_training(golden: Golden, tmp_path: Path) -> None:
    run(golden("qwen3_5"), tmp_path / "out")
    pruning = read_pruning(tmp_path / "out")
    assert pruning is not None
    model = load_model(tmp_path / "out").requires_grad_(True)
    optimizer = AdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=1)
    assert hold_pruned(model, optimizer, tmp_path / "out") == 2
    ids = torch.arange(3, 51)[None]
    for _ in range(3):
        model.loss(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer, pruned in pruning.heads.items():
        mixer = model.layers[layer].linear_attn
        assert mixer is not None and isinstance(mixer.out_proj.weight, torch.Tensor)
        columns = mixer.out_proj.weight.detach().unflatten(1, (4, -1))
        assert bool((columns[:, list(pruned)] == 0).all())


def test_the_configuration_says_how_many_heads_are_left(golden: Golden, tmp_path: Path) -> None:
    run(golden("qwen3_5"), tmp_path / "out", mode="structural")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    before = open_model_source(golden("qwen3_5")).config
    assert (raw["linear_num_value_heads"], raw["linear_num_key_heads"]) == (2, 2)
    assert raw["num_attention_heads"] == before.num_attention_heads


def test_a_model_without_such_layers_is_refused(golden: Golden) -> None:
    with pytest.raises(ConfigError, match="no linear attention"):
        run(golden("llama"), None)
