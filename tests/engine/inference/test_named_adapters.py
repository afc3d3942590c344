"""Requests of several adapters and of the base alone share passes, and get what they get alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.choices import Quantization
from engine.errors import ConfigError
from engine.inference.batched import BatchedGenerator
from engine.inference.request import RequestSettings
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import save_adapter
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from models.adapters import adapter_tensors, add_lora
from models.layers.linear import Linear

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir())


def random_ids(count: int) -> list[int]:
    return torch.randint(3, 64, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def write_adapter(target: Path, base: Path, seed: int, rank: int, *, dora: bool = False) -> Path:
    """An adapter on every projection that changes answers."""
    model = load_model(base)
    paths = add_lora(model, rank=rank, alpha=2.0 * rank, seed=seed, use_dora=dora)
    tensors = adapter_tensors(model)
    generator = torch.Generator().manual_seed(seed)
    for _, b, *magnitude in tensors.values():
        b.normal_(0, 0.1, generator=generator)
        for part in magnitude:
            part.mul_(1.3)
    names = sorted({path.rpartition(".")[2] for path in paths})
    fused = any(".experts." in path for path in paths)
    config = AdapterConfig(rank, 2.0 * rank, names, use_dora=dora, fused_experts=fused)
    save_adapter(target, config, tensors)
    return target


def logprobs_alone(base: Path, adapter: Path | None, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load_model(base, adapter=adapter)(torch.tensor([ids]))[0]
    return logits.log_softmax(-1)


@pytest.mark.parametrize("family", [*FAMILIES, "dora"])
def test_rows_of_one_pass_have_their_own_adapters(family: str, tmp_path: Path) -> None:
    dora, base = family == "dora", GOLDEN / ("qwen2" if family == "dora" else family)
    adapters = {
        name: write_adapter(tmp_path / name, base, seed, rank, dora=dora)
        for name, seed, rank in (("a", 1, 4), ("b", 2, 3))
    }
    generator = BatchedGenerator(load_model(base), slots=6, prompt_tokens=32)
    for own, path in adapters.items():
        generator.add_adapter(own, path, open_model_source(base))
    plan: list[tuple[str | None, int]]
    plan = [(None, 9), ("a", 40), ("b", 12), ("a", 3), (None, 20), ("b", 1)]
    numbers = [
        generator.submit(random_ids(length), RequestSettings(6, logprobs=0, adapter=name))
        for name, length in plan
    ]
    events = generator.run()
    texts = set()
    for number, (name, length) in zip(numbers, plan, strict=True):
        made = [event.token for event in events[number] if event.token is not None]
        ids = random_ids(length) + made
        alone = logprobs_alone(base, adapters.get(name or ""), ids)
        rows = alone[length - 1 : -1]
        assert made == rows.argmax(-1).tolist(), (name, length)
        told = [event.logprobs.logprob for event in events[number] if event.logprobs]
        wanted = rows.gather(1, torch.tensor(made)[:, None])[:, 0]
        assert told == pytest.approx(wanted.tolist(), abs=3e-4)
        texts.add(tuple(told))
    assert len(texts) == len(plan)


def test_a_request_of_one_adapter_alone_needs_no_rows(tmp_path: Path) -> None:
    base = GOLDEN / "qwen3_moe"
    path = write_adapter(tmp_path / "a", base, 1, 4)
    generator = BatchedGenerator(load_model(base, quantize="nf4"))
    generator.add_adapter("a", path, open_model_source(base))
    number = generator.submit(random_ids(5), RequestSettings(6, adapter="a"))
    made = [event.token for event in generator.run()[number] if event.token is not None]
    with torch.no_grad():
        logits = load_model(base, quantize="nf4", adapter=path)(
            torch.tensor([random_ids(5) + made])
        )
    assert made == logits[0, 4:-1].argmax(-1).tolist()


def test_names_and_adapters_that_cannot_be_shared_are_refused(tmp_path: Path) -> None:
    base = GOLDEN / "qwen3"
    path = write_adapter(tmp_path / "a", base, 1, 4)
    generator = BatchedGenerator(load_model(base))
    source = open_model_source(base)
    generator.add_adapter("a", path, source)
    assert generator.adapters == {"a"}
    with pytest.raises(ConfigError, match="named 'a' already"):
        generator.add_adapter("a", path, source)
    with pytest.raises(ConfigError, match="no adapter named 'x'; there are a"):
        generator.submit([3], RequestSettings(adapter="x"))
    assert generator.adapters == {"a"}
    linears = [module for module in generator.model.modules() if isinstance(module, Linear)]
    assert all(set(linear.named) <= {"a"} for linear in linears)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_an_adapter_that_changes_more_than_pairs_is_a_model_beside(
    quantize: Quantization | None, tmp_path: Path
) -> None:
    """With trained copies of a norm and of a tied embedding, among requests of others."""
    base = GOLDEN / "qwen3"
    path, source = write_adapter(tmp_path / "b", base, 1, 4), open_model_source(base)
    plain, norm = load_model(base), "model.norm.weight"
    embedding = plain.model.embed_tokens.weight
    assert isinstance(embedding, torch.Tensor)
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))
    _add_copies(
        path,
        {norm: plain.model.norm.weight * 2, "model.embed_tokens.weight": embedding + noise / 50},
    )
    generator = BatchedGenerator(load_model(base, quantize=quantize), slots=4)
    generator.add_adapter("a", write_adapter(tmp_path / "a", base, 2, 3), source)
    generator.add_adapter("b", path, source)
    ids, owners = random_ids(9), ["b", None, "a", "b"]
    numbers = [generator.submit(ids, RequestSettings(6, adapter=name)) for name in owners]
    cancelled = generator.submit(ids, RequestSettings(6, adapter="b"))
    assert (generator.active + generator.waiting, generator.cancel(cancelled)) == (5, True)
    events = generator.run()
    assert set(events) == set(numbers)
    for number, name in zip(numbers, owners, strict=True):
        made = [event.token for event in events[number] if event.token is not None]
        adapter = None if name is None else tmp_path / name
        with torch.no_grad():
            alone = load_model(base, quantize=quantize, adapter=adapter)
            logits = alone(torch.tensor([ids + made]))[0]
        assert made == logits[len(ids) - 1 : -1].argmax(-1).tolist(), name
    assert generator.active == generator.waiting == 0
    pair = (generator.beside["b"].model, generator.model)
    weights = [
        [m.weight for m in one.model.layers.modules() if isinstance(m, Linear)] for one in pair
    ]
    for own, other in zip(*weights, strict=True):
        if isinstance(own, torch.Tensor) and isinstance(other, torch.Tensor):
            assert own.data_ptr() == other.data_ptr()
        else:
            assert own is other


def _add_copies(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Add trained copies of modules to a saved adapter."""
    file = folder / "adapter_model.safetensors"
    copies = {f"base_model.model.{name}": t.detach().clone() for name, t in tensors.items()}
    save_file({**load_file(file), **copies}, file)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["modules_to_save"] = [name.split(".")[-2] for name in tensors]
    (folder / "adapter_config.json").write_text(json.dumps(config))
