"""`make test-long`: the long tests file by file, each in a process of its own, so that one that fails ends no other.

    python -m tests.long_run [FILE OR FOLDER ...]
    python -m tests.long_run --docs

What passed is not run again as long as no Python file has changed. Their output goes to `out/long/`, with a
`summary.md` of what they printed, which `--docs` writes into docs/RELIABILITY.md.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT, DOCS = ROOT / "out/long", ROOT / "docs/RELIABILITY.md"
SECONDS = 5400
"""The most that one test may take: two hundred trainings, on two cores that others use too."""

COUNT = re.compile(r"^(?:.+: [\d,]+ (?:cases|trainings)\b.*|\d+ inputs of .+|loading a LoRA of .+)$")
TEST = re.compile(r"^tests/\S+::\w+(?:\[[^]]*\])? ")
"""What pytest writes before a test's first line."""
BEGIN, END = "<!-- made by python -m tests.long_run --docs: begin -->", "<!-- end -->"


def collect(places: list[str]) -> dict[str, int]:
    """The files that hold long tests, and how many."""
    command = [sys.executable, "-m", "pytest", "-m", "long", "--collect-only", "-q", *places]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    tests = [line for line in told.stdout.splitlines() if "::" in line and not line.startswith(" ")]
    if not tests:
        sys.exit(told.stdout + told.stderr)
    files = [test.partition("::")[0] for test in tests]
    return {file: files.count(file) for file in dict.fromkeys(files)}


def changed() -> float:
    """When a Python file was changed last."""
    folders = (ROOT / "anchor_core", ROOT / "nodes", ROOT / "tests")
    return max(file.stat().st_mtime for folder in folders for file in folder.rglob("*.py"))


def run(file: str) -> dict:
    """The results of a file: what its tests printed and how many passed, failed and were skipped."""
    log = (OUT / file.replace("/", "+")).with_suffix(".log")
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", "long", "-v", "-s", "-rs", f"--timeout={SECONDS}", file]
    with log.open("w") as output:
        status = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT).returncode
    lines = [TEST.sub("", line) for line in log.read_text(errors="replace").splitlines()]
    ended = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", lines[-1] if lines else "")
    return {
        "file": file,
        "passed": status == 0,
        "ended": ", ".join(ended) or f"exit status {status}",
        "printed": [line for line in lines if COUNT.match(line)],
        "seconds": round(time.monotonic() - began),
        "at": time.time(),
    }


def table(results: list[dict]) -> str:
    rows = ["| file | printed | tests | seconds |", "|---|---|---|---|"]
    for each in results:
        printed = "<br>".join(line.replace("|", "\\|") for line in each["printed"])
        rows.append(f"| `{each['file']}` | {printed} | {each['ended']} | {each['seconds']:,} |")
    return "\n".join(rows) + "\n"


def main(arguments: list[str]) -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    state, since = OUT / "results.json", changed()
    known = json.loads(state.read_text()) if state.is_file() else {}
    if arguments == ["--docs"]:
        before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
        text = f"{before}{BEGIN}\n{table(sorted(known.values(), key=lambda each: each['file']))}{END}"
        DOCS.write_text(text + rest.partition(END)[2], encoding="utf-8")
        return 0
    files = collect(arguments)
    for file in files:
        if known.get(file, {}).get("passed") and known[file]["at"] > since:
            continue
        print(f"{file}: {files[file]} tests ...", flush=True)
        known[file] = run(file)
        print("\n".join([*known[file]["printed"], f"{known[file]['ended']} in {known[file]['seconds']} s"]), flush=True)
        state.write_text(json.dumps(known, indent=1))
    results = [known[file] for file in files]
    (OUT / "summary.md").write_text(table(results))
    failed = [each["file"] for each in results if not each["passed"]]
    print(f"{len(results)} files, {len(failed)} failed {failed or ''}; counts are in {OUT / 'summary.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
