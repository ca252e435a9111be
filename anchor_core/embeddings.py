"""Test-time embedding adjustment (TEA, arXiv 2506.22685): the subject's embedding is turned towards its class's.

Personalisation lengthens the subject's embedding and turns it away from the class, so that it drowns the rest of the
prompt. Nothing is trained here: an embedding M_v is rotated towards that of the class, M_c, and given another length.
It works on the token's own vectors (a textual-inversion file) and on the outputs of the text encoder, position by
position. Imported by both backends, and imports neither.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import accumulate

import torch
from torch import Tensor
from torch.linalg import vector_norm

from .checks import check_number

ALIGNMENTS = ("index", "token")
NORM_MIX = 0.5
"""The released code's."""


def rotate_and_rescale(subject: Tensor, anchor: Tensor, alpha: float = 0.2, beta: float | Tensor = 1.5) -> Tensor:
    """M^ = sin((1 - alpha) theta) / sin theta M~_v + sin(alpha theta) / sin theta M~_c (TEA, Eq. 1).

    M~_v and M~_c are M_v and M_c at the length beta |M_c|, theta is the angle between them. The result has that length
    too, and lies on the arc: alpha 0 only rescales, alpha 1 has the direction of the class. Where sin theta < 1e-6 it
    is on the straight line, as in the released code: as good as the arc for like directions, shorter for opposite ones.

    Args:
        subject: M_v, (..., D).
        anchor: M_c, (..., D), of the same shape or one that is broadcast to it.
        alpha: rotation, from 0 to 1.
        beta: length over that of the anchor, greater than 0; or (..., 1).

    Raises:
        ValueError: for a number out of its limits, or a row of zeros, which has no direction, unless the anchor's is
            one too, as in padding: it stays.
    """
    _check_share("alpha", alpha)
    if not isinstance(beta, Tensor):
        check_number("beta", beta, above=0)
    dtype = torch.promote_types(subject.dtype, torch.float32)
    given, (subject, anchor) = subject.dtype, (each.to(dtype) for each in torch.broadcast_tensors(subject, anchor))
    lengths = [vector_norm(each, dim=-1, keepdim=True) for each in (subject, anchor)]  # (..., 1)
    if ((lengths[0] == 0) != (lengths[1] == 0)).any():
        raise ValueError("subject is zero where anchor is not, or the reverse, and zero has no direction")
    subject, anchor = (each / length.where(length > 0, 1.0) for each, length in zip((subject, anchor), lengths))
    # Not acos of the cosine, which in float32 is off by up to 4e-4 near 0 and pi.
    theta = 2 * torch.atan2(*(vector_norm(each, dim=-1, keepdim=True) for each in (subject - anchor, subject + anchor)))
    sine = theta.sin()
    straight = sine < 1e-6
    sine = sine.where(~straight, 1.0)
    of_subject = torch.where(straight, 1 - alpha, ((1 - alpha) * theta).sin() / sine)
    of_anchor = torch.where(straight, alpha, (alpha * theta).sin() / sine)
    return (beta * lengths[1] * (of_subject * subject + of_anchor * anchor)).to(given)


def rotate_and_mix_norms(subject: Tensor, anchor: Tensor, alpha: float = 0.2, norm_mix: float = NORM_MIX) -> Tensor:
    """As `rotate_and_rescale`, to the length (1 - norm_mix) |M_v| + norm_mix |M_c|: the released code's form.

    There the rotation is called rho, and norm_mix alpha. Equal embeddings stay what they are.
    """
    return rotate_and_rescale(subject, anchor, alpha, beta_of_norm_mix(subject, anchor, norm_mix))


def beta_of_norm_mix(subject: Tensor, anchor: Tensor, norm_mix: float = NORM_MIX) -> Tensor:
    """The paper's beta that is the released code's norm_mix, ((1 - norm_mix) |M_v| + norm_mix |M_c|) / |M_c|, (..., 1).

    1 where M_c is 0.
    """
    _check_share("norm_mix", norm_mix)
    dtype = torch.promote_types(subject.dtype, torch.float32)
    own, other = (vector_norm(each.to(dtype), dim=-1, keepdim=True) for each in (subject, anchor))
    return torch.where(other > 0, torch.lerp(own, other.expand_as(own), norm_mix) / other.where(other > 0, 1.0), 1.0)


