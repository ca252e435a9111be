"""Test-time embedding adjustment (TEA): of a prompt's conditioning, and of a textual-inversion file."""

from __future__ import annotations

from dataclasses import replace

import folder_paths
from comfy_api.latest import io

from ..anchor_core.embeddings import ALIGNMENTS, NORM_MIX, Adjustment
from ..anchor_core.writing import claimed
from .types import CATEGORY, embedding_file, embedding_word, new_embedding_file
from .written import WRITTEN

LENGTHS = ("norm_mix", "beta")


def _adjustment_inputs(length: str, lengths: str) -> list[io.Input]:
    share = {"min": 0.0, "max": 1.0, "step": 0.05, "round": 1e-6}
    return [
        io.Float.Input(
            "alpha",
            default=Adjustment.alpha,
            **share,
            tooltip="Rotation towards the class: 0 keeps the direction, 1 is the class's. More leaves room for the "
            "rest of the prompt, and takes away of the subject: try 0.1 to 0.3.",
        ),
        io.Combo.Input("length", options=list(LENGTHS), default=length, tooltip=lengths),
        io.Float.Input(
            "norm_mix",
            default=NORM_MIX,
            **share,
            tooltip="Share of the class's length: 0 keeps the length, 1 is the class's. A shorter subject takes over "
            "the prompt less.",
        ),
        io.Float.Input(
            "beta",
            default=Adjustment.beta,
            min=0.05,
            max=10.0,
            step=0.05,
            tooltip="Length over that of the class: 1 is the class's, larger is more of the subject.",
        ),
    ]


def _adjustment(alpha: float, length: str, norm_mix: float, beta: float) -> Adjustment:
    both = Adjustment(alpha, beta, norm_mix)
    return both if length == "norm_mix" else replace(both, norm_mix=None)


class AnchorAdjustConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AnchorAdjustConditioning",
            display_name="Adjust Conditioning",
            category=CATEGORY,
            description=(
                "Turns the encoding of a subject prompt towards that of the same prompt with the class word, so that "
                "the subject leaves room for the rest of the prompt (TEA). Needs no training. Each text encoder of the "
                "model is adjusted on its own."
            ),
            search_aliases=["TEA", "test-time embedding adjustment"],
            inputs=[
                io.Conditioning.Input(
                    "subject_conditioning", tooltip="The subject's prompt, encoded: a photo of a sks dog in the snow."
                ),
                io.Conditioning.Input(
                    "class_conditioning",
                    tooltip="The same with the class word: a photo of a dog in the snow. By the same CLIP as "
                    "published, or by the CLIP without the LoRA: then it is the pretrained anchor.",
                ),
                *_adjustment_inputs(
                    "norm_mix",
                    "norm_mix: as the released code, which leaves alone what both prompts agree on. beta: as the "
                    "paper, at which every position gets another length.",
                ),
                io.Boolean.Input("pooled", default=False, tooltip="Adjust the pooled output too; the paper does not."),
                io.Combo.Input(
                    "align",
                    options=list(ALIGNMENTS),
                    default="index",
                    tooltip="index: position by position, as published; after the subject's word these are neighbours. "
                    "token: each word with itself, which needs clip, subject_prompt and class_prompt.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="For align token: the CLIP, to find the words again."),
                io.String.Input(
                    "subject_prompt", default="", optional=True, tooltip="For align token: the text of the subject's."
                ),
                io.String.Input(
                    "class_prompt", default="", optional=True, tooltip="For align token: the text of the class's."
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="The subject's, adjusted.")],
        )

    @classmethod
    def execute(
        cls,
        subject_conditioning,
        class_conditioning,
        pooled,
        align,
        clip=None,
        subject_prompt="",
        class_prompt="",
        **how,
    ) -> io.NodeOutput:
        from ..anchor_core.backends.comfyui.adjust import adjust_conditioning

        tokens = None
        if align == "token":
            if clip is None:
                raise ValueError("clip is not connected, but align is 'token'; connect it, or take index")
            tokens = [clip.tokenize(prompt) for prompt in (subject_prompt, class_prompt, "")]
        adjustment = _adjustment(**how)
        return io.NodeOutput(adjust_conditioning(subject_conditioning, class_conditioning, adjustment, pooled, tokens))


class AnchorAdjustEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AnchorAdjustEmbedding",
            display_name="Adjust Embedding",
            category=CATEGORY,
            description=(
                "Turns the vectors of a textual-inversion file towards the class word's own and writes them to a new "
                "file of the embeddings folder (TEA)."
            ),
            search_aliases=["TEA", "textual inversion"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list("embeddings"),
                    tooltip="A textual inversion of the embeddings folders. A new one shows after pressing R.",
                ),
                io.Clip.Input("clip", tooltip="The text encoder that the file was trained for."),
                io.String.Input("class_word", default="dog", tooltip="What the subject is, in a word of one token."),
                *_adjustment_inputs("beta", "beta: as the paper. norm_mix: as the released code."),
                io.String.Input(
                    "name", default="adjusted", tooltip="Name in the embeddings folder; a number is added."
                ),
            ],
            outputs=[
                io.String.Output(display_name="word", tooltip="embedding:name, to write into prompts."),
                io.String.Output(display_name="file", tooltip="Where it was written."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_):
        return [embedding_file(file).stat().st_mtime_ns, WRITTEN.fingerprint(cls.hidden.unique_id)]

    @classmethod
    def execute(cls, file: str, clip, class_word: str, name: str, **how) -> io.NodeOutput:
        from ..anchor_core.adapters.embedding_file import adjust_embedding, read_embedding
        from ..anchor_core.adapters.file import save_adapter
        from ..anchor_core.backends.comfyui.adjust import word_rows

        adjustment = _adjustment(**how)
        vectors, metadata = read_embedding(embedding_file(file))
        adjusted = adjust_embedding(vectors, class_word, word_rows(clip, class_word), adjustment)
        with claimed(new_embedding_file(name)) as path:
            save_adapter(path, adjusted, metadata)
        WRITTEN.add(cls.hidden.unique_id, path)
        return io.NodeOutput(embedding_word(path), str(path), ui={"text": [embedding_word(path)]})
