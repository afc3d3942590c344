"""Answer a file of prompts in batches, row by row.

Every row gets a line of JSON, in the order of the rows, and it is on the disk before the next
begins. A job that was stopped goes on after the last whole line of its output, where it is the same
job: what decides its answers stands in a file beside them.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from engine.config.tasks.inference import GenerateSettings
from engine.data.sources.streams.json_lines import read_json
from engine.data.sources.streams.located import BadLine
from engine.errors import CheckpointError, ConfigError, DataError
from engine.inference.batched import BatchedGenerator
from engine.inference.generation import GenerateResult, conversation_ids
from engine.inference.request import RequestSettings
from engine.storage import durable, safe_files, strict_json
from engine.storage.lock import take
from engine.storage.standing import has_keys, refuse_foreign, refuse_sources
from engine.tokenization.tokenizer import Tokenizer

log = logging.getLogger(__name__)

ANSWER_KEYS = ("response", "responses", "finish_reason", "completion_tokens")
"""What a line has besides the keys of its row."""

_OF_NO_ANSWER = {
    "prompt", "data", "output", "slots", "cache_tokens", "keep_decoded", "device", "model",
}  # fmt: skip
"""Settings that decide no answer; the model is told by its digest."""

MODEL_DIGEST = "model digest"


@dataclass(frozen=True)
class PromptJob:
    """A prompt's ids and how it is answered."""

    prompt: Sequence[int]
    settings: RequestSettings


def answer_in_order(
    generator: BatchedGenerator, jobs: Iterator[PromptJob], ahead: int
) -> Iterator[GenerateResult]:
    """The answers of `jobs` in their order, at most `ahead` of them under way.

    Raises as `BatchedGenerator.submit`, and `DataError` naming a request that cannot be answered.
    """
    open_jobs: dict[int, list[str]] = {}
    order: list[tuple[int, int]] = []
    ended: dict[int, GenerateResult] = {}
    more = True
    while more or order:
        while more and len(order) < ahead:
            job = next(jobs, None)
            if job is None:
                more = False
                break
            number = generator.submit(job.prompt, job.settings)
            open_jobs[number] = []
            order.append((number, len(job.prompt)))
        lengths = dict(order)
        for event in generator.step():
            if event.error is not None:
                raise DataError(f"request {event.request} cannot be answered: {event.error}")
            pieces = open_jobs[event.request]
            pieces.append(event.text)
            if event.finish_reason is not None:
                text, tokens = "".join(pieces), len(pieces)
                size, reason = lengths[event.request], event.finish_reason
                ended[event.request] = GenerateResult(text, size, tokens, reason, 0.0)
                del open_jobs[event.request]
        while order and order[0][0] in ended:
            yield ended.pop(order.pop(0)[0])


def answer_file(
    settings: GenerateSettings,
    generator: BatchedGenerator,
    tokenizer: Tokenizer,
    base: RequestSettings,
    facts: Mapping[str, Any],
    on_row: Callable[[int, int], None] | None = None,
) -> int:
    """Answer the rows of `settings.data` into `settings.output`; returns how many were answered.

    `facts` tell the model and all that decides its answers from others. `on_row` takes the rows
    that are done and all there are. Raises `DataError` for a row that is no prompt, `ConfigError`
    for an output that is of other rows, was begun with another model or other settings, or is being
    written by another process.
    """
    assert settings.data is not None and settings.output is not None
    rows, output, samples = read_rows(settings.data), settings.output, settings.num_samples
    with _opened(output) as handle:
        done, size = resume_after(output, rows)
        with _appending(output):
            handle.truncate(size)
            durable.fsync_dir(output.parent)
        _note_settings(settings, facts, begun=done > 0)

        def jobs() -> Iterator[PromptJob]:
            for index in range(done, len(rows)):
                ids = row_ids(rows[index], settings, tokenizer)
                for sample in range(samples):
                    yield PromptJob(ids, sampled(base, index * samples + sample))

        answers = answer_in_order(generator, jobs(), 2 * generator.slots)
        for index in range(done, len(rows)):
            own = [next(answers) for _ in range(samples)]
            with _appending(output):
                handle.write(json.dumps(_line(rows[index], own), ensure_ascii=False) + "\n")
                handle.flush()
                os.fsync(handle.fileno())
            if on_row is not None:
                on_row(index + 1, len(rows))
    return len(rows) - done


@contextmanager
def _opened(output: Path) -> Iterator[TextIO]:
    """The output to append to, which no other process has open so. Raises `ConfigError`."""
    with _appending(output):
        handle = safe_files.append_regular(output)
    try:
        with _appending(output):
            alone = take(handle.fileno())
        if not alone:
            raise ConfigError(
                f"Another process is writing to {output}. Wait for it to end, or give another "
                "--output."
            )
        yield handle
    finally:
        with suppress(OSError):  # what could not be written was reported, and is tried again here
            handle.close()


