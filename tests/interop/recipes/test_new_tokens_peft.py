"""New tokens and whole modules: PEFT and transformers compute what the run left, from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine
from engine.model_sources.load_model import load_model
from engine.model_sources.vocabulary.folder import TokenizerFolder
from engine.tokenization.tokenizer import load_tokenizer
from engine.training.trainable import make_trainable
from engine.verbs.models.merge import merge
from tests.support.small_runs import small_run
from tests.support.tiny_model import write_tiny_model

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.interop

TEXTS = ["<a0>b<end> Word", "<a1><a2> <a3>?<end>", "a0 > <a", "Word<a0> .<end><end>"]


def write_model(target: Path, tied: bool) -> Path:
    """A tiny Llama whose head is the embedding, or a matrix of its own."""
    write_tiny_model(target, "llama")
    if tied:
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        weights = load_file(target / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


def write_tokens(path: Path, count: int) -> Path:
    """So many normal tokens and a special one; of 128 rows the model has 44 to spare."""
    content = {"normal": [f"<a{number}>" for number in range(count)], "special": ["<end>"]}
    path.write_text(json.dumps(content))
    return path


def write_rows(path: Path) -> Path:
    rows = [
        {"prompt": f"Word <a{n % 4}> {n}?", "response": f"<a{n % 3}>abc{n}<end>"} for n in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(tmp_path: Path, tied: bool, count: int, **changes: Any) -> Path:
    """The directory of a run with new tokens; its model is in `model`."""
    write_model(tmp_path / "model", tied)
    given = {
        "method": "lora",
        "add_tokens": write_tokens(tmp_path / "tokens.json", count),
        "max_steps": 3,
        "lora_rank": 4,
        "dtype": "float32",
    }
    rows = write_rows(tmp_path / "rows.jsonl")
    config = small_run(tmp_path / "model", rows, tmp_path / "run", **(given | changes))
    with torch.enable_grad():
        return engine.train(config, console=False).run_directory


def with_peft(base: Path, adapter: Path) -> Any:
    """As the adapter's card says that PEFT loads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    return peft.PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("count", [4, 60])
@torch.no_grad()
def test_peft_and_transformers_compute_what_was_trained(
    tmp_path: Path, tied: bool, count: int
) -> None:
    run = trained(tmp_path, tied, count)
    adapter, model = run / "adapter", tmp_path / "model"
    ours = load_model(model, adapter=adapter)
    assert ours.config.vocab_size == max(128, 85 + count)
    words = load_tokenizer(TokenizerFolder(adapter))
    theirs = transformers.AutoTokenizer.from_pretrained(adapter)
    for text in TEXTS:
        own = words.encode(text, False)
        assert theirs(text, add_special_tokens=False)["input_ids"] == own
        assert theirs.decode(own, skip_special_tokens=True) == words.decode(own)
    assert words.encode("<a0><end>", False) == [84, 84 + count]
    ids = torch.tensor([words.encode(TEXTS[0] + TEXTS[1], False)])
    expected = ours(ids)
    scale = expected.abs().max()
    loaded = with_peft(model, adapter)(ids).logits
    assert float((loaded - expected).abs().max() / scale) < 1e-5

    merged = merge(model, adapter, tmp_path / "merged").output
    other = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    assert other.config.vocab_size == ours.config.vocab_size
    assert other.config.tie_word_embeddings is tied
    assert float((other(ids).logits - expected).abs().max() / scale) < 1e-5
    # What is merged has the tokens that transformers itself would have added to the model's.
    again = transformers.AutoTokenizer.from_pretrained(merged)
    added = transformers.AutoTokenizer.from_pretrained(model)
    added.add_tokens([f"<a{number}>" for number in range(count)])
    added.add_tokens(["<end>"], special_tokens=True)
    assert len(again) == len(added)
    for text in TEXTS:
        ids_of_text = again(text)["input_ids"]
        assert ids_of_text == added(text)["input_ids"]
        assert again.decode(ids_of_text, skip_special_tokens=True) == added.decode(
            ids_of_text, skip_special_tokens=True
        )


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_whole_modules_are_pefts(tmp_path: Path, tied: bool) -> None:
    base = write_model(tmp_path / "model", tied)
    ids = (torch.arange(40) * 7 % 61 + 1).reshape(1, 40)
    config = small_run(base, "d", tmp_path, method="lora", modules_to_save="embed_tokens,lm_head")
    ours = load_model(base)
    make_trainable(ours, config, None)
    ours.train()
    ours.loss(ids, ids).backward()
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    theirs = peft.get_peft_model(model, settings)
    theirs(ids, labels=ids).loss.backward()
    named = {
        name.split(".modules_to_save")[0].split(".")[-1]: parameter.grad
        for name, parameter in theirs.named_parameters()
        if "modules_to_save" in name
    }
    mine = {n.split(".")[-2]: p.grad for n, p in ours.named_parameters() if "lora" not in n}
    expected = named
    if tied:  # one matrix here, two copies of it there
        expected = {"embed_tokens": named["embed_tokens"] + named["lm_head"]}
        mine = {"embed_tokens": mine["embed_tokens"]}
    for name, gradient in expected.items():
        got = mine[name]
        assert got is not None
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_pefts_whole_modules_are_read_and_trained_on(tmp_path: Path, tied: bool) -> None:
    base = write_model(tmp_path / "model", tied)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<a{number}>" for number in range(60)])
    tokenizer.add_tokens(["<end>"], special_tokens=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(model, settings).eval()
    torch.manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn_like(parameter))
    folder = tmp_path / "theirs"
    wrapped.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = torch.tensor([tokenizer(TEXTS[0] + TEXTS[1])["input_ids"]])
    expected = wrapped(ids).logits
    ours = load_model(base, adapter=folder)
    scale = expected.abs().max()
    assert float((ours(ids) - expected).abs().max() / scale) < 1e-5
    assert engine.evaluate(base, write_rows(tmp_path / "rows.jsonl"), folder, device="cpu").tokens

    # Training on from it begins with its matrices, and what is saved is read by PEFT again.
    config = small_run(
        base,
        tmp_path / "rows.jsonl",
        tmp_path / "run",
        method="lora",
        init_adapter=folder,
        dtype="float32",
        max_steps=2,
        learning_rate=1e-3,
    )
    with torch.enable_grad():
        run = engine.train(config, console=False).run_directory
    after = load_model(base, adapter=run / "adapter")
    change = float((after(ids) - expected).abs().max() / scale)
    assert 1e-4 < change < 0.5
    loaded = with_peft(base, run / "adapter")(ids).logits
    assert float((after(ids) - loaded).abs().max() / scale) < 1e-5
