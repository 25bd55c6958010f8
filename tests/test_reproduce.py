"""The queue of long trainings: it lists, runs, goes on after a kill, refuses a second one, collects."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

import evaluate
import main_stage1
from benchmarks import reproduce
from benchmarks.reproduce import Row
from experiment.restore import built
from utils import checkpoints
from utils.errors import UsageError

RECIPE = "--epochs 2 --batch_size 64"
ROWS = (
    Row("first", "digits", "resnet20", RECIPE, weights=True),
    Row("second", "digits", "resnet20", f"{RECIPE} --wd 1e-3"),
    Row("after", "digits", "resnet20", "--finetune_epoch 3", parent="first"),
)

#: Stands in for main_stage1.py and main_stage2.py: epochs of $FAKE_SECONDS, and the result of a run made before. It
#: writes what it was told, its niceness, its folder and every epoch it does, with its pid, to "calls" beside its --out.
FAKE = """
import json, os, pathlib, shutil, signal, sys, time
from datetime import datetime
flags = sys.argv[1:]
value = lambda name: flags[flags.index(name) + 1]
out = pathlib.Path(value("--out")).resolve()
assert value("--resume") == "auto"
def note(**what):
    with open(out.parent / "calls", "a") as file:
        file.write(json.dumps(dict(what, pid=os.getpid())) + "\\n")
note(flags=flags, nice=os.nice(0), cwd=os.getcwd(), session=os.getsid(0))
for problem in pathlib.Path(os.environ["FAKE_RUN"]).parent.glob("fails_with_*"):
    if problem.suffix[1:] == out.parent.name:
        print("error: broken on purpose", flush=True)
        sys.exit(int(problem.stem.removeprefix("fails_with_")))
def save(signum, frame):
    time.sleep(float(os.environ.get("FAKE_SAVE", 0)))
    note(saved=signum)
    sys.exit(128 + signum)
signal.signal(signal.SIGTERM, save)
folder = next(iter(out.glob("*/*/")), out / "name" / "20200101-000000_seed0")
folder.mkdir(parents=True, exist_ok=True)
if (folder / "finished.json").exists():
    sys.exit(0)
lines = (pathlib.Path(os.environ["FAKE_RUN"]) / "metrics.jsonl").read_text().splitlines(keepends=True)
metrics = folder / "metrics.jsonl"
for line in lines[len(metrics.read_text().splitlines()) if metrics.exists() else 0:]:
    time.sleep(float(os.environ["FAKE_SECONDS"]))
    with open(metrics, "a") as file:
        file.write(line)
    note(epoch=json.loads(line)["epoch"])
shutil.copy(pathlib.Path(os.environ["FAKE_RUN"]) / "checkpoint.pt", folder)
(folder / "finished.json").write_text("{}")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the first row's command, made without a queue."""
    folder = tmp_path_factory.mktemp("trained")
    amp = reproduce.precision() if not torch.cuda.is_available() else "off"
    words = [*ROWS[0].flags, "--device", "cpu", "--amp", amp, "--threads", "1"]
    subprocess.run([sys.executable, str(ROOT / "main_stage1.py"), *words], cwd=folder, check=True, capture_output=True)
    return next(folder.glob("output/*/*/"))


class Lab:
    """A state folder, and queues on it: processes of their own, forked, since importing takes seconds."""

    def __init__(self, folder: Path, run: Path) -> None:
        self.state, self.results, self.folder, self.scripts = folder / "state", folder / "results", folder, folder
        self.fake = {"FAKE_SECONDS": "0", "FAKE_RUN": str(run), "OMP_NUM_THREADS": "1"}
        for name in ("main_stage1.py", "main_stage2.py"):
            (folder / name).write_text(FAKE)
        self.grace, self.rows, self.nice = 60.0, ROWS, reproduce.NICE
        self.started: list[Any] = []

    def _queue(self, flags: tuple[str, ...], environment: dict[str, str]) -> None:
        sys.stdout = sys.stderr = open(self.folder / "printed", "w", buffering=1)
        os.environ.update(self.fake | environment)
        sys.argv = ["reproduce", "--state", str(self.state), "--results", str(self.results), *flags]
        reproduce.ROWS, reproduce.SCRIPTS, reproduce.NICE = self.rows, self.scripts, self.nice
        reproduce.POLL, reproduce.GRACE = 0.05, self.grace
        sys.exit(reproduce.main())

    def start(self, *flags: str, **environment: str) -> Any:
        queue = multiprocessing.get_context("fork").Process(target=self._queue, args=(flags, environment))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fork beside threads
            queue.start()
        self.started.append(queue)
        return queue

    def wait(self, queue: Any, seconds: float = 60) -> int:
        queue.join(seconds)
        assert queue.exitcode is not None, "it did not end"
        return int(queue.exitcode)

    def run(self, *flags: str, **environment: str) -> tuple[int, str]:
        queue = self.start(*flags, **environment)
        return self.wait(queue), (self.folder / "printed").read_text()

    def calls(self, name: str, key: str) -> list[dict[str, Any]]:
        path = self.state / name / "calls"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if key in line]

    def status(self) -> dict[str, Any]:
        return reproduce.read_json(self.state / "status.json")

    def notes(self, name: str) -> dict[str, Any]:
        return reproduce.read_json(self.state / name / "row.json")


