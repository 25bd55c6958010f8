"""Stage 1's settings, recipes and sweeps, through the command."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import in_float64

import compare
import datasets
import evaluate
import main_stage1
import main_stage2
from datasets import SAMPLERS, Batches
from engine import TrainStats, is_diverged
from losses import LOSSES
from main_stage1 import Options, train
from models import build_model
from training import recipe
from training.recipe import COMPILE_PAYS, make_batches, make_runs, resolve_auto
from utils import checkpoints, system
from utils.errors import UsageError
from utils.options import convert_typed, resolve, spec_of
from utils.resume import TrainState, state_files
from utils.run import Run

CPU = torch.device("cpu")
SHORT = ["--dataset", "digits", "--epochs", "2", "--device", "cpu"]
QUICK = [*SHORT, "--seed", "0"]
STAGE1 = Path("checkpoints/digits_exp100_resnet8_stage1.pt")


def runs(**options):
    specs = spec_of(Options)
    typed = {name: convert_typed(name, specs[name], value) for name, value in options.items()}
    return make_runs(resolve(Options, typed, {}), typed)


def test_the_product_of_all_values_and_nothing_twice() -> None:
    many = runs(seed=(0, 1), wd=(0.1, 0.2), loss=("ce", "focal"), label_smooth=(0.0, 0.1), focal_gamma=2.0)
    assert len(many) == 2 * 2 * (2 + 1)  # focal takes no label_smooth
    assert {run.label_smooth for run in many if run.loss == "focal"} == {0.0}
    assert {run.focal_gamma for run in many if run.loss == "ce"} == {None}
    assert {run.focal_gamma for run in many if run.loss == "focal"} == {2.0}
    [run] = runs(seed=3, loss="ldam", head="cosine", drw_epoch=160)
    assert (run.ldam_margin, run.cosine_scale, run.cb_beta) == (0.5, 30.0, 0.9999)
    assert (run.loss, run.wd, run.seed, run.head) == ("ldam", 5e-3, 3, "cosine")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"loss": "ldam"}, "--loss ldam --head cosine"),
        ({"drw_epoch": 1, "loss": ("ce", "lade")}, "--drw_epoch lade balanced-softmax"),
        ({"drw_epoch": 1, "loss": "class-balanced"}, "--drw_epoch class-balanced ldam"),
        ({"drw_epoch": 200}, "--drw_epoch 200 fewer"),
        ({"constraint_radius": 2.0}, "--constraint_radius l2"),
        ({"parallel": 2}, "--parallel 2 single"),
        ({"warmup_epochs": 5, "epochs": 5}, "--warmup_epochs 5 fewer"),
        ({"constraint": "l2", "head": "cosine"}, "--constraint l2 --head linear"),
        ({"la_tau": 2.0}, "--la_tau logit-adjustment"),
        ({"cb_beta": 0.5}, "--cb_beta --drw_epoch"),
        ({"cosine_scale": 5.0}, "--cosine_scale --head cosine"),
        ({"label_smooth": 0.1, "loss": "focal"}, "--label_smooth ce"),
        ({"mixup": -1.0}, "--mixup -1"),
        ({"aug": "blur"}, "--aug blur autoaugment"),
        ({"seed": (1, 1)}, "--seed 1 1 once"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        runs(**({"seed": 0} | options))
    assert all(word in str(caught.value) for word in words.split()), str(caught.value)


def test_auto_is_settled_by_device_and_length(monkeypatch) -> None:
    def on_cpu(images: int = 10, **options):
        done = resolve_auto([Options(**options)] * 6, CPU, images)[0]
        return done.amp, done.graph, done.compile, done.parallel

    assert on_cpu() == ("off", "off", "off", 1)
    monkeypatch.setattr("training.recipe.shutil.which", lambda name: "/usr/bin/g++")
    assert on_cpu(COMPILE_PAYS, network="resnet32", epochs=1) == ("off", "off", "auto", 1)
    assert on_cpu(COMPILE_PAYS, network="resnet34", epochs=1) == ("off", "off", "off", 1)
    assert on_cpu(COMPILE_PAYS - 1, network="resnet32", epochs=1)[2] == "off"
    assert on_cpu(COMPILE_PAYS, network="resnet32", compile="off")[2] == "off"
    assert on_cpu(COMPILE_PAYS, network="resnet32", parallel=2)[2:] == ("off", 2)
    monkeypatch.setattr("training.recipe.shutil.which", lambda name: None)
    assert on_cpu(COMPILE_PAYS, network="resnet32")[2] == "off"
    for wrong in ({"compile": "on"}, {"graph": "on"}, {"amp": "fp16"}, {"compile": "on", "parallel": 2}):
        with pytest.raises(UsageError):
            on_cpu(**wrong)
    monkeypatch.setattr(system, "cpu_has_bf16", lambda: True)
    assert on_cpu(amp="bf16")[0] == "bf16"
    monkeypatch.setattr(system, "cpu_has_bf16", lambda: False)
    with pytest.raises(UsageError, match="bf16: this CPU"):
        on_cpu(amp="bf16")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    on_gpu = resolve_auto([Options()] * 6, torch.device("cuda"), 10**9)[0]
    assert (on_gpu.amp, on_gpu.graph, on_gpu.compile, on_gpu.parallel) == ("bf16", "auto", "off", 4)


def test_threads_are_those_that_the_process_may_use(monkeypatch) -> None:
    set_to: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", set_to.append)
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    monkeypatch.setattr(system, "available_cpus", lambda: 3)
    system.pick_device("cpu")
    system.pick_device("cpu", threads=2)
    assert set_to == [3, 2]
    with pytest.raises(UsageError, match="--threads 4: more"):
        system.pick_device("cpu", threads=4)
    monkeypatch.undo()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8), raising=False)
    for quota, expected in (("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1)):
        monkeypatch.setattr(Path, "read_text", lambda self, quota=quota: quota)
        assert system.available_cpus() == expected


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_what_every_limit_leaves(version: int, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("5:cpu:/job/step\n4:memory:/job/step\n" if version == 1 else "0::/job/step\n")
    limit, used, cached = system.CGROUPS["memory" if version == 1 else ""]
    root = tmp_path / ("memory" if version == 1 else "")
    for folder, maximum, current in (("job", "1000", 700), ("job/step", "max", 500)):
        (root / folder).mkdir(parents=True)
        (root / folder / limit).write_text(f"{maximum}\n")
        (root / folder / used).write_text(f"{current}\n")
        (root / folder / "memory.stat").write_text(f"anon 9\n{cached[0]} 40\n{cached[1]} 60\n")
    assert system.left_in_cgroups(tmp_path, own) == [1000 - 700 + 100]
    assert 0 < system.free_memory(torch.device("cpu")) < 2**50


def test_a_sweep_is_the_runs_one_by_one(workdir, capsys) -> None:
    report = main_stage1.main([*SHORT, "--seed", "0", "1", "--wd", "0.001", "0.1"])
    said = capsys.readouterr().out
    folders = {path.parent.name: path for path in workdir.glob("output/*/*/*/checkpoint.pt")}
    assert set(folders) == {f"seed{seed}_wd{wd}" for seed in (0, 1) for wd in (0.001, 0.1)}
    [top] = {path.parent.parent for path in folders.values()}
    table = pd.read_csv(top / "sweep.csv")
    assert len(table) == 4 and {"seed", "wd", "test_top1", "test_few", "seconds"} <= set(table)
    assert (top / "wd.png").is_file() and (top / "options.json").is_file()
    for name, path in folders.items():
        file = checkpoints.read(path)
        row = table[(table.seed == file.options["seed"]) & (table.wd == file.options["wd"])]
        assert name == f"seed{file.options['seed']}_wd{file.options['wd']}"
        assert file.metrics["top1"] == pytest.approx(row.test_top1.item())
        assert {"curves.png", "metrics.jsonl", "log.txt", "per_class.csv"} <= {
            each.name for each in path.parent.iterdir()
        }
    means = table.groupby("wd").test_top1.mean()
    final = checkpoints.read(STAGE1)
    assert means[final.options["wd"]] == means.max() and final.options["seed"] == 0  # another may be as good
    assert report["top1"] == final.metrics["top1"]
    assert final.metrics["sweep"] == {"settings": 2, "chosen_on": "the TEST set"}
    assert "sorted and chosen by top-1 on the TEST set" in said and "±" in said
    assert said.count("saved checkpoints/") == 1 and not list(workdir.glob("checkpoints/*.prev"))
    evaluate.main(["--dataset", "digits"])
    assert "the best of 2 settings on the TEST set" in capsys.readouterr().out
    main_stage1.main([*SHORT, "--seed", "1", "--wd", "0.1"])
    alone, together = checkpoints.read(STAGE1).model, checkpoints.read(folders["seed1_wd0.1"]).model
    assert all(torch.equal(alone[name], together[name]) for name in alone)


@pytest.mark.parametrize("by", ["class_mean", "top1", "macro_f1"])
def test_the_epoch_and_the_run_are_chosen_by_the_same_figure(workdir, by: str, capsys) -> None:
    flags = f"--val_split 0.3 --select best_val --select_by {by} --eval_every 1 --lr 0.01 0.3 --seed 0"
    main_stage1.main([*SHORT, *flags.split()])
    final, best = checkpoints.read(STAGE1), {}
    for path in workdir.glob("output/*/*/*/metrics.jsonl"):
        scores = [json.loads(line)[f"val_{by}"] for line in path.read_text().splitlines()]
        best[checkpoints.read(path.with_name("checkpoint.pt")).options["lr"]] = max(scores)
        assert scores[checkpoints.read(path.with_name("checkpoint.pt")).metrics["epoch"] - 1] == max(scores)
    assert best[final.options["lr"]] == max(best.values())
    assert (final.metrics["select"], final.metrics["select_by"]) == ("best_val", by)
    words = {"class_mean": "class mean", "top1": "top-1", "macro_f1": "macro-F1"}[by]
    assert f"sorted and chosen by {words} on held-out images" in capsys.readouterr().out


def test_seeds_alone_choose_nothing_and_hold_out_their_own(workdir, capsys) -> None:
    main_stage1.main([*SHORT, "--seed", "3", "4", "--val_split", "0.2"])
    files = [checkpoints.read(path) for path in sorted(workdir.glob("output/*/*/*/checkpoint.pt"))]
    assert files[0].data["val_indices"] != files[1].data["val_indices"]
    final = checkpoints.read(STAGE1)
    assert final.options["seed"] == 3 and "sweep" not in final.metrics
    assert "nothing was chosen" in capsys.readouterr().out


def test_runs_side_by_side_are_the_runs_one_by_one(workdir) -> None:
    found = []
    for parallel in ("1", "3"):
        main_stage1.main([*QUICK, "--wd", "0.001", "0.01", "0.1", "--parallel", parallel, "--out", parallel])
        paths = sorted(workdir.glob(f"{parallel}/*/*/*/checkpoint.pt"))
        found.append([checkpoints.read(path).model for path in paths])
    for one, other in zip(*found):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(found[0][0]["fc.weight"], found[0][1]["fc.weight"])


def test_the_images_of_a_step_without_a_finite_loss_are_noted(workdir, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main_stage1.main([*QUICK, "--lr", "1e30"])
    (path,) = Path("output").rglob("diverged.json")
    noted = json.loads(path.read_text())
    assert stop.value.code == 1 and noted["epoch"] == 1 and "its images are in diverged.json" in capsys.readouterr().out
    options = runs(dataset="digits", epochs=2, network="resnet8", seed=0)[0]
    data = datasets.load("digits", "")
    order = make_batches(options, data, CPU).draws(0).order
    first = (noted["step"] - 1) * options.batch_size
    assert noted["images"] == data.train.indices[order[first : first + options.batch_size]].tolist()


def test_a_loss_that_rises_a_thousandfold_is_divergence_though_finite(workdir, monkeypatch, capsys) -> None:
    monkeypatch.setattr("main_stage1.train_epoch", lambda *arguments: TrainStats(1e31, 0.1, 2.5))
    with pytest.raises(SystemExit) as stop:
        main_stage1.main(QUICK)
    assert stop.value.code == 1 and "the loss has risen from 2.5 to 1e+31 in epoch 1" in capsys.readouterr().err
    assert not STAGE1.exists()
    found = [is_diverged(TrainStats(loss, 0.0, 1.0), 100) for loss in (0, 4600, 4700, math.nan, math.inf, -math.inf)]
    assert found == [False, False, True, True, True, True]
    assert not is_diverged(TrainStats(4700.0, 0.0, 10.0), 100)


def test_an_average_that_cannot_leave_the_start_is_announced(workdir, capsys) -> None:
    main_stage1.main([*QUICK, "--ema", "0.9"])
    assert "note:" not in capsys.readouterr().out.partition("test top-1")[0]
    main_stage1.main([*QUICK, "--ema", "0.99999"])
    assert "note: --ema 0.99999 over 10 steps: the average stays near the initial" in capsys.readouterr().out


def test_a_flag_that_comes_twice_is_announced(workdir, capsys) -> None:
    main_stage1.main([*QUICK, "--epochs", "1", "--nesterov", "--no-nesterov"])
    said = capsys.readouterr().out
    assert "--epochs is given twice: 1 counts" in said
    assert "--no-nesterov beside its opposite: --no-nesterov counts" in said


def test_a_run_that_diverges_does_not_end_a_sweep(workdir, capsys) -> None:
    main_stage1.main([*QUICK, "--lr", "0.05", "1e25"])
    said = capsys.readouterr().out
    assert "diverged in epoch 1: ce seed 0 lr 1e+25\n" in said and "of epoch 1" in said
    assert "sorted and chosen" in said and checkpoints.read(STAGE1).metrics["sweep"]["settings"] == 2
    assert checkpoints.read(STAGE1).options["lr"] == 0.05
    with pytest.raises(SystemExit) as stop:
        main_stage1.main([*QUICK, "--lr", "1e24", "1e25"])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "in 2 of 2 runs" in error and "a lower --lr" in error
    assert len(list(workdir.glob("output/*/*/sweep.csv"))) == 2


@pytest.mark.parametrize("parallel", [1, 2])
def test_an_interrupted_sweep_ends(workdir, monkeypatch, parallel: int) -> None:
    begun: list[int] = []
    epoch_of = Batches.epoch

    def epoch(self, number=0, first=0):
        if self.augment and number == 1:
            begun.append(number)
            raise KeyboardInterrupt
        return epoch_of(self, number, first)

    monkeypatch.setattr(Batches, "epoch", epoch)
    before = set(threading.enumerate())
    with pytest.raises(SystemExit) as stop:
        main_stage1.main([*QUICK, "--wd", "0", "0.1", "0.2", "0.3", "--parallel", str(parallel)])
    assert stop.value.code == 130 and len(begun) <= parallel and not STAGE1.exists()
    assert list(workdir.glob("output/*/*/sweep.csv"))
    assert not [thread.name for thread in set(threading.enumerate()) - before]


RECIPES = {
    "aug": "--aug cutout",
    "policies": "--aug autoaugment+cutout",
    "mixup": "--mixup 0.2",
    "cutmix": "--cutmix 1",
    "ema": "--ema 0.5",
    "warmup": "--warmup_epochs 1",
    "sampler": "--sampler class",
    "progressive": "--sampler progressive",
    "momentum": "--momentum 0.8",
    "nesterov": "--nesterov",
    "label_smooth": "--label_smooth 0.1",
    "smooth and balanced": "--loss class-balanced --label_smooth 0.1",
    "cosine": "--head cosine",
    "ldam-drw": "--loss ldam --head cosine --drw_epoch 1",
    "ce-drw": "--drw_epoch 1",
    "ce-drw beta": "--drw_epoch 1 --cb_beta 0.9",
    **({"bf16": "--amp bf16"} if system.cpu_has_bf16() else {}),
    "maxnorm": "--constraint maxnorm --constraint_radius 0.3",
    "l2": "--constraint l2",
    **{f"loss {name}": f"--loss {name}" for name in LOSSES if name not in ("ce", "ldam", "logit-adjustment")},
    "logit-adjustment": "--loss logit-adjustment --la_tau 2",  # with 1 it is balanced softmax
}


def test_every_recipe_changes_the_result_and_chains(workdir) -> None:
    main_stage1.main(QUICK)
    seen = {"plain": checkpoints.read(STAGE1).model}
    for name, flags in RECIPES.items():
        report = main_stage1.main([*QUICK, *flags.split()])
        file = checkpoints.read(STAGE1)
        shared = "layer3.0.conv2.weight"
        assert all(not torch.equal(file.model[shared], other[shared]) for other in seen.values()), name
        seen[name] = file.model
        assert evaluate.main(["--dataset", "digits"])["top1"] == report["top1"], name
    norms = [seen[name]["fc.weight"].norm(dim=1) for name in ("maxnorm", "l2")]
    assert (norms[0] <= 0.3 + 1e-6).all() and torch.allclose(norms[1], torch.tensor(1.0))


@in_float64()
def test_deferred_weights_begin_where_they_should(workdir) -> None:
    def weights(flags: str) -> torch.Tensor:
        main_stage1.main([*QUICK, *flags.split()])
        return checkpoints.read(STAGE1).model["fc.weight"]

    from_the_start = weights("--drw_epoch 0")
    assert torch.allclose(from_the_start, weights("--loss class-balanced"), atol=1e-9)
    assert not torch.allclose(from_the_start, weights("--drw_epoch 1"), atol=1e-3)


def test_a_cosine_head_goes_through_both_stages(workdir, capsys) -> None:
    main_stage1.main([*QUICK, "--head", "cosine", "--cosine_scale", "16"])
    file = checkpoints.read(STAGE1)
    assert file.head == "cosine" and file.model["fc.scale"] == 16 and "fc.bias" not in file.model
    one = evaluate.main(["--dataset", "digits"])
    with pytest.raises(SystemExit):
        main_stage2.main(["--dataset", "digits"])
    error = capsys.readouterr().err
    assert "los" in error and "cosine head" in error and "allowed: joint crt ncm ldam cosine" in error
    main_stage2.main(["--dataset", "digits", "--method", "joint", "--seed", "0"])
    assert evaluate.main(["--dataset", "digits", "--cur_stage", "stage2"])["per_class"] == one["per_class"]
    main_stage2.main(["--dataset", "digits", "--method", "crt", "ldam", "--finetune_epoch", "2", "--seed", "0"])
    rows = compare.main(["--dataset", "digits", "--finetune_epoch", "2", "--finetune_scope", "fc", "--seed", "0"])
    assert {row["method"] for row in rows} == {"joint", "crt", "ncm", "ldam", "cosine"}
    with pytest.raises(SystemExit):
        main_stage1.main([*QUICK, "--pretrained_pth", str(STAGE1)])
    assert "has a cosine head" in capsys.readouterr().err
    main_stage1.main([*QUICK, "--pretrained_pth", str(STAGE1), "--head", "cosine"])


def test_the_network_follows_from_the_seed_alone(workdir) -> None:
    run = Run(workdir)
    data = main_stage1.load_data(Options(dataset="digits"))
    [one] = runs(seed=5, dataset="digits", network="resnet8", epochs=1, wd=0.0, lr=1e-30, amp="off", graph="off")
    one = replace(one, compile="off")
    torch.manual_seed(99)
    with run:
        state = train(one, data, CPU, run, None).state
    torch.manual_seed(5)
    expected = build_model("resnet8", 10, 1).state_dict()
    trained = [name for name in expected if "running" not in name and "num_" not in name]
    assert not [name for name in trained if (state[name] - expected[name]).abs().max() > 1e-20]
    assert json.loads((workdir / "metrics.jsonl").read_text())["epoch"] == 1


def test_a_stopped_sweep_stops_within_an_epoch(workdir) -> None:
    run = Run(workdir)
    with run, run.child("one") as child:
        state = TrainState(child, CPU, None, 1, {})
        with pytest.raises(KeyboardInterrupt), state.training(""):
            state.advance(torch.tensor(1.0))
            run.stopped.set()
            state.advance(torch.tensor(2.0))
        assert [path.name for path in state_files(child.folder)] == ["state-000001.pt"]


def test_values_that_are_nearly_equal_stay_apart(workdir, capsys) -> None:
    main_stage1.main([*QUICK, "--ema", "0.999999", "0.9999999"])
    said = capsys.readouterr().out
    assert {path.parent.name for path in workdir.glob("output/*/*/*/log.txt")} == {
        "seed0_ema0.999999",
        "seed0_ema0.9999999",
    }
    assert said.count("  ce  0.999999 ") == 1


def test_files_made_from_a_chosen_one_say_so(workdir, capsys) -> None:
    main_stage1.main([*QUICK, "--wd", "0", "0.1", "--select", "best_test"])
    main_stage2.main("--dataset digits --seed 0 --finetune_epoch 1".split())
    words = "began from checkpoints/digits_exp100_resnet8_stage1.pt: epoch"
    for _ in range(2):
        said = capsys.readouterr().out
        assert (
            words in said and "the best on the TEST set; the best of 2 settings on the TEST set" in said.split(words)[1]
        )
        evaluate.main(["--dataset", "digits", "--cur_stage", "stage2"])


def test_classes_that_are_balanced_twice_are_said(workdir, capsys) -> None:
    words = "note: classes are balanced twice, by the sampler and by the loss: "
    for flags, twice in (
        ("--sampler class", ""),
        ("--loss logit-adjustment", ""),
        ("--loss vs --sampler sqrt", "--loss vs with --sampler sqrt"),
        ("--drw_epoch 1 --sampler class", "--loss ce with --sampler class"),
    ):
        main_stage1.main([*QUICK, *flags.split()])
        said = capsys.readouterr().out
        assert f"{words}{twice}\n" in said if twice else "balanced twice" not in said
    wanted = "--dataset digits --seed 0 --views 0 --finetune_epoch 1 --sampler class --method"
    main_stage2.main([*wanted.split(), "los", "crt", "label-aware-smoothing", "vs", "ldam"])
    said = capsys.readouterr().out
    assert f"{words}vs with --sampler class, ldam with --sampler class\n" in said


def test_an_option_that_two_losses_share_has_the_default_of_each() -> None:
    found = {run.loss: (run.la_tau, run.vs_gamma) for run in runs(loss=("vs", "cdt", "logit-adjustment", "ce"))}
    assert found == {"vs": (1.2, 0.3), "cdt": (None, 0.2), "logit-adjustment": (1.0, None), "ce": (None, None)}
    assert {run.la_tau for run in runs(loss=("vs", "logit-adjustment"), la_tau=(0.7,))} == {0.7}


def test_the_loss_knows_the_images_that_are_trained_on(workdir) -> None:
    data = main_stage1.load_data(Options(dataset="digits"), val_fraction=0.3, val_seed=1)
    counts = data.trained_counts
    assert sum(counts) == len(data.train) < sum(data.class_counts) and counts[0] == int((data.train.labels == 0).sum())
    made: list[list[int]] = []
    original = recipe.make_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "make_loss", lambda name, n, values: made.append(n) or original(name, n, values))
        main_stage1.main([*SHORT, "--seed", "1", "--val_split", "0.3", "--loss", "balanced-softmax"])
    assert made and all(number == counts for number in made)


def test_batches_follow_the_seed_and_are_stage_1s_own() -> None:
    [one, other] = runs(dataset="digits", seed=(0, 1), sampler="progressive")
    data = main_stage1.load_data(Options(dataset="digits"))
    first, second = (make_batches(each, data, CPU) for each in (one, other))
    assert not torch.equal(first.draws(0).order, second.draws(0).order)
    assert first.seed == (0, 1) and first.epochs == 200 and first.sampler is SAMPLERS["progressive"]


def test_so_many_runs_at_a_time(monkeypatch) -> None:
    together, meeting = [], threading.Barrier(3, timeout=20)

    def task(item: int) -> int:
        meeting.wait()
        together.append(threading.active_count())
        return item * 10

    assert system.side_by_side(task, [1, 2, 3], 3, CPU, threading.Event()) == [10, 20, 30]
    assert len(together) == 3


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_runs_share_a_gpu(workdir) -> None:
    found = []
    for parallel in ("1", "3"):
        flags = (
            f"--dataset digits --epochs 3 --seed 0 1 2 --parallel {parallel} --out {parallel} --device cuda --amp off"
        )
        main_stage1.main(flags.split())
        paths = sorted(workdir.glob(f"{parallel}/*/*/*/checkpoint.pt"))
        found.append([checkpoints.read(path).model["fc.weight"] for path in paths])
    assert all((one - other).abs().max() < 1e-2 for one, other in zip(*found))
