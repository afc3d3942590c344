"""New tokens and whole modules in runs: rows, files, resuming, memory, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import engine
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError, DataError, EngineError
from engine.inference.loading import require_same_words
from engine.model_sources.load_model import load_model
from engine.model_sources.open import describe_model, open_model_source
from engine.model_sources.scratch.open_base import describe_base, open_base
from engine.model_sources.vocabulary.extended import ExtendedTokenizer
from engine.model_sources.vocabulary.resized import mean_row
from engine.model_sources.vocabulary.token_file import NewToken, read_tokens
from engine.tokenization.tokenizer import load_tokenizer
from engine.verbs.models.export import export_gguf
from engine.verbs.models.merge import merge
from tests.support.small_runs import adapter_bytes, small_run
from tests.support.tiny_model import write_tiny_model
from tests.support.tokenizer_folder import write_byte_tokenizer

ROWS, TOKENS = 128, 84
"""Of the tiny model's embedding and of its tokenizer."""


def write_tokens(path: Path, count: int = 60) -> Path:
    content = {"normal": [f"<a{number}>" for number in range(count)], "special": ["<end>"]}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a run with new tokens; `family` qwen2 has a tied head, llama has not."""
    rows = [{"prompt": f"Word <a{n % 4}>?", "response": f"<a{n % 3}>ab{n}<end>"} for n in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = write_tokens(tmp_path / "tokens.json")

    def make(name: str = "run", family: str = "llama", **changes: Any) -> TrainConfig:
        model = tmp_path / family
        if not model.exists():
            write_tiny_model(model, family)
        given = {"add_tokens": tokens, "max_steps": 4, "lora_rank": 4, "heldout": 0.25}
        return small_run(model, data, tmp_path / name, **(given | changes))

    return make


def test_a_file_has_a_token_a_line_or_json_with_flags(tmp_path: Path) -> None:
    text = tmp_path / "tokens.txt"
    text.write_text("<tool>\n\n</tool>\n<tool>\n[odd]\n")
    assert read_tokens(text) == (NewToken("<tool>"), NewToken("</tool>"), NewToken("[odd]"))
    listed = tmp_path / "list.json"
    listed.write_text('["<tool>", {"content": "<end>", "special": true, "lstrip": true}]')
    assert read_tokens(listed) == (NewToken("<tool>"), NewToken("<end>", True, lstrip=True))
    assert read_tokens(write_tokens(tmp_path / "kinds.json", 1)) == (
        NewToken("<a0>"),
        NewToken("<end>", True),
    )


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "", "holds 0 tokens"),
        ("a.txt", "good\n \n", "entry 2"),
        ("a.json", '{"others": []}', "'others'"),
        ("a.json", "[1]", "entry 1 is '1'"),
        ("a.json", '[{"content": "<a>", "special": "no"}]', "true or false"),
        ("a.json", '["a', "is no JSON"),
    ],
)
def test_a_file_that_holds_no_tokens_is_refused(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        read_tokens(path)


def test_tokens_that_are_there_keep_their_ids(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = describe_model(tiny_model)
    tokens = [NewToken("<x>"), NewToken("a"), NewToken("<|im_end|>"), NewToken("<y>")]
    words = ExtendedTokenizer(base, tokens)
    assert words.new_ids == {"<x>": TOKENS, "<y>": TOKENS + 1}
    assert words.size == TOKENS + 2 and "there already" in caplog.text
    after, before = load_tokenizer(words), load_tokenizer(base)
    assert after.encode("a<y>b<x>") == [*before.encode("a"), 85, *before.encode("b"), 84]


def test_a_tokenizer_in_another_form_is_refused(tiny_model: Path) -> None:
    (tiny_model / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has none\. Write one with"):
        ExtendedTokenizer(describe_model(tiny_model), [NewToken("<x>")])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("count", [3, 60])
def test_new_rows_are_the_mean_of_those_of_known_tokens(
    settings: Callable[..., TrainConfig], tmp_path: Path, family: str, count: int
) -> None:
    config = settings(family=family, add_tokens=write_tokens(tmp_path / "few.json", count))
    source, base = open_base(config), open_model_source(config.model)
    size = max(ROWS, TOKENS + count + 1)
    assert source.config.vocab_size == source.raw_config["vocab_size"] == size
    assert describe_base(config).config == source.config
    heads = ("model.embed_tokens.weight", "lm_head.weight")
    for name in source.names():
        before, after = base.tensor(name), source.tensor(name)
        assert after.shape == source.shape(name) and after.dtype == before.dtype
        if name not in heads:
            assert torch.equal(after, before)
            continue
        assert torch.equal(after[:TOKENS], before[:TOKENS])
        spare = slice(TOKENS + count + 1, ROWS)
        assert torch.equal(after[spare], before[spare])
        mean = before[:TOKENS].double().mean(0)
        new = after[TOKENS : TOKENS + count + 1].double()
        torch.testing.assert_close(new, mean.expand_as(new), rtol=1e-6, atol=1e-8)


def test_the_mean_of_many_rows_is_exact() -> None:
    rows = torch.randn(1000, 8, dtype=torch.bfloat16) + 100
    torch.testing.assert_close(mean_row(rows), rows.double().mean(0).float())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"method": "qlora", "lora_dropout": 0.1}),
        ("qwen2", {"method": "lora", "optimizer": "adamw"}),
        ("qwen2", {"method": "full"}),
    ],
)
def test_a_run_goes_on_to_the_same_bytes_and_its_result_is_what_was_evaluated(
    settings: Callable[..., TrainConfig], family: str, changes: dict[str, Any]
) -> None:
    whole = engine.train(settings("whole", family, **changes), console=False)
    engine.train(settings("cut", family, max_steps=4, **changes), console=False,
                 callbacks=[_Stop(2)])  # fmt: skip
    again = engine.resume(whole.run_directory.with_name("cut"), console=False)
    full = changes["method"] == "full"
    folder, name = ("model", "model") if full else ("adapter", "adapter_model")
    results = [
        (result.run_directory / folder / f"{name}.safetensors").read_bytes()
        for result in (whole, again)
    ]
    assert results[0] == results[1]
    # Another process reads the files alone, with the tokenizer that lies beside them.
    size = TOKENS + 61
    config = settings("whole", family, **changes)
    quantize = "nf4" if changes["method"] == "qlora" else None
    where = str(whole.run_directory / "model") if full else config.model
    adapter = None if full else whole.run_directory / "adapter"
    given: dict[str, Any] = {"heldout": 0.25, "seed": 42, "max_length": 96, "dtype": "float32"}
    result = engine.evaluate(where, config.data, adapter, quantize=quantize, device="cpu", **given)
    assert result.loss == pytest.approx(whole.metrics["heldout_loss"], rel=1e-5)
    model = load_model(where, adapter=adapter)
    assert model.config.vocab_size == size
    tensors = load_file(whole.run_directory / folder / f"{name}.safetensors")
    rows = [len(t) for key, t in tensors.items() if "embed_tokens" in key or "lm_head" in key]
    assert set(rows) == {size}
    # New rows have learnt, each something of its own.
    embedding = model.model.embed_tokens.weight
    assert isinstance(embedding, torch.Tensor)
    assert len(embedding[TOKENS : TOKENS + 3].unique(dim=0)) == 3


class _Stop:
    """Ends a run after some steps."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, step: int, metrics: dict[str, Any]) -> bool:
        return step >= self._step


