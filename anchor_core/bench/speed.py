"""`semantic-anchor bench speed`: what each kind of training costs against a plain one, and against other trainers.

Every measurement is a process of its own, and the methods take turns in rounds, so that a slow minute of the machine
meets all of them. What is compared is the ratio of two methods in one round; a figure is the median over the rounds.
Each measurement is kept in `rounds.jsonl` as it is made, and not made again when a run goes on.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import comfyui as in_comfyui

MODELS = ("sandbox", "sd15")
OURS = ("plain", "prior preservation", "anchored", "anchored, bank", "anchored, class kept")
PAIRS = {"sweep": "sweep_over_plain", "references": "references_over_autoencoder"}
"""Method -> its figure, of those that measure what it is over too."""
BARE = ("parts", "diffusers", *PAIRS, "first step")
COMFYUI = {f"comfyui, {method}": method for method in in_comfyui.METHODS}
IMPORT = "comfyui, import"
GROWTH = {"batch": 2, "rank": 4, "side": 2, "pictures": 4, "steps": 3}
"""Option -> the factor by which it is larger in the measurement of a plain training's growth with it."""
_ROOT = Path(__file__).parents[2]
_WORKER = Path(__file__).with_name("speed_worker.py")
_NO_COMFYUI = "no ComfyUI was named; give --comfyui"


@dataclass(frozen=True)
class Spec:
    """What every method trains on.

    Args:
        model: of `MODELS`; sd15 is its full-size network at random weights.
        side: of the latents, in latents.
        dtype: of the weights, in diffusers' hands.
    """

    model: str = "sandbox"
    steps: int = 6
    batch: int = 4
    rank: int = 8
    side: int = 16
    pictures: int = 4
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class Ratio:
    """A figure of the report: of one method over another, of its seconds or its peak memory."""

    method: str
    over: str
    of: str = "seconds"


RATIOS = {
    "anchored_over_parts": Ratio("anchored", "parts"),
    "anchored_over_plain": Ratio("anchored", "plain"),
    "bank_over_plain": Ratio("anchored, bank", "plain"),
    "bank_over_plain_memory": Ratio("anchored, bank", "plain", "peak"),
    "prior_over_plain": Ratio("prior preservation", "plain"),
    "class_kept_over_plain": Ratio("anchored, class kept", "plain"),
    "ours_over_diffusers": Ratio("plain", "diffusers"),
    "ours_over_diffusers_memory": Ratio("plain", "diffusers", "peak"),
    "ours_over_stock": Ratio("comfyui, plain", "comfyui, stock"),
    "anchored_over_stock": Ratio("comfyui, anchored", "comfyui, stock"),
    "banked_over_stock": Ratio("comfyui, anchored, bank", "comfyui, stock"),
    "ours_over_stock_memory": Ratio("comfyui, plain", "comfyui, stock", "peak"),
    **{
        f"guided_over_cfg, {rule}{suffix}": Ratio(f"comfyui, {rule}", f"comfyui, {in_comfyui.CFG}", of)
        for rule in in_comfyui.RULES
        for suffix, of in (("", "seconds"), (", memory", "peak"))
    },
    **{f"growth_with_{option}": Ratio(f"plain, {option}", "plain") for option in GROWTH},
}


