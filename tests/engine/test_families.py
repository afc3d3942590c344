"""Every family from its files to a trained model and back: load, adapt, generate, save, merge."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.choices import Quantization
from engine.config.train_config import TrainConfig
from engine.errors import CheckpointError
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import load_adapter, save_adapter
from engine.model_sources.export import export_hf_directory
from engine.model_sources.from_model import TrainedSource
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from engine.verbs.models.merge import merge
from engine.verbs.training.train import train
from models.adapters import adapter_tensors, add_lora, attach_lora
from models.cache.one_sequence import KVCache
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.families import FAMILIES
from models.layers.context import StepSettings
from models.layers.experts import Experts
from models.layers.linear import Linear
from models.tensor_layout import carried_prefixes
from models.tensor_names import PROJECTIONS, expected_tensors, projections_of

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
NAMES = (
    "smollm3",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_vl",
    "qwen3_5_moe_vl",
)
MIXTURES = ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_vl")
NESTED = ("qwen3_5_vl", "qwen3_5_moe_vl")
IDS = load_file(GOLDEN / "smollm3" / "golden.safetensors")["packed.input_ids"]
BOUNDS = torch.tensor([0, 33, 80], dtype=torch.int32)


def randomize(model: Decoder) -> None:
    generator = torch.Generator().manual_seed(1)
    for parts in adapter_tensors(model).values():
        for part in parts:
            part.normal_(0, 0.1, generator=generator)


def adapted(family: str, quantize: Quantization | None = None, **options: object) -> Decoder:
    model = load_model(GOLDEN / family, quantize=quantize, dtype=torch.float64)
    add_lora(model, rank=3, alpha=6.0, **options)  # type: ignore[arg-type]
    model.double()
    randomize(model)
    return model


def saved(model: Decoder, folder: Path) -> Path:
    config = AdapterConfig(
        r=3,
        lora_alpha=6.0,
        target_modules=list(projections_of(model.config)),
        fused_experts=FAMILIES[model.config.model_type].fused_adapters,
    )
    save_adapter(folder, config, adapter_tensors(model))
    return folder


def logits(model: Decoder) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(IDS[None], BOUNDS)
    return out


@pytest.mark.parametrize("family", NAMES)
def test_a_loaded_model_gives_the_golden_logits(family: str) -> None:
    golden = load_file(GOLDEN / family / "golden.safetensors")
    model = load_model(GOLDEN / family)
    with torch.no_grad():
        got = model(golden["input_ids"])
    assert float((got - golden["logits"]).abs().max()) <= 2e-4


@pytest.mark.parametrize("family", NAMES)
def test_every_large_matrix_is_quantised_and_adapted_and_no_small_one(family: str) -> None:
    model = load_model(GOLDEN / family, quantize="nf4")
    paths = set(add_lora(model, rank=2))
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            large = path.rsplit(".", 1)[-1] in PROJECTIONS
            assert isinstance(module.weight, torch.Tensor) != large, path
            assert (module.lora_A is not None) == large, path
        elif isinstance(module, Experts):
            assert not any(True for _ in module.parameters(recurse=False))
            assert set(module.stored) == {"gate_proj", "up_proj", "down_proj"}
    stored = open_model_source(GOLDEN / family)
    others = carried_prefixes(stored.config)
    matrices = {
        name.removesuffix(".weight")
        for name in stored.names()
        if name.split(".")[-2] in PROJECTIONS and name.endswith(".weight")
    }
    own = {name for name in matrices if not name.startswith(others)}
    assert own <= paths
    assert all(".experts." in path for path in paths - own)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("family", NAMES)
def test_checkpointing_policies_give_the_same_adapter_gradients(
    family: str, quantize: Quantization
) -> None:
    model = adapted(family, quantize, dropout=0.2).train()
    gradients = {}
    for policy in ("none", "selective", "full"):
        model.zero_grad()
        settings = StepSettings(checkpointing=policy, dropout_seed=5)
        model.loss(IDS, IDS, BOUNDS, settings=settings).backward()
        gradients[policy] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for policy in ("selective", "full"):
        for name, want in gradients["none"].items():
            got = gradients[policy][name]
            assert want is not None and got is not None
            assert float(want.norm()) > 0, name
            assert float((got - want).norm() / want.norm()) <= 1e-9, (policy, name)


@pytest.mark.parametrize("family", NAMES)
def test_adapter_gradients_are_those_of_the_loss(family: str) -> None:
    model = adapted(family)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.loss(IDS, IDS, BOUNDS).backward()
    directions = [torch.randn_like(p) for p in trained]
    slope = 0.0
    for parameter, direction in zip(trained, directions, strict=True):
        assert parameter.grad is not None
        slope += float((parameter.grad * direction).sum())
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for p, direction in zip(trained, directions, strict=True):
                p.add_(direction, alpha=step)
            values.append(float(model.loss(IDS, IDS, BOUNDS)))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("family", NAMES)
def test_generation_with_cache_equals_generation_without(family: str) -> None:
    model = load_model(GOLDEN / family, dtype=torch.float64)
    cache = KVCache(model.config, 80, torch.float64, torch.device("cpu"))
    with torch.no_grad():
        whole = model(IDS[None])[0]
    end = 0
    for piece in (IDS[:2], IDS[2:3], IDS[3:70], IDS[70:72], *IDS[72:].split(1)):
        end += len(piece)
        last = model.decode(piece, cache)
        assert torch.allclose(last, whole[end - 1], rtol=0, atol=1e-10), end


@pytest.mark.parametrize("family", NAMES)
def test_a_saved_adapter_comes_back(family: str, tmp_path: Path) -> None:
    model = adapted(family)
    folder = saved(model, tmp_path / "adapter")
    again = load_model(GOLDEN / family, adapter=folder, dtype=torch.float64).double()
    assert torch.allclose(logits(again), logits(model), atol=1e-4)
    adapter = load_adapter(folder)
    _, pairs = adapter.config, adapter.pairs
    nested = family in NESTED
    assert all(path.startswith("model.language_model.layers.") == nested for path in pairs)


@pytest.mark.parametrize("onto", ["original", "dequantised"])
@pytest.mark.parametrize("family", NAMES)
def test_a_merged_model_is_the_adapted_one(family: str, onto: str, tmp_path: Path) -> None:
    model = adapted(family, "nf4" if onto == "dequantised" else None)
    folder = saved(model, tmp_path / "adapter")
    merge(GOLDEN / family, folder, tmp_path / "merged", onto=onto)
    merged = load_model(tmp_path / "merged", dtype=torch.float64)
    assert torch.allclose(logits(merged), logits(model), atol=1e-4)
    before, after = open_model_source(GOLDEN / family), open_model_source(tmp_path / "merged")
    assert before.names() == after.names()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("family", NESTED)
def test_tensors_of_other_parts_keep_their_bytes(
    family: str, dtype: str | None, tmp_path: Path
) -> None:
    folder = saved(adapted(family), tmp_path / "adapter")
    merge(GOLDEN / family, folder, tmp_path / "merged", dtype=dtype)
    before = load_file(GOLDEN / family / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    carried = [name for name in before if name.startswith(("mtp.", "model.visual."))]
    assert len(carried) == 5
    for name in carried:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))


@pytest.mark.parametrize("family", NAMES)
def test_a_fully_trained_model_is_written_in_the_layout_of_its_source(
    family: str, tmp_path: Path
) -> None:
    source, model = open_model_source(GOLDEN / family), load_model(GOLDEN / family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    export_hf_directory(TrainedSource(source, model), tmp_path / "model")
    assert set(open_model_source(tmp_path / "model").names()) == set(source.names())
    assert torch.equal(logits(load_model(tmp_path / "model")), logits(model))


@pytest.mark.parametrize("family", MIXTURES)
def test_dora_on_experts_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match="DoRA"):
        add_lora(load_model(GOLDEN / family), use_dora=True)


def test_an_adapter_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    model = adapted("qwen3_moe")
    pairs = adapter_tensors(model)
    last = "model.layers.1.mlp.experts.6.up_proj"
    pairs[last] = pairs["model.layers.1.mlp.experts.5.up_proj"]
    with pytest.raises(ValueError, match="there is no expert 6; the last is 5"):
        attach_lora(model, pairs, dict.fromkeys(pairs, 1.0))
    config = AdapterConfig(r=3, lora_alpha=6.0, target_modules=list(projections_of(model.config)))
    save_adapter(tmp_path / "adapter", config, pairs)
    with pytest.raises(CheckpointError, match=r"experts\.6\.up_proj"):
        merge(GOLDEN / "qwen3_moe", tmp_path / "adapter", tmp_path / "merged")


def write_model(family: str, target: Path) -> Path:
    """A random model of the fixture's shape, but with 128 tokens."""
    raw = json.loads((GOLDEN / family / "config.json").read_text())
    raw.get("text_config", raw)["vocab_size"] = 128
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(raw))
    tensors = {
        name: torch.randn(shape) * (0.02 if "embed" in name or "lm_head" in name else 0.2)
        for name, shape in expected_tensors(ModelConfig.from_dict(raw)).items()
    }
    for name, tensor in tensors.items():
        if tensor.dim() == 1 and "norm" in name:
            tensor.add_(1.0)
    if family in NESTED:
        tensors["mtp.norm.weight"] = torch.randn(32)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("method", ["qlora", "full"])