def _check_share(name: str, value: float) -> float:
    if check_number(name, value, minimum=0) > 1:
        raise ValueError(f"{name} is {value!r}, but it takes a number from 0 to 1")
    return value


@dataclass(frozen=True)
class Adjustment:
    """How far an embedding is turned, and the length that it gets.

    Args:
        alpha: rotation, from 0 to 1. The paper has 0.2; the authors' scripts 0.1 for prompts of a tuned text encoder.
        beta: length over that of the class's embedding.
        norm_mix: from 0 to 1, instead of `beta`: share of the class's length in the new one. On prompts `beta` rescales
            every position, also those where both prompts agree, which `norm_mix` leaves as they are.
    """

    alpha: float = 0.2
    beta: float = 1.5
    norm_mix: float | None = None

    def __post_init__(self):
        _check_share("alpha", self.alpha)
        check_number("beta", self.beta, above=0)
        if self.norm_mix is not None:
            _check_share("norm_mix", self.norm_mix)

    def __call__(self, subject: Tensor, anchor: Tensor) -> Tensor:
        if self.norm_mix is None:
            return rotate_and_rescale(subject, anchor, self.alpha, self.beta)
        return rotate_and_mix_norms(subject, anchor, self.alpha, self.norm_mix)


# --- outputs of text encoders ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Where the output of one text encoder lies in (tokens, width), and what the encoder is called."""

    rows: slice
    columns: slice
    encoder: Hashable


WHOLE = slice(None)


def side_by_side(widths: Sequence[int], rows: slice, encoders: Sequence[Hashable] | None = None) -> list[Part]:
    """Encoders whose outputs share their rows, the first one's columns first; called 0, 1, ... if not otherwise."""
    ends = list(accumulate(widths, initial=0))
    names = range(len(widths)) if encoders is None else encoders
    return [Part(rows, slice(start, end), name) for start, end, name in zip(ends, ends[1:], names)]


def adjust_prompt(
    subject: Tensor,
    class_: Tensor,
    subject_parts: Sequence[Part],
    class_parts: Sequence[Part],
    adjustment: Adjustment,
    alignment: Mapping[Hashable, Tensor] | None = None,
) -> Tensor:
    """The outputs of the text encoders for a subject prompt, adjusted to those for its class prompt (TEA, Eq. 2).

    Each encoder's outputs are adjusted on their own, each position with its own angle and lengths.

    Args:
        subject, class_: (tokens, width).
        subject_parts, class_parts: the encoders in each of the two.
        alignment: by encoder, which position of the class prompt each of the subject prompt's is compared with
            (`align_rows`); None for the same index, as published.

    Raises:
        ValueError: if the two are not of one model, of different length under the same index, not finite, or zero in
            different places.
    """
    _check_finite(subject, class_)
    encoders = [part.encoder for part in subject_parts]
    if subject.shape[-1] != class_.shape[-1] or encoders != [part.encoder for part in class_parts]:
        raise ValueError(
            f"class_conditioning is {tuple(class_.shape)} and the subject's {tuple(subject.shape)}, so they are of "
            "two models; encode both prompts with the same kind of text encoder"
        )
    adjusted = subject.clone()
    for ours, theirs in zip(subject_parts, class_parts):
        own, other = subject[ours.rows, ours.columns], class_[theirs.rows, theirs.columns]
        if alignment is not None:
            other = other[alignment[ours.encoder].to(other.device)]
        if len(own) != len(other):
            raise ValueError(
                f"class_conditioning has {len(class_)} tokens and the subject's {len(subject)}, which have no "
                "common index; write prompts of the same number of parts, or align them by token"
            )
        adjusted[ours.rows, ours.columns] = _adjusted(own, other.to(own), adjustment)
    return adjusted


