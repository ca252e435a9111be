"""Test-time embedding adjustment: its formula, how prompts are aligned, and several encoders' outputs."""

from __future__ import annotations

import math

import pytest
import torch

from anchor_core.embeddings import (
    WHOLE,
    Adjustment,
    Part,
    adjust_pooled,
    adjust_prompt,
    align_rows,
    beta_of_norm_mix,
    rotate_and_mix_norms,
    rotate_and_rescale,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """A subject's and an anchor's embeddings of other lengths, (3, 7, 24) each in float64."""
    generator = torch.Generator().manual_seed(0)
    subject, anchor = torch.randn(2, 3, 7, 24, generator=generator, dtype=torch.float64)
    return 2.3 * subject, anchor


def angle(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.cosine_similarity(one, other, dim=-1).clamp(-1, 1).acos()


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("beta", [0.5, 1.5])
def test_the_result_lies_on_the_arc_at_its_length(pair, alpha, beta):
    subject, anchor = pair
    moved = rotate_and_rescale(subject, anchor, alpha, beta)
    torch.testing.assert_close(moved.norm(dim=-1), beta * anchor.norm(dim=-1), **EXACT)
    torch.testing.assert_close(angle(moved, anchor), (1 - alpha) * angle(subject, anchor), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(angle(moved, subject), alpha * angle(subject, anchor), rtol=1e-6, atol=1e-6)


def test_no_rotation_keeps_the_direction_and_a_whole_one_is_the_anchors(pair):
    subject, anchor = pair
    torch.testing.assert_close(
        rotate_and_rescale(subject, anchor, 0.0, 1.5),
        1.5 * subject * (anchor.norm(dim=-1, keepdim=True) / subject.norm(dim=-1, keepdim=True)),
        **EXACT,
    )
    torch.testing.assert_close(rotate_and_rescale(subject, anchor, 1.0, 1.5), 1.5 * anchor, **EXACT)
    torch.testing.assert_close(rotate_and_mix_norms(subject, anchor, 0.0, 0.0), subject, **EXACT)


@pytest.mark.parametrize("norm_mix", [0.0, 0.5, 1.0])
def test_norm_mix_is_the_papers_form_at_another_beta(pair, norm_mix):
    """The released code: both at the length n = (1 - a) |M_v| + a |M_c|, then the arc."""
    subject, anchor = pair
    own, other = (each.norm(dim=-1, keepdim=True) for each in pair)
    n, theta = (1 - norm_mix) * own + norm_mix * other, angle(subject, anchor).unsqueeze(-1)
    published = n * ((0.8 * theta).sin() * subject / own + (0.2 * theta).sin() * anchor / other) / theta.sin()
    torch.testing.assert_close(rotate_and_mix_norms(subject, anchor, 0.2, norm_mix), published, **EXACT)
    beta = beta_of_norm_mix(subject, anchor, norm_mix)
    torch.testing.assert_close(rotate_and_rescale(subject, anchor, 0.2, beta), published, **EXACT)
    torch.testing.assert_close(beta_of_norm_mix(2 * anchor, anchor), torch.full_like(own, 1.5), **EXACT)


def test_parallel_and_opposite_embeddings_have_no_arc(pair):
    _, anchor = pair
    torch.testing.assert_close(rotate_and_rescale(3 * anchor, anchor, 0.3, 1.5), 1.5 * anchor)
    torch.testing.assert_close(rotate_and_mix_norms(anchor, anchor, 0.3, 0.5), anchor)
    torch.testing.assert_close(rotate_and_rescale(-anchor, anchor, 0.25, 1.0), -0.5 * anchor)
    near = anchor + 1e-9 * torch.ones_like(anchor)
    assert torch.isfinite(rotate_and_rescale(near.float(), anchor.float(), 0.3, 1.5)).all()


@pytest.mark.parametrize("apart", [1e-4, 1e-3, 1e-2])
def test_nearly_opposite_embeddings_keep_their_length_in_float32(apart):
    generator = torch.Generator().manual_seed(0)
    anchor, other = torch.randn(2, 200, 64, generator=generator)
    moved = rotate_and_rescale(apart * other - 3 * anchor, anchor, 0.25, 1.0)
    torch.testing.assert_close(moved.norm(dim=-1), anchor.norm(dim=-1), rtol=1e-2, atol=0)
    torch.testing.assert_close(rotate_and_rescale(-3 * anchor, anchor, 0.25, 1.0), -0.5 * anchor)


def test_rows_of_zeros_stay_in_padding_and_are_refused_elsewhere(pair):
    subject, anchor = (each.clone() for each in pair)
    subject[0, 0], anchor[0, 0] = 0, 0
    for moved in (rotate_and_rescale(subject, anchor), rotate_and_mix_norms(subject, anchor)):
        assert not moved[0, 0].any() and torch.isfinite(moved).all()
    anchor[0, 0] = 1
    with pytest.raises(ValueError, match="zero where"):
        rotate_and_rescale(subject, anchor)


def test_half_precision_is_computed_in_float32_and_given_back(pair):
    subject, anchor = (each.half() for each in pair)
    moved = rotate_and_rescale(subject, anchor)
    assert moved.dtype == torch.float16
    assert torch.equal(moved, rotate_and_rescale(subject.float(), anchor.float()).half())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": 1.1}, "alpha is 1.1, but it takes a number from 0 to 1"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"beta": math.inf}, "beta is inf"),
        ({"norm_mix": 2.0}, "norm_mix is 2.0"),
    ],
)
def test_numbers_out_of_their_limits_are_named(pair, options, told):
    with pytest.raises(ValueError, match=f"^{told}"):
        Adjustment(**options)
    function = rotate_and_mix_norms if "norm_mix" in options else rotate_and_rescale
    with pytest.raises(ValueError, match=f"^{told}"):
        function(*pair, **options)


START, END, PAD = 90, 91, 0
EMPTY = [START, END, PAD]
A, PHOTO, OF, SKS, DOG, IN, SNOW = range(1, 8)


def section(*ids: int, length: int = 12, start: bool = True) -> list[int]:
    ids = [START] * start + [*ids, END]
    return ids + [PAD] * (length - len(ids))


@pytest.mark.parametrize(
    ("subject", "class_", "expected"),
    [
        ((A, SKS, DOG, IN, SNOW), (A, DOG, IN, SNOW), [0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ((A, SKS, IN, SNOW), (A, DOG, IN, SNOW), range(12)),
        ((A, 50, 51, IN, SNOW), (A, DOG, IN, SNOW), [0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ((A, 50, 51, 52, DOG), (A, DOG), [0, 1, 2, 2, 2, 2, 3, 4, 5, 6, 7, 8]),
        ((A, DOG, SKS), (A, DOG), [0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ((DOG,), (DOG,), range(12)),
        ((SKS,), (A, DOG), [0, 1, *range(3, 12), 11]),
        ((SKS, DOG, IN, A, SKS, DOG), (DOG, IN, A, DOG), [0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]),
        ((50, 51, IN, A, 50, 51), (DOG, IN, A, DOG), [0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]),
    ],
    ids="alone replaced vectors three after same longer twice vectors_twice".split(),
)
def test_words_are_compared_with_themselves(subject, class_, expected):
    assert align_rows([section(*subject)], [section(*class_)], EMPTY).tolist() == list(expected)


def test_alignment_without_a_start_and_where_padding_ends_prompts_too():
    rows = align_rows([section(A, SKS, DOG, start=False)], [section(A, DOG, start=False)], [END])
    assert rows.tolist()[:6] == [0, 1, 1, 2, 3, 4]
    ours, theirs = ([START, *ids, *[END] * (8 - len(ids))] for ids in ((A, SKS, DOG), (A, DOG)))
    assert align_rows([ours], [theirs], [START, END, END]).tolist() == [0, 1, 2, 2, 3, 4, 5, 6, 7]
    # A token of the same id as the padding, as `!` is for CLIP-G, is a word like others before the end.
    rows = align_rows([section(A, PAD, DOG)], [section(A, DOG)], EMPTY)
    assert rows.tolist()[:5] == [0, 1, 2, 2, 3]


def test_alignment_goes_over_the_sections_of_a_long_prompt():
    """Six words a section: the token pushes one word of the first into the second."""
    words = range(10, 20)
    ours = [10, 11, SKS, *words[2:]]
    cut = [[section(*ids[:6], length=8), section(*ids[6:], length=8)] for ids in (ours, list(words))]
    rows = align_rows(*cut, EMPTY).tolist()
    flat = [[key for part in prompt for key in part] for prompt in cut]
    for row, key in enumerate(flat[0]):
        assert flat[1][rows[row]] == (12 if key == SKS else key)


def test_starts_ends_and_padding_are_each_compared_with_their_own():
    """A word that does not fit is moved to the next section whole, and the rest of its own is padded."""
    ours = [section(10, 11, SKS, 12, length=6), section(13, 14, length=6)]
    theirs = [section(10, 11, 12, length=6), section(13, 14, length=6)]
    for class_ in (theirs, theirs[:1]):
        rows = align_rows(ours, class_, EMPTY).tolist()
        flat = [[key for part in prompt for key in part] for prompt in (ours, class_)]
        for row, key in enumerate(flat[0]):
            if key in (START, END, PAD):
                assert flat[1][rows[row]] == key
    assert [rows[0], rows[6]] == [0, 0]
    assert align_rows([section(SKS)], [[START, DOG, END]], EMPTY).tolist() == [0, 1, *[2] * 10]


def test_an_empty_prompt_is_refused():
    for name, prompts in (("class", ([section(SKS)], [section()])), ("subject", ([section()], [section(DOG)]))):
        with pytest.raises(ValueError, match=f"^{name}_prompt is empty"):
            align_rows(*prompts, EMPTY)


def test_every_encoder_has_its_own_angles_and_lengths(pair):
    """SD3's layout: two encoders side by side with padding, and one below."""
    (subject, *_), (class_, *_) = (each.clone() for each in pair)  # (7, 24)
    subject[:4, 20:], class_[:4, 20:] = 0, 0
    parts = [
        Part(slice(4), slice(0, 8), "l"),
        Part(slice(4), slice(8, 20), "g"),
        Part(slice(4, None), WHOLE, "t5"),
    ]
    moved = adjust_prompt(subject, class_, parts, parts, Adjustment(0.2, 1.5))
    for part in parts:
        expected = rotate_and_rescale(subject[part.rows, part.columns], class_[part.rows, part.columns])
        assert torch.equal(moved[part.rows, part.columns], expected)
    assert not moved[:4, 20:].any()
    rows = torch.tensor([0, 1, 1, 2])
    aligned = adjust_prompt(subject, class_, parts[:2], parts[:2], Adjustment(), {"l": rows, "g": rows})
    assert torch.equal(aligned[:4, :8], rotate_and_rescale(subject[:4, :8], class_[rows, :8]))
    assert torch.equal(aligned[4:], subject[4:])
    pooled = adjust_pooled(subject[:1], class_[:1], [8, 16], Adjustment())
    assert torch.equal(pooled[:, 8:], rotate_and_rescale(subject[:1, 8:], class_[:1, 8:]))


def test_conditionings_that_do_not_fit_are_refused(pair):
    subject, class_ = pair[0][0], pair[1][0]
    whole = [Part(WHOLE, WHOLE, 0)]

    def refusal(one, other) -> str:
        with pytest.raises(ValueError) as caught:
            adjust_prompt(one, other, whole, whole, Adjustment())
        return str(caught.value)

    assert "class_conditioning has NaN" in refusal(subject, class_ * math.nan)
    assert "subject_conditioning has NaN" in refusal(subject * math.inf, class_)
    assert "are of two models" in refusal(subject, class_[:, :20])
    assert "class_conditioning has 5 tokens and the subject's 7" in refusal(subject, class_[:5])
    shorter = class_.clone()
    shorter[5:] = 0  # as text encoders that blank what is after the end
    assert "class_conditioning is zero where the other is not" in refusal(subject, shorter)
    with pytest.raises(ValueError, match="pooled output.*of two models"):
        adjust_pooled(subject, class_, [20], Adjustment())
