import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError, EngineError
from engine.model_sources.adapter.adapted_source import AdaptedSource
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.keys import KNOWN
from engine.model_sources.adapter.peft import (
    CONFIG,
    WEIGHTS,
    load_adapter,
    save_adapter,
)
from engine.model_sources.open import open_model_source
from engine.model_sources.safetensors.file import SafetensorsFile

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"
PREFIX = "base_model.model."


def config(**changes: Any) -> AdapterConfig:
    base = AdapterConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return replace(base, **changes)


def pairs(rank: int = 4) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        Q: (torch.randn(rank, 6), torch.randn(8, rank)),
        V: (torch.randn(rank, 6), torch.randn(2, rank)),
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter", config(base_model_name_or_path="org/base"), pairs())
    return tmp_path / "adapter"


def edit_config(folder: Path, **changes: Any) -> None:
    value = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(value))


def put_tensor(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Add or replace a tensor of the adapter's file, or remove it."""
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), folder / WEIGHTS)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    before = config(base_model_name_or_path="a/b", lora_dropout=0.1, lora_alpha=0.5)
    tensors = pairs()
    save_adapter(tmp_path, before, tensors)
    adapter = load_adapter(tmp_path)
    after, loaded = adapter.config, adapter.pairs
    assert after == before
    assert loaded.keys() == tensors.keys()
    for module, (a, b) in tensors.items():
        assert torch.equal(loaded[module][0], a)
        assert torch.equal(loaded[module][1], b)


def dora() -> dict[str, tuple[torch.Tensor, ...]]:
    return {module: (a, b, torch.rand(b.shape[0])) for module, (a, b) in pairs().items()}


def test_a_magnitude_is_saved_beside_its_pair_and_loaded(tmp_path: Path) -> None:
    tensors = dora()
    save_adapter(tmp_path, config(use_dora=True), tensors)
    names = load_file(tmp_path / WEIGHTS).keys()
    assert f"{PREFIX}{Q}.lora_magnitude_vector" in names
    assert len(names) == 6
    adapter = load_adapter(tmp_path)
    after, loaded = adapter.config, adapter.pairs
    assert after.use_dora
    for module, parts in tensors.items():
        assert all(torch.equal(a, b) for a, b in zip(loaded[module], parts, strict=True))


def test_a_magnitude_that_does_not_fit_is_never_saved(tmp_path: Path) -> None:
    tensors = dora()
    with pytest.raises(CheckpointError, match=r"has a lora_magnitude_vector, and .* false"):
        save_adapter(tmp_path / "a", config(), tensors)
    with pytest.raises(CheckpointError, match=r"has no lora_magnitude_vector, and .* true"):
        save_adapter(tmp_path / "a", config(use_dora=True), pairs())
    a, b, _ = tensors[V]
    for wrong, words in (
        (torch.ones(3), r"expected \[2\]"),
        (torch.tensor([1.0, float("nan")]), "not finite"),
    ):
        with pytest.raises(CheckpointError, match=words):
            save_adapter(tmp_path / "a", config(use_dora=True), tensors | {V: (a, b, wrong)})
    assert not (tmp_path / "a").exists()


def test_names_metadata_and_types_are_those_of_peft(saved: Path) -> None:
    file = SafetensorsFile(saved / WEIGHTS)
    assert file.metadata == {"format": "pt"}
    assert sorted(file.keys()) == [
        f"{PREFIX}{module}.lora_{letter}.weight" for module in (Q, V) for letter in "AB"
    ]
    assert {file.dtype(name) for name in file.keys()} == {torch.float32}  # noqa: SIM118


def test_the_configuration_has_only_keys_that_old_versions_know(saved: Path) -> None:
    raw = json.loads((saved / CONFIG).read_text())
    assert sorted(raw) == [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
    ]
    assert raw["lora_alpha"] == 8
    assert isinstance(raw["lora_alpha"], int)
    assert raw["target_modules"] == ["q_proj", "v_proj"]
    assert raw["task_type"] == "CAUSAL_LM"
    assert raw["inference_mode"] is True


def test_the_model_card_names_base_and_library(saved: Path) -> None:
    text = (saved / "README.md").read_text()
    head = text.split("---")[1]
    assert 'base_model: "org/base"' in head
    assert "library_name: peft" in head
    assert '- "base_model:adapter:org/base"' in head


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 8 / math.sqrt(4))])
def test_scale(rslora: bool, scale: float) -> None:
    assert config(use_rslora=rslora).scale == scale


