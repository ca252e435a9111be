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

from ...adapters.adapter import Adapter
from ...adapters.config import AdapterConfig
from ...branches import CLASS, SUBJECT, Branch, Table, guide, step_at
from ...guidance import ClassifierFree, Rule
from .families import family_of
from .masks import ClassWordMaps, cross_attentions


class RuleSteps:
    """The steps of a sampling by a rule, over one network.

    Args:
        rule: None is classifier-free guidance.
        adapter: of the network, if it has one.
        has_class: whether there are class prompts.

    Raises:
        ValueError: if the rule takes class prompts, an adapter, an early checkpoint or cross-attention, and there is
            none; for any rule, if the network takes its guidance scale as an input (Flux-dev).
    """

    def __init__(self, rule: Rule | None, network: nn.Module, adapter: Adapter | None, has_class: bool):
        self.rule, self.network, self.adapter = rule or ClassifierFree(), network, adapter
        if rule is None:
            return
        if network.config.get("guidance_embeds"):
            raise ValueError(
                f"rule is {rule.name!r}, but this network takes its guidance scale as an input and was made to run one "
                "prediction a step; leave the rule out"
            )
        branches, called = rule.branches, f"rule is {rule.name!r}"
        if CLASS in branches and not has_class:
            raise ValueError(f"{called}, which takes the class prompt too; give class_prompt")
        if adapter is None and any(branch.strength != 1 or branch.early for branch in branches):
            raise ValueError(f"{called}, which weakens the adapter, but the network has none; attach one or take cfg")
        if adapter is not None and any(branch.early for branch in branches) and not adapter.holds_early:
            raise ValueError(f"{called} with early, but the adapter holds no early checkpoint; give it by hold_early")
        if rule.masked and not cross_attentions(network):
            raise ValueError(
                f"{called}, which reads cross-attention, but this {type(network).__name__} has none: one attention "
                "joins picture and text; take another rule"
            )

    @contextmanager
    def step(self, index: int, steps: int, scale: float, latents: Tensor) -> Iterator[RuleStep]:
        """One step; while it is open, the network runs its branches, one after the other in one batch.

        Args:
            index: from 0, the noisiest, of `steps`.
            latents: (B, C, h, w) of one branch.
        """
        step = RuleStep(self.rule.table(index, steps), self.rule.scale_at(index, steps, scale), latents.shape)
        rows, branches = len(latents), step.branches
        with ExitStack() as stack:
            if any(branch.strength != 1 or branch.early for branch in branches):
                strengths, early = (
                    torch.tensor([getattr(branch, name) for branch in branches for _ in range(rows)])
                    for name in ("strength", "early")
                )
                strengths = strengths.to(latents.device)  # once, not in each layer
                stack.enter_context(self.adapter.scaled(strengths, early.to(latents.device) if early.any() else False))
            # After the strengths, so that the maps are those of the blended layers.
            if step.maps is not None:
                stack.enter_context(step.maps.reading(self.network))
            yield step


