"""`engine plan`: its table, its JSON, its search and its refusals."""

import json
from typing import Any

import pytest

from cli import main as cli
from engine.memory.model_shapes import NAMES


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_the_table_names_owners_and_peaks(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--model", "qwen3-0.6b", "--gpu", "4090")
    for word in ("NF4 base", "embeddings", "adapters", "peak of loading", "CUDA context", "TFLOP"):
        assert word in text


def test_json_holds_every_byte(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "--model", "smollm2-135m", "--batch-size", "1", "--json")
    made: dict[str, Any] = json.loads(out)
    step = made["peaks"]["step"]
    assert sum(step["owners"].values()) == step["bytes"]
    assert made["total_bytes"] == made["allocated_bytes"] + sum(made["reserve"].values())
    assert made["settings"]["batch_size"] == 1


def test_the_plan_says_how_many_parameters_the_model_has(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--model", "qwen2.5-0.5b", "--batch-size", "1")
    assert "494,032,768 parameters" in printed(capsys, *words)
    assert json.loads(printed(capsys, *words, "--json"))["parameters"] == 494_032_768


def test_the_known_sizes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    counts = json.loads(printed(capsys, "--sizes", "--json"))["parameters"]
    assert list(counts) == list(NAMES)
    assert counts["llama-3.1-405b"] == 405_853_388_800
    lines = printed(capsys, "--sizes").splitlines()
    assert len(lines) == len(NAMES) + 2
    assert "qwen3-30b-a3b              30,532,122,624  qwen3_moe, 48 x 2048" in lines


def test_a_budget_chooses_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(
        capsys, "--model", "smollm2-135m", "--max-length", "1024", "--memory-budget", "1.5GiB"
    )
    assert "budget 1.50 GiB" in out
    assert "the fastest of the settings that fit" in out


def test_the_process_is_counted_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "smollm2-135m", "--device", "cpu", "--batch-size", "1")
    made = json.loads(printed(capsys, *words, "--json"))
    holes = made["reserve"]["allocator's holes"]
    assert made["reserve"] == {"process": 520 << 20, "allocator's holes": holes}
    assert 0 < holes < made["allocated_bytes"]
    assert made["total_bytes"] == made["allocated_bytes"] + (520 << 20) + holes
    lines = printed(capsys, *words).splitlines()
    assert "process 520.00 MiB assumed" in [" ".join(line.split()) for line in lines]


@pytest.mark.parametrize("budget", ["150MiB", "520MiB"])
def test_a_budget_below_the_process_is_refused(
    budget: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--model", "smollm2-135m", "--device", "cpu", "--memory-budget", budget]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert "less than the process itself" in error and "520.00 MiB for Python" in error
    assert error.count("\n") == 1


def test_a_search_on_a_cpu_leaves_room_for_the_process(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--model", "smollm2-135m", "--device", "cpu", "--max-length", "512"]
    words += ["--batch-size", "1", "--gradient-checkpointing", "none"]
    made = json.loads(printed(capsys, *words, "--memory-budget", "900MiB", "--json"))
    assert made["allocated_bytes"] + made["reserve"]["process"] < made["total_bytes"] <= 900 << 20
    assert made["changes"]


def test_a_budget_that_cannot_hold_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "llama-3.1-8b", "--memory-budget", "1GiB"]) == 2
    error = capsys.readouterr().err
    assert "too much" in error and "Ways out" in error
    assert error.count("\n") == 1


def test_the_context_table_has_a_line_per_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "--model", "smollm2-1.7b", "--max-context", "--json")
    table = json.loads(out)["max_context"]
    assert list(table) == ["6", "8", "12", "16", "24", "40", "48", "80", "141"]
    lengths = [tokens or 0 for tokens in table.values()]
    assert lengths == sorted(lengths)
    assert lengths[1] > 4096


def test_a_wrong_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "smollm2-135m", "--gpu", "fast"]) == 2
    assert "TFLOP/s" in capsys.readouterr().err