def test_an_adapter_may_be_saved_again(saved: Path) -> None:
    tensors = pairs(2)
    save_adapter(saved, config(r=2), tensors)
    adapter = load_adapter(saved)
    after, loaded = adapter.config, adapter.pairs
    assert after.r == 2
    assert torch.equal(loaded[Q][0], tensors[Q][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_loaded_as_float32(saved: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(saved / WEIGHTS).items()}
    save_file(tensors, saved / WEIGHTS)
    adapter = load_adapter(saved)
    _, loaded = adapter.config, adapter.pairs
    assert loaded[Q][0].dtype == torch.float32
    assert torch.equal(loaded[Q][0], tensors[f"{PREFIX}{Q}.lora_A.weight"].float())


def test_a_pattern_of_targets_becomes_the_modules_it_meant(saved: Path) -> None:
    edit_config(saved, target_modules=r".*\.(q|v)_proj")
    assert load_adapter(saved).config.target_modules == ["q_proj", "v_proj"]


def test_unknown_keys_are_one_warning(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_config(saved, some_new_key=3, another={"a": 1}, switched_off=None)
    assert load_adapter(saved).config.r == 4
    assert [record.message for record in caplog.records] == [
        f"{saved / CONFIG}: unknown keys are ignored: another, some_new_key"
    ]


@pytest.mark.parametrize("rank", [4, 5])
def test_alpha_over_rank_is_the_scale_in_what_is_written(tmp_path: Path, rank: int) -> None:
    settings = config(r=rank, lora_alpha=6, use_rslora=True)
    save_adapter(tmp_path, settings, pairs(rank))
    raw = json.loads((tmp_path / CONFIG).read_text())
    assert raw["use_rslora"] is False
    assert raw["lora_alpha"] / raw["r"] == pytest.approx(6 / math.sqrt(rank), rel=1e-12)
    assert isinstance(raw["lora_alpha"], int) == (rank == 4)
    assert load_adapter(tmp_path).scales[Q] == pytest.approx(settings.scale, rel=1e-12)


def test_keys_of_newer_versions_that_are_switched_off_are_no_obstacle(saved: Path) -> None:
    edit_config(saved, use_qalora=False, corda_config=None, qalora_group_size=16, peft_version="9")
    assert load_adapter(saved).config.r == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("half", [0, 1])
def test_values_that_are_not_finite_are_never_saved(
    tmp_path: Path, value: float, half: int
) -> None:
    tensors = pairs()
    tensors[V][half][1, 1] = value
    with pytest.raises(CheckpointError, match=f"lora_{'AB'[half]} of {V} holds values"):
        save_adapter(tmp_path / "adapter", config(), tensors)
    assert not (tmp_path / "adapter").exists()


def test_values_that_are_not_finite_are_never_loaded(saved: Path) -> None:
    name = f"{PREFIX}{Q}.lora_A.weight"
    put_tensor(saved, name, torch.full((4, 6), float("nan")))
    with pytest.raises(CheckpointError, match="not finite"):
        load_adapter(saved)


@pytest.mark.parametrize(
    ("a", "b"),
    [((3, 6), (8, 4)), ((4, 6), (8, 3)), ((4,), (8, 4)), ((4, 6), (8, 4, 1))],
)
def test_a_pair_of_another_rank_is_not_saved(
    tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    with pytest.raises(CheckpointError, match="rank 4"):
        save_adapter(tmp_path, config(), {Q: (torch.ones(a), torch.ones(b))})


def test_nothing_to_save_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter tensor"):
        save_adapter(tmp_path, config(), {})


def test_a_folder_under_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write"):
        save_adapter(tmp_path / "file" / "adapter", config(), pairs())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "no lora_magnitude_vector"),
        ({"rank_pattern": {"q_proj": 8}}, "gives the rank 8"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern of 'q_proj' is 0"),
        ({"rank_pattern": {"(": 8}}, "rank_pattern holds '('"),
        ({"rank_pattern": 3}, "rank_pattern is 3"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern of 'q_proj' is '8'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication: it makes a deeper model"),
        ({"megatron_config": {"a": 1}}, "uses megatron_config"),
        ({"alora_invocation_tokens": [1, 2]}, "uses alora_invocation_tokens"),
        ({"arrow_config": {"top_k": 2}}, "uses arrow_config"),
        ({"monteclora_config": {"a": 1}}, "uses monteclora_config"),
        ({"init_lora_weights": "pissa_niter_4"}, "uses init_lora_weights=pissa_niter_4"),
        ({"init_lora_weights": "corda"}, "uses init_lora_weights=corda"),
        ({"use_qalora": True}, "uses use_qalora: QA-LoRA pools"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": "XLORA"}, "mixes several adapters by a gate"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": 0}, "r is 0"),
        ({"r": "4"}, "r is '4'"),
        ({"r": True}, "r is True"),
        ({"r": 8}, "gives the rank 8"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(
    saved: Path, changes: dict[str, Any], words: str
) -> None:
    edit_config(saved, **changes)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(saved)
    assert words in str(caught.value)
    assert str(saved) in str(caught.value)


ODD_VALUES: tuple[Any, ...] = (
    3, -1, 2.5, True, "x", "(", [3], [None], [[1]], ["x", {}], {"x": []}, {"x": {"y": 1}},
)  # fmt: skip


@pytest.mark.parametrize("key", sorted(KNOWN - {"peft_type"}))
def test_an_odd_value_of_any_key_is_read_or_named(
    key: str, golden: Callable[[str], Path], tmp_path: Path
) -> None:
    """As a program writes it that is not PEFT; also where the tensors are compared with it."""
    base, folder = open_model_source(golden("llama")), tmp_path / "adapter"
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    fitting = {name: (torch.randn(4, 64), torch.randn(64, 4)) for name in names}
    save_adapter(folder, config(target_modules=["q_proj"]), fitting)
    assert AdaptedSource(base, load_adapter(folder)).tensor(f"{names[0]}.weight").shape == (64, 64)
    whole = (folder / CONFIG).read_text()
    for value in ODD_VALUES:
        (folder / CONFIG).write_text(whole)
        edit_config(folder, **{key: value})
        with contextlib.suppress(EngineError):
            AdaptedSource(base, load_adapter(folder)).tensor(f"{names[0]}.weight")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{PREFIX}{Q}.lora_magnitude_vector", "use_dora false"),
        (f"{PREFIX}lm_head.lora_magnitude_vector", "lm_head has lora_magnitude_vector only"),
        (f"{PREFIX}model.embed_tokens.lora_embedding_A", "embed_tokens has lora_embedding_A only"),
        (f"{PREFIX}{Q}.lora_B.bias", "lora_bias is None"),
        (f"{PREFIX}model.embed_tokens.base_layer.weight", "embed_tokens.weight without a pair"),
        (f"{PREFIX}{Q}.base_layer.bias", "q_proj.base_layer.bias [4, 6]"),
        (f"{PREFIX}{Q}.lora_other", "q_proj.lora_other [4, 6]"),
        (f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", "tokens_delta [4, 6]"),
        (f"{Q}.lora_A.weight", "does not hold pairs"),
        (f"{PREFIX}{Q}.lora_A.default.weight", "does not hold pairs"),
    ],
)
def test_tensors_of_other_features_are_refused_by_name(saved: Path, name: str, words: str) -> None:
    put_tensor(saved, name, torch.ones(4, 6))
    with pytest.raises(CheckpointError) as caught:
        load_adapter(saved)
    assert words in str(caught.value)


def test_half_a_pair_is_refused(saved: Path) -> None:
    put_tensor(saved, f"{PREFIX}{Q}.lora_B.weight", None)
    with pytest.raises(CheckpointError, match=f"{Q} has lora_A only"):
        load_adapter(saved)


def test_integer_tensors_are_refused(saved: Path) -> None:
    name = f"{PREFIX}{Q}.lora_A.weight"
    put_tensor(saved, name, torch.ones(4, 6, dtype=torch.int64))
    with pytest.raises(CheckpointError, match="does not hold pairs"):
        load_adapter(saved)


def test_a_folder_without_an_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json"):
        load_adapter(tmp_path)


def test_missing_weights_and_pickles_are_named(saved: Path) -> None:
    (saved / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_adapter(saved)
    (saved / "adapter_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, a pickle, which is never read"):
        load_adapter(saved)


def test_a_truncated_file_is_refused(saved: Path) -> None:
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[:-3])
    with pytest.raises(CheckpointError, match="is cut short"):
        load_adapter(saved)


def test_a_broken_configuration_is_named_with_its_place(saved: Path) -> None:
    (saved / CONFIG).write_text('{"r": 4,}')
    with pytest.raises(CheckpointError, match=r"adapter_config\.json:1:9"):
        load_adapter(saved)


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("/home/me/models/Qwen3-8B", "Qwen3-8B"),
        ("/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/0a1b", "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
    ],
)
def test_the_card_holds_no_path_of_this_machine(base: str, shown: str, tmp_path: Path) -> None:
    pairs = {"model.layers.0.self_attn.q_proj": (torch.ones(2, 4), torch.ones(4, 2))}
    save_adapter(tmp_path, AdapterConfig(2, 4, ["q_proj"], base), pairs)
    text = (tmp_path / "README.md").read_text()
    assert f'base_model: "{shown}"' in text
    assert "/home" not in text
