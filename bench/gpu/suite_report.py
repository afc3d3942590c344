"""The results of `bench.gpu.suite` as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.benchmark.report import markdown, seconds

Outcomes = Sequence[Mapping[str, Any]]


def render(results: Mapping[str, Any]) -> str:
    """Every section as a table, failures below."""
    machine = ", ".join(f"{k} {v}" for k, v in results["machine"].items() if v is not None)
    title = "# GPU suite" + (" (smoke: tiny sizes, no measurement)" if results["smoke"] else "")
    parts = [f"{title}\n\n{machine}; {results.get('seconds', 0)} s in all.\n"]
    for name, outcomes in results["sections"].items():
        done = [o for o in outcomes if o["data"] is not None and "skipped" not in o["data"]]
        body = _TABLES[name](done) if done else ""
        parts.append(f"## {name}\n\n{body}{_notes(outcomes)}")
    return "\n".join(parts)


def _notes(outcomes: Outcomes) -> str:
    lines = [f"- {o['item']}: {o['error']}\n" for o in outcomes if o["error"] is not None]
    skipped = {o["data"]["skipped"] for o in outcomes if o["data"] and "skipped" in o["data"]}
    lines += [f"- skipped, {reason}\n" for reason in sorted(skipped)]
    return "\nNot measured:\n\n" + "".join(lines) if lines else ""


def _roofline(done: Outcomes) -> str:
    data = done[0]["data"]
    rows = [["copy", f"{data['bandwidth'] / 1e9:.4g} GB/s"]]
    rows += [[f"product, {k}", f"{v / 1e12:.4g} TFLOP/s"] for k, v in data["flops"].items()]
    return markdown(["limit", "measured"], rows)


def _accuracy(done: Outcomes) -> str:
    rows = []
    for outcome in done:
        data = outcome["data"]
        outputs = data.get("outputs", {})
        worst = max(
            outputs.items(),
            key=lambda entry: entry[1]["ours"] / (2 * entry[1]["plain"] + entry[1]["ulp"] or 1.0),
            default=None,
        )
        figures = ["", "", ""]
        if worst is not None:
            figures = [worst[0], f"{worst[1]['ours']:.2e}", f"{worst[1]['plain']:.2e}"]
        elif "codes_apart" in data:
            figures = ["codes apart", f"{data['codes_apart']:.1e}", ""]
        rows.append([outcome["item"], *figures, "yes" if data["passed"] else "NO"])
    return markdown(["op", "worst output", "our error", "plain torch's", "within the rule"], rows)


def _steps(done: Outcomes) -> str:
    rows = []
    for outcome in done:
        data = outcome["data"]
        used, peak = data["utilisation"], data["peak_memory_bytes"]
        rows.append(
            [
                outcome["item"],
                seconds(data["seconds"]),
                f"{data['tokens_per_second']:,.0f}",
                "" if used is None else f"{used:.1%}",
                "" if peak is None else f"{peak / 2**30:.2f}",
            ]
        )
    return markdown(["step", "time", "tokens/s", "model FLOP utilisation", "peak GiB"], rows)


def _train(done: Outcomes) -> str:
    rows = []
    for outcome in done:
        data = outcome["data"]
        peak, error = data["peak_memory_bytes"], data["plan_error"]
        rows.append(
            [
                outcome["item"],
                data["policy"],
                seconds(data["seconds"]),
                f"{data['tokens_per_second']:,.0f}",
                "" if peak is None else f"{peak / 2**30:.2f}",
                f"{data['planned_bytes'] / 2**30:.2f}",
                "" if error is None else f"{error:+.1%}",
            ]
        )
    headings = ["run", "recompute", "time", "tokens/s", "peak GiB", "planned GiB", "plan"]
    return markdown(headings, rows)


def _graphs(done: Outcomes) -> str:
    rows = []
    for outcome in done:
        data = outcome["data"]
        steps = (data["launched"], data["recorded"])
        peaks = [
            "" if step["peak_memory_bytes"] is None else f"{step['peak_memory_bytes'] / 2**30:.2f}"
            for step in steps
        ]
        rows.append(
            [
                outcome["item"],
                *(seconds(step["seconds"]) for step in steps),
                f"{data['speedup']:.2f}",
                *peaks,
                f"{data['losses_apart']:.1e}",
            ]
        )
    return markdown(
        ["step", "launched", "recorded", "ratio", "peak GiB", "recorded", "losses apart"], rows
    )


def _profile(done: Outcomes) -> str:
    text = ""
    for outcome in done:
        data = outcome["data"]
        if "kinds" not in data:
            waits = f"{data['two_layers']} with two layers, {data['four_layers']} with four"
            text += f"Waits of the host in one step: {waits}.\n\n"
            continue
        total = data["device_seconds"] or 1.0
        rows = [[kind, seconds(t), f"{t / total:.1%}"] for kind, t in data["kinds"].items()]
        text += (
            f"{outcome['item']}: {seconds(data['device_seconds'])} of device time in "
            f"{seconds(data['profiled_wall_seconds'])}, {data['launches']} launches, "
            f"{data['launches_per_layer']:.1f} per layer.\n\n"
            + markdown(["kind", "time", "share"], rows)
            + "\n"
            + markdown(
                ["kernel", "calls", "time"],
                [[t["kernel"], str(t["count"]), seconds(t["seconds"])] for t in data["top"]],
            )
            + "\n"
        )
    return text


def _ops(done: Outcomes) -> str:
    names = list(
        dict.fromkeys(n for o in done for n in (*o["data"]["others"], *o["data"]["failed"]))
    )
    rows = []
    for outcome in done:
        data = outcome["data"]
        compute = data["bound"] == "compute"
        speed = (
            f"{data['tflops']:.3g} TFLOP/s"
            if compute
            else (f"{data['gigabytes_per_second']:.4g} GB/s")
        )
        ratios = [f"{data['ratios'][name]:.2f}" if name in data["ratios"] else "" for name in names]
        share = f"{data['roofline_share']:.0%}"
        rows.append([outcome["item"], seconds(data["seconds"]), speed, share, *ratios])
    headings = ["op", "time", "rate", "of limit", *(f"{name} / ours" for name in names)]
    return markdown(headings, rows)


_TABLES: dict[str, Callable[[Outcomes], str]] = {
    "roofline": _roofline,
    "accuracy": _accuracy,
    "steps": _steps,
    "train": _train,
    "graphs": _graphs,
    "profile": _profile,
    "peers": _steps,
    "unsloth": _steps,
    "torchtune": _steps,
    "ops": _ops,
}
