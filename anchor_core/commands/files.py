"""The verb `convert`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from .shared import check_writable


def convert(options: Namespace) -> None:
    from ..adapters.file import convert_file
    from ..evaluation import report

    out = check_writable(options.out)
    target = out / f"{Path(options.file).stem}.{options.to}.safetensors"
    convert_file(options.file, target, options.to)
    report.write_json(out / "report.json", {"file": target.name, "source": str(options.file), "to": options.to})
    print(target)
