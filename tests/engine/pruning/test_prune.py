"""Pruned models on disk: the same logits in every mode, survivors untouched, files complete."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.config.tasks.pruning import PruneSettings
from engine.errors import CheckpointError, ConfigError
from engine.model_sources.export import export_hf_directory
from engine.model_sources.open import open_model_source
from engine.model_sources.pruning_record import PRUNING, read_pruning
from engine.model_sources.safetensors.file import SafetensorsFile
from engine.pruning.heat_map import HEAT_MAP
from engine.verbs.models.prune import prune
from tests.support.quantised_gguf import write_q8_gguf

Golden = Callable[[str], Path]
Logits = Callable[..., torch.Tensor]
Writer = Callable[..., Path]
DENSE = ["llama", "llama3", "mistral", "qwen2", "qwen2_swa", "qwen3", "qwen3_yarn"]
# Layers without rotation, experts, and hybrids whose attention has an output gate.
FAMILIES = [*DENSE, "smollm3", "qwen2_moe", "qwen3_next", "qwen3_5", "qwen3_5_vl"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(path)
    return tensors


def run(model: Path, output: Path | None, fraction: float = 0.5, **changes: Any) -> dict[str, Any]:
    return prune(model, output, PruneSettings(fraction=fraction, **changes)).record


def part(tensors: dict[str, torch.Tensor], layer: int, leaf: str) -> torch.Tensor:
    """A tensor of a layer's attention, wherever the decoder stands in the file."""
    (name,) = (n for n in tensors if n.endswith(f".layers.{layer}.self_attn.{leaf}.weight")
               and n.startswith("model."))  # fmt: skip
    return tensors[name]


def masked_by_hand(model: Path, target: Path, record: dict[str, Any]) -> Path:
    """A copy of the model with the chosen heads' columns of o_proj at zero, and nothing else."""
    from safetensors.torch import save_file

    shutil.copytree(model, target)
    tensors = weights(model)
    for layer in record["layers"]:
        o = part(tensors, layer["layer"], "o_proj")
        for head in layer["pruned"]:
            o[:, head * layer["head_dim"] : (head + 1) * layer["head_dim"]] = 0
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("granularity", ["head", "kv-group"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_mask_and_structural_give_the_same_logits(
    golden: Golden, tmp_path: Path, logits: Logits, family: str, granularity: str
) -> None:
    """In each layer one head of every group goes, or one of the two groups."""
    model = golden(family)
    chosen = {}
    for mode in ("structural", "zero", "mask"):
        scope = "layer"
        record = run(model, tmp_path / mode, mode=mode, scope=scope, granularity=granularity)
        assert record["heads"]["removed"] == 2 * len(record["layers"])
        assert record["heads"]["before"] == 4 * len(record["layers"])
        assert ("other programs" in record.get("loads_in", "")) == (mode == "mask")
        chosen[mode] = record["chosen"]
    if granularity == "kv-group":
        assert chosen["structural"] == chosen["zero"]
    assert chosen["zero"] == chosen["mask"]
    want = logits(masked_by_hand(model, tmp_path / "hand", json_of(tmp_path / "zero")))
    assert torch.allclose(logits(tmp_path / "zero"), want, rtol=0, atol=1e-12)
    assert torch.equal(logits(tmp_path / "mask"), want)
    shape = masked_by_hand(model, tmp_path / "hand2", json_of(tmp_path / "structural"))
    want = logits(shape)
    assert torch.allclose(logits(tmp_path / "structural"), want, rtol=0, atol=1e-10)
    assert float((logits(model) - want).abs().max()) > 1e-3


def json_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / PRUNING).read_text())
    return record


