import gc
import os
import signal
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch

from engine.errors import CheckpointError
from engine.model_sources.safetensors.file import SafetensorsFile, SafetensorsWriter, save_file
from engine.model_sources.safetensors.header import DTYPES
from engine.storage import durable


def sample(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.randn(shape) * 50
    return values > 0 if dtype == torch.bool else values.abs().to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(left, right)


@pytest.fixture
def mixed() -> dict[str, torch.Tensor]:
    """One tensor of every type, with odd sizes so that alignment is not given for free."""
    tensors = {f"t.{name}": sample(dtype, (3, 5)) for name, dtype in DTYPES.items()}
    tensors |= {"bytes": sample(torch.uint8, (7,)), "scalar": torch.tensor(2.5)}
    return tensors


def test_the_library_reads_what_is_written(tmp_path: Path, mixed: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "a.safetensors"
    save_file(mixed, path, {"format": "pt"})
    theirs = safetensors.torch.load_file(path)
    assert theirs.keys() == mixed.keys()
    assert all(same(theirs[name], mixed[name]) for name in mixed)
    with safetensors.safe_open(path, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_what_the_library_writes_is_read(tmp_path: Path, mixed: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(mixed, path, {"format": "pt", "ü": "ö"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt", "ü": "ö"}
    assert sorted(file.keys()) == sorted(mixed)
    for name, tensor in mixed.items():
        assert file.dtype(name) == tensor.dtype
        assert file.shape(name) == tuple(tensor.shape)
        assert same(file.tensor(name), tensor)


def test_a_file_of_unaligned_tensors_is_read(tmp_path: Path) -> None:
    header = (
        b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},'
        b'"b":{"dtype":"F32","shape":[2],"data_offsets":[3,11]}}'
    )
    values = torch.tensor([1.5, -2.0])
    body = b"abc" + values.numpy().tobytes()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)
    assert torch.equal(SafetensorsFile(path).tensor("b"), values)


def test_tensors_are_views_of_the_file_and_outlive_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3)}, path)
    file = SafetensorsFile(path)
    first, again = file.tensor("a"), file.tensor("a")
    assert first.data_ptr() == again.data_ptr()
    del file
    gc.collect()
    assert first.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_writing_to_a_view_does_not_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    before = path.read_bytes()
    SafetensorsFile(path).tensor("a").fill_(7)
    assert path.read_bytes() == before


def test_released_pages_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    value = torch.randn(100_000)
    save_file({"a": value}, path)
    file = SafetensorsFile(path)
    view = file.tensor("a")
    assert torch.equal(view, value)
    file.release("a")
    assert torch.equal(view, value)


def resident_file_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssFile")).split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_released_pages_leave_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(8_000_000)}, path)
    file = SafetensorsFile(path)
    start = resident_file_kib()
    assert float(file.tensor("a").sum()) == 8_000_000
    assert resident_file_kib() - start > 25_000
    file.release("a")
    assert resident_file_kib() - start < 5_000


def test_non_contiguous_and_shared_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": base.t(), "row": base[1], "whole": base}
    save_file(tensors, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert all(torch.equal(file.tensor(name), tensor) for name, tensor in tensors.items())


def test_every_tensor_is_aligned_to_its_type(
    tmp_path: Path, mixed: dict[str, torch.Tensor]
) -> None:
    save_file(mixed, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    for name in mixed:
        assert file.tensor(name).data_ptr() % file.dtype(name).itemsize == 0


def test_bytes_do_not_depend_on_the_run(tmp_path: Path, mixed: dict[str, torch.Tensor]) -> None:
    save_file(mixed, tmp_path / "a")
    save_file(mixed, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_without_tensors_is_possible(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a", {"format": "pt"})
    assert SafetensorsFile(tmp_path / "a").keys() == []
    assert safetensors.torch.load_file(tmp_path / "a") == {}


def test_mode_is_what_the_umask_allows(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save_file({"a": torch.ones(1)}, tmp_path / "a")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_the_writer_takes_tensors_in_any_order(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3).bfloat16(), "b": torch.randn(2, 2), "c": torch.ones(1).half()}
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path / "x", specs) as writer:
        for name in ("c", "a", "b"):
            writer.write(name, tensors[name])
            assert not (tmp_path / "x").exists()
    theirs = safetensors.torch.load_file(tmp_path / "x")
    assert all(same(theirs[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("other", torch.zeros(2), "was not announced"),
        ("a", torch.zeros(3), r"announced was torch.float32 \[2\]"),
        ("a", torch.zeros(2).half(), "torch.float16"),
    ],
)
def test_the_writer_refuses_what_was_not_announced(
    tmp_path: Path, name: str, tensor: torch.Tensor, words: str
) -> None:
    def write() -> None:
        with SafetensorsWriter(tmp_path / "x", {"a": (torch.float32, (2,))}) as writer:
            writer.write(name, tensor)

    with pytest.raises(ValueError, match=words):
        write()
    assert list(tmp_path.iterdir()) == []


def test_the_writer_refuses_a_second_or_a_missing_tensor(tmp_path: Path) -> None:
    specs = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}

    def write(names: str) -> None:
        with SafetensorsWriter(tmp_path / "x", specs) as writer:
            for name in names:
                writer.write(name, torch.zeros(2))

    with pytest.raises(ValueError, match="'a' was written before"):
        write("aa")
    with pytest.raises(ValueError, match=r"never written to .*: b"):
        write("a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("../x", torch.zeros(1)),
        ("", torch.zeros(1)),
        ("a b", torch.zeros(1)),
        ("__metadata__", torch.zeros(1)),
        ("x" * 513, torch.zeros(1)),
        ("a", torch.zeros(0)),
        ("a", torch.zeros((1,) * 9)),
        ("a", torch.zeros(1, dtype=torch.complex64)),
        ("a", torch.zeros(1).to(torch.float8_e4m3fnuz)),
    ],
)
def test_what_would_not_be_read_back_is_not_written(
    tmp_path: Path, name: str, tensor: torch.Tensor
) -> None:
    with pytest.raises(ValueError):
        save_file({name: tensor}, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_metadata_must_be_strings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="strings to strings"):
        save_file({"a": torch.zeros(1)}, tmp_path / "x", {"step": 1})  # type: ignore[dict-item]


def test_an_unknown_name_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x")
    file = SafetensorsFile(tmp_path / "x")
    for ask in (file.tensor, file.shape, file.dtype, file.release):
        with pytest.raises(CheckpointError, match="holds no tensor named 'b'"):
            ask("b")


@pytest.mark.parametrize("reserve", [True, False])
def test_a_disk_that_fills_up_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reserve: bool
) -> None:
    resource = pytest.importorskip("resource", reason="file size limits exist on POSIX only")
    path = tmp_path / "x"
    save_file({"a": torch.zeros(1)}, path)
    before = path.read_bytes()
    if not reserve:  # a file system that cannot reserve finds out while writing
        monkeypatch.setattr(durable, "_reserve", lambda descriptor, size: None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(CheckpointError, match=r"Cannot write .* File too large"):
            save_file({"a": torch.zeros(20_000), "b": torch.zeros(20_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has to exist"):
        save_file({"a": torch.zeros(1)}, tmp_path / "no" / "x")
