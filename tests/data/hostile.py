"""Run as a process of its own: references from folders that were damaged by seed, one after another.

Usage: hostile.py FOLDER KIND FIRST LAST. For each seed a line is printed: the seed, and `read`, `refused` or what is
wrong: an exception that is no sentence about the file, or something done that no reading of pictures does.
"""

from __future__ import annotations

import io
import os
import random
import struct
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from PIL import Image

from anchor_core.checks import shown
from anchor_core.concept import Concept
from anchor_core.data.captions import prompt_pairs
from anchor_core.data.pictures import bucket_sizes, load_references
from anchor_core.data.reading import formats

CONCEPT = Concept("a photo of a sks dog", "a photo of a dog")
EDGES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
TEXTS = (
    "a photo of a sks dog", "sks dog, ", "sks dog" * 40, ", " * 500, "((" * 50, "sks dog:1.2)", "\\(", "\\0", "\0\1\2",
    "\x1b]0;title\x07", "\u202e", "\u200d", "{}", "%s%n", "a\u0301" * 99, "\ud7ff", "🐕" * 30, "٣", "\n\r\t",
    "<lora:x:1>", "embedding:sks", "$(id)", "ß" * 20, "tag, " * 3000, "(sks dog" * 20, " " * 5000,
)  # fmt: skip


def encoded(name: str, mode: str = "RGB", size: tuple[int, int] = (24, 20), **options) -> bytes:
    stream = io.BytesIO()
    noise = random.Random(0).randbytes(3 * size[0] * size[1])
    picture = Image.frombytes("RGB", size, noise).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(size))
    if mode == "I;16":
        picture = Image.frombytes("I;16", size, random.Random(1).randbytes(2 * size[0] * size[1]))
    else:
        picture = picture.convert(mode)
    picture.save(stream, name, **options)
    return stream.getvalue()


def told_of_the_camera() -> Image.Exif:
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010F: "maker", 0x8298: "rights", 0x011A: 72.0, 0x0100: 24, 0x0132: "2026:01:01 00:00:00"})
    exif.get_ifd(0x8769).update({0x9286: b"ASCII\0\0\0comment", 0x927C: b"maker's note", 0x829A: 0.01, 0xA002: 24})
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0), 29: "2026:01:01"})
    return exif


@cache
def whole() -> list[bytes]:
    """Pictures to damage, of formats that are read, and of some that are not."""
    exif = told_of_the_camera()
    found = [encoded("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")]
    found += [encoded("JPEG", mode, exif=exif) for mode in ("RGB", "L", "CMYK")]
    found += [encoded("PNG", exif=exif), encoded("JPEG", progressive=True), encoded("BMP"), encoded("GIF")]
    found += [encoded("TIFF", exif=exif), encoded("TIFF", "RGBA", compression="tiff_lzw")]
    found += [encoded("TIFF", compression="jpeg"), encoded("TIFF", "1", compression="group4")]
    found += [encoded("WEBP", "RGBA", lossless=True), encoded("WEBP", exif=exif)]
    found += [encoded("AVIF", "RGBA")] if "AVIF" in formats() else []
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    for name in ("GIF", "PNG", "WEBP"):
        stream = io.BytesIO()
        frames[0].save(stream, name, save_all=True, append_images=frames[1:])
        found.append(stream.getvalue())
    return found + [encoded("PPM"), encoded("TGA"), encoded("EPS"), encoded("PDF"), encoded("ICO"), b"", b"\0" * 99]


