"""Run under ComfyUI's interpreter: what its backend trains besides LoRAs, for `test_trained_parts_comfyui.py`.

Usage: check_parts.py COMFYUI PACK WEIGHTS FOLDER. `FOLDER/results.json` becomes what is wrong by check, or "".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

comfyui, pack, weights, folder = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path[:0] = [comfyui, pack]  # in this order: both have a `nodes`

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.sdxl_clip  # noqa: E402
import comfy.text_encoders.sd3_clip  # noqa: E402
import comfy_models as models  # noqa: E402
import comfy_text_encoders  # noqa: E402
import contract  # noqa: E402
import torch  # noqa: E402
from comfy_models import fingerprint, same  # noqa: E402

from anchor_core.adapters.attach import attach_file, attach_tensors  # noqa: E402
from anchor_core.adapters.config import AdapterConfig  # noqa: E402
from anchor_core.adapters.file import save_adapter, to_file_keys  # noqa: E402
from anchor_core.adapters.tokens import TokenVectors, to_embedding  # noqa: E402
from anchor_core.backends.comfyui.apply import apply_adapter  # noqa: E402
from anchor_core.backends.comfyui.denoiser import ComfyDenoiser  # noqa: E402
from anchor_core.backends.comfyui.families import check_size  # noqa: E402
from anchor_core.backends.comfyui.tokens import tokenize  # noqa: E402
from anchor_core.concept import Concept  # noqa: E402
from anchor_core.sandbox.comfyui import load  # noqa: E402
from anchor_core.training.settings import TrainSettings  # noqa: E402
from anchor_core.training.trainer import train  # noqa: E402

CONCEPT = contract.CONCEPT = Concept("a photo of a sks star", "a photo of a star")
SHAPE = (4, 16, 16)
EMBEDDINGS = Path(folder) / "embeddings"
SETTINGS = TrainSettings(steps=4, batch_size=2, learning_rate=1e-2)


def predict(denoiser, prompt: str, adapted: bool = False, shape=SHAPE) -> torch.Tensor:
    with torch.no_grad():
        condition = denoiser.encode_prompt(prompt, adapted)
        return denoiser.predict(contract.draw(denoiser, shape, 1), contract.times(denoiser, (0.5,)), [condition])


def trained(denoiser, shape=SHAPE, **options):
    """An adapter after a few steps, whose loss was finite."""
    adapter = denoiser.attach(AdapterConfig(**options), 0)
    history = train(denoiser, adapter, contract.draw(denoiser, shape, 2, seed=5), CONCEPT, SETTINGS)
    assert len(history.losses) == SETTINGS.steps
    return adapter


def check_tokens(model, clip, vae, shape=SHAPE) -> None:
    with ComfyDenoiser(model, clip, vae) as denoiser:
        contract.check_token_vectors(denoiser, shape, 1)
        contract.check_token_vectors(denoiser, shape, 3)
        contract.check_detach_restores(denoiser, shape, kind="none", vectors=2)


def check_embedding_file(model, clip, vae, shape=SHAPE) -> None:
    """`embedding:name` in ComfyUI's own prompt is the token in training, in parentheses, and in a long prompt."""
    for count in (1, 3):
        with ComfyDenoiser(model, clip, vae) as denoiser:
            adapter = trained(denoiser, shape, kind="none", vectors=count, initial="star")
            save_adapter(EMBEDDINGS / "ours.safetensors", to_file_keys(adapter, denoiser.file_keys()), {})
            ours = {}
            for prompt in ("a photo of a {} star", "a (red {} one), in the snow", "{} " + "a star in the snow, " * 20):
                ours[prompt.format("embedding:ours")] = predict(denoiser, prompt.format("sks"), True, shape)
        with ComfyDenoiser(model, clip, vae) as denoiser:
            for prompt, expected in ours.items():
                torch.testing.assert_close(predict(denoiser, prompt, False, shape), expected, atol=1e-4, rtol=0)
                without = predict(denoiser, prompt.replace("embedding:ours", ""), False, shape)
                assert not torch.allclose(without, expected, atol=1e-4)
            attach_file(denoiser, EMBEDDINGS / "ours.safetensors")  # which stands for the file's name
            for prompt, expected in ours.items():
                said = predict(denoiser, prompt.replace("embedding:ours", "ours"), True, shape)
                torch.testing.assert_close(said, expected, atol=1e-4, rtol=0)


def check_sdxl(model, clip, vae) -> None:
    """The same for two text encoders and their pooled output."""
    model, clip, vae = comfy_text_encoders.sdxl([str(EMBEDDINGS)])
    shape = models.latent_shape("sdxl")
    check_tokens(model, clip, vae, shape)
    check_embedding_file(model, clip, vae, shape)


