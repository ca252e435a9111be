"""The command line: `semantic-anchor train | sample | inspect | bench | demo | sandbox`.

Bad input is one line on stderr and exit status 2, before anything is written.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from dataclasses import asdict, fields, replace
from pathlib import Path

from .adapter import LAYERS, AdapterConfig
from .checks import check_count, check_number
from .objectives import ANCHORS, OBJECTIVES
from .trainer import TrainingDiverged, TrainSettings


class UsageError(Exception):
    """What the user gave cannot be used; the message is the one line that they see."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; gives the exit status."""
    parser = _build_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        check_count("seed", options.seed, minimum=0)
        options.run(options)
    except (UsageError, ValueError, TrainingDiverged) as error:
        print(f"semantic-anchor {options.verb}: error: {_with_option(str(error), parser)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"semantic-anchor {options.verb}: cancelled", file=sys.stderr)
        return 130
    return 0


def _with_option(message: str, parser: argparse.ArgumentParser) -> str:
    """The message with the option in front whose value it is about: a check names the argument first."""
    first = message.split(" ", 1)[0]
    aliases = {"subject_prompt": "subject", "class_prompt": "class", "picture": "references", "objective": "objective"}
    name = aliases.get(first, first)
    known = {field.name for field in (*fields(TrainSettings), *fields(AdapterConfig))}
    known |= {"model", "references", "subject", "class", "seed", "steps", "guidance", "count", "out", "adapter"}
    return f"--{name}: {message}" if name in known and not message.startswith("--") else " ".join(message.split())


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="semantic-anchor", description="Teach an image model a subject without losing what it knew.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    train = _verb(verbs, "train", "train an adapter on reference pictures", _train)
    _add_model(train)
    train.add_argument("--references", required=True, metavar="DIR", help="folder of 1 or more pictures of the subject")
    train.add_argument("--subject", required=True, metavar="PROMPT", help='such as "a photo of a sks dog"')
    train.add_argument(
        "--class", required=True, dest="class_prompt", metavar="PROMPT", help='such as "a photo of a dog"'
    )
    _add_settings(train)
    train.add_argument("--class-pictures", "--class_pictures", type=int, default=24, help="for prior_preservation")

    sample = _verb(verbs, "sample", "make pictures, with or without an adapter", _sample)
    _add_model(sample)
    sample.add_argument("--adapter", metavar="FILE", help="a LoRA file; without it the model as it is")
    sample.add_argument("--strength", type=float, default=1.0, help="of the adapter (default 1)")
    sample.add_argument("--prompt", required=True, action="append", help="once or more")
    sample.add_argument("--count", type=int, default=1, help="pictures of each prompt (default 1)")
    _add_sampling(sample)

    inspect = _verb(verbs, "inspect", "measure the drift of a LoRA from its class", _inspect)
    _add_model(inspect)
    inspect.add_argument("--adapter", required=True, metavar="FILE")
    inspect.add_argument("--references", required=True, metavar="DIR", help="pictures to make the probe's latents from")
    inspect.add_argument("--subject", metavar="PROMPT", help="default: the file's metadata")
    inspect.add_argument("--class", dest="class_prompt", metavar="PROMPT", help="default: the file's metadata")

    demo = _verb(
        verbs, "demo", "one subject, three ways: DreamBooth, prior preservation, anchored", _demo, out="out/demo"
    )
    demo.add_argument("--subject", default="pip", help="one of `semantic-anchor sandbox subjects` (default pip)")
    demo.add_argument("--steps", type=int, help="training steps of each method")

    bench = _verb(verbs, "bench", "the tables of docs/RESULTS.md, on the embedded model", _bench, out="out/bench")
    bench.add_argument("--subjects", nargs="+", metavar="NAME", help="default: the four of the tables")
    bench.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    bench.add_argument("--at", nargs="+", type=int, default=[75, 150], help="step counts to score at")
    bench.add_argument("--learning_rate", "--learning-rate", type=float, help="instead of the demo's")

    sandbox = verbs.add_parser("sandbox", help="the embedded model: pretrain it, list and draw its subjects")
    actions = sandbox.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    pretrain = _verb(actions, "pretrain", "make the embedded model again, from nothing", _pretrain, out="out/sandbox")
    pretrain.add_argument("--work", metavar="DIR", help="where the run keeps its state (default: OUT/work)")
    pretrain.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    pretrain.add_argument("--steps", type=int, help="steps of the denoiser")
    _verb(actions, "subjects", "list the held-out subjects", _subjects, out=None)
    subject = _verb(actions, "subject", "write a subject's reference pictures", _subject)
    subject.add_argument("name", metavar="NAME")
    return parser


def _verb(parent, name: str, text: str, run, out: str | None = "") -> argparse.ArgumentParser:
    """A verb with the options that all have; `out` is the default folder, "" for none, None for a verb that prints."""
    parser = parent.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    required = out == ""
    parser.add_argument("--out", metavar="DIR", required=required, default=out or None, help="folder for the results")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a diffusers folder, or `sandbox` for the embedded model")
    parser.add_argument("--resolution", type=int, help="of the pictures (default: the model's own)")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    default = TrainSettings()
    parser.add_argument("--objective", default=default.objective, choices=OBJECTIVES)
    parser.add_argument("--w", type=float, default=default.w, help="weight of the anchor (default %(default)s)")
    parser.add_argument("--anchor", default=default.anchor, choices=ANCHORS)
    for name in ("steps", "batch_size"):
        _add_underscored(parser, name, int, getattr(default, name))
    for name in ("learning_rate", "prior_weight", "weight_decay", "grad_clip"):
        _add_underscored(parser, name, float, getattr(default, name))
    _add_underscored(parser, "rank", int, AdapterConfig.rank)
    _add_underscored(parser, "alpha", float, None)
    _add_underscored(parser, "dropout", float, AdapterConfig.dropout)
    parser.add_argument("--layers", default=AdapterConfig.layers, help=f"{', '.join(LAYERS)}, or a regular expression")


def _add_underscored(parser: argparse.ArgumentParser, name: str, kind, default) -> None:
    names = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
    parser.add_argument(*names, type=kind, default=default, help="(default %(default)s)")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=25, help="sampling steps (default 25)")
    parser.add_argument("--guidance", type=float, default=5.0, help="classifier-free guidance scale (default 5)")