@contextmanager
def _appending(output: Path) -> Iterator[None]:
    """Around what writes to the output. Raises `CheckpointError` where the disk refuses."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"Cannot append to {output}: {durable.describe(error)}. The answers in it are safe. "
            "Check that disk or make room on it; the same command goes on behind them."
        ) from error


def settings_file(output: Path) -> Path:
    """The file beside `output` that says which job it is of."""
    return output.with_name(output.name + ".settings.json")


def refuse_other_output(data: Path, output: Path) -> None:
    """Raise `ConfigError` where answers would go into the rows or beside another's settings.

    Also for a link, a pipe or a device, which nothing is appended to.
    """
    refuse_sources((output, settings_file(output)), [data])
    if output.is_symlink() or (output.exists() and not output.is_file()):
        raise ConfigError(
            f"{output} is a link, a folder, a pipe or a device, and answers are appended to a "
            "file. Nothing was written; name that file itself, or another one."
        )
    refuse_foreign(settings_file(output), has_keys(MODEL_DIGEST), "a file of settings")


def _note_settings(settings: GenerateSettings, facts: Mapping[str, Any], begun: bool) -> None:
    """Write down what decides the answers, or compare it with what was written down."""
    assert settings.output is not None
    path = settings_file(settings.output)
    own = settings.model_dump(mode="json", exclude=_OF_NO_ANSWER) | dict(facts)
    if not begun:
        durable.write_json(path, own)
        return
    if not path.exists():
        log.warning(
            "%s: no %s is beside it, so nobody can tell whether its answers are of these settings",
            settings.output, path.name,
        )  # fmt: skip
        return
    before = safe_files.read_json_object(path, ConfigError)
    known = own.keys() - (facts.keys() - before.keys())  # an earlier version noted fewer facts
    keys = [key for key in own if key in known and _text(before.get(key)) != _text(own[key])]
    if keys:
        told = ", ".join(f"{key} was {before.get(key)!r} and is {own[key]!r}" for key in keys)
        raise ConfigError(
            f"{settings.output} was begun with other settings: {told}. Give the earlier ones to go "
            f"on with it, name another --output, or delete it and {path.name}."
        )


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def sampled(base: RequestSettings, index: int) -> RequestSettings:
    """The settings of the answer `index` of many: its draws are those of a seed of its own."""
    seed = base.sampling.seed + index
    seed = seed if seed < 1 << 63 else seed - (1 << 63)
    return replace(base, sampling=base.sampling.model_copy(update={"seed": seed}))


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    """The rows of a file of prompts: texts, or objects with `prompt` or `messages`."""
    rows: list[Mapping[str, Any]] = []
    if path.exists() and not path.is_file():
        raise DataError(
            f"{path} is a folder, a pipe or a device; a file of prompts was expected, one JSON "
            "object on each line"
        )
    for value in read_json(path, str(path), lambda row: "prompt" in row or "messages" in row):
        if isinstance(value, BadLine):
            raise DataError(str(value))
        row = {"prompt": value.value} if isinstance(value.value, str) else value.value
        prompt, messages = (row.get(k) if isinstance(row, dict) else None for k in PROMPT_KEYS)
        if not isinstance(prompt, str) and not (isinstance(messages, list) and messages):
            raise DataError(
                f"{value.position}: the row has no prompt; a text, or an object with a text "
                "`prompt` or a list `messages` was expected"
            )
        for message in messages if isinstance(messages, list) else ():
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise DataError(
                    f"{value.position}: one of its messages is {str(message)[:60]!r}; an object "
                    "with a `role` and a `content` was expected"
                )
        rows.append(row)
    if not rows:
        raise DataError(f"{path} holds no rows; give one JSON object on each line")
    return rows


PROMPT_KEYS = ("prompt", "messages")


def row_ids(row: Mapping[str, Any], settings: GenerateSettings, tokenizer: Tokenizer) -> list[int]:
    """The ids that a row asks to be continued."""
    kwargs = settings.chat_template_kwargs
    if isinstance(row.get("messages"), list):
        messages = list(row["messages"])
    elif settings.raw:
        return tokenizer.encode(row["prompt"])
    else:
        messages = [{"role": "user", "content": row["prompt"]}]
    if settings.system and messages[0].get("role") != "system":
        messages.insert(0, {"role": "system", "content": settings.system})
    return conversation_ids(tokenizer, messages, kwargs)


def resume_after(output: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many rows `output` answers already, and the bytes of these lines.

    Behind them may be a last line that is broken. Raises `ConfigError` where the lines are not
    those of the rows.
    """
    data = safe_files.read_regular(output, 1 << 34)
    whole, _, rest = data.rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    if rest and not settings_file(output).exists():
        raise ConfigError(
            f"{output} ends in a line that is no answer, and no {settings_file(output).name} is "
            "beside it; give another --output, or move this file away"
        )
    for index, line in enumerate(lines):
        try:
            value = strict_json.loads(line.decode())
        except (ValueError, UnicodeDecodeError):
            value = None
        row = rows[index] if index < len(rows) else None
        own = {k: v for k, v in (row or {}).items() if k not in ANSWER_KEYS}
        given = value if isinstance(value, dict) else {}
        same = {k: v for k, v in given.items() if k not in ANSWER_KEYS} == own
        if row is None or not same or not _is_answered(given):
            raise ConfigError(
                f"{output}:{index + 1} is not an answer to row {index + 1} of the data; give "
                "another --output, or delete this file"
            )
    return len(lines), len(data) - len(rest)


def _is_answered(line: Mapping[str, Any]) -> bool:
    """Whether a line has an answer, or a list of several."""
    several = line.get("responses")
    one_or_more = several if isinstance(several, list) else [line.get("response")]
    return all(isinstance(answer, str) for answer in one_or_more)


def _line(row: Mapping[str, Any], answers: Sequence[GenerateResult]) -> dict[str, Any]:
    if len(answers) == 1:
        (one,) = answers
        reason, tokens = one.finish_reason, one.completion_tokens
        return {**row, "response": one.text, "finish_reason": reason, "completion_tokens": tokens}
    return {
        **row,
        "responses": [answer.text for answer in answers],
        "finish_reason": [answer.finish_reason for answer in answers],
        "completion_tokens": [answer.completion_tokens for answer in answers],
    }