def adjust_pooled(subject: Tensor, class_: Tensor, widths: Sequence[int], adjustment: Adjustment) -> Tensor:
    """Pooled outputs (..., sum of widths) of encoders side by side, each adjusted on its own.

    Raises:
        ValueError: if the two are not of one model.
    """
    _check_finite(subject, class_)
    if subject.shape != class_.shape or subject.shape[-1] != sum(widths):
        raise ValueError(
            f"class_conditioning's pooled output is {tuple(class_.shape)} and the subject's {tuple(subject.shape)}, so "
            "they are of two models; encode both prompts with the same kind of text encoder"
        )
    pairs = zip(subject.split(list(widths), dim=-1), class_.to(subject).split(list(widths), dim=-1))
    return torch.cat([_adjusted(own, other, adjustment) for own, other in pairs], dim=-1)


def _adjusted(subject: Tensor, class_: Tensor, adjustment: Adjustment) -> Tensor:
    try:
        return adjustment(subject, class_)
    except ValueError as error:
        raise ValueError(
            "subject_conditioning or class_conditioning is zero where the other is not, as after a shorter prompt's "
            "end; align by token, or encode both prompts again"
        ) from error


def _check_finite(subject: Tensor, class_: Tensor) -> None:
    for name, each in (("subject", subject), ("class", class_)):
        if not torch.isfinite(each).all():
            raise ValueError(f"{name}_conditioning has NaN or infinite values; encode the prompt again")


def align_rows(
    subject: Sequence[Sequence[Hashable]], class_: Sequence[Sequence[Hashable]], empty: Sequence[Hashable]
) -> Tensor:
    """Which position of the class prompt each of the subject prompt's is compared with: (positions of the subject,).

    The words that both prompts have are compared with themselves. The subject's own token, at each of its places, is
    compared with what stands there instead; where the class prompt has nothing there, with the word after it, which in
    "sks dog" against "dog" is the class word, or, at the end, the word before it. Several vectors of one token are all
    compared with the same one. Starts are compared with starts in their order, and so are ends, and padding.

    Args:
        subject, class_: the token ids of each, with start, end and padding, in the sections that the encoder reads.
        empty: those of the empty prompt's one section.

    Raises:
        ValueError: if one of the prompts is empty.
    """
    ours, theirs = [key for part in subject for key in part], [key for part in class_ for key in part]
    (own, *around), (other, *around_class) = _places(subject, empty), _places(class_, empty)
    for name, content in (("subject_prompt", own), ("class_prompt", other)):
        if not content:
            raise ValueError(f"{name} is empty, but it takes the text that was encoded")
    rows = torch.zeros(len(ours), dtype=torch.long)
    matcher = SequenceMatcher(None, [ours[row] for row in own], [theirs[row] for row in other], autojunk=False)
    for _, first, last, start, stop in matcher.get_opcodes():  # parts that are the same, or stand for each other
        place = other[start:stop] or other[start:][:1] or other[-1:]
        for number, row in enumerate(own[first:last]):
            rows[row] = place[min(number, len(place) - 1)]
    for kind, of_class in zip(around, around_class):
        of_class = of_class or [len(theirs) - 1]
        for number, row in enumerate(kind):
            rows[row] = of_class[min(number, len(of_class) - 1)]
    return rows


def _places(sections: Sequence[Sequence[Hashable]], empty: Sequence[Hashable]) -> tuple[list[int], ...]:
    """Positions of the content of all sections, their starts, their ends, and their padding.

    T5 has no start, and its empty prompt begins with the end.
    """
    content, starts, ends, padding = [], [], [], []
    offset = 0
    for section in sections:
        start = int(section[0] == empty[0] and len(empty) > 1)
        end = next((row for row in range(start, len(section)) if section[row] == empty[start]), len(section))
        rows = range(offset, offset + len(section))
        starts += rows[:start]
        content += rows[start:end]
        ends += rows[end : end + 1]
        padding += rows[end + 1 :]
        offset += len(section)
    return content, starts, ends, padding