def run(
    out: Path,
    spec: Spec = Spec(),
    *,
    rounds: int = 3,
    comfyui: Path | None = None,
    python: Path | None = None,
    methods: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure every method `rounds` times; write `report.json` and `report.md` into `out`, after each round too.

    Args:
        comfyui, python: of the measurements in a real ComfyUI; None to leave them out.
        methods: these alone; what else there is has no figure.

    Raises:
        ValueError: `out` holds measurements of something else.
    """
    out.mkdir(parents=True, exist_ok=True)
    kept = _Kept(out / "rounds.jsonl", {**asdict(spec), "machine": machine()})
    measures = _measures(out, spec, comfyui, python)
    chosen = {name: measure for name, measure in measures.items() if not methods or name in methods}
    missing = [(i, name) for i in range(rounds) for name in chosen if (i, name) not in kept.found]
    if any(name == "anchored, bank" for _, name in missing):
        measures["anchored, bank"]()  # fills it
    with tqdm(total=len(missing), desc="measurements", file=sys.stderr) as bar:
        for number, name in missing:
            bar.set_postfix_str(f"round {number + 1}, {name}")
            try:
                kept.add(number, name, chosen[name]())
            except RuntimeError as error:
                kept.failed[name] = str(error)
                tqdm.write(f"{name}: {error}", file=sys.stderr)
            bar.update()
            write(out, kept, spec, rounds, comfyui)
    return write(out, kept, spec, rounds, comfyui)


def names(comfyui: bool) -> list[str]:
    """Every method, in the order of a round."""
    grown = [f"plain, {option}" for option in GROWTH]
    return [*OURS, *BARE, *grown, *((*COMFYUI, IMPORT) if comfyui else ())]


def machine() -> str:
    """Processor, cores and threads: what a figure is of."""
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores, {threads} threads"


class _Kept:
    """The measurements of a folder, each in a line of a file as soon as it is made."""

    def __init__(self, path: Path, about: Mapping[str, Any]):
        self.path, self.found, self.failed = path, {}, {}
        if not path.is_file():
            path.write_text(json.dumps(about) + "\n", encoding="utf-8")
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(first) != dict(about):
            raise ValueError(f"--out: {path} holds measurements of {first}; give another folder")
        for line in lines:
            row = json.loads(line)
            self.found[row["round"], row["method"]] = row

    def add(self, number: int, method: str, measured: Mapping[str, Any]) -> None:
        row = {"round": number, "method": method, **measured}
        self.found[number, method] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def of(self, method: str, what: str) -> dict[int, float]:
        """By round: seconds of a step, or bytes."""
        rows = {number: row for (number, name), row in self.found.items() if name == method}
        return {n: statistics.median(row[what]) if what == "seconds" else row[what] for n, row in rows.items()}


def _measures(out: Path, spec: Spec, comfyui: Path | None, python: Path | None) -> dict[str, Callable[[], dict]]:
    """Method -> what makes one measurement of it."""

    def own(method: str, **changed: Any) -> Callable[[], dict]:
        told = {**asdict(spec), "root": str(_ROOT), "out": str(out), "method": method, **changed}
        return lambda: _measured([sys.executable, _WORKER, json.dumps(told)])

    found = {name: own(name) for name in (*OURS, *BARE)}
    found |= {f"plain, {name}": own("plain", **{name: by * getattr(spec, name)}) for name, by in GROWTH.items()}
    if comfyui is None:
        return found

    def there(method: str) -> Callable[[], dict]:
        weights = out / "sd15-random.safetensors"
        told = in_comfyui.command(comfyui, python, weights, method, spec.steps, spec.side, spec.device)
        return lambda: in_comfyui.write_weights(weights) and _measured(told)

    found |= {name: there(method) for name, method in COMFYUI.items()}
    found[IMPORT] = lambda: _measured([python, _WORKER.with_name("import_worker.py"), comfyui, _ROOT])
    return found


def _measured(command: Sequence[Any]) -> dict[str, Any]:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-1000:])
    return json.loads(done.stdout.splitlines()[-1])


def write(out: Path, kept: _Kept, spec: Spec, rounds: int, comfyui: Path | None) -> dict[str, Any]:
    """The report of what is measured so far."""
    from ..evaluation.report import write_json

    ratios: dict[str, float | None] = {}
    spread: dict[str, list[float]] = {}
    reasons = {"sd_scripts": "its package is on no index that pip reads; its loop is that of diffusers"}

    def put(name: str, values: Sequence[float], missing: str) -> None:
        ratios[name] = round(statistics.median(values), 4) if values else None
        if values:
            spread[name] = [round(min(values), 4), round(max(values), 4)]
        else:
            reasons[name] = missing

    def why(*methods: str) -> str:
        failed = [kept.failed[name].splitlines()[-1] for name in methods if kept.failed.get(name)]
        absent = _NO_COMFYUI if comfyui is None and any(name.startswith("comfyui") for name in methods) else ""
        return (failed or [absent or "not measured in this run"])[0]

    for name, ratio in RATIOS.items():
        ours, theirs = kept.of(ratio.method, ratio.of), kept.of(ratio.over, ratio.of)
        values = [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys())]
        put(name, values, why(ratio.method, ratio.over))
    for method, name in PAIRS.items():
        pairs = [row["seconds"] for (_, each), row in sorted(kept.found.items()) if each == method]
        put(name, [whole / bare for whole, bare in pairs], why(method))
    rules = {rule: ratios[f"guided_over_cfg, {rule}"] for rule in filter(in_comfyui.has_two_branches, in_comfyui.RULES)}
    known = [ratio for ratio in rules.values() if ratio is not None]
    put("guided_over_cfg", [max(known)] if known else [], why(*(f"comfyui, {rule}" for rule in rules)))
    put("import_seconds", list(kept.of(IMPORT, "seconds").values()), why(IMPORT))
    put("first_step_seconds", list(kept.of("first step", "seconds").values()), why("first step"))
    methods = {}
    measured = {name for _, name in kept.found} - {*PAIRS, IMPORT, "first step"}
    for name in names(comfyui=True):
        if name in measured:
            seconds, peak = kept.of(name, "seconds").values(), kept.of(name, "peak").values()
            methods[name] = {
                "seconds per step": round(statistics.median(seconds), 4),
                "lowest": round(min(seconds), 4),
                "highest": round(max(seconds), 4),
                "peak GB": round(statistics.median(peak) / 1e9, 3),
            }
    result = {
        **asdict(spec), "machine": machine(), "rounds": rounds, "ratios": ratios, "spread": spread,
        "reasons": reasons, "methods": methods,
    }  # fmt: skip
    write_json(out / "report.json", result)
    (out / "report.md").write_text(markdown(result) + "\n", encoding="utf-8")
    return result


def markdown(result: Mapping[str, Any]) -> str:
    """Two tables: what each method takes, and the ratios with their spread over the rounds, or why there is none."""
    lines = [f"{result['model']}, batch {result['batch']}, rank {result['rank']}, latents {result['side']}, "
             f"{result['device']} ({result['machine']}), {result['rounds']} rounds", ""]  # fmt: skip
    if result["methods"]:
        columns = list(next(iter(result["methods"].values())))
        lines += ["| | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
        lines += [
            f"| {name} | " + " | ".join(f"{row[each]:g}" for each in columns) + " |"
            for name, row in result["methods"].items()
        ]
    lines += ["", "| ratio | median | lowest to highest |", "|---|---|---|"]
    for name, value in result["ratios"].items():
        if value is None:
            lines.append(f"| {name} | - | {result['reasons'][name]} |")
        else:
            low, high = result["spread"][name]
            lines.append(f"| {name} | {value:.3g} | {low:.3g} to {high:.3g} |")
    return "\n".join(lines)
