"""Sampling settings of generation_config.json hold unless flags say otherwise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cli import main as cli
from engine.config.tasks.inference import GenerateSettings, Sampling
from engine.errors import ConfigError
from engine.inference.next_token import next_token
from engine.inference.sampling import resolve_sampling

QWEN = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "repetition_penalty": 1.05,
}
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@pytest.mark.parametrize(
    ("file", "flags", "expected"),
    [
        ({}, {}, {}),
        ({"eos_token_id": 2}, {"top_p": 0.5}, {"top_p": 0.5}),
        (QWEN, {}, {k: v for k, v in QWEN.items() if k != "do_sample"}),
        # transformers' own values hold where the file draws and names none.
        ({"do_sample": True}, {}, {"temperature": 1.0, "top_k": 50}),
        (
            {"do_sample": True, "min_p": 0.1, "top_k": None},
            {},
            {"temperature": 1.0, "min_p": 0.1, "top_k": 50},
        ),
        (QWEN, {"top_p": 0.3}, {**QWEN, "top_p": 0.3}),
        (QWEN, {"temperature": 0.0}, {"repetition_penalty": 1.05}),
        # Without do_sample the file draws nothing; who asks for it gets the rest of the file.
        ({**QWEN, "do_sample": False}, {}, {"repetition_penalty": 1.05}),
        ({k: v for k, v in QWEN.items() if k != "do_sample"}, {}, {"repetition_penalty": 1.05}),
        ({**QWEN, "do_sample": False}, {"temperature": 0.5}, {**QWEN, "temperature": 0.5}),
        ({"temperature": 0.6, "top_k": 9}, {"temperature": 1.5}, {"temperature": 1.5, "top_k": 9}),
        ({"do_sample": True, "top_k": -1}, {}, {"temperature": 1.0, "top_k": 0}),
        ({"do_sample": True, "temperature": 0}, {}, {}),
    ],
)  # fmt: skip
def test_flags_hold_then_the_file_then_greedy(
    file: dict[str, Any], flags: dict[str, Any], expected: dict[str, Any]
) -> None:
    asked = GenerateSettings(model="m", prompt="p", **flags)
    result, _ = resolve_sampling(asked, file, "m")
    values = {name: getattr(result, name) for name in GREEDY}
    assert values == {**GREEDY, **{k: v for k, v in expected.items() if k != "do_sample"}}


def test_one_line_says_what_was_used_and_what_is_not_done() -> None:
    asked = GenerateSettings(model="m", prompt="p", top_k=5)
    assert resolve_sampling(asked, QWEN, "m")[1] == (
        "As generation_config.json says: temperature 0.7, top p 0.8, repetition penalty 1.05 "
        "(--temperature 0 takes the likeliest token)."
    )
    _, line = resolve_sampling(asked, {"num_beams": 4, "typical_p": 1.0}, "m")
    assert line == "Not done here of generation_config.json: num_beams 4."
    assert resolve_sampling(asked, {"eos_token_id": 2, "do_sample": False}, "m")[1] is None


@pytest.mark.parametrize("value", ["hot", -1.0, [0.5]])
def test_a_value_that_cannot_be_used_names_file_and_flag(value: Any) -> None:
    asked = GenerateSettings(model="m", prompt="p")
    with pytest.raises(
        ConfigError, match=r"generation_config.json says how .*temperature.*Correct"
    ):
        resolve_sampling(asked, {"do_sample": True, "temperature": value}, "m")


def test_min_p_keeps_what_is_likely_enough() -> None:
    logits = torch.tensor(np.log([0.5, 0.2, 0.15, 0.1, 0.05]))
    sampling = Sampling(temperature=1.0, min_p=0.3)
    drawn = [
        next_token(logits, [], sampling, torch.Generator().manual_seed(seed)) for seed in range(300)
    ]
    counts = np.bincount(drawn, minlength=5)
    assert (counts[:3] > 0).all()
    assert (counts[3:] == 0).all()
    assert abs(counts[0] / 300 - 0.5 / 0.85) < 0.1


def test_the_command_line_samples_as_the_file_says(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_model / "generation_config.json").write_text(json.dumps({**QWEN, "temperature": 5.0}))
    base = ["generate", "--model", str(tiny_model), "--prompt", "Hi", "--max-new-tokens", "12"]

    def run(*flags: str) -> tuple[str, str]:
        cli.main([*base, *flags])
        captured = capsys.readouterr()
        return captured.out, captured.err

    first, said = run("--seed", "1")
    assert "As generation_config.json says: temperature 5, top k 20, top p 0.8" in said
    assert first != run("--seed", "2")[0]
    greedy, said = run("--temperature", "0", "--repetition-penalty", "1")
    assert greedy == run("--temperature", "0", "--repetition-penalty", "1", "--seed", "2")[0]
    assert "generation_config" not in said
    answer = json.loads(run("--json")[0])
    assert answer["sampling"].startswith("As generation_config.json says")


def test_long_values_of_the_file_are_cut_in_the_line() -> None:
    long: dict[str, Any] = {
        "suppress_tokens": list(range(10_000)),
        "sequence_bias": "A" * 10_000,
        "bad_words_ids": [[number] for number in range(10_000)],
    }
    _, line = resolve_sampling(Sampling(), long, "a model")
    assert line is not None
    assert all(key.replace("_", " ") in line.replace("_", " ") for key in long)
    assert len(line) < 600
