"""What stands in the place of a file in a folder of pictures, and is none: nothing waits for it."""

from __future__ import annotations

import os
import signal
import socket

import pytest
from PIL import Image

from anchor_core.adapters.file import load_adapter
from anchor_core.data.pictures import load_references

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and sockets as files are of POSIX")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "0-masklabel.png")
    (tmp_path / "0.txt").write_text("a sks dog")
    monkeypatch.chdir(tmp_path)  # a socket's name is short

    def ended(*_):
        raise AssertionError("it waits for the pipe")

    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(10)
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def bind(name: str) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(name)


@pytest.mark.parametrize("make", [os.mkfifo, bind, os.mkdir], ids=["pipe", "socket", "folder"])
@pytest.mark.parametrize("name", ["1.png", "0.txt", "0-masklabel.png"])
def test_nothing_waits(folder, name, make):
    (folder / name).unlink(missing_ok=True)
    make(name)
    try:
        read = load_references(folder, 64, captions=True, masks=True)
    except ValueError as error:
        assert name in str(error) and name != "1.png"
    else:
        assert name == "1.png" and len(read) == 1


@pytest.mark.parametrize("make", [os.mkfifo, bind, os.mkdir], ids=["pipe", "socket", "folder"])
@pytest.mark.parametrize("name", ["lora.safetensors", "embedding.pt"])
def test_no_adapter_is_waited_for(folder, name, make):
    make(name)
    with pytest.raises(ValueError, match=f"{name} is no file; give"):
        load_adapter(folder / name)
