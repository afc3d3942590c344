"""Several adapters with weights: merged, evaluated, refused; and results that are verified."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import engine
from engine.config.given_adapters import weighted_path, weighted_paths
from engine.errors import CheckpointError, ConfigError
from engine.model_sources.adapter.adapted_source import with_pair
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import save_adapter
from engine.model_sources.load_model import load_model
from engine.verbs.models.merge import merge
from engine.verbs.models.quantize import quantize
from tests.support.tiny_model import write_tiny_model

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
IDS = torch.arange(16)[None] * 5 % 61


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "base")


def random_adapter(target: Path, base: Path, rank: int, **changes: Any) -> dict[str, torch.Tensor]:
    """An adapter of `rank` for two modules; returns s B A of each in float64."""
    stored = load_file(base / "model.safetensors")
    torch.manual_seed(rank)
    config = AdapterConfig(r=rank, lora_alpha=3, target_modules=[Q, DOWN], **changes)
    pairs: dict[str, tuple[torch.Tensor, ...]] = {}
    for module in (Q, DOWN):
        out, into = stored[f"{module}.weight"].shape
        pairs[module] = (torch.randn(rank, into) * 0.1, torch.randn(out, rank) * 0.1)
        if config.use_dora:
            pairs[module] += (stored[f"{module}.weight"].norm(dim=1),)
    save_adapter(target, config, pairs)
    return {m: config.scale * b.double() @ a.double() for m, (a, b, *_) in pairs.items()}


def test_the_weighted_sum_of_deltas_is_merged(base: Path, tmp_path: Path) -> None:
    first = random_adapter(tmp_path / "a", base, 2)
    second = random_adapter(tmp_path / "b", base, 5, use_rslora=True)
    result = merge(base, [(tmp_path / "a", 0.5), f"{tmp_path / 'b'}=-1.25"], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    stored = load_file(base / "model.safetensors")
    for name, tensor in stored.items():
        module = name.removesuffix(".weight")
        exact = tensor.double()
        if module in first:
            exact = exact + 0.5 * first[module] - 1.25 * second[module]
        assert torch.allclose(merged[name].double(), exact, atol=1e-6), name
    assert result.logit_difference is not None
    assert result.logit_difference < 1e-4
    weighted = [(tmp_path / "a", 0.5), (tmp_path / "b", -1.25)]
    both = load_model(base, adapter=weighted)(IDS)
    assert torch.allclose(load_model(result.output)(IDS), both, atol=1e-4)


def test_a_path_with_an_equals_sign_is_a_path(base: Path, tmp_path: Path) -> None:
    odd = tmp_path / "run=0.5"
    delta = random_adapter(odd, base, 2)
    assert weighted_path(str(odd)) == (str(odd), 1.0)
    assert weighted_path(f"{odd}=0.25") == (str(odd), 0.25)
    assert weighted_path("org/name=2") == ("org/name", 2.0)
    assert weighted_path("not=a-number") == ("not=a-number", 1.0)
    assert weighted_paths(("a", "b")) == (("a", 1.0), ("b", 1.0))
    merge(base, f"{odd}=0.25", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")[f"{Q}.weight"]
    exact = load_file(base / "model.safetensors")[f"{Q}.weight"].double() + 0.25 * delta[Q]
    assert torch.allclose(merged.double(), exact, atol=1e-6)


@pytest.mark.parametrize("weight", ["inf", "nan"])
def test_a_weight_that_is_no_number_is_refused(base: Path, tmp_path: Path, weight: str) -> None:
    random_adapter(tmp_path / "a", base, 2)
    with pytest.raises(ConfigError, match="finite"):
        merge(base, f"{tmp_path / 'a'}={weight}", tmp_path / "out")


def test_dora_has_no_part_and_no_sum(base: Path, tmp_path: Path) -> None:
    random_adapter(tmp_path / "a", base, 2)
    random_adapter(tmp_path / "d", base, 2, use_dora=True)
    for given in ([tmp_path / "a", tmp_path / "d"], [(tmp_path / "d", 0.5)]):
        with pytest.raises(ConfigError, match="DoRA adapter: it sets the lengths"):
            merge(base, given, tmp_path / "out")
    merge(base, tmp_path / "d", tmp_path / "alone")
    assert not (tmp_path / "out").exists()


def test_one_adapter_that_does_not_fit_is_named(base: Path, tmp_path: Path) -> None:
    random_adapter(tmp_path / "a", base, 2)
    config = AdapterConfig(r=2, lora_alpha=2, target_modules=[Q])
    save_adapter(tmp_path / "b", config, {Q: (torch.ones(2, 7), torch.ones(9, 2))})
    with pytest.raises(CheckpointError, match=str(tmp_path / "b")):
        merge(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "out")


def test_a_result_that_computes_something_else_does_not_appear(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_adapter(tmp_path / "a", base, 4)
    monkeypatch.setattr(
        "engine.exporting.merging.with_pair",
        lambda weight, pair, scale: with_pair(weight, pair, 2 * scale),
    )
    with pytest.raises(CheckpointError, match="does not compute what"):
        merge(base, tmp_path / "a", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]
    assert merge(base, tmp_path / "a", tmp_path / "out", verify=False).logit_difference is None


def test_the_model_page_tells_where_it_comes_from(base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Say 1", "response": "ab"}\n' * 4)
    config = engine.TrainConfig(
        model=str(base), data=str(rows), output_dir=tmp_path / "run", max_steps=2
    )
    engine.train(config, console=False)
    merge(base, tmp_path / "run", tmp_path / "out", onto="dequantized")
    page = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "base_model:",
        "base digest:",
        "data digest:",
        "learning_rate:",
        "trained_tokens: ",
    ):
        assert words in page, page
    assert str(tmp_path) not in page


class _Killed(BaseException):
    """The end of a process at one of its operations."""


@pytest.mark.parametrize("verb", ["merge", "quantize"])
def test_whatever_operation_fails_no_half_written_directory_appears(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    random_adapter(tmp_path / "a", base, 2)
    count, fatal = 0, -1
    plain = os.fsync

    def counted(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == fatal:
            raise _Killed
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", counted)

    def work(target: Path) -> None:
        if verb == "merge":
            merge(base, tmp_path / "a", target, verify=False)
        else:
            quantize(base, target, adapter=tmp_path / "a", bits=4)

    work(tmp_path / "whole")
    total = count
    assert total > 8
    for number in range(1, total):  # the last is that of the name that stands already
        count, fatal, target = 0, number, tmp_path / f"out{number}"
        with pytest.raises(_Killed):
            work(target)
        assert not target.exists() or sorted(p.name for p in target.iterdir()) == sorted(
            p.name for p in (tmp_path / "whole").iterdir()
        )
        assert not list(tmp_path.glob(".tmp-*"))
