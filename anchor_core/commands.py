"""What the verbs of the command line do."""

from __future__ import annotations

import signal
import tempfile
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

from .adapter import AdapterConfig
from .checks import check_count, check_number
from .settings import DataSettings, TrainSettings

# --- what the verbs share -------------------------------------------------------------------------------------------


def _open_model(options: Namespace):
    import torch

    from .backends.diffusers import DiffusersDenoiser
    from .sandbox.model import WEIGHTS

    model = WEIGHTS if options.model == "sandbox" else options.model
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    return DiffusersDenoiser.from_pretrained(model, _device(options), dtype, options.config)


def _device(options: Namespace) -> str:
    import torch

    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _resolution(options: Namespace, denoiser) -> int:
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
        raise ValueError(f"--out: {folder} cannot be written, because {parent} is a file; give another folder")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ValueError(f"--out: {folder} cannot be written ({error.strerror}); give another folder") from error
    return out


def _given(options: Namespace, kind: type):
    """The settings of `kind` from the options of the same names."""
    return kind(**{field.name: getattr(options, field.name) for field in fields(kind) if "help" in field.metadata})


# --- the verbs ------------------------------------------------------------------------------------------------------


def train(options: Namespace) -> int:
    from tqdm import tqdm

    from . import report
    from .adapter_file import save_trained
    from .cache import Cache
    from .data import Concept, bucket_sizes, build_dataset, load_references, of_one_size, sample_class_latents
    from .drift import DriftProbe
    from .parallel import Workers
    from .trainer import train as run

    settings, config, data = (_given(options, kind) for kind in (TrainSettings, AdapterConfig, DataSettings))
    concept = Concept(options.subject, options.class_prompt)
    check_count("class_pictures", options.class_pictures)
    out, workers = _check_writable(options.out), Workers.from_environment()
    options.device = options.device or workers.device
    denoiser = _open_model(options)
    size = _resolution(options, denoiser)
    sizes = bucket_sizes(size, 8 * denoiser.downscale) if data.buckets else size
    references = load_references(options.references, sizes, masks=data.masks, captions=data.captions)
    cache = Cache(denoiser, options.cache)
    dataset = build_dataset(
        denoiser, references, concept, shuffle=data.shuffle, caption_dropout=data.caption_dropout, flip=data.flip,
        cache=cache, seed=settings.seed,
    )  # fmt: skip
    adapter = denoiser.attach(config, seed=settings.seed)
    checkpoints = _checkpoints(options, out, settings)
    # Pictures of one size, the first one's, for what takes a stack: class pictures and the probe.
    latents = of_one_size(dataset)
    class_latents = None
    if settings.make_objective().reads_class_pictures:
        shape = tuple(latents.shape[1:])
        class_latents = sample_class_latents(denoiser, concept, options.class_pictures, shape, seed=settings.seed)
    probe = DriftProbe(denoiser, latents, concept, noises=2, seed=settings.seed)
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=settings.steps, desc="training", disable=not workers.is_first, delay=1e-3) as bar:

        def show(step) -> None:
            bar.update(step.step - bar.n)
            if step.drift is not None:
                bar.set_postfix(loss=f"{step.loss:.4f}", drift=f"{step.drift:.3f}")

        with _interrupt() as interrupted:
            history = run(
                denoiser, adapter, dataset, concept, settings, class_latents=class_latents, probe=probe, on_step=show,
                should_stop=interrupted.is_set, checkpoints=checkpoints, cache=cache, workers=workers,
            )  # fmt: skip
    if not workers.is_first:
        return 0
    path = out / "adapter.safetensors"
    save_trained(path, denoiser, concept, settings, history.kept)
    figure = report.new_figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    report.draw_drift(left, {settings.objective: history})
    report.draw_loss(right, {settings.objective: history})
    figure.savefig(out / "report.png")
    written = {
        "adapter": path.name,
        "subject_prompt": concept.subject_prompt,
        "class_prompt": concept.class_prompt,
        "references": references.names,
        "settings": asdict(settings),
        "data": asdict(data),
        **asdict(config),
        "history": history.to_dict(),
    }
    report.write_json(out / "report.json", written)
    drift = dict(history.probes)[history.kept].drift
    state = f"cancelled after {len(history.losses)} steps; " if history.cancelled else ""
    print(f"{state}{path}  step {history.kept}, drift {drift:.3f}, {history.seconds:.0f} s")
    return 130 if history.cancelled else 0


