"""Checkpoints to prune: golden ones, and ones whose heads have known importance."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.tasks.pruning import PruneSettings
from engine.data.examples import Example
from engine.model_sources.load_model import load_model
from engine.verbs.models.prune import prune

Golden = Callable[[str], Path]
IDS = (torch.arange(72) * 7 % 61 + 3).reshape(2, 36)


@pytest.fixture
def logits() -> Callable[..., torch.Tensor]:
    """``logits(folder)`` are those of the model there, in float64."""

    @torch.no_grad()
    def run(folder: Path, **changes: Any) -> torch.Tensor:
        result: torch.Tensor = load_model(folder, dtype=torch.float64, **changes)(IDS)
        return result

    return run


Cut = Callable[..., dict[str, Any]]


@pytest.fixture
def cutter(
    tmp_path: Path, write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Cut]:
    """``cutter(what, examples)(model, name, **settings)`` prunes into ``tmp_path / name``.

    The examples take the place of the calibration rows; the record is what comes back.
    """

    def of(what: str, examples: list[Example], fraction: float = 0.25) -> Cut:
        monkeypatch.setattr(
            "engine.pruning.structures.prune_structures.calibration_examples", lambda *_: examples
        )

        def run(model: Path, name: str = "out", **changes: Any) -> dict[str, Any]:
            given: dict[str, Any] = {"fraction": fraction, "what": what, "device": "cpu"} | changes
            settings = PruneSettings(data=(str(write_rows(2)),), **given)
            return prune(model, tmp_path / name, settings).record

        return run

    return of


@pytest.fixture
def write_model(golden: Golden, tmp_path: Path) -> Callable[..., Path]:
    """``write_model(layers, heads, kv_heads)`` writes a llama of random weights, head_dim 8."""

    def write(
        layers: int = 4, heads: int = 6, kv_heads: int = 3, name: str = "model", **changes: Any
    ) -> Path:
        config = json.loads((golden("llama") / "config.json").read_text())
        config |= {
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "hidden_size": 48,
            "head_dim": 8,
            **changes,
        }
        target = tmp_path / name
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config))
        stored = load_file(golden("llama") / "model.safetensors")
        tensors = {
            "model.embed_tokens.weight": torch.randn(128, 48),
            "lm_head.weight": torch.randn(128, 48) * 0.1,
            "model.norm.weight": torch.ones(48),
        }
        shapes = {
            "self_attn.q_proj.weight": (heads * 8, 48),
            "self_attn.k_proj.weight": (kv_heads * 8, 48),
            "self_attn.v_proj.weight": (kv_heads * 8, 48),
            "self_attn.o_proj.weight": (48, heads * 8),
            "mlp.gate_proj.weight": (96, 48),
            "mlp.up_proj.weight": (96, 48),
            "mlp.down_proj.weight": (48, 96),
        }
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            for leaf, shape in shapes.items():
                tensors[prefix + leaf] = torch.randn(shape) * 0.2
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{norm}.weight"] = torch.ones(48)
        assert {name.split(".")[-1] for name in stored} == {"weight"}
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        return target

    return write


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heat maps take longer to draw than a tiny model to prune: only tests that look at one do."""
    if "picture" not in request.node.name:
        monkeypatch.setattr("engine.verbs.models.prune.draw", lambda *_: False)
