"""Two addresses that reach each other over a link meet and train, as two machines do.

Network namespaces stand for machines. They need root and the program `ip`; without both these tests
are skipped, and say so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.distributed.test_processes import ROOT, folder, words

__all__ = ["folder"]

NAMES = ("engine-test-a", "engine-test-b")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[tuple[str, ...]]:
    """Two namespaces, 10.231.7.1 and 10.231.7.2, with a link between them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the program ip")
    try:
        ip("netns", "add", NAMES[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine allows no network namespaces: {error.stderr.decode().strip()}")
    try:
        ip("netns", "add", NAMES[1])
        ends = ("veth-a", "netns", NAMES[0], "type", "veth", "peer", "veth-b", "netns", NAMES[1])
        ip("link", "add", *ends)
        for number, name in enumerate(NAMES, 1):
            link = f"veth-{'ab'[number - 1]}"
            ip("-n", name, "addr", "add", f"10.231.7.{number}/24", "dev", link)
            for each in (link, "lo"):
                ip("-n", name, "link", "set", each, "up")
        yield NAMES
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_machines_meet_and_train(machines: tuple[str, ...], folder: Path) -> None:
    """torchrun's own rendezvous; each machine's process says over which link it speaks."""
    started = []
    for number, name in enumerate(machines):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": f"veth-{'ab'[number]}",
        }
        launcher = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
        meeting = ["--rdzv-endpoint", "10.231.7.1:29511", "--rdzv-id", "test"]
        local = ["--local-addr", f"10.231.7.{number + 1}"]
        local += ["--rdzv-conf", f"is_host={int(number == 0)}"]
        command = [sys.executable, "-m", "torch.distributed.run", *launcher, *meeting, *local]
        started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command, "-m", "cli.main", *words(folder, "two")],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    told = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert sum("Trained adapter saved to" in text for text in told) == 1
    assert (folder / "two" / "adapter" / "adapter_model.safetensors").exists()
