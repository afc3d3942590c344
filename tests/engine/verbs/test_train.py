"""Whole runs of a tiny model: files, resuming to the same bits, continual training, refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.verbs.training.train
from engine.config.train_config import TrainConfig
from engine.errors import CheckpointError, ConfigError, DataError, MemoryPlanError
from engine.model_sources.adapter.peft import load_adapter
from engine.model_sources.load_model import load_model
from engine.runs.metrics import read_metrics
from engine.runs.signals import Interrupted, StopSignals
from engine.training.prepare import prepare
from engine.training.step import TrainingStep
from engine.verbs.models.evaluate import evaluate
from engine.verbs.models.merge import merge
from engine.verbs.training.train import dry_run, train
from kernels.runtime.simulation import simulation

Rows = Callable[..., Path]


def config(model: Path, data: Path, output: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "model": str(model),
        "data": str(data),
        "output_dir": output,
        "max_steps": 6,
        "batch_size": 2,
        "max_length": 64,
        "learning_rate": 5e-3,
        "device": "cpu",
        "plot": False,
        "checkpoint_every": 2,
    }
    return TrainConfig(**(settings | changes))


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_leaves_every_file_it_promises(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = train(config(tiny_model, write_rows(9), run, heldout=0.2), console=False)
    assert result.status == "Success"
    assert result.adapter_path == run / "adapter"
    names = {path.name for path in run.iterdir()}
    assert {
        "pipeline.log",
        "metrics.jsonl",
        "config.yaml",
        "manifest.json",
        "summary.json",
        "adapter",
        "checkpoint-4",
        "checkpoint-6",
    } <= names
    assert "checkpoint-2" not in names
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "Success"
    assert summary["output_path"] == str(run / "adapter")
    assert summary["metrics"]["heldout_perplexity"] > 1
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["seed"] == 42
    assert len(manifest["base_digest"]) == 64


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_eight_rows_are_learnt_by_heart(
    method: str, tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    changes = {"max_steps": 250, "batch_size": 8, "checkpoint_every": 0}
    rate = 3e-3 if method == "full" else 1e-2
    settings = config(
        tiny_model, write_rows(8), tmp_path / "run", method=method, learning_rate=rate, **changes
    )
    train(settings, console=False)
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses[0] > 1.0
    assert losses[-1] < 0.05


def test_the_saved_adapter_is_the_trained_one(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    """Reloaded beside the base, and merged into it, it gives the run's own held-out loss."""
    data = write_rows(8)
    settings = config(tiny_model, data, tmp_path / "run", eval_data=str(data), method="lora")
    result = train(settings, console=False)
    apart = evaluate(tiny_model, data, adapter=tmp_path / "run" / "adapter", device="cpu")
    assert apart.loss == pytest.approx(result.metrics["heldout_loss"], abs=1e-6)
    assert result.metrics["heldout_perplexity"] < result.metrics["heldout_perplexity_before"]
    merge(tiny_model, tmp_path / "run" / "adapter", tmp_path / "merged")
    assert evaluate(tmp_path / "merged", data, device="cpu").loss == pytest.approx(
        apart.loss, abs=1e-5
    )


