"""Published-scale trainings in the background: a table of rows, run one after the other, whatever interrupts them.

    python -m benchmarks.reproduce --list       what is done, how far the others are, the time that each still takes
    python -m benchmarks.reproduce              run what is missing, at low priority on one thread
    python -m benchmarks.reproduce --collect    copy what is complete into benchmarks/results/reproduce/

Everything lies in a folder outside the repository, --state or $LT_REPRODUCE: for each row a folder in which its command
runs, and status.json (row, epoch, when it ends). Started again after any interruption, the queue goes on where it was;
SIGTERM and Ctrl-C save first. Edits must not change what runs, so keep it running from a clone of its own:

    git clone . ../reproduce-clone && cd ../reproduce-clone
    nohup python -m benchmarks.reproduce --data_dir /path/to/data > /dev/null 2>&1 &

and move the clone to another commit between rows only: --list says where the code differs from what a row began with.
A row of stage 2 has the name of its stage-1 row as ``parent`` and waits for it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import io
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

import evaluate
from benchmarks import halved, read_lines
from benchmarks.stage1_bench import make_data
from datasets import DATASETS
from engine import TrainStep, is_due, make_sgd
from experiment.data import load_data
from experiment.options import fill_options
from losses import make_loss
from retraining.options import Options as Stage2Options
from training.options import Options
from training.recipe import make_batches, make_network, make_runs, resolve_auto
from utils import checkpoints
from utils.command import command
from utils.errors import UsageError
from utils.files import atomic, lock, sha256, write_text
from utils.metrics import percent, scores
from utils.options import Values, parse_typed
from utils.readers import sealed
from utils.resume import state_files
from utils.system import AMP, ROOT, cpu_has_bf16, cpu_model, pick_amp, pick_device, provenance
from utils.types import Json

STATE = os.environ.get("LT_REPRODUCE", "~/.cache/long-tailed-recognition/reproduce")
SCRIPTS = ROOT  # where main_stage1.py and main_stage2.py are
NICE, POLL, GRACE = 10, 1.0, 300.0  # seconds between looks at a run, and that it may take to save
EVALUATION = 0.5  # of an epoch's time on CIFAR-100-LT: measured 0.45 (ResNet-32) and 0.56 (ResNet-34)
#: Options that do not say which row a run is of: how it was run, which its result states, and where.
FREE = {*checkpoints.INCIDENTAL, "amp", "compile", "graph"}


@dataclass(frozen=True)
class Row:
    """One run of the table.

    Attributes:
        name: of its folder and files.
        recipe: the other options of its command.
        parent: the row whose checkpoint it starts from; that makes it a row of stage 2.
        weights: --collect keeps its checkpoint too, in half precision.
    """

    name: str
    dataset: str
    network: str
    recipe: str
    seed: int = 0
    parent: str | None = None
    weights: bool = False

    @property
    def stage(self) -> str:
        """stage1 or stage2."""
        return "stage2" if self.parent else "stage1"

    @property
    def flags(self) -> list[str]:
        """Of its command; where and how it runs come on top."""
        return shlex.split(f"--dataset {self.dataset} --network {self.network} {self.recipe} --seed {self.seed}")

    @cached_property
    def typed(self) -> Values:
        """What its flags set."""
        cls = Stage2Options if self.parent else Options
        return parse_typed(cls, self.flags, f"main_{self.stage}.py", None)

    @cached_property
    def options(self) -> Options | Stage2Options:
        """All options of its command."""
        if self.parent:
            return fill_options(Stage2Options, self.typed, "stage2").options
        return make_runs(fill_options(Options, self.typed, "stage1"), self.typed)[0]

    @property
    def epochs(self) -> int:
        """That it takes."""
        return self.options.epochs if isinstance(self.options, Options) else self.options.finetune_epoch


RESNET32 = "--imb_ratio 100 --epochs 200 --lr 0.1 --batch_size 128"
RESNET34 = "--imb_ratio 100 --epochs 48 --lr 0.04 --batch_size 64"
STRONG = "--aug autoaugment+cutout --mixup 0.2 --cutmix 1"
ROWS: tuple[Row, ...] = (
    Row("resnet32_wd5e-4", "cifar100", "resnet32", f"{RESNET32} --wd 5e-4", weights=True),
    Row("resnet34_wd5e-3", "cifar100", "resnet34", f"{RESNET34} --wd 5e-3", weights=True),
    Row("resnet32_wd1e-3", "cifar100", "resnet32", f"{RESNET32} --wd 1e-3", weights=True),
    Row("resnet32_wd2e-3", "cifar100", "resnet32", f"{RESNET32} --wd 2e-3", weights=True),
    Row("resnet32_wd5e-4_strong", "cifar100", "resnet32", f"{RESNET32} --wd 5e-4 {STRONG}", weights=True),
    Row("resnet32_wd1e-3_held_out", "cifar100", "resnet32", f"{RESNET32} --wd 1e-3 --val_split 0.1", weights=True),
    Row("resnet34_wd5e-4", "cifar100", "resnet34", f"{RESNET34} --wd 5e-4"),
    Row("resnet32_wd1e-3_ratio50", "cifar100", "resnet32", RESNET32.replace("100", "50") + " --wd 1e-3", weights=True),
    Row("resnet32_wd1e-3_ratio10", "cifar100", "resnet32", RESNET32.replace("100", "10") + " --wd 1e-3", weights=True),
    Row("resnet32_wd1e-3_seed1", "cifar100", "resnet32", f"{RESNET32} --wd 1e-3", seed=1, weights=True),
    Row("resnet32_wd1e-3_seed2", "cifar100", "resnet32", f"{RESNET32} --wd 1e-3", seed=2, weights=True),
)


@dataclass(frozen=True)
class Progress:
    """How far a row is: its newest run folder, the records of its epochs, whether all is there, its last state."""

    folder: Path | None
    records: list[Json]
    done: bool
    state: str = ""

    @property
    def epoch(self) -> int:
        """The last whole epoch."""
        return int(self.records[-1]["epoch"]) if self.records else 0

    @property
    def place(self) -> tuple[int, str]:
        """Grows with every epoch and every state that is saved."""
        return self.epoch, self.state


def now() -> str:
    """The time, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_json(path: Path) -> Json:
    """A JSON file's dict; empty where there is none."""
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def write_json(path: Path, content: object) -> None:
    """Replaces a JSON file."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def commit() -> str:
    """The code's commit; with a + where files differ from it."""
    about = provenance("", [], torch.device("cpu"), 0)
    return f"{about['commit']}{'+' if about['uncommitted_changes'] else ''}"


