"""Tokenizers whose expressions may take long: equal ids, an end in time, nothing left behind."""

import contextlib
import os
import random
import threading
import time
from pathlib import Path

import psutil
import pytest
from tokenizers import AddedToken, Regex
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

from engine.errors import CheckpointError, DataError
from engine.tokenization.tokenizer import Tokenizer
from engine.tokenization.vocabularies import tokenizer_process

LETTERS = "abcdefghijklmnopqrstuvwxyz é!"
QUADRATIC = r"(?:[a-y]|q)+\d|z"
"""Reads what is left of a text at every character: a long one takes for ever."""


def backend(pattern: str = QUADRATIC) -> Backend:
    made = Backend(BPE({text: index for index, text in enumerate(LETTERS)}, []))
    made.pre_tokenizer, made.decoder = Split(Regex(pattern), "isolated"), Fuse()
    made.add_special_tokens([AddedToken("<s>", special=True)])
    made.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return made


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """A tokenizer that has half a second for a text."""
    monkeypatch.setattr(tokenizer_process, "_SECONDS", 0.5)
    monkeypatch.setattr(tokenizer_process, "_RATE", 1e9)
    return Tokenizer(backend(), {"bos_token": "<s>"}, name="hostile")


EARLIER: set[int] = set()
"""Processes that other tests of this process have left running."""


@pytest.fixture(autouse=True)
def others() -> None:
    EARLIER.clear()
    EARLIER.update(process.pid for process in psutil.Process().children())


def children() -> list[psutil.Process]:
    """The tokenizers' processes that this test has started and that run."""
    running = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ends; a zombie is one of these
            ours = "backend = Tokenizer" in " ".join(process.cmdline())
            running += [process] if ours and process.pid not in EARLIER else []
    return running


def test_what_the_process_makes_is_what_the_library_makes(slow: Tokenizer) -> None:
    plain, draw = backend(), random.Random(3)
    plain.post_processor = None
    texts = ["", "<s>a", *("".join(draw.choices(LETTERS, k=draw.randint(1, 60))) for _ in "12345")]
    assert slow.prefix_ids == [plain.token_to_id("<s>")]
    for text, expected in zip(texts, plain.encode_batch(texts), strict=True):
        assert slow.encode_with_offsets(text) == (expected.ids, expected.offsets)
        assert slow.encode(text) == [*slow.prefix_ids, *expected.ids]
        assert slow.decode(expected.ids, skip_special_tokens=False) == text
    encodings = slow.encodings(texts)
    for made, expected in zip(encodings, plain.encode_batch(texts), strict=True):
        assert [made.char_to_token(at) for at in range(60)] == [
            expected.char_to_token(at) for at in range(60)
        ]
    assert slow.encode_batch(texts) == [encoding.ids for encoding in encodings]


def test_a_text_that_takes_too_long_leaves_no_thread_and_no_process(slow: Tokenizer) -> None:
    slow.encode("abc")
    threads, endless = threading.active_count(), "a" * 200_000
    for _ in range(2):
        begun = time.monotonic()
        with pytest.raises(CheckpointError, match=r"hostile: its tokenizer needs more than .* s"):
            slow.encode(endless)
        assert time.monotonic() - begun < 10
        assert not children()
    assert threading.active_count() == threads
    assert slow.encode("abc") == [*slow.prefix_ids, 0, 1, 2]


def test_many_at_once_have_one_process(slow: Tokenizer) -> None:
    failed: list[CheckpointError] = []

    def ask() -> None:
        try:
            slow.encode("a" * 200_000)
        except CheckpointError as error:
            failed.append(error)

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in asking):
        most = max(most, len(children()))
        time.sleep(0.05)
    assert (len(failed), most) == (3, 1)


def test_a_tokenizer_that_is_gone_takes_its_process_along() -> None:
    tokenizer = Tokenizer(backend(), {}, name="hostile")
    tokenizer.encode("abc")
    assert len(children()) == 1
    del tokenizer
    assert not children()


@pytest.mark.parametrize("pattern", [QUADRATIC, "z"])
@pytest.mark.parametrize(
    "text", ["a\udcffb", "\ud83d", b"\xe9t\xe9".decode(errors="surrogateescape")]
)
def test_half_a_character_is_named(text: str, pattern: str) -> None:
    tokenizer = Tokenizer(backend(pattern), {})
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["ok", text])):
        with pytest.raises(DataError, match=r"half a character.*UTF-8"):
            encode(text)


def test_the_process_gets_no_secrets(slow: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_CANARY", "canary")
    slow.encode("abc")
    (process,) = children()
    environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    assert b"canary" not in environment
    assert os.getsid(process.pid) != os.getsid(0)
