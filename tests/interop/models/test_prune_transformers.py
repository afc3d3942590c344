"""Pruned models in transformers: the same logits, and heads scored by its own activations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config.choices import Granularity, HeadKind, PruneMode
from engine.config.tasks.pruning import PruneSettings
from engine.data.examples import Example
from engine.model_sources.load_model import load_model
from engine.pruning.calibration import activations, gradients
from engine.verbs.models.prune import prune

pytestmark = pytest.mark.interop
GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir())
IDS = (torch.arange(80) * 7 % 61 + 3).reshape(2, 40)


def peer(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def test_a_model_cut_layer_by_layer_is_refused_and_not_misread(tmp_path: Path) -> None:
    settings = PruneSettings(fraction=0.25, mode="structural", per_layer=True)
    prune(GOLDEN / "llama", tmp_path / "out", settings)
    assert load_model(tmp_path / "out")(IDS).isfinite().all()
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        peer(tmp_path / "out")


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["head", "kv-group"])
@pytest.mark.parametrize("mode", ["zero", "structural"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_models_load_with_equal_logits(
    family: str, mode: PruneMode, granularity: Granularity, tmp_path: Path
) -> None:
    settings = PruneSettings(fraction=0.5, mode=mode, granularity=granularity, scope="layer")
    prune(GOLDEN / family, tmp_path / "out", settings)
    other = peer(tmp_path / "out")
    ours, theirs = load_model(tmp_path / "out")(IDS), other(IDS).logits
    assert float((ours - theirs).abs().max()) <= 5e-5
    assert float((peer(GOLDEN / family)(IDS).logits - theirs).abs().max()) > 1e-3
    if mode == "structural":
        config = other.config
        counts = (config.num_attention_heads, config.num_key_value_heads)
        assert counts == ((2, 2) if granularity == "head" else (2, 1))


def listen(index: int, scores: dict[int, torch.Tensor]) -> Any:
    """A hook that keeps what a module is given, with its gradient, under `index`."""

    def hook(module: Any, arguments: Any) -> None:
        arguments[0].retain_grad()
        scores[index] = arguments[0]

    return hook


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_scores_are_those_of_transformers_activations_and_gradients(family: str) -> None:
    generator = np.random.default_rng(2)
    rows = [generator.integers(3, 120, length) for length in (19, 31)]
    examples = [Example(row, [True] * len(row), "row") for row in rows]
    model = load_model(GOLDEN / family)
    dim = model.config.head_dim
    other = peer(GOLDEN / family)
    lengths = torch.zeros(2, 4)
    slopes = torch.zeros(2, 4)
    for row in rows:
        inputs: dict[int, torch.Tensor] = {}

        handles = [
            layer.self_attn.o_proj.register_forward_pre_hook(listen(index, inputs))
            for index, layer in enumerate(other.model.layers)
        ]
        ids = torch.tensor(row)[None]
        (other(ids, labels=ids).loss * (len(row) - 1)).backward()
        for handle in handles:
            handle.remove()
        for index, layer in enumerate(other.model.layers):
            x, weight = inputs[index], layer.self_attn.o_proj.weight.detach()
            assert x.grad is not None
            heads = x.detach()[0].unflatten(1, (4, dim))
            added = torch.einsum("nhd,ohd->nho", heads, weight.unflatten(1, (4, dim)))
            lengths[index] += added.norm(dim=2).sum(0)
            slopes[index] += (x.detach() * x.grad)[0].unflatten(1, (4, dim)).sum((0, 2)).abs()
    want = lengths / sum(map(len, rows)), slopes / sum(len(row) - 1 for row in rows)
    scores = activations(model, [0, 1], examples), gradients(model, [0, 1], examples)
    for ours, theirs in zip(scores, want, strict=True):
        assert torch.allclose(torch.stack(ours).float(), theirs, rtol=2e-4)


def rows_of(lengths: tuple[int, ...]) -> list[Example]:
    generator = np.random.default_rng(6)
    rows = [generator.integers(3, 60, length) for length in lengths]
    return [Example(row, [True] * len(row), "row") for row in rows]


@torch.no_grad()
@pytest.mark.parametrize("mode", ["zero", "structural"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "smollm3"])
def test_repaired_outputs_are_least_squares_fits_to_transformers_own_activations(
    family: str, mode: PruneMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In transformers what is written computes alike, and each o_proj is numpy's fit in turn."""
    examples = rows_of((70, 53, 61))
    monkeypatch.setattr(
        "engine.pruning.reconstruction.from_settings.calibration_examples", lambda *_: examples
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    settings = PruneSettings(
        fraction=0.5, mode=mode, scope="layer", data=[tmp_path / "rows.jsonl"], dtype="float32",
        repair_ridge=1e-2, device="cpu",
    )  # fmt: skip
    record = prune(GOLDEN / family, tmp_path / "out", settings).record
    other, original = peer(tmp_path / "out"), peer(GOLDEN / family)
    assert float((load_model(tmp_path / "out")(IDS) - other(IDS).logits).abs().max()) <= 5e-5
    for index, layer in enumerate(record["layers"]):
        fitted, before = (m.model.layers[index].self_attn.o_proj.weight for m in (other, original))
        dim = layer["head_dim"]
        stay = [h * dim + n for h in range(4) if h not in layer["pruned"] for n in range(dim)]
        inputs: list[torch.Tensor] = []
        # What o_proj reads is that of the original's layer after the repaired layers before it.
        o_proj = original.model.layers[index].self_attn.o_proj
        handle = o_proj.register_forward_pre_hook(lambda _, x, to=inputs: to.append(x[0][0]))
        for example in examples:
            original(torch.tensor([example.input_ids]))
        handle.remove()
        z = torch.cat(inputs).double().numpy()
        z = np.concatenate([z, np.sqrt(1e-2 * (z**2).mean() * len(z)) * np.eye(z.shape[1])])
        wanted = z @ before.double().numpy().T
        expected = np.linalg.lstsq(z[:, stay], wanted, rcond=None)[0].T
        ours = fitted if mode == "structural" else fitted[:, stay]
        assert np.abs(ours.numpy() - expected).max() < 1e-5
        o_proj.weight[:, stay] = torch.from_numpy(expected).float()
        out = [n for n in range(o_proj.weight.shape[1]) if n not in stay]
        o_proj.weight[:, out] = 0


@torch.no_grad()
@pytest.mark.parametrize("mode", ["zero", "structural"])
@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, "attention") for family in FAMILIES]
    + [(family, "delta") for family in FAMILIES if "qwen3_5" in family or "next" in family],
)
def test_repaired_models_of_every_family_load_with_equal_logits(
    family: str, kind: HeadKind, mode: PruneMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "engine.pruning.reconstruction.from_settings.calibration_examples",
        lambda *_: rows_of((70, 53, 61)),
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    # A third of the heads of three to a group, else a half.
    fraction = 1 / 3 if (family, kind) == ("qwen3_next", "delta") else 0.5
    settings = PruneSettings(
        fraction=fraction, mode=mode, heads=kind, scope="layer", data=[tmp_path / "rows.jsonl"],
        dtype="float32", device="cpu",
    )  # fmt: skip
    record = prune(GOLDEN / family, tmp_path / "out", settings).record
    assert record["repair"]["method"] == "least-squares"
    ours, theirs = load_model(tmp_path / "out")(IDS), peer(tmp_path / "out")(IDS).logits
    assert float((ours - theirs).abs().max()) <= 5e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "what"),
    [(family, what) for what in ("mlp", "layers") for family in ("llama", "qwen2_swa", "smollm3")]
    + [("qwen3_5", "mlp"), ("qwen3_5", "layers"), ("qwen3_moe", "layers")]
    + [(family, "experts") for family in ("qwen3_moe", "qwen2_moe", "qwen3_5_moe_vl")],
)
def test_models_without_channels_layers_or_experts_load_with_equal_logits(
    family: str, what: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "engine.pruning.structures.prune_structures.calibration_examples",
        lambda *_: rows_of((70, 53, 61)),
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    settings = PruneSettings(
        fraction=0.5, what=what, data=[tmp_path / "rows.jsonl"], dtype="float32", device="cpu",
    )  # fmt: skip
    record = prune(GOLDEN / family, tmp_path / "out", settings).record
    other = peer(tmp_path / "out")
    ours, theirs = load_model(tmp_path / "out")(IDS), other(IDS).logits
    assert float((ours - theirs).abs().max()) <= 5e-5
    layers = peer(GOLDEN / family).config.get_text_config().num_hidden_layers
    if what == "layers":
        assert other.config.num_hidden_layers == layers - record["units"]["removed"] < layers


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "what"),
    [("llama", "heads,mlp,layers"), ("qwen2", "kv-groups,mlp"), ("qwen3_moe", "experts,heads"),
     ("qwen3_5_vl", "heads,mlp")],
)  # fmt: skip
def test_models_inside_a_budget_load_with_equal_logits(
    family: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("budgets.mixed", "structures.prune_structures"):
        monkeypatch.setattr(
            f"engine.pruning.{module}.calibration_examples", lambda *_: rows_of((70, 53, 61))
        )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    settings = PruneSettings(
        target="params=0.8", what=what, data=[tmp_path / "rows.jsonl"], dtype="float32",
        device="cpu",
    )  # fmt: skip
    record = prune(GOLDEN / family, tmp_path / "out", settings).record
    other = peer(tmp_path / "out")
    ours, theirs = load_model(tmp_path / "out")(IDS), other(IDS).logits
    assert float((ours - theirs).abs().max()) <= 5e-5
    if family != "qwen3_5_vl":  # which has other parts than its decoder
        left = sum({p.data_ptr(): p.numel() for p in other.parameters()}.values())
        assert left == record["budget"]["after"] <= record["budget"]["asked"]


@torch.no_grad()
@pytest.mark.parametrize(("mode", "fraction"), [("zero", 0.2), ("structural", 1 / 3)])
def test_smollm2_pruned_from_its_gguf_file_loads_with_equal_logits(
    smollm2_gguf: Path, tmp_path: Path, mode: PruneMode, fraction: float
) -> None:
    """270 real heads: 54 of them are a fifth, and one of every three a third.

    Without heads that mattered roundings grow on their way, so both are judged by float64.
    """
    result = prune(smollm2_gguf, tmp_path / "out", PruneSettings(fraction=fraction, mode=mode))
    removed = 54 if mode == "zero" else 90
    assert result.record["units"] == {"before": 270, "asked": removed, "removed": removed}
    ours = load_model(tmp_path / "out")(IDS)
    other = peer(tmp_path / "out")
    theirs = other(IDS).logits
    truth = other.double()(IDS).logits
    apart = [float((logits - truth).abs().max()) for logits in (ours, theirs)]
    # How far transformers itself is from float64 depends on the processor.
    assert apart[0] <= 2 * apart[1] < 1e-2


@torch.no_grad()
@pytest.mark.parametrize("mode", ["zero", "structural"])
@pytest.mark.parametrize(
    ("family", "granularity", "fraction"),
    [
        ("qwen3_5", "head", 0.5),
        ("qwen3_5", "kv-group", 0.5),
        ("qwen3_next", "head", 1 / 3),
        ("qwen3_next", "kv-group", 0.5),
    ],
)
def test_delta_heads_are_removed_for_transformers_too(
    family: str, granularity: Granularity, fraction: float, mode: PruneMode, tmp_path: Path
) -> None:
    settings = PruneSettings(
        fraction=fraction, mode=mode, heads="delta", granularity=granularity, scope="layer"
    )
    prune(GOLDEN / family, tmp_path / "out", settings)
    ours, theirs = load_model(tmp_path / "out")(IDS), peer(tmp_path / "out")(IDS).logits
    assert float((ours - theirs).abs().max()) <= 5e-5
    assert float((peer(GOLDEN / family)(IDS).logits - theirs).abs().max()) > 1e-4