def cpu_name() -> str:
    """The CPU's model."""
    return cpu_model() or platform.processor() or "unknown"


def precision() -> str:
    """What a row that begins on this machine is trained in."""
    if torch.cuda.is_available():
        return pick_amp("auto", torch.device("cuda"))
    return "bf16" if cpu_has_bf16() else "off"


def end_with_queue() -> None:
    """In the child: SIGTERM when the queue is gone, however that went (Linux only)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Queue:
    """The rows and the folder of their state."""

    def __init__(self, state: Path, data_dir: str, threads: int) -> None:
        self.state, self.data_dir, self.threads = state, str(Path(data_dir).resolve()), threads
        self.signals: list[int] = []
        self.state.mkdir(parents=True, exist_ok=True)

    def home(self, row: Row) -> Path:
        """Where a row runs."""
        return self.state / row.name

    def notes(self, row: Row) -> Json:
        """A row's own file: amp, adopted, and its attempts with commit, CPU, threads, pid, exit status."""
        return read_json(self.home(row) / "row.json")

    def progress(self, row: Row) -> Progress:
        """How far a row is."""
        folders = sorted(self.home(row).glob("out/*/*/"))
        whole = [folder for folder in folders if (folder / "finished.json").is_file()]
        folder = next(reversed(whole or folders), None)
        records = []
        if folder and (folder / "metrics.jsonl").is_file():
            for line in (folder / "metrics.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError):  # one that is being written
                    records.append(json.loads(line))
        states = state_files(folder) if folder else []
        return Progress(folder, records, bool(whole), states[0].name if states else "")

    def command(self, row: Row, amp: str) -> list[str]:
        """What trains a row in its folder, and goes on with it: the same wherever that folder and the data are."""
        words = [sys.executable, str(SCRIPTS / f"main_{row.stage}.py"), *row.flags, "--data_dir", "data"]
        if row.parent:
            parent = self.progress(next(each for each in ROWS if each.name == row.parent)).folder
            words += ["--pretrained_pth", os.path.relpath(f"{parent}/checkpoint.pt", self.home(row))]
        else:
            words += ["--amp", amp]
        return [*words, "--threads", str(self.threads), "--out", "out", "--resume", "auto"]

    def run(self, rows: Sequence[Row]) -> int:
        """Trains what is missing; the exit status."""
        with lock(self.state / "queue", wait=0, doing="worked on"):
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda received, _: self.signals.append(received))
            failed = [row.name for row in rows if not self.signals and not self.train(row)]
            self.write_status("stopped" if self.signals else "ended")
        return 128 + self.signals[0] if self.signals else 1 if failed else 0

    def train(self, row: Row) -> bool:
        """Trains a row, again as long as it is cut off and has got on; whether nothing went wrong."""
        if self.progress(row).done:
            return True
        if row.parent and not any(self.progress(each).done for each in ROWS if each.name == row.parent):
            print(f"{row.name} waits for {row.parent}", flush=True)
            return False
        home = self.home(row)
        notes: Json = {"amp": precision(), "attempts": [], **self.notes(row)}
        home.mkdir(exist_ok=True)
        self.end_orphan(row, (notes["attempts"] or [{}])[-1].get("pid"))
        (home / "data").unlink(missing_ok=True)
        (home / "data").symlink_to(self.data_dir)
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(self.threads)}
        while not self.signals:
            before = self.progress(row)
            print(f"{now()}  {row.name}: from epoch {before.epoch + 1} of {row.epochs}", flush=True)
            attempt = {"began": now(), "commit": commit(), "cpu": cpu_name(), "threads": self.threads}
            notes["attempts"].append(attempt)
            with open(home / "output.txt", "a") as output:
                child = subprocess.Popen(
                    self.command(row, notes["amp"]),
                    cwd=home,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=end_with_queue,
                )
            attempt["pid"] = child.pid
            write_json(home / "row.json", notes)
            status, progress = self.watch(row, child), self.progress(row)
            cut_off = status < 0 or status in (130, 143)
            attempt |= {"ended": now(), "status": status, "epoch": progress.epoch}
            attempt["failed"] = not progress.done and not (cut_off and (self.signals or progress.place > before.place))
            write_json(home / "row.json", notes)
            print(f"{now()}  {row.name}: {self.word(row, progress)}", flush=True)
            if progress.done or attempt["failed"]:
                return progress.done
        return True

    def watch(self, row: Row, child: subprocess.Popen[bytes]) -> int:
        """Waits for a run, passes signals on to it, writes the status; its exit status."""
        sent, deadline = 0, math.inf
        for look in itertools.count():
            if look % 10 == 0:
                self.write_status("running", row, child.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(POLL)
            for _ in range(sent, len(self.signals)):
                child.send_signal(signal.SIGTERM)
                sent, deadline = sent + 1, min(deadline, time.monotonic() + GRACE)
            if time.monotonic() > deadline:
                os.killpg(child.pid, signal.SIGKILL)
        raise AssertionError

    def end_orphan(self, row: Row, pid: int | None) -> None:
        """Waits until what a killed queue left running of a row has saved, see :func:`end_with_queue`, or ends it."""
        deadline = time.monotonic() + GRACE
        with contextlib.suppress(OSError):  # it has gone
            while pid and Path(os.readlink(f"/proc/{pid}/cwd")) == self.home(row):
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(min(POLL, 0.2))

    def write_status(self, state: str, row: Row | None = None, run: int | None = None) -> None:
        """Replaces status.json."""
        content: Json = {"state": state, "pid": os.getpid(), "updated": now()}
        content["done"] = [each.name for each in ROWS if self.progress(each).done]
        if row:
            progress = self.progress(row)
            left = self.seconds_left(row, progress)
            ends = left and datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=left)
            content |= {"row": row.name, "epoch": progress.epoch, "epochs": row.epochs, "run_pid": run}
            content |= {"seconds_left": left and round(left), "ends": ends and ends.isoformat(timespec="seconds")}
        write_json(self.state / "status.json", content)

    def seconds_left(self, row: Row, progress: Progress, measure: bool = False) -> float | None:
        """What a row still takes here, from its own epochs or a timed one; None where that is not known."""
        if progress.done:
            return 0
        own = [record["seconds"] for record in progress.records[-20:] if "seconds" in record]
        epoch = statistics.median(own) if own else self.timed(row, measure)
        rest = range(progress.epoch, row.epochs)
        return epoch and epoch * sum(1 + EVALUATION * is_due(i, row.epochs, row.options.eval_every) for i in rest)

    def timed(self, row: Row, measure: bool) -> float | None:
        """Seconds of an epoch from some steps: CPU time, so that what else runs here does not count. Kept by CPU."""
        amp, known = self.notes(row).get("amp", precision()), read_json(self.state / "timings.json")
        options = row.options
        mine: dict[str, float] = known.setdefault(cpu_name(), {})
        names = () if row.parent else ("dataset", "imb_ratio", "network", "batch_size", "aug", "mixup", "cutmix", "ema")
        key = " ".join(str(getattr(options, name)) for name in names) + f" {amp}, {self.threads} threads"
        can = not row.parent and not torch.cuda.is_available() and options.dataset in ("cifar100", "digits")
        if measure and can and key not in mine and isinstance(options, Options):
            device = pick_device("cpu", threads=self.threads)
            data = load_data(options) if DATASETS[row.dataset].embedded else make_data(float(options.imb_ratio))
            (one,) = resolve_auto([options], device, len(data.train))
            model, batches = make_network(one, data, device), make_batches(one, data, device)
            optimizer = make_sgd(model.parameters(), one.lr, one.momentum, one.wd, one.nesterov)
            loss = make_loss(one.loss, data.class_counts, one.loss_options)
            step = TrainStep(model.train(), loss, optimizer, amp=AMP[amp], ema=one.ema)
            times = [time.process_time()]
            for _ in batches.epoch():  # the input of an epoch, then steps
                pass
            first = next(iter(batches.epoch()))
            for _ in range(5):
                times.append(time.process_time())
                step(*first)
            times.append(time.process_time())
            seconds = [b - a for a, b in itertools.pairwise(times)]
            mine[key] = (seconds[0] + statistics.median(seconds[2:]) * len(batches)) / self.threads
            write_json(self.state / "timings.json", known)
        return mine.get(key)

    def word(self, row: Row, progress: Progress) -> str:
        """The state of a row in words."""
        last = (self.notes(row).get("attempts") or [{}])[-1]
        if progress.done:
            return "done"
        place = f"at epoch {progress.epoch} of {row.epochs}" if progress.folder else "missing"
        if not last.get("failed"):
            return place
        said = (self.home(row) / "output.txt").read_text(errors="replace").split("\n")
        return f"failed, {place}, exit status {last['status']}: {next((s for s in reversed(said) if s), 'no output')}"

    def show(self, rows: Sequence[Row]) -> None:
        """Prints the state of every row."""
        try:
            with lock(self.state / "queue", wait=0, doing="worked on"):
                print(f"{self.state}: no queue runs")
        except UsageError as error:
            print(error.args[0])
        code, total = commit(), 0.0
        for row in rows:
            progress = self.progress(row)
            left = self.seconds_left(row, progress, measure=True)
            total += left or 0
            names = ("test_top1", "test_many", "test_medium", "test_few") if progress.done else ()
            time_left = "time not known" if left is None else f"about {left / 3600:.1f} h left"
            figures = "  ".join(percent(progress.records[-1].get(name)) for name in names) or time_left
            print(f"{row.name:<26}{figures:<30}{self.word(row, progress)}")
            begun = (self.notes(row).get("attempts") or [{}])[0].get("commit", code)
            if begun != code and not progress.done:
                print(f"{'':<26}begun at commit {begun[:9]}; the code here is {code[:9]}{code[40:]}")
        print(f"about {total / 3600:.1f} h in all, {cpu_name()}, {self.threads} threads")

    def adopt(self, folder: Path) -> str:
        """Takes over a finished run of a row's command that was made outside of the queue; says of which row."""
        file, found = checkpoints.read(folder / "checkpoint.pt"), {}
        for row in (row for row in ROWS if not row.parent):
            expected = vars(row.options)
            ours = {name: value for name, value in expected.items() if name not in FREE or name in row.typed}
            theirs = {name: value for name, value in file.options.items() if name not in FREE or name in row.typed}
            # an option that the run's code did not have yet stands at its default
            theirs = {f.name: f.default for f in dataclasses.fields(row.options) if f.name in ours} | theirs
            found[row.name] = [f"--{name} {theirs[name]}" for name in theirs if theirs[name] != ours.get(name, "none")]
        row = min((row for row in ROWS if not row.parent), key=lambda row: len(found[row.name]))
        if found[row.name]:
            raise UsageError(f"{folder} is of no row; {row.name} differs in {' '.join(found[row.name])}", "a row's run")
        status = read_json(self.state / "status.json")
        if self.progress(row).done or (status.get("state"), status.get("row")) == ("running", row.name):
            raise UsageError(f"{folder}: {row.name} is done already, or running", "a run of a row that is missing")
        records = read_lines(folder / "metrics.jsonl")
        is_whole = [record["epoch"] for record in records] == [*range(1, row.epochs + 1)]
        if not is_whole or records[-1]["test_top1"] != file.metrics["top1"]:
            raise UsageError(f"{folder}: metrics.jsonl is not of its checkpoint's {row.epochs} epochs", "a whole run")
        data = load_data(dataclasses.replace(row.options, data_dir=self.data_dir))
        if (file.data["class_counts"], file.data["train_images"]) != (data.class_counts, data.train.summary()):
            raise UsageError(f"{folder} was trained on other images than {row.dataset}'s", "another --data_dir, or run")
        home = self.home(row)
        target, copy = home / "out" / folder.resolve().parent.name / folder.resolve().name, home / "adopting"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("state-*"))
        write_text(copy / "finished.json", sealed({"result": file.metrics, "adopted": now()}))
        attempt = {"commit": file.provenance["commit"], "ended": file.provenance["date"], "status": 0}
        write_json(home / "row.json", {"amp": file.options["amp"], "adopted": True, "attempts": [attempt]})
        target.parent.mkdir(parents=True, exist_ok=True)
        copy.rename(target)
        return row.name

    def collect(self, row: Row, results: Path) -> str:
        """Copies the result of a row that is done into the repository; says what."""
        folder, notes = self.progress(row).folder, self.notes(row)
        assert folder is not None
        file, target = checkpoints.read(folder / "checkpoint.pt"), results / f"{row.name}.json"
        if read_json(target).get("checkpoint_sha256") == file.sha256:
            return "there already"
        file = without_places(file)
        about, attempts = file.provenance, notes["attempts"]
        shutil.copy(folder / "metrics.jsonl", results / f"{row.name}.jsonl")
        content = {
            "row": dataclasses.asdict(row),
            **scores(file.metrics),
            **{key: file.metrics.get(key) for key in ("ece", "temperature", "epoch", "select", "flip_tta")},
            "amp": notes["amp"],
            "seed": row.seed,
            "interruptions": sum(attempt.get("status") != 0 for attempt in attempts),
            "seconds": about["seconds"],
            "commits": list(dict.fromkeys(attempt["commit"] for attempt in attempts)),
            "cpus": list(dict.fromkeys(attempt["cpu"] for attempt in attempts if "cpu" in attempt)),
            "adopted": notes.get("adopted", False),
            "epochs": f"{row.name}.jsonl",
            "checkpoint_sha256": file.sha256,
            "options": file.options,
            "parent": file.parent,
            "provenance": about,
        }
        line = f"{percent(file.metrics['top1'])} %"
        if row.weights:
            path = results / f"{row.name}.pt"
            halved(file).save(path)
            words = ["--pretrained_pth", str(path), "--data_dir", self.data_dir, "--threads", str(self.threads)]
            with contextlib.redirect_stdout(io.StringIO()):
                report = evaluate.main(words)
            content["half"] = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
            content["half"] |= {**scores(report), "ece": report["ece"]}
            line += f", in half precision {percent(report['top1'])} %"
        write_json(target, content)
        return line


