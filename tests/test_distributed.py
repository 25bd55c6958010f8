"""Several processes against one: the same steps, samples, figures and files.

A crew of processes is started once and does all that needs more than one; the tests look at what each has found.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, in_float64
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

import compare
import evaluate
import main_stage1
import main_stage2
from benchmarks.faults import PRELOADED
from datasets import AUGMENTATIONS, SAMPLERS, Batches, Mix
from datasets.batches import Augment, own_rows
from engine import TrainStep, make_sgd, set_lr, train_epoch
from losses import LOSSES, make_loss, total_weight
from models import build_model
from retraining import features
from training.recipe import constraint
from utils import checkpoints, distributed
from utils.distributed import process_group, rank, world_size
from utils.errors import UsageError

CPU = torch.device("cpu")
COUNTS = [30, 15, 9, 5, 2]
LABELS = torch.arange(5).repeat_interleave(torch.tensor(COUNTS))
N, SIZE = len(LABELS), 16  # 61 images: three batches of 16 and one of 13
DIGITS = "--dataset digits --device cpu"
QUICK = f"{DIGITS} --epochs 2 --seed 0"
STAGE1 = Path("checkpoints/digits_exp100_resnet8_stage1.pt")


# What one process and several do alike.


def batches(share: tuple[int, int], sampler: str = "instance", **options: Any) -> Batches:
    images = torch.randint(256, (N, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = ((0.5,), (0.25,), CPU, Augment(1, False), (7, 1))
    return Batches(images, LABELS, SIZE, *pixels, SAMPLERS[sampler], 3, share=share, **options)


class Plain(nn.Module):
    """A network without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3, stride=2), nn.Linear(72, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(images).relu().flatten(1))


def plain() -> nn.Module:
    torch.manual_seed(3)
    return Plain().to(memory_format=torch.channels_last)


def frozen_statistics() -> nn.Module:
    torch.manual_seed(3)
    return build_model("resnet8", 5, 1).to(memory_format=torch.channels_last).eval()


CASES: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "ce": (plain, "ce", {"label_smooth": 0.1}),
    "weighted": (plain, "class-balanced", {}),
    "strongly weighted": (plain, "generalised-reweighting", {}),
    "weighted sum over all": (plain, "class-balanced-bce", {}),
    "eval mode": (frozen_statistics, "class-balanced", {}),
}


