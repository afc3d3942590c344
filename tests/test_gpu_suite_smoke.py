"""The GPU suite on tiny sizes: every section runs, and a failure is recorded and seen."""

import json
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bench.gpu import step_torchtune, step_unsloth, suite_sections, train_steps
from bench.gpu.step import RANK, StepSpec
from bench.gpu.suite import main
from engine.benchmark.cases import elementwise
from engine.benchmark.cases.random_weights import random_decoder
from engine.benchmark.cases.shapes import configuration
from engine.selfcheck import accuracy
from engine.selfcheck.isolation import run_apart, run_here
from kernels.elementwise.swiglu import swiglu_forward

OTHERS = ["unsloth", "torchtune"]
SECTIONS = ["accuracy", "roofline", "steps", "train", "graphs", "profile", *OTHERS, "ops"]

SMOKE = ("--smoke", "--minutes", "60")
"""The time of a busy machine is not what is tested here."""

MODULE = """
import os, time

class Section:
    def run(self, item, options):
        if item == "raises":
            raise ValueError("no such thing")
        if item == "dies":
            os._exit(7)
        if item == "breaks":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if item == "hangs":
            time.sleep(60)
        return {"item": item, "process": os.getpid(), "given": options["given"]}

SECTIONS = {"only": Section()}
"""


def test_smoke_run_measures_every_section(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main([*SMOKE, "--output", str(tmp_path), "--sections", *SECTIONS])
    capsys.readouterr()
    results = json.loads((tmp_path / "gpu_suite.json").read_text())
    errors = [o for name in SECTIONS for o in results["sections"][name] if o["error"]]
    assert errors == []
    assert status == 0
    ops = {o["data"]["op"] for o in results["sections"]["ops"]}
    assert {"nf4_linear", "adamw8bit", "decoder_layer", "attention_grad"} <= ops
    step = results["sections"]["steps"][0]["data"]
    assert step["tokens_per_second"] > 0
    assert step["utilisation"] > 0
    assert results["sections"]["graphs"][0]["data"]["losses_apart"] <= 1e-5
    runs = {o["item"]: o["data"] for o in results["sections"]["train"]}
    assert len(runs) == len(train_steps.RUNS)
    assert all(run["planned_bytes"] > 0 and run["last_loss"] > 0 for run in runs.values())
    for name in OTHERS:
        if find_spec(name) is None:
            (outcome,) = results["sections"][name]
            reason = outcome["data"]["skipped"]
            assert reason.startswith(f"llama-3.1-8b 2x8 full: not installed: {name}")
            assert f"skipped, {reason}" in (tmp_path / "gpu_suite.md").read_text()
    assert "planned GiB" in (tmp_path / "gpu_suite.md").read_text()
    assert "within the rule" in (tmp_path / "gpu_suite.md").read_text()


def test_a_wrong_kernel_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        elementwise, "swiglu_forward", lambda gate, up: swiglu_forward(gate, up) * (1 + 1e-3)
    )
    assert main([*SMOKE, "--output", str(tmp_path), "--sections", "accuracy"]) == 1
    capsys.readouterr()
    results = json.loads((tmp_path / "gpu_suite.json").read_text())
    wrong = {o["data"]["op"] for o in results["sections"]["accuracy"] if not o["data"]["passed"]}
    assert wrong == {"swiglu", "swiglu_grad"}


def test_nan_never_passes_the_rule() -> None:
    truth = torch.ones(3)
    bad = torch.tensor([1.0, float("nan"), 1.0])
    assert accuracy.compare(truth, truth, truth, exact=False)["passed"]
    assert not accuracy.compare(bad, truth, truth, exact=False)["passed"]


def test_the_ulp_is_that_of_the_dtype_at_the_value() -> None:
    assert accuracy.ulp(torch.float32, 1.0) == 2.0**-23
    assert accuracy.ulp(torch.bfloat16, 3.0) == 2.0**-6
    assert accuracy.ulp(torch.float16, 0.75) == 2.0**-11


