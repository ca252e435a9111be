"""On a device that is not the CPU, which is where users are: no tensor stays behind on the wrong one.

One in pure Python stands for it (`tests/comfyui/second_device.py`). It computes what the CPU does: what differs from
the CPU's results is a tensor taken from the wrong place, and what mixes the two is an error.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from anchor_core.adapters.file import load_adapter
from tests.backends.test_contract_comfyui import WHOLE
from tests.comfyui import check_contract, comfy_server, second_device

VERBS = comfy_server.ROOT / "tests/commands/verbs_on_device.py"
found = comfy_server.find()
needs_comfyui = pytest.mark.skipif(isinstance(found, str), reason=str(found))


def run_verbs(device: str, folder, *options: str) -> None:
    done = subprocess.run(
        [sys.executable, VERBS, device, folder, *options], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(comfy_server.ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def check_same_files(ours, theirs) -> None:
    """The same adapters and pictures; plots and reports tell seconds too, and are there.

    What a cache holds is named by a network's last bits, which are those of a device.
    """
    files, own_files = (
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.parent.name != "cache"}
        for folder in (theirs, ours)
    )
    assert files == own_files
    for file in sorted(files):
        if file.suffix == ".safetensors":
            own, other = load_adapter(ours / file)[0], load_adapter(theirs / file)[0]
            assert own.keys() == other.keys()
            for name, tensor in other.items():
                assert torch.allclose(own[name], tensor, rtol=1e-3, atol=1e-4), f"{name} of {file}"
        if file.suffix == ".png" and file.name != "report.png":
            own, other = (np.asarray(Image.open(folder / file)).astype(int) for folder in (ours, theirs))
            assert abs(own - other).max() <= 2, file


@pytest.mark.parametrize("options", [["--some"], pytest.param(["--all"], marks=pytest.mark.long)], ids=["some", "all"])
def test_the_command_line_computes_the_same(tmp_path, options):
    for device in ("cpu", second_device.NAME):
        run_verbs(device, tmp_path / device, *options)
    check_same_files(tmp_path / second_device.NAME, tmp_path / "cpu")


@needs_comfyui
@pytest.mark.parametrize(
    "families", [["sd1"], pytest.param(check_contract.FAMILIES, marks=pytest.mark.long)], ids=["sd1", "every family"]
)
def test_the_contract_in_comfyui(tmp_path, families):
    told = comfy_server.results_of(check_contract, tmp_path, "--device", *families)
    del told["refused"]
    expected = [*WHOLE, *check_contract.AROUND_ELSEWHERE]
    assert {family: list(checks) for family, checks in told.items()} == dict.fromkeys(families, expected)
    assert not [f"{family}: {text}" for family, checks in told.items() for text in checks.values() if text]


@needs_comfyui
@pytest.mark.long
def test_the_workflows_in_a_server():
    script = comfy_server.ROOT / "tests/nodes/test_workflows.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", script], capture_output=True, text=True,
        env={**os.environ, "COMFYUI_DEVICE": "npu"}, cwd=comfy_server.ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def test_what_a_card_refuses_is_refused():
    here = torch.ones(2)
    with second_device.device() as device:
        there = torch.ones(2, device=device)
        assert there.device.type == "npu" and (there + 1).cpu().tolist() == [2, 2]
        assert (here.to(there) * there).tolist() == [1, 1] and (there * torch.tensor(2.0)).tolist() == [2, 2]
        assert there[torch.tensor([1])].tolist() == there[[0]].tolist() == [1]
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, device=device, generator=torch.Generator())
        with pytest.raises((TypeError, RuntimeError)):
            there.numpy()
