"""What the passes are computed in: the scale of the loss in fp16, `auto`, and gradients against those of fp32."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.torch_file import read_torch
from anchor_core.training import trainer
from anchor_core.training.checkpoint import Checkpoints
from anchor_core.training.precision import autocast_dtype, make_scaler, resolve
from anchor_core.training.saving import adapter_metadata
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import TrainingDiverged, train
from tests.backends import tiny_models

QUICK = TrainSettings(steps=2, batch_size=2, learning_rate=1e-3)
SIZES = [
    pytest.param(64, 1),
    *(pytest.param(side, batch, marks=pytest.mark.long) for side, batch in ((64, 4), (128, 1), (128, 4))),
]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """`make(dtype)`: an SD1 with attention at half its resolution, which computes in `dtype`."""
    from diffusers import UNet2DConditionModel

    pipeline = tiny_models.build("sd1", tmp_path_factory.mktemp("precision"))
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks["up_block_types"] = ("CrossAttnUpBlock2D", "UpBlock2D")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = UNet2DConditionModel(**{**pipeline.unet.config, **blocks}).state_dict()

    def make(dtype):
        pipeline.unet = UNet2DConditionModel(**{**pipeline.unet.config, **blocks})
        pipeline.unet.load_state_dict(own)
        for name in ("unet", "text_encoder", "vae"):
            torch.nn.Module.to(getattr(pipeline, name), dtype)
        return tiny_models.denoiser_of(pipeline)

    return make


def pictures(count: int, side: int) -> torch.Tensor:
    """Latents as smooth as those of pictures, (count, 4, side, side)."""
    small = torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, size=(side, side), mode="bicubic")


def gradients(denoiser, concept, side: int, batch: int, precision: str = "auto") -> dict[str, torch.Tensor]:
    """By layer, the adapter's gradient as the optimizer of a training sees it."""
    adapter = denoiser.attach(AdapterConfig(rank=4))
    found = {}

    def keep(_) -> None:
        for name in adapter.module_names:
            own = (p.grad for p in adapter.layer(name).parameters() if p.requires_grad)
            found[name] = torch.cat([gradient.double().flatten() for gradient in own])

    settings = TrainSettings(steps=1, batch_size=batch, grad_clip=0.0, precision=precision)
    train(denoiser, adapter, pictures(batch, side), concept, settings, tell=keep)
    denoiser.detach()
    return found


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.cosine_similarity(one, other, dim=0).item()


@pytest.mark.parametrize(("side", "batch"), SIZES)
def test_gradients_in_16_bits_are_those_of_fp32(networks, concept, side, batch):
    exact = gradients(networks(torch.float32), concept, side, batch)
    for dtype in (torch.float16, torch.bfloat16):
        found = gradients(networks(dtype), concept, side, batch)
        assert cosine(torch.cat([*found.values()]), torch.cat([*exact.values()])) >= 0.9995, dtype
        worst = min(exact, key=lambda name: cosine(found[name], exact[name]))
        assert cosine(found[worst], exact[worst]) >= 0.99, f"{dtype}: {worst}"


def test_without_the_scale_layers_of_an_fp16_network_would_learn_nothing(networks, concept, monkeypatch):
    exact = gradients(networks(torch.float32), concept, 64, 1)
    monkeypatch.setattr(trainer, "make_scaler", lambda *_: torch.amp.GradScaler("cpu", enabled=False))
    found = gradients(networks(torch.float16), concept, 64, 1)
    assert min(cosine(found[name], exact[name]) for name in exact) < 0.9


@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16"])
def test_an_fp16_network_has_the_scale_whatever_precision_says(networks, precision):
    denoiser = networks(torch.float16)
    settings = resolve(replace(QUICK, precision=precision), denoiser)
    assert make_scaler(settings, denoiser).is_enabled()
    assert autocast_dtype(settings, denoiser) is None


