"""The checks of `engine doctor` in Triton's interpreter: they pass, and name a planted fault."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.main import get_command

import kernels
from cli.tools.doctor import app
from engine.errors import ConfigError
from engine.selfcheck.attention import backend_check
from engine.selfcheck.checks import CHECKS
from engine.selfcheck.kernels import judge, settled
from engine.selfcheck.options import CheckOptions
from engine.selfcheck.report import CheckResult, failures, run_checks
from engine.selfcheck.steps import run_config
from kernels.attention import backends, table
from kernels.moe import grouped_library

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter needs no GPU")
ROOT = Path(kernels.__path__[0]).parent


def planted(folder: Path, old: str, new: str) -> dict[str, str]:
    """The environment of processes whose SwiGLU kernel has a fault."""
    shutil.copytree(ROOT / "kernels", folder / "kernels")
    source = folder / "kernels" / "elementwise" / "swiglu.py"
    text = source.read_text()
    assert old in text
    source.write_text(text.replace(old, new))
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTHONSAFEPATH": "1"}


def checked(names: list[str], environment: dict[str, str] | None = None) -> dict[str, CheckResult]:
    results = run_checks(names, "cpu", interpret=True, seconds=300.0, environment=environment)
    return {result.name: result for result in results}


def test_a_wrong_kernel_is_named_with_the_way_around_it(tmp_path: Path) -> None:
    source = (ROOT / "kernels" / "elementwise" / "swiglu.py").read_text()
    sigmoid = re.search(r"1\.0 / \(1\.0 \+ tl\.exp\(-\w+\)\)|tl\.sigmoid\((\w+)\)", source)
    assert sigmoid is not None
    environment = planted(tmp_path, sigmoid[0], f"(1.01 * ({sigmoid[0]}))")
    results = checked(["swiglu", "rope"], environment)
    assert [result.name for result in failures(list(results.values()))] == ["swiglu"]
    assert results["rope"].status == "ok"
    assert "ENGINE_REFERENCE=swiglu" in results["swiglu"].remedy
    assert "is off by" in results["swiglu"].detail
    # The way around is real: with it the same fault is not met.
    again = checked(["swiglu"], environment | {"ENGINE_REFERENCE": "swiglu"})
    assert again["swiglu"].status == "ok"


def test_a_check_that_aborts_stops_no_other(tmp_path: Path) -> None:
    old = "def swiglu_forward("
    abort = f"import os\n\nos.abort()\n\n\n{old}"
    environment = planted(tmp_path, old, abort)
    # All of them import the module; each ends its own process.
    results = checked(["swiglu", "dropout"], environment)
    assert results["swiglu"].status == "FAIL"
    assert "SIGABRT" in results["swiglu"].detail
    assert set(results) == {"swiglu", "dropout"}


def doctor(*words: str) -> Any:
    return get_command(app).main(args=list(words), prog_name="doctor", standalone_mode=False)


def test_the_command_prints_a_table_or_json_and_says_what_was_not_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--interpret", "--only", "rms norm", "--only", "streams"]
    assert doctor(*words) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^ok +rms norm", shown, re.MULTILINE)
    assert re.search(r"^---- +streams .*needs a CUDA GPU", shown, re.MULTILINE)
    assert "1 passed, 0 failed, 1 not run" in shown
    assert doctor(*words, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["passed"] is True
    by_name = {check["name"]: check for check in answer["checks"]}
    assert by_name["streams"]["status"] == "not run"
    (case,) = [
        v for k, v in by_name["rms norm"]["figures"].items() if k.startswith("rms_norm_grad")
    ]
    assert case["outputs"]["dx"]["passed"] is True


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu"], "engine doctor --interpret"),
        (["--gpu", "--interpret"], "one of them"),
        (["--interpret", "--only", "rmsnorm"], "rms norm"),
    ],
)
def test_what_cannot_be_checked_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        doctor(*words)


def test_every_check_passes_in_the_interpreter_or_says_why_it_is_not_run() -> None:
    results = checked(list(CHECKS))
    assert set(results) == set(CHECKS)
    assert [f"{r.name}: {r.detail}" for r in failures(list(results.values()))] == []
    unchecked = {name for name, result in results.items() if result.status == "not run"}
    assert unchecked == {name for name, check in CHECKS.items() if check.needs}
    assert {f"rank {rank}" for rank in (4, 8, 16, 64)} <= set(results) - unchecked


def test_a_way_around_names_what_exists() -> None:
    from engine.config.train_config import TrainConfig

    flags = {f"--{name.replace('_', '-')}" for name in TrainConfig.model_fields}
    folders = {path.stem for path in (ROOT / "kernels").rglob("*")}
    for name, check in CHECKS.items():
        for flag in re.findall(r"--[a-z-]+", check.remedy):
            assert flag in flags, (name, flag)
        for names in re.findall(r"ENGINE_REFERENCE=([\w,]+)", check.remedy):
            assert names == "1" or set(names.split(",")) <= folders, name
        for backend in re.findall(r"ENGINE_ATTENTION=(\w+)", check.remedy):
            assert backend in table.BACKENDS, name
        assert check.remedy


def test_every_attention_back_end_has_a_check_and_a_wrong_one_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert {f"attention {name}" for name in table.BACKENDS} <= set(CHECKS)
    options = CheckOptions(torch.device("cpu"), (torch.float32,), interpret=True)
    assert backend_check("documents")(options)["passed"] is True
    right = table.BACKENDS["documents"]

    def leaks(q: Any, k: Any, v: Any, settings: Any) -> Any:
        o, saved = right.forward(q, k, v, settings)
        return o + 0.1 * v.abs().mean(), saved

    wrong = backends.Backend("documents", leaks, right.backward, right.suits)
    monkeypatch.setitem(table.BACKENDS, "documents", wrong)
    finding = backend_check("documents")(options)
    assert finding["passed"] is False
    assert "o is off" in finding["detail"]


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no _grouped_mm")
def test_a_grouped_product_that_is_absent_or_wrong_fails_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check = CHECKS["grouped product"]
    options = CheckOptions(torch.device("cpu"), (torch.float32,), interpret=True)
    finding = check.run(options)
    assert finding["passed"] is True
    assert "torch's function for CPUs stands in" in finding["detail"]
    right = torch._grouped_mm

    def off(x: Tensor, dense: Tensor, offs: Tensor) -> Tensor:
        made = right(x, dense, offs=offs)
        return made + (made.shape[0] == 138) * 2.0  # right in its trial, and wrong in what follows

    for function, said in (
        (None, "torch._grouped_mm: this torch does not have it"),
        (lambda x, dense, offs: x @ dense[0], "torch._grouped_mm: its product is wrong by"),
        (off, "W x: out is off by"),
    ):
        grouped_library.solves.cache_clear()
        monkeypatch.setattr(grouped_library, "_grouped_mm", function)
        finding = check.run(options)
        assert finding["passed"] is False
        assert finding["detail"].startswith(said)
    grouped_library.solves.cache_clear()


def test_the_steps_that_are_checked_have_the_settings_of_train() -> None:
    config = run_config()
    assert (config.method, config.lora_rank, config.optimizer) == ("qlora", 16, "adamw8bit")


def test_a_case_without_outputs_can_fail_too() -> None:
    assert judge({"optimizer": {"passed": False, "codes_apart": 0.5}})["passed"] is False


def test_bad_luck_is_drawn_again_and_a_fault_is_not() -> None:
    def drawn(*errors: float) -> tuple[bool, int]:
        left, calls = list(errors), []

        def check() -> dict[str, Any]:
            calls.append(1)
            error = left.pop(0)
            entry = {"ours": error, "plain": 1.0, "ulp": 0.1, "passed": error <= 2.1}
            return {"outputs": {"y": entry}, "passed": entry["passed"]}

        return settled(check)["passed"], len(calls)

    assert drawn(1.0) == (True, 1)
    assert drawn(2.2, 1.0) == (True, 2)
    assert drawn(2.2, 2.3, 2.2) == (False, 3)
    assert drawn(9.0) == (False, 1)
    assert drawn(float("nan")) == (False, 1)
