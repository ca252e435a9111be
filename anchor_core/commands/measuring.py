"""The verbs `inspect` and `compare`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ..checks import check_count
from .shared import check_embedding, check_writable, device, open_model, resolution


def inspect(options: Namespace) -> None:
    from ..adapters.attach import attach_file
    from ..adapters.file import load_adapter
    from ..evaluation import report
    from ..evaluation.collapse import draw_norms

    check_embedding(options)
    out, classes = check_writable(options.out), options.class_pictures
    _, metadata = load_adapter(options.adapter)
    concept = _concept(options.adapter, metadata, options.subject, options.class_prompt)
    prompts = _prompt_pairs(options.prompts, concept) if options.prompts else None
    denoiser = open_model(options)
    probe = _probe(options, denoiser, options.references, concept, check_count("class_pictures", classes, minimum=0))
    before = probe.measure()
    attach_file(denoiser, options.adapter, options.embedding)
    after = probe.measure()
    out.mkdir(parents=True, exist_ok=True)
    norms = _norms(denoiser, concept)
    figure = report.new_figure(13.5 + 4.5 * len(norms), 3.6)
    panels = figure.subplots(1, 3 + len(norms))
    for panel, name in zip(panels[3:], norms):
        draw_norms(panel, norms[name], {"the subject's token": norms[name]["token"], "class": norms[name]["class"]})
    for panel, quantity in zip(panels, ("drift", "reconstruction")):
        report.draw_by_timestep(panel, {"model alone": before, "with the adapter": after}, quantity)
    report.draw_readings(panels[2], after)
    figure.savefig(out / "report.png")
    written = {
        "adapter": str(options.adapter),
        "metadata": metadata,
        "before": before.to_dict(),
        "after": after.to_dict(),
        "collapse": None if prompts is None else _collapse(denoiser, *prompts),
        "embeddings": {name: {key: row[key] for key in row if key != "lengths"} for name, row in norms.items()},
    }
    report.write_json(out / "report.json", written)
    print(f"drift {before.drift:.3f} without, {after.drift:.3f} with the adapter; {out / 'report.png'}")


def _prompt_pairs(file: str, concept) -> tuple[list[str], list[str], list[str] | None]:
    """The prompts of a file, a line each, and those of the class; `shipped`: the package's, and its simple ones."""
    from ..evaluation.picture_folders import read_prompts
    from ..evaluation.prompt_sets import prompt_set

    if file == "shipped":
        subject, class_ = concept.subject_phrase, concept.class_phrase
        return prompt_set("contextual", subject), prompt_set("contextual", class_), prompt_set("simple", subject)
    prompts = read_prompts(file)("")
    if len(prompts) < 2:
        raise ValueError(f"--prompts: {file} has {len(prompts)} prompt, but the distances of a set take two or more")
    return prompts, [concept.class_of(prompt, "prompt") for prompt in prompts], None


def _collapse(denoiser, subject_prompts: list[str], class_prompts: list[str], simple: list[str] | None) -> dict:
    """The distances of the subject's prompts, by the adapted text encoder, from the class's by the pretrained one."""
    import torch

    from ..evaluation.collapse import collapse, last_positions

    with torch.no_grad():
        subject, class_ = (
            last_positions(denoiser.encode_prompts(prompts, adapted))
            for prompts, adapted in ((subject_prompts, True), (class_prompts, False))
        )
        of_simple = None if simple is None else last_positions(denoiser.encode_prompts(simple, True))
        return collapse(subject, class_, of_simple)


def _norms(denoiser, concept) -> dict[str, dict]:
    """By text encoder, where an adapter's token vectors stand among all input embeddings; none without vectors."""
    from ..adapters.embedding_file import encoder_of
    from ..adapters.tokens import to_embedding
    from ..backends.diffusers.adjust import embedding_tables, word_rows
    from ..evaluation.collapse import token_norms

    if not denoiser.adapter.config.vectors:
        return {}
    tables, rows = embedding_tables(denoiser), word_rows(denoiser, concept.class_phrase)
    vectors = {encoder_of(name, own, rows): own for name, own in to_embedding(denoiser.adapter.tokens).items()}
    return {name: token_norms(tables[name], own, rows[name]) for name, own in vectors.items()}


