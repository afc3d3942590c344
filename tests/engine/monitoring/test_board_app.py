"""What engine board answers: JSON about the runs below the folders that were named, and no more."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from engine.errors import ConfigError, DataError
from engine.monitoring.app import Board
from engine.monitoring.directories import RunDirectories
from engine.storage.lock import DirectoryLock
from tests.support.pages.written_runs import (
    step_line,
    write_job,
    write_lines,
    write_pruned,
    write_run,
)

SECRET = "a line that no run holds"


def plan_of(run: Path) -> int:
    if run.name == "second":
        raise DataError("The rows are not there.")
    return 3 * 2**30


def client_of(*folders: Path) -> TestClient:
    return TestClient(
        Board(RunDirectories(folders), plan_of).app(), base_url="http://127.0.0.1:8765"
    )


def ask(client: TestClient, path: str, status: int = 200, **query: Any) -> dict[str, Any]:
    answer = client.get(f"/api/{path}", params=query)
    assert answer.status_code == status, answer.text
    value = answer.json()
    assert isinstance(value, dict)
    return value


def ids(client: TestClient) -> dict[str, str]:
    return {run["name"]: run["id"] for run in ask(client, "runs")["runs"]}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs of every kind, and a file outside it that no answer may hold."""
    root = tmp_path / "runs"
    write_run(root / "first", 50, lora_rank=16)
    write_run(root / "second", 20, status="Failure", lora_rank=4)
    write_run(root / "third", 5, status=None)
    write_pruned(root / "pruned")
    write_job(root / "job")
    (root / "first" / "checkpoint-10").mkdir()
    write_lines(root / "first" / "checkpoint-10" / "metrics.jsonl", [step_line(1)])
    (tmp_path / "secret.json").write_text(json.dumps({"error_message": SECRET, "prompt": SECRET}))
    return root


def test_every_run_is_listed_with_its_state(runs: Path) -> None:
    with DirectoryLock(runs / "third"):
        listed = {run["name"]: run for run in ask(client_of(runs), "runs")["runs"]}
    assert list(listed) == ["first", "job", "job/cycle-1/pruned", "pruned", "second", "third"]
    states = {name: run["state"] for name, run in listed.items()}
    assert states == {
        "first": "finished", "second": "failed", "third": "running", "pruned": "finished",
        "job": "died", "job/cycle-1/pruned": "finished",
    }  # fmt: skip
    assert listed["second"]["error"] == "The rows ended. Give more rows."
    first = listed["first"]
    assert (first["step"], first["steps"], first["total_steps"]) == (50, 50, 50)
    assert first["figures"]["heldout_perplexity_before"] == 9.5
    assert first["figures"]["heldout_perplexity"] < 9.5
    assert first["has"] == ["rows", "settings"] and "forge" in listed["job"]["has"]


def test_new_runs_and_new_steps_appear(runs: Path) -> None:
    client = client_of(runs)
    first = ids(client)["first"]
    etag = client.get("/api/series", params={"run": first}).headers["etag"]
    unchanged = client.get("/api/series", params={"run": first}, headers={"if-none-match": etag})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    write_lines(runs / "first" / "metrics.jsonl", [step_line(51, loss=0.125)])
    changed = client.get("/api/series", params={"run": first}, headers={"if-none-match": etag})
    assert changed.json()["figures"]["loss"]["values"][-1] == 0.125
    write_run(runs / "fourth")
    assert "fourth" in ids(client)


def test_the_plan_is_made_once_and_its_refusal_is_told(runs: Path) -> None:
    client = client_of(runs)
    runs_by_name = ids(client)
    assert ask(client, "plan", run=runs_by_name["first"]) == {"bytes": 3 * 2**30, "why": None}
    told = ask(client, "plan", run=runs_by_name["second"])
    assert told == {"bytes": None, "why": "The rows are not there."}
    manifest = runs / "second" / "manifest.json"
    noted = json.loads(manifest.read_text()) | {"planned_bytes": 5 * 2**30}
    manifest.write_text(json.dumps(noted))
    assert ask(client, "plan", run=runs_by_name["second"]) == {"bytes": 5 * 2**30, "why": None}
    assert ask(client, "plan", run=runs_by_name["pruned"])["bytes"] is None


def test_settings_of_several_runs_stand_side_by_side(runs: Path) -> None:
    client = client_of(runs)
    chosen = [ids(client)["first"], ids(client)["second"]]
    rows = {row["name"]: row for row in ask(client, "settings", run=chosen)["rows"]}
    assert rows["lora_rank"] == {
        "name": "lora_rank", "values": dict(zip(chosen, ("16", "4"), strict=True)), "differs": True
    }  # fmt: skip
    assert rows["learning_rate"]["differs"] is False
    job = ask(client, "settings", run=[ids(client)["job"]])["rows"]
    assert [row["name"] for row in job] == ["training.lora_rank", "cycles"]


def test_settings_that_name_one_thing_many_times_stay_short(runs: Path) -> None:
    def shown(depth: int) -> list[Any]:
        lines = (f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 4)}]\n" for n in range(1, depth))
        (runs / "first" / "config.yaml").write_text("a0: &a0 [x, x]\n" + "".join(lines))
        client = client_of(runs)
        rows: list[Any] = ask(client, "settings", run=[ids(client)["first"]])["rows"]
        return rows

    rows = shown(7)
    assert len(rows) == 7 and len(json.dumps(rows)) < 30_000
    assert shown(30) == []  # 4^29 values: such a file is not read


