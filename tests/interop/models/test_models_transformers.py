"""Our logits, adapters, merged models and generated text against transformers and PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from engine.config.tasks.inference import Sampling
from engine.inference.generation import generate_ids, prompt_ids
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import save_adapter
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from engine.tokenization.tokenizer import load_tokenizer
from engine.verbs.models.merge import merge
from models.adapters import adapter_tensors, add_lora
from models.families import FAMILIES as FUSED

pytestmark = pytest.mark.interop
GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir())


def peer(directory: Path) -> Any:
    """The class that the files are of: with the parts that text does not pass, where it has any."""
    named = json.loads((directory / "config.json").read_text()).get("architectures", ["Auto"])[0]
    whole = named.endswith("ForConditionalGeneration")
    kind = getattr(transformers, named) if whole else AutoModelForCausalLM
    return kind.from_pretrained(directory, dtype=torch.float32).eval()


def ids_of(vocab_size: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, vocab_size, shape, generator=generator)


@torch.no_grad()
def trained_adapter(directory: Path, target: Path, **options: Any) -> Any:
    """A model with a random adapter, saved to `target`, and the model itself."""
    model = load_model(directory)
    add_lora(model, rank=4, alpha=8, **options)
    generator = torch.Generator().manual_seed(7)
    for a, b in adapter_tensors(model).values():
        a.normal_(0, 0.1, generator=generator)
        b.normal_(0, 0.1, generator=generator)
    names = sorted({path.rsplit(".", 1)[-1] for path in adapter_tensors(model)})
    config = AdapterConfig(
        r=4,
        lora_alpha=8,
        target_modules=names,
        base_model_name_or_path=str(directory),
        use_rslora=options.get("use_rslora", False),
        fused_experts=FUSED[model.config.model_type].fused_adapters,
    )
    save_adapter(target, config, adapter_tensors(model))
    return model


@torch.no_grad()
def test_smollm2_logits_equal_transformers(smollm2_directory: Path) -> None:
    model, other = load_model(smollm2_directory), peer(smollm2_directory)
    ids = ids_of(49152, 2, 70)
    assert float((model(ids) - other(ids).logits).abs().max()) <= 1e-3


@torch.no_grad()
def test_gguf_and_directory_are_the_same_model(smollm2_gguf: Path, smollm2_directory: Path) -> None:
    ids = ids_of(49152, 1, 20)
    assert torch.equal(load_model(smollm2_gguf)(ids), load_model(smollm2_directory)(ids))


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"targets": "qv", "use_rslora": True}]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_and_merged_model_give_our_logits_in_peft(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base = GOLDEN / family
    model = trained_adapter(base, tmp_path / "adapter", **options)
    ids = ids_of(model.config.vocab_size, 2, 40)
    ours = model(ids)
    assert float((ours - load_model(base)(ids)).abs().max()) > 1e-2
    with_peft = PeftModel.from_pretrained(peer(base), str(tmp_path / "adapter")).eval()
    tolerance = 2e-4 if "linear_attention" in model.config.layer_types else 2e-5
    assert float((ours - with_peft(ids).logits).abs().max()) <= tolerance
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert float((ours - peer(tmp_path / "merged")(ids).logits).abs().max()) <= max(tolerance, 5e-5)
    reloaded = load_model(base, adapter=tmp_path / "adapter")
    assert torch.equal(reloaded(ids), ours)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_of_a_family_is_read(family: str, tmp_path: Path) -> None:
    other = peer(GOLDEN / family)
    other.save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model")
    ids = ids_of(model.config.vocab_size, 2, 40)
    tolerance = 2e-4 if "linear_attention" in model.config.layer_types else 2e-5
    assert float((model(ids) - other(ids).logits).abs().max()) <= tolerance


@torch.no_grad()
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_text_equals_that_of_transformers(smollm2_directory: Path, penalty: float) -> None:
    model, other = load_model(smollm2_directory), peer(smollm2_directory)
    tokenizer = load_tokenizer(open_model_source(smollm2_directory))
    prompt = prompt_ids(tokenizer, "Name three colours and say why you like each of them.")
    theirs = other.generate(
        torch.tensor([prompt]), max_new_tokens=32, do_sample=False, repetition_penalty=penalty
    )[0, len(prompt) :].tolist()
    eos = frozenset(
        json.loads((smollm2_directory / "generation_config.json").read_text())["eos_token_id"]
    )
    ours = list(
        generate_ids(
            model,
            prompt,
            max_new_tokens=32,
            stop_ids=eos,
            sampling=Sampling(repetition_penalty=penalty),
        )
    )
    assert ours == theirs