@pytest.fixture
def lab(tmp_path: Path, trained: Path) -> Iterator[Lab]:
    made = Lab(tmp_path, trained)
    yield made
    for process in made.started:
        process.kill()
        process.join()


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
    return found


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_rows_are_the_commands_that_they_should_be() -> None:
    rows = reproduce.ROWS
    assert len({row.name for row in rows}) == len(rows)
    first, second, third, fourth, strong, held_out, plain, *ratios, last, _ = (vars(row.options) for row in rows)
    assert (first["network"], first["epochs"], first["lr"], first["batch_size"], first["wd"], first["seed"]) == (
        ("resnet32", 200, 0.1, 128, 5e-4, 0)
    )
    assert (second["network"], second["epochs"], second["lr"], second["batch_size"], second["wd"], second["seed"]) == (
        ("resnet34", 48, 0.04, 64, 5e-3, 0)
    )
    assert third == first | {"wd": 1e-3} and fourth == first | {"wd": 2e-3}
    assert held_out == third | {"val_split": 0.1} and plain == second | {"wd": 5e-4} and last == third | {"seed": 1}
    assert [each["imb_ratio"] for each in ratios] == [50, 10] and all(each["epochs"] == 200 for each in ratios)
    assert strong == first | {"aug": "autoaugment+cutout", "mixup": 0.2, "cutmix": 1.0}
    assert all(
        (row["dataset"], row["imb_ratio"], row["select"]) == ("cifar100", 100, "last") for row in (first, second)
    )


def test_it_runs_what_is_missing_in_order_and_lists_it(lab: Lab) -> None:
    status, text = lab.run("--list")
    assert status == 0 and text.count(" missing\n") == 3 and "no queue runs" in text
    assert "about 0.0 h left" in text  # timed: digits take seconds
    (timing,) = reproduce.read_json(lab.state / "timings.json").values()
    assert len(timing) == 1 and 0.05 < next(iter(timing.values())) < 60  # wd makes no difference to the time

    status, text = lab.run("--threads", "2")
    assert status == 0, text
    for row, script in zip(ROWS, ("main_stage1.py", "main_stage1.py", "main_stage2.py")):
        (call,) = lab.calls(row.name, "flags")
        assert call["flags"][: len(row.flags)] == row.flags
        assert call["cwd"] == str(lab.state / row.name)  # so that checkpoints/ is the row's own
        assert call["nice"] >= min(19, os.nice(0) + reproduce.NICE) and call["session"] == call["pid"]
        assert call["flags"][call["flags"].index("--threads") + 1] == "2"
        if row.parent:
            start = call["flags"][call["flags"].index("--pretrained_pth") + 1]
            assert (lab.state / row.name / start).resolve() == next(lab.state.glob("first/out/*/*/checkpoint.pt"))
        else:
            assert call["flags"][call["flags"].index("--amp") + 1] == reproduce.precision()
        assert script in (lab.folder / script).name
    order = [lab.calls(row.name, "epoch")[0] for row in ROWS]
    assert [row["epoch"] for row in order] == [1, 1, 1]
    began = [lab.notes(row.name)["attempts"][0]["began"] for row in ROWS]
    assert began == sorted(began)
    assert lab.status()["state"] == "ended" and lab.status()["done"] == ["first", "second", "after"]

    before = [len(lab.calls(row.name, "flags")) for row in ROWS]
    status, text = lab.run()
    assert status == 0 and [len(lab.calls(row.name, "flags")) for row in ROWS] == before  # nothing is run twice
    _, text = lab.run("--list")
    assert text.count("done\n") == 3 and "about 0.0 h in all" in text


