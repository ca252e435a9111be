"""The verb `checkup`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from .shared import check_embedding, check_writable, given, open_model, resolution


def checkup(options: Namespace) -> None:
    from tqdm import tqdm

    from ..adapters.attach import attach_file
    from ..adapters.file import load_adapter
    from ..adapters.stated import prompts_of
    from ..data.pictures import load_references
    from ..evaluation import checkup_page
    from ..evaluation.checkup import about_file, check_up
    from ..evaluation.settings import CheckupSettings

    check_embedding(options)
    settings = given(options, CheckupSettings)
    out = check_writable(options.out)
    _, metadata = load_adapter(options.adapter)
    prompts = prompts_of(metadata, options.subject or "", options.class_prompt or "")
    denoiser = open_model(options)
    side = resolution(options, denoiser)
    latents = None
    if options.references:
        latents = denoiser.encode_images(load_references(options.references, side).stack())
    with tqdm(desc="check-up", unit="pass") as bar:

        def tick(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        report = check_up(
            denoiser, lambda: attach_file(denoiser, options.adapter, options.embedding)[0], metadata, prompts,
            latents=latents, shape=denoiser.latent_shape(side, side), settings=settings, tick=tick,
        )  # fmt: skip
    report |= about_file(Path(options.adapter).name, metadata)
    out.mkdir(parents=True, exist_ok=True)
    names = (out / f"report.{ending}" for ending in ("json", "html", "png"))
    checkup_page.save(report, checkup_page.draw(report), *names)
    print("\n".join([*report["verdict"]["sentences"], str(out / "report.html")]))
