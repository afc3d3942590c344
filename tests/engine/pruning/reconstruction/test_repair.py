"""Repaired models: numpy's least squares, equal in every mode, nothing else changed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.tasks.pruning import PruneSettings
from engine.data.batches.loader import collate
from engine.data.examples import Example
from engine.errors import ConfigError
from engine.model_sources.load_model import build_model
from engine.model_sources.open import open_model_source
from engine.model_sources.pruning_record import HeadMap
from engine.pruning.calibration import Calibration, heads_output
from engine.pruning.reconstruction.layer_stream import LayerStream
from engine.pruning.reconstruction.repair import HeadRepair, RepairedSource
from engine.pruning.scores import prunable_heads, weight_scores
from engine.verbs.models.prune import prune
from engine.verbs.models.quantize import quantize
from kernels.attention import attention_forward
from models.decoder import Decoder
from models.head_slices import HeadSlices
from models.layers.observer import LayerObserver, observe_layers
from tests.support.quantised_gguf import write_q8_gguf
from tests.support.small_runs import random_examples

Golden = Callable[[str], Path]
Logits = Callable[..., torch.Tensor]
RIDGE = 1e-3
FAMILIES = sorted(path.name for path in (Path(__file__).parents[3] / "fixtures/golden").iterdir())
HYBRIDS = ("qwen3_5", "qwen3_5_moe_vl", "qwen3_5_vl", "qwen3_next")
KINDS = [(family, "attention") for family in FAMILIES] + [(family, "delta") for family in HYBRIDS]


def examples() -> list[Example]:
    return random_examples(5, (40, 61, 33, 57, 48))


class _Inputs(LayerObserver):
    """What the output projection of one layer of a whole model reads."""

    def __init__(self, model: Decoder, layer: int) -> None:
        self.mixer, self.layer = model.layers[layer].mixer, layer
        self.z = torch.empty(0)

    def mixer_ran(self, layer: int, saved: Any) -> None:
        if layer == self.layer:
            self.z = heads_output(self.mixer, saved).flatten(1).clone()


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_each_layer_is_numpys_fit_to_what_the_repaired_layers_before_it_give(
    golden: Golden, family: str, kind: Any
) -> None:
    source = open_model_source(golden(family))
    scored = weight_scores(source, prunable_heads(source, kind), "random")
    chosen: HeadMap = {scores.heads.layer: (1, 2) for scores in scored}
    stream = LayerStream(source, examples(), Calibration((), device="cpu"))
    stream.dtype, stream.states = torch.float64, stream.states.double()
    repair = HeadRepair(stream, RIDGE, torch.float64)
    repair.run(scored, chosen)
    model = build_model(RepairedSource(source, repair.changes), dtype=torch.float64)
    for scores in scored:
        heads, name = scores.heads, scores.heads.weight(scores.heads.output)
        linear = model.get_submodule(heads.module(heads.output))
        ours = linear.weight.detach().clone()  # type: ignore[operator]
        observer = _Inputs(model, heads.layer)
        out = heads.output_columns(chosen[heads.layer])
        stay = [c for c in range(ours.shape[1]) if c not in out.tolist()]
        linear.weight.data[:, out] = 0  # type: ignore[operator]
        with torch.no_grad(), observe_layers(observer):
            model.hidden_states(collate(examples()))
        z = observer.z.numpy()
        weight = source.tensor(name_in_file(repair, name)).double().numpy()
        means = z.mean(0)
        if linear.bias is not None:  # which takes what the means add
            z = z - means
        ridge = np.sqrt(RIDGE * (z**2).mean() * len(z)) * np.eye(z.shape[1])
        wide = np.concatenate([z, ridge])
        expected = np.linalg.lstsq(wide[:, stay], wide @ weight.T, rcond=None)[0].T
        assert np.abs(ours[:, stay].numpy() - expected).max() < 1e-8
        if isinstance(linear.bias, torch.Tensor):
            bias = source.tensor(name_in_file(repair, f"{heads.module(heads.output)}.bias"))
            wanted = bias.double().numpy() + weight @ means - expected @ means[stay]
            assert np.abs(linear.bias.detach().numpy() - wanted).max() < 1e-8


def test_a_repaired_layer_mixes_tokens_once(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, attend = [], attention_forward

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(given[0].shape)
        return attend(*given, **named)

    monkeypatch.setattr("models.layers.attention.attention_forward", counted)
    source = open_model_source(golden("llama"))
    scored = weight_scores(source, prunable_heads(source, "attention"), "random")
    stream = LayerStream(source, examples(), Calibration((), device="cpu"))
    HeadRepair(stream, RIDGE, None).run(scored, {scores.heads.layer: (1, 2) for scores in scored})
    assert len(calls) == source.config.num_hidden_layers


def name_in_file(repair: HeadRepair, name: str) -> str:
    """The name in the file of the graph's tensor `name`, which was repaired."""
    (there,) = (known for known in repair.changes if known.endswith(name.partition(".")[2]))
    return there


