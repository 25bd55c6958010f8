"""Files: whole or not there, one writer at a time, litter of dead processes swept, room and disks named."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from models import build_model
from utils import checkpoints, files
from utils.checkpoints import Checkpoint, read, save_final
from utils.command import command
from utils.errors import UsageError, disk_words
from utils.files import Target, atomic, lock, require_room, require_targets, require_writable, sweep, write_text

HOLDER = """
import sys, time
from utils.files import atomic, lock
with lock(sys.argv[1]), atomic(sys.argv[1]) as path:
    path.write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""


def checkpoint(**options: object) -> Checkpoint:
    """A small one, of a run with these options."""
    data = {"dataset": "digits", "imb_type": "exp", "imb_ratio": 100, "subset": "first", "subset_seed": 0}
    data |= {"class_names": ["a", "b"], "class_counts": [2, 1], "mean": [0.0], "std": [1.0], "val_indices": []}
    metrics = {"epoch": 1, "select": "last", "flip_tta": False, "top1": 0.5, "per_class": [0.5, 0.5]}
    model = build_model("resnet8", 2, 1).state_dict()
    return Checkpoint("stage1", "resnet8", 2, 1, model, dict(options), data, metrics)


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds the lock of tmp_path/x and is in the middle of writing it."""
    arguments = [sys.executable, "-c", HOLDER, str(tmp_path / "x")]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_lock_names_its_holder_and_dies_with_it(holder, tmp_path: Path) -> None:
    target = tmp_path / "x"
    words = rf"{re.escape(str(target))} is being run by process {holder.pid} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d on "
    with pytest.raises(UsageError, match=words), lock(target, wait=0, doing="run"):
        raise AssertionError("two holders")
    began = time.monotonic()
    with pytest.raises(UsageError, match="is being written"), lock(target, wait=0.3):
        raise AssertionError("two holders")
    assert 0.3 <= time.monotonic() - began < 10
    holder.send_signal(signal.SIGKILL)
    with lock(target, wait=20):
        assert f"process {os.getpid()} since" in (tmp_path / ".x.lock").read_text()
    assert not (tmp_path / ".x.lock").exists()


def test_what_killed_processes_left_is_swept_up_and_what_living_ones_write_is_not(holder, tmp_path: Path) -> None:
    [half] = tmp_path.glob(".x.*.tmp")
    write_text(tmp_path / "y", "whole")
    assert half.read_text() == "half"
    os.kill(holder.pid, signal.SIGSTOP)
    sweep(tmp_path)
    assert half.exists()
    os.kill(holder.pid, signal.SIGKILL)  # its parent, this process, has not waited for it yet
    for _ in range(200):
        write_text(tmp_path / "y", "whole")
        if not half.exists():
            break
        time.sleep(0.05)
    assert names(tmp_path) == ["y"]


def test_whose_litter_it_is(tmp_path: Path) -> None:
    mine = files._temporary(tmp_path / "x").name
    number, start, host, boot, token = re.fullmatch(r"\.x\.(\d+)-(\d+)-(\w{8})-(\w{8})\.(\w{8})\.tmp", mine).groups()
    assert int(number) == os.getpid() and int(start) == files.start_of(os.getpid()) > 0
    gone = {
        "another process had the number": f".x.{number}-{int(start) - 1}-{host}-{boot}.{token}.tmp",
        "before the host was started anew": f".x.{number}-{start}-{host}-{'0' * 8}.{token}.tmp",
        "no such process": f".x.{2**30}-{start}-{host}-{boot}.{token}.tmp",
        "of an older version": ".0123abcd.tmp",
        "the same, of a probe": ".writable.0123abcd",
    }
    stays = {
        "alive": mine,
        "of another host": f".x.{number}-{int(start) - 1}-{'0' * 8}-{boot}.{token}.tmp",
        "of another program": ".abc.tmp",
        "of another program, long": ".swap.0123abcd.tmp",
        "young": ".89abcdef.tmp",
    }
    for name in (*gone.values(), *stays.values()):
        (tmp_path / name).touch()
    for name in set(gone.values()) | set(stays.values()) - {".89abcdef.tmp"}:
        os.utime(tmp_path / name, (0, time.time() - 25 * 3600))
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / gone["no such process"]).touch()
    sweep(tmp_path)
    assert names(tmp_path) == sorted([*stays.values(), "below"])
    assert len(names(tmp_path / "below")) == 1
    sweep(tmp_path, deep=True)
    assert not names(tmp_path / "below")


@pytest.mark.parametrize("name", ["é" * 120, "x" * 255, "a\udcffb", "with space\n", "%s{}*[a]"])
def test_any_name_has_a_temporary_one_and_a_lock(name: str, tmp_path: Path) -> None:
    with lock(tmp_path / name), atomic(tmp_path / name) as path:
        assert len(os.fsencode(path.name)) < 255 and path.parent == tmp_path
        path.write_text("whole")
    assert names(tmp_path) == [name]


def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_after(tmp_path: Path, monkeypatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split(".")[-1])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("rename"), replace(*paths))[1])
    write_text(tmp_path / "x", "whole")
    assert done == ["tmp", "rename", tmp_path.name]


def test_a_lock_does_not_outlive_its_process_in_a_child(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    answer = context.Queue()
    process = context.Process(target=hold_and_fork, args=(tmp_path / "x", answer))
    process.start()
    child = answer.get(timeout=60)
    while process.exitcode is None:  # joining would wait for what its child holds open
        time.sleep(0.05)
    try:
        with lock(tmp_path / "x", wait=10):
            os.kill(child, 0)  # which is still there
    finally:
        os.kill(child, signal.SIGKILL)


def hold_and_fork(path: Path, answer) -> None:
    """Takes a lock, leaves a child behind, and ends without letting go."""
    with lock(path):
        child = os.fork()
        if child == 0:
            time.sleep(600)
        answer.put(child)
        answer.close()
        answer.join_thread()
        os.kill(os.getpid(), signal.SIGKILL)


def test_threads_wait_for_each_other(tmp_path: Path) -> None:
    inside: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            with lock(tmp_path / "x"):
                inside.append(number)
                assert len(inside) == 1
                time.sleep(0.001)
                inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not inside and not names(tmp_path)


def publish_at(barrier, folder: str, seed: int, told) -> None:
    os.chdir(folder)
    file = checkpoint(seed=seed)
    barrier.wait(60)
    told.put((seed, save_final(file, Path("checkpoints/x.pt"))))


def test_three_that_publish_at_once_are_all_kept(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    context = multiprocessing.get_context("forkserver")
    for turn in range(2):
        barrier, told = context.Barrier(3), context.Queue()
        seeds = range(10 * turn, 10 * turn + 3)
        processes = [context.Process(target=publish_at, args=(barrier, str(tmp_path), s, told)) for s in seeds]
        for process in processes:
            process.start()
        lines = dict(told.get(timeout=100) for _ in processes)
        for process in processes:
            process.join(60)
        kept = {path.name: read(path).options["seed"] for path in (tmp_path / "checkpoints").iterdir()}
        assert set(kept.values()) >= set(seeds) and all("saved checkpoints/x.pt" in line for line in lines.values())
    assert set(kept) == {"x.pt", *(f"x.pt.prev{number}" for number in ("", 2, 3, 4, 5))}
    assert set(kept.values()) == {0, 1, 2, 10, 11, 12}


def test_generations(workdir: Path) -> None:
    path = Path("checkpoints/x.pt")
    path.parent.mkdir()
    lines = [save_final(checkpoint(seed=seed), path) for seed in range(checkpoints.KEPT + 3)]
    assert lines[0] == f"saved {path}"
    assert lines[1].endswith(f"kept as {path}.prev)") and lines[2].endswith(
        f"kept as {path}.prev, the one before as x.pt.prev2)"
    )
    kept = {name: read(path.parent / name).options["seed"] for name in names(path.parent)}
    assert kept == {"x.pt": 7, "x.pt.prev": 6, "x.pt.prev2": 5, "x.pt.prev3": 4, "x.pt.prev4": 3, "x.pt.prev5": 2}
    assert save_final(checkpoint(seed=7), path) == f"saved {path}" and len(names(path.parent)) == 6
    for name in (f"{path}.prev", f"{path}.prev5"):
        with pytest.raises(UsageError, match="--csv"):
            require_targets([Target("--csv", str(name), b"")])


def test_a_run_killed_between_keeping_and_replacing_keeps_nothing_twice(workdir: Path, monkeypatch) -> None:
    path = Path("checkpoints/x.pt")
    path.parent.mkdir()
    save_final(checkpoint(seed=0), path)
    replace = os.replace

    def killed(source, target) -> None:
        if Path(target).name == "x.pt":
            raise KeyboardInterrupt
        replace(source, target)

    for _ in range(3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", killed)
            save_final(checkpoint(seed=1), path)
        assert names(path.parent) == ["x.pt", "x.pt.prev"]
    save_final(checkpoint(seed=1), path)
    assert [read(each).options["seed"] for each in sorted(path.parent.iterdir())] == [1, 0]


def test_without_hard_links_and_locks_results_are_kept_all_the_same(workdir: Path, monkeypatch) -> None:
    def lacking(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "link", lacking)
    monkeypatch.setattr(files.fcntl, "flock", lacking)
    path = Path("checkpoints/x.pt")
    path.parent.mkdir()
    for seed in range(3):
        save_final(checkpoint(seed=seed), path)
    assert [read(each).options["seed"] for each in sorted(path.parent.iterdir())] == [2, 1, 0]


def test_the_room_that_is_needed_is_checked_for_each_disk(tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    require_room({tmp_path: 3e6, tmp_path / "not" / "yet": 2e6}, "a run")
    words = rf"a run needs 6 MB on the disk of {tmp_path} and {tmp_path}/not/yet, where 5 MB are free"
    with pytest.raises(UsageError, match=words):
        require_room({tmp_path: 3e6, tmp_path / "not" / "yet": 3e6}, "a run")
    assert not (tmp_path / "not").exists()


def test_a_full_disk_is_named_with_what_is_free(tmp_path: Path, capsys) -> None:
    @command
    def main(argv: list[str]) -> None:
        with atomic(tmp_path / "x.csv"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write does, without a name

    with pytest.raises(SystemExit) as ended:
        main([])
    words = rf"stopped: No space left on device: {tmp_path}/x.csv \([\d,]+ MB free on the disk of {tmp_path}\)\n"
    assert ended.value.code == 1 and re.fullmatch(words, capsys.readouterr().err)
    assert not names(tmp_path)
    assert disk_words(OSError(errno.EIO, "broken", "/nowhere/at/all")).endswith("MB free on the disk of /)")


def test_text_keeps_the_bytes_of_names(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "a\udcff é\n")
    assert (tmp_path / "x").read_bytes() == b"a\xff \xc3\xa9\n"


def test_weights_are_what_was_saved(tmp_path: Path) -> None:
    file = checkpoint(seed=1)
    file.save(tmp_path / "x.pt")
    assert all(torch.equal(value, file.model[name]) for name, value in read(tmp_path / "x.pt").model.items())


def test_a_probe_that_could_not_be_removed_is_swept_up_by_the_next(tmp_path: Path, monkeypatch) -> None:
    def refuses(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuses)
        with pytest.raises(UsageError, match="--out"):
            require_writable("--out", tmp_path)
    (left,) = tmp_path.iterdir()
    place = left.name.split(".")[2].split("-")
    left.rename(tmp_path / left.name.replace(f"{place[0]}-{place[1]}", "4194305-1"))
    require_writable("--out", tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_link_to_a_device_is_replaced_and_not_the_device(tmp_path) -> None:
    pipe, link, plain = tmp_path / "pipe", tmp_path / "link", tmp_path / "plain"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    with atomic(link) as path:
        path.write_text("new")
    assert pipe.is_fifo() and not link.is_symlink() and link.read_text() == "new"
    with pytest.raises(OSError, match="No regular file"), atomic(pipe) as path:
        path.write_text("new")
    assert pipe.is_fifo()
    link.unlink()
    link.symlink_to(plain)
    plain.write_text("old")
    with atomic(link) as path:
        path.write_text("new")
    assert link.is_symlink() and plain.read_text() == "new"
