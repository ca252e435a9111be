"""What a check-up's numbers mean, in words.

The scale is how far the class prompt's prediction moves, over what that prompt's own words do (`of_prompt`): at 1 the
adapter changes a picture of the class, nobody having called it, as much as asking for it does. The two marks were
chosen on adapters of the embedded model whose pictures its judge read (docs/CHECKUP.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..adapters.stated import ESTIMATED
from .settings import BUDGET

HARM = 1.0
"""Of `of_prompt`: above it the class is harmed, up to `BUDGET` it is kept."""

CALLED, ALWAYS = 0.5, 0.8
"""Of `of_trigger`: up to the first the trigger word does most of it; above the second it hardly matters."""

KEEPS, CHANGES, HARMS = "keeps the class", "changes the class", "harms the class"


def words(report: Mapping[str, Any]) -> dict[str, Any]:
    """`level`, of `KEEPS`, `CHANGES` and `HARMS`, and `sentences` that say it with its numbers."""
    class_, prompts = report["without_trigger"]["class"], report["prompts"]
    moved = class_["of_prompt"]
    level = KEEPS if moved <= BUDGET else CHANGES if moved <= HARM else HARMS
    told = [
        f"It {level}: without its word, {prompts['class_prompt']!r} moves by {_percent(class_['of_prediction'])} of "
        f"its prediction, {moved:.2f} times what that prompt's own words do.",
        _of_trigger(class_["of_trigger"]),
        _of_noise(report["by_timestep"]),
        _of_weights(report["weights"]),
        _of_strength(report["strength"]),
        _of_suggestion(report["suggested"]),
        *_of_prompts(prompts),
    ]
    return {"level": level, "sentences": [each for each in told if each]}


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _of_trigger(share: float | None) -> str:
    if share is None:
        return "No prompt with its trigger word is known, so nothing is said of what that word does."
    told = f"That is {_percent(share)} of what it does with its word: "
    if share <= CALLED:
        return told + "the word calls most of it."
    return told + ("much of it comes uncalled." if share <= ALWAYS else "the word hardly matters.")


def _of_noise(curves: Mapping[str, list[float]]) -> str:
    """Where the class changes most, over what its prompt does there."""
    shares = [change / max(prompt, 1e-12) for change, prompt in zip(curves["class_change"], curves["prompt_effect"])]
    at = shares.index(max(shares))
    where = "composition" if at >= len(shares) / 2 else "detail"
    return (
        f"Beside the prompt it weighs most at timestep {curves['timestep'][at]:.0f} of 1000, where {where} is decided."
    )


def _of_weights(weights: Mapping[str, Any]) -> str:
    if not weights["layers"]:
        return "It adapts no layer, only what its word means."
    block = max(weights["blocks"], key=lambda each: each["share"])
    ranks = weights["effective_rank"]
    return (
        f"{_percent(block['share'])} of its change of weights is in {block['block']}; a layer's change is spread over "
        f"{ranks['median']:.1f} directions (effective rank, median of {len(weights['layers'])} layers)."
    )


def _of_strength(strength: Mapping[str, Any]) -> str:
    budget = f"The budget of {strength['budget']:g} times the prompt's own words"
    if strength["passes_at"] is None:
        return f"{budget} is not passed up to strength {strength['within']:g}."
    return f"{budget} is passed at strength {strength['passes_at']:.2f}."


def _of_suggestion(suggested: Mapping[str, Any]) -> str:
    told = f"Try it at strength {suggested['strength']:.2f}"
    if suggested["weak"] is None:
        return f"{told}."
    return f"{told}, with personalization guidance at weak {suggested['weak']:g} and scale {suggested['guidance']:g}."


def _of_prompts(prompts: Mapping[str, str]) -> list[str]:
    """What was guessed, so that nobody takes it for known."""
    guessed = [which for which in ("subject", "class") if prompts[f"{which}_from"] == ESTIMATED]
    of = {"subject": "subject", "class": "class_prompt"}
    return [
        f"The {which} prompt, {prompts[of[which]]!r}, is a guess from the file's tags; give your own to be sure."
        for which in guessed
    ]