def pruned(
    model: Path, output: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> dict[str, Any]:
    """The record of a model without a tokenizer, pruned with `examples` for its rows."""
    monkeypatch.setattr(
        "engine.pruning.reconstruction.from_settings.calibration_examples", lambda *_: examples()
    )
    given: dict[str, Any] = {"fraction": 0.5, "scope": "layer", "device": "cpu"} | changes
    return prune(model, output, PruneSettings(data=(str(rows),), **given)).record


def widened(model: Path, folder: Path, layers: list[HeadSlices], records: dict[str, Any]) -> Path:
    """The model with zeros for the heads that `structural` lost, and its repaired columns."""
    cut = load_file(folder / "structural" / "model.safetensors")
    tensors = load_file(model / "model.safetensors")
    for heads, told in zip(layers, records["structural"]["layers"], strict=True):
        path = heads.module(heads.output).partition(".")[2]
        for name in [one for one in tensors if f"{path}." in one]:
            if name.endswith(".bias"):
                tensors[name] = cut[name]
                continue
            stay = heads.output_columns(set(range(heads.heads)) - set(told["pruned"]))
            tensors[name] = torch.zeros_like(tensors[name]).index_copy(1, stay, cut[name])
    target = folder / "wide"
    target.mkdir()
    shutil.copy(model / "config.json", target)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("granularity", ["head", "kv-group"])
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_zero_mask_and_structural_are_the_same_function_and_only_the_output_changes(
    golden: Golden,
    tmp_path: Path,
    logits: Logits,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    kind: Any,
    granularity: Any,
) -> None:
    model, rows = golden(family), write_rows(2)
    records, fraction = {}, 1 / 3 if (family, kind) == ("qwen3_next", "delta") else 0.5
    fraction = 0.5 if granularity == "kv-group" else fraction
    for mode in ("mask", "zero", "structural"):
        records[mode] = pruned(
            model, tmp_path / mode, rows, monkeypatch,
            mode=mode, granularity=granularity, heads=kind, fraction=fraction,
        )  # fmt: skip
        assert records[mode]["metric"] == "l2-reconstruction"
    assert records["zero"]["chosen"] == records["mask"]["chosen"]
    assert records["zero"]["repair"] == records["mask"]["repair"]
    zero, mask = logits(tmp_path / "zero"), logits(tmp_path / "mask")
    assert torch.allclose(zero, mask, rtol=0, atol=1e-12)
    wide = widened(model, tmp_path, prunable_heads(open_model_source(model), kind), records)
    assert torch.allclose(logits(tmp_path / "structural"), logits(wide), rtol=0, atol=1e-9)
    for layer in records["zero"]["repair"]["layers"]:
        assert 0 <= layer["error_repaired"] < layer["error_removed"]
    before, after = (load_file(path / "model.safetensors") for path in (model, tmp_path / "mask"))
    leaf = "out_proj" if kind == "delta" else "o_proj"
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) != (f".{leaf}." in name), name


