"""What an adapter is made of: the options of an attachment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..checks import check_count, check_number, check_options, option
from .kinds import KINDS, NO_LAYERS
from .layers import EVERYTHING, LAYERS, ExactLayers, compile_layers, layer_choices


@dataclass(frozen=True)
class AdapterConfig:
    """What to attach.

    Args:
        rank: of the update, at least 1 and at most the width of each layer. LoKr: of the second factor of the
            Kronecker product (the first is about 8 x 8; a second one no wider than 2 rank is a full matrix). LoHa: of
            each of the two products. OFT: the blocks (r in the paper) into which each layer's input is divided, so that
            a larger rank trains less.
            full, svdiff and none have no rank.
        alpha: the update is multiplied by alpha / rank; None means `rank`. OFT and those without a rank have none.
        dropout: while training, in [0, 1). LoRA and DoRA: of the input of the update. LoKr and LoHa: of its output
            rows. The others have none.
        layers: a preset of `LAYERS`, or a regular expression that is searched for in the names of the networks'
            linear and convolution modules. With kind full, `everything` is all parameters of the denoising network,
            and an expression selects its norms too; with svdiff it is all linear and convolution layers, the outer
            ones too, and the lengths of the norms' weights.
        kind: of `KINDS`: lora, dora, lokr, loha, oft, full, svdiff; or none, which trains token vectors alone.
        text_encoder: adapt the text encoders as well.
        vectors: how many vectors of each CLIP text encoder the `token` stands for, which train too; 0 for none.
        token: the word of the subject prompt whose place they take.
        initial: the word whose embedding they start from, a single token; empty for `token` itself.
        detach_start: no gradient goes through the keys and values of a prompt's first token, as in Custom Diffusion.
        coft: epsilon of COFT, for kind oft: before each pass the parameters of a layer's blocks are projected to the
            ball of the radius epsilon (in / r)^2 / sqrt(r) about 0; 0 for none.
        ranks: by module name, where it is not `rank`: that of a file whose layers differ.
        kinds: by module name, where it is not `kind`: of `FILE_KINDS`, of a file whose layers differ.

    Raises:
        ValueError: naming an option out of its limits, or two that do not go together.
    """

    rank: int = option(
        8,
        "capacity of the update: 4 to 16 for a subject, 16 to 32 for a style; more learns finer detail, and more of "
        "the surroundings",
    )
    alpha: float | None = option(
        None, "the update counts alpha / rank: half of the rank is a gentler adapter; none means rank"
    )
    dropout: float = option(
        0.0, "share of the update's inputs left out in training: try 0.1 if the pictures are copied", minimum=0, below=1
    )
    layers: str = option(
        "attention", f"{', '.join((*LAYERS, EVERYTHING))}, or a regular expression over the names of layers"
    )
    kind: str = option(
        "lora",
        "what is trained: lora is read everywhere; dora, lokr, loha, oft and svdiff are other forms of an update, "
        "full the weights themselves, none token vectors alone",
        choices=(*KINDS, NO_LAYERS),
    )
    text_encoder: bool = option(
        False,
        "adapt the text encoders too: the word is learnt sooner, and touches other prompts sooner; the anchor keeps "
        "the pretrained ones",
    )
    vectors: int = option(
        0,
        "of the subject's token that are trained, as in Textual Inversion: 1 heeds prompts best, 4 is nearer to the "
        "subject; 0 for none",
        minimum=0,
    )
    token: str = option("sks", "the word of the subject prompt that the vectors stand for: the token of Concept")
    initial: str = option(
        "", "the word that the vectors start from, such as the class word, which gets there sooner; empty for the token"
    )
    detach_start: bool = option(
        False,
        "with layers cross_attention_kv: no gradient by the first token, as in Custom Diffusion; else leave it off",
    )
    coft: float = option(
        0.0,
        "oft: how far a block may turn (COFT), which keeps more of the model; 6e-5 as published, 0 for as far as it "
        "learns to",
        minimum=0,
    )
    ranks: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(check_count("rank", self.rank)))
        check_options(self)
        check_number("alpha", self.alpha, above=0)
        if self.kind in ("oft", "full", "svdiff", NO_LAYERS) and self.dropout:
            raise ValueError(
                f"dropout is {self.dropout!r}, but with kind {self.kind!r} it takes 0: it has no update to leave out"
            )
        if self.coft and self.kind != "oft":
            raise ValueError(f"coft is {self.coft:g}, but it takes 0 with kind {self.kind!r}; it is an option of oft")
        if self.kind == NO_LAYERS and not self.vectors:
            raise ValueError("kind is 'none' and vectors is 0, so that nothing would be trained; take vectors 1")
        if self.kind == NO_LAYERS and self.text_encoder:
            raise ValueError(
                "text_encoder is True, but with kind 'none' no layer is adapted; take lora, or leave it off"
            )
        if self.vectors and not (isinstance(self.token, str) and self.token.strip()):
            raise ValueError(f"token is {self.token!r}, but it takes a word of the subject prompt, such as sks")
        if not isinstance(self.layers, str) or not self.layers:
            raise ValueError(f"layers is {self.layers!r}, but it takes {layer_choices()}")
        if self.layers == EVERYTHING and self.kind not in ("full", "svdiff", NO_LAYERS):
            raise ValueError(
                f"layers is {EVERYTHING!r}, which has norms too, but kind {self.kind!r} takes linear and convolution "
                "layers; take all_linear_conv, or kind full or svdiff"
            )
        if self.detach_start and (self.layers != "cross_attention_kv" or self.kind == NO_LAYERS):
            raise ValueError("detach_start is True, but it goes with layers cross_attention_kv only; leave it off")
        if not isinstance(self.layers, ExactLayers):
            compile_layers(self.layers)

    def kind_of(self, name: str) -> str:
        """That of the layer of this module."""
        return self.kinds.get(name, self.kind)

    @property
    def used_kinds(self) -> set[str]:
        """The kinds of its layers."""
        return ({self.kind} | set(self.kinds.values())) - {NO_LAYERS}

    @property
    def trains_text(self) -> bool:
        """Whether prompts are encoded otherwise with the adapter than without it."""
        return self.text_encoder or self.vectors > 0
