"""Rows from pages, code and templates, and a tokenizer trained on rows."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer

from cli.main import main
from engine.data.dataset import load_rows
from engine.data.makers.markdown import PageFault, page_rows, plain_language, read_page
from engine.data.origins import stale

PAGE = """---
title: Loops
category: syntax
constructs: [for, range]
training_eligible: true
difficulty: intermediate
---
# Loops

Count to three.

```python
for n in range(3):
    print("```")
```

~~~~ {.py title="x"}
while True:
    break
~~~~

## In a shell

```bash
# Heading? No, code.
ls
```

A section of prose that says enough about loops to be an answer by itself, in two lines
of the page.
"""


def data(*words: object, status: int = 0) -> None:
    assert main(["data", *map(str, words)]) == status


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_page_gives_its_code_with_what_its_front_matter_says() -> None:
    rows = page_rows(read_page(PAGE, "x"), "x.md", ["python"], "code")
    assert rows[0] == {
        "prompt": 'Show python code for "Loops".\n\nCount to three.',
        "response": 'for n in range(3):\n    print("```")',
        "category": "syntax",
        "tags": ["for", "range"],
        "difficulty": "intermediate",
        "rating": 5,
        "source": "x.md:12",
        "schema_version": "engine-1",
    }
    assert [row["response"] for row in rows[1:]] == ["while True:\n    break"]
    assert PAGE.split("\n")[11] == "```python"
    shell = page_rows(read_page(PAGE, "x"), "x.md", ["sh"], "both")
    assert [row["prompt"] for row in shell] == [
        'Show bash code for "Loops: In a shell".',
        'Explain "Loops: In a shell".',
    ]


def test_fences_and_front_matter_in_odd_spellings() -> None:
    assert plain_language('{.python .number title="a"}') == "python"
    assert plain_language("py,ignore") == "python"
    assert plain_language("") == ""
    assert read_page("No head\n\n---\nnot: front\n---\n", "name").title == "name"
    unclosed = page_rows(read_page("# T\n````python\na = 1\n```\n", "x"), "x", ["python"], "code")
    assert unclosed[0]["response"] == "a = 1\n```"
    assert read_page("---\r\ntitle: A\r\ntraining_eligible: true\r\n---\r\n# B\r\n", "x").eligible
    for head in ("a: [", "- a", "training_eligible: maybe", "title: {a: 1}"):
        with pytest.raises(PageFault):
            read_page(f"---\n{head}\n---\ntext", "x")


def test_pairs_takes_eligible_pages_alone_and_counts_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two" / "deep"
    one.mkdir()
    two.mkdir(parents=True)
    (one / "a.md").write_text(PAGE)
    (one / "no.md").write_text(PAGE.replace("true", "false", 1))
    (one / "broken.md").write_text(PAGE.replace("true", "[", 1))
    (two / "plain.md").write_text("# Plain\n\n```python\nx = 1\n```\n")
    more = tmp_path / "more.jsonl"
    more.write_text('{"prompt": "P", "response": "R"}\n')
    output = tmp_path / "pairs.jsonl"
    words = ("pairs", more, "--docs", one, "--docs", tmp_path / "two", "--output", output)
    data(*words, "--json")
    report = json.loads(capsys.readouterr().out)
    assert [row["response"][:5] for row in lines(output)] == ["R", "for n", "while"]
    assert report["left_out"] == {
        "files_that_cannot_be_used": 1,
        "pages_not_eligible": 1,
        "pages_that_do_not_say_training_eligible": 1,
    }
    data(*words, "--all-pages", "--overwrite")
    assert [row["response"][:5] for row in lines(output)] == ["R", "for n", "while", "x = 1"]
    data(*words, "--strict", "--overwrite", status=2)
    assert stale(output) == []
    (two / "new.md").write_text(PAGE)
    assert "two has changed" in stale(output)[0]
    data("pairs", "--docs", tmp_path / "nowhere", "--output", tmp_path / "x.jsonl", status=2)


SOURCE = '''
class Stack:
    """A pile of values, last in first out."""

    def push(self, value):
        """Put a value on top of the others."""
        text = """a
    b"""
        self.values.append(value)

    def _hidden(self):
        """Not for others to call, ever."""
        return 1
\x0c
@decorated
def double(x):
    """Twice the number that is given."""
    return 2 * x

def silent(x):
    return x
'''


