"""What the verbs of the command line do."""

from __future__ import annotations

import signal
import tempfile
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = WEIGHTS if options.model == "sandbox" else options.model
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    return DiffusersDenoiser.from_pretrained(model, device, dtype, options.config)


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
    from .adapter_file import attach_file, read_early
    from .backends.diffusers_guidance import RuleSteps
    from .guidance import CLASS, NULL, SUBJECT

    check_count("steps", options.steps)
    check_count("count", options.count)
    if options.guidance is not None:
        check_number("guidance", options.guidance, minimum=0)
    check_number("strength", options.strength)
    rule = _rule(options)
    if options.early and not options.adapter:
        raise ValueError("--early: it is an early checkpoint of the adapter; give --adapter too")
    out = _check_writable(options.out)
    denoiser = _open_model(options)
    early = read_early(denoiser, options.early) if options.early else None
    adapter, metadata = attach_file(denoiser, options.adapter) if options.adapter else (None, {})
    if early is not None:
        adapter.hold_early(early)
    if options.guidance is None:
        options.guidance = float(metadata.get("anchor.guidance", TrainSettings.guidance))
    reads_class = rule is not None and CLASS in rule.branches
    class_prompts = _class_prompts(options, metadata) if reads_class else [None] * len(options.prompt)
    RuleSteps(rule, denoiser.network, adapter, reads_class)  # refuses a rule that does not go with the model
    side = _resolution(options, denoiser)
    shape = denoiser.latent_shape(side, side)
    generator = torch.Generator().manual_seed(options.seed)
    wanted = [pair for pair in zip(options.prompt, class_prompts) for _ in range(options.count)]
    noise = torch.randn((len(wanted), *shape), generator=generator)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for i, (prompt, class_prompt) in enumerate(wanted):
        with nullcontext() if adapter is None else adapter.scaled(options.strength):
            encoded = denoiser.encode_branches(rule, prompt, class_prompt)
            latents = denoiser.sample(
                encoded[SUBJECT], encoded[NULL][0], noise[i : i + 1], steps=options.steps, guidance=options.guidance,
                rule=rule, class_=encoded.get(CLASS), encoded=encoded,
            )  # fmt: skip
        files.append({"file": f"{i:03}.png", "prompt": prompt} | ({"class": class_prompt} if reads_class else {}))
        report.save_picture(out / files[-1]["file"], denoiser.decode_latents(latents)[0])
    settings = {k: getattr(options, k) for k in ("model", "adapter", "strength", "steps", "guidance", "early", "seed")}
    settings["rule"] = None if rule is None else {"name": rule.name, **asdict(rule)}
    report.write_json(out / "report.json", {"pictures": files, **settings})
    print(f"{len(files)} pictures in {out}")


def _rule(options: Namespace):
    """The guidance rule of the options; None where none is given."""
    from .guidance import CLASS, RULE_OPTIONS, make_rule

    given = {name: getattr(options, name) for name in RULE_OPTIONS if getattr(options, name) is not None}
    if "early" in given:
        given["early"] = True  # the option is the file
    rule = make_rule(options.rule or "cfg", **given) if options.rule or given else None
    if options.class_prompt and (rule is None or CLASS not in rule.branches):
        raise ValueError(f"--class: rule {rule.name if rule else 'cfg'!r} reads no class prompt; leave it out")
    return rule


def _class_prompts(options: Namespace, metadata: dict[str, str]) -> list[str]:
    """The class prompt of each prompt: as given, or by the two prompts that the adapter was trained on."""
    from .captions import Concept

    if options.class_prompt:
        if len(options.class_prompt) != len(options.prompt):
            raise ValueError(
                f"--class: given {len(options.class_prompt)} times for {len(options.prompt)} prompts; give one for each"
            )
        return options.class_prompt
    trained = [metadata.get(f"anchor.{name}_prompt") for name in ("subject", "class")]
    if None in trained:
        raise ValueError(
            f"--class: rule {options.rule!r} reads class prompts, and no adapter says its own; give one a prompt"
        )
    return [Concept(*trained).class_of(prompt, "prompt") for prompt in options.prompt]


def inspect(options: Namespace) -> None:
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
            raise ValueError(f"{option}: {options.adapter} does not name this prompt in its metadata; give the option")
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
    from .bench import ablation, keep, stock
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
