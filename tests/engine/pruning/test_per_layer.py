"""Structural pruning with another number of heads in each layer: what is written, and its use."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.config.tasks.pruning import PruneSettings
from engine.config.train_config import TrainConfig
from engine.errors import CheckpointError, ConfigError
from engine.memory.estimate import Simulations, plan
from engine.model_sources.export import export_hf_directory
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from engine.model_sources.pruning_record import PRUNING
from engine.verbs.models.merge import merge
from engine.verbs.models.prune import prune
from engine.verbs.training.train import train
from models.cache.one_sequence import KVCache
from models.config.heads_per_layer import PER_LAYER
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.tensor_names import expected_tensors

Golden = Callable[[str], Path]
GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
Logits = Callable[..., torch.Tensor]
Writer = Callable[..., Path]
Rows = Callable[[int], Path]
FAMILIES = ["llama", "llama3", "mistral", "qwen2", "qwen3", "smollm3", "qwen2_moe", "qwen3_next",
            "qwen3_5", "qwen3_5_vl"]  # fmt: skip


def cut(model: Path, output: Path, fraction: float, **changes: Any) -> dict[str, Any]:
    settings = PruneSettings(fraction=fraction, mode="structural", per_layer=True, **changes)
    return prune(model, output, settings).record


def zeroed_by_hand(model: Path, target: Path, record: dict[str, Any]) -> Path:
    """A copy of the model in which the columns of o_proj that read the chosen heads are zero."""
    from safetensors.torch import save_file

    shutil.copytree(model, target)
    tensors = load_file(model / "model.safetensors")
    for layer in record["layers"]:
        dim = layer["head_dim"]
        (name,) = (n for n in tensors if n.startswith("model.")
                   and n.endswith(f".layers.{layer['layer']}.self_attn.o_proj.weight"))  # fmt: skip
        for head in layer["pruned"]:
            tensors[name][:, head * dim : (head + 1) * dim] = 0
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def counts(folder: Path) -> list[tuple[int, int]]:
    """Heads and key/value heads of every layer, as the written configuration has them."""
    raw = json.loads((folder / "config.json").read_text())
    raw = raw.get("text_config", raw)
    lists = [raw[key] for key in PER_LAYER]
    assert [max(each) for each in lists] == [raw["num_attention_heads"], raw["num_key_value_heads"]]
    assert raw["head_dim"] == open_model_source(folder).config.head_dim
    return list(zip(*lists, strict=True))


@pytest.mark.parametrize("granularity", ["head", "kv-group"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_the_same_heads_at_zero(
    golden: Golden, tmp_path: Path, logits: Logits, family: str, granularity: str
) -> None:
    """And those of a copy that is written once more."""
    model = golden(family)
    layers = len(prune(model, None, PruneSettings(fraction=0.5)).record["layers"])
    fraction = 0.5 / layers if layers > 1 else 0.5  # of several layers, one is left as it is
    record = cut(model, tmp_path / "cut", fraction, granularity=granularity)
    assert record["heads"]["removed"] == 2
    want = logits(zeroed_by_hand(model, tmp_path / "zero", record))
    assert float((logits(tmp_path / "cut") - want).abs().max()) < 1e-10
    assert float((logits(model) - want).abs().max()) > 1e-3
    left = counts(tmp_path / "cut")
    stay = {layer["layer"]: 4 - len(layer["pruned"]) for layer in record["layers"]}
    most = max(stay.values())  # stands for layers without attention too
    assert [heads for heads, _ in left] == [stay.get(n, most) for n in range(len(left))]
    export_hf_directory(open_model_source(tmp_path / "cut"), tmp_path / "copy")
    assert torch.equal(logits(tmp_path / "copy"), logits(tmp_path / "cut"))
    assert counts(tmp_path / "copy") == left


@pytest.fixture
def uneven(write_model: Writer, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A llama of 4 layers with 6 heads (3 key/value heads), and the record of its cut in "cut"."""
    model = write_model(layers=4, heads=6, kv_heads=3)
    record = cut(model, tmp_path / "cut", 11 / 24, metric="random", seed=2)
    return model, record