def test_full_fine_tuning_saves_a_model_that_loads(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    data = write_rows(8)
    settings = config(tiny_model, data, tmp_path / "run", method="full", eval_data=str(data))
    result = train(settings, console=False)
    assert result.adapter_path is None
    assert result.output_path is not None
    saved = evaluate(result.output_path, data, device="cpu")
    assert saved.loss == pytest.approx(result.metrics["heldout_loss"], abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.3, "accumulate": 2},
        {"packing": True, "max_length": 80, "batch_size": 1},
        {"method": "full", "learning_rate": 1e-3},
        {"method": "lora", "optimizer": "adamw", "lr_schedule": "linear", "warmup_steps": 2},
        {"use_dora": True, "lora_dropout": 0.1},
    ],
)
@pytest.mark.parametrize("stops", [[3], [1, 2, 5]])
def test_a_run_that_stops_and_goes_on_ends_with_the_same_bytes(
    stops: list[int],
    changes: dict[str, Any],
    tiny_model: Path,
    write_rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = write_rows(9)
    train(config(tiny_model, data, tmp_path / "whole", **changes), console=False)
    real = StopSignals
    pending = iter(stops)
    for number in range(len(stops) + 1):
        stop = next(pending, None)

        class Stops(real):  # type: ignore[valid-type,misc]
            """Asks for a stop once the run has reached `at` steps."""

            at = stop
            steps = 0

            @property
            def requested(self) -> int | None:
                done = read_metrics(tmp_path / "parts" / "metrics.jsonl")
                return 15 if self.at is not None and done and done[-1]["step"] >= self.at else None

        monkeypatch.setattr(engine.verbs.training.train, "StopSignals", Stops)
        resume = {} if number == 0 else {"resume": "auto"}
        settings = config(tiny_model, data, tmp_path / "parts", **changes, **resume)
        if stop is None:
            train(settings, console=False)
        else:
            with pytest.raises(Interrupted):
                train(settings, console=False)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = (
        "model/model.safetensors"
        if changes.get("method") == "full"
        else ("adapter/adapter_model.safetensors")
    )
    assert (parts / result).read_bytes() == (whole / result).read_bytes()
    keys = ("step", "epoch", "loss", "lr", "grad_norm", "trained_tokens")
    assert [[line[key] for key in keys] for line in read_metrics(parts / "metrics.jsonl")] == [
        [line[key] for key in keys] for line in read_metrics(whole / "metrics.jsonl")
    ]


def test_training_goes_on_from_an_earlier_adapter(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    data = write_rows(8)
    train(config(tiny_model, data, tmp_path / "one"), console=False)
    first = tmp_path / "one" / "adapter"
    train(config(tiny_model, data, tmp_path / "two", init_adapter=first), console=False)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert lines[1][0]["loss"] < lines[0][0]["loss"]
    before, after = load_adapter(first).pairs, load_adapter(tmp_path / "two" / "adapter").pairs
    for path, pair in before.items():
        for old, new in zip(pair, after[path], strict=True):
            assert not torch.equal(old, new), path


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"lora_rank": 8}, "rank is 16"),
        ({"target_modules": "qv"}, "target-modules"),
        ({"lora_alpha": 8.0}, "alpha is 32"),
    ],
)
def test_an_adapter_of_other_settings_is_refused_by_name(
    changes: dict[str, Any], word: str, tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    data = write_rows(4)
    train(config(tiny_model, data, tmp_path / "one", max_steps=1), console=False)
    settings = config(
        tiny_model, data, tmp_path / "two", init_adapter=tmp_path / "one" / "adapter", **changes
    )
    with pytest.raises(CheckpointError, match=word):
        train(settings, console=False)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["status"] == "Failure"
    assert word in summary["error_message"]


def test_an_adapter_of_another_base_is_refused(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    data = write_rows(4)
    train(config(tiny_model, data, tmp_path / "one", max_steps=1), console=False)
    weights = tiny_model / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-2] ^= 1
    weights.write_bytes(changed)
    settings = config(tiny_model, data, tmp_path / "two", init_adapter=tmp_path / "one" / "adapter")
    with pytest.raises(CheckpointError, match="another base"):
        train(settings, console=False)


def test_a_checkpoint_of_other_settings_is_refused(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    data = write_rows(4)
    train(config(tiny_model, data, tmp_path / "run", max_steps=2), console=False)
    with pytest.raises(CheckpointError, match="learning_rate was"):
        train(
            config(
                tiny_model, data, tmp_path / "run", max_steps=2, learning_rate=1e-3, resume="auto"
            ),
            console=False,
        )


def test_an_epoch_with_accumulation_reads_every_row_once(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    settings = config(
        tiny_model, write_rows(11), tmp_path / "run", accumulate=2, max_steps=None, epochs=2
    )
    prepared = prepare(settings)
    assert prepared.steps_per_epoch == 3
    assert prepared.total_steps == 6
    for epoch in range(2):
        steps = range(3 * epoch, 3 * epoch + 3)
        tokens = sum(b.input_ids.numel() for step in steps for b in prepared.batches(step)[0])
        assert tokens == sum(len(example) for example in prepared.examples)
    assert prepared.batches(5)[1] == 2.0


def test_dry_run_shows_settings_and_rows_and_writes_nothing(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    text = dry_run(config(tiny_model, write_rows(4), tmp_path / "run", system_prompt="Be brief."))
    assert "lora_rank: 16" in text
    assert "Be brief." in text
    assert "> 'abc0.<|im_end|>'" in text
    assert not (tmp_path / "run").exists()


def test_a_missing_data_file_is_an_error_of_one_paragraph(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        train(config(tiny_model, tmp_path / "nothing.jsonl", tmp_path / "run"), console=False)


def test_unknown_target_modules_are_refused_by_name(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="w_proj"):
        train(
            config(tiny_model, write_rows(4), tmp_path / "run", target_modules="w_proj"),
            console=False,
        )


def test_packing_trains_every_token_of_an_epoch(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    settings = config(
        tiny_model, write_rows(10), tmp_path / "run", packing=True, max_steps=None, max_length=100
    )
    prepared = prepare(settings)
    trained = sum(
        batch.trained_tokens
        for step in range(prepared.total_steps)
        for batch in prepared.batches(step)[0]
    )
    assert trained == sum(example.trained_tokens for example in prepared.examples)
    for step in range(prepared.total_steps):
        for batch in prepared.batches(step)[0]:
            assert batch.input_ids.numel() <= 2 * 100


def test_int8_and_nf4_stay_close_to_the_full_model(tiny_model: Path) -> None:
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        whole = load_model(tiny_model)(ids).log_softmax(-1)
        int8 = load_model(tiny_model, quantize="int8")(ids).log_softmax(-1)
        nf4 = load_model(tiny_model, quantize="nf4")(ids).log_softmax(-1)
    assert 0 < float((int8 - whole).abs().mean()) < 0.2
    assert float((int8 - whole).abs().mean()) < float((nf4 - whole).abs().mean()) < 2.4


def test_a_run_that_has_ended_can_be_resumed_without_harm(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    for method, result in (
        ("full", "model/model.safetensors"),
        ("lora", "adapter/adapter_model.safetensors"),
    ):
        settings = config(tiny_model, write_rows(4), tmp_path / method, method=method, max_steps=2)
        train(settings, console=False)
        before = (tmp_path / method / result).read_bytes()
        train(settings.model_copy(update={"resume": "auto"}), console=False)
        assert (tmp_path / method / result).read_bytes() == before


def test_dense_weights_of_one_input_are_one_matrix_product(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    attention = model.layers[0].self_attn
    assert attention is not None
    weights = [p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert all(isinstance(weight, torch.nn.Parameter) for weight in weights)
    starts = [w.data_ptr() for w in weights if isinstance(w, torch.Tensor)]
    sizes = [w.nbytes for w in weights if isinstance(w, torch.Tensor)]
    assert starts == [starts[0], starts[0] + sizes[0], starts[0] + sizes[0] + sizes[1]]


def test_a_device_that_runs_out_of_memory_is_explained_and_noted(
    tiny_model: Path, write_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TrainingStep.__call__

    def fills(step: TrainingStep, *arguments: Any, **options: Any) -> Any:
        if simulation() is not None:
            return real(step, *arguments, **options)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has")

    monkeypatch.setattr(TrainingStep, "__call__", fills)
    with pytest.raises(MemoryPlanError, match=r"Planned were .*Settings that are planned with"):
        train(config(tiny_model, write_rows(4), tmp_path / "run"), console=False)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "Failure"
    assert "Tried to allocate 9.00 GiB" in summary["error_message"]


def test_bad_rows_stop_a_run_or_are_left_out_and_counted(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    data = write_rows(6)
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:3], '{"prompt": "no answer"}', *lines[3:]]) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:4"):
        train(config(tiny_model, data, tmp_path / "strict"), console=False)
    with pytest.raises(DataError, match="more than the 5 %"):
        train(config(tiny_model, data, tmp_path / "few", bad_lines="skip:5%"), console=False)
    train(config(tiny_model, data, tmp_path / "lenient", bad_lines="skip"), console=False)
    metrics = json.loads((tmp_path / "lenient" / "summary.json").read_text())["metrics"]
    assert metrics["rows_read"] == 7
    assert metrics["rows_skipped"] == 1
    assert metrics["rows_trained"] == 6