def compare(options: Namespace) -> None:
    from tqdm import tqdm

    from ..adapters.attach import attach_file
    from ..adapters.file import load_adapter
    from ..evaluation import report
    from ..evaluation.compare import Comparison, contact_sheet, markdown
    from ..evaluation.encoders import open_encoders, sandbox_encoders
    from ..evaluation.picture_folders import adapter_file, gather, read_prompt_file

    out = check_writable(options.out)
    systems, adapters = _named("pictures", options.pictures), _named("adapters", options.adapters)
    if not adapters.keys() <= systems.keys():
        unknown = min(adapters.keys() - systems.keys())
        raise ValueError(f"--adapters: {unknown!r} has no pictures; name one of {', '.join(systems)}")
    if adapters and options.model is None:
        raise ValueError("--adapters: the drift of an adapter takes its model too; give --model")
    if (options.judge is None) == (options.clip is None and options.dino is None):
        raise ValueError("--clip: the encoders are --clip DIR, --dino DIR or both, or else --judge sandbox; choose")
    left_out: list[str] = []
    subjects = gather(options.references, systems, options.prompts, options.token, left_out)
    read = [Path(folder) for folder in (options.references, *systems.values())]
    read += [file.parent for found in subjects.values() for files, _ in found.made.values() for file in files]
    if out.resolve() in {folder.resolve() for folder in (*read, *(found.folder for found in subjects.values()))}:
        raise ValueError(f"--out: {out} holds pictures to compare, which the table would join; give another folder")
    bare = [name for found in subjects.values() for name, (_, prompts) in found.made.items() if not prompts]
    if bare and (options.clip or options.judge):
        raise ValueError(f"--prompts: the pictures of {bare[0]} do not tell their prompts, for CLIP-T; give a file")
    files = {
        (name, subject): adapter_file(path, subject, len(subjects) == 1, name)
        for name, path in adapters.items()
        for subject in subjects
    }
    concepts = {
        key: _concept(file, load_adapter(file)[1], options.subject, options.class_prompt) for key, file in files.items()
    }
    encoders = sandbox_encoders() if options.judge else open_encoders(
        options.clip, options.dino, device(options), options.encoder_dtype, options.encoder_batch
    )  # fmt: skip
    classes = read_prompt_file(options.prompts).classes if options.prompts else {}
    comparison, shown = Comparison(encoders, left_out), {}
    for subject, found in tqdm(subjects.items(), desc="subjects"):
        for name, pictures in comparison.add_files(subject, found, options.class_word or classes.get(subject)).items():
            shown.setdefault(name, pictures)
    denoiser = open_model(options) if files else None
    for (name, subject), file in ((key, file) for key, file in files.items() if key[1] in comparison.subjects):
        probe = _probe(options, denoiser, subjects[subject].folder, concepts[name, subject])
        attach_file(denoiser, file)
        comparison.add_drift(name, probe.drift())
        denoiser.detach()
    result = comparison.result()
    out.mkdir(parents=True, exist_ok=True)
    contact_sheet(shown.pop(""), shown).savefig(out / "report.png")
    report.write_json(out / "report.json", result)
    (out / "report.md").write_text(markdown(result) + "\n", encoding="utf-8")
    print(markdown(result))


def _concept(file, metadata: dict[str, str], subject: str | None = None, class_prompt: str | None = None):
    """The prompts given, else those that an adapter's file names."""
    from ..adapters.metadata import stated_prompt
    from ..concept import Concept

    subject = subject or stated_prompt(metadata, "subject")
    class_prompt = class_prompt or stated_prompt(metadata, "class")
    for option, value in (("--subject", subject), ("--class", class_prompt)):
        if value is None:
            raise ValueError(f"{option}: {file} does not name this prompt in its metadata; give the option")
    return Concept(subject, class_prompt)


def _probe(options: Namespace, denoiser, references: str | Path, concept, classes: int = 0):
    """`classes`: how many class pictures are made, for the readings of Fig. 2 that take some."""
    from ..data.pictures import load_references
    from ..data.prepare import sample_class_latents
    from ..drift import DriftProbe

    latents = denoiser.encode_images(load_references(references, resolution(options, denoiser)).stack())
    samples = (
        sample_class_latents(denoiser, concept, classes, tuple(latents.shape[1:]), seed=options.seed)
        if classes
        else None
    )
    return DriftProbe(denoiser, latents, concept, seed=options.seed, class_latents=samples)


def _named(option: str, values: list[str]) -> dict[str, str]:
    """NAME=PATH, once or more, as name -> path."""
    named = {}
    for value in values:
        name, _, path = value.partition("=")
        if not name.strip() or not path or name in named:
            raise ValueError(f"--{option}: {value!r} is no NAME=PATH of a new name; give such as ours=out/pictures")
        named[name] = path
    return named
