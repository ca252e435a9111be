"""`train --sweep`: one option at several values, in one table and one grid of pictures."""

from __future__ import annotations

from argparse import Namespace
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from ..concept import Concept
from ..training.bank import Bank
from ..training.settings import DataSettings


def sweep(
    options: Namespace, out: Path, denoiser, several, references, concept: Concept, data: DataSettings, classes,
    bank: Bank, showing, ordered,
) -> int:  # fmt: skip
    """Train each of `several`; gives the exit status.

    Args:
        showing, ordered: give a context of the listener of a training of so many steps, and of its orders.
    """
    from ..data.cache import Cache
    from ..data.prepare import prepare
    from ..evaluation import report
    from ..evaluation.compare import contact_sheet
    from ..training.sweep import sweep

    first, rows, shown = several[0].settings, [], {}
    reads_class = any(each.settings.make_objective().reads_class_pictures for each in several)
    material = prepare(
        denoiser, references, concept, class_pictures=classes if reads_class else None,
        probe={"noises": 2, "seed": first.seed}, seed=first.seed, cache=Cache(denoiser, options.cache),
        **data.build,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    status = 0
    with ExitStack() as stack:

        def tell(variant):
            stack.close()  # the bar and the signals of the training before
            print(f"{variant.label} ({[each.label for each in several].index(variant.label) + 1} of {len(several)})")
            return stack.enter_context(showing(variant.settings.steps, True))

        def orders():
            return stack.enter_context(ordered())

        for swept in sweep(denoiser, material, several, bank=bank, folder=out, tell=tell, orders=orders):
            history = swept.outcome.history
            rows.append(
                {
                    "variant": swept.variant.label,
                    "adapter": str(swept.outcome.files[0].relative_to(out)),
                    "drift": swept.probe.drift,
                    "reconstruction": swept.probe.reconstruction,
                    "class_drift": swept.probe.class_drift,
                    "loss": sum(history.losses[-20:]) / len(history.losses[-20:]),
                    "steps": len(history.losses),
                    "seconds": history.seconds,
                    "how": swept.outcome.how,
                }
            )
            shown[swept.variant.label] = list(swept.pictures)
            status = 130 if swept.outcome.how == "cancelled" else 0
            # At each, so that what there is stays if a later one fails.
            contact_sheet(references.pixels, shown, len(swept.pictures)).savefig(out / "report.png")
            told = {"settings": asdict(first), "data": asdict(data), "rows": rows}
            told["bank"] = {"computed": bank.computed, "found": bank.found}
            report.write_json(out / "report.json", told)
    print(table(rows))
    print(f"{out / 'report.png'}; anchors: {bank.computed} passes computed, {bank.found} known")
    return status


def table(rows: list[dict]) -> str:
    """The scores as a markdown table."""
    columns = ("drift", "reconstruction", "loss", "seconds")
    lines = ["| | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for row in rows:
        lines.append(f"| {row['variant']} | " + " | ".join(f"{row[column]:.4g}" for column in columns) + " |")
    return "\n".join(lines)
