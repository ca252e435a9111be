"""Run under ComfyUI's interpreter: adjusted conditionings of ComfyUI's own tokenizers and layouts.

Usage: check_adjust.py COMFYUI PACK OUTPUT [--paged]. OUTPUT becomes a JSON object: check to what is wrong, or "". With
`--paged` the one check whose CLIP is a real one, which lies in pages then (`paged_vram.py`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PAGED = ("word_rows",)
CHECKS = ("layouts", "alignment", "long_prompts", "embeddings_in_prompts", "word_rows", "refusals")

if __name__ == "__main__":
    comfyui, pack, output, *options = sys.argv[1:]
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path[:0] = [comfyui, pack]  # in this order: both have a `nodes`

    import paged_vram

    if paged := "--paged" in options:
        paged_vram.install()

    import comfy.options

    comfy.options.enable_args_parsing()

    import comfy.sd
    import comfy.sdxl_clip
    import comfy.text_encoders.flux
    import comfy.text_encoders.sd3_clip
    import torch
    from contract import outcome
    from safetensors.torch import save_file

    from anchor_core.backends.comfyui.adjust import adjust_conditioning, word_rows
    from anchor_core.embeddings import Adjustment, rotate_and_mix_norms, rotate_and_rescale
    from anchor_core.sandbox.comfyui import load
    from anchor_core.sandbox.model import WEIGHTS

SUBJECT, CLASS = "a photo of a sks dog in the snow", "a photo of a dog in the snow"


def drawn(seed: int, *shape: int):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning(seed: int, layout: str, t5: int = 77):
    """A CONDITIONING of seeded values in the layout of a model."""
    pooled = {"sdxl": 1280, "sd3": 2048, "sd3_no_t5": 2048, "flux": 768}.get(layout)
    if layout.startswith("sd3"):
        clips = torch.nn.functional.pad(drawn(seed, 1, 77, 2048), (0, 2048))
        values = clips if layout == "sd3_no_t5" else torch.cat([clips, drawn(seed + 50, 1, t5, 4096)], dim=1)
    else:
        values = drawn(
            seed, 1, *{"sd1": (77, 768), "sd2": (77, 1024), "sdxl": (154, 2048), "flux": (256, 4096)}[layout]
        )
    extras = {"pooled_output": None if pooled is None else drawn(seed + 100, 1, pooled), "guidance": 3.5}
    return [[values, extras]]


def check_layouts() -> None:
    blocks = {
        "sd1": [(slice(None), slice(None))],
        "sd2": [(slice(None), slice(None))],
        "sdxl": [(slice(None), slice(0, 768)), (slice(None), slice(768, None))],
        "sd3": [(slice(77), slice(0, 768)), (slice(77), slice(768, 2048)), (slice(77, None), slice(None))],
        "sd3_no_t5": [(slice(77), slice(0, 768)), (slice(77), slice(768, 2048))],
        "flux": [(slice(None), slice(None))],
    }
    adjustment = Adjustment(0.3, 1.5)
    for layout, found in blocks.items():
        subject, class_ = conditioning(1, layout), conditioning(2, layout)
        before = subject[0][0].clone()
        ((values, extras),) = adjust_conditioning(subject, class_, adjustment)
        for rows, columns in found:
            own, other = before[0][rows, columns], class_[0][0][0][rows, columns]
            torch.testing.assert_close(values[0][rows, columns], rotate_and_rescale(own, other, 0.3, 1.5))
        assert values.shape == before.shape and torch.equal(subject[0][0], before), layout
        assert extras["pooled_output"] is subject[0][1]["pooled_output"] and extras["guidance"] == 3.5
        if extras["pooled_output"] is not None:
            ((_, extras),) = adjust_conditioning(subject, class_, adjustment, pooled=True)
            widths = [768, 1280] if layout.startswith("sd3") else [extras["pooled_output"].shape[-1]]
            own, other = (each[0][1]["pooled_output"].split(widths, dim=-1) for each in (subject, class_))
            expected = [rotate_and_rescale(*pair, 0.3, 1.5) for pair in zip(own, other)]
            torch.testing.assert_close(extras["pooled_output"], torch.cat(expected, dim=-1))
    several = adjust_conditioning(conditioning(1, "sd1") + conditioning(3, "sd1"), conditioning(2, "sd1"), adjustment)
    alone = adjust_conditioning(conditioning(3, "sd1"), conditioning(2, "sd1"), adjustment)
    assert len(several) == 2 and torch.equal(several[1][0], alone[0][0])


def tokens_of(tokenizer, *prompts: str) -> list[dict]:
    return [tokenizer.tokenize_with_weights(prompt) for prompt in (*prompts, "")]


WHOLLY = (
    Adjustment(1.0, norm_mix=1.0) if __name__ == "__main__" else None
)  # everything becomes what it is compared with


def check_alignment() -> None:
    """By ComfyUI's own tokenizers: words after sks are compared with themselves, in each encoder's own tokens."""
    clip_l = torch.tensor([0, 1, 2, 3, 4, 5, 5, *range(6, 76)])
    for layout, tokenizer in (
        ("sdxl", comfy.sdxl_clip.SDXLTokenizer()),
        ("sd3", comfy.text_encoders.sd3_clip.SD3Tokenizer()),
        ("flux", comfy.text_encoders.flux.FluxTokenizer()),
    ):
        subject, class_ = conditioning(1, layout), conditioning(2, layout)
        if layout == "sdxl":
            subject[0][0], class_[0][0] = subject[0][0][:, :77], class_[0][0][:, :77]
        ((values, _),) = adjust_conditioning(subject, class_, WHOLLY, tokens=tokens_of(tokenizer, SUBJECT, CLASS))
        if layout != "flux":
            torch.testing.assert_close(values[0, :77, :2048], class_[0][0][0, clip_l, :2048])
        if layout != "sdxl":
            # T5: "a photo of a" is 4 or 5 pieces, "sks" one or more, and "dog in the snow" ends 5 before the end.
            given = tokens_of(tokenizer, SUBJECT, CLASS)
            ours, theirs = ([token for token, _ in each["t5xxl"][0]] for each in given[:2])
            own, other = (values[0][-len(ours) :], class_[0][0][0][-len(theirs) :])
            more = ours.index(1) - theirs.index(1)
            assert more > 0 and ours[: theirs.index(1)] != theirs[: theirs.index(1)]
            last = ours.index(1)
            torch.testing.assert_close(own[last - 3 : last + 1], other[last - more - 3 : last - more + 1])
            torch.testing.assert_close(own[:4], other[:4])


def check_long_prompts() -> None:
    """Two parts of 77 tokens: the token pushes a word over the edge, which is compared with itself still."""
    tail = " ".join(["in the deep white snow of a cold winter night"] * 9)
    tokenizer = comfy.sdxl_clip.SDXLTokenizer()
    tokens = tokens_of(tokenizer, f"{SUBJECT} {tail}", f"{CLASS} {tail}")
    ours, theirs = ([token for part in each["l"] for token, _ in part] for each in tokens[:2])
    assert len(ours) == len(theirs) == 154
    subject, class_ = conditioning(1, "sdxl"), conditioning(2, "sdxl")
    ((values, _),) = adjust_conditioning(subject, class_, WHOLLY, tokens=tokens)
    (sks,) = tokenizer.clip_l.tokenizer("sks", add_special_tokens=False)["input_ids"]
    for row, token in enumerate(ours):
        # Rounding moves values a little: the nearest row is meant.
        distances = (class_[0][0][0, :, :768] - values[0, row, :768]).norm(dim=-1)
        compared = theirs[int(distances.argmin())]
        assert distances.min() < 1e-2 and compared == (theirs[5] if token == sks else token), (row, token, compared)


def check_embeddings_in_prompts() -> None:
    """Three vectors of an embedding file are all compared with the class word in their place."""
    folder = Path(output).parent / "embeddings"
    folder.mkdir(exist_ok=True)
    save_file({"clip_l": torch.randn(3, 768), "clip_g": torch.randn(3, 1280)}, folder / "pip.safetensors")
    tokenizer = comfy.sdxl_clip.SDXLTokenizer(embedding_directory=str(folder))
    tokens = tokens_of(tokenizer, "a photo of a embedding:pip in the (snow:1.2)", "a photo of a dog in the snow")
    subject, class_ = (
        [[each[0][0][:, :77], each[0][1]]] for each in (conditioning(1, "sdxl"), conditioning(2, "sdxl"))
    )
    ((values, _),) = adjust_conditioning(subject, class_, WHOLLY, tokens=tokens)
    rows = torch.tensor([0, 1, 2, 3, 4, 5, 5, 5, *range(6, 75)])
    torch.testing.assert_close(values[0], class_[0][0][0, rows])


def check_word_rows() -> None:
    """The row of the token that the tokenizer emits, and what TEA makes of a real text encoder's prompts."""
    _, clip, _ = load(WEIGHTS)
    rows = word_rows(clip, "star")
    weight = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    token = clip.tokenize("star")["l"][0][1][0]
    assert list(rows) == ["clip_l"] and torch.equal(rows["clip_l"], weight[token : token + 1])
    assert len(word_rows(clip, "shooting star")["clip_l"]) > 1
    prompts = ("a photo of a sks star", "a photo of a star")
    subject, class_ = (clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in prompts)
    tokens = [clip.tokenize(prompt) for prompt in (*prompts, "")]
    ((values, _),) = adjust_conditioning(subject, class_, Adjustment(norm_mix=0.5), tokens=tokens)
    before = torch.tensor([0, 1, 2, 3, 4])  # both prompts agree here, so that nothing changes
    torch.testing.assert_close(values[0, before], subject[0][0][0, before], atol=1e-4, rtol=1e-4)
    at = [tokens[0]["l"][0].index(each) for each in tokens[1]["l"][0][5:6]]
    expected = rotate_and_mix_norms(subject[0][0][0, at], class_[0][0][0, 5:6])
    torch.testing.assert_close(values[0, at], expected, atol=1e-5, rtol=1e-5)
    assert not paged_vram.pinned_pages()