@pytest.mark.parametrize("family", FAMILIES)
def test_survivors_of_zeroing_are_the_same_bytes(
    golden: Golden, tmp_path: Path, family: str
) -> None:
    record = run(golden(family), tmp_path / "out")
    before, after = weights(golden(family)), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    touched = 0
    for name, tensor in after.items():
        changed = tensor != before[name]
        assert bool((tensor[changed] == 0).all()), name
        touched += int(changed.any())
        if ".self_attn." not in name or "norm" in name:
            assert not changed.any(), name
    assert touched > 0
    for layer in record["layers"]:
        o, q = (part(after, layer["layer"], leaf) for leaf in ("o_proj", "q_proj"))
        o, q = o.unflatten(1, (layer["heads"], -1)), q.unflatten(0, (layer["heads"], -1))
        for head in range(layer["heads"]):
            pruned = head in layer["pruned"]
            assert bool((o[:, head] == 0).all()) == bool((q[head] == 0).all()) == pruned


def test_keys_and_values_go_only_with_their_whole_group(golden: Golden, tmp_path: Path) -> None:
    run(golden("llama3"), tmp_path / "out", granularity="kv-group", scope="layer")
    layer = json_of(tmp_path / "out")["layers"][0]
    group = layer["pruned"][0] // 2
    after = weights(tmp_path / "out")
    for projection in ("k_proj", "v_proj"):
        for leaf in ("weight", "bias"):
            rows = after[f"model.layers.0.self_attn.{projection}.{leaf}"].unflatten(0, (2, -1))
            assert bool((rows[group] == 0).all()) and not bool((rows[1 - group] == 0).any())


