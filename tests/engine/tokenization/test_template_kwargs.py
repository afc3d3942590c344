"""Variables of the chat template reach it from every verb."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.main import main
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.inference.generation import prompt_ids
from engine.model_sources.open import open_model_source
from engine.tokenization.tokenizer import load_tokenizer
from engine.training.prepare import prepare

PLAIN = '{"enable_thinking": false}'
SWITCH = (
    "{% if enable_thinking is defined and not enable_thinking %}"
    "<|im_start|>system\nbe brief<|im_end|>\n{% endif %}"
)


@pytest.fixture
def model(tiny_model: Path) -> Path:
    """A model whose template looks at `enable_thinking`."""
    path = tiny_model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"chat_template": SWITCH + settings["chat_template"]}))
    return tiny_model


def test_a_run_renders_its_rows_with_the_variables(
    model: Path, write_rows: Callable[..., Path]
) -> None:
    def first_row(**changes: object) -> str:
        config = TrainConfig(model=str(model), data=[str(write_rows(4))], heldout=0.5, **changes)
        prepared = prepare(config)
        ids = prepared.examples[0].input_ids, prepared.heldout[0].input_ids
        texts = [prepared.tokenizer.decode(part, False) for part in ids]
        assert texts[0].startswith("<|im_start|>system") == texts[1].startswith(
            "<|im_start|>system"
        )
        return texts[0]

    assert first_row().startswith("<|im_start|>user")
    assert first_row(chat_template_kwargs=PLAIN).startswith("<|im_start|>system\nbe brief")
    assert first_row(chat_template_kwargs={"enable_thinking": True}).startswith("<|im_start|>user")


def test_a_prompt_is_rendered_with_the_variables(model: Path) -> None:
    tokenizer = load_tokenizer(open_model_source(model))
    ids = prompt_ids(tokenizer, "Hi", template_kwargs={"enable_thinking": False})
    assert tokenizer.decode(ids, False).startswith("<|im_start|>system\nbe brief")
    assert tokenizer.decode(prompt_ids(tokenizer, "Hi"), False).startswith("<|im_start|>user")


def test_the_verbs_take_the_variables(
    model: Path, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = str(write_rows(4))
    words = ["data", "preview", rows, "--model", str(model), "--chat-template-kwargs", PLAIN]
    assert main(words) == 0
    assert "be brief" in capsys.readouterr().out
    words = ["--model", str(model), "--device", "cpu", "--json"]
    losses = []
    for extra in ([], ["--chat-template-kwargs", PLAIN]):
        assert main(["eval", *words, "--data", rows, *extra]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] != losses[1]
    prompts = []
    for extra in ([], ["--chat-template-kwargs", PLAIN]):
        assert main(["generate", *words, "--prompt", "Hi", "--max-new-tokens", "1", *extra]) == 0
        prompts.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    assert prompts[1] > prompts[0]


@pytest.mark.parametrize("text", ["{enable_thinking: false}", "[1]", "true"])
def test_variables_that_are_no_object_are_refused(
    text: str, model: Path, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"chat.template.kwargs"):
        TrainConfig(model=str(model), data=[str(write_rows(2))], chat_template_kwargs=text)
    words = ["generate", "--model", str(model), "--prompt", "Hi", "--chat-template-kwargs", text]
    assert main(words) == 2
    assert "--chat-template-kwargs" in capsys.readouterr().err