def test_an_adapter_of_whole_modules_is_trained_on_from_where_it_was(
    settings: Callable[..., TrainConfig],
) -> None:
    first = engine.train(settings("first", method="lora"), console=False)
    adapter = first.run_directory / "adapter"
    config = settings("second", method="lora", add_tokens=None, init_adapter=adapter)
    second = engine.train(config, console=False)
    assert second.metrics["heldout_loss_before"] == pytest.approx(
        first.metrics["heldout_loss"], rel=1e-6
    )
    raw = json.loads((second.run_directory / "adapter" / "adapter_config.json").read_text())
    assert raw["modules_to_save"] == ["embed_tokens", "lm_head"]
    tensors = [
        load_file(folder / "adapter_model.safetensors")
        for folder in (adapter, second.run_directory / "adapter")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    name = "base_model.model.lm_head.weight"
    assert not torch.equal(tensors[0][name], tensors[1][name])
    words = [load_tokenizer(describe_base(c)).vocabulary() for c in (settings(), config)]
    assert words[0] == words[1]


def test_what_is_merged_and_exported_has_the_new_tokens(
    settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config, model = settings(method="lora"), tmp_path / "llama"
    write_byte_tokenizer(model, ROWS)  # of a form that llama.cpp has
    first = load_tokenizer(describe_model(model)).vocab_size
    run = engine.train(config, console=False).run_directory
    adapter = run / "adapter"
    merged = merge(model, adapter, tmp_path / "merged", verify=True).output
    words = load_tokenizer(describe_model(merged))
    ids = words.encode("<a1>b<end>")
    assert ids == [first + 1, *words.encode("b"), first + 60]
    answers = [
        engine.generate(name, "Word <a1>?", given, max_new_tokens=6, device="cpu").text
        for name, given in ((model, adapter), (merged, None))
    ]
    assert answers[0] == answers[1]
    target = tmp_path / "model.gguf"
    export_gguf(model=str(merged), output=target, type="f32")
    again = open_model_source(target)
    assert load_tokenizer(again).encode("<a1>b<end>") == ids
    with torch.no_grad():
        both = [load_model(name)(torch.tensor([ids])) for name in (merged, target)]
    torch.testing.assert_close(both[0], both[1], rtol=1e-5, atol=1e-5)
    with pytest.raises(EngineError, match="embed_tokens"):
        export_gguf(model=str(model), adapter=adapter, output=tmp_path / "adapter.gguf")


def test_a_server_of_several_adapters_refuses_words_of_one(
    settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    run = engine.train(settings(method="lora", max_steps=1), console=False).run_directory
    words = load_tokenizer(describe_model(tmp_path / "llama"))
    with pytest.raises(ConfigError, match="brings 61 tokens of its own"):
        require_same_words(words, [run / "adapter"])


def test_whole_modules_need_no_new_tokens(settings: Callable[..., TrainConfig]) -> None:
    config = settings(add_tokens=None, method="lora", modules_to_save="lm_head")
    run = engine.train(config, console=False).run_directory
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    whole = {name for name in tensors if "lora" not in name}
    assert whole == {"base_model.model.lm_head.weight"}
    base = load_file(Path(config.model) / "model.safetensors")["lm_head.weight"]
    assert not torch.equal(tensors[whole.pop()], base)
    assert adapter_bytes(run)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "full", "modules_to_save": "lm_head", "add_tokens": None}, "every weight"),
        ({"modules_to_save": "lm_head"}, "names one of them"),
        ({"method": "scratch"}, "pretrained"),
        ({"init_adapter": "a"}, "Merge the adapter first"),
        ({"head_precision": "8bit"}, "frozen head"),
        ({"embedding_on": "host"}, "frozen embedding"),
        ({"teacher": "t"}, "frozen head"),
        ({"modules_to_save": "norm", "add_tokens": None}, "embed_tokens"),
    ],
)
def test_what_does_not_go_together_is_refused(
    settings: Callable[..., TrainConfig], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(**changes)


def test_the_plan_counts_the_new_rows(settings: Callable[..., TrainConfig]) -> None:
    figures = [
        engine.plan(settings(**given, method="lora", heldout=0)).as_dict()
        for given in ({}, {"add_tokens": None}, {"add_tokens": None, "modules_to_save": "lm_head"})
    ]
    trained = [plan["trainable_parameters"] for plan in figures]
    width = 64
    assert trained[0] - trained[1] == 2 * (TOKENS + 61) * width
    assert trained[2] - trained[1] == ROWS * width
