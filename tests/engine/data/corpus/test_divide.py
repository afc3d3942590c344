"""Planted duplicates, leaks across a split, and contaminated rows do not get through."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import main
from engine.data.corpus.similar import RowSets, banding, join_similar, runs, words_of

WORDS = [f"word{number}" for number in range(400)]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data(*words: object, status: int = 0) -> None:
    assert main(["data", *map(str, words)]) == status


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def text(seed: int, length: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def changed(original: str, seed: int = 0) -> str:
    """The text with one word replaced: a near-duplicate."""
    words = original.split()
    words[random.Random(seed).randrange(len(words))] = "other"
    return " ".join(words)


def row(seed: int, **more: Any) -> dict[str, Any]:
    return {"prompt": text(seed, 20), "response": text(1000 + seed), **more}


def exact_jaccard(one: str, other: str) -> float:
    """The same measure from sets of tuples."""
    first, second = (
        {tuple(words[i : i + 5]) for i in range(len(words) - 4)}
        for words in (one.split(), other.split())
    )
    return len(first & second) / len(first | second)


def test_similar_texts_are_those_that_an_exhaustive_comparison_finds() -> None:
    texts = [text(seed) for seed in range(60)]
    for seed in range(60):
        copy = texts[seed]
        for step in range(seed % 5):
            copy = changed(copy, 31 * seed + step)
        texts.append(copy)
    for threshold in (0.5, 0.8):
        pairs = [
            (one, other)
            for one in range(len(texts))
            for other in range(one)
            if exact_jaccard(texts[one], texts[other]) >= threshold
        ]
        truth, ours = RowSets(len(texts)), RowSets(len(texts))
        for pair in pairs:
            truth.join(*pair)
        join_similar(ours, texts, threshold)
        assert 20 < len(pairs) < 60 * threshold * 3
        missed = len(ours.sets()) - len(truth.sets())
        assert 0 <= missed <= 2  # hashing misses a few at the threshold, and adds none
        bands, width = banding(threshold)
        assert 1 - (1 - threshold**width) ** bands >= 0.95


def test_runs_tell_every_order_and_length_apart() -> None:
    assert len(np.unique(runs(["a", "b", "c", "d", "e", "f", "g"]))) == 3
    assert runs(["a", "b"]).tolist() != runs(["b", "a"]).tolist()
    assert words_of("Straße, 東京!") == ["strasse", "東", "京"]
    assert words_of("?!") == ["?", "!"]


def test_dedup_keeps_the_best_rated_of_equal_and_similar_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = row(1), row(2)
    shouted = {key: value.upper() + " " for key, value in first.items()}
    near = {**second, "response": changed(second["response"]), "rating": 5}
    rows = write(tmp_path / "in.jsonl", first, second, row(3), shouted, near)
    output, removed = tmp_path / "out.jsonl", tmp_path / "removed.jsonl"
    data("dedup", rows, "--output", output, "--removed", removed, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["left_out"] == {"exact_duplicates": 1, "near_duplicates": 1}
    assert [r["source"][-2:] for r in lines(output)] == [":1", ":3", ":5"]
    assert [(r["source"][-2:], r["duplicate_of"][-2:], r["exact"]) for r in lines(removed)] == [
        (":2", ":5", False),
        (":4", ":1", True),
    ]
    data("dedup", rows, "--output", output, "--exact", "--overwrite")
    assert len(lines(output)) == 4
    data("dedup", output, "--output", tmp_path / "again.jsonl", "--exact")
    assert len(lines(tmp_path / "again.jsonl")) == 4


def test_dedup_can_compare_prompts_alone(tmp_path: Path) -> None:
    rows = write(tmp_path / "in.jsonl", row(1), {**row(1), "response": "Other"}, row(2))
    data("dedup", rows, "--output", tmp_path / "all.jsonl")
    data("dedup", rows, "--output", tmp_path / "prompts.jsonl", "--compare", "prompt")
    assert [len(lines(tmp_path / f"{n}.jsonl")) for n in ("all", "prompts")] == [3, 2]


@pytest.fixture
def families(tmp_path: Path) -> Path:
    """40 sets of three: an original, one with another answer, one nearly equal."""
    rows: list[dict[str, Any]] = []
    for seed in range(40):
        one = row(seed, family=seed)
        rows += [
            one,
            {**one, "response": text(5000 + seed)},
            {**one, "prompt": text(9000 + seed, 20), "response": changed(one["response"])},
        ]
    random.Random(1).shuffle(rows)
    return write(tmp_path / "in.jsonl", *rows)


def sides(folder: Path) -> list[set[int]]:
    names = ("train", "heldout", "test")
    return [{row["family"] for row in lines(folder / f"{name}.jsonl")} for name in names]


def test_a_split_leaks_no_near_duplicate_and_holds_its_shares(
    families: Path, tmp_path: Path
) -> None:
    words = ("--heldout", 0.2, "--test", 0.1)
    data("split", families, "--output-dir", tmp_path / "a", *words)
    train, heldout, test = sides(tmp_path / "a")
    assert not (train & heldout or train & test or heldout & test)
    assert (len(heldout), len(test), len(train)) == (8, 4, 28)
    # Told not to look for near-duplicates it leaks, so the test can fail.
    data("split", families, "--output-dir", tmp_path / "b", *words, "--exact")
    train, heldout, test = sides(tmp_path / "b")
    assert train & heldout


def test_a_split_depends_on_seed_and_rows_but_not_on_their_order(
    families: Path, tmp_path: Path
) -> None:
    def heldout(name: str, source: Path, *words: object) -> set[str]:
        data("split", source, "--output-dir", tmp_path / name, *words)
        return {row["response"] for row in lines(tmp_path / name / "heldout.jsonl")}

    turned = write(tmp_path / "turned.jsonl", *reversed(lines(families)))
    first = heldout("a", families)
    assert heldout("b", families) == first == heldout("c", turned)
    assert heldout("d", families, "--seed", 1) != first


def test_a_split_keeps_groups_together(tmp_path: Path) -> None:
    rows = [row(seed, meta={"author": f"a{seed % 10}"}) for seed in range(60)]
    source = write(tmp_path / "in.jsonl", *rows)
    data("split", source, "--output-dir", tmp_path / "s", "--group-by", "meta.author")
    authors = [
        {row["meta"]["author"] for row in lines(tmp_path / "s" / f"{name}.jsonl")}
        for name in ("train", "heldout")
    ]
    assert not authors[0] & authors[1]
    assert (len(authors[0]), len(authors[1])) == (9, 1)
    data("split", source, "--output-dir", tmp_path / "t", "--group-by", "nothing", status=2)
    one = write(tmp_path / "one.jsonl", *[row(s, meta={"author": "x"}) for s in range(9)])
    data("split", one, "--output-dir", tmp_path / "u", "--group-by", "meta.author", status=2)
    assert not (tmp_path / "u").exists()


def test_rows_with_words_of_the_held_out_set_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exam = {"prompt": text(1, 30), "response": "Yes"}
    short = {"prompt": "Who wrote The Trial in 1914?", "response": text(2, 30)}
    tiny = {"prompt": "Why?", "response": "Because"}
    quoted = " ".join(exam["prompt"].split()[5:18])  # thirteen words
    less = " ".join(exam["prompt"].split()[5:17])  # twelve
    rows = [
        {"prompt": f"Read: {quoted.upper()}. Now answer.", "response": "Well"},
        {"prompt": f"Read: {less}. Now answer.", "response": "Yes"},
        {"prompt": "Tell me: who wrote the trial in 1914", "response": "Kafka"},
        {"prompt": "why", "response": "So"},
        {"prompt": "Why not?", "response": "So"},
        {"prompt": "P", "response": f"And {text(2, 30)}"},
        {"text": f"A document with {quoted} in it"},
        {"prompt": "Q", "response": "Clean", "system": exam["prompt"]},
    ]
    source = write(tmp_path / "in.jsonl", *rows)
    heldout = write(tmp_path / "exam.jsonl", exam, short, tiny)
    output, removed = tmp_path / "out.jsonl", tmp_path / "removed.jsonl"
    words = ("decontaminate", source, "--against", heldout, "--output", output)
    data(*words, "--removed", removed, "--json")
    report = json.loads(capsys.readouterr().out)
    assert [int(r["source"][-1]) for r in lines(output)] == [2, 5, 8]
    assert report["left_out"] == {"contaminated": 5}
    told = {int(r["source"][-1]): (r["contaminated_by"][-1], r["shared"]) for r in lines(removed)}
    assert told[1] == ("1", quoted)
    assert [told[number][0] for number in (3, 4, 6, 7)] == ["2", "3", "2", "1"]
    data(*words, "--ngram", 12, "--overwrite")
    assert [int(r["source"][-1]) for r in lines(output)] == [5, 8]