def test_a_pruned_folder_is_a_complete_model_with_a_picture(golden: Golden, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(golden("qwen3"), source)
    (source / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    result = prune(source, tmp_path / "out", PruneSettings(fraction=0.25, max_shard_size=60_000))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer_config.json", "generation_config.json", PRUNING} <= names
    assert "model.safetensors.index.json" in names and HEAT_MAP in names
    assert result.written is not None and result.written.shards > 2
    assert (tmp_path / "out" / HEAT_MAP).read_bytes()[:4] == b"\x89PNG"
    assert open_model_source(tmp_path / "out").config == open_model_source(source).config


def test_the_record_holds_scores_choices_and_a_digest(golden: Golden, tmp_path: Path) -> None:
    run(golden("llama"), tmp_path / "out", 0.375, metric="ov")
    record = json_of(tmp_path / "out")
    assert record["units"] == {"before": 8, "asked": 3, "removed": 3}
    assert (record["metric"], record["mode"], record["fraction"]) == ("ov", "zero", 0.375)
    assert record["base_digest"] == open_model_source(golden("llama")).digest()
    assert [len(layer["scores"]) for layer in record["layers"]] == [4, 4]
    pruning = read_pruning(tmp_path / "out")
    assert pruning is not None
    assert sum(map(len, pruning.heads.values())) == 3


def test_an_edited_record_is_refused_and_a_foreign_one_is_left_alone(
    golden: Golden, tmp_path: Path
) -> None:
    run(golden("llama"), tmp_path / "out", mode="mask")
    record = json_of(tmp_path / "out")
    record["pruned_heads"] = {"0": [3]}
    (tmp_path / "out" / PRUNING).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="digest does not fit"):
        open_model_source(tmp_path / "out")
    (tmp_path / "out" / PRUNING).write_text('{"sparsity": 0.5}')
    assert read_pruning(tmp_path / "out") is None


def test_taking_the_mask_off_brings_the_heads_back(
    golden: Golden, tmp_path: Path, logits: Logits
) -> None:
    run(golden("qwen2"), tmp_path / "out", mode="mask")
    assert weights(tmp_path / "out").keys() == weights(golden("qwen2")).keys()
    before, after = weights(golden("qwen2")), weights(tmp_path / "out")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert float((logits(tmp_path / "out") - logits(golden("qwen2"))).abs().max()) > 1e-3
    digest = open_model_source(tmp_path / "out").digest()
    (tmp_path / "out" / PRUNING).unlink()
    assert torch.equal(logits(tmp_path / "out"), logits(golden("qwen2")))
    assert open_model_source(tmp_path / "out").digest() != digest


def test_a_masked_model_written_again_has_zeros_and_says_so(
    golden: Golden, tmp_path: Path, logits: Logits
) -> None:
    run(golden("llama"), tmp_path / "masked", mode="mask")
    export_hf_directory(open_model_source(tmp_path / "masked"), tmp_path / "copy")
    assert torch.equal(logits(tmp_path / "copy"), logits(tmp_path / "masked"))
    one, two = read_pruning(tmp_path / "masked"), read_pruning(tmp_path / "copy")
    assert one is not None and two is not None
    assert (one.mode, two.mode) == ("mask", "zero")
    assert one.heads == two.heads


@pytest.mark.parametrize("mode", ["zero", "mask"])
def test_a_second_pruning_adds_to_the_first(
    write_model: Writer, tmp_path: Path, logits: Logits, mode: str
) -> None:
    model = write_model(layers=3, heads=6, kv_heads=3)
    run(model, tmp_path / "one", 1 / 6, mode=mode)
    record = run(tmp_path / "one", tmp_path / "two", 1 / 5, mode=mode)
    assert record["units"] == {"before": 15, "asked": 3, "removed": 3}
    first, second = read_pruning(tmp_path / "one"), read_pruning(tmp_path / "two")
    assert first is not None and second is not None
    assert sum(map(len, second.heads.values())) == 6
    for layer, heads in first.heads.items():
        assert set(heads) <= set(second.heads[layer])
    run(model, tmp_path / "both", 1 / 3, mode="zero")
    assert torch.allclose(logits(tmp_path / "two"), logits(tmp_path / "both"), atol=1e-12)
    if mode == "mask":
        (tmp_path / "two" / PRUNING).unlink()
        assert torch.equal(logits(tmp_path / "two"), logits(model))


def test_a_zeroed_model_can_be_cut_afterwards(
    write_model: Writer, tmp_path: Path, logits: Logits
) -> None:
    """What is dead goes first; what stays dead is numbered anew."""
    model = write_model(layers=2, heads=6, kv_heads=2)
    run(model, tmp_path / "zero", 0.25, scope="global")
    record = run(tmp_path / "zero", tmp_path / "cut", 2 / 3, mode="structural")
    assert all(layer["heads"] - len(layer["pruned"]) == 2 for layer in record["layers"])
    reference = masked_by_hand(tmp_path / "zero", tmp_path / "hand", record)
    assert torch.allclose(logits(tmp_path / "cut"), logits(reference), atol=1e-10)
    off = read_pruning(tmp_path / "cut")
    assert off is not None
    left = {layer["layer"]: set(layer["pruned_before"]) - set(layer["pruned"])
            for layer in record["layers"]}  # fmt: skip
    assert {layer: len(heads) for layer, heads in off.heads.items()} == {
        layer: len(heads) for layer, heads in left.items() if heads
    }


def test_structural_config_says_what_is_left(golden: Golden, tmp_path: Path) -> None:
    run(golden("qwen2"), tmp_path / "heads", mode="structural")
    run(golden("qwen2"), tmp_path / "groups", mode="structural", granularity="kv-group")
    for name, counts in (("heads", (2, 2)), ("groups", (2, 1))):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["num_attention_heads"], config["num_key_value_heads"]) == counts
        assert config["head_dim"] == open_model_source(golden("qwen2")).config.head_dim
    sizes = [sum(t.numel() for t in weights(tmp_path / n).values()) for n in ("heads", "groups")]
    assert sizes[1] < sizes[0] < sum(t.numel() for t in weights(golden("qwen2")).values())


def test_a_llama_that_transformers_would_refuse_is_not_written(
    write_model: Writer, tmp_path: Path
) -> None:
    model = write_model(layers=1, heads=6, kv_heads=1)
    with pytest.raises(ConfigError, match="5 heads and hidden_size 48"):
        run(model, tmp_path / "out", 1 / 6, mode="structural")
    assert not (tmp_path / "out").exists()


