"""The Markdown form of `bench.compile.report`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_HEAD = """# What the Triton kernels compile to

Written by `python -m bench.compile.report` with Triton {triton}; no GPU is involved and nothing
here is a timing. Instructions are counted per element and thread: in the main loop of a matmul (per
element of its weight), in the whole kernel otherwise. "Local" is spilled registers and arrays in
local memory.

## Worst case per kernel and architecture
"""


@dataclass(frozen=True)
class Row:
    """What one case compiled to on one architecture."""

    kernel: str
    config: str
    arch: int
    registers: int = 0
    local_bytes: int = 0
    local_accesses: int = 0
    shared_bytes: int = 0
    shared_limit: int = 0
    instructions: int = 0
    per_element: float | None = None
    limit: float | None = None
    tensor_core: str = ""
    faults: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, int]:
        return self.kernel, self.config, self.arch


def markdown(rows: list[Row], triton: str) -> str:
    """A summary per kernel and architecture, then every configuration."""
    parts = [_HEAD.format(triton=triton), *_summary(rows)]
    faults = [f"- {r.kernel} [{r.config}] sm_{r.arch} {f}" for r in rows for f in r.faults]
    parts += ["", "## Faults", "", *(faults or ["None."])]
    for kernel in dict.fromkeys(row.kernel for row in rows):
        parts += ["", f"## {kernel}", "", *_details([r for r in rows if r.kernel == kernel])]
    return "\n".join(parts) + "\n"


def _summary(rows: list[Row]) -> Iterable[str]:
    yield "| kernel | sm | configurations | instructions per element (limit) | registers |" + (
        " local bytes | shared memory KiB (limit) | tensor core |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for kernel, arch in dict.fromkeys((row.kernel, row.arch) for row in rows):
        group = [r for r in rows if (r.kernel, r.arch) == (kernel, arch)]
        limited = [r for r in group if r.limit is not None and r.per_element is not None]
        counts = ", ".join(
            f"{max(r.per_element or 0 for r in limited if r.limit == limit):.2f} ({limit:g})"
            for limit in sorted({r.limit for r in limited if r.limit is not None})
        )
        products = " ".join(sorted({r.tensor_core for r in group if r.tensor_core}))
        yield (
            f"| {kernel} | {arch} | {len(group)} | {counts or '-'} "
            f"| {max(r.registers for r in group)} | {max(r.local_bytes for r in group)} "
            f"| {max(r.shared_bytes for r in group) / 1024:.1f} ({group[0].shared_limit // 1024}) "
            f"| {products or '-'} |"
        )


def _details(rows: list[Row]) -> Iterable[str]:
    """One line per configuration: instructions per element, registers, KiB of shared memory."""
    columns = sorted({row.arch for row in rows})
    yield "Instructions per element / registers / KiB of shared memory."
    yield ""
    yield "| configuration | " + " | ".join(f"sm_{arch}" for arch in columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for config in dict.fromkeys(row.config for row in rows):
        cells = {row.arch: _cell(row) for row in rows if row.config == config}
        yield f"| {config} | " + " | ".join(cells.get(arch, "") for arch in columns) + " |"


def _cell(row: Row) -> str:
    count = "-" if row.per_element is None else f"{row.per_element:.2f}"
    return f"{count} / {row.registers} / {row.shared_bytes / 1024:.1f}"