@contextmanager
def _interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that the training ends after its step; a second one ends the process."""
    interrupted = threading.Event()

    def set_once(*_) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, set_once)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _checkpoints(options: Namespace, out: Path, settings: TrainSettings):
    """Those of `out`, if some are to be written or read; another training's stay untouched."""
    from .checkpoint import Checkpoints

    if not settings.checkpoint_every and not options.resume:
        return None
    folder = out / "checkpoints"
    if options.resume and not folder.is_dir():
        raise ValueError(f"--resume: there is no checkpoint in {folder}; leave the option out to start anew")
    checkpoints = Checkpoints(folder)
    if not options.resume and checkpoints.files():
        raise ValueError(f"--out: {folder} holds checkpoints of a training; give --resume or another folder")
    return checkpoints


def sample(options: Namespace) -> None:
    import torch

    from . import report
    from .adapter_file import attach_file

    check_count("steps", options.steps)
    check_count("count", options.count)
    if options.guidance is not None:
        check_number("guidance", options.guidance, minimum=0)
    check_number("strength", options.strength)
    out = _check_writable(options.out)
    denoiser = _open_model(options)
    adapter, metadata = attach_file(denoiser, options.adapter) if options.adapter else (None, {})
    if options.guidance is None:
        options.guidance = float(metadata.get("anchor.guidance", TrainSettings.guidance))
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


def inspect(options: Namespace) -> None:
    from . import report
    from .adapter_file import attach_file, load_adapter

    out = _check_writable(options.out)
    _, metadata = load_adapter(options.adapter)
    concept = _concept(options.adapter, metadata, options.subject, options.class_prompt)
    denoiser = _open_model(options)
    probe = _probe(options, denoiser, options.references, concept)
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


def _concept(file, metadata: dict[str, str], subject: str | None = None, class_prompt: str | None = None):
    """The prompts given, else those that an adapter's file names."""
    from .data import Concept

    subject = subject or metadata.get("anchor.subject_prompt")
    class_prompt = class_prompt or metadata.get("anchor.class_prompt")
    for option, value in (("--subject", subject), ("--class", class_prompt)):
        if value is None:
            raise ValueError(f"{option}: {file} does not name this prompt in its metadata; give the option")
    return Concept(subject, class_prompt)


def _probe(options: Namespace, denoiser, references: str | Path, concept):
    from .data import load_references
    from .drift import DriftProbe

    pictures = load_references(references, _resolution(options, denoiser)).stack()
    return DriftProbe(denoiser, denoiser.encode_images(pictures), concept, seed=options.seed)


