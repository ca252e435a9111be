"""A real ComfyUI for the tests: found, started on a folder of its own with the pack installed, and asked over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACK = "semantic-anchor"


def find() -> tuple[Path, Path] | str:
    """ComfyUI's folder and its interpreter, or why there is none.

    The folder is $COMFYUI_PATH, else comfy-cli's default workspace; the interpreter $COMFYUI_PYTHON, else that of the
    `.venv` or `venv` in that folder.
    """
    named = os.environ.get("COMFYUI_PATH")
    folders = [Path(named)] if named else [_recorded_workspace(), Path.home() / "comfy" / "ComfyUI"]
    folder = next((folder for folder in folders if folder is not None and (folder / "main.py").is_file()), None)
    if folder is None:
        return f"COMFYUI_PATH is {named!r}, which holds no main.py" if named else "no ComfyUI: set COMFYUI_PATH"
    named = os.environ.get("COMFYUI_PYTHON")
    inside = ("bin/python", "Scripts/python.exe")
    places = [Path(named)] if named else [folder / env / place for env in (".venv", "venv") for place in inside]
    python = next((place for place in places if place.is_file()), None)
    return (folder, python) if python else f"no interpreter for {folder}: set COMFYUI_PYTHON"


def _recorded_workspace() -> Path | None:
    """The default workspace in comfy-cli's own settings."""
    places = (Path.home() / ".config/comfy-cli", Path.home() / "Library/Application Support/comfy-cli")
    for file in (place / "config.ini" for place in places):
        for line in file.read_text().splitlines() if file.is_file() else ():
            key, _, value = line.partition("=")
            if key.strip() in ("default_workspace", "recent_workspace") and value.strip():
                return Path(value.strip())
    return None


def run_script(script: str | Path, *arguments: str | Path, folder: Path) -> None:
    """`script COMFYUI arguments ...` in `folder`, under ComfyUI's interpreter; AssertionError with its messages."""
    comfyui, python = find()
    done = subprocess.run(
        [str(part) for part in (python, script, comfyui, *arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def results_of(script: Any, folder: Path, *options: str) -> dict[str, Any]:
    """What a check script (the module) writes of the pack: `script COMFYUI PACK OUTPUT options ...`."""
    output = folder / "results.json"
    run_script(script.__file__, ROOT, output, *options, folder=folder)
    return json.loads(output.read_text())


def install_pack(target: Path) -> Path:
    """A copy of the pack at `target`, with random weights where the repository holds none yet."""
    for name in ("anchor_core", "nodes", "web", "locales", "example_workflows", "subgraphs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "__init__.py", target)
    return target


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class ComfyServer:
    """`main.py --cpu` on a free port of 127.0.0.1, with input, output and custom_nodes under `base`.

    With COMFYUI_DEVICE=npu in the environment it computes on the second device of `second_device.py` instead.
    """

    def __init__(self, comfyui: Path, python: Path, base: Path, *options: str | Path):
        self.port = free_port()
        self.base = base
        for name in ("input", "output", "models/loras", "custom_nodes"):
            (base / name).mkdir(parents=True, exist_ok=True)
        self.log = base / "server.log"
        start = [comfyui / "main.py", "--cpu"]
        if os.environ.get("COMFYUI_DEVICE") == "npu":
            start = [Path(__file__).with_name("on_second_device.py"), comfyui / "main.py", "--force-fp32"]
        command = [python, *start, "--port", self.port, "--listen", "127.0.0.1"]
        command += ["--base-directory", base, "--database-url", f"sqlite:///{base}/comfyui.db", "--disable-auto-launch"]
        command += options
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=comfyui,
                # The tensors are small: where cores are shared, threads that wait for each other cost minutes.
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self._wait()

    def _wait(self) -> None:
        for _ in range(1500):
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, data: dict[str, Any]) -> tuple[int, Any]:
        """Status and answer; a refusal (HTTP 400) is an answer too."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                body = answer.read()
                return answer.status, json.loads(body) if body else None
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or "null")

    def queue(self, prompt: dict[str, Any]) -> str:
        """The id of a queued prompt in API form; ValueError with the node errors if it is refused."""
        status, answer = self.post("/prompt", {"prompt": prompt})
        if status != 200:
            errors = answer["node_errors"] or {"prompt": {"errors": [answer["error"]]}}
            details = [f"{e['message']}: {e['details']}" for node in errors.values() for e in node["errors"]]
            raise ValueError("; ".join(details))
        return answer["prompt_id"]

    def wait(self, prompt_id: str, seconds: float = 300) -> dict[str, Any]:
        """The history entry of a prompt that has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None and entry["status"]["status_str"] in ("success", "error"):
                return entry
            time.sleep(0.1)
        raise TimeoutError(f"prompt {prompt_id} did not end in {seconds} s")

    def run(self, prompt: dict[str, Any], seconds: float = 300) -> dict[str, Any]:
        """The outputs of a prompt by node; RuntimeError with the node's message if it fails."""
        entry = self.wait(self.queue(prompt), seconds)
        message = failure(entry)
        if message is not None:
            raise RuntimeError(message)
        return entry["outputs"]

    def picture(self, output: dict[str, Any]) -> bytes:
        """The file of the first picture of a node's output."""
        file = output["images"][0]
        folder = "temp" if file["type"] == "temp" else file["type"]
        return (self.base / folder / file["subfolder"] / file["filename"]).read_bytes()


def failure(entry: dict[str, Any]) -> str | None:
    """How a prompt failed: the exception's message, `interrupted`, or None."""
    for kind, data in entry["status"]["messages"]:
        if kind == "execution_error":
            return data["exception_message"].strip()
        if kind == "execution_interrupted":
            return "interrupted"
    return None


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """A saved workflow (UI format 0.4) as a prompt: widget values in the order of the node's inputs, then the links."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote") or node["mode"] != 0:
            continue
        info = object_info[node["type"]]
        specs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        values, inputs = list(node.get("widgets_values") or []), {}
        for section in ("required", "optional"):
            for name in info["input_order"].get(section, []):
                kind, options = specs[name][0], (specs[name] + [{}])[1]
                if options.get("forceInput"):
                    continue
                if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                    inputs[name] = values.pop(0)
                    if options.get("control_after_generate"):
                        values.pop(0)
                elif kind == "COMFY_DYNAMICCOMBO_V3":
                    chosen = inputs[name] = values.pop(0)
                    (option,) = (each for each in options["options"] if each["key"] == chosen)
                    parts = [part for each in option["inputs"].values() for part in each]
                    inputs |= {f"{name}.{part}": values.pop(0) for part in parts}
        inputs |= {slot["name"]: links[slot["link"]] for slot in node.get("inputs", []) if slot.get("link") is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
