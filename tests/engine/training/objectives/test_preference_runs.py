"""Whole runs that learn from preferences."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.main import main
from engine.config.sources import load_config
from engine.errors import CheckpointError, ConfigError, DataError
from engine.model_sources.load_model import load_model
from engine.runs.metrics import read_metrics
from engine.training.objectives.choose import make_objective
from engine.training.prepare import prepare
from engine.verbs.training.train import dry_run, train
from models.adapters import adapter_tensors, add_lora
from models.layers.context import DEFAULT_SETTINGS
from tests.support.small_runs import adapter_bytes, preference_run, write_judged, write_pairs
from tests.support.tiny_model import write_tiny_model, write_tokenizer


def lines_of(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl")


@pytest.mark.parametrize("objective", ["dpo", "ipo", "kto", "orpo", "simpo", "cpo"])
def test_every_objective_learns_to_prefer_the_chosen_answers(
    objective: str, tiny_model: Path, tmp_path: Path
) -> None:
    run, data = tmp_path / "run", write_pairs(tmp_path / "pairs.jsonl")
    changes: dict[str, Any] = {"objective": objective, "max_steps": 8, "learning_rate": 1e-2}
    train(preference_run(tiny_model, data, run, **changes), console=False)
    first, *_, last = lines_of(run)
    assert last["loss"] < first["loss"]
    assert last["rewards/margins"] > max(first["rewards/margins"], 0.0)
    if objective in ("dpo", "ipo"):  # nothing is preferred yet, and nothing is rewarded
        assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
        assert first["kl"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo"])
def test_accumulated_batches_are_one_batch(
    objective: str, tiny_model: Path, tmp_path: Path
) -> None:
    write = write_judged if objective == "kto" else write_pairs
    data, lines = write(tmp_path / "rows.jsonl", 6), []
    shapes: dict[str, dict[str, Any]] = {
        "one": {"batch_size": 6},
        "many": {"batch_size": 2, "accumulate": 3},
    }
    for name, changes in shapes.items():
        changes |= {"objective": objective, "max_steps": 2, "optimizer": "adamw"}
        train(preference_run(tiny_model, data, tmp_path / name, **changes), console=False)
        lines.append(lines_of(tmp_path / name))
    for one, many in zip(*lines, strict=True):
        names = [key for key in one if "/" in key or key in ("loss", "grad_norm", "kl")]
        want = pytest.approx([many[name] for name in names], rel=2e-4, abs=1e-5)
        assert [one[name] for name in names] == want


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_goes_on_to_the_same_bits(
    method: str, tiny_model: Path, tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    changes = {"method": method, "lora_dropout": 0.1 if method == "lora" else 0.0}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    plain = {"lr_schedule": "constant", "warmup_steps": 0, **changes}
    train(preference_run(tiny_model, data, whole, **plain), console=False)
    train(preference_run(tiny_model, data, halves, **plain, max_steps=2), console=False)
    train(preference_run(tiny_model, data, halves, **plain, resume="auto"), console=False)
    if method == "lora":
        assert adapter_bytes(whole) == adapter_bytes(halves)
    else:
        name = "model/model.safetensors"
        assert (whole / name).read_bytes() == (halves / name).read_bytes()


def test_the_reference_is_measured_once_and_stored(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, cache = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "cache"
    runs = []
    for name in ("first", "second"):
        config = preference_run(tiny_model, data, tmp_path / name, reference_cache=str(cache))
        caplog.clear()
        with caplog.at_level("INFO"):
            train(config, console=False)
        runs.append(("reads 5 rows" in caplog.text, adapter_bytes(tmp_path / name)))
    assert [read for read, _ in runs] == [True, False]
    assert runs[0][1] == runs[1][1]
    (stored,) = cache.iterdir()
    stored.write_bytes(stored.read_bytes()[:-9] + b"\0" * 9)
    train(preference_run(tiny_model, data, tmp_path / "third", reference_cache=str(cache)))
    assert adapter_bytes(tmp_path / "third") == runs[0][1]


def test_an_earlier_adapter_is_its_own_reference(tiny_model: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    train(preference_run(tiny_model, data, tmp_path / "first"), console=False)
    again = {"init_adapter": tmp_path / "first" / "adapter", "max_steps": 1}
    train(preference_run(tiny_model, data, tmp_path / "own", **again), console=False)
    train(
        preference_run(tiny_model, data, tmp_path / "base", **again, reference="base"),
        console=False,
    )
    train(
        preference_run(tiny_model, data, tmp_path / "named", **again, reference=str(tiny_model)),
        console=False,
    )
    own, base, named = (lines_of(tmp_path / name)[0] for name in ("own", "base", "named"))
    assert own["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert base["rewards/margins"] > 0.1
    assert named["rewards/margins"] == pytest.approx(base["rewards/margins"], rel=1e-4)


def test_rows_that_do_not_fit_the_objective_are_named(tiny_model: Path, tmp_path: Path) -> None:
    pairs, judged = write_pairs(tmp_path / "p.jsonl"), write_judged(tmp_path / "j.jsonl")
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "a", "response": "b"}\n')
    for data, objective, words in (
        (judged, "dpo", r"j\.jsonl:1: this row has one answer .* --objective dpo"),
        (plain, "kto", r"plain\.jsonl:1: .* does not say whether its answer is a good one"),
        (pairs, "sft", r"p\.jsonl:1: .* --objective dpo"),
    ):
        with pytest.raises(DataError, match=words):
            train(
                preference_run(tiny_model, data, tmp_path / "run", objective=objective),
                console=False,
            )


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_heldout_preferences_are_evaluated_and_the_best_checkpoint_goes_by_them(
    objective: str, tiny_model: Path, tmp_path: Path
) -> None:
    data, other = write_pairs(tmp_path / "pairs.jsonl"), write_pairs(tmp_path / "other.jsonl", 3)
    run = tmp_path / "run"
    result = train(
        preference_run(
            tiny_model,
            data,
            run,
            objective=objective,
            eval_data=str(other),
            eval_every=2,
            save_best="rewards/margins",
        ),
        console=False,
    )
    evaluated = [line for line in lines_of(run) if "eval_loss" in line]
    assert len(evaluated) == 2
    assert evaluated[-1]["eval_rewards/margins"] > 0
    assert 0 <= evaluated[-1]["eval_rewards/accuracies"] <= 1
    assert result.metrics["heldout_rewards_before/margins"] == pytest.approx(0.0, abs=1e-4)
    assert result.metrics["heldout_rewards/margins"] == evaluated[-1]["eval_rewards/margins"]
    assert result.metrics["best_value"] == max(e["eval_rewards/margins"] for e in evaluated)


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_shared_prompts_give_the_same_gradients_of_fewer_tokens(
    objective: str, tiny_model: Path, tmp_path: Path
) -> None:
    """With a policy that prefers something already, in every layer and parameter."""
    data = write_pairs(tmp_path / "pairs.jsonl")
    gradients, tokens = [], []
    for share in (False, True):
        config = preference_run(
            tiny_model, data, tmp_path / "run", objective=objective, share_prompt=share
        )
        prepared = prepare(config)
        model = load_model(tiny_model)
        add_lora(model, rank=4, alpha=8)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for pair in adapter_tensors(model).values():
                for part in pair:
                    part.copy_(torch.randn(part.shape, generator=generator) * 0.2)
        answers = prepared.answers
        reference = torch.zeros(5, 2) if objective == "dpo" else None
        chosen = make_objective(config, answers, reference)
        batch = answers.batch(range(5))
        totals = chosen.totals(model, [batch], DEFAULT_SETTINGS)
        chosen.share(model, batch, DEFAULT_SETTINGS, totals).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        tokens.append(batch.tokens)
        assert sum(prepared.lengths) == batch.tokens
    prompts = sum(example.prompt for example in answers.examples)  # type: ignore[attr-defined]
    assert tokens[0] - tokens[1] == prompts > 100
    apart, once = gradients
    assert apart.keys() == once.keys()
    largest = max(float(g.abs().max()) for g in apart.values())
    for name, grad in once.items():
        assert float((grad - apart[name]).abs().max()) <= 1e-6 * max(1.0, largest), name


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"method": "qlora", "share_prompt": True}),
        ("llama", {"use_dora": True, "target_modules": "attn"}),
        ("qwen3_moe", {"method": "qlora", "share_prompt": True}),
        ("qwen3_next", {"objective": "kto"}),
    ],
)
def test_families_and_methods_learn_preferences(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model, run = write_tiny_model(tmp_path / "model", family), tmp_path / "run"
    write_tokenizer(model, f"{string.ascii_lowercase}{string.digits}W \n.?")
    data = write_pairs(tmp_path / "pairs.jsonl")
    train(
        preference_run(model, data, run, max_steps=6, learning_rate=2e-2, **changes), console=False
    )
    first, *_, last = lines_of(run)
    assert last["loss"] < first["loss"]
    assert last["rewards/margins"] > first["rewards/margins"]


def test_a_state_cannot_fork_for_two_answers(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "qwen3_next")
    write_tokenizer(model, string.ascii_lowercase)
    data = write_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(ConfigError, match="Gated DeltaNet"):
        train(preference_run(model, data, tmp_path / "run", share_prompt=True), console=False)


def test_a_reference_of_another_vocabulary_is_refused_before_weights_are_read(
    tiny_model: Path, tmp_path: Path
) -> None:
    other = write_tiny_model(tmp_path / "other", "qwen3_moe")
    data = write_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(CheckpointError, match=r"The reference .* vocabulary of 64, the model one"):
        dry_run(preference_run(tiny_model, data, tmp_path / "run", reference=str(other)))


def test_other_verbs_know_pairs(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, file = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "run.yaml"
    assert main(["data", "preview", "--model", str(tiny_model), "--data", str(data)]) == 0
    shown = capsys.readouterr().out
    assert "yes it is." in shown
    assert "no." in shown
    words = ["--model", str(tiny_model), "--data", str(data), "--memory", "8GiB"]
    assert main(["init", *words, "--output", str(file)]) == 0
    assert load_config(file).objective == "dpo"
    plan = ["--model", str(tiny_model), "--data", str(data), "--objective", "dpo", "--share-prompt"]
    capsys.readouterr()
    assert main(["plan", *plan, "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["share_prompt"] is True


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_parts_of_heldout_preferences_have_losses_and_accuracies_of_their_own(
    objective: str, tiny_model: Path, tmp_path: Path
) -> None:
    """A part's figures are those of a run that holds out that part alone."""
    write = write_judged if objective == "kto" else write_pairs
    data = write(tmp_path / "data.jsonl")
    parts = [write(tmp_path / f"{name}.jsonl", count) for name, count in (("a", 4), ("b", 3))]
    given = {"objective": objective, "max_steps": 2, "eval_every": 2}
    both = train(
        preference_run(
            tiny_model, data, tmp_path / "both", eval_data=[str(p) for p in parts], **given,
            save_best="rewards/accuracies/source/a.jsonl",
        ),
        console=False,
    )  # fmt: skip
    for path in parts:
        run = tmp_path / path.stem
        one = train(
            preference_run(tiny_model, data, run, eval_data=[str(path)], **given), console=False
        )
        last, alone = both.history[-1], one.history[-1]
        for name in ("eval_loss", "eval_rewards/accuracies"):
            assert last[f"{name}/source/{path.name}"] == pytest.approx(alone[name], rel=1e-6)
        told = both.metrics[f"heldout_loss/source/{path.name}"]
        assert told == last[f"eval_loss/source/{path.name}"]
    assert both.metrics["best_metric"] == "eval_rewards/accuracies/source/a.jsonl"