def check_stock_loader(model, clip, vae) -> None:
    """Files of full and SVDiff through ComfyUI's own loader, and through ours, predict what the adapter did."""
    for options in (
        {"kind": "full", "layers": "cross_attention_kv", "vectors": 1, "detach_start": True},
        {"kind": "full", "layers": "attention"},
        {"kind": "svdiff", "layers": "all_linear_conv"},
    ):
        with ComfyDenoiser(model, clip, vae) as denoiser:
            before = predict(denoiser, CONCEPT.class_prompt)
            adapter = trained(denoiser, **options)
            ours, tensors = predict(denoiser, CONCEPT.class_prompt), to_file_keys(adapter, denoiser.file_keys())
            with denoiser.adapter_disabled():
                assert torch.equal(predict(denoiser, CONCEPT.class_prompt), before), "off is not the untouched network"
            assert not torch.allclose(ours, before, atol=1e-4), f"{options} has no effect"
            denoiser.detach()
            attach_tensors(denoiser, tensors)
            torch.testing.assert_close(predict(denoiser, CONCEPT.class_prompt), ours, atol=1e-4, rtol=0)
        stock, _ = comfy.sd.load_lora_for_models(model, None, dict(tensors), 1.0, 0.0)
        for on in (stock, apply_adapter(model, tensors, 1.0)[0]):
            with ComfyDenoiser(on, clip, vae) as denoiser:
                torch.testing.assert_close(predict(denoiser, CONCEPT.class_prompt), ours, atol=1e-4, rtol=0)


def check_untouched(model, clip, vae) -> None:
    comfy.model_management.load_models_gpu([model, clip.patcher])
    before = fingerprint(model), fingerprint(clip.patcher)
    for options in ({"kind": "full", "layers": "cross_attention_kv", "vectors": 1}, {"kind": "svdiff"}):
        with ComfyDenoiser(model, clip, vae) as denoiser:
            trained(denoiser, **options)
    assert all(map(same, before, (fingerprint(model), fingerprint(clip.patcher)))), "MODEL or CLIP is another one"


def check_refusals(model, clip, vae) -> None:
    for options, told in (
        ({"kind": "full", "layers": "everything"}, "semantic-anchor train --kind full"),
        ({"kind": "full", "layers": "."}, "semantic-anchor train --kind full"),
        ({"kind": "none", "vectors": 1, "initial": "extraordinarily"}, "initial is 'extraordinarily'"),
    ):
        with ComfyDenoiser(model, clip, vae) as denoiser:
            try:
                config = AdapterConfig(**options)
                check_size(config, denoiser.network)
                denoiser.attach(config)
            except ValueError as error:
                assert told in str(error) and "\n" not in str(error), error
            else:
                raise AssertionError(f"{options} is not refused")


class Tokenizing:
    def __init__(self, kind: type):
        self.tokenizer = kind(embedding_directory=[str(EMBEDDINGS)])

    def tokenize(self, text: str):
        return self.tokenizer.tokenize_with_weights(text)


def check_tokenizers(model, clip, vae) -> None:
    """Ids, places and weights are those of `embedding:name`, for models of one, two and three text encoders.

    Parentheses are letters, which ComfyUI's own prompts escape.
    """
    vectors = {"te1": torch.randn(2, 768), "te2": torch.randn(2, 1280)}
    for kind, prefixes in (
        (comfy.sd1_clip.SD1Tokenizer, {"te": "l"}),
        (comfy.sdxl_clip.SDXLTokenizer, {"te1": "l", "te2": "g"}),
        (comfy.text_encoders.sd3_clip.SD3Tokenizer, {"te1": "l", "te2": "g"}),
    ):
        tokens = TokenVectors("sks", {name: vectors[{"l": "te1", "g": "te2"}[key]] for name, key in prefixes.items()})
        save_adapter(EMBEDDINGS / "many.safetensors", to_embedding(tokens), {})
        those = Tokenizing(kind)
        tokenizers = {name: (key, getattr(those.tokenizer, f"clip_{key}")) for name, key in prefixes.items()}
        for prompt in ("a {} dog", "{}", "a photo of (a {}, red:1.2) dog and {}, in the snow"):
            ours = tokenize(those, prompt.format("sks", "SKS"), tokens, tokenizers)
            escaped = prompt.replace("(", r"\(").replace(")", r"\)")
            theirs = those.tokenize(escaped.format("embedding:many", "embedding:many"))
            assert ours.keys() == theirs.keys()
            for key in ours:
                if key in prefixes.values():
                    assert same_tokens(ours[key], theirs[key]), f"{kind.__name__} {key}: {prompt}"
                else:  # a T5 leaves out vectors that are not of its width
                    ids = [pair for batch in theirs[key] for pair in batch if isinstance(pair[0], int)]
                    assert ids == [pair for batch in ours[key] for pair in batch][: len(ids)]


def same_tokens(ours, theirs) -> bool:
    pairs = [(one, other) for a, b in zip(ours, theirs, strict=True) for one, other in zip(a, b, strict=True)]
    return all(
        weight == their_weight and (torch.equal(one, other) if torch.is_tensor(one) else one == other)
        for (one, weight), (other, their_weight) in pairs
    )


CHECKS = (
    check_tokens,
    check_embedding_file,
    check_sdxl,
    check_stock_loader,
    check_untouched,
    check_refusals,
    check_tokenizers,
)

EMBEDDINGS.mkdir()
with torch.inference_mode():  # as ComfyUI runs every prompt
    parts = load(Path(weights), [str(EMBEDDINGS)])
    results = {check.__name__: contract.outcome(check, *parts) for check in CHECKS}
(Path(folder) / "results.json").write_text(json.dumps(results))