def test_a_report_writes_nothing(golden: Golden, tmp_path: Path) -> None:
    shutil.copytree(golden("llama"), tmp_path / "model")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    record = run(tmp_path / "model", None, metric="random", seed=3)
    assert record["units"]["removed"] == 4
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert record["chosen"] == run(tmp_path / "model", None, metric="random", seed=3)["chosen"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fraction": 1.0}, "between 0 and 1"),
        ({"fraction": 0.99}, "asks for 8 heads"),
        ({"metric": "activation"}, "name a file of rows with --data"),
        ({"metric": "entropy"}, "`metric` = 'entropy'"),
        ({"mode": "cut"}, "`mode` = 'cut': .*zero.*mask.*structural"),
        ({"heads": "all"}, "`heads` = 'all'"),
        ({"scope": "model"}, "`scope` = 'model'"),
        ({"granularity": "layer"}, "`granularity` = 'layer'"),
        ({"quantize": "fp8"}, "`quantize` = 'fp8'"),
        ({"protect": (5,)}, "layers 0 to 1"),
        ({"min_heads": 4}, "at its minimum in every layer"),
        ({"mode": "structural", "fraction": 0.25}, "1/2"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    golden: Golden, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        run(golden("llama"), tmp_path / "out", **({"fraction": 0.5} | changes))
    assert not (tmp_path / "out").exists()


def test_an_occupied_output_is_refused_before_anything_is_read(
    golden: Golden, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        run(golden("llama"), tmp_path)


def test_protected_layers_keep_every_byte(golden: Golden, tmp_path: Path) -> None:
    run(golden("llama"), tmp_path / "out", 0.25, protect=(-1,))
    before, after = weights(golden("llama")), weights(tmp_path / "out")
    for name in before:
        if ".layers.1." in name:
            assert torch.equal(before[name], after[name])


def test_tensors_are_read_one_at_a_time(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the file's pages, those of no more than one tensor are wanted at any moment."""
    open_tensors: set[str] = set()
    most = 0
    read, release = SafetensorsFile.tensor, SafetensorsFile.release

    def reading(self: SafetensorsFile, name: str) -> torch.Tensor:
        nonlocal most
        open_tensors.add(name)
        most = max(most, len(open_tensors))
        return read(self, name)

    def releasing(self: SafetensorsFile, name: str) -> None:
        open_tensors.discard(name)
        release(self, name)

    monkeypatch.setattr(SafetensorsFile, "tensor", reading)
    monkeypatch.setattr(SafetensorsFile, "release", releasing)
    for mode in ("zero", "structural", "mask"):
        for metric in ("l2", "ov"):
            run(golden("qwen3"), tmp_path / f"{mode}-{metric}", mode=mode, metric=metric)
    assert most == 1
    assert not open_tensors


@pytest.mark.parametrize("mode", ["zero", "structural"])
def test_a_quantised_file_is_pruned_in_bfloat16_unless_a_type_is_named(
    golden: Golden, tmp_path: Path, mode: str
) -> None:
    write_q8_gguf(tmp_path / "base.gguf", golden("qwen2"))
    run(tmp_path / "base.gguf", tmp_path / "out", mode=mode)
    run(tmp_path / "base.gguf", tmp_path / "wide", mode=mode, dtype="float32")
    half, full = weights(tmp_path / "out"), weights(tmp_path / "wide")
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in full.values()} == {torch.float32}
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_other_files_keep_their_types_unless_one_is_named(golden: Golden, tmp_path: Path) -> None:
    run(golden("qwen3"), tmp_path / "same")
    run(golden("qwen3"), tmp_path / "half", dtype="float16")
    stored = {name: tensor.dtype for name, tensor in weights(golden("qwen3")).items()}
    assert {name: tensor.dtype for name, tensor in weights(tmp_path / "same").items()} == stored
    assert {t.dtype for t in weights(tmp_path / "half").values()} == {torch.float16}
