"""A pruned head stays pruned whatever is trained afterwards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import engine.verbs.training.run_setup
from engine.config.tasks.pruning import PruneSettings
from engine.config.train_config import TrainConfig
from engine.errors import CheckpointError
from engine.model_sources.load_model import load_model
from engine.model_sources.pruning_record import PRUNING, read_pruning, sealed
from engine.pruning.keep_pruned import hold_pruned
from engine.verbs.models.merge import merge
from engine.verbs.models.prune import prune
from engine.verbs.training.train import train
from models.adapters import add_lora
from optim import AdamW8bit

Rows = Callable[..., Path]
O = "model.layers.{}.self_attn.o_proj.weight"  # noqa: E741 - the projection's letter


def config(model: Path, data: Path, output: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "model": str(model),
        "data": str(data),
        "output_dir": output,
        "max_steps": 6,
        "batch_size": 2,
        "max_length": 64,
        "learning_rate": 2e-2,
        "warmup_steps": 0,
        "weight_decay": 0.1,
        "device": "cpu",
        "plot": False,
        "checkpoint_every": 0,
    }
    return TrainConfig(**(settings | changes))


def pruned(model: Path, target: Path, mode: Any) -> dict[int, tuple[int, ...]]:
    prune(model, target, PruneSettings(fraction=0.25, mode=mode, scope="layer"))
    pruning = read_pruning(target)
    assert pruning is not None and len(pruning.heads) == 2
    return pruning.heads


def revived(folder: Path, heads: dict[int, tuple[int, ...]]) -> float:
    """The largest weight by which a pruned head reaches the output."""
    stored = load_file(folder / "model.safetensors")
    return max(
        float(stored[O.format(layer)].unflatten(1, (4, -1))[:, list(numbers)].abs().max())
        for layer, numbers in heads.items()
    )


def trained(model: Path, data: Path, target: Path, **changes: Any) -> Path:
    """The folder of the fine-tuned model: merged where an adapter was trained."""
    result = train(config(model, data, target, **changes), console=False)
    if result.adapter_path is None:
        assert result.output_path is not None
        return result.output_path
    onto: Any = "original" if changes.get("method") == "lora" else "dequantised"
    merge(model, result.adapter_path, target / "merged", onto=onto)
    return target / "merged"


CHANGES: list[dict[str, Any]] = [
    {"method": "lora"},
    {"method": "qlora", "lora_rank": 64},
    {"method": "qlora", "use_dora": True, "lora_dropout": 0.2},
    {"method": "full", "learning_rate": 1e-3},
    {
        "method": "full",
        "learning_rate": 1e-3,
        "max_grad_norm": 0,
        "optimizer_in_backward": True,
    },
]


@pytest.mark.parametrize("mode", ["zero", "mask"])
@pytest.mark.parametrize("changes", CHANGES)
def test_fine_tuning_never_revives_a_pruned_head(
    changes: dict[str, Any], mode: str, tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    heads = pruned(tiny_model, tmp_path / "pruned", mode)
    out = trained(tmp_path / "pruned", write_rows(8), tmp_path / "run", **changes)
    assert revived(out, heads) == 0.0
    before, after = load_file(tmp_path / "pruned" / "model.safetensors"), load_file(
        out / "model.safetensors"
    )  # fmt: skip
    for layer, numbers in heads.items():
        active = [head for head in range(4) if head not in numbers]
        change = (after[O.format(layer)] - before[O.format(layer)]).unflatten(1, (4, -1))
        assert bool((change[:, active].abs().amax((0, 2)) > 0).all())
    carried = read_pruning(out)
    assert carried is not None
    assert (carried.mode, carried.heads) == ("zero", heads)


@pytest.mark.parametrize("changes", CHANGES)
def test_without_being_held_a_pruned_head_comes_back(
    changes: dict[str, Any],
    tiny_model: Path,
    write_rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The planted fault that the test above must see."""
    monkeypatch.setattr(engine.verbs.training.run_setup, "hold_pruned", lambda *_: 0)
    heads = pruned(tiny_model, tmp_path / "pruned", "zero")
    out = trained(tmp_path / "pruned", write_rows(8), tmp_path / "run", **changes)
    assert revived(out, heads) > 1e-4


def test_an_adapter_of_the_whole_model_is_cleared_where_heads_are_gone(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    data = write_rows(8)
    train(config(tiny_model, data, tmp_path / "first", method="lora"), console=False)
    adapter = tmp_path / "first" / "adapter"
    (adapter / "base.json").unlink()
    raw = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(raw | {"base_model_name_or_path": "pruned"})
    )
    heads = pruned(tiny_model, tmp_path / "pruned", "zero")
    out = trained(
        tmp_path / "pruned", data, tmp_path / "run", method="lora", init_adapter=adapter
    )  # fmt: skip
    assert revived(out, heads) == 0.0


def test_a_stopped_run_goes_on_with_the_heads_held(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    heads = pruned(tiny_model, tmp_path / "pruned", "zero")
    data = write_rows(8)
    settings = config(tmp_path / "pruned", data, tmp_path / "run", method="full", max_steps=3)
    train(settings, console=False)
    train(settings.model_copy(update={"resume": "auto"}), console=False)
    assert revived(tmp_path / "run" / "model", heads) == 0.0


@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next", "qwen2_moe"])
def test_heads_of_hybrids_and_mixtures_stay_pruned(
    family: str, method: str, golden: Callable[[str], Path], tmp_path: Path
) -> None:
    prune(golden(family), tmp_path / "pruned", PruneSettings(fraction=0.5, scope="layer"))
    pruning = read_pruning(tmp_path / "pruned")
    assert pruning is not None
    model = load_model(tmp_path / "pruned", quantize="nf4" if method == "qlora" else None)
    if method == "full":
        model.requires_grad_(True)
    else:
        add_lora(model, rank=4)
    optimizer = AdamW8bit(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, min_8bit_size=1
    )
    assert hold_pruned(model, optimizer, tmp_path / "pruned") == sum(
        map(len, pruning.heads.values())
    )
    ids = torch.arange(3, 51)[None]
    for _ in range(3):
        model.loss(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer, numbers in pruning.heads.items():
        attention = model.layers[layer].self_attn
        assert attention is not None
        trained = attention.o_proj.weight if method == "full" else attention.o_proj.lora_A
        assert isinstance(trained, torch.Tensor)
        heads = trained.detach().unflatten(1, (4, -1))
        active = [head for head in range(4) if head not in numbers]
        assert bool((heads[:, list(numbers)] == 0).all()) and bool((heads[:, active] != 0).any())


def test_a_structural_model_trains_freely(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    prune(tiny_model, tmp_path / "small", PruneSettings(fraction=0.5, mode="structural"))
    out = trained(tmp_path / "small", write_rows(8), tmp_path / "run", method="lora")
    stored = load_file(out / "model.safetensors")
    assert stored[O.format(0)].shape[1] * 2 == load_file(tiny_model / "model.safetensors")[
        O.format(0)
    ].shape[1]  # fmt: skip
    with torch.no_grad():
        assert torch.isfinite(load_model(out)(torch.arange(3, 30)[None])).all()


def test_a_record_of_another_model_is_refused(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    pruned(tiny_model, tmp_path / "pruned", "zero")
    path = tmp_path / "pruned" / PRUNING
    record = json.loads(path.read_text()) | {"pruned_heads": {"7": [0]}}
    path.write_text(json.dumps(sealed(record)))
    with pytest.raises(CheckpointError, match="belongs to another model"):
        train(config(tmp_path / "pruned", write_rows(4), tmp_path / "run"), console=False)
