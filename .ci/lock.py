"""Write requirements.lock and release_tools.lock: pins with the SHA-256 of each of their files.

`make lock` runs this in the environment of the release's tools. The index says the hashes; of torch
there is more than one build under one version, and the index of the CPU build is set on some
machines only, so what the lock holds of it is kept and the wheel that pip takes here is added.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAD = """\
# The versions of {source} with the SHA-256 of every file that the index has of them.
# Written by `make lock`, used by `make locked`; CONTRIBUTING.md says how.
"""
ENTRY = re.compile(
    r"^(?P<pin>[^#\s]+==[^\s]+)(?P<hashes>(?: \\\n +--hash=sha256:[0-9a-f]{64})*)", re.M
)


def entries(text: str) -> dict[str, list[str]]:
    """`name==version` -> hashes, in the order of a lock file."""
    return {
        match["pin"]: re.findall("[0-9a-f]{64}", match["hashes"]) for match in ENTRY.finditer(text)
    }


def compiled(source: Path, *options: str) -> str:
    """uv's lock of the pins in `source`."""
    command = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "--quiet"]
    command += ["--no-config", "--universal", "--generate-hashes", "--no-annotate", "--no-header"]
    version = ".".join(map(str, sys.version_info[:3]))
    command += ["--python-version", version, *options, str(source)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def torch_here(pin: str) -> list[str]:
    """The hash of the file that pip takes for `pin` on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", folder, pin], check=True)
        (wheel,) = Path(folder).iterdir()
        with wheel.open("rb") as file:
            return [hashlib.file_digest(file, "sha256").hexdigest()]


def listed(pins: dict[str, list[str]]) -> str:
    """The text of a lock file."""
    return "".join(
        " \\\n".join([pin, *(f"    --hash=sha256:{value}" for value in hashes)]) + "\n"
        for pin, hashes in pins.items()
    )


def write(target: Path, source: Path, text: str) -> None:
    """Write a lock file with its head, and say how much is in it."""
    target.write_text(HEAD.format(source=source.name) + text, encoding="utf-8")
    print(f"{target.relative_to(ROOT)}: {text.count('==')} pins, {text.count('sha256')} files")


def main() -> None:
    source, target = ROOT / "constraints.txt", ROOT / "requirements.lock"
    pins = entries(compiled(source, "--no-deps"))
    earlier = entries(target.read_text(encoding="utf-8")) if target.exists() else {}
    (torch,) = (pin for pin in pins if pin.startswith("torch=="))
    pins[torch] = sorted({*pins[torch], *earlier.get(torch, []), *torch_here(torch)})
    write(target, source, listed(pins))
    tools = ROOT / ".ci" / "release_tools.in"
    write(tools.with_suffix(".lock"), tools, compiled(tools))


if __name__ == "__main__":
    main()
