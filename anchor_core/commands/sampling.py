"""The verbs `sample` and `adjust`."""

from __future__ import annotations

from argparse import Namespace
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ..checks import check_count, check_number
from .shared import check_embedding, check_writable, open_model, resolution


def sample(options: Namespace) -> None:
    import torch

    from ..adapters.attach import attach_file, read_early
    from ..adapters.metadata import recommended_guidance
    from ..backends.diffusers.adjust import encode_adjusted
    from ..backends.diffusers.guidance import RuleSteps
    from ..branches import CLASS, NULL, SUBJECT
    from ..evaluation import report

    check_embedding(options)
    check_count("steps", options.steps)
    check_count("count", options.count)
    if options.guidance is not None:
        check_number("guidance", options.guidance, minimum=0)
    check_number("strength", options.strength)
    rule, (adjustment, how) = _rule(options), _prompt_adjustment(options)
    reads_class = adjustment is not None or (rule is not None and CLASS in rule.branches)
    if options.class_prompt and not reads_class:
        raise ValueError(f"--class: rule {rule.name if rule else 'cfg'!r} reads no class prompt; leave it out")
    if options.early and not options.adapter:
        raise ValueError("--early: it is an early checkpoint of the adapter; give --adapter too")
    out = check_writable(options.out)
    denoiser = open_model(options)
    early = read_early(denoiser, options.early) if options.early else None
    adapter, metadata = None, {}
    if options.adapter:
        adapter, metadata = attach_file(denoiser, options.adapter, options.embedding)
    if early is not None:
        adapter.hold_early(early)
    if options.guidance is None:
        options.guidance = recommended_guidance(metadata)
    class_prompts = _class_prompts(options, metadata, rule) if reads_class else [None] * len(options.prompt)
    RuleSteps(rule, denoiser.network, adapter, reads_class)  # refuses a rule that does not go with the model
    side = resolution(options, denoiser)
    shape = denoiser.latent_shape(side, side)
    generator = torch.Generator().manual_seed(options.seed)
    noise = torch.randn((len(options.prompt) * options.count, *shape), generator=generator)

    def encode_subject(prompt: str, class_prompt: str):
        return partial(encode_adjusted, denoiser, prompt, class_prompt, adjustment, **how) if adjustment else None

    files = []
    for prompt, class_prompt in zip(options.prompt, class_prompts):
        with nullcontext() if adapter is None else adapter.scaled(options.strength):
            encoded = denoiser.encode_branches(
                rule, prompt, class_prompt, encode_subject=encode_subject(prompt, class_prompt)
            )
            out.mkdir(parents=True, exist_ok=True)
            for i in range(len(files), len(files) + options.count):
                latents = denoiser.sample(
                    encoded[SUBJECT], encoded[NULL][0], noise[i : i + 1], steps=options.steps,
                    guidance=options.guidance, rule=rule, class_=encoded.get(CLASS), encoded=encoded,
                )  # fmt: skip
                about = {"class": class_prompt} if reads_class else {}
                files.append({"file": f"{i:03}.png", "prompt": prompt} | about)
                report.save_picture(out / files[-1]["file"], denoiser.decode_latents(latents)[0])
    names = ("model", "adapter", "embedding", "strength", "steps", "guidance", "early", "seed")
    settings = {name: getattr(options, name) for name in names}
    settings["rule"] = None if rule is None else {"name": rule.name, **asdict(rule)}
    settings["adjust"] = None if adjustment is None else asdict(adjustment) | how
    report.write_json(out / "report.json", {"pictures": files, **settings})
    print(f"{len(files)} pictures in {out}")


def _rule(options: Namespace):
    """The guidance rule of the options; None where none is given."""
    from ..guidance import RULE_OPTIONS, make_rule

    given = {name: getattr(options, name) for name in RULE_OPTIONS if getattr(options, name) is not None}
    if "early" in given:
        given["early"] = True  # the option is the file
        if "weak" in given:
            raise ValueError("--weak: with --early the weak model is that checkpoint, at full strength; give one")
    return make_rule(options.rule or "cfg", **given) if options.rule or given else None


def _adjustment(options: Namespace, prefix: str = "", norm_mix: float | None = None):
    """The embedding adjustment of the options; without a length among them, at this norm_mix or the default beta."""
    from ..embeddings import Adjustment

    given = {name: getattr(options, prefix + name) for name in ("alpha", "beta", "norm_mix")}
    if given["beta"] is None and given["norm_mix"] is None:
        given["norm_mix"] = norm_mix
    try:
        return Adjustment(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"--{prefix}{error}") from error


def _prompt_adjustment(options: Namespace):
    """That of the prompts, and how it is made; None and nothing where none is asked for."""
    from ..embeddings import NORM_MIX

    for name, value in vars(options).items():
        if options.adjust is None and name.startswith("adjust_") and value is not None:
            raise ValueError(f"--{name}: it is read with --adjust alone; give both or neither")
    if options.adjust is None:
        return None, {}
    how = {"align": options.adjust, "pooled": bool(options.adjust_pooled), "anchor": options.adjust_anchor or "current"}
    return _adjustment(options, "adjust_", NORM_MIX), how


def _class_prompts(options: Namespace, metadata: dict[str, str], rule) -> list[str]:
    """The class prompt of each prompt: as given, or by the two prompts that the adapter was trained on."""
    from ..adapters.metadata import stated_prompt
    from ..concept import Concept

    if options.class_prompt:
        if len(options.class_prompt) != len(options.prompt):
            raise ValueError(
                f"--class: given {len(options.class_prompt)} times for {len(options.prompt)} prompts; give one for each"
            )
        for prompt, class_prompt in zip(options.prompt, options.class_prompt):
            if rule is not None and rule.masked and prompt == class_prompt:
                raise ValueError(f"--class: it is the prompt {prompt!r} itself; for a mask, leave the token out of it")
        return options.class_prompt
    trained = [stated_prompt(metadata, name) for name in ("subject", "class")]
    if None in trained:
        told = (
            f"{options.adapter} does not name its prompts in its metadata" if options.adapter else "there is no adapter"
        )
        raise ValueError(f"--class: {told}; give the option")
    return [Concept(*trained).class_of(prompt, "prompt") for prompt in options.prompt]


def adjust(options: Namespace) -> None:
    from ..adapters.embedding_file import adjust_embedding, describe, read_embedding
    from ..adapters.file import save_adapter
    from ..backends.diffusers.adjust import word_rows
    from ..evaluation import report

    adjustment, out = _adjustment(options), check_writable(options.out)
    vectors, metadata = read_embedding(options.file)
    rows = word_rows(open_model(options), options.class_word)
    adjusted = adjust_embedding(vectors, options.class_word, rows, adjustment)
    target = out / f"{Path(options.file).stem}.adjusted.safetensors"
    save_adapter(target, adjusted, metadata)
    written = {"file": target.name, "source": str(options.file), "model": options.model}
    written |= {"class_word": options.class_word, **asdict(adjustment), "vectors": describe(vectors, adjusted, rows)}
    report.write_json(out / "report.json", written)
    print(target)