def test_no_gpu_and_no_smoke_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        assert suite_sections.SECTIONS
        return
    assert main([]) == 2
    assert "--smoke" in capsys.readouterr().err


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "isolated_module.py").write_text(MODULE)
    root = Path(__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", f"{root}:{tmp_path}")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "isolated_module"


def test_an_item_that_dies_hangs_or_breaks_the_context_stops_no_other(module: str) -> None:
    items = ["a", "raises", "b", "dies", "c", "breaks", "d", "hangs", "e"]
    deadline = time.monotonic() + 100
    # The first item of a process may also take the time that the process needs to start.
    outcomes = {
        o.item: o
        for o in run_apart(module, "only", items, {"given": 3}, deadline, item_seconds=4.0)
    }
    assert list(outcomes) == items
    good = {item: outcomes[item].data for item in "abcde"}
    assert all(data is not None and data["given"] == 3 for data in good.values())
    processes = [data["process"] for data in good.values() if data is not None]
    assert processes[0] == processes[1]
    assert len(set(processes)) == 4
    assert "no such thing" in str(outcomes["raises"].error)
    assert "status 7" in str(outcomes["dies"].error)
    assert "illegal memory access" in str(outcomes["breaks"].error)
    assert "no result within" in str(outcomes["hangs"].error)


def test_items_beyond_the_time_are_recorded_as_not_run(module: str) -> None:
    for outcomes in (
        run_here(module, "only", ["a"], {"given": 1}, deadline=0.0),
        run_apart(module, "only", ["a"], {"given": 1}, deadline=0.0, item_seconds=1.0),
    ):
        assert [outcome.data for outcome in outcomes] == [None]
        assert "not run" in str(outcomes[0].error)


def test_correctness_comes_first_and_every_item_has_a_limit() -> None:
    names = list(suite_sections.SECTIONS)
    assert names[0] == "accuracy"
    assert names.index("train") < names.index("ops")
    assert all(0 < section.seconds <= 90 for section in suite_sections.SECTIONS.values())


def options(**changes: object) -> dict[str, object]:
    given = {"smoke": True, "device": "cpu", "seconds": 0.001, "roofline": None, "peers": False}
    return given | changes


def test_another_program_that_fails_gives_a_row_with_its_reason() -> None:
    def measure_step(*args: object, **options: object) -> None:
        raise NotImplementedError("no accelerator\n was seen")

    side = ModuleType("side")
    side.PACKAGES, side.measure_step = ("torch",), measure_step  # type: ignore[attr-defined]
    row = suite_sections.run_peer(side, "llama-3.1-8b 2x8 full", options())
    assert row == {
        "skipped": "llama-3.1-8b 2x8 full: torch failed: NotImplementedError: no accelerator was "
        "seen"
    }


def test_torchtune_is_asked_for_the_shape_that_ours_is_measured_at() -> None:
    config = configuration("llama-3.1-8b", small=False)
    given = step_torchtune.model_arguments(config, 2048)
    ours = random_decoder(config.with_layers(1), torch.device("meta"), torch.bfloat16, rank=RANK)
    adapted = {name.split(".")[-2] for name, p in ours.named_parameters() if p.requires_grad}
    renamed = {"output_proj": "o_proj"}
    attention = {renamed.get(name, name) for name in given["lora_attn_modules"]}
    assert attention | {"gate_proj", "up_proj", "down_proj"} == adapted
    assert given["apply_lora_to_mlp"] and given["quantize_base"]
    assert given["embed_dim"] // given["num_heads"] == config.head_dim
    assert (given["embed_dim"], given["intermediate_dim"], given["num_layers"]) == (4096, 14336, 32)
    assert (given["num_kv_heads"], given["vocab_size"], given["max_seq_len"]) == (8, 128256, 2048)
    assert (given["lora_rank"], given["rope_base"]) == (RANK, 500000)
    with pytest.raises(ValueError, match="qwen3"):
        step_torchtune.model_arguments(configuration("qwen3-8b", small=False), 2048)
    for policy, checkpointing in (("full", "unsloth"), ("none", False)):
        spec = StepSpec("llama-3.1-8b", 4, 4096, policy)
        asked = step_unsloth.adapter_arguments(spec)
        assert set(asked["target_modules"]) == adapted
        assert asked["use_gradient_checkpointing"] == checkpointing
        assert (asked["r"], asked["lora_alpha"]) == (given["lora_rank"], given["lora_alpha"])


def test_the_runs_cover_what_training_offers() -> None:
    settings = {key for spec in train_steps.RUNS.values() for key in spec.changes}
    assert {
        "lora_rank", "lora_dropout", "use_dora", "head_precision", "offload", "method",
        "deterministic",
    } <= settings  # fmt: skip
    assert {spec.changes.get("lora_rank") for spec in train_steps.RUNS.values()} >= {8, 64}
    shapes = [train_steps.shape_of(spec, small=True) for spec in train_steps.RUNS.values()]
    assert any(shape.attention_bias for shape in shapes)
    assert any(shape.num_experts for shape in shapes)
    assert any("linear_attention" in shape.layer_types for shape in shapes)
    ragged = train_steps.RUNS["8B, packed ragged lengths"].lengths
    assert sum(ragged) == 4 * 4096
    assert len(set(ragged)) == len(ragged)
