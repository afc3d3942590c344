"""Models from scratch are those of transformers: first weights, token ids, logits, llama.cpp's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import engine
from engine.model_sources.load_model import build_model
from engine.model_sources.open import open_model_source
from engine.model_sources.scratch.characters import TOKENS, CharacterTokenizer
from engine.model_sources.scratch.fresh_model import FreshModel
from engine.model_sources.scratch.open_base import fresh_model
from engine.tokenization.tokenizer import load_tokenizer
from engine.verbs.models.export import export_gguf
from engine.verbs.training.train import train
from tests.support.llama_cpp import differences, likeliest

pytestmark = pytest.mark.interop
GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
TEXTS = [
    "Hello, world!", "def f(x):\n\treturn x  # 100% \\ sure\n\n\n", "  a   b    c     d         e",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "the then and ing of to  of the ",
    "".join(TOKENS), "".join(TOKENS[::-1]), "[EOS][PAD]<|im_", "",
]  # fmt: skip
UNKNOWN = ["naïve 日本", "😀\r\n\0"]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A small model that was trained for two steps with the character tokenizer."""
    shape, rows = tmp_path / "shape.json", tmp_path / "rows.jsonl"
    raw = {
        "model_type": "llama", "vocab_size": 133, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
    }  # fmt: skip
    shape.write_text(json.dumps(raw))
    lines = [{"prompt": f"Say {n}", "response": "ab"} for n in range(8)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = train(
        console=False, method="scratch", model=str(shape), tokenizer="char", data=str(rows),
        output_dir=tmp_path / "run", max_steps=2, max_length=64, device="cpu", plot=False,
        learning_rate=1e-2, hidden_dropout=0.1, attention_dropout=0.1,
    )  # fmt: skip
    assert run.output_path is not None
    return run.output_path


def fresh(folder: Path) -> FreshModel:
    """A fresh model of the config.json in `folder`, whose own ids stay."""
    for name, content in CharacterTokenizer().tokenizer_files().items():
        (folder / name).write_bytes(content)
    return fresh_model(
        SimpleNamespace(model=str(folder), revision=None, method="scratch", tokenizer=None, seed=1)
    )


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "qwen3", "mistral", "smollm3", "qwen2_moe", "qwen3_moe", "qwen3_next"],
)
def test_first_weights_are_drawn_as_transformers_draws_them(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = json.loads((GOLDEN / family / "config.json").read_text())
    raw |= {"initializer_range": 0.07, "vocab_size": 200, "pad_token_id": 3}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    ours = build_model(fresh(tmp_path))
    state = dict(theirs.named_parameters())
    assert state.keys() == dict(ours.named_parameters()).keys()
    for name, mine in ours.named_parameters():
        other = state[name].detach().float()
        assert mine.shape == other.shape, name
        if float(other.std(unbiased=False)) < 1e-7:
            torch.testing.assert_close(mine.detach(), other, msg=name)
            continue
        few = 5 / mine.numel() ** 0.5
        assert float(mine.std()) == pytest.approx(float(other.std()), rel=2 * few), name
        gap = abs(float(mine.mean()) - float(other.mean()))
        assert gap < 2 * few * float(other.std()), name
        if "embed_tokens" in name:
            assert float(mine[3].abs().max()) == float(other[3].abs().max()) == 0.0


def test_transformers_loads_what_was_trained(trained: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(trained)
    ours = open_model_source(trained)
    tokenizer = load_tokenizer(ours)
    for text in TEXTS + UNKNOWN:
        assert theirs(text).input_ids == tokenizer.encode(text), text
        assert theirs.decode(theirs(text).input_ids) == tokenizer.decode(
            tokenizer.encode(text), skip_special_tokens=False
        )
    for text in TEXTS:
        assert theirs.decode(theirs(text).input_ids) == text
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert theirs.apply_chat_template(chat, tokenize=False).startswith("<|im_start|>user\nhi<|im_")
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (2, 0, 1)
    ids = torch.tensor([tokenizer.encode(TEXTS[1])])
    model = AutoModelForCausalLM.from_pretrained(trained).eval()
    with torch.no_grad():
        want, got = model(ids).logits, engine.load_model(trained)(ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert model.generation_config.eos_token_id == [2, 99]


def test_llama_cpp_reads_the_same_ids_and_computes_the_same(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    export_gguf(model=str(trained), output=file, type="f32")
    own = load_tokenizer(open_model_source(trained))
    read = load_tokenizer(open_model_source(file))
    assert [read.encode(text) for text in TEXTS + UNKNOWN] == [
        own.encode(text) for text in TEXTS + UNKNOWN
    ]
    assert differences(lambda t: own.encode(t, add_special_tokens=False), file, TEXTS) == []
    prompts = [own.encode(text) for text in TEXTS[:4]]
    model = engine.load_model(trained)
    answers = likeliest(file, prompts, 4)
    assert any(answers)
    for ids, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            ours = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        for token, theirs in answer.items():
            assert float(ours[token]) == pytest.approx(theirs, abs=0.005)