@in_float64()
def trained(case: str, accum: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights, averaged weights and momentum after three epochs, and what train_epoch says of each."""
    make, loss, values = CASES[case]
    model = make()
    optimizer = make_sgd(model.parameters(), 0.05, 0.9, 1e-3, nesterov=True)
    project = constraint(model.fc, "maxnorm", 0.5)
    step = TrainStep(model, make_loss(loss, COUNTS, values).double(), optimizer, ema=0.8, project=project, accum=accum)
    told: list[float] = []
    for epoch in range(3):
        set_lr(optimizer, 0.05 / (epoch + 1))
        told += train_epoch(step, batches((rank(), world_size()), "class").epoch(epoch), epoch, 0.05)
    momentum = [state["momentum_buffer"] for state in optimizer.state.values()]
    found = {**model.state_dict(), **{f"averaged {name}": v for name, v in step.averaged.state_dict().items()}}
    return found | {f"momentum {i}": value for i, value in enumerate(momentum)}, told


@in_float64()
def mixed(accum: int) -> torch.Tensor:
    """The classifier's weights after two steps on given blends of images."""
    model = plain()
    optimizer = make_sgd(model.parameters(), 0.05, 0.9, 0.0, nesterov=False)
    step = TrainStep(model, make_loss("class-balanced", COUNTS, {}).double(), optimizer, accum=accum)
    for images, labels in list(batches((0, 1)).epoch())[2:]:
        parts = (each.tensor_split(world_size())[rank()] for each in (images, labels, labels.roll(3)))
        step(*parts, torch.tensor(0.3))
    return model.fc.weight.detach()


def run(command: Callable[[list[str]], Any], arguments: str) -> dict[str, Any]:
    """What a command returns, prints and ends with."""
    out, error, status, result = io.StringIO(), io.StringIO(), 0, None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            result = command(arguments.split())
        except SystemExit as stop:
            status = stop.code
    return {"result": result, "out": out.getvalue(), "error": error.getvalue(), "status": status}


# What each process of a crew does, in a folder of its own.


def steps_and_weights(home: Path) -> Any:
    waits = []
    no_sync = DistributedDataParallel.no_sync
    DistributedDataParallel.no_sync = lambda self: waits.append(1) or no_sync(self)  # type: ignore[method-assign]
    with process_group():
        alike = {(case, accum): trained(case, accum) for case in CASES for accum in (1, 2)}
        return alike, {accum: mixed(accum) for accum in (1, 2)}, len(waits)


def commands(home: Path) -> Any:
    me = int(os.environ["RANK"])
    stored = home / STAGE1
    Path("mine.pt").symlink_to(stored if me == 0 else "nowhere")
    found = {flags: run(main_stage1.main, f"{DIGITS} {flags}") for flags in REFUSED}
    found["replay"] = run(main_stage2.main, f"{DIGITS} --features replay --pretrained_pth {stored}")
    flags = f"--pretrained_pth {stored} --device cpu --views 1 --finetune_epoch 1 --finetune_lr 1e30 --cache_dir alone"
    found["diverges alone"] = run(main_stage2.main, flags)
    found["diverges"] = run(main_stage1.main, f"{QUICK} --lr 1e20")
    found["everything"] = run(main_stage1.main, f"{QUICK} {EVERYTHING}")
    found["sweep"] = run(main_stage1.main, f"{DIGITS} --epochs 1 --lr 0.05 1e20")
    found["files"] = sorted(str(path) for path in Path().rglob("*") if path.is_file())
    return found


def evaluations(home: Path) -> Any:
    return run(evaluate.main, f"--pretrained_pth {home / STAGE1} --statistics train --json report.json")


def one_fails_amid_a_step(home: Path) -> Any:
    distributed.PATIENCE = timedelta(seconds=0.2)
    epoch_of = Batches.epoch

    def epoch(self: Batches, number: int = 0, first: int = 0) -> Any:
        for position, batch in enumerate(epoch_of(self, number, first)):
            if self.augment and position == 2 and self.share[0] == 1:
                raise UsageError("an image that cannot be read", "a whole one")
            yield batch

    Batches.epoch = epoch  # type: ignore[method-assign]
    return run(main_stage1.main, QUICK)


def stage2(home: Path) -> Any:
    """What the commands of stage 2 end with, and every file that they leave."""
    found = {name: run(command, arguments.format(home / STAGE1)) for name, (command, arguments) in STAGE2.items()}
    found["again"] = run(main_stage2.main, STAGE2["orbit"][1].format(home / STAGE1))
    files = [path for path in sorted(Path().rglob("*")) if path.is_file() and path.suffix != ".pkl"]
    found["cache"] = {str(path): path.read_bytes() for path in files if path.parts[0] == "cache"}
    found["heads"] = {str(path): checkpoints.read(path).model for path in files if path.match("checkpoints/*stage2.pt")}
    lines = [line for path in files if path.name == "results.jsonl" for line in path.read_text().splitlines()[1:]]
    found["lines"] = [{name: v for name, v in json.loads(line).items() if name != "seconds"} for line in lines]
    return found


def one_fails_amid_a_view(home: Path) -> Any:
    distributed.PATIENCE = timedelta(seconds=0.2)
    features_of = features.features_of

    def failing(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        if rank() == 1 and len(calls) == 4:
            raise UsageError("an image that cannot be read", "a whole one")
        calls.append(1)
        return features_of(model, images)

    calls: list[int] = []
    features.features_of = failing
    found = run(compare.main, f"--pretrained_pth {home / STAGE1} --device cpu --views 3 --cache_dir other --method crt")
    features.features_of = features_of
    return found | {"files": [path.name for path in Path("other").rglob("*")]}


STAGE2 = {
    "views": (
        compare.main,
        "--pretrained_pth {} --device cpu --views 3 --finetune_epoch 4 --feature_dtype bfloat16 "
        "--method ncm tau-norm crt los --finetune_scope fc last_block --seed 0",
    ),
    "orbit": (
        main_stage2.main,
        "--pretrained_pth {} --device cpu --features orbit --finetune_epoch 2 --seed 0 1 --select best_val",
    ),
}
REFUSED = {  # flags: words of the two lines
    "--sync_bn": "--sync_bn CPU --nproc-per-node",
    "--loss ce lade": "--loss lade 2 processes --accum 1",
    "--batch_size 101": "--batch_size 101 1 of 304 2 processes 100",  # 304 = 3 x 101 + 1
    "--batch_size 299 --accum 3": "--batch_size 299 5 of 304 --accum 3 298",  # a last batch of 5, for six parts
    "--graph on": "--graph on auto, off",
    "--compile on": "--compile on auto, off",
    "--parallel 2 --seed 0 1": "--parallel 2 processes",
    "--gpu 0 --device auto": "--gpu 0",
    "--threads 4096": "--threads 4096",
    "--pretrained_pth mine.pt": "no checkpoint mine.pt",  # it is there for the first process alone
}
EVERYTHING = (
    "--accum 2 --aug autoaugment+cutout --mixup 0.2 --cutmix 1 --ema 0.5 --val_split 0.1 --select best_val "
    "--constraint maxnorm --sampler progressive --loss balanced-softmax --drw_epoch 1"
)


def work(number: int, size: int, port: int, home: Path, tasks: list[Callable[[Path], Any]]) -> None:
    """One process of a crew: leaves what its tasks found in found.pkl."""
    torch.set_num_threads(1)
    distributed.GRACE = 0
    mine = home / f"of{size}" / str(number)
    mine.mkdir(parents=True)
    os.chdir(mine)
    ranks = {"RANK": number, "WORLD_SIZE": size, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": size}
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in (ranks | place).items()})
    rendezvous, starts = dist.rendezvous, iter(range(1000))

    def again(*arguments: Any, **options: Any) -> Any:
        store, *others = next(rendezvous(*arguments, **options))
        return iter([(dist.PrefixStore(f"start{next(starts)}", store), *others)])

    dist.rendezvous = again  # type: ignore[attr-defined]
    for task in tasks:
        Path(f"{task.__name__}.pkl").write_bytes(pickle.dumps(task(home)))


def crew(size: int, home: Path, *tasks: Callable[[Path], Any]) -> dict[str, list[Any]]:
    """{task: what each of so many processes has found}."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    start_processes(work, (size, store.port, home, list(tasks)), size, start_method="forkserver")
    return {
        task.__name__: [
            pickle.loads((home / f"of{size}" / str(number) / f"{task.__name__}.pkl").read_bytes())
            for number in range(size)
        ]
        for task in tasks
    }


@pytest.fixture(scope="module", autouse=True)
def imported_once() -> Iterator[None]:
    """The processes of all crews come from one that has done the imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        multiprocessing.set_forkserver_preload([__name__, *PRELOADED])
        forkserver.ensure_running()
    yield
    multiprocessing.set_forkserver_preload([])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that two processes of torchrun have made; what they printed is in train.txt."""
    folder = tmp_path_factory.mktemp("home")
    flags = f"{QUICK} --batch_size 67 --sampler sqrt --loss class-balanced --val_split 0.1".split()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(ROOT / "main_stage1.py"), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *script], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    (folder / "train.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def two(home: Path) -> dict[str, list[Any]]:
    return crew(2, home, steps_and_weights, commands, evaluations, stage2, one_fails_amid_a_step)


@pytest.fixture(scope="module")
def three(home: Path) -> dict[str, list[Any]]:
    return crew(3, home, steps_and_weights, evaluations, stage2, one_fails_amid_a_view)


# What is expected of them.


@pytest.mark.parametrize("case", CASES)
def test_parts_add_up_to_the_step_of_one_process(two, three, case: str) -> None:
    weights, told = trained(case, 1)
    alike = [trained(case, 2), trained(case, 4)]
    alike += [
        alike[case, accum] for crew in (two, three) for alike, *_ in crew["steps_and_weights"] for accum in (1, 2)
    ]
    for others, words in alike:
        for name, value in weights.items():
            assert (value.double() - others[name].double()).abs().max() < 1e-9, name
        assert words == pytest.approx(told, abs=1e-9) and words[1::3] == told[1::3]
    assert (weights["fc.weight"] - CASES[case][0]().fc.weight).abs().max() > 0.01


def test_processes_stay_equal_to_the_bit(three) -> None:
    first, *rest = (alike for alike, *_ in three["steps_and_weights"])
    for other in rest:
        for key, (weights, told) in first.items():
            assert told == other[key][1]
            for name, value in weights.items():
                assert torch.equal(value, other[key][0][name]), (key, name)


def test_processes_wait_for_each_other_once_a_step(two) -> None:
    assert [waits for *_, waits in two["steps_and_weights"]] == [len(CASES) * 12 + 2] * 2  # the first of two parts


def test_blended_images_add_up_too(two, three) -> None:
    expected = mixed(1)
    found = [
        mixed(3),
        *(blends[a] for crew in (two, three) for _, blends, _ in crew["steps_and_weights"] for a in (1, 2)),
    ]
    assert all((expected - other).abs().max() < 1e-9 for other in found)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "lade"])
def test_a_loss_is_the_mean_of_its_parts_by_weight(name: str) -> None:
    loss = make_loss(name, COUNTS, {})
    logits, labels = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), torch.arange(40).sqrt().long() % 5
    parts = list(zip(logits.split([20, 3, 17]), labels.split([20, 3, 17])))
    shares = torch.stack([total_weight(loss, part) for _, part in parts]) / total_weight(loss, labels)
    assert shares.sum() == pytest.approx(1)
    whole = sum(share * loss(*part) for share, part in zip(shares, parts))
    assert whole == pytest.approx(loss(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_parts_of_all_processes_are_the_epoch_step_by_step(sampler: str, number: int) -> None:
    for epoch in range(3):
        whole = list(batches((0, 1), sampler).epoch(epoch))
        parts = list(zip(*(batches((me, number), sampler).epoch(epoch) for me in range(number))))
        assert len(whole) == len(parts) == 4
        for (images, labels), step in zip(whole, parts):
            assert torch.equal(images, torch.cat([part[0] for part in step]))
            assert torch.equal(labels, torch.cat([part[1] for part in step]))
            sizes = [len(part[1]) for part in step]
            assert max(sizes) - min(sizes) <= 1


def test_rows_of_a_short_last_batch() -> None:
    rows = [own_rows(9, 4, (me, 3)) for me in range(3)]
    assert [[part.tolist() for part in mine] for mine in rows] == [
        [[0, 1], [4, 5], [8]],
        [[2], [6], []],
        [[3], [7], []],
    ]


def test_policies_and_blends_are_each_process_s_own() -> None:
    options = {"policy": AUGMENTATIONS["cutout"], "mix": Mix(1.0, 1.0)}
    kept = [[batch[3].item() for batch in batches((me, 2), **options).epoch()] for me in range(2)]
    assert len({*kept[0], *kept[1]}) == 8
    seeds = [batches(share)._stream(1, 2, 0).initial_seed() for share in ((0, 1), (0, 2), (1, 2))]
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize("number", [2, 3, 5])
def test_whole_batches_are_dealt_in_turn(number: int) -> None:
    images = torch.arange(22, dtype=torch.uint8).view(22, 1, 1, 1)
    whole, *parts = (
        list(Batches(images, torch.arange(22), 5, (0.0,), (1.0,), CPU, share=share).epoch())
        for share in [(0, 1), *((me, number) for me in range(number))]
    )
    for position, batch in enumerate(whole):
        theirs = parts[position % number][position // number]
        assert all(torch.equal(a, b) for a, b in zip(batch, theirs))
    assert sum(map(len, parts)) == len(whole) == 5


def test_torchrun_trains_writes_once_and_prints_once(home: Path) -> None:
    said = (home / "train.txt").read_text()
    [folder] = (home / "output/digits_exp100_resnet8_stage1").iterdir()
    assert (folder / "log.txt").read_text() == said and said.count("saved checkpoints/") == 1
    assert "on cpu, 1 thread in each of 2 processes" in said
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(list(folder.glob("events*"))) == 1
    made = checkpoints.read(home / STAGE1).provenance
    assert made["processes"] == 2
    assert made["command"].startswith("torchrun --nproc-per-node=2 -- main_stage1.py --dataset")


def test_every_number_of_processes_evaluates_alike(home: Path, two, three, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    [one] = [evaluations(home)]
    incidental = {"provenance", "checkpoint"}
    for crew in (two, three):
        for number, found in enumerate(crew["evaluations"]):
            assert found["status"] == 0, found
            for key in set(one["result"]) - incidental:
                assert found["result"][key] == one["result"][key], key
            assert found["out"] == (one["out"] if number == 0 else "")
    assert json.loads((home / "of3/0/report.json").read_text())["provenance"]["processes"] == 3
    assert not list(home.glob("of3/[12]/*.json"))
    assert "the same figures as in training" in one["out"] and one["result"]["temperature"] > 0


def test_what_several_processes_cannot_do_is_refused_once(two) -> None:
    first, second = two["commands"]
    for name, words in {**REFUSED, "replay": "--features replay 2 processes views, orbit"}.items():
        error = first[name]["error"]
        assert (first[name]["status"], second[name]["status"]) == (2, 2), (name, first[name], second[name])
        assert error.startswith("error: ") and len(error.splitlines()) == 2
        assert all(word in error for word in words.split()), (name, error)
        assert second[name]["error"] == second[name]["out"] == "", name


@pytest.mark.parametrize(
    "flags, words",
    [("--sync_bn", "--sync_bn one torchrun"), ("--loss lade --accum 2", "lade --accum 1"), ("--accum 5", "--accum 5")],
)
def test_what_one_process_cannot_do(workdir, capsys, flags: str, words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main_stage1.main(f"{QUICK} --batch_size 50 {flags}".split())  # 304 = 6 x 50 + 4
    error = capsys.readouterr().err
    assert stop.value.code == 2 and all(word in error for word in words.split())


def test_a_divergence_ends_all(two) -> None:
    first, second = (found["diverges"] for found in two["commands"])
    assert (first["status"], second["status"]) == (1, 1)
    assert "stopped: the loss is" in first["error"] and "lr 1e+20" in first["error"] and not second["error"]
    first, second = (found["diverges alone"] for found in two["commands"])
    assert (first["status"], second["status"]) == (1, 1), first
    assert first["error"].startswith("stopped: ") and not second["error"]


def test_recipes_and_sweeps_run_and_the_first_process_alone_writes(two) -> None:
    first, second = two["commands"]
    for name in ("everything", "sweep"):
        assert (first[name]["status"], second[name]["status"]) == (0, 0), first[name]["error"]
        assert first[name]["result"] == second[name]["result"] and first[name]["result"]["top1"] > 0
        assert not second[name]["out"]
    assert "sorted and chosen by top-1 on the TEST set" in first["sweep"]["out"]
    assert first["sweep"]["out"].count("diverged in epoch 1") == 1
    assert any(name.endswith("sweep.csv") for name in first["files"])
    assert [name for name in second["files"] if not name.endswith(".pkl")] == []


def test_an_error_amid_a_step_is_told_by_its_process_and_ends_the_others(two) -> None:
    first, second = two["one_fails_amid_a_step"]
    assert second["status"] == 2 and second["error"].startswith("error: an image that cannot be read")
    assert first["status"] == 1 and not first["error"]


def test_every_number_of_processes_makes_the_same_classifiers(home: Path, two, three, workdir) -> None:
    """Caches to the byte, weights and figures to the bit; the first process alone has files."""
    one = stage2(home)
    assert one["lines"] and len(one["cache"]) == 20 and one["heads"]
    for crew in (two, three):
        first, *others = crew["stage2"]
        assert all(first[name]["status"] == 0 for name in (*STAGE2, "again")), first
        assert first["cache"] == one["cache"] and first["lines"] == one["lines"]
        assert first["heads"].keys() == one["heads"].keys()
        for name, weights in one["heads"].items():
            assert all(torch.equal(value, first["heads"][name][key]) for key, value in weights.items()), name
        for other in others:
            assert all(other[name]["status"] == 0 and not other[name]["out"] for name in (*STAGE2, "again")), other
            assert not other["cache"] and not other["heads"] and not other["lines"]
        number = len(crew["stage2"])
        assert f"the first of {number} processes goes on alone" in first["views"]["out"]
        assert f"torchrun --nproc-per-node={number} -- compare.py" in first["views"]["out"]
        assert "9 passes over the backbone" in first["orbit"]["out"]
        assert "9 passes over the backbone" not in first["again"]["out"]


def test_an_error_amid_a_view_ends_all(three) -> None:
    first, second, third = three["one_fails_amid_a_view"]
    assert second["status"] == 2 and second["error"].startswith("error: an image that cannot be read")
    assert len(second["error"].splitlines()) == 2
    assert first["status"] == third["status"] == 1 and not first["error"] and not third["error"]
    assert "features.npy" in first["files"]  # of the test images, made before
    assert not [name for name in first["files"] if name.startswith("view") or name.endswith(".tmp")]


def test_accum_in_the_command_is_the_sum_of_its_parts(workdir) -> None:
    main_stage1.main(f"{QUICK} --batch_size 38 --accum 2".split())
    halves = checkpoints.read(STAGE1)
    main_stage1.main(f"{QUICK} --batch_size 38".split())
    whole = checkpoints.read(STAGE1)
    assert halves.options["accum"] == 2 and "accum" not in whole.provenance["command"]
    statistics = [file.model["bn1.num_batches_tracked"].item() for file in (halves, whole)]
    assert statistics == [32, 16]  # BatchNorm sees the parts
    assert 0 < (halves.model["conv1.weight"] - whole.model["conv1.weight"]).abs().max() < 0.5


def test_world_size_alone_is_a_mistake(workdir, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for variable in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(SystemExit) as stop:
        main_stage1.main(QUICK.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "WORLD_SIZE 2 without" in error and "torchrun" in error


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL and --sync_bn need two GPUs")
def test_two_gpus(workdir) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for flags in ("", "--sync_bn", "--accum 2 --amp off", "--amp fp16 --ema 0.5 --mixup 0.2"):
        arguments = ["--dataset", "digits", "--epochs", "2", "--seed", "0", *flags.split()]
        done = subprocess.run([*command, str(ROOT / "main_stage1.py"), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told = subprocess.run([*command, str(ROOT / "evaluate.py"), *arguments[:2]], capture_output=True, text=True)
        assert "the same figures as in training" in told.stdout, told.stderr
