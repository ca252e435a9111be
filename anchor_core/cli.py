"""The command line: `semantic-anchor train | sample | inspect | checkup | compare | convert | bench | demo | ...`.

Bad input is one line on stderr and exit status 2, before anything is written.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields
from typing import Any

from . import commands
from .adapters.config import AdapterConfig
from .adapters.formats import FORMATS
from .checks import check_count
from .embeddings import ALIGNMENTS, NORM_MIX, Adjustment
from .evaluation.settings import CheckupSettings
from .guidance import RULE_OPTIONS, RULES
from .training.methods import METHODS, method_options
from .training.presets import AUTO, NONE, PRESETS
from .training.settings import PRECISIONS, DataSettings, TrainSettings
from .training.trainer import TrainingDiverged


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; gives the exit status."""
    parser, arguments = _build_parser(), sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["train"]:
        try:
            arguments = commands.with_report(arguments)
        except ValueError as error:
            print(f"semantic-anchor train: error: {error}", file=sys.stderr)
            return 2
    options = parser.parse_args(arguments)
    if options.verb == "train":
        chosen = method_options(options.method) if options.method else {}
        parser = _build_parser(chosen)  # a method's options are defaults, under those that were given
        options = parser.parse_args(arguments)
        options.given = {*chosen, *_given(arguments)}
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and on a CPU it has something to say
    try:
        check_count("seed", options.seed, minimum=0)
        return options.run(options) or 0
    except (ValueError, TrainingDiverged) as error:
        print(f"semantic-anchor {options.verb}: error: {_with_option(str(error), parser)}", file=sys.stderr)
        return 2
    except OSError as error:  # a disk that is full or read-only now, a folder in the place of a file
        if error.filename is None:
            raise
        place, why = error.filename2 or error.filename, error.strerror
        reason = f"{place} cannot be read or written ({why}); make room there, or give another place"
        print(f"semantic-anchor {options.verb}: error: {reason}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or "the machine's"
        advice = "take a smaller batch_size or resolution, or --gradient_checkpointing"
        print(f"semantic-anchor {options.verb}: error: out of memory ({reason}); {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"semantic-anchor {options.verb}: cancelled", file=sys.stderr)
        return 130


def _given(arguments: list[str] | None) -> Iterator[str]:
    """The options of `train` that the arguments name."""
    unset = object()
    names = [field.name for part in (TrainSettings, AdapterConfig, DataSettings) for field in fields(part)]
    options = _build_parser(dict.fromkeys(names, unset)).parse_args(arguments)
    return (name for name, value in vars(options).items() if value is not unset)


def _is_out_of_memory(error: Exception) -> bool:
    """torch has a type for a card's alone."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in ("out of memory", "allocate memory"))


def _with_option(message: str, parser: argparse.ArgumentParser) -> str:
    """The message with the option in front whose value it is about: a check names the argument first."""
    first = message.split(" ", 1)[0]
    aliases = {"subject_prompt": "subject", "class_prompt": "class", "picture": "references", "checkpoint": "out"}
    name = aliases.get(first, first)
    known = {field.name for part in (TrainSettings, DataSettings, AdapterConfig) for field in fields(part)}
    known |= {"prompt", "strength", "rule", *RULE_OPTIONS}
    known |= {"model", "references", "subject", "class", "seed", "steps", "guidance", "count", "out", "adapter"}
    known |= {"lambda", "class_word", "class_pictures", "embedding", "method", "preset", "sweep"}
    known |= {"pictures", "prompts", "clip", "dino", "encoder_batch", "adapters", "jobs", "subjects", "seeds", "rows"}
    known |= {"ray", "comfyui", "methods", "noises", "timesteps", "budget"}
    return f"--{name}: {message}" if name in known and not message.startswith("--") else " ".join(message.split())


def _build_parser(defaults: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    """The parser, with other defaults of `train`."""
    parser = _Parser(prog="semantic-anchor", description="Teach an image model a subject without losing what it knew.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    train = _verb(verbs, "train", "train an adapter on reference pictures", commands.train)
    _add_model(train)
    train.add_argument("--references", required=True, metavar="DIR", help="folder of 1 or more pictures of the subject")
    train.add_argument("--subject", required=True, metavar="PROMPT", help='such as "a photo of a sks dog"')
    train.add_argument(
        "--class", required=True, dest="class_prompt", metavar="PROMPT", help='such as "a photo of a dog"'
    )
    train.add_argument(
        "--method", choices=METHODS, help="take the options of this method for SD1.5, but for those given besides"
    )
    train.add_argument(
        "--preset", choices=(AUTO, NONE, *PRESETS), default=AUTO,
        help="options by the model's family, but for those given besides (default auto: what the model is)",
    )  # fmt: skip
    for part, title in ((TrainSettings, "training"), (AdapterConfig, "adapter"), (DataSettings, "data")):
        group = train.add_argument_group(title)
        for field in fields(part):
            if field.name == "w":
                weight = group.add_mutually_exclusive_group()
                _add_field(weight, field)
                weight.add_argument(
                    "--lambda", dest="lambda_", type=float, metavar="LAMBDA", help="in place of w: 1 / (1 + w)"
                )
            elif "help" in field.metadata and field.name not in ("seed", "preset"):
                _add_field(group, field)
    train.add_argument(
        "--class_pictures", "--class-pictures", type=int, default=24, help="of prior_preservation and sude"
    )
    train.add_argument(
        "--from_report", "--from-report", metavar="FILE",
        help="train once more what a report.json tells of, but for the options given besides: to the same bits",
    )  # fmt: skip
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in OUT")
    train.add_argument(
        "--cache", metavar="DIR", help="keep latents, encoded prompts and anchors here for further trainings"
    )
    train.add_argument(
        "--sweep", metavar="NAME=V,V", help="one training for each value, such as w=0,.25,.5 or rank=4,8"
    )
    train.set_defaults(**(defaults or {}))

    sample = _verb(verbs, "sample", "make pictures, with or without an adapter", commands.sample)
    _add_model(sample)
    sample.add_argument("--adapter", metavar="FILE", help="a LoRA or embedding file; without it the model as it is")
    _add_embedding(sample)
    sample.add_argument("--strength", type=float, default=1.0, help="of the adapter (default 1)")
    sample.add_argument("--prompt", required=True, action="append", help="once or more")
    sample.add_argument("--count", type=int, default=1, help="pictures of each prompt (default 1)")
    sample.add_argument("--steps", type=int, default=25, help="sampling steps (default 25)")
    sample.add_argument("--guidance", type=float, help="guidance scale (default: the adapter's, else 5)")
    sample.add_argument(
        "--class", dest="class_prompt", metavar="PROMPT", action="append",
        help="for rules and adjustments that read it: one for each --prompt (default: by the adapter's own prompts)",
    )  # fmt: skip
    rules = sample.add_argument_group("guidance rule", "Without --rule, classifier-free guidance.")
    rules.add_argument("--rule", choices=RULES, help="what guidance leads away from and towards")
    rules.add_argument("--early", metavar="FILE", help="for autoguidance: an earlier adapter or checkpoint of the run")
    for name, owners in RULE_OPTIONS.items():
        if name != "early":
            _add_rule_option(rules, owners)
    adjusting = sample.add_argument_group("embedding adjustment (TEA) of the prompts' encodings")
    adjusting.add_argument(
        "--adjust", choices=ALIGNMENTS, help="to the class prompt's, by position (as published) or by token"
    )
    _add_adjustment(adjusting, "adjust_", "norm_mix")
    adjusting.add_argument(
        "--adjust_anchor", "--adjust-anchor", choices=("current", "pretrained"),
        help="the text encoder of the class prompt (default current)",
    )  # fmt: skip
    adjusting.add_argument(
        "--adjust_pooled", "--adjust-pooled", action="store_true", default=None, help="the pooled output too"
    )

    inspect = _verb(verbs, "inspect", "measure the drift of a LoRA from its class", commands.inspect)
    _add_model(inspect)
    inspect.add_argument("--adapter", required=True, metavar="FILE")
    _add_embedding(inspect)
    inspect.add_argument("--references", required=True, metavar="DIR", help="pictures to make the probe's latents from")
    inspect.add_argument(
        "--class_pictures", "--class-pictures", type=int, default=0, metavar="COUNT",
        help="how many the model makes for the readings of Fig. 2 that take class samples (default 0)",
    )  # fmt: skip
    inspect.add_argument(
        "--prompts", metavar="FILE", help="a prompt a line, for the distances of semantic collapse; or shipped: 200 "
        "sentences and 200 simple prompts of the package"
    )  # fmt: skip
    _add_prompts(inspect)

    checkup = _verb(verbs, "checkup", "what a LoRA does to the class, and how much of it is good", commands.checkup)
    checkup.add_argument("adapter", metavar="LORA", help="a LoRA file of any program")
    _add_model(checkup)
    _add_embedding(checkup)
    checkup.add_argument(
        "--references", metavar="DIR", help="pictures to measure on (default: class pictures that the model makes)"
    )
    _add_prompts(checkup)
    for field in fields(CheckupSettings):
        if field.name != "seed":
            _add_field(checkup, field)

    compare = _verb(verbs, "compare", "rank pictures of any systems by CLIP-I, CLIP-T and DINO", commands.compare)
    compare.add_argument("--references", required=True, metavar="DIR", help="of one subject, or a folder for each")
    compare.add_argument(
        "--pictures", nargs="+", default=[], metavar="NAME=DIR", help="laid out as the references; without any, the "
        "references are compared with one another, which tells whether the encoders are the papers'"
    )  # fmt: skip
    compare.add_argument("--prompts", metavar="FILE", help="a prompt a line, or DreamBench's prompts_and_classes.txt")
    compare.add_argument("--token", default="sks", help="the subject's word, which CLIP-T leaves out (default sks)")
    compare.add_argument(
        "--class_word", "--class-word", metavar="WORD", help="split CLIP-T into subject and context by this word "
        "(default: DreamBench's classes, where --prompts tells them)"
    )  # fmt: skip
    compare.add_argument("--clip", metavar="DIR", help="a CLIPModel, such as openai/clip-vit-base-patch32")
    compare.add_argument("--dino", metavar="DIR", help="a DINO, such as facebook/dino-vits16")
    compare.add_argument(
        "--encoder_dtype",
        "--encoder-dtype",
        default="fp32",
        choices=PRECISIONS[1:],
        help="of CLIP and DINO (default fp32)",
    )
    compare.add_argument(
        "--encoder_batch", "--encoder-batch", type=int, default=32, help="pictures in a pass (default 32)"
    )
    compare.add_argument("--judge", choices=("sandbox",), help="instead: the sandbox's judge, for its own pictures")
    compare.add_argument(
        "--adapters", nargs="+", default=[], metavar="NAME=FILE", help="for the drift; of several subjects a folder of "
        "<subject>.safetensors or <subject>/adapter.safetensors; takes --model"
    )  # fmt: skip
    _add_prompts(compare)
    _add_model(compare, required=False)

    sweep = _verb(verbs, "sweep", "one prompt at several strengths, or by several adapters, as a grid", commands.sweep)
    _add_model(sweep)
    sweep.add_argument("--adapter", required=True, nargs="+", metavar="FILE", help="one, or several at one strength")
    sweep.add_argument("--strength", default="1", metavar="LIST", help='such as "0, 0.5, 1" (default 1)')
    sweep.add_argument("--by", choices=("strength", "w", "steps", "file"), help="what the columns are called by")
    sweep.add_argument("--prompt", help="default: the one that the adapters were trained on")
    sweep.add_argument("--count", type=int, default=2, help="pictures of each value (default 2)")
    sweep.add_argument("--steps", type=int, default=25, help="sampling steps (default 25)")
    sweep.add_argument("--guidance", type=float, help="guidance scale (default: the adapter's, else 5)")
    sweep.add_argument("--references", metavar="DIR", help="real pictures, for scores; takes --judge, --clip or --dino")
    sweep.add_argument("--token", default="sks", help="the subject's word, which CLIP-T leaves out (default sks)")
    sweep.add_argument("--clip", metavar="DIR", help="a CLIPModel, such as openai/clip-vit-base-patch32")
    sweep.add_argument("--dino", metavar="DIR", help="a DINO, such as facebook/dino-vits16")
    sweep.add_argument("--judge", choices=("sandbox",), help="instead: the sandbox's judge, for its own pictures")

    adjust = _verb(verbs, "adjust", "turn a textual-inversion file towards its class word (TEA)", commands.adjust)
    adjust.add_argument("file", metavar="FILE")
    _add_model(adjust)
    adjust.add_argument(
        "--class-word", "--class_word", required=True, metavar="WORD", help="one token, such as dog: the anchor"
    )
    _add_adjustment(adjust)

    convert = _verb(verbs, "convert", "rewrite a LoRA file for another program", commands.convert)
    convert.add_argument("file", metavar="FILE")
    convert.add_argument("--to", required=True, choices=FORMATS, help="whose names of layers the new file has")

    demo = _verb(
        verbs,
        "demo",
        "one subject, three ways: DreamBooth, prior preservation, anchored",
        commands.demo,
        out="out/demo",
    )
    demo.add_argument("--subject", default="pip", help="one of `semantic-anchor sandbox subjects` (default pip)")
    demo.add_argument("--steps", type=int, help="training steps of each method")

    bench = verbs.add_parser("bench", help="run a benchmark, report what one has found, or measure speed")
    actions = bench.add_subparsers(dest="action", required=True, metavar="{run,report,speed}", parser_class=_Parser)
    run = _verb(actions, "run", "make the cells of a benchmark that are missing, then report", commands.bench_run)
    run.add_argument(
        "config", metavar="CONFIG", help="a TOML or JSON file, or the name of a shipped one (docs/BENCH.md)"
    )
    run.add_argument("--model", help="in place of the config's")
    run.add_argument("--references", metavar="DIR", help="of DreamBench's layout, in place of the config's")
    run.add_argument("--prompts", metavar="FILE", help="such as prompts_and_classes.txt, in place of the config's")
    run.add_argument("--clip", metavar="DIR", help="a CLIPModel, in place of the config's")
    run.add_argument("--dino", metavar="DIR", help="a DINO, in place of the config's")
    for name, kind in (("subjects", str), ("seeds", int), ("rows", str)):
        run.add_argument(f"--{name}", nargs="+", type=kind, default=[], help="of the config's, these alone")
    run.add_argument("--jobs", type=int, help="processes at a time (default: one a GPU, or without one a core)")
    run.add_argument("--devices", nargs="+", default=[], help="such as cuda:0 cuda:1 (default: every GPU, or the cpu)")
    run.add_argument(
        "--ray", metavar="ADDRESS", help="on this Ray cluster, which sees OUT; auto, or local to start one"
    )
    told = _verb(
        actions, "report", "tables, claims and plots from a benchmark's stored cells", commands.bench_report, None
    )
    told.add_argument("folder", metavar="DIR", help="the --out of `bench run`")
    text = "time and memory of a step against a plain one, ComfyUI's trainer and diffusers' loop"
    commands.add_speed_options(_verb(actions, "speed", text, commands.speed, "out/speed"))

    test = _verb(verbs, "selftest", "whether training is right on this machine's card", commands.selftest, out=None)
    test.add_argument("--comfyui", required=True, metavar="DIR", help="the ComfyUI to start")
    test.add_argument("--python", metavar="FILE", help="its interpreter (default: its .venv)")
    test.add_argument("--model", metavar="FILE", help="checkpoint or diffusion model (default: SD1.5, random weights)")
    test.add_argument("--resolution", type=int, default=512, help="of the pictures (default 512)")
    test.add_argument("--batch_size", "--batch-size", type=int, default=1, help="pictures in a step (default 1)")
    test.add_argument("--steps", type=int, default=5, help="steps that are timed, after a first one (default 5)")
    test.add_argument("--device", default="cuda", choices=("cpu", "cuda"), help="where ComfyUI runs (default cuda)")

    sandbox = verbs.add_parser("sandbox", help="the embedded model: pretrain it, list and draw its subjects")
    actions = sandbox.add_subparsers(
        dest="action", required=True, metavar="{pretrain,subjects,subject}", parser_class=_Parser
    )
    pretrain = _verb(actions, "pretrain", "make the embedded model again, from nothing", commands.pretrain)
    pretrain.set_defaults(out="out/sandbox")
    pretrain.add_argument("--work", metavar="DIR", help="where the run keeps its state (default: OUT/work)")
    pretrain.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    pretrain.add_argument("--steps", type=int, help="steps of the denoiser")
    _verb(actions, "subjects", "list the held-out subjects", commands.subjects, out=None)
    subject = _verb(actions, "subject", "write a subject's reference pictures", commands.subject)
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


def _add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--model",
        required=required,
        help="a diffusers folder, a single-file checkpoint, or `sandbox` (the embedded model)",
    )
    parser.add_argument("--config", metavar="DIR", help="for a checkpoint: a diffusers folder with its tokenizers")
    parser.add_argument("--resolution", type=int, help="of the pictures (default: the model's own)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 and so on (default: cuda where there is one)")
    parser.add_argument("--dtype", default="fp32", choices=PRECISIONS[1:], help="of the model's weights (default fp32)")


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    for name, dest in (("--subject", "subject"), ("--class", "class_prompt")):
        parser.add_argument(name, dest=dest, metavar="PROMPT", help="of the adapter (default: its file's metadata)")


def _add_adjustment(parser, prefix: str = "", default: str = "beta") -> None:
    """The options of an `Adjustment`, None where they are not given; `default` is what gives the length."""
    length = parser.add_mutually_exclusive_group()
    for group, name, value, help in (
        (parser, "alpha", Adjustment.alpha, "rotation, 0 to 1"),
        (length, "beta", Adjustment.beta, "length over that of the class"),
        (length, "norm_mix", NORM_MIX, "share of the class's length in the new one, 0 to 1"),
    ):
        names = dict.fromkeys((f"--{prefix}{name}", f"--{prefix}{name}".replace("_", "-")))
        used = f" (default {value})" if name in ("alpha", default) else ""
        group.add_argument(*names, type=float, help=help + used)


def _add_embedding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--embedding",
        metavar="FILE",
        help="its token vectors (default: embedding.safetensors beside it, if it has some)",
    )


def _add_field(parser, field: Field, **changed: Any) -> None:
    """The option of a settings' field: its name, type, default and help, unless `changed`."""
    names = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
    help = f"{field.metadata.get('help', '')} (default {field.default})".strip().replace("%", "%%")
    if isinstance(field.default, bool):
        parser.add_argument(*names, default=field.default, action=argparse.BooleanOptionalAction, help=help)
        return
    kind = float if field.default is None else type(field.default)
    choices = field.metadata.get("choices")
    parser.add_argument(*names, **{"type": kind, "default": field.default, "choices": choices, "help": help} | changed)


def _add_rule_option(parser, owners: dict[str, Field]) -> None:
    """The option of some rules: unset by default, as each rule has its own default."""
    field = next(iter(owners.values()))
    defaults = {rule: each.default for rule, each in owners.items()}
    if len(defaults) == len(RULES):
        defaults = {"default": field.default}
    told = ", ".join(f"{name} {round(x, 3) if isinstance(x, float) else x}" for name, x in defaults.items())
    _add_field(parser, field, default=None, help=f"{field.metadata['help']} ({told})")


if __name__ == "__main__":
    sys.exit(main())
