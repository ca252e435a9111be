"""Pictures of any systems in one table: the protocol's figures, the encoders, and how pictures find their prompts."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from anchor_core import cli
from anchor_core.evaluation import metrics
from anchor_core.evaluation.compare import REAL, Comparison, markdown
from anchor_core.evaluation.encoders import Clip, Dino, open_encoders, preprocess
from anchor_core.evaluation.metrics import Encoders
from anchor_core.evaluation.picture_folders import class_only, gather, in_order, read_prompts
from tests.conftest import build_tokenizer

# CLIP-I, CLIP-T, DINO as printed in arXiv 2511.22245, in the order of its rows.
TABLE_1 = {
    "Ours": (0.7821, 0.3059, 0.6031),
    "IP-Adapter": (0.8311, 0.2646, 0.6290),
    "SuDe": (0.7791, 0.3044, 0.5931),
    "DreamBooth (FT)": (0.7751, 0.3035, 0.5870),
    "SVDiff": (0.7455, 0.3162, 0.5144),
    "DreamBooth (LoRA)": (0.7302, 0.3191, 0.4839),
    "Custom Diffusion": (0.6479, 0.3154, 0.5568),
    "Textual Inversion": (0.7579, 0.2633, 0.5287),
    "BLIP-Diffusion": (0.7016, 0.2949, 0.4544),
}
TABLE_1_MEANS = [2.667, 3.333, 3.667, 4.667, 5.0, 5.333, 5.667, 6.667, 8.0]
TABLE_2_SDXL = [(0.7939, 0.3107, 0.6586), (0.7874, 0.3140, 0.6429), (0.8005, 0.3154, 0.6661)]
TABLE_2_SD3 = [(0.7465, 0.3182, 0.5130), (0.7461, 0.3211, 0.4997), (0.7579, 0.3187, 0.5679)]


def test_ranks_of_the_papers_first_table():
    means, places = metrics.rank(list(TABLE_1.values()))
    assert means == pytest.approx(TABLE_1_MEANS, abs=5e-4)
    assert places == list(range(1, 10))
    turned, backwards = metrics.rank(list(TABLE_1.values())[::-1])
    assert turned == means[::-1] and backwards == places[::-1]


def test_ranks_of_the_papers_second_table_with_its_tie():
    assert metrics.rank(TABLE_2_SDXL)[1] == [2, 3, 1]
    means, places = metrics.rank(TABLE_2_SD3)
    assert means == pytest.approx([7 / 3, 7 / 3, 4 / 3])
    assert places == [2, 3, 1]  # DreamBooth and BFT tie: the row above comes first
    assert metrics.rank([TABLE_2_SD3[i] for i in (1, 0, 2)])[1] == [2, 3, 1]


def test_equal_values_share_the_mean_of_their_ranks():
    assert metrics.rank([[1.0], [3.0], [1.0], [2.0]])[0] == [3.5, 1.0, 3.5, 2.0]
    with pytest.raises(ValueError, match="table is empty"):
        metrics.rank([])


def test_real_against_real_leaves_each_picture_itself_out():
    references = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    assert metrics.real_against_real(references) == pytest.approx((0 + 2 * 0.5**0.5) / 3)
    with pytest.raises(ValueError, match="two or more"):
        metrics.real_against_real(references[:1])


def test_subjects_count_once_and_pairs_once_when_pooled():
    average = metrics.Average.of([0.2, 0.8], [3, 1])
    assert (average.mean, average.pooled) == (pytest.approx(0.5), pytest.approx(0.35))
    assert average.spread == pytest.approx(0.6 / 2**0.5)
    assert metrics.Average.of([0.2], [3]).spread is None


# --- encoders -------------------------------------------------------------------------------------------------------


def picture(height: int, width: int, seed: int) -> torch.Tensor:
    """A smooth picture (3, H, W) on 8 bits, so that a file holds it exactly."""
    coarse = torch.rand((1, 3, 4, 4), generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth[0] * 255).round() / 255


@pytest.fixture(scope="module")
def encoder_folders(tmp_path_factory):
    """CLIP, DINO and DINOv2 of the real classes at a tiny size and random weights, in transformers' layout."""
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    root = tmp_path_factory.mktemp("encoders")
    tokenizer = build_tokenizer(root / "words")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    clip = CLIPConfig(
        text_config={**small, **ends, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = {
            "clip": CLIPModel(clip),
            "dino": ViTModel(ViTConfig(**small, image_size=28, patch_size=7), add_pooling_layer=False),
            "dinov2": Dinov2Model(Dinov2Config(**{**small, "mlp_ratio": 2}, image_size=56, patch_size=14)),
        }
    for name, model in models.items():
        model.save_pretrained(root / name)
    tokenizer.save_pretrained(root / "clip")
    return root


def test_preprocessing_is_that_of_clips_own_processor():
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor()
    for height, width in ((300, 260), (150, 334), (224, 224)):  # of even margins: torchvision rounds half up
        given = picture(height, width, seed=height)
        image = Image.fromarray((given.movedim(0, -1) * 255).round().to(torch.uint8).numpy())
        expected = torch.as_tensor(processor(image, return_tensors="np")["pixel_values"][0])
        ours = preprocess(given, 224, 224, processor.image_mean, processor.image_std)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_clip_gives_what_the_model_gives(encoder_folders):
    clip = Clip.from_pretrained(encoder_folders / "clip")
    pictures = [picture(40, 60, 1), picture(32, 32, 2)]
    prompts = ["a photo of a dog", "a cat in the snow"]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    inputs = torch.stack([preprocess(each, 32, 32, mean, std) for each in pictures])
    tokens = clip.tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = clip.network(pixel_values=inputs, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    for ours, theirs in ((clip(pictures), out.image_embeds), (clip.text(prompts), out.text_embeds)):
        torch.testing.assert_close(torch.nn.functional.normalize(ours, dim=-1), theirs)


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_dino_is_the_class_token_of_every_picture(encoder_folders, name):
    dino = Dino.from_pretrained(encoder_folders / name)
    pictures = [picture(50, 40, seed) for seed in range(3)]
    together = dino(pictures)
    assert together.shape == (3, 16)
    torch.testing.assert_close(together[1], dino(pictures[1:2])[0])
    # After the last layer norm, whose weights are at their start: every row has mean 0 and deviation 1.
    torch.testing.assert_close(together.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(together.var(1, correction=0), torch.ones(3), atol=1e-2, rtol=0)
    assert not torch.allclose(together[0], together[1], atol=1e-4)


def test_a_file_in_half_precision_is_computed_with_in_full(encoder_folders, tmp_path):
    from transformers import ViTModel

    ViTModel.from_pretrained(encoder_folders / "dino", add_pooling_layer=False).half().save_pretrained(tmp_path)
    pictures = [picture(28, 28, 0)]
    half, full = (Dino.from_pretrained(folder)(pictures) for folder in (tmp_path, encoder_folders / "dino"))
    torch.testing.assert_close(half, full, atol=2e-2, rtol=0)


def test_other_models_are_refused_in_one_line(encoder_folders, tmp_path):
    for opened, message in (
        (lambda: open_encoders(encoder_folders / "dino", None), "model of type vit, but it takes"),
        (lambda: open_encoders(None, encoder_folders / "clip"), "model of type clip, but it takes"),
        (lambda: open_encoders(tmp_path, None), "cannot be opened"),
        (lambda: open_encoders(None, None), "takes one at least"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            opened()
        assert "\n" not in str(caught.value)


def test_a_model_without_some_of_its_weights_is_refused(encoder_folders, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((encoder_folders / "dino/config.json").read_bytes())
    tensors = load_file(encoder_folders / "dino/model.safetensors")
    removed = tensors.pop("layernorm.weight")
    assert removed.shape == (16,)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights \(layernorm.weight\)"):
        Dino.from_pretrained(tmp_path)


# --- the table ------------------------------------------------------------------------------------------------------


def means(pictures) -> torch.Tensor:
    """The mean colour: a picture encoder of which all figures are known."""
    return torch.stack([each.mean((1, 2)) for each in pictures])


def plain(*colours) -> list[torch.Tensor]:
    return [torch.tensor(colour, dtype=torch.float32).view(3, 1, 1).expand(3, 2, 2) for colour in colours]


RED, GREEN, BLUE = (1, 0, 0), (0, 1, 0), (0, 0, 1)
WORDS = {"red": RED, "green": GREEN, "blue": BLUE}


def words(prompts) -> torch.Tensor:
    return torch.tensor([WORDS[prompt] for prompt in prompts], dtype=torch.float32)


def test_a_comparison_averages_pairs_then_subjects():
    comparison = Comparison(Encoders(means, words, None))
    comparison.add_references("one", plain(RED, RED, GREEN))
    comparison.add_references("two", plain(BLUE))
    comparison.add("copies", "one", plain(RED, RED), ["red", "green"])
    comparison.add("copies", "two", plain(BLUE), ["blue"])
    comparison.add("obeys", "one", plain(GREEN), ["green"])
    comparison.add("obeys", "two", plain(RED), ["red"])
    comparison.add_drift("obeys", 2.0)
    result = comparison.result()
    copies, obeys = result["systems"]["copies"], result["systems"]["obeys"]
    assert copies["clip_i"]["mean"] == pytest.approx((4 / 6 + 1) / 2)
    assert copies["clip_i"]["pooled"] == pytest.approx((4 + 1) / 7)
    assert copies["clip_t"]["mean"] == pytest.approx((0.5 + 1) / 2)
    assert obeys["clip_i"]["mean"] == pytest.approx((1 / 3 + 0) / 2) and obeys["clip_t"]["mean"] == pytest.approx(1)
    assert (copies["mean_rank"], obeys["mean_rank"]) == (1.5, 1.5) and list(result["systems"]) == ["copies", "obeys"]
    assert result["real"]["clip_i"]["mean"] == pytest.approx(2 / 6)  # of the one subject with several pictures
    lines = markdown(result).splitlines()
    assert lines[2].startswith(f"| {REAL} | 0.333 | n/a | n/a |")
    assert lines[3].endswith("| 1.50 | 1 | n/a |") and lines[4].endswith("| 1.50 | 2 | 2.00 |")


def test_a_comparison_refuses_what_does_not_fit():
    comparison = Comparison(Encoders(means, words, None))
    comparison.add_references("one", plain(RED))
    comparison.add_references("two", plain(RED))
    comparison.add("a", "one", plain(RED), ["red"])
    for arguments in (("a", "one", plain(RED), None), ("a", "one", plain(RED), ["red", "red"])):
        with pytest.raises(ValueError, match=r"one a picture \(1\)"):
            comparison.add(*arguments)
    with pytest.raises(ValueError, match="pictures of b are none"):
        comparison.add("b", "one", [], [])
    comparison.add("b", "two", plain(RED), ["red"])
    with pytest.raises(ValueError, match="pictures of b are of two, but others' of one"):
        comparison.result()
    with pytest.raises(ValueError, match="text encoder alone"):
        Encoders(None, words, means)


# --- folders --------------------------------------------------------------------------------------------------------

DREAMBENCH = """Classes

subject_name,class
cat2,cat
bear_plushie,stuffed animal

Object Prompts
prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]
Live Subject Prompts
prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


def write(folder, *names, colour=RED, **texts) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8), tuple(255 * part for part in colour)).save(folder / name)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)


def test_prompts_of_dreambench_and_of_a_plain_file(tmp_path):
    (tmp_path / "dreambench.txt").write_text(DREAMBENCH)
    of = read_prompts(tmp_path / "dreambench.txt")
    assert of("bear_plushie") == ["a stuffed animal in the jungle", "a cube shaped stuffed animal"]
    assert of("cat2") == ["a cat wearing a red hat"]
    with pytest.raises(ValueError, match="no subject 'dog', but cat2, bear_plushie"):
        of("dog")
    (tmp_path / "plain.txt").write_text("a dog\n\na red dog\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "plain.txt")("any") == ["a dog", "a red dog"]
    (tmp_path / "empty.txt").write_text("\n")
    for name, message in (("empty.txt", "is empty"), ("none.txt", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            read_prompts(tmp_path / name)


def test_the_token_alone_is_taken_out():
    assert class_only("a photo of a sks dog, sks and sksy", "sks") == "a photo of a dog, and sksy"
    assert class_only("a <new1> dog", "<new1>") == "a dog"
    assert class_only("a  dog", "") == "a dog"


def test_each_prompt_has_as_many_pictures():
    assert in_order(["a", "b"], 4, "x") == ["a", "a", "b", "b"]
    for prompts, count in ((["a", "b"], 3), ([], 3)):
        with pytest.raises(ValueError, match="x has 3 pictures"):
            in_order(prompts, count, "x")


def test_pictures_find_their_prompts(tmp_path):
    write(tmp_path / "references", "0.png", "1.png")
    write(tmp_path / "listed", "b.png", "a.png", **{"b": "not read"})
    entries = [{"file": "b.png", "prompt": "a sks cat"}, {"file": "a.png", "prompt": "a dog"}]
    (tmp_path / "listed/report.json").write_text(json.dumps({"pictures": entries}))
    write(tmp_path / "texts", "x.png", "y.png", x="a sks dog", y="a cat")
    write(tmp_path / "numbered", "1_0.png", "0_0.png", "0_1.png", "1-10.png")
    write(tmp_path / "ordered", *(f"{number}.png" for number in (2, 1, 10, 3)))
    (tmp_path / "prompts.txt").write_text("first\nsecond sks\n")
    systems = {name: str(tmp_path / name) for name in ("listed", "texts", "numbered", "ordered")}
    (files,) = gather(tmp_path / "references", systems, tmp_path / "prompts.txt", "sks").values()
    found = {system: [(file.name, text) for file, text in zip(*made)] for system, made in files.made.items()}
    assert found["listed"] == [("a.png", "a dog"), ("b.png", "a cat")]
    assert found["texts"] == [("x.png", "a dog"), ("y.png", "a cat")]
    numbered = [("0_0.png", "first"), ("0_1.png", "first"), ("1-10.png", "second"), ("1_0.png", "second")]
    assert sorted(found["numbered"]) == numbered
    assert [name for name, _ in found["ordered"]] == ["1.png", "2.png", "3.png", "10.png"]
    assert [text for _, text in found["ordered"]] == ["first", "first", "second", "second"]
    assert [file.name for file in files.references] == ["0.png", "1.png"]


def test_mismatches_name_the_system(tmp_path):
    references, prompts = tmp_path / "references", tmp_path / "prompts.txt"
    for subject in ("dog", "cat"):
        write(references / subject, "0.png")
        write(tmp_path / "good" / subject, "0_0.png", "1_0.png")
    prompts.write_text("first\nsecond\n")
    write(tmp_path / "lacks/dog", "0_0.png", "1_0.png")
    write(tmp_path / "other/bird", "0.png")
    bad = {"more": ("2_0.png", "0_0.png", "1_0.png"), "few": ("0_0.png",), "odd": ("a.png", "b.png", "c.png")}
    for name, files in bad.items():
        for subject in ("dog", "cat"):
            write(tmp_path / name / subject, *files)
    write(tmp_path / "texts/dog", "a.png", "b.png", a="a dog")
    write(tmp_path / "texts/cat", "a.png", a="a cat")
    for subject in ("dog", "cat"):
        write(tmp_path / "latin" / subject, "a.png")
        (tmp_path / "latin" / subject / "a.txt").write_bytes("a caf\u00e9".encode("latin-1"))
        write(tmp_path / "strange" / subject, "a.png")
        (tmp_path / "strange" / subject / "report.json").write_text(json.dumps({"pictures": [1]}))
    write(tmp_path / "gone/dog", "0.png")
    (tmp_path / "gone/dog/report.json").write_text(json.dumps({"pictures": [{"file": "1.png", "prompt": "a dog"}]}))
    write(tmp_path / "gone/cat", "0_0.png", "1_0.png")
    for name, message in {
        "lacks": "'cat' is in one alone",
        "other": "has a subject 'bird'",
        "more": "prompt 2 is none of the 2 from 0",
        "few": "prompt 1 has no picture",
        "odd": "has 3 pictures, but it takes as many for each of 2 prompts",
        "texts": "b.txt is missing",
        "gone": "0.png is in one alone",
        "latin": "a.txt cannot be read .it is not UTF-8",
        "strange": "a.png is in one alone",
        "none": "which is no folder",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            gather(references, {"good": str(tmp_path / "good"), name: str(tmp_path / name)}, prompts, "sks")
        assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def sandbox_pictures(tmp_path_factory):
    """References of two subjects, an adapter of one, and pictures: copies of the references, and of the other one."""
    root = tmp_path_factory.mktemp("pictures")
    for name in ("pip", "momo"):
        assert cli.main(["sandbox", "subject", name, "--out", str(root / "references" / name)]) == 0
        prompts = json.loads((root / "references" / name / "report.json").read_text())["prompts"]
        (root / f"{name}.txt").write_text(prompts[0].replace("sks ", ""))
    for system, of in {"right": {"pip": "pip", "momo": "momo"}, "wrong": {"pip": "momo", "momo": "pip"}}.items():
        for subject, source in of.items():
            (root / system / subject).mkdir(parents=True)
            for file in (root / "references" / source).glob("*.png"):
                (root / system / subject / file.name).write_bytes(file.read_bytes())
                text = (root / f"{subject}.txt").read_text()
                (root / system / subject / f"{file.stem}.txt").write_text(text)
    return root


def compare(root, *more, out="out") -> int:
    pictures = [f"{name}={root / name}" for name in ("wrong", "right")]
    return cli.main(["compare", "--references", str(root / "references"), "--pictures", *pictures,
                     "--out", str(root / out), *map(str, more)])  # fmt: skip


def test_the_verb_ranks_the_right_subject_first(sandbox_pictures, capsys):
    assert compare(sandbox_pictures, "--judge", "sandbox") == 0
    result = json.loads((sandbox_pictures / "out/report.json").read_text())
    assert list(result["systems"]) == ["right", "wrong"] and result["subjects"] == ["momo", "pip"]
    assert result["systems"]["right"]["dino"]["mean"] > 0.8 > result["systems"]["wrong"]["dino"]["mean"]
    assert result["systems"]["right"]["drift"] is None
    assert (sandbox_pictures / "out/report.png").stat().st_size > 5000
    assert capsys.readouterr().out == (sandbox_pictures / "out/report.md").read_text()


def test_the_table_is_not_written_among_the_pictures_that_it_is_of(sandbox_pictures, capsys):
    for out in ("right", "right/pip", "references/momo"):
        before = sorted((sandbox_pictures / out).iterdir())
        assert compare(sandbox_pictures, "--judge", "sandbox", out=out) == 2
        assert "--out: " in capsys.readouterr().err
        assert sorted((sandbox_pictures / out).iterdir()) == before


def test_the_verb_takes_transformers_encoders(sandbox_pictures, encoder_folders):
    clip, dino = encoder_folders / "clip", encoder_folders / "dino"
    assert compare(sandbox_pictures, "--clip", clip, "--dino", dino, "--device", "cpu", out="own") == 0
    result = json.loads((sandbox_pictures / "own/report.json").read_text())
    assert result["encoders"] == {"clip_i": str(clip), "clip_t": str(clip), "dino": str(dino)}
    assert compare(sandbox_pictures, "--dino", dino, out="dino") == 0
    assert "| n/a | n/a |" in (sandbox_pictures / "dino/report.md").read_text().splitlines()[-1]


def test_prompts_are_needed_for_clip_t_alone(encoder_folders, capsys, tmp_path):
    for folder in ("references", "pictures"):
        write(tmp_path / folder, "0.png")
    given = ["compare", "--references", str(tmp_path / "references"), "--pictures", f"own={tmp_path / 'pictures'}"]
    given += ["--out", str(tmp_path / "out")]
    assert cli.main([*given, "--judge", "sandbox"]) == 2
    assert "--prompts: the pictures of own do not tell" in capsys.readouterr().err
    assert cli.main([*given, "--dino", str(encoder_folders / "dino")]) == 0
    assert "| own | n/a | n/a | 1.000 | 1.00 | 1 | n/a |" in capsys.readouterr().out


def test_the_drift_is_that_of_each_systems_adapters(sandbox_pictures, model_folders):
    root, model = sandbox_pictures, ("--model", str(model_folders["epsilon"]), "--device", "cpu")
    drifts = []
    for subject, words in (("pip", "dog"), ("momo", "cat")):
        out, given = root / "adapters" / subject, ("--references", str(root / "references" / subject))
        prompts = ("--subject", f"a photo of a sks {words}", "--class", f"a photo of a {words}")
        train = ("train", *model, *given, *prompts, "--steps", "2", "--learning_rate", "0.02", "--out", str(out))
        assert cli.main([*train]) == 0
        file = str(out / "adapter.safetensors")
        assert cli.main(["inspect", *model, *given, "--adapter", file, "--out", str(root / "inspected")]) == 0
        drifts.append(json.loads((root / "inspected/report.json").read_text())["after"]["drift"])
    adapters = ("--adapters", f"right={root / 'adapters'}", *model)
    assert compare(root, "--judge", "sandbox", *adapters, out="drift") == 0
    systems = json.loads((root / "drift/report.json").read_text())["systems"]
    assert systems["right"]["drift"]["mean"] == pytest.approx(sum(drifts) / 2, rel=1e-5)
    assert systems["wrong"]["drift"] is None


@pytest.mark.parametrize(
    "given, message",
    [
        ((), "--clip: the encoders are"),
        (("--judge", "sandbox", "--dino", "x"), "--clip: the encoders are"),
        (("--judge", "sandbox", "--pictures", "right"), "--pictures: 'right' is no NAME=PATH"),
        (("--judge", "sandbox", "--adapters", "other=x"), "--adapters: 'other' has no pictures"),
        (("--judge", "sandbox", "--adapters", "right=x"), "give --model"),
        (("--judge", "sandbox", "--adapters", "right=x", "--model", "sandbox"), "--adapters: adapters of right"),
        (("--judge", "sandbox", "--prompts", "nowhere.txt"), "--prompts: prompts is 'nowhere.txt'"),
        (("--dino", "no/such/folder"), "--dino: dino is 'no/such/folder'"),
    ],
)
def test_wrong_options_are_one_line_and_write_nothing(sandbox_pictures, capsys, given, message):
    assert compare(sandbox_pictures, *given, out="refused") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and not (sandbox_pictures / "refused").exists()
