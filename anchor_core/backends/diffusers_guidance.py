"""The guidance rules on diffusers: all branches of a step in one batch, an adapter strength a row, one network.

`guided` puts a rule into a pipeline of Stable Diffusion 1.x, 2.x, XL or 3; `RuleSteps` is what it shares with
`DiffusersDenoiser.sample`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, AdapterConfig
from ..guidance import CLASS, SUBJECT, Branch, Rule, Table
from .diffusers_families import family_of
from .diffusers_masks import ClassWordMaps, cross_attentions


class RuleSteps:
    """The steps of a sampling by a rule, over one network.

    Args:
        has_class: whether there are class prompts.

    Raises:
        ValueError: if the rule takes class prompts, an adapter, an early checkpoint or cross-attention, and there is
            none.
    """

    def __init__(self, rule: Rule, network: nn.Module, adapter: Adapter | None, has_class: bool):
        self.rule, self.network, self.adapter = rule, network, adapter
        branches, called = rule.branches, f"rule is {rule.name!r}"
        if CLASS in branches and not has_class:
            raise ValueError(f"{called}, which takes the class prompt too; give class_prompt")
        if adapter is None and any(branch.strength != 1 or branch.early for branch in branches):
            raise ValueError(f"{called}, which weakens the adapter, but the network has none; attach one or take cfg")
        if adapter is not None and any(branch.early for branch in branches) and not adapter.holds_early:
            raise ValueError(f"{called} with early, but the adapter holds no early checkpoint; give it by hold_early")
        if any(rule.table(i, 100).outside is not None for i in range(100)) and not cross_attentions(network):
            raise ValueError(
                f"{called}, which reads cross-attention, but this {type(network).__name__} has none: one attention "
                "joins picture and text; take another rule"
            )

    def predict(
        self, step: int, steps: int, scale: float, latents: Tensor, run: Callable[[list[Branch]], Tensor]
    ) -> tuple[Table, float, dict[Branch, Tensor], Tensor | None]:
        """One step's table, its scale, the predictions (B, C, h, w) of its branches, and its mask.

        Args:
            step: from 0, the noisiest, of `steps`.
            latents: (B, C, h, w).
            run: gives the predictions of these branches, one after the other in one batch, (branches B, C, h, w).
        """
        table, scale = self.rule.table(step, steps), self.rule.scale_at(step, steps, scale)
        branches, rows = table.branches(scale), len(latents)
        maps = None
        with ExitStack() as stack:
            if any(branch.strength != 1 or branch.early for branch in branches):
                strengths, early = (
                    torch.tensor([getattr(branch, name) for branch in branches], device=latents.device)
                    for name in ("strength", "early")
                )
                early = early.repeat_interleave(rows) if any(branch.early for branch in branches) else False
                stack.enter_context(self.adapter.scaled(strengths.repeat_interleave(rows), early))
            # After the strengths, so that the maps are those of the blended layers.
            if table.outside is not None and {SUBJECT, CLASS} <= set(branches):
                maps = ClassWordMaps(*(_rows(branches.index(branch), rows) for branch in (SUBJECT, CLASS)))
                stack.enter_context(maps.reading(self.network))
            output = run(branches)
        predictions = dict(zip(branches, output.chunk(len(branches))))
        mask = None if maps is None else maps.mask(*latents.shape[-2:], table.quantile)
        return table, scale, predictions, mask


def _rows(index: int, rows: int) -> slice:
    return slice(index * rows, (index + 1) * rows)


@contextmanager
def guided(
    pipeline: Any,
    rule: Rule,
    *,
    adapter: Adapter | None = None,
    class_prompt: str | Sequence[str] | Callable[[str], str] | None = None,
) -> Iterator[Any]:
    """While it is open, calls of a diffusers pipeline are guided by `rule`, at their own `guidance_scale`.

    Everything else is the pipeline's: its options, its schedulers, its prompts, which are the subject's. A pipeline
    that guides runs two predictions, away and towards, and combines them itself; the rule makes these two of its
    branches. At a scale of at most 1 a pipeline does not guide, and gets the rule's conditional prediction.

    Args:
        pipeline: a text-to-image pipeline of SD1.x, SD2.x, SDXL or SD3, or a variant that calls its network alike.
        adapter: attached to the pipeline's own network; by default the LoRA that the pipeline itself has loaded.
        class_prompt: for rules that take the class prompt: one for all prompts, one for each, or a function that makes
            it of the prompt (`Concept.class_of`).

    Raises:
        ValueError: for a pipeline or a rule that does not go with it; the pipeline is then as before.
    """
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    known = ("UNet2DConditionModel", "SD3Transformer2DModel")
    if type(network).__name__ not in known or not hasattr(pipeline, "encode_prompt"):
        raise ValueError(
            f"pipeline is a {type(pipeline).__name__}, but it takes one of SD1.x, SD2.x, SDXL or SD3, which guides by "
            "a negative prompt"
        )
    family_of(network)
    if "encode_prompt" in vars(pipeline):
        raise ValueError("pipeline is guided already; leave that block before entering another")
    adapter = adapter or _loaded(pipeline, network)
    if adapter is not None and adapter.networks.get("") is not network:
        raise ValueError("adapter is attached to another network than the pipeline's; attach it to the pipeline's own")
    engine = _Pipeline(pipeline, network, RuleSteps(rule, network, adapter, class_prompt is not None), class_prompt)
    with _replaced(network, "forward", engine.forward), _replaced(pipeline, "encode_prompt", engine.encode_prompt):
        yield pipeline


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of one object, in place of its class's or its own, while it is open."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _loaded(pipeline: Any, network: nn.Module) -> Adapter | None:
    """The LoRA that the pipeline has loaded itself, as an adapter that can be scaled; None if there is none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    encoders = {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder")}
    networks = {"": network, **{name: part for name, part in encoders.items() if part is not None}}
    layers = {
        f"{prefix}:{name}" if prefix else name: module
        for prefix, part in networks.items()
        for name, module in part.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    if any(layer.merged for layer in layers.values()):
        raise ValueError(
            "the pipeline's LoRA is fused into its weights, which has no strength; unfuse it (unfuse_lora)"
        )
    config = AdapterConfig(text_encoder=any(":" in name for name in layers))
    return Adapter(networks, config, layers, []) if layers else None


class _Pipeline:
    """A pipeline's `encode_prompt` and its network's `forward`, for a rule."""

    def __init__(self, pipeline: Any, network: nn.Module, steps: RuleSteps, class_prompt: Any):
        self.pipeline, self.steps, self.class_prompt = pipeline, steps, class_prompt
        self._forward, self._encode = network.forward, pipeline.encode_prompt
        self._forward_signature, self._encode_signature = map(inspect.signature, (self._forward, self._encode))
        self._rows = 0
        self._encoded: dict[Branch, Sequence[Tensor]] = {}

    def encode_prompt(self, *arguments: Any, **options: Any) -> Any:
        """The pipeline's own; what branches read that differs from it is encoded besides, with the same options."""
        given = self._encode_signature.bind(*arguments, **options).arguments
        own = self._encode(**given)
        self._rows, self._encoded = len(own[0]), {}
        adapter = self.steps.adapter
        for branch in self.steps.rule.branches:
            weak = adapter is not None and adapter.config.trains_text and (branch.strength != 1 or branch.early)
            with adapter.scaled(branch.strength, branch.early) if weak else nullcontext():
                # (prompt, negative), and with pooled text (prompt, negative, pooled, negative pooled)
                if branch.prompt == "class":
                    parts = self._encode(**{**given, **self._class_prompts(given)})[::2]
                elif weak and branch.prompt == "subject":
                    parts = self._encode(**given)[::2]
                elif weak and self.pipeline.do_classifier_free_guidance:
                    parts = self._encode(**given)[1::2]
                else:
                    continue
            self._encoded[branch] = parts
            if parts[0].shape != own[0].shape:
                raise ValueError(
                    f"the {branch.prompt} prompt is encoded to {tuple(parts[0].shape)}, but the pipeline's prompt to "
                    f"{tuple(own[0].shape)}; give the prompt as a text"
                )
        return own

    def _class_prompts(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `encode_prompt` that give it the class prompts: as many as there are prompts."""
        changed: dict[str, Any] = {name: None for name in given if name.endswith("prompt_embeds")}
        changed["do_classifier_free_guidance"] = False
        texts = {name: given[name] for name in ("prompt", "prompt_2", "prompt_3") if given.get(name) is not None}
        texts = {name: [text] if isinstance(text, str) else text for name, text in texts.items()}
        count = len(texts["prompt"]) if "prompt" in texts else len(given["prompt_embeds"])
        if callable(self.class_prompt):
            if "prompt" not in texts:
                raise ValueError(
                    "class_prompt is a function, but the pipeline got embeddings; give class_prompt as text"
                )
            return changed | {name: [self.class_prompt(each) for each in text] for name, text in texts.items()}
        classes = [self.class_prompt] * count if isinstance(self.class_prompt, str) else list(self.class_prompt)
        if len(classes) != count:
            raise ValueError(
                f"class_prompt has {len(classes)} texts, but the pipeline {count} prompts; give one for each"
            )
        return changed | dict.fromkeys(texts) | {"prompt": classes}

    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor]:
        """The network's own, run on the branches; gives the two predictions that the pipeline combines."""
        given = self._forward_signature.bind(*arguments, **options).arguments
        if given.get("skip_layers") is not None:  # SD3's skip layer guidance, a pass of its own
            return self._forward(**given)
        guides, latents = self.pipeline.do_classifier_free_guidance, next(iter(given.values()))
        if len(latents) != self._rows * (2 if guides else 1):
            raise ValueError(
                f"the pipeline runs {len(latents)} rows for {self._rows} pictures, but a rule takes one that runs two "
                "for each; switch its other guidance off"
            )

        def run(branches: list[Branch]) -> Tensor:
            return self._forward(**{**self._batch(given, branches, len(latents)), "return_dict": False})[0]

        step, steps = self._progress(given["timestep"])
        scale = self.pipeline.guidance_scale if guides else 1.0
        table, scale, predictions, mask = self.steps.predict(step, steps, scale, latents[: self._rows], run)
        towards = table.conditional(predictions, mask)
        if not guides:
            return (towards,)
        return (torch.cat([towards if scale == 1 else predictions[table.away], towards]),)

    def _progress(self, timestep: Tensor) -> tuple[int, int]:
        """The step, and how many there are: by noise level, as some schedulers run the network twice at one."""
        levels = self.pipeline.scheduler.timesteps.unique_consecutive()
        return int((levels - timestep.flatten()[0].to(levels)).abs().argmin()), len(levels)

    def _batch(self, given: Any, branches: list[Branch], rows: int, name: str = "") -> Any:
        """What the network is given, with the branches' rows in place of the pipeline's `rows`."""
        if isinstance(given, Mapping):
            return {key: self._batch(value, branches, rows, key) for key, value in given.items()}
        if isinstance(given, (list, tuple)):
            return type(given)(self._batch(value, branches, rows) for value in given)
        if not isinstance(given, Tensor) or given.ndim == 0 or len(given) != rows:
            return given
        return torch.cat([self._part(given, branch, name) for branch in branches])

    def _part(self, given: Tensor, branch: Branch, name: str) -> Tensor:
        """A branch's own rows, of (negative and) subject rows."""
        if branch in self._encoded and name in ("encoder_hidden_states", "text_embeds", "pooled_projections"):
            return self._encoded[branch][0 if name == "encoder_hidden_states" else 1].to(given)
        return given[: self._rows] if branch.prompt == "null" else given[-self._rows :]
