"""A table of systems: pairs averaged by subject, then ranked."""

from __future__ import annotations

import pytest
import torch

from anchor_core.evaluation.compare import REAL, Comparison, markdown
from anchor_core.evaluation.metrics import Encoders


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


def test_references_alone_calibrate_the_encoders():
    comparison = Comparison(Encoders(means, words, means))
    comparison.add_references("one", plain(RED, RED, GREEN))
    comparison.add_references("two", plain(BLUE, BLUE))
    comparison.left_out.append("three: no picture of the references can be read")
    result = comparison.result()
    assert result["systems"] == {} and result["subjects"] == ["one", "two"]
    real = result["real"]["dino"]
    assert real["by_subject"] == pytest.approx({"one": 1 / 3, "two": 1.0})
    assert real["mean"] == pytest.approx(2 / 3) and real["pooled"] == pytest.approx((2 + 2) / 8)
    assert (real["low"], real["high"]) == pytest.approx((1 / 3, 1.0))
    text = markdown(result)
    assert f"| {REAL} | 0.667 ± 0.471 [0.333, 1.000] |" in text
    assert "the papers have CLIP-I 0.885, DINO 0.774" in text
    assert "Left out (1): three: no picture of the references can be read." in text


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
