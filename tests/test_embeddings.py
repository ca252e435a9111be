"""Test-time embedding adjustment: its mathematics, and files and prompts on real text encoders."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from anchor_core import cli
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.embedding_file import adjust_embedding, read_embedding
from anchor_core.backends.diffusers.adjust import encode_adjusted, word_rows
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
from anchor_core.training.saving import save_trained
from anchor_core.training.settings import TrainSettings
from tests.backends import tiny_models
from tests.backends.tiny_models import T5_WIDTH, WIDTH, WIDTH_2

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """A subject's and an anchor's embeddings of other lengths, (3, 7, 24) each in float64."""
    generator = torch.Generator().manual_seed(0)
    subject, anchor = torch.randn(2, 3, 7, 24, generator=generator, dtype=torch.float64)
    return 2.3 * subject, anchor


def angle(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.cosine_similarity(one, other, dim=-1).clamp(-1, 1).acos()


# --- the formula ----------------------------------------------------------------------------------------------------


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


# --- alignment ------------------------------------------------------------------------------------------------------

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


# --- outputs of several encoders ------------------------------------------------------------------------------------


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


# --- prompts on diffusers' text encoders -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sd1", "sdxl", "sd3", "flux"])
def model(request, tmp_path_factory):
    return request.param, tiny_models.denoiser_of(tiny_models.build(request.param, tmp_path_factory.mktemp("words")))


SUBJECT, CLASS = "a photo of a sks dog in the snow", "a photo of a dog in the snow"


def embeddings(condition) -> torch.Tensor:
    return condition if isinstance(condition, torch.Tensor) else condition[0]


def test_prompts_are_adjusted_encoder_by_encoder(model):
    name, denoiser = model
    with torch.no_grad():
        subject, class_ = denoiser.encode_prompts([SUBJECT, CLASS])
    adjusted = encode_adjusted(denoiser, SUBJECT, CLASS, Adjustment(0.3, 1.5))
    own, other, moved = map(embeddings, (subject, class_, adjusted))
    blocks = {
        "sd1": [(WHOLE, slice(0, WIDTH))],
        "sdxl": [(WHOLE, slice(0, WIDTH)), (WHOLE, slice(WIDTH, WIDTH + WIDTH_2))],
        "sd3": [(slice(77), slice(0, WIDTH)), (slice(77), slice(WIDTH, WIDTH + WIDTH_2)), (slice(77, None), WHOLE)],
        "flux": [(WHOLE, slice(0, T5_WIDTH))],
    }[name]
    for block in blocks:
        torch.testing.assert_close(moved[block], rotate_and_rescale(own[block], other[block], 0.3, 1.5))
    if name == "sd3":
        assert not moved[:77, WIDTH + WIDTH_2 :].any()
    if not isinstance(subject, torch.Tensor):
        assert torch.equal(adjusted[1], subject[1])
        with_pooled = encode_adjusted(denoiser, SUBJECT, CLASS, Adjustment(0.3, 1.5), pooled=True)
        assert with_pooled[1].shape == subject[1].shape and not torch.allclose(with_pooled[1], subject[1])
    noisy = torch.randn(1, *tiny_models.LATENT)
    with torch.no_grad():
        assert torch.isfinite(denoiser.predict(noisy, denoiser.timesteps(torch.tensor([0.5])), [adjusted])).all()


def test_by_token_words_after_the_token_keep_their_own(model):
    """At alpha 1 and norm_mix 1 every position is what it is compared with."""
    name, denoiser = model
    with torch.no_grad():
        class_ = embeddings(denoiser.encode_prompt(CLASS))
    by_token, by_index = (
        embeddings(encode_adjusted(denoiser, SUBJECT, CLASS, Adjustment(1.0, norm_mix=1.0), align=align))
        for align in ("token", "index")
    )
    torch.testing.assert_close(by_index, class_, rtol=1e-4, atol=1e-4)
    if name == "flux":  # T5 splits words otherwise, and has no start
        assert not torch.allclose(by_token, by_index, atol=1e-3)
        return
    columns = slice(0, WIDTH)  # start, "a photo of a", then sks and dog by dog, and "in the snow" a place further
    torch.testing.assert_close(by_token[:6, columns], class_[:6, columns], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_token[6:77, columns], class_[5:76, columns], rtol=1e-4, atol=1e-4)


def test_the_class_prompt_is_encoded_by_the_current_or_the_pretrained_encoder(eps_denoiser, stir):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2, text_encoder=True))
    stir(adapter)
    with torch.no_grad():
        expected = {
            "current": eps_denoiser.encode_prompt(CLASS, adapted=True),
            "pretrained": eps_denoiser.encode_prompt(CLASS),
        }
    assert not torch.allclose(*expected.values(), atol=1e-3)
    for anchor, class_ in expected.items():
        moved = encode_adjusted(eps_denoiser, SUBJECT, CLASS, Adjustment(1.0, norm_mix=1.0), anchor=anchor)
        assert not moved.requires_grad
        torch.testing.assert_close(moved, class_, rtol=1e-4, atol=1e-4)
    for options, told in (({"anchor": "other"}, "anchor is 'other'"), ({"align": "shift"}, "align is 'shift'")):
        with pytest.raises(ValueError, match=told):
            encode_adjusted(eps_denoiser, SUBJECT, CLASS, Adjustment(), **options)


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_anchor_is_the_row_of_the_word_that_the_tokenizer_emits(model):
    """Not that of the piece which begins other words."""
    _, denoiser = model
    rows = word_rows(denoiser, "dog")
    tokenizer, encoder = denoiser.tokenizer, denoiser.text_encoder
    index = tokenizer.convert_tokens_to_ids("dog</w>")
    assert index == tokenizer("dog").input_ids[1]
    assert torch.equal(rows["clip_l"], encoder.get_input_embeddings().weight[index : index + 1])


@pytest.mark.parametrize("count", [1, 3])
def test_each_vector_of_a_file_is_adjusted_to_the_same_word(model, count):
    _, denoiser = model
    rows = word_rows(denoiser, "dog")
    vectors = {name: torch.randn(count, row.shape[-1]) for name, row in rows.items() if name != "t5xxl"}
    moved = adjust_embedding(vectors, "dog", rows, Adjustment(0.2, 1.5))
    assert moved.keys() == vectors.keys()
    for name, each in moved.items():
        torch.testing.assert_close(each, rotate_and_rescale(vectors[name], rows[name].expand(count, -1)))


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
    save_file({"emb_params": torch.randn(1, 32).to(torch.float8_e4m3fn)}, tmp_path / "fp8.safetensors")
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


def test_another_models_file_and_a_class_of_several_tokens_are_refused(model):
    _, denoiser = model
    rows = word_rows(denoiser, "dog")
    for vectors in ({"emb_params": torch.randn(1, 7)}, {"clip_l": torch.randn(1, WIDTH_2)}):
        with pytest.raises(
            ValueError, match="made for another model: its .* this model's text encoders are clip_l of 32"
        ):
            adjust_embedding(vectors, "dog", rows, Adjustment())
    with pytest.raises(ValueError, match="^class_word is 'stuffed dog', which is 8 tokens of clip_l"):
        adjust_embedding(
            {"emb_params": torch.randn(1, WIDTH)}, "stuffed dog", word_rows(denoiser, "stuffed dog"), Adjustment()
        )


# --- the command line -----------------------------------------------------------------------------------------------


def test_adjust_writes_a_file_and_says_what_it_did(model_folders, tmp_path, capsys):
    vectors = torch.randn(2, 32)
    save_file({"emb_params": vectors}, tmp_path / "sks.safetensors", {"name": "sks"})
    call = [
        "adjust",
        str(tmp_path / "sks.safetensors"),
        "--model",
        str(model_folders["epsilon"]),
        "--class-word",
        "dog",
    ]
    assert cli.main([*call, "--alpha", ".3", "--beta", "1.2", "--out", str(tmp_path / "out")]) == 0
    written = tmp_path / "out" / "sks.adjusted.safetensors"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["file"] == written.name and report["beta"] == 1.2 and report["norm_mix"] is None
    first = report["vectors"]["emb_params"][0]
    assert first["cosine_after"] > first["cosine_before"]
    moved = load_file(written)["emb_params"]
    assert moved.norm(dim=-1).tolist() == pytest.approx(
        [row["length_after"] for row in report["vectors"]["emb_params"]]
    )
    assert cli.main([*call, "--norm-mix", "1", "--alpha", "1", "--out", str(tmp_path / "mixed")]) == 0
    anchor = load_file(tmp_path / "mixed" / "sks.adjusted.safetensors")["emb_params"]
    torch.testing.assert_close(moved.norm(dim=-1), 1.2 * anchor.norm(dim=-1))
    capsys.readouterr()
    for options, told in (
        (["--alpha", "2"], "--alpha is 2.0"),
        (["--beta", "nan"], "--beta is nan"),
        (["--class-word", "stuffed"], "--class_word: class_word is 'stuffed', which is 7 tokens"),
        (["--model", str(model_folders["other"]) + "x"], "--model"),
    ):
        assert cli.main([*call, *options, "--out", str(tmp_path / "none")]) == 2
        error = capsys.readouterr().err
        assert told in error and len(error.splitlines()) == 1 and not (tmp_path / "none").exists()


def test_sample_adjusts_prompts_to_those_of_the_adapters_class(
    eps_denoiser, model_folders, concept, stir, tmp_path, capsys
):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2, text_encoder=True))
    stir(adapter)
    file = tmp_path / "adapter.safetensors"
    save_trained(file, eps_denoiser, concept, TrainSettings())
    call = [
        "sample",
        "--model",
        str(model_folders["epsilon"]),
        "--prompt",
        SUBJECT,
        "--steps",
        "2",
        "--adapter",
        str(file),
    ]

    def pixels(name: str, *options: str) -> bytes:
        assert cli.main([*call, *options, "--out", str(tmp_path / name)]) == 0
        return (tmp_path / name / "000.png").read_bytes()

    plain = pixels("plain")
    pictures = {
        plain,
        pixels("index", "--adjust", "index"),
        pixels("token", "--adjust", "token", "--adjust-beta", "1.2"),
    }
    assert len(pictures) == 3
    assert pixels("none", "--adjust", "token", "--adjust-alpha", "0", "--adjust-norm-mix", "0") == plain
    report = json.loads((tmp_path / "token" / "report.json").read_text())
    assert report["adjust"] == {
        "align": "token", "alpha": 0.2, "beta": 1.2, "norm_mix": None, "pooled": False, "anchor": "current"
    }  # fmt: skip
    assert report["pictures"][0]["class"] == CLASS
    capsys.readouterr()
    for options, told in (
        (["--adjust", "index", "--prompt", "a cat"], "does not name the subject"),
        (["--adjust", "index", "--adjust-pooled"], "pooled is on, but this model's prompts have no pooled output"),
        (["--adjust", "index", "--adjust_alpha", "-1"], "--adjust_alpha is -1.0"),
        (["--adjust", "index", "--class", CLASS, "--class", CLASS], "--class: given 2 times for 1 prompts"),
        (["--class", CLASS], "--class: rule 'cfg' reads no class prompt"),
        (["--adjust_beta", "1.5"], "--adjust_beta: it is read with --adjust alone"),
    ):
        assert cli.main([*call, *options, "--out", str(tmp_path / "refused")]) == 2
        error = capsys.readouterr().err
        assert told in error and len(error.splitlines()) == 1 and not (tmp_path / "refused").exists()