# --- what the verbs share -------------------------------------------------------------------------------------------


def _open_model(options):
    from .backends.diffusers import DiffusersDenoiser
    from .sandbox.model import WEIGHTS

    return DiffusersDenoiser.from_pretrained(WEIGHTS if options.model == "sandbox" else options.model)


def _resolution(options, denoiser) -> int:
    if options.resolution is None:
        return denoiser.default_resolution
    return check_count("resolution", options.resolution)


def _check_writable(folder: str) -> Path:
    """The folder's path, after a trial that leaves nothing behind: the nearest existing parent takes a file."""
    out = Path(folder)
    parent = out
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UsageError(f"--out: {folder} cannot be written, because {parent} is a file; give another folder")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UsageError(f"--out: {folder} cannot be written ({error.strerror}); give another folder") from error
    return out


def _settings(options) -> TrainSettings:
    given = {
        field.name: getattr(options, field.name) for field in fields(TrainSettings) if hasattr(options, field.name)
    }
    settings = TrainSettings(**given)
    return replace(settings, probe_every=max(1, settings.steps // 10))


# --- the verbs ------------------------------------------------------------------------------------------------------


def _train(options) -> None:
    from tqdm import tqdm

    from . import report
    from .adapter_file import save_trained
    from .data import Concept, load_references, sample_class_latents
    from .drift import DriftProbe
    from .trainer import train

    settings = _settings(options)
    adapter = AdapterConfig(options.rank, options.alpha, options.dropout, options.layers)
    concept = Concept(options.subject, options.class_prompt)
    check_count("class_pictures", options.class_pictures)
    out = _check_writable(options.out)
    denoiser = _open_model(options)
    references = load_references(options.references, _resolution(options, denoiser))
    latents = denoiser.encode_images(references.stack())
    attached = denoiser.attach(adapter, seed=settings.seed)
    class_latents = None
    if settings.make_objective().reads_class_pictures:
        class_latents = sample_class_latents(
            denoiser, concept, options.class_pictures, tuple(latents.shape[1:]), seed=settings.seed
        )
    probe = DriftProbe(denoiser, latents, concept, noises=2, seed=settings.seed)
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=settings.steps, desc="training") as bar:

        def show(step) -> None:
            bar.update()
            if step.drift is not None:
                bar.set_postfix(loss=f"{step.loss:.4f}", drift=f"{step.drift:.3f}")

        history = train(
            denoiser, attached, latents, concept, settings, class_latents=class_latents, probe=probe, on_step=show
        )
    path = out / "adapter.safetensors"
    save_trained(path, denoiser, concept, settings)
    figure = report.new_figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    report.draw_drift(left, {options.objective: history})
    report.draw_loss(right, {options.objective: history})
    figure.savefig(out / "report.png")
    report.write_json(
        out / "report.json",
        {
            "adapter": path.name,
            "subject_prompt": concept.subject_prompt,
            "class_prompt": concept.class_prompt,
            "references": references.names,
            "settings": asdict(settings),
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "layers": adapter.layers,
            "history": history.to_dict(),
        },
    )
    print(f"{path}  drift {history.probes[-1][1].drift:.3f}, {history.seconds:.0f} s")


def _sample(options) -> None:
    import torch

    from . import report
    from .adapter_file import attach_file

    check_count("steps", options.steps)
    check_count("count", options.count)
    check_number("guidance", options.guidance, minimum=0)
    check_number("strength", options.strength)
    out = _check_writable(options.out)
    denoiser = _open_model(options)
    adapter = attach_file(denoiser, options.adapter)[0] if options.adapter else None
    side = _resolution(options, denoiser)
    shape = denoiser.latent_shape(side, side)
    generator = torch.Generator().manual_seed(options.seed)
    prompts = [prompt for prompt in options.prompt for _ in range(options.count)]
    noise = torch.randn((len(prompts), *shape), generator=generator)
    negative = denoiser.encode_prompt("")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for i, prompt in enumerate(prompts):
        sampling = {"steps": options.steps, "guidance": options.guidance}
        condition = [denoiser.encode_prompt(prompt)]
        if adapter is None:
            latents = denoiser.sample(condition, negative, noise[i : i + 1], **sampling)
        else:
            with adapter.scaled(options.strength):
                latents = denoiser.sample(condition, negative, noise[i : i + 1], **sampling)
        files.append({"file": f"{i:03}.png", "prompt": prompt})
        report.save_picture(out / files[-1]["file"], denoiser.decode_latents(latents)[0])
    settings = {k: getattr(options, k) for k in ("model", "adapter", "strength", "steps", "guidance", "seed")}
    report.write_json(out / "report.json", {"pictures": files, **settings})
    print(f"{len(files)} pictures in {out}")


def _inspect(options) -> None:
    from . import report
    from .adapter_file import attach_file, load_adapter
    from .data import Concept, load_references
    from .drift import DriftProbe

    out = _check_writable(options.out)
    _, metadata = load_adapter(options.adapter)
    subject = options.subject or metadata.get("anchor.subject_prompt")
    class_prompt = options.class_prompt or metadata.get("anchor.class_prompt")
    for option, value in (("--subject", subject), ("--class", class_prompt)):
        if value is None:
            raise UsageError(f"{option}: {options.adapter} does not name this prompt in its metadata; give the option")
    concept = Concept(subject, class_prompt)
    denoiser = _open_model(options)
    references = load_references(options.references, _resolution(options, denoiser))
    probe = DriftProbe(denoiser, denoiser.encode_images(references.stack()), concept, seed=options.seed)
    before = probe.measure()
    attach_file(denoiser, options.adapter)
    after = probe.measure()
    out.mkdir(parents=True, exist_ok=True)
    figure = report.new_figure(9, 3.6)
    panels = figure.subplots(1, 2)
    for panel, quantity in zip(panels, ("drift", "reconstruction")):
        report.draw_by_timestep(panel, {"model alone": before, "with the adapter": after}, quantity)
    figure.savefig(out / "report.png")
    written = {
        "adapter": str(options.adapter),
        "metadata": metadata,
        "before": before.to_dict(),
        "after": after.to_dict(),
    }
    report.write_json(out / "report.json", written)
    print(f"drift {before.drift:.3f} without, {after.drift:.3f} with the adapter; {out / 'report.png'}")


def _demo(options) -> None:
    from .bench import demo
    from .sandbox import subjects

    subjects.get(options.subject)
    steps = demo.SETTINGS.steps if options.steps is None else check_count("steps", options.steps)
    out = _check_writable(options.out)
    result = demo.run(out, options.subject, options.seed, steps)
    print(f"\n{demo.table(result)}\n\n{out / 'report.png'}")


def _bench(options) -> None:
    from .bench import ablation
    from .sandbox import subjects

    names = options.subjects or list(ablation.TABLE_SUBJECTS)
    for name in names:
        subjects.get(name)
    for step in options.at:
        check_count("at", step)
    for seed in options.seeds:
        check_count("seeds", seed, minimum=0)
    rate = ablation.SETTINGS.learning_rate if options.learning_rate is None else options.learning_rate
    settings = replace(ablation.SETTINGS, learning_rate=rate)
    ablation.run(_check_writable(options.out), names, options.seeds, options.at, settings)


def _pretrain(options) -> None:
    import torch

    from .sandbox import evaluate, judge, pretrain

    out = _check_writable(options.out)
    settings = pretrain.PretrainSettings(seed=options.seed)
    if options.steps is not None:
        settings = replace(settings, denoiser_steps=check_count("steps", options.steps))
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    work = Path(options.work) if options.work else out / "work"
    pretrain.run(work, settings, device=device)
    judge.train(work, device=device)
    pretrain.assemble(work, out / "weights")
    judge.assemble(work, out / "weights" / "judge")
    print(evaluate.describe(work, out / "weights", settings))


def _subjects(options) -> None:
    from .sandbox import subjects

    print("\n".join(subjects.names()))


def _subject(options) -> None:
    from . import report
    from .sandbox import subjects

    subject = subjects.get(options.name)
    out = _check_writable(options.out)
    out.mkdir(parents=True, exist_ok=True)
    files = [f"{i}.png" for i in range(subject.count)]
    for file, picture in zip(files, subject.references()):
        picture.save(out / file)
    about = {"name": subject.name, "class": subject.class_word, "references": files, "prompts": subject.prompts()}
    report.write_json(out / "report.json", about)
    print(f"{len(files)} pictures of {subject.name}, a {subject.class_word}, in {out}")


if __name__ == "__main__":
    sys.exit(main())