@pytest.mark.parametrize("own", ["fp32", "bf16", "fp16"])
def test_auto_takes_what_the_network_computes_in_and_says_so(networks, concept, caplog, own):
    denoiser = networks({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[own])
    with caplog.at_level("INFO", logger="anchor_core"):
        settings = resolve(QUICK, denoiser)
    assert settings.precision == own and f"precision: {own}" in caplog.text
    assert resolve(settings, denoiser) == settings
    assert make_scaler(settings, denoiser).is_enabled() == (own == "fp16")
    denoiser.attach(AdapterConfig(rank=2))
    assert adapter_metadata(denoiser, concept, QUICK)["anchor.precision"] == own


def test_auto_on_an_fp32_network_is_fp32_bit_by_bit(networks, concept):
    found = [gradients(networks(torch.float32), concept, 16, 2, precision) for precision in ("auto", "fp32")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_other_kind_of_16_bits_is_refused(networks, concept):
    for dtype, other in ((torch.float16, "bf16"), (torch.bfloat16, "fp16")):
        with pytest.raises(ValueError, match=f"^precision is '{other}', but the network computes in .*; take auto"):
            gradients(networks(dtype), concept, 16, 1, other)


def test_a_scale_that_collapses_ends_the_training_with_the_adapter_as_it_was(networks, concept):
    denoiser = networks(torch.float16)
    adapter = denoiser.attach(AdapterConfig(rank=2))
    before, seen = adapter.state_dict(), []
    adapter.parameters()[1].register_hook(lambda gradient: gradient * math.inf)
    settings = replace(QUICK, steps=60)
    with pytest.raises(TrainingDiverged, match="^the gradient overflows fp16 at step 17 of 60, .* times 1; take"):
        train(denoiser, adapter, pictures(2, 8), concept, settings, tell=seen.append)
    assert len(seen) == 16  # 2^16 halved sixteen times
    assert all(torch.equal(before[name], value) for name, value in adapter.state_dict().items())


def test_a_checkpoint_from_before_the_scale_goes_on(networks, concept, tmp_path, monkeypatch):
    denoiser = networks(torch.float16)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_scaler", lambda *_: torch.amp.GradScaler("cpu", enabled=False))
        settings = replace(QUICK, precision="fp32", checkpoint_every=1)
        train(denoiser, denoiser.attach(AdapterConfig(rank=2)), pictures(2, 8), concept, settings,
              checkpoints=Checkpoints(tmp_path))  # fmt: skip
        denoiser.detach()
    assert read_torch(Checkpoints(tmp_path).files()[-1])["scaler"] == {}
    longer = replace(settings, steps=4)
    adapter = denoiser.attach(AdapterConfig(rank=2))
    history = train(denoiser, adapter, pictures(2, 8), concept, longer, checkpoints=Checkpoints(tmp_path))
    assert len(history.losses) == 4
    assert read_torch(Checkpoints(tmp_path).files()[-1])["scaler"]["scale"] > 1


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_in_a_step_leaves_the_steps_before_it(networks, concept, where):
    denoiser = networks(torch.float32)

    def trained(steps: int, fail: bool) -> dict[str, torch.Tensor]:
        adapter, made = denoiser.attach(AdapterConfig(rank=2)), []

        def out_of_memory(*_) -> None:
            if fail and len(made) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

        middle = denoiser.network.mid_block
        hook = middle.register_forward_hook(out_of_memory)
        if where == "backward":
            hook.remove()
            hook = adapter.parameters()[1].register_hook(out_of_memory)
        try:
            train(denoiser, adapter, pictures(2, 8), concept, replace(QUICK, steps=steps), tell=made.append)
        except torch.OutOfMemoryError:
            assert fail and len(made) == 2
        finally:
            hook.remove()
        assert adapter.enabled
        state = adapter.state_dict()
        denoiser.detach()
        return state

    whole, broken = trained(2, fail=False), trained(5, fail=True)
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