def test_only_runs_what_it_names(lab: Lab) -> None:
    status, text = lab.run("--only", "third")
    assert status == 2 and "first, second, after" in text
    status, _ = lab.run("--only", "second")
    assert status == 0 and (lab.state / "second").is_dir() and not (lab.state / "first").exists()
    status, text = lab.run("--only", "after")  # its parent is missing
    assert status == 1 and "after waits for first" in text and not (lab.state / "after").exists()


def test_the_status_file_says_what_runs_and_until_when(lab: Lab) -> None:
    queue = lab.start("--only", "first", FAKE_SECONDS="2")
    status = until(lambda: lab.status().get("epoch") == 1 and lab.status())
    assert (status["state"], status["row"], status["epochs"], status["pid"]) == ("running", "first", 2, queue.pid)
    assert status["run_pid"] == lab.calls("first", "flags")[0]["pid"] and status["updated"] >= "2026"
    (record,) = reproduce.read_lines(next(lab.state.glob("first/out/*/*/metrics.jsonl")))
    assert status["seconds_left"] == round(record["seconds"] * 1.5)  # an epoch and its evaluation
    assert status["ends"] >= status["updated"]
    _, text = lab.run("--list")
    assert "at epoch 1 of 2" in text and f"process {queue.pid} since" in text
    assert lab.wait(queue, 30) == 0


