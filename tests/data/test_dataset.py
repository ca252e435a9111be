from __future__ import annotations

from collections import Counter

import pytest
import torch

from anchor_core.data.dataset import Dataset, Example


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def example(number: int, shape=(4, 8, 8), prompts: int = 1, mask: bool = False, flip: bool = False) -> Example:
    """Latents that are all `number`, or -number where they are mirrored; the mask's left column is `number`."""
    latents = torch.full(shape, float(number))
    covered = torch.zeros(1, *shape[1:])
    covered[..., 0] = 1
    return Example(
        latents,
        tuple(f"sks dog {number}.{i}" for i in range(prompts)),
        tuple(f"dog {number}.{i}" for i in range(prompts)),
        covered if mask else None,
        -latents if flip else None,
        f"{number}.png",
    )


def numbers(rows) -> list[int]:
    return rows.latents[:, 0, 0, 0].int().tolist()


def test_one_bucket_and_one_prompt_is_the_deck_of_shuffled_epochs(concept):
    latents = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 4, 8, 8)
    dataset, chance, other = Dataset.of_latents(latents, concept), generator(3), generator(3)
    deck = []
    for count in (2, 2, 3, 12, 1):
        rows = dataset.draw(count, chance)
        while len(deck) < count:
            deck += torch.randperm(5, generator=other).tolist()
        assert numbers(rows) == deck[:count]
        del deck[:count]
        assert rows.subject_prompts == [concept.subject_prompt] * count
        assert rows.class_prompts == [concept.class_prompt] * count
        assert rows.latents.shape == (count, 4, 8, 8) and rows.masks is None
        assert torch.equal(chance.get_state(), other.get_state())
    assert dataset.prompts() == [concept.subject_prompt, concept.class_prompt]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_latents_are_a_copy_in_float32(concept, dtype):
    with torch.inference_mode():
        latents = torch.ones(2, 4, 8, 8, dtype=dtype)
        dataset = Dataset.of_latents(latents, concept)
        latents.zero_()
    weight = torch.ones((), requires_grad=True)
    rows = dataset.draw(2, generator())
    (rows.latents * weight).sum().backward()  # autograd may save it, though the latents are inference tensors
    assert weight.grad == 2 * 4 * 8 * 8 and rows.latents.dtype == torch.float32


def test_each_epoch_holds_every_picture_once():
    dataset, chance = Dataset([example(n) for n in range(1, 8)]), generator()
    drawn = [number for _ in range(21) for number in numbers(dataset.draw(1, chance))]
    for epoch in range(3):
        assert sorted(drawn[7 * epoch : 7 * epoch + 7]) == list(range(1, 8))
    assert drawn[:7] != drawn[7:14]


def test_prompts_and_names_stay_with_their_pictures():
    dataset, chance = Dataset([example(n, prompts=3) for n in range(1, 6)]), generator()
    seen = Counter()
    for _ in range(100):
        rows = dataset.draw(4, chance)
        for number, subject, class_, name in zip(numbers(rows), rows.subject_prompts, rows.class_prompts, rows.names):
            assert subject.startswith(f"sks dog {number}.") and class_ == subject[4:] and name == f"{number}.png"
            seen[subject] += 1
    assert len(seen) == 15 == len([p for p in dataset.prompts() if p.startswith("sks")])
    assert len(dataset.prompts()) == 30 and "" not in dataset.prompts()


def test_buckets_are_drawn_by_their_size():
    wide, square = (4, 8, 12), (4, 8, 8)
    dataset = Dataset([example(1, wide), example(2, square), example(3, wide), example(4, wide)])
    chance, shapes = generator(), Counter()
    for _ in range(1000):
        rows = dataset.draw(2, chance)
        shapes[tuple(rows.latents.shape[1:])] += 1
        assert set(numbers(rows)) <= ({2} if rows.latents.shape[1:] == square else {1, 3, 4})
    assert abs(shapes[wide] / 1000 - 0.75) < 4 * (0.75 * 0.25 / 1000) ** 0.5