def test_layers_differ_and_exactly_the_fraction_goes(
    uneven: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, record = uneven
    assert record["units"] == {"before": 24, "asked": 11, "removed": 11}
    left = counts(tmp_path / "cut")
    assert sum(heads for heads, _ in left) == 13
    assert len(set(left)) > 1
    assert all(heads % groups == 0 for heads, groups in left)
    stored = json.loads((tmp_path / "cut" / PRUNING).read_text())
    assert stored["per_layer"] is True and "this engine alone" in stored["loads_in"]


def test_survivors_are_the_same_bytes(uneven: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    model, record = uneven
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "cut" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if ".self_attn." not in name:
            assert torch.equal(tensor, after[name])
    for layer in record["layers"]:
        stay = [head for head in range(6) if head not in layer["pruned"]]
        groups = sorted({head // 2 for head in stay})
        for leaf, left in (("q_proj", stay), ("k_proj", groups), ("v_proj", groups)):
            name = f"model.layers.{layer['layer']}.self_attn.{leaf}.weight"
            assert torch.equal(before[name].unflatten(0, (-1, 8))[left].flatten(0, 1), after[name])
        name = f"model.layers.{layer['layer']}.self_attn.o_proj.weight"
        assert torch.equal(before[name].unflatten(1, (-1, 8))[:, stay].flatten(1), after[name])


def test_the_configuration_says_what_the_file_holds(
    uneven: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    checkpoint = open_model_source(tmp_path / "cut")
    assert {name: checkpoint.shape(name) for name in checkpoint.names()} == expected_tensors(
        checkpoint.config
    )


@pytest.mark.parametrize("quantize", [None, "nf4"])
@torch.no_grad()
def test_generation_with_a_cache_is_that_without(
    uneven: tuple[Path, dict[str, Any]], tmp_path: Path, quantize: Any
) -> None:
    model: Decoder = load_model(tmp_path / "cut", quantize=quantize, dtype=torch.float64)
    ids = torch.arange(3, 15)[None]
    cache = KVCache(model.config, 12, torch.float64, torch.device("cpu"))
    assert [store.shape[2] for store in cache.layers] == [kv for _, kv in counts(tmp_path / "cut")]
    whole = model(ids)[0]
    first = model.decode(ids[0, :5], cache)
    assert torch.allclose(first, whole[4], rtol=0, atol=1e-10)
    for position in range(5, 12):
        step = model.decode(ids[0, position : position + 1], cache)
        assert torch.allclose(step, whole[position], rtol=0, atol=1e-10)


def test_a_cut_model_is_cut_zeroed_and_masked_again(
    uneven: tuple[Path, dict[str, Any]], tmp_path: Path, logits: Logits
) -> None:
    source = tmp_path / "cut"
    record = cut(source, tmp_path / "again", 4 / 13)
    assert record["units"] == {"before": 13, "asked": 4, "removed": 4}
    assert sum(heads for heads, _ in counts(tmp_path / "again")) == 9
    want = logits(zeroed_by_hand(source, tmp_path / "hand", record))
    assert torch.allclose(logits(tmp_path / "again"), want, rtol=0, atol=1e-10)
    zero = prune(source, tmp_path / "zero", PruneSettings(fraction=4 / 13)).record
    prune(source, tmp_path / "mask", PruneSettings(fraction=4 / 13, mode="mask"))
    assert zero["heads"]["removed"] == 4 and "this engine alone" in zero["loads_in"]
    assert torch.allclose(logits(tmp_path / "zero"), logits(tmp_path / "mask"), rtol=0, atol=1e-12)
    with pytest.raises(ConfigError, match="Use --per-layer"):
        prune(source, tmp_path / "same", PruneSettings(fraction=0.5, mode="structural"))


def test_a_model_that_became_even_needs_no_lists(
    golden: Golden, tmp_path: Path, logits: Logits
) -> None:
    """Cut by one number for all layers it has a plain configuration again."""
    cut(golden("qwen3"), tmp_path / "one", 0.5, scope="layer", granularity="kv-group")
    assert counts(tmp_path / "one") == [(2, 1)] * 2
    settings = PruneSettings(fraction=0.5, mode="structural")
    record = prune(tmp_path / "one", tmp_path / "two", settings).record
    raw = json.loads((tmp_path / "two" / "config.json").read_text())
    assert not set(PER_LAYER) & raw.keys() and raw["num_attention_heads"] == 1
    assert "loads_in" not in record
    want = logits(zeroed_by_hand(tmp_path / "one", tmp_path / "hand", record))
    assert torch.allclose(logits(tmp_path / "two"), want, rtol=0, atol=1e-10)


def test_what_a_zeroed_model_lost_is_cut_first(
    write_model: Writer, tmp_path: Path, logits: Logits
) -> None:
    model = write_model(layers=3, heads=4, kv_heads=4)
    first = prune(
        model, tmp_path / "zero", PruneSettings(fraction=0.25, metric="random", seed=1)
    ).record
    record = cut(tmp_path / "zero", tmp_path / "cut", 0.25)
    assert record["chosen"] == first["chosen"]
    assert json.loads((tmp_path / "cut" / PRUNING).read_text())["pruned_heads"] == {}
    assert torch.allclose(logits(tmp_path / "cut"), logits(tmp_path / "zero"), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_cut_model_is_trained_planned_and_merged(
    tiny_model: Path, write_rows: Rows, tmp_path: Path, method: Any
) -> None:
    cut(tiny_model, tmp_path / "cut", 0.25, metric="random")
    assert len(set(counts(tmp_path / "cut"))) > 1
    config = TrainConfig(
        model=str(tmp_path / "cut"), data=[str(write_rows(12))], output_dir=tmp_path / "run",
        method=method, max_steps=4, batch_size=2, max_length=64, device="cpu", dtype="float32",
        learning_rate=1e-2, gradient_checkpointing="selective",
    )  # fmt: skip
    result = train(config)
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0]
    small, large = (
        plan(open_model_source(folder).config, config, gpu=False, dtype=torch.float32)
        for folder in (tmp_path / "cut", tiny_model)
    )
    assert small.step.bytes < large.step.bytes and small.flops < large.flops
    if method == "full":
        return
    assert result.adapter_path is not None
    merge(tmp_path / "cut", result.adapter_path, tmp_path / "merged")
    assert counts(tmp_path / "merged") == counts(tmp_path / "cut")
    ids = torch.arange(3, 25)[None]
    with torch.no_grad():
        merged = load_model(tmp_path / "merged", dtype=torch.float64)(ids)
        wanted = load_model(
            tmp_path / "cut", adapter=result.adapter_path, dtype=torch.float64
        )(ids)  # fmt: skip
    assert torch.allclose(merged, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gpu", [False, True])
def test_the_plan_knows_the_heads_of_every_layer(tmp_path: Path, gpu: bool) -> None:
    """Few layers are passed where heads repeat, all where they do not."""
    raw = json.loads((GOLDEN / "llama" / "config.json").read_text())
    config = TrainConfig(
        model="m", data="d", batch_size=2, max_length=60, gradient_checkpointing="selective"
    )
    dtype = torch.bfloat16 if gpu else torch.float32
    figures = []
    for heads in ([4, 2] * 5, [4] + [2] * 9, [4] * 10):
        lists = dict(zip(PER_LAYER, (heads, [n // 2 for n in heads]), strict=True))
        model = ModelConfig.from_dict(raw | {"num_hidden_layers": 10} | lists)
        whole = plan(model, config, gpu=gpu, dtype=dtype, simulations=Simulations(whole=True))
        quick = plan(model, config, gpu=gpu, dtype=dtype)
        assert quick.step.bytes == pytest.approx(whole.step.bytes, rel=0.002)
        assert quick.flops == pytest.approx(whole.flops, rel=1e-9)
        assert quick.trainable == whole.trainable
        figures.append((whole.trainable, whole.flops))
    assert figures[1] < figures[0] < figures[2]


@pytest.mark.parametrize("metric", ["activation", "gradient"])
def test_heads_of_a_cut_model_are_measured(
    tiny_model: Path, write_rows: Rows, tmp_path: Path, metric: Any
) -> None:
    cut(tiny_model, tmp_path / "cut", 0.25, metric="random")
    more: dict[str, Any] = {"metric": metric, "data": [write_rows(4)], "device": "cpu"}
    record = cut(tmp_path / "cut", tmp_path / "again", 1 / 6, **more)
    assert [len(layer["scores"]) for layer in record["layers"]] == [
        heads for heads, _ in counts(tmp_path / "cut")
    ]
    assert record["units"]["removed"] == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "zero"}, "--per-layer .* goes with --mode structural"),
        ({"mode": "mask"}, "--per-layer .* goes with --mode structural"),
        ({"heads": "delta"}, "not with --heads delta"),
        ({"fraction": 0.99}, "asks for 8 heads; .* 6 can go"),
        ({"protect": (0, 1)}, "nothing can go"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    golden: Golden, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    settings: dict[str, Any] = {"fraction": 0.5, "mode": "structural"} | changes
    with pytest.raises(ConfigError, match=words):
        prune(golden("llama"), tmp_path / "out", PruneSettings(per_layer=True, **settings))
    assert not (tmp_path / "out").exists()


def test_lists_that_do_not_fit_the_weights_are_refused(
    uneven: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "cut" / "config.json"
    raw = json.loads(path.read_text())
    key = PER_LAYER[0]
    path.write_text(json.dumps(raw | {key: raw[key][::-1], PER_LAYER[1]: raw[PER_LAYER[1]][::-1]}))
    with pytest.raises(CheckpointError, match="self_attn"):
        open_model_source(tmp_path / "cut")
    path.write_text(json.dumps(raw | {key: raw[key][:-1]}))
    with pytest.raises(ConfigError, match="expected 4 numbers, one a layer"):
        open_model_source(tmp_path / "cut")
