"""The verb `sweep`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ..checks import check_count, check_number
from .shared import check_writable, device, open_model, resolution


def sweep(options: Namespace) -> None:
    from ..adapters.attach import attach_file
    from ..adapters.metadata import recommended_guidance, stated_prompt
    from ..evaluation import report
    from ..evaluation.sweep import Column, draw, grid, markdown, noises, parse_values, score, to_dict

    strengths = parse_values(options.strength, "strength")
    for name in ("count", "steps"):
        check_count(name, getattr(options, name))
    if options.guidance is not None:
        check_number("guidance", options.guidance, minimum=0)
    if len(strengths) > 1 and len(options.adapter) > 1:
        raise ValueError("--strength: one thing is varied; give one strength for several adapters, or one adapter")
    encoders = _encoders(options)
    out = check_writable(options.out)
    denoiser = open_model(options)
    side = resolution(options, denoiser)
    noise = noises(denoiser.latent_shape(side, side), options.count, options.seed)
    what = options.by or ("file" if len(options.adapter) > 1 else "strength")
    columns, prompts = [], set()
    for file in options.adapter:
        adapter, metadata = attach_file(denoiser, file, None)
        prompt = options.prompt or stated_prompt(metadata, "subject")
        if prompt is None:
            raise ValueError(f"--prompt: {file} does not name its prompt in its metadata; give the option")
        guidance = recommended_guidance(metadata) if options.guidance is None else options.guidance
        for strength in strengths:
            label = f"{strength:g}" if what == "strength" else _label(what, file, metadata)
            with adapter.scaled(strength):
                columns.append(Column(label, draw(denoiser, prompt, noise, steps=options.steps, guidance=guidance)))
        prompts.add(prompt)
        denoiser.detach()
    if encoders is not None:
        references, text = _references(options), _class_prompt(options, prompts)
        score(columns, encoders, references, text)
    out.mkdir(parents=True, exist_ok=True)
    for column in columns:
        for i, picture in enumerate(column.pictures):
            report.save_picture(out / f"{what}-{column.label}-{i:03}.png", picture)
    grid(columns, what).savefig(out / "report.png")
    told = to_dict(columns, what) | {"prompts": sorted(prompts), "adapters": [str(file) for file in options.adapter]}
    report.write_json(out / "report.json", told | {"seed": options.seed, "steps": options.steps})
    print(markdown(columns, what) if encoders else f"{len(columns) * options.count} pictures in {out}")


def _label(what: str, file: str, metadata: dict[str, str]) -> str:
    if what == "file":
        return Path(file).stem
    if f"anchor.{what}" not in metadata:
        raise ValueError(f"--by: {file} does not tell its {what} in its metadata; take file")
    return metadata[f"anchor.{what}"]


def _encoders(options: Namespace):
    from ..evaluation.encoders import open_encoders, sandbox_encoders

    wanted = options.judge or options.clip or options.dino
    if bool(wanted) != bool(options.references):
        raise ValueError("--references: scores take the real pictures and --judge, --clip or --dino; give both or none")
    if options.judge and (options.clip or options.dino):
        raise ValueError("--judge: the encoders are --clip DIR, --dino DIR or both, or else --judge sandbox; choose")
    if not wanted:
        return None
    return sandbox_encoders() if options.judge else open_encoders(options.clip, options.dino, device(options))


def _references(options: Namespace):
    from ..data.folder import picture_files
    from ..data.pictures import read_picture

    return [read_picture(file) for file in picture_files(options.references)]


def _class_prompt(options: Namespace, prompts: set[str]) -> str:
    """The one prompt without the subject's token, for CLIP-T."""
    from ..evaluation.picture_folders import class_only

    if len(prompts) > 1:
        raise ValueError("--prompt: the adapters name several in their metadata; give the one to compare them by")
    return class_only(next(iter(prompts)), options.token)
