"""The distances of semantic collapse against a direct float64 computation, their memory, and the prompt sets."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from anchor_core.evaluation import collapse as collapse_of
from anchor_core.evaluation.collapse import collapse, draw_norms, last_positions, shrinkage_of, token_norms
from anchor_core.evaluation.compare import Comparison, markdown
from anchor_core.evaluation.metrics import Encoders
from anchor_core.evaluation.prompt_sets import SETS, prompt_set, split_prompt
from anchor_core.evaluation.report import new_figure


def direct(x: np.ndarray, y: np.ndarray, same: bool) -> dict[str, float]:
    """Every distance of two sets as SPECS and the authors' notebook write it, row by row."""
    distances = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in y] for a in x])
    near = distances + np.where(np.eye(len(x), len(y)), np.inf, 0) if same else distances
    covariance, off = np.cov(y.T), x - y.mean(axis=0)

    def mahalanobis(inverse: np.ndarray) -> float:
        return np.mean([np.sqrt(row @ inverse @ row) for row in off])

    shrinkage = 0.01 * np.trace(covariance) / y.shape[1]
    found = {
        "l2": distances.mean(),
        "hausdorff": max(near.min(axis=1).max(), near.min(axis=0).max()),
        "mahalanobis": mahalanobis(np.linalg.pinv(covariance, rcond=1e-12, hermitian=True)),
        "mahalanobis_shrunk": mahalanobis(np.linalg.inv(covariance + shrinkage * np.eye(y.shape[1]))),
    }
    if len(x) == len(y):
        alike = []
        for rows in (x, y):
            unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            exponents = np.exp(unit @ unit.T)
            alike.append(exponents / exponents.sum(axis=1, keepdims=True) + 1e-8)
        p, q = alike
        found["kl"] = np.mean([(a * np.log(a / b)).sum() for a, b in zip(p, q)])
    return found


@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize(("rows", "width"), [(7, 5), (11, 16)])
def test_distances_are_those_of_a_direct_computation(rows, width, chunk, monkeypatch):
    monkeypatch.setattr(collapse_of, "CHUNK", chunk)
    draw = np.random.default_rng(rows)
    p, q, s = (draw.normal(size=(count, width)) * 3 + shift for count, shift in ((rows, 0), (rows, 1), (rows + 2, 2)))
    found = collapse(*(torch.from_numpy(each) for each in (p, q, s)))
    wanted = {
        "from_class": direct(q, p, False), "within": direct(p, p, True), "from_simple": direct(s, p, False)
    }  # fmt: skip
    assert set(found) == {"l2", "hausdorff", "mahalanobis", "mahalanobis_shrunk", "kl"}
    for name, each in found.items():
        for where, value in each.items():
            assert value == pytest.approx(wanted[where][name], rel=1e-6, abs=1e-9), (name, where)
    assert "from_simple" not in found["kl"]
    assert shrinkage_of(torch.from_numpy(p)) == pytest.approx(0.01 * np.cov(p.T).trace() / width)


@pytest.mark.long
def test_ten_thousand_prompts_are_within_four_gigabytes():
    script = (
        "import resource, torch\n"
        "from anchor_core.evaluation.collapse import collapse\n"
        "torch.manual_seed(0)\n"
        "p, q, s = (torch.randn(10_000, 768) for _ in range(3))\n"
        "found = collapse(p, q, s)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, found['l2']['from_class'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kilobytes, distance = done.stdout.split()
    assert int(kilobytes) < 4e6
    assert float(distance) == pytest.approx((2 * 768) ** 0.5, rel=1e-2)


def test_a_prompt_is_read_at_its_last_position():
    tokens = torch.arange(12.0).reshape(3, 4)
    assert last_positions([tokens, (tokens + 1, None)]).tolist() == [[8, 9, 10, 11], [9, 10, 11, 12]]


def test_lengths_of_the_embedding_table_and_where_a_token_stands():
    table = torch.tensor([[1.0, 0], [0, 2], [3, 0], [0, 4]])
    norms = token_norms(table, torch.tensor([[0.0, 3.5]]), torch.tensor([[2.0, 0], [0, 2]]))
    assert norms["lengths"].tolist() == [1, 2, 3, 4] and norms["share_shorter"] == [0.75]
    assert norms["token"] == [3.5] and norms["class"] == [2, 2]
    assert norms["cosine"] == pytest.approx([0.5**0.5])
    axes = new_figure(4, 3).subplots()
    draw_norms(axes, norms, {"sks": norms["token"], "dog": norms["class"]})
    assert sum(patch.get_height() for patch in axes.patches) == 4 and len(axes.patches) == 1000
    assert [line.get_xdata()[0] for line in axes.lines] == [3.5, 2, 2]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["sks", "dog"]


@pytest.mark.parametrize("name", SETS)
def test_a_prompt_set_has_two_hundred_prompts_with_the_keyword_in_each(name):
    prompts = prompt_set(name, "sks dog")
    assert len(prompts) == len(set(prompts)) == 200
    assert all(prompt.count("sks dog") == 1 and "{" not in prompt for prompt in prompts)
    lengths = [len(prompt.split()) - 1 for prompt in prompts]
    if name == "contextual":
        assert min(lengths) >= 10 and max(lengths) <= 30
        first = [prompt.split("sks dog")[0] for prompt in prompts]
        assert len({len(each.split()) for each in first}) > 10  # it stands in many places
    else:
        assert max(lengths) <= 13 and sum(lengths) / 200 < 9
    assert [prompt.replace("sks dog", "dog") for prompt in prompts] == prompt_set(name, "dog")


@pytest.mark.parametrize(
    ("prompt", "word", "parts"),
    [
        ("a dog in the snow", "dog", ("a dog", "in the snow")),
        ("a red dog", "dog", ("a dog", "a red")),
        ("a photo of the stuffed animal, at night", "stuffed animal", ("a stuffed animal", "a photo of , at night")),
        ("a Dog", "dog", ("a dog", "")),
        ("dogs and a dog", "dog", ("a dog", "dogs and")),
    ],
)
def test_a_prompt_is_split_into_subject_and_context(prompt, word, parts):
    assert split_prompt(prompt, word) == parts


def test_clip_t_is_split_by_the_class_word():
    axes = {"a dog": 0, "in the snow": 1, "a dog in the snow": 2, "a cat": 0}

    def texts(prompts):
        return torch.eye(3)[[axes[prompt] for prompt in prompts]]

    comparison = Comparison(Encoders(lambda pictures: torch.stack([picture[:, 0, 0] for picture in pictures]), texts))
    picture = torch.tensor([3.0, 4.0, 0.0])[:, None, None].expand(3, 2, 2)
    comparison.add_references("rex", [picture])
    comparison.add("ours", "rex", [picture] * 3, ["a dog in the snow", "a dog", "a cat"], "dog")
    result = comparison.result()
    parts = result["systems"]["ours"]["clip_t_parts"]
    # 0 and .6 of the two full prompts, .6 of both subjects, .8 of the one context.
    assert {part: parts[part]["mean"] for part in parts} == pytest.approx(
        {"full": 0.3, "subject": 0.6, "context": 0.8}
    )  # fmt: skip
    assert "| ours | 0.300 | 0.600 | 0.800 |" in markdown(result)
    assert result["left_out"] == ["1 prompts of ours: they do not name the class 'dog', by which CLIP-T is split"]
