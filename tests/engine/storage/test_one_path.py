"""Files are written, renamed and deleted by `engine/storage`, but for what is listed here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.source_tree import product_sources

METHODS = {"write_text", "write_bytes", "unlink", "rmdir", "touch", "rename", "hardlink_to",
           "symlink_to", "savefig", "tofile", "rmtree"}  # fmt: skip
OF_OS = {"replace", "rename", "renames", "remove", "unlink", "rmdir", "removedirs", "link",
         "symlink", "truncate", "ftruncate"}  # fmt: skip
OF_SHUTIL = {"rmtree", "move", "copy", "copy2", "copyfile", "copytree"}
WRITING = ("O_WRONLY", "O_RDWR", "O_CREAT", "O_APPEND", "O_TRUNC")

NOTHING = "the null device"
SWITCH = "a switch of the kernel under /proc"
OWN_FOLDER = "in a folder of this process that goes with it; nobody else reads it"
RECORD = "deletes one file, of which there is no half"
BY_RENAME = "a run's own folders, moved by rename and deleted under names that say so"
TO_A_HANDLE = "to a handle or a buffer that storage publishes"
ALLOWED = {
    "cli/main.py _print_nowhere": NOTHING,
    "cli/main.py _keep_traceback": "a traceback, in the folder for temporary files",
    "cli/streams.py _nowhere": NOTHING,
    "cli/streams.py _open_nothing": NOTHING,
    "engine/data/corpus/publishing.py publish_all": RECORD,
    "engine/data/corpus/writing.py write_records": RECORD,
    "engine/data/sources/spool.py _folder": OWN_FOLDER,
    "engine/data/sources/spool.py write_rows": OWN_FOLDER,
    "engine/data/sources/spool.py spooled_standard_input": OWN_FOLDER,
    "engine/data/streaming/converted.py as_lines": OWN_FOLDER,
    "engine/distributed/launch.py run_group": OWN_FOLDER,
    "engine/forging/stages.py Stages.run": BY_RENAME,
    "engine/gates/code_worker.py leave_the_machine": SWITCH,
    "engine/gates/code_worker.py child": NOTHING,
    "engine/gates/generated_code.py run_program": OWN_FOLDER,
    "engine/memory/process.py forget_peak": SWITCH,
    "engine/pipelines/records.py StageRecord._set_aside": "moves what is to be replaced, whole",
    "engine/pipelines/records.py _move": "moves what is to be replaced, whole",
    "engine/pipelines/records.py _remove": RECORD,
    "engine/plots.py save_figure": TO_A_HANDLE,
    "engine/runs/checkpoints.py CheckpointStore.clear": BY_RENAME,
    "engine/runs/checkpoints.py CheckpointStore._delete": BY_RENAME,
    "engine/runs/checkpoints.py CheckpointStore._rename": BY_RENAME,
    "engine/runs/checkpoints.py sweep": BY_RENAME,
    "engine/runs/directory.py RunDirectory.begin": RECORD,
    "engine/runs/earlier.py EarlierRun.set_aside": BY_RENAME,
    "engine/runs/earlier.py EarlierRun.restore": BY_RENAME,
    "engine/runs/earlier.py EarlierRun.settle": BY_RENAME,
    "engine/runs/earlier.py EarlierRun._move_back": BY_RENAME,
    "engine/runs/earlier.py _delete": BY_RENAME,
    "engine/verbs/models/judge.py _write": RECORD,
    "engine/verbs/worker.py main": RECORD,
}


def writing_call(call: ast.Call) -> bool:
    """Whether a call opens a file for writing, renames or deletes, as far as syntax tells."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
    base = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    text = ast.unparse(call)
    if base.split(".")[-1] == "durable":
        return False
    if base == "os":
        return name in OF_OS or (name == "open" and any(flag in text for flag in WRITING))
    if base in ("shutil", "tempfile"):
        return name in OF_SHUTIL or name in (
            "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory", "mkstemp", "mkdtemp"
        )  # fmt: skip
    if name == "open" or (name == "ZipFile" and base == "zipfile"):
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        modes = [
            v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)
        ]
        return any(len(mode) < 4 and set(mode) & set("wax+") for mode in modes)
    # str.replace takes two arguments, dataclasses.replace is no method of an object.
    return name in METHODS or (
        name == "replace" and bool(base) and len(call.args) == 1 and not call.keywords
    )


def writers(path: Path, source: str) -> Iterator[str]:
    """File and function of each such call."""

    def walk(node: ast.AST, names: tuple[str, ...]) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            inner = names
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = (*names, child.name)
            if isinstance(child, ast.Call) and writing_call(child):
                yield f"{path.as_posix()} {'.'.join(names)}"
            yield from walk(child, inner)

    yield from walk(ast.parse(source), ())


def test_every_writer_goes_through_storage() -> None:
    seen = {
        writer
        for path, source in product_sources().items()
        if not path.as_posix().startswith("engine/storage/")
        for writer in writers(path, source)
    }
    unknown = sorted(seen - ALLOWED.keys())
    assert not unknown, f"write by engine.storage.durable, or say here why not: {unknown}"
    assert not (past := sorted(ALLOWED.keys() - seen)), f"these write no longer: {past}"


@pytest.mark.parametrize(
    "line",
    [
        "Path(p).write_text(x)",
        "open(p, 'w')",
        "p.open(mode='ab')",
        "io.open(p, 'x', encoding='utf-8')",
        "os.open(p, os.O_RDWR | os.O_CREAT)",
        "os.replace(a, b)",
        "a.replace(b)",
        "path.unlink(missing_ok=True)",
        "shutil.rmtree(folder)",
        "tempfile.mkdtemp()",
        "figure.savefig(target)",
        "zipfile.ZipFile(p, 'w')",
    ],
)
def test_a_writer_is_recognised(line: str) -> None:
    assert list(writers(Path("a.py"), f"def f():\n    {line}\n")) == ["a.py f"]


@pytest.mark.parametrize(
    "line",
    [
        "text.replace('a', 'b')",
        "replace(settings, output=x)",
        "settings.replace(a, output=x)",
        "p.open('rb')",
        "os.open(p, os.O_RDONLY)",
        "durable.write_text(p, x)",
    ],
)
def test_what_only_reads_is_not_taken_for_a_writer(line: str) -> None:
    assert not list(writers(Path("a.py"), line))
