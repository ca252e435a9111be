"""Faults in trainings of a tiny network, drawn by seed: whatever happens, no model is damaged and no step is lost.

After each fault the network is the same in every bit, the adapter's file is absent or whole and that of the step it
says, the error is one sentence (or the host's own), and the next training in the same place, from the checkpoints where
there are some, comes to what an undisturbed one comes to and leaves nothing half-written behind.
"""

from __future__ import annotations

import errno
import resource
import shutil
import subprocess
import threading
from contextlib import suppress

import pytest

from anchor_core.data.pictures import load_references
from anchor_core.training.events import Ended, Saved, StepMade
from anchor_core.training.orders import Orders
from tests.data.hostile import encoded
from tests.reliability.faults import OUT_OF_MEMORY, Disk, Sites
from tests.reliability.trainings import WAYS, NeverStruck, Tally, Workshop, check_sentence

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def shop(model_folders):
    return Workshop(model_folders["epsilon"])


@pytest.fixture(scope="module")
def calls(shop, tmp_path_factory):
    """How often memory is asked for at each site of each way."""
    found = {}
    for way in WAYS:
        with Sites(shop.denoiser).watched() as sites:
            shop.unbroken(way, tmp_path_factory.mktemp("unbroken"))
        found[way] = sites.calls
    return found


@pytest.fixture(scope="module")
def disk():
    return Disk()


def drawn(draw) -> tuple[str, dict]:
    return draw.choice(list(WAYS)), {"checkpoint_every": draw.choice((0, 1, 2)), "picture_every": draw.choice((0, 2))}


def test_memory_runs_out(shop, calls, tmp_path):
    def one(draw, folder) -> str:
        (way, options), cache = drawn(draw), draw.choice((None, folder / "cache"))
        site = draw.choice(sorted(calls[way]))
        error = OUT_OF_MEMORY[draw.choice(sorted(OUT_OF_MEMORY))]()
        out = folder / "out"
        with Sites(shop.denoiser, (site, draw.randint(1, calls[way][site]), error)).watched() as sites:
            try:
                shop.train(way, out, cache=cache, **options)
            except (MemoryError, RuntimeError) as caught:
                assert caught is error, f"became {caught!r} at {site}"
        if not sites.struck:
            raise NeverStruck
        shop.check_network()
        shop.check_told()
        kept = shop.check_files(way, out)
        assert kept == shop.made, f"{site}: {kept} of {shop.made} steps kept"
        assert not kept or any(str(out / "adapter.safetensors") in note for note in error.__notes__)
        shop.check_next(way, out, cache=cache, **options)
        return "kept the steps made" if kept else "before the first step"

    Tally("memory", 110).run(one, tmp_path)


def ends_in_a_sentence(shop, way, out, *named, **options) -> str:
    """`refused` for a training that ends in a ValueError that names one of the folders, else `finished`."""
    shop.events = []
    try:
        shop.train(way, out, **options)
        return "finished all the same"
    except ValueError as error:
        check_sentence(error, *map(str, named))
        return "refused in one sentence"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_a_disk_fails(shop, calls, disk, tmp_path, number):
    def one(draw, folder) -> str:
        way, options = drawn(draw)
        out, cache = folder / "out", folder / "cache"
        failing = draw.choice((folder, out, out / "checkpoints", cache))
        with disk.failing(failing, number, draw.randint(1, 14), lasting=draw.random() < 0.6):
            became = ends_in_a_sentence(shop, way, out, out, cache, cache=cache, **options)
        if not disk.struck:
            raise NeverStruck
        shop.check_network()
        kept = shop.check_files(way, out)
        if shop.events:
            shop.check_told()
            assert kept == shop.made or failing in (folder, out), f"{kept} of {shop.made} steps kept"
        shop.check_next(way, out, cache=cache, **options)
        return became

    Tally(f"disk, {errno.errorcode[number]}", 40).run(one, tmp_path)


def test_files_may_grow_no_further(shop, calls, tmp_path):
    """The kernel's own limit on the size of a file, from some moment of the training on: writes are cut short."""

    def one(draw, folder) -> str:
        way, options = drawn(draw)
        out, cache, told, moment = folder / "out", folder / "cache", [], draw.randrange(14)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = int(10 ** draw.uniform(0, 5.5))

        def listen(event) -> None:
            told.append(event)
            if len(told) == moment + 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

        try:
            became = ends_in_a_sentence(shop, way, out, out, cache, cache=cache, listen=listen, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if became.startswith("finished"):
            raise NeverStruck
        shop.check_network()
        shop.check_told()
        shop.check_files(way, out)
        shop.check_next(way, out, cache=cache, **options)
        return became

    Tally("files cut short", 24).run(one, tmp_path)


def test_a_real_disk_is_full_or_becomes_read_only(shop, calls, tmp_path):
    trial = tmp_path / "trial"
    trial.mkdir()
    if shutil.which("mount") is None or mount(trial, "size=64k").returncode:
        pytest.skip("mounting a small tmpfs takes root on Linux")
    subprocess.run(["umount", trial], check=True)

    def one(draw, folder) -> str:
        way, options = drawn(draw)
        folder.mkdir()
        mount(folder, "size=4m").check_returncode()
        out, cache, told, moment = folder / "out", folder / "cache", [], draw.randrange(14)
        full, free = draw.random() < 0.5, int(10 ** draw.uniform(3, 5.5))

        def listen(event) -> None:
            told.append(event)
            if len(told) == moment + 1 and full:
                (folder / "ballast").write_bytes(b"\0" * max(0, shutil.disk_usage(folder).free - free))
            elif len(told) == moment + 1:
                mount(folder, "remount,ro").check_returncode()

        try:
            became = ends_in_a_sentence(shop, way, out, out, cache, cache=cache, listen=listen, **options)
            if became.startswith("finished"):
                raise NeverStruck
            mount(folder, "remount,rw").check_returncode()
            (folder / "ballast").unlink(missing_ok=True)
            shop.check_network()
            shop.check_told()
            shop.check_files(way, out)
            shop.check_next(way, out, cache=cache, **options)
            return became
        finally:
            subprocess.run(["umount", folder], check=True)

    Tally("a real disk", 24).run(one, tmp_path)


def mount(folder, options: str) -> subprocess.CompletedProcess:
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)