def test_caption_dropout_empties_both_prompts():
    dataset, chance = Dataset([example(n) for n in range(1, 5)], caption_dropout=0.3), generator()
    rows = dataset.draw(2000, chance)
    empty = [not subject for subject in rows.subject_prompts]
    assert empty == [not class_ for class_ in rows.class_prompts]
    assert abs(sum(empty) / 2000 - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    assert dataset.prompts()[-1] == "" and set(rows.subject_prompts) | set(rows.class_prompts) == set(dataset.prompts())


def test_mirrored_rows_have_mirrored_masks():
    dataset, chance = Dataset([example(n, mask=True, flip=True) for n in (1, 2)]), generator()
    rows = dataset.draw(1000, chance)
    mirrored = rows.latents[:, 0, 0, 0] < 0
    assert abs(mirrored.float().mean() - 0.5) < 4 * 0.5 / 1000**0.5
    assert rows.masks.shape == (1000, 1, 8, 8)
    assert torch.equal(rows.masks[:, 0, :, -1], mirrored.float().view(-1, 1).expand(-1, 8))
    assert torch.equal(rows.masks[:, 0, :, 0], 1 - mirrored.float().view(-1, 1).expand(-1, 8))


@pytest.mark.parametrize("before", [0, 1, 4])
def test_state_goes_on_where_it_was(before):
    def fresh():
        shapes = [(4, 8, 8), (4, 8, 8), (4, 8, 12), (4, 12, 8), (4, 8, 12)]
        return Dataset([example(n, s, 2, True, True) for n, s in enumerate(shapes, 1)], caption_dropout=0.2)

    def draws(dataset, chance):
        return [dataset.draw(2, chance) for _ in range(12)]

    dataset, chance = fresh(), generator(5)
    for _ in range(before):
        dataset.draw(3, chance)
    state, random_state = dataset.state_dict(), chance.get_state()
    expected = draws(dataset, chance)
    again, chance = fresh(), generator(9)
    again.draw(2, chance)
    again.load_state_dict(state)
    chance.set_state(random_state)
    for one, other in zip(draws(again, chance), expected):
        assert torch.equal(one.latents, other.latents) and torch.equal(one.masks, other.masks)
        assert (one.subject_prompts, one.class_prompts, one.names) == (
            other.subject_prompts,
            other.class_prompts,
            other.names,
        )


def test_a_state_is_no_longer_the_datasets():
    dataset, chance = Dataset([example(n) for n in range(1, 6)]), generator()
    dataset.draw(2, chance)
    state = dataset.state_dict()
    assert list(state) == ["8x8"] and len(state["8x8"]) == 3
    dataset.draw(1, chance)
    assert len(state["8x8"]) == 3


def test_a_state_of_other_pictures_is_refused():
    dataset = Dataset([example(1), example(2)])
    for state in ({"8x12": [0]}, {"8x8": [2]}, {}):
        with pytest.raises(ValueError, match="^state is of sizes"):
            dataset.load_state_dict(state)


def test_bad_examples_are_named(concept):
    latents = torch.zeros(4, 8, 8)
    for arguments, message in [
        ((latents[0], ("a",), ("b",)), r"^latents of '' are \(8, 8\)"),
        ((latents, (), ()), "^'' has 0 subject_prompts and 0 class_prompts"),
        ((latents, ("a",), ("b", "c")), "^'' has 1 subject_prompts and 2 class_prompts"),
        ((latents, ("a",), ("b",), torch.ones(8, 8)), r"^mask of '' is \(8, 8\), but it takes \(1, 8, 8\)"),
        ((latents, ("a",), ("b",), None, latents[:, :4]), r"^flipped of '' is \(4, 4, 8\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            Example(*arguments)
    for examples, message in [
        ([], "^examples holds no picture"),
        ([example(1), example(2, (8, 8, 8))], r"^examples have latents of \[4, 8\] channels"),
        ([example(1), example(2, mask=True)], "^example '2.png' has a mask and '1.png' has none"),
    ]:
        with pytest.raises(ValueError, match=message):
            Dataset(examples)
    for dropout in (-0.1, 1, float("nan")):
        with pytest.raises(ValueError, match="^caption_dropout is"):
            Dataset([example(1)], dropout)
    with pytest.raises(ValueError, match="^latents is"):
        Dataset.of_latents(torch.zeros(0, 4, 8, 8), concept)
    with pytest.raises(ValueError, match="^count is 0"):
        Dataset([example(1)]).draw(0, generator())
