"""The folders of a comparison: subjects, the pictures that systems made of them, and the prompt of each picture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import shown
from ..data.captions import read_caption
from ..data.folder import contents, is_inside, picture_files, read_text

MAX_BYTES = 2**22
"""Of a file of prompts, and of a report."""
REFERENCES, PROMPT_FILES = "references", ("prompts_and_classes.txt", "prompts.txt")
"""Of a folder that holds a whole comparison."""
_LIVE = ("cat", "dog")
_NUMBERED = re.compile(r"(\d+)[_-]\d+")
_SUBJECT_ROW = re.compile(r"^(\w+),([\w ]+)$", re.MULTILINE)
_QUOTED = re.compile(r"'(.*)'\.format")


@dataclass(frozen=True)
class SubjectFiles:
    """What there is of one subject.

    Args:
        folder: that of the references.
        references: their files.
        made: system -> files of its pictures, and their class-only prompts (empty where none are told).
    """

    folder: Path
    references: list[Path]
    made: dict[str, tuple[list[Path], list[str]]]


def gather(
    references: str | Path,
    systems: Mapping[str, str],
    prompts: str | Path | None,
    token: str,
    left_out: list[str] | None = None,
) -> dict[str, SubjectFiles]:
    """Subject -> its files, for the subjects that the systems made pictures of; without systems, for all.

    Args:
        references: a folder of one subject's pictures, or of a folder for each subject.
        systems: name -> folder, laid out in the same way.
        prompts: a file as `read_prompts` takes; None for the prompts that the folders hold.
        token: the subject's word, which is taken out of prompts.
        left_out: is told of subjects without references, pictures without a prompt, and prompts without a picture.

    Raises:
        ValueError: for folders without pictures, systems that lack a subject, and prompts that do not fit.
    """
    left_out = [] if left_out is None else left_out
    folders = _subject_folders(Path(references), "references")
    found = {name: _subject_folders(Path(path), f"pictures of {name}:") for name, path in systems.items()}
    if len(folders) == 1:  # folders of one subject may have any name
        (subject,) = folders
        found = {name: {subject: next(iter(own.values()))} if len(own) == 1 else own for name, own in found.items()}
    for name, own in found.items():
        for subject in [each for each in own if each not in folders]:
            left_out.append(f"{shown(subject)} of {name}: it has no references")
            del own[subject]
        if not own:
            raise ValueError(f"pictures of {name} have no subject of the references, which are {', '.join(folders)}")
    first, wanted = next(iter(found.items()), ("", folders))
    for name, own in found.items():
        if own.keys() != wanted.keys():
            odd = min(own.keys() ^ wanted.keys())
            raise ValueError(f"pictures of {first} and of {name} must be of the same subjects; {odd!r} is in one alone")
    told = read_prompts(prompts) if prompts is not None else lambda subject: _listed_prompts(folders[subject])
    gathered = {}
    for subject in wanted:
        listed, made = told(subject), {}
        for name, own in found.items():
            files, texts = _pictures_and_prompts(own[subject], listed, name, left_out)
            made[name] = files, [class_only(text, token) for text in texts]
        gathered[subject] = SubjectFiles(folders[subject], picture_files(folders[subject]), made)
    return gathered


def gather_tree(folder: Path, token: str, left_out: list[str]) -> tuple[dict[str, SubjectFiles], Mapping[str, str]]:
    """As `gather`, of one folder: `references`, and a folder for each system, laid out in the same way.

    Its `prompts_and_classes.txt` or `prompts.txt` is read as `read_prompts` does.

    Returns:
        The files by subject, and subject -> class word where DreamBench's file tells it.

    Raises:
        ValueError: as `gather`, and for a folder without `references`.
    """
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    parts = {path.name: path for path in inside if not path.name.startswith(".") and is_inside(folder, path)}
    references = parts.pop(REFERENCES, None)
    if references is None:
        raise ValueError(
            f"folder is {shown(folder.name)!r}, which has no folder {REFERENCES!r}; put the real pictures there"
        )
    prompts = next((file for name in PROMPT_FILES if (file := folder / name).is_file()), None)
    subjects = gather(references, {name: str(path) for name, path in parts.items()}, prompts, token, left_out)
    return subjects, {} if prompts is None else read_prompt_file(prompts).classes


def _subject_folders(folder: Path, option: str) -> dict[str, Path]:
    """Name -> folder of each subject: the folder itself if it holds pictures, else every folder in it that does.

    Raises:
        ValueError: naming `option`, if no picture is found.
    """
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    inside = [path for path in inside if not path.name.startswith(".") and is_inside(folder, path)]
    if _holds_pictures(folder) or not any(map(_holds_pictures, inside)):
        picture_files(folder, option)
        return {folder.resolve().name: folder}
    return {path.name: path for path in inside if _holds_pictures(path)}


def _holds_pictures(folder: Path) -> bool:
    return folder.is_dir() and bool(contents(folder).pictures)


def class_only(prompt: str, token: str) -> str:
    """A prompt without the subject's token, which CLIP does not know: "a sks dog in the snow" without "sks"."""
    without = re.sub(rf"(?<!\w){re.escape(token)}(?!\w)", "", prompt) if token else prompt
    return " ".join(without.split())


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file: DreamBench's `prompts_and_classes.txt`, or a prompt a line, for every subject.

    Attributes:
        classes: subject -> its class word; none in a file with a prompt a line.
        live, objects: prompts with {0} for the subject's word and {1} for the class word; of one list, both the same.
    """

    classes: Mapping[str, str]
    live: Sequence[str]
    objects: Sequence[str]

    def templates(self, class_word: str) -> Sequence[str]:
        """Those of a class, which take `format(word, class_word)`."""
        return self.live if class_word in _LIVE else self.objects

    def class_of(self, subject: str) -> str:
        """ValueError for a subject that the file lacks."""
        if subject not in self.classes:
            raise ValueError(
                f"prompts has no subject {subject!r}, but {', '.join(self.classes)}; name the folder as there"
            )
        return self.classes[subject]


def read_prompt_file(file: str | Path) -> PromptFile:
    """ValueError if it cannot be read or holds no prompt."""
    try:
        text = read_text(Path(file), MAX_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts is {shown(file)!r}, which cannot be read ({error}); give a text file") from error
    if "prompt_list" not in text:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"prompts is {str(file)!r}, which is empty, but it takes a prompt a line")
        return PromptFile({}, lines, lines)
    objects, _, live = text.partition("Live Subject Prompts")
    classes = {name: class_ for name, class_ in _SUBJECT_ROW.findall(objects) if name != "subject_name"}
    return PromptFile(classes, _QUOTED.findall(live), _QUOTED.findall(objects))


def read_prompts(file: str | Path) -> Callable[[str], list[str]]:
    """A `PromptFile` as a function from a subject's name to its class-only prompts.

    Raises:
        ValueError: if it cannot be read or holds no prompt; by the function, for a subject that DreamBench lacks.
    """
    told = read_prompt_file(file)

    def of(subject: str) -> list[str]:
        if not told.classes:
            return list(told.objects)
        class_ = told.class_of(subject)
        return [class_only(prompt.format("", class_), "") for prompt in told.templates(class_)]

    return of


def _listed_prompts(folder: Path) -> list[str] | None:
    """The prompts in the `report.json` of a references' folder, as `semantic-anchor sandbox subject` writes it."""
    found = _read_report(folder).get("prompts")
    return found if isinstance(found, list) and all(isinstance(prompt, str) for prompt in found) else None