def test_a_second_queue_is_refused_and_names_the_first(lab: Lab) -> None:
    queue = lab.start("--only", "first", FAKE_SECONDS="5")
    until(lambda: lab.calls("first", "flags"))
    status, text = lab.run("--only", "second")
    assert status == 2 and f"process {queue.pid}" in text and not (lab.state / "second").exists()
    queue.terminate()
    assert lab.wait(queue, 30) == 143
    assert lab.run("--only", "second")[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_run_may_save(lab: Lab, number: signal.Signals) -> None:
    queue = lab.start(FAKE_SECONDS="3", FAKE_SAVE="1")
    until(lambda: lab.calls("first", "epoch"))
    os.kill(queue.pid, number)
    assert lab.wait(queue, 30) == 128 + number
    assert lab.calls("first", "saved") and not lives(lab.calls("first", "flags")[0]["pid"])
    assert not (lab.state / "second").exists() and lab.status()["state"] == "stopped"
    (attempt,) = lab.notes("first")["attempts"]
    assert attempt["status"] == 143 and not attempt["failed"]
    _, text = lab.run("--list")
    assert "at epoch 1 of 2" in text and "failed," not in text


def test_a_run_that_does_not_end_is_killed_after_the_grace(lab: Lab) -> None:
    lab.grace = 0.5
    queue = lab.start(FAKE_SECONDS="30", FAKE_SAVE="30")
    pid = until(lambda: lab.calls("first", "flags"))[0]["pid"]
    time.sleep(0.3)  # its handler is in place
    queue.terminate()
    assert lab.wait(queue, 20) == 143 and not lives(pid)
    assert lab.notes("first")["attempts"][0]["status"] == -9


def test_a_killed_queue_takes_its_run_along_and_goes_on_when_started_again(lab: Lab) -> None:
    queue = lab.start("--only", "first", FAKE_SECONDS="3", FAKE_SAVE="5")
    until(lambda: lab.calls("first", "epoch"))
    pid = lab.calls("first", "flags")[0]["pid"]
    queue.kill()
    queue.join()
    amp = lab.notes("first")["amp"]
    (lab.state / "first" / "row.json").write_text(
        json.dumps(lab.notes("first") | {"amp": "off" if amp == "bf16" else "bf16"})
    )
    (lab.folder / "elsewhere").mkdir()
    status, text = lab.run("--only", "first", "--data_dir", str(lab.folder / "elsewhere"))
    assert status == 0, text
    assert [call["epoch"] for call in lab.calls("first", "epoch")] == [1, 2]  # none twice
    assert (lab.state / "first" / "data").resolve() == lab.folder / "elsewhere"
    assert [call["pid"] for call in lab.calls("first", "saved")] == [pid]
    flags, again = (call["flags"] for call in lab.calls("first", "flags"))
    where = again.index("--amp") + 1
    assert again[where] != amp  # in the precision of its beginning, whatever suits the machine
    assert [*flags[:where], *flags[where + 1 :]] == [*again[:where], *again[where + 1 :]]  # one command for --resume
    lines = [json.loads(line) for line in (lab.state / "first" / "calls").read_text().splitlines()]
    assert [line["pid"] == pid for line in lines] == sorted((line["pid"] == pid for line in lines), reverse=True)
    assert len(lab.notes("first")["attempts"]) == 2


def test_a_row_that_is_cut_off_is_continued_while_it_gets_on(lab: Lab) -> None:
    queue = lab.start("--only", "first", FAKE_SECONDS="1.5")
    until(lambda: lab.calls("first", "epoch"))
    os.kill(lab.calls("first", "flags")[0]["pid"], signal.SIGKILL)
    assert lab.wait(queue, 30) == 0 and [call["epoch"] for call in lab.calls("first", "epoch")] == [1, 2]

    queue = lab.start("--only", "second", FAKE_SECONDS="30")
    until(lambda: lab.calls("second", "flags"))
    (lab.state / "second/out/name/20200101-000000_seed0").mkdir(parents=True, exist_ok=True)
    (lab.state / "second/out/name/20200101-000000_seed0/state-000001.pt").touch()  # saved within its first epoch
    os.kill(lab.calls("second", "flags")[0]["pid"], signal.SIGKILL)
    until(lambda: len(lab.calls("second", "flags")) == 2)
    os.kill(lab.calls("second", "flags")[1]["pid"], signal.SIGKILL)  # it has not got on: not for ever
    assert lab.wait(queue, 30) == 1 and len(lab.calls("second", "flags")) == 2


def test_a_failed_row_does_not_stop_the_others(lab: Lab, trained: Path) -> None:
    mark = trained.parent / "fails_with_3.first"
    mark.touch()
    try:
        status, _ = lab.run("--only", "first", "second")
    finally:
        mark.unlink()
    assert status == 1 and lab.status()["done"] == ["second"]
    _, text = lab.run("--list")
    assert "failed, missing, exit status 3: error: broken on purpose" in text
    assert lab.run("--only", "first")[0] == 0  # tried again by the next queue
    assert "failed," not in lab.run("--list")[1]


def test_it_says_where_the_code_is_no_longer_what_a_row_began_with(lab: Lab, trained: Path) -> None:
    mark = trained.parent / "fails_with_3.first"
    mark.touch()
    try:
        lab.run("--only", "first")
    finally:
        mark.unlink()
    assert "begun at commit" not in lab.run("--list")[1]
    notes = lab.notes("first")
    notes["attempts"][0]["commit"] = "0123456789" * 4
    (lab.state / "first" / "row.json").write_text(json.dumps(notes))
    assert "begun at commit 012345678; the code here is" in lab.run("--list")[1]


def test_collect_copies_what_is_complete(lab: Lab, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.run("--only", "first")
    notes = lab.notes("first")
    notes["attempts"].insert(0, notes["attempts"][0] | {"status": 143})
    (lab.state / "first" / "row.json").write_text(json.dumps(notes))
    (lab.state / "second" / "out").mkdir(parents=True)
    status, text = lab.run("--collect")
    assert status == 0 and text.startswith("first: "), text
    assert sorted(path.name for path in lab.results.iterdir()) == ["first.json", "first.jsonl", "first.pt"]
    found, file = reproduce.read_json(lab.results / "first.json"), checkpoints.read(trained / "checkpoint.pt")
    assert (found["top1"], found["top5"], found["ece"]) == tuple(file.metrics[key] for key in ("top1", "top5", "ece"))
    assert all(found[group] == file.metrics["groups"][group]["accuracy"] for group in ("many", "medium", "few"))
    assert found["interruptions"] == 1 and found["commits"] == [notes["attempts"][0]["commit"]]
    assert found["amp"] == notes["amp"] and found["provenance"]["versions"]["torch"] == torch.__version__
    assert (lab.results / "first.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()

    half = checkpoints.read(lab.results / "first.pt")
    assert {value.dtype for value in half.model.values()} == {torch.float16, torch.float32, torch.int64}
    assert found["half"]["bytes"] < 0.6 * (trained / "checkpoint.pt").stat().st_size
    assert found["half"]["sha256"] == half.sha256
    assert found["half"]["top1"] == evaluate.main(["--pretrained_pth", str(lab.results / "first.pt")])["top1"]
    assert abs(found["half"]["top1"] - found["top1"]) <= 0.01
    content = (lab.results / "first.json").read_text() + repr((half.options, half.provenance, half.parent))
    assert str(lab.folder) not in content and str(trained.parent) not in content and str(ROOT) not in content

    assert "there already" in lab.run("--collect")[1]


def test_half_precision_is_loaded_into_a_float32_network(trained: Path, tmp_path: Path) -> None:
    file = checkpoints.read(trained / "checkpoint.pt")
    reproduce.halved(file).save(tmp_path / "half.pt")
    model = checkpoints.read(tmp_path / "half.pt").model
    state = built(checkpoints.read(tmp_path / "half.pt")).state_dict()
    assert all(
        value.dtype == (torch.int64 if "num_batches" in name else torch.float32) for name, value in state.items()
    )
    assert all(torch.equal(value, model[name].to(value.dtype)) for name, value in state.items())
    assert all(torch.equal(state[name], value) for name, value in file.model.items() if value.dim() < 2)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "ROWS", ROWS)


@pytest.mark.usefixtures("rows")
def test_a_finished_run_of_the_same_command_is_adopted(lab: Lab, trained: Path) -> None:
    words = ["--state", str(lab.state), "--results", str(lab.results)]
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert reproduce.run_queue([*words, "--adopt", str(trained)]) == 0
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before
    assert lab.run("--only", "first")[0] == 0 and not lab.calls("first", "flags")  # nothing left to run
    assert "adopted" in lab.notes("first") and reproduce.run_queue([*words, "--collect"]) == 0
    found = reproduce.read_json(lab.results / "first.json")
    assert found["adopted"] is True and found["interruptions"] == 0
    with pytest.raises(UsageError, match="done already"):
        reproduce.run_queue([*words, "--adopt", str(trained)])


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("wd", "first differs in --wd 0.123"),
        ("unknown", "first differs in --newer 1"),
        ("epochs", "not of its checkpoint's 2 epochs"),
        ("accuracy", "not of its checkpoint's 2 epochs"),
        ("images", "other images"),
    ],
)
def test_what_is_not_a_row_s_finished_run_is_not_adopted(lab: Lab, trained: Path, fault: str, message: str) -> None:
    folder = shutil.copytree(trained, lab.folder / "name" / "20200101-000000_seed0")
    file = checkpoints.read(folder / "checkpoint.pt")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    if fault == "wd":
        file.options["wd"] = 0.123
    elif fault == "unknown":
        file.options["newer"] = 1
    elif fault == "epochs":
        (folder / "metrics.jsonl").write_text(lines[1])
    elif fault == "accuracy":
        file.metrics["top1"] += 0.01
    else:
        file.data["train_images"] = "others"
    file.save(folder / "checkpoint.pt")
    with pytest.raises(UsageError, match=message):
        reproduce.run_queue(["--state", str(lab.state), "--adopt", str(folder)])
    assert not (lab.state / "first").exists()