def test_samples_are_grouped_by_prompt(runs: Path) -> None:
    (runs / "first" / "samples.jsonl").write_text(
        '{"step": 10, "prompt": "What?", "text": "This."}\n'
        '{"step": 20, "messages": [{"role": "user", "content": "What?"}], "response": "That."}\n'
        '{"step": 20, "prompt": "Who?", "text": ""}\n'
        'no sample\n{"step": 30, "prompt": "What?", "te'
    )
    client = client_of(runs)
    assert ask(client, "samples", run=ids(client)["first"])["prompts"] == [
        {
            "prompt": "What?",
            "answers": [
                {"label": "step 10", "text": "This."},
                {"label": "step 20", "text": "That."},
            ],
        },
        {"prompt": "Who?", "answers": [{"label": "step 20", "text": ""}]},
    ]
    answers = ask(client, "samples", run=ids(client)["job"])["prompts"][0]["answers"]
    assert [answer["label"] for answer in answers] == ["baseline", "cycle 1, pruned"]


def test_pruned_heads_and_stages_are_told(runs: Path) -> None:
    client = client_of(runs)
    (heads,) = ask(client, "pruning", run=ids(client)["pruned"])["maps"]
    assert (heads["name"], heads["metric"], len(heads["layers"])) == ("pruned", "l2", 4)
    assert heads["layers"][2]["pruned"] == [2]
    of_job = ask(client, "pruning", run=ids(client)["job"])["maps"]
    assert [heads["name"] for heads in of_job] == ["cycle-1/pruned"]
    models = ask(client, "forge", run=ids(client)["job"])["models"]
    assert [(model["name"], model["perplexity"]) for model in models] == [
        ("baseline", 20.0),
        ("cycle 1, pruned", 31.5),
    ]


def test_rows_are_those_of_the_run_with_trained_text_told_apart(
    ended: Path, tmp_path: Path
) -> None:
    client = client_of(ended)
    told = ask(client, "rows", run=ids(client)["run"], first=2, count=2)
    assert (told["total"], told["first"], len(told["rows"])) == (9, 2, 2)
    row = told["rows"][0]
    assert "".join(part["text"] for part in row["stretches"] if part["trained"]).startswith(
        "abcabc1."
    )
    assert "<|im_start|>user\nWord 1?" in row["stretches"][0]["text"]
    assert not row["stretches"][0]["trained"]
    assert 0 < row["trained_tokens"] < row["tokens"]
    assert ask(client, "rows", run=ids(client)["run"], first=10)["rows"] == []
    (tmp_path / "rows.jsonl").unlink()
    assert "rows.jsonl" in ask(client_of(ended), "rows", 422, run=ids(client)["run"])["error"]


@pytest.mark.parametrize(
    ("path", "query", "named"),
    [
        ("series", {"run": "../../secret.json"}, "There is no run"),
        ("series", {}, "There is no run"),
        ("settings", {"run": "/etc/passwd"}, "There is no run"),
        ("series", {"smoothing": "much"}, "smoothing is 'much'"),
        ("series", {"smoothing": "1"}, "from 0 to 0.999"),
        ("series", {"smoothing": "nan"}, "smoothing"),
        ("series", {"first": "-1"}, "first"),
        ("rows", {"part": "../x"}, "train or heldout"),
        ("rows", {"count": "1e9"}, "count"),
    ],
)  # fmt: skip
def test_wrong_requests_are_told_why(
    runs: Path, path: str, query: dict[str, str], named: str
) -> None:
    client = client_of(runs)
    if "run" not in query and "no run" not in named:
        query = {"run": ids(client)["first"], **query}
    status = 404 if "no run" in named else 400
    assert named in ask(client, path, status, **query)["error"]


def test_nothing_outside_the_folders_is_answered(runs: Path, tmp_path: Path) -> None:
    outside = write_run(tmp_path / "outside")
    (outside / "samples.jsonl").write_text(json.dumps({"prompt": SECRET, "text": SECRET}))
    (runs / "linked").symlink_to(outside)
    for name in ("summary.json", "manifest.json", "samples.jsonl", "pruning.json"):
        (runs / "third" / name).unlink(missing_ok=True)
        (runs / "third" / name).symlink_to(tmp_path / "secret.json")
    (runs / "third" / "config.yaml").unlink()
    (runs / "third" / "config.yaml").symlink_to(tmp_path / "secret.json")
    (runs / "job" / "cycle-2").symlink_to(outside)
    client = client_of(runs)
    named = ids(client)
    assert "linked" not in named
    texts = [client.get("/api/runs").text]
    for path in ("series", "settings", "samples", "forge", "pruning", "rows", "plan"):
        texts += [client.get(f"/api/{path}", params={"run": run}).text for run in named.values()]
    for path in ("../secret.json", "..%2fsecret.json", "%2e%2e/secret.json", "page.css/../x"):
        answer = client.get(f"/{path}")
        assert answer.status_code == 404, path
        texts.append(answer.text)
    assert SECRET not in "".join(texts)


def test_every_answer_has_the_policy_and_is_read_only(runs: Path) -> None:
    client = client_of(runs)
    for path in ("/", "/page.css", "/page.js", "/api/runs", "/api/series"):
        policy = client.get(path).headers["content-security-policy"]
        assert policy.startswith("default-src 'self';") and "unsafe" not in policy
        assert client.post(path).status_code == 405, path
    page = client.get("/").text
    assert page.count("<script") == 1 and "style=" not in page and "http" not in page


def test_folders_that_are_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, said in (("none", "does not exist"), ("file", "is a file")):
        with pytest.raises(ConfigError, match=said):
            RunDirectories([tmp_path / name])


def test_names_tell_runs_of_several_folders_apart(
    tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    for folder in ("a", "b"):
        write_run(tmp_path / folder / "run", 3)
    assert list(ids(client_of(tmp_path / "a", tmp_path / "b"))) == ["a/run", "b/run"]
    assert list(ids(client_of(tmp_path / "a" / "run"))) == ["run"]