def _pictures_and_prompts(
    folder: Path, prompts: Sequence[str] | None, system: str, left_out: list[str]
) -> tuple[list[Path], list[str]]:
    """The pictures of a folder, each with its prompt; without any, the prompts are empty.

    A picture's prompt is, by the first that is there: what `report.json` says, whose `pictures` are {"file",
    "prompt"} as `semantic-anchor sample` writes it; `name.txt` beside each picture; the prompt of its number, for
    pictures `<prompt>_<number>.png`, prompts counted from 0; and the prompts in their order, for pictures in natural
    order of which each prompt has the same number.

    Raises:
        ValueError: naming the system, if no picture has a prompt while some are told, or the order does not fit.
    """
    files = picture_files(folder, f"pictures of {system}:")
    numbers = [_NUMBERED.fullmatch(file.stem) for file in files]
    entries = _read_report(folder).get("pictures")
    told: dict[Path, str] = {}
    if isinstance(entries, list) and entries:
        listed = (entry for entry in entries if isinstance(entry, dict) and {"file", "prompt"} <= entry.keys())
        by_name = {str(entry["file"]): str(entry["prompt"]) for entry in listed}
        told = {file: by_name[file.name] for file in files if file.name in by_name}
        gone = sorted(by_name.keys() - {file.name for file in files})
        left_out += [f"{shown(name)} of {system}: report.json tells of it, but it is not there" for name in gone]
    elif any(file.with_suffix(".txt").is_file() for file in files):
        for file in files:
            try:
                told |= {file: read_caption(file)} if file.with_suffix(".txt").is_file() else {}
            except ValueError as error:
                left_out.append(f"{shown(file)} of {system}: {error}")
    elif prompts is None:
        return files, []
    elif all(numbers):
        which = {file: int(number[1]) for file, number in zip(files, numbers)}
        told = {file: prompts[number] for file, number in which.items() if number < len(prompts)}
        bare = sorted(set(range(len(prompts))) - set(which.values()))
        left_out += [f"prompt {number} of {system}: it has no picture in {shown(folder)}" for number in bare]
    else:
        return files, in_order(prompts, len(files), f"pictures of {system}: {folder}")
    named = {line.partition(" of ")[0] for line in left_out}
    bare = [shown(file) for file in files if file not in told]
    left_out += [f"{name} of {system}: it has no prompt" for name in bare if name not in named]
    if not told:
        raise ValueError(f"pictures of {system}: none of {shown(folder)} has a prompt; give each its own")
    return list(told), list(told.values())


def in_order(prompts: Sequence[str], count: int, what: str) -> list[str]:
    """One prompt a picture of `count`, where each prompt has the same number of pictures, one after another.

    Raises:
        ValueError: naming `what`, if `count` is no multiple of the number of prompts.
    """
    if not prompts or count % len(prompts):
        raise ValueError(f"{what} has {count} pictures, but it takes as many for each of {len(prompts)} prompts")
    return [prompt for prompt in prompts for _ in range(count // len(prompts))]


def _read_report(folder: Path) -> dict[str, Any]:
    file = folder / "report.json"
    try:
        found = json.loads(read_text(file, MAX_BYTES)) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{shown(file)} cannot be read ({error}); repair it or take it away") from error
    return found if isinstance(found, dict) else {}


def adapter_file(path: str | Path, subject: str, alone: bool, system: str) -> Path:
    """The adapter of a subject: the file itself if the subject is `alone`, else of a folder, by the subject's name.

    Raises:
        ValueError: naming the system, if there is none.
    """
    path = Path(path)
    places = [path] if alone and path.is_file() else [path / f"{subject}.safetensors"]
    places.append(path / subject / "adapter.safetensors")
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(f"adapters of {system}: there is no {' and no '.join(map(str, places))}; give that file")
    return found