def test_folders_vanish(shop, calls, tmp_path):
    """Somebody removes the folder of the results, the checkpoints or the cache while the training goes on."""

    def one(draw, folder) -> str:
        way, options = drawn(draw)
        out, cache, told, moment = folder / "out", folder / "cache", [], draw.randrange(14)
        gone = draw.choice((out, out / "checkpoints", cache))

        def listen(event) -> None:
            told.append(event)
            if len(told) == moment + 1 and gone.is_dir() and not isinstance(event, (Saved, Ended)):
                shutil.rmtree(gone)  # what was saved is the user's to remove
                told.append("gone")

        became = ends_in_a_sentence(shop, way, out, out, cache, cache=cache, listen=listen, **options)
        if "gone" not in told:
            raise NeverStruck
        shop.check_network()
        shop.check_told()
        assert shop.check_files(way, out) or not shop.made, "the steps made are lost"
        shop.check_next(way, out, cache=cache, **options)
        return became

    Tally("folders vanish", 16).run(one, tmp_path)


ORDERS = {
    "stop": ("stop",), "cancel": ("cancel",), "pause, then cancel": ("pause", "cancel"),
    "stop, then cancel": ("stop", "cancel"), "pause, then stop": ("pause", "stop"),
    "save, then cancel": ("save_now", "cancel"), "a picture, then stop": ("picture_now", "stop"),
}  # fmt: skip


def test_it_is_ended_at_any_moment(shop, calls, tmp_path):
    def one(draw, folder) -> str:
        way, options = drawn(draw)
        out, told, moment = folder / "out", [], draw.randrange(14)
        given, elsewhere, orders = draw.choice(sorted(ORDERS)), draw.random() < 0.5, Orders()

        def give() -> None:
            with suppress(ValueError):  # which a training that makes no more steps says
                for order in ORDERS[given]:
                    getattr(orders, order)()

        def listen(event) -> None:
            told.append(event)
            if len(told) == moment + 1:
                threading.Thread(target=give).start() if elsewhere else give()

        outcome = shop.train(way, out, listen=listen, orders=orders, **options)
        if outcome.how == "finished":
            raise NeverStruck
        shop.check_network()
        shop.check_told()
        assert shop.check_files(way, out) == outcome.history.kept
        assert bool(outcome.history.kept) == bool(shop.made)
        shop.check_next(way, out, **options)
        return outcome.how

    Tally("orders", 44).run(one, tmp_path)


def test_a_listener_fails_at_any_moment(shop, calls, tmp_path):
    """A progress bar on a closed terminal, Ctrl-C without a handler, a plain bug."""

    def one(draw, folder) -> str:
        way, options = drawn(draw)
        out, told, moment = folder / "out", [], draw.randrange(14)
        error = draw.choice((KeyboardInterrupt, BrokenPipeError, SystemExit, RuntimeError, AssertionError))("told")

        def listen(event) -> None:
            told.append(event)
            if len(told) == moment + 1:
                raise error

        try:
            shop.train(way, out, listen=listen, **options)
        except BaseException as caught:
            assert caught is error, f"became {caught!r}"
        if len(told) <= moment:
            raise NeverStruck
        shop.check_network()
        shop.check_told()
        kept = shop.check_files(way, out)
        assert bool(kept) == bool(shop.made) and (kept == shop.made or not isinstance(told[moment], StepMade))
        shop.check_next(way, out, **options)
        return "kept the steps made" if kept else "before the first step"

    Tally("listeners", 24).run(one, tmp_path)


def test_pictures_vanish(tmp_path, monkeypatch):
    """A file, or the whole folder, is gone between the listing and the reading."""
    from anchor_core.data import folder as listing
    from anchor_core.data import pictures, reading

    def one(draw, folder) -> str:
        folder.mkdir()
        for number in range(3):
            (folder / f"{number}.png").write_bytes(encoded("PNG"))
            (folder / f"{number}-masklabel.png").write_bytes(encoded("PNG", "L"))
            (folder / f"{number}.txt").write_text("a photo of a sks dog")
        calls, moment, gone = [], draw.randrange(16), draw.choice(sorted(folder.iterdir()))
        every = draw.random() < 0.2

        def vanish(function):
            def wrapped(*arguments):
                calls.append(function)
                if len(calls) == moment + 1:
                    shutil.rmtree(folder) if every else gone.unlink()
                return function(*arguments)

            return wrapped

        with monkeypatch.context() as patches:
            patches.setattr(listing, "is_inside", vanish(listing.is_inside))
            patches.setattr(pictures, "open_picture", vanish(reading.open_picture))
            try:
                read = load_references(folder, 16, masks=True, captions=True)
                became = f"read the {len(read)} that were there"
            except ValueError as error:
                check_sentence(error, str(folder), *(f"{n}{end}" for n in range(3) for end in (".png", "-masklabel")))
                became = "refused in one sentence"
        if len(calls) <= moment:
            raise NeverStruck
        return became

    Tally("pictures vanish", 24).run(one, tmp_path)
