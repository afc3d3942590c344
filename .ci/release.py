"""Build the last commit's sdist and wheel twice, compare them, and describe what they need.

`make release` runs this in the environment of the release's tools, with the Python of the locked
environment as its argument. dist/ then holds both files, a software bill of materials (CycloneDX)
and SHA256SUMS. Nothing is uploaded.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
# Two builds differ in these on purpose: whatever of them reaches the files makes them unequal.
SURROUNDINGS = ({"TZ": "UTC", "LC_ALL": "C"}, {"TZ": "Asia/Kathmandu", "LC_ALL": "C.UTF-8"})
MASK = 0o022  # the modes in a wheel are those that the builder's umask left


def git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def source_tree(folder: Path) -> None:
    """Unpack the files of the last commit."""
    packed = subprocess.run(
        ["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")


def normalised(sdist: Path, epoch: int) -> None:
    """Rewrite an sdist with its members in order, of nobody and of one time: setuptools uses the
    clock's."""
    members: list[tuple[tarfile.TarInfo, bytes]] = []
    with tarfile.open(sdist) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            content = archive.extractfile(member)
            plain = tarfile.TarInfo(member.name)
            plain.type, plain.size, plain.mtime = member.type, member.size, epoch
            plain.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            members.append((plain, content.read() if content else b""))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for plain, data in members:
            archive.addfile(plain, io.BytesIO(data))
    with sdist.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=epoch) as compressed:
        compressed.write(packed.getvalue())


def build(folder: Path, epoch: int, number: int) -> list[Path]:
    """The sdist of the commit and the wheel of that sdist, built below `folder`."""
    environment = os.environ | SURROUNDINGS[number] | {"SOURCE_DATE_EPOCH": str(epoch)}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]

    def run(kind: str, source: Path) -> Path:
        done = subprocess.run(
            [*command, f"--{kind}", str(source)],
            env=environment, umask=MASK, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"Building the {kind} failed:\n{done.stdout}\n{done.stderr}")
        (written,) = (folder / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz")
        return written

    source_tree(folder / "tree")
    sdist = run("sdist", folder / "tree")
    normalised(sdist, epoch)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return [sdist, run("wheel", unpacked)]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(environment: Path) -> None:
    from sbom import bill_of_materials  # needs what only the release's tools bring

    if changed := git("status", "--porcelain", "--untracked-files=no"):
        sys.exit(f"Only a commit is released, and these files differ from it:\n{changed}")
    epoch = int(git("log", "-1", "--format=%ct"))
    with tempfile.TemporaryDirectory() as name:
        once, twice = (build(Path(name) / str(number), epoch, number) for number in range(2))
        for first, second in zip(once, twice, strict=True):
            if first.read_bytes() != second.read_bytes():
                sys.exit(f"Two builds of {first.name} differ: it cannot be made again.")
        shutil.rmtree(DIST, ignore_errors=True)
        DIST.mkdir()
        files = [Path(shutil.copy(path, DIST)) for path in once]
    bill = DIST / files[1].name.replace("-py3-none-any.whl", ".cdx.json")
    bill.write_text(bill_of_materials(environment, files), encoding="utf-8")
    lines = [f"{digest(path)}  {path.name}\n" for path in sorted([*files, bill])]
    (DIST / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
    print(f"dist/ of {git('rev-parse', '--short=10', 'HEAD')}, built twice with the same bytes:")
    print("".join(lines), end="")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
