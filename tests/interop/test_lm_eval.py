"""The harness's answers with a model of this engine and with its own Hugging Face model."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli import main as cli
from engine.config.tasks.inference import EvalSettings
from engine.errors import ConfigError
from engine.harness.language_model import HarnessModel
from engine.harness.tasks import task_manager
from engine.inference.generation import stop_ids_of
from engine.model_sources.load_model import build_model
from engine.model_sources.open import open_model_source
from engine.tokenization.tokenizer import load_tokenizer
from tests.support.tokenizer_folder import write_byte_tokenizer

pytestmark = pytest.mark.interop
GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Q: {{{{q}}}} A:"
doc_to_choice: "{{{{c}}}}"
doc_to_target: "{{{{a}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "llama", tmp_path / "m")
    write_byte_tokenizer(tmp_path / "m", open_model_source(str(tmp_path / "m")).config.vocab_size)
    return tmp_path / "m"


@pytest.fixture
def ours(folder: Path) -> HarnessModel:
    source = open_model_source(str(folder))
    tokenizer = load_tokenizer(source)
    decoder = build_model(source, dtype=torch.float32)
    stops = stop_ids_of(source, tokenizer)
    return HarnessModel(decoder, tokenizer, stops, source.config.max_position_embeddings)


@pytest.fixture
def theirs(folder: Path) -> HFLM:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def test_log_likelihoods_equal_those_of_its_own_model(ours: HarnessModel, theirs: HFLM) -> None:
    requests = asked(
        "loglikelihood",
        ("a b c", " d"), ("a b c", " e"), ("ab  ", "ba"), ("", "abba"), ("x" * 40, "yy"),
        ("The quick", " brown fox"), ("hello", " b c"), ("ends with space ", " two"),
    )  # fmt: skip
    for mine, other in zip(
        ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True
    ):
        assert mine[0] == pytest.approx(other[0], abs=1e-3) and mine[1] == other[1]


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ("a", "b", "without a token of its own .'b' after 'a'."),
        ("a", "", "without a token of its own"),
        ("a", " b c d" * 4, "and the model reads 8"),
    ],
)
def test_answers_that_have_no_score_are_refused(
    ours: HarnessModel, context: str, continuation: str, message: str
) -> None:
    ours._window = 8
    with pytest.raises(ConfigError, match=message):
        ours.loglikelihood(asked("loglikelihood", (context, continuation)))


def test_whole_texts_equal_in_windows_too(ours: HarnessModel, theirs: HFLM) -> None:
    # Its own model takes two windows of equal tokens for one, however they are divided, so the
    # text does not repeat itself.
    text = " ".join(f"{n * n} {n}abc" for n in range(30))
    texts = asked("loglikelihood_rolling", (text,), ("a",), ("hello world",))
    for window in (ours._window, 16):
        ours._window = theirs._max_length = window
        mine, other = ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts)
        assert mine == pytest.approx(other, abs=1e-3)


def test_answers_equal_up_to_the_stop(ours: HarnessModel, theirs: HFLM) -> None:
    kwargs = {"until": ["a"], "max_gen_toks": 12, "do_sample": False}
    requests = asked("generate_until", ("abc", kwargs), ("hello there", kwargs | {"until": ["zz"]}))
    assert ours.generate_until(requests) == theirs.generate_until(requests)


def test_a_local_task_gets_the_same_score(
    folder: Path, theirs: HFLM, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"q": f"{n} and b?", "c": ["ab", "ba", " cab"], "a": n % 3} for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "tiny.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    words = ["eval", "--model", str(folder), "--tasks", "tiny_choice", "--include-path", str(tasks)]
    assert (
        cli.main([*words, "--num-fewshot", "1", "--limit", "8", "--dtype", "float32", "--json"])
        == 0
    )
    mine = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["tiny_choice"]
    other = simple_evaluate(
        theirs, tasks=["tiny_choice"], num_fewshot=1, limit=8, random_seed=42,
        task_manager=TaskManager(include_path=str(tasks)),
    )  # fmt: skip
    assert other is not None
    assert mine["acc,none"] == other["results"]["tiny_choice"]["acc,none"]
    assert mine["sample_len"] == 8
    with pytest.raises(ConfigError, match=r"no task tiny_choise\. Did you mean tiny_choice"):
        task_manager(EvalSettings(model="m", tasks=("tiny_choise",), include_path=(tasks,)))