@pytest.mark.usefixtures("rows")
def test_an_older_run_lacks_options_that_stand_at_their_default(lab: Lab, trained: Path) -> None:
    folder = shutil.copytree(trained, lab.folder / "name" / "20200101-000000_seed0")
    file = checkpoints.read(folder / "checkpoint.pt")
    del file.options["sync_bn"]
    file.save(folder / "checkpoint.pt")
    assert reproduce.run_queue(["--state", str(lab.state), "--adopt", str(folder)]) == 0


def test_the_state_may_not_lie_in_the_repository() -> None:
    with pytest.raises(UsageError, match="inside the repository"):
        reproduce.run_queue(["--list", "--state", str(ROOT / "output" / "reproduce")])


@pytest.mark.skipif("resume" not in {f.name for f in fields(main_stage1.Options)}, reason="stage 1 has no --resume")
def test_a_real_run_goes_on_where_it_was_interrupted(lab: Lab) -> None:
    lab.nice, lab.grace = 0, 300  # a busy machine need not keep the suite waiting
    lab.scripts, lab.rows = ROOT, (Row("first", "digits", "resnet20", "--epochs 8 --batch_size 64", weights=True),)
    queue = lab.start("--only", "first")
    until(lambda: [path for path in lab.state.glob("first/out/*/*/metrics.jsonl") if path.stat().st_size], 300)
    queue.terminate()
    assert lab.wait(queue, 300) == 143
    printed = lab.wait(lab.start("--only", "first"), 300), (lab.state / "first" / "output.txt").read_text()
    assert printed[0] == 0, printed[1]
    assert len(list(lab.state.glob("first/out/*/*/"))) == 1 and "\nresumed " in printed[1]
    assert lab.run("--collect")[0] == 0 and (lab.results / "first.pt").is_file()