def without_places(file: checkpoints.Checkpoint) -> checkpoints.Checkpoint:
    """A checkpoint that does not say where on a machine things were."""
    places = ("out", "data_dir", "cache_dir", "pretrained_pth")
    options = {name: value for name, value in file.options.items() if name not in places}
    words = shlex.split(file.provenance["command"])
    named = [word for word, after in zip(words, [*words[1:], ""]) if "/" not in word and "/" not in after]
    parent = file.parent and file.parent | {"path": Path(file.parent["path"]).name}
    return dataclasses.replace(
        file, options=options, provenance=file.provenance | {"command": shlex.join(named)}, parent=parent
    )


def run_queue(argv: Sequence[str]) -> int:
    """Runs the command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only say how far each row is")
    parser.add_argument("--collect", action="store_true", help="only copy what is complete into --results")
    parser.add_argument("--adopt", type=Path, metavar="RUN_FOLDER", help="only take over a finished run of a row")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows, not all")
    parser.add_argument("--state", type=Path, default=Path(STATE), help=f"where everything is kept ({STATE})")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/reproduce", help="see --collect")
    parser.add_argument("--data_dir", default="data/", help="where CIFAR-100 is, or is downloaded to")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run (1)")
    arguments = parser.parse_args(argv)
    names, state = [row.name for row in ROWS], arguments.state.expanduser().resolve()
    unknown = sorted(set(arguments.only or ()) - set(names))
    if unknown:
        raise UsageError(f"--only {' '.join(unknown)}", ", ".join(names))
    if state.is_relative_to(ROOT):
        raise UsageError(f"--state {state}, inside the repository", "a folder outside of it")
    rows = [row for row in ROWS if row.name in (arguments.only or names)]
    queue = Queue(state, arguments.data_dir, arguments.threads)
    if arguments.adopt:
        print(f"{arguments.adopt} is {queue.adopt(arguments.adopt)} now")
    elif arguments.list:
        queue.show(rows)
    elif arguments.collect:
        arguments.results.mkdir(parents=True, exist_ok=True)
        for row in (row for row in rows if queue.progress(row).done):
            print(f"{row.name}: {queue.collect(row, arguments.results)}", flush=True)
    else:
        return queue.run(rows)
    return 0


def main() -> int:
    """Runs the command at low priority."""
    os.nice(NICE)
    return command(run_queue)()


if __name__ == "__main__":
    sys.exit(main())