def test_extract_gives_code_that_parses_and_counts_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text(SOURCE)
    (tmp_path / "src" / "old.py").write_text("print 'two'\n")
    output = tmp_path / "rows.jsonl"
    data("extract", tmp_path / "src", "--output", output, "--json")
    report = json.loads(capsys.readouterr().out)
    rows = lines(output)
    assert [row["category"] for row in rows] == ["class", "method", "function"]
    assert rows[2]["response"].startswith("@decorated\ndef double(x):")
    assert rows[1]["response"].startswith("def push(self, value):\n    ")
    assert all(ast.parse(row["response"]) for row in rows)
    assert "Put a value on top" in rows[1]["prompt"]
    assert report["left_out"] == {
        "files_that_cannot_be_used": 1, "private": 1, "without_a_docstring": 1,
    }  # fmt: skip
    assert (
        SOURCE.split("\n")[int(rows[1]["source"].rsplit(":", 1)[1]) - 1]
        .strip()
        .startswith("def push")
    )
    data("extract", tmp_path / "src", "--output", tmp_path / "x.jsonl", "--strict", status=2)


def test_extract_describes_installed_packages(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    data("extract", "textwrap", "--task", "describe", "--output", output)
    rows = {row["prompt"]: row["response"] for row in lines(output)}
    assert "Fill a single paragraph" in rows["What does the Python function `fill` do?"]
    assert "What is the Python class `TextWrapper`?" in rows
    data("extract", "no_such_package", "--output", tmp_path / "x.jsonl", status=2)


TEMPLATES: dict[str, Any] = {
    "values": {
        "op": [{"word": "sum", "sign": "+"}, {"word": "difference", "sign": "-"}],
        "a": {"from": 1, "to": 30},
        "b": [2, 3],
    },
    "templates": [
        {
            "prompt": "The {{ op.word }} of {{ a }} and {{ b }}?",
            "response": "{{ a + b if op.sign == '+' else a - b }}",
            "when": "a > b",
            "category": "arithmetic",
            "tags": ["numbers"],
        },
        {"prompt": "Say {{ b }}.", "response": "{{ b }}"},
    ],
}


def test_synth_fills_templates_with_every_combination_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "t.yaml", tmp_path / "rows.jsonl"
    file.write_text(yaml.safe_dump(TEMPLATES))
    words = ("synth", "--templates", file, "--output", output, "--overwrite")
    data(*words, "--json")
    rows = lines(output)
    assert len(rows) == 2 * (28 + 27) + 2 == len({row["prompt"] for row in rows})
    assert json.loads(capsys.readouterr().out)["left_out"] == {"against_the_condition": 10}
    for row in rows:
        match = re.fullmatch(r"The (\w+) of (\d+) and (\d+)\?", row["prompt"])
        if match:
            a, b = int(match[2]), int(match[3])
            assert a > b
            assert row["response"] == str(a + b if match[1] == "sum" else a - b)
            assert (row["category"], row["tags"]) == ("arithmetic", ["numbers"])
    data(*words, "--limit", 20)
    first = lines(output)
    assert len(first) == 20
    assert sum(row["prompt"].startswith("Say") for row in first) == 2
    data(*words, "--limit", 20)
    assert lines(output) == first
    data(*words, "--limit", 20, "--seed", 1)
    assert lines(output) != first


@pytest.mark.parametrize(
    "change",
    [
        {"templates": [{"prompt": "{{ c }}", "response": "x"}]},
        {"templates": [{"prompt": "{{ a", "response": "x"}]},
        {"templates": [{"prompt": "{{ a / 0 }}", "response": "x"}]},
        {"templates": [{"prompt": "{{ ''.__class__.__mro__ }}", "response": "x"}]},
        {"templates": [{"prompt": "x"}]},
        {"values": {"a": []}},
        {"more": 1},
    ],
)
def test_templates_that_cannot_be_filled_are_refused(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "t.yaml", tmp_path / "rows.jsonl"
    file.write_text(yaml.safe_dump({**TEMPLATES, **change}))
    data("synth", "--templates", file, "--output", output, status=2)
    assert "Traceback" not in capsys.readouterr().err
    assert not output.exists()


def test_a_tokenizer_of_rows_encodes_any_text_and_decodes_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    told = [{"prompt": f"What is the sum {n}?", "response": f"The sum is {n}."} for n in range(99)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in told))
    folder = tmp_path / "words"
    words = ("--vocab-size", 300, "--special", "<|tool|>")
    data("tokenizer", rows, "--output-dir", folder, *words, "--json")
    report = json.loads(capsys.readouterr().out)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert report["vocab_size"] == backend.get_vocab_size() == 300
    for text in ("The sum is 7.", "Straße 東京 \x00 🙂\r\n\t  x", load_rows(rows)[0].source):
        assert backend.decode(backend.encode(text).ids, skip_special_tokens=False) == text
    assert len(backend.encode("The sum is").ids) == 3
    assert report["bytes_per_token"] > 2
    assert len(backend.encode("<|im_start|>a<|im_end|><|tool|>").ids) == 4
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>"
    assert stale(folder) == []
    data("tokenizer", rows, "--output-dir", folder, status=2)
    small = ("--vocab-size", 259, "--special", "<|tool|>")
    data("tokenizer", rows, "--output-dir", tmp_path / "t", *small, status=2)