def refusal(*arguments, **options) -> str:
    try:
        adjust_conditioning(*arguments, **options)
    except ValueError as error:
        return str(error)
    return ""


def check_refusals() -> None:
    sd1, sdxl, other = conditioning(1, "sd1"), conditioning(2, "sdxl"), conditioning(3, "sd1")
    adjustment, broken = Adjustment(), conditioning(4, "sd1")
    broken[0][0][0, 3, 3] = float("nan")
    tokens = tokens_of(comfy.sdxl_clip.SDXLTokenizer(), SUBJECT, CLASS)
    only_l = [{"l": each["l"]} for each in tokens]
    for told, arguments, options in (
        ("two models", (sd1, sdxl), {}),
        ("two models", (conditioning(1, "sd3"), conditioning(2, "flux")), {}),
        ("two models", (conditioning(1, "sd3"), conditioning(2, "sd3_no_t5")), {}),
        (
            "class_conditioning has 154 tokens and the subject's 77",
            (sd1, [[torch.cat([other[0][0]] * 2, 1), {}]]),
            {},
        ),
        ("class_conditioning has NaN", (sd1, broken), {}),
        ("subject_conditioning has NaN", (broken, sd1), {}),
        ("has 2 encodings and the subject's 1", (sd1, other * 2), {}),
        ("pooled is on", (sd1, other), {"pooled": True}),
        ("class_prompt have 77 and 77 (g), 77 and 77 (l);", (sdxl, conditioning(5, "sdxl")), {"tokens": tokens}),
        ("class_prompt have 77 and 77 (l);", (sdxl, conditioning(5, "sdxl")), {"tokens": only_l}),
    ):
        said = refusal(*arguments, adjustment, **options)
        assert told in said and "\n" not in said, f"{told!r} is not in {said!r}"


if __name__ == "__main__":
    if paged:
        paged_vram.start(scale=1024)
        load = paged_vram.paged(load)
    with torch.inference_mode():  # as ComfyUI runs every prompt
        results = {name: outcome(globals()[f"check_{name}"]) for name in (PAGED if paged else CHECKS)}
    Path(output).write_text(json.dumps(results))