def compare(options: Namespace) -> None:
    from tqdm import tqdm

    from . import report
    from .adapter_file import attach_file, load_adapter
    from .compare import Comparison, contact_sheet, markdown
    from .encoders import open_encoders, sandbox_encoders
    from .picture_folders import adapter_file, gather
    from .pictures import read_picture

    out = _check_writable(options.out)
    systems, adapters = _named("pictures", options.pictures), _named("adapters", options.adapters)
    if not adapters.keys() <= systems.keys():
        unknown = min(adapters.keys() - systems.keys())
        raise ValueError(f"--adapters: {unknown!r} has no pictures; name one of {', '.join(systems)}")
    if adapters and options.model is None:
        raise ValueError("--adapters: the drift of an adapter takes its model too; give --model")
    if (options.judge is None) == (options.clip is None and options.dino is None):
        raise ValueError("--clip: the encoders are --clip DIR, --dino DIR or both, or else --judge sandbox; choose")
    subjects = gather(options.references, systems, options.prompts, options.token)
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
    encoders = sandbox_encoders() if options.judge else open_encoders(options.clip, options.dino, _device(options))
    comparison, shown = Comparison(encoders), {}
    for subject, found in tqdm(subjects.items(), desc="subjects"):
        references = [read_picture(file) for file in found.references]
        comparison.add_references(subject, references)
        for name, (made, prompts) in found.made.items():
            pictures = [read_picture(file) for file in made]
            comparison.add(name, subject, pictures, prompts)
            shown.setdefault(name, pictures[:6])
        shown.setdefault("", references)
    denoiser = _open_model(options) if files else None
    for (name, subject), file in files.items():
        probe = _probe(options, denoiser, subjects[subject].folder, concepts[name, subject])
        attach_file(denoiser, file)
        comparison.add_drift(name, probe.measure().drift)
        denoiser.detach()
    result = comparison.result()
    out.mkdir(parents=True, exist_ok=True)
    contact_sheet(shown.pop(""), shown).savefig(out / "report.png")
    report.write_json(out / "report.json", result)
    (out / "report.md").write_text(markdown(result) + "\n", encoding="utf-8")
    print(markdown(result))


def _named(option: str, values: list[str]) -> dict[str, str]:
    """NAME=PATH, once or more, as name -> path."""
    named = {}
    for value in values:
        name, _, path = value.partition("=")
        if not name.strip() or not path or name in named:
            raise ValueError(f"--{option}: {value!r} is no NAME=PATH of a new name; give such as ours=out/pictures")
        named[name] = path
    return named


def convert(options: Namespace) -> None:
    from . import report
    from .adapter_formats import convert_file

    out = _check_writable(options.out)
    target = out / f"{Path(options.file).stem}.{options.to}.safetensors"
    convert_file(options.file, target, options.to)
    report.write_json(out / "report.json", {"file": target.name, "source": str(options.file), "to": options.to})
    print(target)


def demo(options: Namespace) -> None:
    from .bench import demo
    from .sandbox import subjects

    subjects.get(options.subject)
    steps = demo.SETTINGS.steps if options.steps is None else check_count("steps", options.steps)
    out = _check_writable(options.out)
    result = demo.run(out, options.subject, options.seed, steps)
    print(f"\n{demo.table(result)}\n\n{out / 'report.png'}")


def bench(options: Namespace) -> None:
    from .bench import ablation, keep, methods, stock
    from .sandbox import subjects

    names = options.subjects or list(ablation.TABLE_SUBJECTS)
    for name in names:
        subjects.get(name)
    for step in options.at:
        check_count("at", step)
    for seed in options.seeds:
        check_count("seeds", seed, minimum=0)
    out = _check_writable(options.out)
    if options.stock:
        python = Path(options.stock_python or Path(options.stock) / ".venv/bin/python")
        for option, file in (("stock", Path(options.stock) / "main.py"), ("stock_python", python)):
            if not file.is_file():
                raise ValueError(f"--{option}: there is no file {file}; give ComfyUI's folder and its interpreter")
        print(stock.table(stock.run(out, Path(options.stock), python, device=options.device)))
    elif options.methods is not None:
        if options.jobs is not None:
            check_count("jobs", options.jobs)
        rate = {} if options.learning_rate is None else {"learning_rate": options.learning_rate}
        steps = max(options.at)
        print(methods.run(out, names, options.seeds, options.methods, options.jobs, steps=steps, **rate))
    elif options.keep:
        keep.run(out, names, options.seeds)
    else:
        rate = ablation.SETTINGS.learning_rate if options.learning_rate is None else options.learning_rate
        ablation.run(out, names, options.seeds, options.at, replace(ablation.SETTINGS, learning_rate=rate))


def pretrain(options: Namespace) -> None:
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


def subjects(options: Namespace) -> None:
    from .sandbox import subjects

    print("\n".join(subjects.names()))


def subject(options: Namespace) -> None:
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