def damaged(data: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, set to an edge, cut, repeated, put in or taken out."""
    buffer = bytearray(data)
    for _ in range(draw.choice((0, 1, 1, 2, 4, 16))):
        # Headers are where sizes and offsets are.
        place = draw.randrange(min(len(buffer), draw.choice((64, 200, 1 << 20))) or 1)
        kind = draw.randrange(7)
        if kind == 0:
            buffer[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            layout, order = draw.choice("BHI"), draw.choice("<>")
            edge = draw.choice(EDGES) & (256 ** struct.calcsize(order + layout) - 1)
            packed = struct.pack(order + layout, edge)
            buffer[place : place + len(packed)] = packed
        elif kind == 2:
            del buffer[place:]
        elif kind == 3:
            part = buffer[place : place + draw.randrange(1, 200)]
            buffer[place:place] = part * draw.choice((1, 2, 50))
        elif kind == 4:
            buffer[place:place] = draw.randbytes(draw.randrange(1, 40))
        elif kind == 5:
            del buffer[place : place + draw.randrange(1, 20)]
        else:
            other = draw.randrange(len(buffer) or 1)
            buffer[place : place + 8] = buffer[other : other + 8]
    return bytes(buffer)


def text(draw: random.Random) -> bytes:
    told = "".join(draw.choice(TEXTS) for _ in range(draw.choice((1, 2, 5, 30))))
    data = told.encode(draw.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32")), errors="surrogatepass")
    return damaged(data, draw) if draw.random() < 0.4 else data


def file_name(draw: random.Random) -> bytes:
    parts = [
        b"1",
        b"10",
        b"a",
        "٣".encode(),
        "²".encode(),
        b"\x1b[2J",
        b"\n",
        b"\xff",
        b"-masklabel",
        b"..",
        b" ",
        b"'",
    ]
    stem = b"".join(draw.choice(parts) for _ in range(draw.randrange(1, 6)))
    return (stem * draw.choice((1, 1, 1, 20)))[:200] + draw.choice([b".png", b".PNG", b".jpg", b".tif", b".txt", b""])


def make(folder: Path, kind: str, draw: random.Random) -> None:
    """A folder of one kind of damage."""
    sample = draw.choice(whole())
    suffix = draw.choice((".png", ".png", ".jpg", ".webp", ".tif", ".gif", ".bmp", ".avif"))
    if kind == "pictures":
        (folder / f"1{suffix}").write_bytes(damaged(sample, draw))
    elif kind == "exif":
        exif = b"Exif\0\0" + damaged(damaged(told_of_the_camera().tobytes()[6:], draw), draw)
        name, suffix = draw.choice((("JPEG", ".jpg"), ("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp")))
        (folder / f"1{suffix}").write_bytes(encoded(name, exif=exif))
    elif kind == "masks":
        (folder / "1.png").write_bytes(encoded("PNG", draw.choice(("RGB", "RGBA"))))
        (folder / f"1-masklabel{suffix}").write_bytes(damaged(sample, draw))
    elif kind == "captions":
        (folder / "1.png").write_bytes(encoded("PNG"))
        (folder / "1.txt").write_bytes(text(draw))
    else:
        for _ in range(draw.randrange(1, 5)):
            path = os.path.join(os.fsencode(folder), file_name(draw))
            if draw.random() < 0.3:
                target = draw.choice([b"../../secret.png", b"1.png", os.path.basename(path), b"/dev/zero", b"/etc"])
                if not os.path.lexists(path):
                    os.symlink(target, path)
            elif not os.path.isdir(path) and not os.path.islink(path):
                with open(path, "wb") as file:
                    file.write(encoded("PNG"))


def read(folder: Path, kind: str, draw: random.Random) -> str:
    """`read` or `refused`; AssertionError for a refusal that is no sentence about a file or the folder."""
    files = [file.name for file in folder.iterdir()]
    try:
        references = load_references(
            folder, draw.choice((16, bucket_sizes(64, 16))), masks=kind == "masks", captions=kind == "captions"
        )
        told = prompt_pairs(CONCEPT, references.names, references.captions, shuffle=True)
        assert len(told) == len(references)
        said = [*references.names, *references.left_out]
        assert all(name.isprintable() for name in said), "a name is not printable"
        return "read"
    except ValueError as error:
        sentence = str(error)
    assert sentence.isprintable() and len(sentence) < 2000, f"no sentence: {sentence[:200]!r}"
    assert any(shown(name) in sentence for name in [*files, folder.name]), f"names no file: {sentence!r}"
    return "refused"


def watch(allowed: Path | None = None) -> Callable[[], list[str]]:
    """Whatever this process writes outside of `allowed`, starts or connects to from now on."""
    done: list[str] = []
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    refused = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.system")
    others = ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork", "socket.connect", "shutil.rmtree")

    def hook(event: str, arguments: tuple) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & writing
        inside = allowed is not None and event not in others and str(arguments[0]).startswith(str(allowed))
        if on and not inside and (opened or event in refused or event in others):
            done.append(f"{event} {arguments[0]!r}")

    def take() -> list[str]:
        on.clear()
        return done

    on = [True]
    sys.addaudithook(hook)
    return take


def main(base: Path, kind: str, first: int, last: int) -> None:
    make_warm = base / "warm"
    make_warm.mkdir()
    (make_warm / "1.png").write_bytes(encoded("PNG"))
    load_references(make_warm, 16)  # imports
    whole()
    (base / "secret.png").write_bytes(encoded("PNG"))
    for seed in range(first, last):
        draw = random.Random(f"{kind} {seed}")
        folder = base / kind / f"case {seed}"
        folder.mkdir(parents=True)
        make(folder, kind, draw)
        done = watch()
        try:
            outcome = read(folder, kind, draw)
        except Exception as error:  # what is wrong is what this is asked for
            outcome = f"{type(error).__name__}: {error}"
        did = done()
        print(seed, " ".join((f"did {did[0]}" if did else outcome).split()), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
