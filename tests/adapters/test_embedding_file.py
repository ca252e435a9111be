"""Which files are read as textual-inversion embeddings."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from anchor_core.adapters.embedding_file import read_embedding


def test_files_of_every_kind_are_read(tmp_path):
    one, three = torch.randn(32), torch.randn(3, 32)
    save_file({"emb_params": three}, tmp_path / "kohya.safetensors", {"sks": "yes"})
    save_file({"<sks>": one}, tmp_path / "diffusers.safetensors")
    save_file({"clip_l": three, "clip_g": torch.randn(3, 40)}, tmp_path / "sdxl.safetensors")
    a1111 = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.nn.Parameter(three)},
        "name": "sks",
        "step": 9,
    }
    torch.save(a1111, tmp_path / "a1111.pt")
    torch.save({"<sks>": one}, tmp_path / "diffusers.bin")
    expected = {
        "kohya.safetensors": {"emb_params": three}, "diffusers.safetensors": {"<sks>": one[None]},
        "a1111.pt": {"emb_params": three}, "diffusers.bin": {"<sks>": one[None]},
    }  # fmt: skip
    for name, tensors in expected.items():
        read, metadata = read_embedding(tmp_path / name)
        assert read.keys() == tensors.keys() and all(torch.equal(read[key], tensors[key]) for key in read)
        assert metadata == ({"sks": "yes"} if name.startswith("kohya") else {})
        assert not any(each.requires_grad for each in read.values())
    assert read_embedding(tmp_path / "sdxl.safetensors")[0].keys() == {"clip_l", "clip_g"}


class _Harm:
    def __reduce__(self):
        return print, ("this must not run",)


def test_files_that_are_no_embedding_are_refused(tmp_path, capsys):
    torch.save({"string_to_param": {"*": _Harm()}}, tmp_path / "harm.pt")
    torch.save({"step": 3}, tmp_path / "empty.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    save_file({"lora_down": torch.ones(2, 2, 2)}, tmp_path / "other.safetensors")
    save_file({"emb_params": torch.full((1, 32), math.nan)}, tmp_path / "nan.safetensors")
    torch.save({"<sks>": torch.full((32,), math.inf)}, tmp_path / "inf.bin")
    save_file({"emb_params": torch.ones(0, 32)}, tmp_path / "none.safetensors")
    save_file({"emb_params": torch.stack([torch.ones(32), torch.zeros(32)])}, tmp_path / "zero.safetensors")
    for name, told in (
        ("harm.pt", "cannot be read"), ("text.pt", "cannot be read"), ("nowhere.pt", "No such file"),
        ("empty.pt", "holds no tensor"), ("other.safetensors", "holds 'lora_down'"), ("nan.safetensors", "NaN"),
        ("inf.bin", "infinite values in '<sks>'"),
        ("none.safetensors", "shape .0, 32"), ("zero.safetensors", "zeros for a vector"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told) as caught:
            read_embedding(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    assert "must not run" not in capsys.readouterr().out
