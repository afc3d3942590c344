"""Gates measure what they say, compare with limits, and fail when strict."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

import engine
from cli import main as cli
from engine.config.tasks.gates import GateSettings
from engine.errors import ConfigError, DataError
from engine.gates.measure import measure, prepare
from engine.gates.rates import pass_at
from engine.gates.rows import Question, make_question, read_questions
from engine.gates.verdict import decide
from engine.verbs.models.judge import ANSWERS, FAILED, RESULTS, read_gates


@dataclass
class Told:
    """A model that answers from a list of texts."""

    texts: Sequence[str]
    drawn: Sequence[str] = ()

    def answers(self, questions: Sequence[Question]) -> list[str]:
        return [self.texts[index % len(self.texts)] for index in range(len(questions))]

    def programs(self, question: Question, gates: GateSettings, index: int) -> list[str]:
        return list(self.drawn)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def measured(tmp_path: Path, rows: list[dict[str, Any]], told: Any, **gates: Any) -> Any:
    settings = GateSettings(**gates)
    data = write(tmp_path / "rows.jsonl", *rows)
    return measure(told, prepare(settings, [str(data)]), settings).figures()


def test_parse_rate_and_coverage_are_counted(tmp_path: Path) -> None:
    names = ("a", "a", "b", "c", None)
    rows = [{"prompt": "p", "response": "x = 1", "category": name} for name in names]
    told = Told(["x = 1", "x =", "y =", "z = 2", "z ="])
    figures = measured(tmp_path, rows, told, checker="python-ast")
    assert figures["parse_rate"] == 2 / 5
    assert figures["coverage"] == 2 / 3
    assert figures["pass_rate"] is None


@pytest.mark.parametrize(
    ("row", "answer", "right"),
    [
        ({"expected": "4"}, " 4\n", True),
        ({"expected": [4, "four"]}, "four", True),
        ({"expected": "4"}, "5", False),
        ({"contains": ["a", "b"]}, "b a", True),
        ({"contains": ["a", "b"]}, "b", False),
        ({"pattern": r"^\d+$"}, "12", True),
        ({"pattern": r"^\d+$"}, "x", False),
        ({"response": "as  it is"}, "as it\nis", True),
        ({"response": "as it is"}, "otherwise", False),
        ({"tests": "assert f() == 1"}, "```python\ndef f():\n    return 1\n```", True),
        ({"tests": ["assert f() == 2"]}, "def f():\n    return 1", False),
    ],
)
def test_a_row_says_what_a_right_answer_is(
    tmp_path: Path, row: dict[str, Any], answer: str, right: bool
) -> None:
    bench = write(tmp_path / "bench.jsonl", {"prompt": "p", **row})
    rows = [{"prompt": "p", "response": "r"}]
    figures = measured(
        tmp_path, rows, Told([answer]), parse_rate=None, coverage=None, pass_rate=0.5,
        benchmark=str(bench),
    )  # fmt: skip
    assert figures["pass_rate"] == float(right)


def test_code_to_complete_is_run_behind_its_prompt() -> None:
    row = {
        "prompt": "def add(a, b):\n",
        "entry_point": "add",
        "test": "def check(f):\n    assert f(1, 2) == 3\n",
        "canonical_solution": "    return a + b\n",
    }
    question = make_question(row, "f", 1)
    assert question.reference == row["canonical_solution"]
    from engine.gates.generated_code import CodeLimits, run_program
    from engine.gates.rates import program_of

    for answer, passes in (("    return a + b\n", True), ("    return a - b\n", False),
                           ("def add(a, b):\n    return b + a\n", True)):  # fmt: skip
        assert (run_program(program_of(question, answer), CodeLimits()) is None) is passes


def test_pass_at_k_is_the_share_of_drawings_with_a_passing_program(tmp_path: Path) -> None:
    for samples, right in ((5, 0), (5, 2), (5, 5), (4, 1)):
        programs = [index < right for index in range(samples)]
        for k in range(1, samples + 1):
            drawings = [any(drawn) for drawn in combinations(programs, k)]
            assert pass_at(k, samples, right) == pytest.approx(sum(drawings) / len(drawings))
    told = Told(["x"], ["f = lambda: 1", "f = lambda: 2", "f =", "f = lambda: 1"])
    figures = measured(
        tmp_path, [{"prompt": "p", "tests": "assert f() == 1"}], told, parse_rate=None,
        coverage=None, samples=4, pass_at={1: 0.2, 2: 0.5},
    )  # fmt: skip
    assert figures["pass_at_1"] == pytest.approx(0.5)
    assert figures["pass_at_2"] == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("settings", "figures", "base", "failed"),
    [
        ({}, {"parse_rate": 0.7, "coverage": 0.5}, None, []),
        ({}, {"parse_rate": 0.69, "coverage": 0.5}, None, ["parse_rate"]),
        ({}, {"parse_rate": 0.7, "coverage": None}, None, ["coverage"]),
        ({"coverage": "none"}, {"parse_rate": 0.7}, None, []),
        ({"perplexity": 30}, {"parse_rate": 1, "coverage": 1, "perplexity": 31}, None,
         ["perplexity"]),
        ({"perplexity": 30}, {"parse_rate": 1, "coverage": 1, "perplexity": None}, None,
         ["perplexity"]),
        ({"worse_than_base": 0.1}, {"parse_rate": 0.8, "coverage": 1}, {"parse_rate": 0.95},
         ["parse_rate_loss_from_base"]),
        ({"perplexity_over_base": 0.9}, {"parse_rate": 1, "coverage": 1, "perplexity": 19},
         {"perplexity": 20}, ["perplexity_over_base"]),
    ],
)  # fmt: skip
def test_limits_are_held(
    settings: dict[str, Any], figures: dict[str, Any], base: Any, failed: list[str]
) -> None:
    gates = decide(GateSettings(**settings), figures, base, None)
    assert [gate.name for gate in gates if not gate.passed] == failed


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "add `checker"),
        ({"checker": "json", "pass_at": {3: 0.1}}, "samples: 3"),
        ({"checker": "json", "pass_at": {1: 0.1}}, "rows with `tests`"),
        ({"checker": "json", "pass_rate": 0.5}, "there is no data/heldout_bench"),
    ],
)
def test_gates_that_lack_something_are_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    data = write(tmp_path / "rows.jsonl", {"prompt": "p", "response": "r"})
    with pytest.raises(ConfigError, match=f"(?i){said}"):
        prepare(GateSettings(**settings), [str(data)])


def test_rows_that_ask_nothing_are_named(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", {"prompt": "p", "response": "r"}, {"answer": "a"})
    with pytest.raises(DataError, match=r"rows.jsonl:2"):
        read_questions([str(data)], 10)
    assert len(read_questions([str(data)], 1)) == 1


def gates_file(tmp_path: Path, **gates: Any) -> Path:
    path = tmp_path / "gates.yaml"
    path.write_text(json.dumps(gates))
    return path


def test_a_failed_gate_is_written_and_fails_the_command_when_strict(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "out"
    file = gates_file(tmp_path, checker="json", max_new_tokens=4, coverage="none", answered_rows=3)
    asked = ["eval", "--model", str(tiny_model), "--data", str(write_rows(5)), "--gates", str(file),
             "--output-dir", str(output), "--device", "cpu"]  # fmt: skip
    assert cli.main(asked) == 0
    assert "FAILED  parse_rate" in capsys.readouterr().out
    results = json.loads((output / RESULTS).read_text())
    assert (results["passed"], results["figures"]["parse_rate"]) == (False, 0.0)
    assert results["figures"]["perplexity"] > 1
    assert json.loads((output / FAILED).read_text())["failed"][0]["name"] == "parse_rate"
    assert len((output / ANSWERS).read_text().splitlines()) == 3
    assert cli.main([*asked, "--strict"]) == 3
    monkeypatch.setenv("ENGINE_EVAL_STRICT", "1")
    assert cli.main(asked) == 3
    gates_file(tmp_path, checker="regex", pattern="", max_new_tokens=4, coverage="none",
               earlier=str(output / RESULTS))  # fmt: skip
    assert cli.main(asked) == 0
    assert not (output / FAILED).exists()
    names = {gate["name"] for gate in json.loads((output / RESULTS).read_text())["gates"]}
    assert names >= {"parse_rate", "parse_rate_loss_from_earlier", "perplexity_over_earlier"}


def test_an_adapter_is_compared_with_its_base(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    run, data = tmp_path / "run", write_rows(4)
    assert cli.main(["train", "--model", str(tiny_model), "--data", str(data), "--output-dir",
                     str(run), "--max-steps", "8", "--learning-rate", "0.01", "--device", "cpu",
                     "--method", "lora", "--no-plot"]) == 0  # fmt: skip
    file = gates_file(tmp_path, parse_rate="none", coverage="none", perplexity_over_base=0.9,
                      answered_rows=2, max_new_tokens=4)  # fmt: skip
    asked = ["eval", "--model", str(tiny_model), "--data", str(data), "--gates", str(file)]
    assert cli.main([*asked, "--adapter", str(run / "adapter"), "--device", "cpu"]) == 0
    results = json.loads((run / RESULTS).read_text())
    assert results["passed"]
    assert results["figures"]["perplexity"] < 0.9 * results["base"]["perplexity"]
    assert cli.main(asked) == 2  # without an adapter there is no base to compare with
    gates_file(tmp_path, parse_rate="none", coverage="none", perplexity_over_base=0.9,
               answered_rows=2, max_new_tokens=4, base=str(tiny_model))  # fmt: skip
    assert cli.main([*asked, "--output-dir", str(tmp_path / "same"), "--device", "cpu"]) == 0
    same = json.loads((tmp_path / "same" / RESULTS).read_text())
    assert same["figures"] == same["base"]
    assert not same["passed"]


def test_python_judges_as_the_command_does(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    gates = {"checker": "regex", "pattern": "^", "coverage": None, "max_new_tokens": 2}
    verdict = engine.judge(
        tiny_model, write_rows(2), gates=gates, output_dir=tmp_path, device="cpu"
    )
    assert verdict.passed
    assert [gate.name for gate in verdict.gates] == ["parse_rate"]
    example = read_gates(Path(__file__).parents[3] / "examples" / "gates" / "gates.yaml")
    assert (example.parse_rate, example.coverage, example.checker) == (0.7, 0.5, "python-ast")


def test_the_environment_asks_for_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_BENCHMARK", "1")
    assert read_gates(None).pass_rate == 0
    monkeypatch.setenv("ENGINE_BENCHMARK_MIN_PASS_RATE", "0.8")
    assert read_gates(None).pass_rate == 0.8
    monkeypatch.setenv("ENGINE_BENCHMARK_MIN_PASS_RATE", "80")
    with pytest.raises(ConfigError, match="no share"):
        read_gates(None)
    monkeypatch.setenv("ENGINE_BENCHMARK", "0")
    assert read_gates(None).pass_rate is None
