"""The verb `train`."""

from __future__ import annotations

import os
import signal
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from ..adapters.config import AdapterConfig
from ..checks import check_count
from ..objectives import w_from_lambda
from ..training.settings import DataSettings, TrainSettings
from .shared import check_writable, given, open_model, resolution


def train(options: Namespace) -> int:
    from tqdm import tqdm

    from ..concept import Concept
    from ..data.cache import Cache
    from ..data.pictures import bucket_sizes, load_references
    from ..data.prepare import build_dataset, of_one_size, sample_class_latents
    from ..drift import DriftProbe
    from ..evaluation import report
    from ..training.methods import check_combination
    from ..training.parallel import Workers
    from ..training.saving import save_trained
    from ..training.trainer import train as run

    if options.lambda_ is not None:
        options.w = w_from_lambda(options.lambda_)
    settings, config, data = (given(options, kind) for kind in (TrainSettings, AdapterConfig, DataSettings))
    concept = Concept(options.subject, options.class_prompt)
    check_count("class_pictures", options.class_pictures)
    if {settings.precision, options.dtype} == {"fp16", "bf16"}:
        raise ValueError(
            f"precision is {settings.precision!r}, but dtype is {options.dtype!r}, which does not mix with it; take "
            "the same, or fp32 for one"
        )
    prompts = [(concept.subject_prompt, concept.class_prompt)]
    check_combination(settings, config, prompts, data.caption_dropout)
    out, workers = check_writable(options.out), Workers.launched(int(os.environ.get("WORLD_SIZE", "1")))
    options.device = options.device or workers.device
    denoiser = open_model(options)
    settings.check_model(denoiser.prediction_type)
    size = resolution(options, denoiser)
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
        class_latents = sample_class_latents(
            denoiser, concept, options.class_pictures, shape, seed=settings.seed, cache=cache
        )
    probe = DriftProbe(denoiser, latents, concept, noises=2, seed=settings.seed)
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
    files = save_trained(path, denoiser, concept, settings, history.kept)
    figure = report.new_figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    report.draw_drift(left, {settings.objective: history})
    report.draw_loss(right, {settings.objective: history})
    figure.savefig(out / "report.png")
    written = {
        "adapter": path.name,
        "embedding": files[-1].name if config.vectors else None,
        "method": options.method,
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
    from ..training.checkpoint import Checkpoints

    if not settings.checkpoint_every and not options.resume:
        return None
    folder = out / "checkpoints"
    if options.resume and not folder.is_dir():
        raise ValueError(f"--resume: there is no checkpoint in {folder}; leave the option out to start anew")
    checkpoints = Checkpoints(folder)
    if not options.resume and checkpoints.files():
        raise ValueError(f"--out: {folder} holds checkpoints of a training; give --resume or another folder")
    return checkpoints