class RuleStep:
    """One step by a rule.

    Args:
        table, scale: of the rule at this step.
        shape: (B, C, h, w) of the latents of one branch.
    """

    def __init__(self, table: Table, scale: float, shape: Sequence[int]):
        self.table, self.scale, self.shape = table, scale, shape
        # As the pipelines have it, negative first: where a row stands in the batch may decide its last bits.
        self.branches = table.branches(scale)[::-1]
        self.maps: ClassWordMaps | None = None
        if table.outside is not None and {SUBJECT, CLASS} <= set(self.branches):
            starts = (self.branches.index(branch) * shape[0] for branch in (SUBJECT, CLASS))
            self.maps = ClassWordMaps(*(slice(start, start + shape[0]) for start in starts))

    def _predictions(self, output: Tensor) -> tuple[dict[Branch, Tensor], Tensor | None]:
        mask = None if self.maps is None else self.maps.mask(*self.shape[-2:], self.table.quantile)
        return dict(zip(self.branches, output.chunk(len(self.branches)))), mask

    def guided(self, output: Tensor) -> Tensor:
        """The guided prediction (B, C, h, w) of the network's output, (branches B, C, h, w)."""
        predictions, mask = self._predictions(output)
        return guide(self.table, predictions, self.scale, mask)

    def pair(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The predictions (B, C, h, w) to lead away from and towards; both the latter at a scale of 1."""
        predictions, mask = self._predictions(output)
        towards = self.table.conditional(predictions, mask)
        return towards if self.scale == 1 else predictions[self.table.away], towards


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
    branches. At a scale of at most 1 a pipeline does not guide, and gets the rule's conditional prediction. The steps
    that a rule counts are the noise levels of the scheduler, also where a pipeline starts or ends in between; one that
    asks between two levels gets what the first of them says.

    Args:
        pipeline: a text-to-image pipeline of SD1.x, SD2.x, SDXL or SD3, or a variant that calls its network alike.
        adapter: attached to the pipeline's own network (`DiffusersDenoiser.from_pipeline`); by default whatever LoRA
            the network has, such as the pipeline's `load_lora_weights` gave it. Early checkpoints are held by it.
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
    with engine.open_step, ExitStack() as stack:
        # Not the network's `forward`, which offloading replaces.
        stack.callback(network.register_forward_pre_hook(engine.before, with_kwargs=True).remove)
        stack.callback(network.register_forward_hook(engine.after).remove)
        stack.callback(delattr, pipeline, "encode_prompt")
        pipeline.encode_prompt = engine.encode_prompt
        yield pipeline


def _loaded(pipeline: Any, network: nn.Module) -> Adapter | None:
    """The LoRA that the pipeline has loaded itself, as an adapter that can be scaled; None if there is none."""
    encoders = {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder")}
    networks = {"": network, **{name: part for name, part in encoders.items() if part is not None}}
    layers = {
        f"{prefix}:{name}" if prefix else name: module
        for prefix, part in networks.items()
        for name, module in part.named_modules()
        if hasattr(module, "get_base_layer")
    }
    if any(getattr(layer, "merged", False) for layer in layers.values()):
        raise ValueError(
            "the pipeline's LoRA is fused into its weights, which has no strength; unfuse it (unfuse_lora)"
        )
    config = AdapterConfig(text_encoder=any(":" in name for name in layers))
    return Adapter(networks, config, layers, []) if layers else None


class _Pipeline:
    """What `guided` puts into a pipeline: an `encode_prompt`, and two hooks on the network."""

    def __init__(self, pipeline: Any, network: nn.Module, steps: RuleSteps, class_prompt: Any):
        self.pipeline, self.steps, self.class_prompt = pipeline, steps, class_prompt
        self._encode = pipeline.encode_prompt
        self._signature, self._signature_of_network = map(inspect.signature, (self._encode, network.forward))
        self._rows = 0
        self._encoded: dict[Branch, Sequence[Tensor]] = {}
        self._step: RuleStep | None = None
        self.open_step = ExitStack()

    def encode_prompt(self, *arguments: Any, **options: Any) -> Any:
        """The pipeline's own; what branches read that differs from it is encoded besides, with the same options."""
        given = self._signature.bind(*arguments, **options).arguments
        own = self._encode(**given)
        self._rows, self._encoded = len(own[0]), {}
        adapter = self.steps.adapter
        for branch in self.steps.rule.branches:
            weak = adapter is not None and adapter.config.trains_text and (branch.strength != 1 or branch.early)
            if weak and given.get("negative_prompt_embeds" if branch.prompt == "null" else "prompt_embeds") is not None:
                raise ValueError(
                    f"the {branch.prompt} prompt is given as embeddings, but the rule encodes it with a weakened text "
                    "encoder; give it as a text"
                )
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

    def before(self, network: nn.Module, arguments: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """What the network gets, with the branches in place of what the pipeline gives it."""
        given = self._signature_of_network.bind(*arguments, **options).arguments
        self.open_step.close()  # of a pass that failed
        self._step = None
        if given.get("skip_layers") is not None:  # SD3's skip layer guidance, a pass of its own
            return arguments, options
        guides, latents = self.pipeline.do_classifier_free_guidance, next(iter(given.values()))
        if len(latents) != self._rows * (2 if guides else 1):
            raise ValueError(
                f"the pipeline runs {len(latents)} rows for {self._rows} pictures, but a rule takes one that runs two "
                "for each; switch its other guidance off"
            )
        scale = self.pipeline.guidance_scale if guides else 1.0
        step = self.steps.step(*self._progress(given["timestep"]), scale, latents[: self._rows])
        self._step = self.open_step.enter_context(step)
        return (), self._batch(given, self._step.branches, len(latents)) | {"return_dict": False}

    def after(self, network: nn.Module, arguments: tuple, output: Any) -> Any:
        """The pipeline's predictions, made of the branches'."""
        if self._step is None:
            return output
        self.open_step.close()
        away, towards = self._step.pair(output[0])
        return (torch.cat([away, towards]) if self.pipeline.do_classifier_free_guidance else towards,)

    def _progress(self, timestep: Tensor) -> tuple[int, int]:
        """The step, and how many there are: by noise level, as some schedulers run the network twice a step."""
        scheduler = self.pipeline.scheduler
        levels = scheduler.timesteps[:: scheduler.order].unique_consecutive().tolist()
        return step_at(float(timestep.flatten()[0]), [*levels, -1.0]), len(levels)

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