@pytest.mark.parametrize("family", NAMES)
def test_a_run_learns_and_leaves_a_model(
    family: str,
    method: str,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    add_tokenizer: Callable[[Path], None],
) -> None:
    model = write_model(family, tmp_path / "model")
    add_tokenizer(model)
    config = TrainConfig(
        model=str(model),
        data=str(write_rows(8)),
        output_dir=tmp_path / "run",
        method=method,
        max_steps=8,
        batch_size=4,
        max_length=64,
        learning_rate=2e-2 if method == "qlora" else 5e-3,
        warmup_steps=0,
        lora_rank=4,
        gradient_checkpointing="selective",
        checkpoint_every=4,
    )
    result = train(config, console=False)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0] - 0.2
    if method == "full":
        written = tmp_path / "run" / "model"
    else:
        assert result.adapter_path is not None
        adapted_model = load_model(model, adapter=result.adapter_path)
        written = tmp_path / "merged"
        merge(model, result.adapter_path, written)
        with torch.no_grad():
            assert torch.allclose(
                load_model(written)(IDS[None]), adapted_model(IDS[None]), atol=1e-3
            )
    before, after = open_model_source(model), open_model_source(written)
    assert before.names() == after.names()
    if family in NESTED:
        assert torch.equal(before.tensor("mtp.norm.weight"), after.tensor("mtp.norm.weight"))


@pytest.mark.parametrize("family", ["qwen3_5_moe_vl"])
def test_a_resumed_run_ends_with_the_same_bytes(
    family: str,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    add_tokenizer: Callable[[Path], None],
) -> None:
    model, rows = write_model(family, tmp_path / "model"), write_rows(8)
    add_tokenizer(model)
    settings = {
        "model": str(model),
        "data": str(rows),
        "output_dir": tmp_path / "run",
        "max_steps": 4,
        "batch_size": 4,
        "max_length": 64,
        "lora_dropout": 0.1,
        "checkpoint_every": 2,
    }
    train(TrainConfig(**settings), console=False)
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    shutil.rmtree(tmp_path / "run" / "adapter")
    train(TrainConfig(**settings, resume="auto"), console=False)
    assert weights.read_bytes() == whole