def test_heads_of_a_uniform_cut_are_scored_in_turns_of_all_key_value_heads(
    golden: Golden,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = pruned(
        golden("llama"), tmp_path / "cut", write_rows(2), monkeypatch, mode="structural"
    )
    for layer in record["layers"]:
        groups, size = layer["kv_heads"], layer["heads"] // layer["kv_heads"]
        assert groups > 1 < size
        order = sorted(range(layer["heads"]), key=layer["scores"].__getitem__)
        for start in range(0, len(order), groups):
            turn = order[start : start + groups]
            assert sorted(head // size for head in turn) == list(range(groups))


def test_structural_and_zero_agree_where_the_same_heads_go(
    golden: Golden,
    tmp_path: Path,
    logits: Logits,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Per layer, a structural cut of whole groups takes what zeroing takes."""
    for mode, per_layer in (("zero", False), ("structural", False), ("structural", True)):
        record = pruned(
            golden("llama"), tmp_path / f"{mode}{per_layer}", write_rows(2), monkeypatch,
            mode=mode, per_layer=per_layer, granularity="kv-group",
        )  # fmt: skip
        assert record["heads"]["removed"] == 4
    want = logits(tmp_path / "zeroFalse")
    for name in ("structuralFalse", "structuralTrue"):
        assert torch.allclose(logits(tmp_path / name), want, rtol=0, atol=1e-9)


def test_a_bias_takes_what_the_mean_of_the_removed_heads_added(
    write_model: Callable[..., Path],
    tmp_path: Path,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = write_model(layers=2, attention_bias=True)
    tensors = load_file(model / "model.safetensors")
    sizes = {"q_proj": 48, "k_proj": 24, "v_proj": 24, "o_proj": 48}
    for layer in range(2):
        for leaf, size in sizes.items():
            name = f"model.layers.{layer}.self_attn.{leaf}.bias"
            tensors[name] = torch.full((size,), 0.5)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    record = pruned(model, tmp_path / "out", write_rows(2), monkeypatch)
    after = load_file(tmp_path / "out" / "model.safetensors")
    for layer in record["layers"]:
        path = f"model.layers.{layer['layer']}.self_attn.o_proj"
        assert not torch.equal(after[f"{path}.bias"], tensors[f"{path}.bias"])
        heads = prunable_heads(open_model_source(model), "attention")[layer["layer"]]
        out = heads.output_columns(layer["pruned"])
        assert bool((after[f"{path}.weight"][:, out] == 0).all())


@pytest.mark.parametrize("base", ["gguf", "nf4"])
def test_a_quantised_base_is_repaired_in_16_bits(
    golden: Golden,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    base: str,
) -> None:
    if base == "gguf":
        model = tmp_path / "model.gguf"
        write_q8_gguf(model, golden("qwen2"))
    else:
        model = tmp_path / "nf4"
        quantize(golden("llama"), model, bits=4)
    record = pruned(model, tmp_path / "out", write_rows(2), monkeypatch)
    written = open_model_source(tmp_path / "out")
    name = "model.layers.1.self_attn.o_proj.weight"
    assert written.dtype(name) == torch.bfloat16 if base == "gguf" else written.codes(name) is None
    for layer in record["repair"]["layers"]:
        assert layer["error_repaired"] < layer["error_removed"]


def test_a_second_repair_does_not_use_heads_that_went_before(
    golden: Golden,
    tmp_path: Path,
    logits: Logits,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = write_rows(2)
    for mode in ("zero", "mask"):
        first = tmp_path / f"{mode}-1"
        pruned(golden("llama"), first, rows, monkeypatch, fraction=0.25, mode=mode)
        second = pruned(first, tmp_path / f"{mode}-2", rows, monkeypatch, fraction=0.3, mode=mode)
        assert second["heads"] == {"before": 6, "removed": 2}
    zero, mask = logits(tmp_path / "zero-2"), logits(tmp_path / "mask-2")
    assert torch.allclose(zero, mask, rtol=0, atol=1e-12)
    tensors = load_file(tmp_path / "zero-2" / "model.safetensors")
    for layer in second["layers"]:
        heads = prunable_heads(open_model_source(golden("llama")), "attention")[layer["layer"]]
        out = heads.output_columns([*layer["pruned"], *layer["pruned_before"]])
        weight = tensors[f"model.layers.{layer['layer']}.self_attn.o_proj.weight"]
        assert bool((weight[:, out] == 0).all())
        assert bool((weight != 0).any())


def test_a_repair_without_rows_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    settings = PruneSettings(fraction=0.25, repair="least-squares")
    with pytest.raises(ConfigError, match=r"calibration rows.*--data"):
        prune(tiny_model, tmp_path / "out", settings)


def test_rows_bring_the_repair_and_none_turns_it_off(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = (str(write_rows(6)),)
    given: dict[str, Any] = {"fraction": 0.25, "data": rows, "device": "cpu"}
    for name, metric in (("a", None), ("b", "l2-weights"), ("c", "gradient")):
        record = prune(tiny_model, tmp_path / name, PruneSettings(metric=metric, **given)).record
        assert record["repair"]["method"] == "least-squares"
        assert record["calibration_rows"] == 256
    again = prune(tiny_model, tmp_path / "again", PruneSettings(**given)).record
    first = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == first
    assert again["metric"] == "l2-reconstruction"
    plain = prune(tiny_model, tmp_path / "plain", PruneSettings(repair="none", **given)).record
    assert "repair" not in plain
    assert plain["chosen"] == again["chosen"]
