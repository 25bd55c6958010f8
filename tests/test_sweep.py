"""Several values per flag: one pass, a sorted table, one saved classifier; and every method through the whole chain."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import in_float64
from torch import nn

import compare
import datasets
import evaluate
import main_stage1
import main_stage2
from datasets import Batches
from experiment.sweeps import Result, Setting, curves_over, rows_of
from losses.weighted import ClassBalancedBCE
from models import build_model
from retraining import features, solver
from retraining.methods import METHODS, Trained
from utils import checkpoints, metrics
from utils.metrics import GROUPS, calibration_error, fit_temperature, logit_statistics

STAGE1 = "--dataset digits --seed 0 --epochs 4"
QUICK = "--dataset digits --seed 0 --finetune_epoch 2 --views 2"
STAGE2 = "checkpoints/digits_exp100_resnet8_stage2.pt"


@pytest.fixture
def chain(workdir):
    main_stage1.main(STAGE1.split())
    return workdir


@pytest.fixture
def held_out(workdir):
    main_stage1.main([*STAGE1.split(), "--val_split", "0.3"])
    return workdir


def run_folder(name: str) -> Path:
    return max(Path("output", f"digits_exp100_resnet8_{name}").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def fails(script, arguments: str, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        script.main(arguments.split())
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_every_method_through_the_chain(chain, method: str) -> None:
    short = " --finetune_epoch 2 --views 2" if issubclass(METHODS[method], Trained) else ""
    main_stage2.main(f"--dataset digits --seed 0 --method {method}{short}".split())
    file = checkpoints.read(STAGE2)
    result = evaluate.main(["--dataset", "digits"])
    assert file.options["method"] == method and file.head in ("linear", "cosine", "prototypes", "disalign")
    assert result["top1"] == file.metrics["top1"]
    assert [row["accuracy"] for row in result["per_class"]] == file.metrics["per_class"]
    own = set(METHODS[method].options())
    for name in own:
        assert file.options[name] is not None, name
    for name in {"tau", "la_tau", "focal_gamma", "ncm_metric"} - own:
        assert file.options[name] is None


def test_a_sweep_trains_the_product_on_one_pass(chain, capsys, monkeypatch) -> None:
    passes = []
    monkeypatch.setattr(features, "features_of", lambda m, x, f=features.features_of: passes.append(len(x)) or f(m, x))
    report = main_stage2.main(f"{QUICK} --seed 0 1 2 --label_smooth 0 0.5 0.9 --finetune_lr 0.01 0.1".split())
    printed = capsys.readouterr().out
    assert sum(passes) == 2 * 304 + 500  # two views and the test set, whatever the number of settings
    table = pd.read_csv(run_folder("stage2") / "sweep.csv")
    assert len(table) == 18 and set(table["label_smooth"]) == {0, 0.5, 0.9} and set(table["seed"]) == {0, 1, 2}
    rows = [line.split() for line in printed.splitlines() if line.strip().startswith("los ")]
    assert len(rows) == 6
    means = table.groupby(["finetune_lr", "label_smooth"])["test_top1"].agg(["mean", "std"]).reset_index()
    means = means.sort_values("mean", ascending=False)
    assert [float(row[4]) for row in rows] == pytest.approx((100 * means["mean"]).round(2).tolist(), abs=0.011)
    assert "chosen by top-1 on the TEST set" in printed
    file = checkpoints.read(STAGE2)
    options = [file.options[name] for name in ("finetune_lr", "label_smooth")]
    [chosen] = (row for row in means.itertuples() if [row.finetune_lr, row.label_smooth] == options)
    assert chosen.mean == means["mean"].max()  # another may be as good
    assert float(rows[0][6]) == pytest.approx(100 * chosen.std, abs=0.011)
    assert file.options["seed"] == 0 and file.metrics["top1"] == report["top1"]
    assert (run_folder("stage2") / "label_smooth.png").read_bytes().startswith(b"\x89PNG")
    assert evaluate.main(["--dataset", "digits"])["top1"] == report["top1"]


def test_one_setting_alone_is_the_same_as_in_a_sweep(chain) -> None:
    main_stage2.main(f"{QUICK} --label_smooth 0.3".split())
    alone = checkpoints.read(STAGE2)
    main_stage2.main(f"{QUICK} --label_smooth 0.3 0.6 --method los crt focal --seed 0 1".split())
    table = pd.read_csv(run_folder("stage2") / "sweep.csv")
    row = table[(table["method"] == "los") & (table["label_smooth"] == 0.3) & (table["seed"] == 0)]
    assert row["test_top1"].tolist() == [alone.metrics["top1"]]


def test_heads_that_do_not_fit_into_memory_take_turns(chain, capsys, monkeypatch) -> None:
    monkeypatch.setattr(solver, "CPU_CHUNK", 1)  # products of the same heads, so that bits can be compared
    flags = "--label_smooth 0 0.2 0.4 0.6 --method los crt"
    stored = []
    for free in (2**33, 160_000):
        monkeypatch.setattr(solver, "free_memory", lambda _, free=free: free)
        monkeypatch.setattr(solver, "WINDOW_BYTES", 2**16)
        main_stage2.main(f"{QUICK} {flags}".split())
        stored.append((checkpoints.read(STAGE2), pd.read_csv(run_folder("stage2") / "sweep.csv")))
        printed = capsys.readouterr().out
        message = "4 heads of 10 x 64: 3 fit in memory at a time, 2 passes"
        assert printed.count(message) == (0 if free == 2**33 else 2)
    (one, all_at_once), (other, in_turns) = stored
    assert all(torch.equal(value, other.model[name]) for name, value in one.model.items())
    assert all_at_once.drop(columns="seconds").equals(in_turns.drop(columns="seconds"))
    monkeypatch.setattr(solver, "free_memory", lambda _: 100_000)
    message = fails(main_stage2, f"{QUICK} {flags}", capsys)
    assert "4 heads of 10 x 64 need 0 MB of cpu memory one by one" in message


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_features_may_be_stored_small(chain, dtype: str) -> None:
    main_stage2.main(f"{QUICK} --method los ncm --feature_dtype {dtype} --finetune_lr 0.1".split())
    file = checkpoints.read(STAGE2)
    assert file.options["feature_dtype"] == dtype
    assert evaluate.main(["--dataset", "digits"])["top1"] == file.metrics["top1"]
    assert {np.load(path, mmap_mode="r").dtype.itemsize for path in Path("cache").rglob("view_*.npy")} == {2}


def test_figures_in_blocks_are_those_of_the_whole(held_out, monkeypatch) -> None:
    flags = "--dataset digits --seed 0 --finetune_epoch 2 --views 1 --finetune_scope fc --method los ncm joint"
    lines = []
    for size in (2**26, 4 * 10 * 50):
        for module in (features, metrics):
            monkeypatch.setattr(module, "LOGIT_BYTES", size)
        compare.main(flags.split())
        lines.append([json.loads(line) for line in (run_folder("compare") / "results.jsonl").read_text().splitlines()])
    for whole, blocks in zip(*(found[1:] for found in lines)):
        for name in ("top1", "top5", "ece", "per_class", "macro_f1", "weight_norm"):
            assert whole[name] == blocks[name], name
        for name in ("logits_magnitude", "rsd", "rsd_row", "temperature", "ece_calibrated"):
            assert whole[name] == pytest.approx(blocks[name], rel=1e-5), name


def test_the_winner_is_chosen_on_held_out_images_where_there_are_any(held_out, capsys) -> None:
    main_stage2.main(f"{QUICK} --method los crt tau-norm --label_smooth 0 0.9".split())
    printed = capsys.readouterr().out
    table = pd.read_csv(run_folder("stage2") / "sweep.csv")
    assert "chosen by class mean on held-out images" in printed and "TEST" not in printed
    file = checkpoints.read(STAGE2)
    best = table[table["val_class_mean"] == table["val_class_mean"].max()]  # several may be as good
    assert (file.options["method"], file.metrics["top1"]) in set(zip(best["method"], best["test_top1"]))
    assert [line for line in printed.splitlines() if " val " in line]


def test_val_chooses_what_a_sweep_of_its_grid_does(held_out, capsys) -> None:
    flags = f"{QUICK} --seed 0 1 --method los crt --sampler class --select_by macro_f1"
    main_stage2.main(f"{flags} --label_smooth val --finetune_lr val".split())
    said, chosen = capsys.readouterr().out, checkpoints.read(STAGE2)
    grid, tables = pd.read_csv(run_folder("stage2") / "sweep.csv"), []
    assert grid.groupby("method").size().to_dict() == {"los": 2 * 5 * 7, "crt": 2 * 5 * 7}
    for name in ("finetune_lr", "label_smooth"):
        values = sorted(set(grid[name]))
        tables.append(" ".join(map(str, values)))
        assert [line for line in said.splitlines() if line.startswith(f"--{name} val: ") and "by macro-F1" in line]
    assert len([line for line in said.splitlines() if line.strip().startswith(("los ", "crt "))]) == 2
    main_stage2.main(f"{flags} --finetune_lr {tables[0]} --label_smooth {tables[1]}".split())
    explicit, means = (
        checkpoints.read(STAGE2),
        grid.groupby(["method", "finetune_lr", "label_smooth"]).val_macro_f1.mean(),
    )
    picked = [
        tuple(file.options[name] for name in ("method", "finetune_lr", "label_smooth")) for file in (chosen, explicit)
    ]
    assert [means[each] for each in picked] == [means.max()] * 2  # several may be as good
    assert isinstance(chosen.options["label_smooth"], float) and chosen.options["seed"] == 0
    assert chosen.metrics["sweep"] == explicit.metrics["sweep"] == {"settings": 70, "chosen_on": "held-out images"}
    evaluate.main(["--dataset", "digits"])
    assert "the best of 70 settings on held-out images by macro-F1" in capsys.readouterr().out


def test_val_keeps_what_else_is_swept_apart(held_out) -> None:
    main_stage2.main(f"{QUICK} --method maxnorm --label_smooth val 0.3 --finetune_wd 0 0.1".split())
    log, table = (run_folder("stage2") / "log.txt").read_text(), pd.read_csv(run_folder("stage2") / "sweep.csv")
    assert len(table) == 2 * 8 and set(table["cb_form"]) == {"bce", "ce"}  # d = 0 keeps the form that maxnorm has
    rows = [line.split() for line in log.splitlines() if line.startswith("maxnorm ")]
    assert len(rows) == 2 and {row[1] for row in rows} == {"0", "0.1"}
    best = table.groupby("finetune_wd").val_class_mean.max()
    assert [row[5] for row in rows] == [f"{100 * best[float(row[1])]:.2f}" for row in rows]


def test_compare_chooses_by_val_with_the_backbone_frozen(held_out, capsys) -> None:
    rows = compare.main(f"{QUICK} --seed 0 1 --method los crt joint --label_smooth val --select_by top1".split())
    printed, folder = capsys.readouterr().out, run_folder("compare")
    assert sorted(row["row"].split(" label")[0] for row in rows) == ["crt", "crt", "crt", "joint", "los"]
    assert [row["val_top1"] for row in rows] == sorted((row["val_top1"] for row in rows), reverse=True)
    table = pd.read_csv(folder / "sweep.csv")
    means = table[table["finetune_scope"] != "all"].groupby(["method", "label_smooth"]).val_top1.mean()
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()[1:]]
    [los] = [row for row in rows if row["method"] == "los"]
    assert los["val_top1"] == means["los", los["label_smooth"]] == means["los"].max()
    assert {line["label_smooth"] for line in lines if line["method"] == "los"} == {los["label_smooth"]}
    beyond = table[table["finetune_scope"].isin(["last_block", "all"])]
    assert len(beyond) == 4 and set(beyond["label_smooth"]) == {0}
    assert "sorted by top-1 on held-out images" in printed and f"--label_smooth {rows[0]['label_smooth']}" in printed


@pytest.mark.parametrize("script", [main_stage2, compare])
def test_val_shows_its_settings_beforehand(chain, script, capsys) -> None:
    script.main("--dataset digits --method los --label_smooth val --print_options".split())
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("  los ")]) == 7


@pytest.mark.parametrize("source", ["views", "replay"])
@pytest.mark.parametrize("scope", ["last_block", "all"])
def test_the_backbone_may_be_trained_too(chain, scope: str, source: str) -> None:
    main_stage2.main(
        f"--dataset digits --seed 0 --finetune_epoch 2 --features {source} --finetune_scope {scope}".split()
    )
    before, after = checkpoints.read("checkpoints/digits_exp100_resnet8_stage1.pt").model, checkpoints.read(STAGE2)
    changed = {name.rsplit(".", 1)[0] for name in before if not torch.equal(before[name], after.model[name])}
    trained = {name for name in changed if not name.endswith(("bn1", "bn2"))}
    assert "fc" in trained and "layer3.0.conv2" in trained
    assert ("conv1" in trained) == (scope == "all")
    assert ("bn1" in changed) == (scope == "all" or source == "replay")
    assert evaluate.main(["--dataset", "digits"])["top1"] == after.metrics["top1"]


def literal_network(start: dict, scope: str, epochs: int, lr: float, wd: float, loss_of, project=None) -> dict:
    """The ordinary loop written out, for --finetune_scope beyond fc: seed 0, batch 64, digits, ce's sampler."""
    data = datasets.load("digits", "")
    model = build_model("resnet8", 10, 1)
    model.load_state_dict(start)
    trained = model if scope == "all" else nn.ModuleList([model.layer3[-1], model.fc])
    model.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(trained.requires_grad_(True).parameters(), lr, momentum=0.9, weight_decay=wd)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    pixels = (data.train.images, data.train.labels, 64, data.spec.mean, data.spec.std, torch.device("cpu"))
    for epoch in range(epochs):
        trained.train()
        for images, labels in Batches(*pixels, data.spec.augment, (0, 2)).epoch(epoch):
            optimizer.zero_grad()
            loss_of(epoch)(model(images), labels).backward()
            optimizer.step()
        schedule.step()
        if project:
            project(model.fc)
    return model.state_dict()


@pytest.mark.parametrize("scope", ["last_block", "all"])
@in_float64()
def test_beyond_fc_it_is_the_ordinary_loop(chain, scope: str) -> None:
    flags = "--method ce --label_smooth 0.3 --finetune_epoch 3 --finetune_lr 0.02 --finetune_wd 0.01"
    main_stage2.main(f"--dataset digits --seed 0 {flags} --finetune_scope {scope}".split())
    start = checkpoints.read("checkpoints/digits_exp100_resnet8_stage1.pt").model
    expected = literal_network(start, scope, 3, 0.02, 0.01, lambda _: nn.CrossEntropyLoss(label_smoothing=0.3))
    for name, value in checkpoints.read(STAGE2).model.items():
        assert (value - expected[name]).abs().max() < 1e-9, name


@in_float64()
def test_beyond_fc_losses_change_and_heads_are_projected(chain) -> None:
    common = "--dataset digits --seed 0 --finetune_epoch 4 --finetune_lr 0.02 --finetune_wd 0.01 --finetune_scope all"
    start = checkpoints.read("checkpoints/digits_exp100_resnet8_stage1.pt").model
    main_stage2.main(f"{common} --method maxnorm --maxnorm_radius 0.5".split())
    counts = datasets.load("digits", "").class_counts

    def project(fc: nn.Linear) -> None:
        fc.weight.data.mul_((0.5 / fc.weight.data.norm(dim=1, keepdim=True)).clamp(max=1))

    expected = literal_network(start, "all", 4, 0.02, 0.01, lambda _: ClassBalancedBCE(counts), project)
    for name, value in checkpoints.read(STAGE2).model.items():
        assert (value - expected[name]).abs().max() < 1e-9, name


def test_weights_are_deferred_in_every_scope(chain) -> None:
    common = "--dataset digits --seed 0 --finetune_epoch 4 --finetune_lr 0.02 --finetune_wd 0.01"
    norms = {}
    for scope in ("fc", "all"):
        for drw in ("0.5", "1"):
            main_stage2.main(f"{common} --finetune_scope {scope} --method ldam --drw {drw}".split())
            norms[scope, drw] = checkpoints.read(STAGE2).model["fc.weight"]
        assert not torch.equal(norms[scope, "0.5"], norms[scope, "1"])


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_maxnorm_holds_after_training(chain, every: str) -> None:
    main_stage2.main(f"{QUICK} --method maxnorm --maxnorm_radius 0.3 --maxnorm_every {every}".split())
    weight = checkpoints.read(STAGE2).model["fc.weight"]
    assert weight.norm(dim=1).max() < 0.3 + 1e-6 and weight.norm(dim=1).min() > 0.1


@pytest.mark.parametrize("every, calls", [("step", 2 * 5), ("epoch", 2)])
def test_maxnorm_projects_when_it_is_asked_to(chain, every: str, calls: int, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(METHODS["maxnorm"], "project", lambda *_: made.append(1))
    main_stage2.main(f"{QUICK} --method maxnorm --maxnorm_every {every}".split())
    assert calls <= len(made) <= calls + 2  # 304 images are five steps; the end of an epoch may project again


@pytest.mark.parametrize("source", ["views", "replay"])
def test_the_stored_head_is_that_of_the_selected_epoch(chain, source: str) -> None:
    """A learning rate so high that the best epoch is not always the last; which runs do so depends on the CPU."""
    flags = f"--finetune_epoch 6 --finetune_lr 3 --select best_test --eval_every 1 --features {source}"
    for seed, method in product(range(4, 14), ("los", "lws")):
        main_stage2.main(f"--dataset digits --seed {seed} --method {method} {flags}".split())
        file = checkpoints.read(STAGE2)
        if file.metrics["epoch"] < 6:
            break
    assert file.metrics["epoch"] < 6
    result = evaluate.main(["--dataset", "digits"])
    assert result["top1"] == file.metrics["top1"] and result["ece"] == file.metrics["ece"]
    records = [json.loads(line) for line in (run_folder("stage2") / "metrics.jsonl").read_text().splitlines()]
    assert max(record["test_top1"] for record in records) == file.metrics["top1"] > records[-1]["test_top1"]


def test_what_is_logged(chain) -> None:
    main_stage2.main(f"{QUICK} --finetune_lr 0.04 --finetune_wd 0.3".split())
    records = [json.loads(line) for line in (run_folder("stage2") / "metrics.jsonl").read_text().splitlines()]
    assert [record["lr"] for record in records] == pytest.approx([0.04, 0.02])
    table_flags = "--method los focal ncm crt --finetune_scope fc --seed 0 1"
    main_stage2.main(f"{QUICK} {table_flags}".split())
    assert (pd.read_csv(run_folder("stage2") / "sweep.csv")["seconds"] > 0).all()


def test_the_curve_keeps_the_best_row_and_rows_need_all_their_seeds() -> None:
    def result(d: float, lr: float, seed: int, top1: float, diverged: int | None = None) -> Result:
        made = Result(Setting("los", {"seed": seed, "finetune_lr": lr, "label_smooth": d}), "last")
        groups = {group: {"accuracy": top1} for group in GROUPS}
        made.selection.test, made.diverged = {"top1": top1, "groups": groups}, diverged
        return made

    results = [result(d, lr, seed, d / 2 + lr + seed / 100) for d in (0.2, 0.4) for lr in (0.1, 0.3) for seed in (0, 1)]
    rows = rows_of([*results, result(0.9, 0.1, 0, 0.9), result(0.9, 0.1, 1, 0.9, diverged=3)])
    assert [row.score for row in rows] == pytest.approx([0.505, 0.405, 0.305, 0.205])
    [(_, points)] = curves_over("label_smooth", rows).items()
    assert [d for d, _ in points] == [0.2, 0.4]
    assert [measures["all"][0] for _, measures in points] == pytest.approx([0.405, 0.505])
    assert points[0][1]["few"][1] == pytest.approx(0.01 / 2**0.5)


def test_counts_are_those_of_the_images_trained_on(held_out) -> None:
    main_stage2.main("--dataset digits --method logit-adjustment-posthoc".split())
    file = checkpoints.read("checkpoints/digits_exp100_resnet8_stage1.pt")
    data = datasets.load("digits", "", val_indices=file.data["val_indices"])
    counts = torch.bincount(data.train.labels, minlength=10).double()
    assert counts.tolist() != data.class_counts
    moved = file.model["fc.bias"] - checkpoints.read(STAGE2).model["fc.bias"]
    assert torch.allclose(moved.double(), (counts / counts.sum()).log(), atol=1e-5)


def test_the_file_says_that_it_was_chosen_and_on_what(chain, capsys) -> None:
    main_stage2.main(f"{QUICK} --label_smooth 0.2 0.4".split())
    assert checkpoints.read(STAGE2).metrics["sweep"] == {"settings": 2, "chosen_on": "the TEST set"}
    evaluate.main(["--dataset", "digits"])
    assert "the best of 2 settings on the TEST set" in capsys.readouterr().out
    main_stage2.main(f"{QUICK} --label_smooth 0.2".split())
    assert "sweep" not in checkpoints.read(STAGE2).metrics


def test_tau_is_stored_as_a_number(chain) -> None:
    main_stage2.main("--dataset digits --method tau-norm".split())
    assert checkpoints.read(STAGE2).options["tau"] == 1.0


def test_a_diverging_bce_head_does_not_stop_the_others(chain, capsys) -> None:
    main_stage2.main(f"{QUICK} --method los weight-decay --finetune_wd 0 1e9".split())
    assert "diverged in epoch" in capsys.readouterr().out


def test_huge_weights_are_reported_and_not_crashed_on(chain) -> None:
    main_stage2.main(QUICK.split())
    file = checkpoints.read(STAGE2)
    file.model["fc.weight"] *= 1e22
    file.save(STAGE2)
    assert evaluate.main(["--dataset", "digits"])["weight_norm"] is None


def test_a_classifier_whose_loss_has_exploded_is_not_saved(chain, capsys) -> None:
    """It is finite, and of no use."""
    with pytest.raises(SystemExit) as stop:
        main_stage2.main(f"{QUICK} --finetune_lr 1e22".split())
    said = capsys.readouterr()
    assert stop.value.code == 1 and "the loss has risen a thousandfold: a lower --finetune_lr may help" in said.err
    assert "diverged in epoch 1: los" in said.out and not Path(STAGE2).exists()


def test_a_method_that_trains_nothing_is_not_told_to_lower_its_rate(chain, capsys) -> None:
    file = checkpoints.read("checkpoints/digits_exp100_resnet8_stage1.pt")
    file.model["fc.weight"][3] = 0
    assert file.path
    file.save(file.path)
    with pytest.raises(SystemExit) as stop:
        main_stage2.main("--dataset digits --method tau-norm".split())
    said = capsys.readouterr()
    assert stop.value.code == 1 and "finetune_lr" not in said.err and "a row of zeros" in said.err
    assert "no finite logits: tau-norm" in said.out


def test_a_cosine_head_may_be_trained_with_the_backbone(chain) -> None:
    main_stage2.main("--dataset digits --seed 0 --finetune_epoch 1 --finetune_scope all --method ldam cosine".split())
    file = checkpoints.read(STAGE2)
    assert file.head == "cosine"
    assert evaluate.main(["--dataset", "digits"])["top1"] == file.metrics["top1"]


def test_a_diverging_backbone_does_not_stop_the_others(chain, capsys) -> None:
    flags = "--method ce --finetune_scope fc all --finetune_lr 30 --finetune_epoch 3"
    main_stage2.main(f"--dataset digits --seed 0 --views 2 {flags}".split())
    assert "diverged in epoch" in capsys.readouterr().out
    assert checkpoints.read(STAGE2).options["finetune_scope"] == "fc"


def test_a_setting_that_diverges_does_not_stop_the_others(chain, capsys) -> None:
    main_stage2.main(f"{QUICK} --finetune_lr 0.01 1e25 --finetune_wd 0.1".split())
    printed = capsys.readouterr().out
    assert "diverged in epoch" in printed and "finetune_lr 1e+25" in printed
    assert checkpoints.read(STAGE2).options["finetune_lr"] == 0.01
    with pytest.raises(SystemExit) as stop:
        main_stage2.main(f"{QUICK} --finetune_lr 1e25 --finetune_wd 0.1".split())
    assert stop.value.code == 1 and "finetune_lr may help" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (main_stage2, "--tau 1", "--tau tau-norm"),
        (main_stage2, "--method ncm --sampler class", "--sampler ncm"),
        (main_stage2, "--method tau-norm --tau 11", "--tau 11 [0, 10]"),
        (main_stage2, "--method focal --focal_gamma -1", "--focal_gamma -1 [0, 20]"),
        (main_stage2, "--method nothing", "--method nothing los tau-norm"),
        (main_stage2, "--label_smooth 0.9 0.9", "--label_smooth once"),
        (main_stage2, "--label_smooth 0.9 1.9", "--label_smooth [0, 1]"),
        (main_stage2, "--features replay --views 3", "--views --features replay"),
        (main_stage2, "--method tau-norm --tau val", "--tau val --val_split"),
        (main_stage2, "--method mla --mla_tau val", "--mla_tau val --val_split"),
        (main_stage2, "--method ncm joint --momentum 0.1", "--momentum ncm joint"),
        (main_stage2, "--method joint --views 3", "--views joint"),
        (main_stage2, "--finetune_scope all --view_seed 3", "--view_seed --finetune_scope all"),
        (main_stage2, "--finetune_scope all --feature_dtype float16", "--feature_dtype --finetune_scope all"),
        (main_stage2, "--method joint --feature_dtype float16", "--feature_dtype --method joint"),
        (main_stage2, "--feature_dtype float64", "--feature_dtype float64 float16 bfloat16"),
        (main_stage2, "--select best_val", "--select best_val --val_split"),
        (main_stage2, "--select_by top1", "--select_by top1 without it --val_split"),
        (main_stage2, "--label_smooth val 0.9", "--label_smooth val --val_split"),
        (main_stage2, "--finetune_lr val", "--finetune_lr val --val_split"),
        (compare, "--finetune_lr val", "--finetune_lr val --val_split"),
        (main_stage2, "--cache_dir /proc/none", "--cache_dir /proc/none"),
        (compare, "--tune", "--tune --val_split"),
        (compare, "--method los --finetune_scope all", "--finetune_scope crt"),
        (compare, "--method los crt --finetune_scope all", "leaves out los"),
        (compare, "--method crt --finetune_scope all --tau 1", "--tau tau-norm"),
        (compare, "--method joint --show crt", "--show crt joint"),
        (main_stage2, "--seed None 0", "--seed None alone"),
        (compare, "--pretrained_pth missing.pt", "missing.pt"),
    ],
)
def test_wrong_flags_are_refused_by_name(chain, capsys, script, flags: str, words: str) -> None:
    message = fails(script, f"--dataset digits {flags}", capsys)
    for word in words.split():
        assert word in message


def test_compare(chain, capsys) -> None:
    rows = compare.main("--dataset digits --seed 0 1 --finetune_epoch 2 --views 2".split())
    printed = capsys.readouterr().out
    assert {row["row"] for row in rows} == {*METHODS, "crt (last_block)", "crt (all)"}
    assert [row["all"] for row in rows] == sorted((row["all"] for row in rows), reverse=True)
    folder = run_folder("compare")
    assert (
        len(pd.read_csv(folder / "compare.csv"))
        == len(rows)
        == len((folder / "compare.md").read_text().splitlines()) - 2
    )
    head, *lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert (
        head["provenance"]["command"].startswith("python compare.py --dataset digits") and head["options"]["views"] == 2
    )
    trained = sum(issubclass(method, Trained) for method in METHODS.values())
    assert len(lines) == 2 * trained + (len(METHODS) - trained) + 4
    by_name = {row["row"]: row for row in rows}
    for name in ("joint", "los"):
        own = [line for line in lines if line["method"] == name and line.get("finetune_scope", "fc") == "fc"]
        assert by_name[name]["all"] == pytest.approx(sum(line["top1"] for line in own) / len(own))
        magnitudes = [sum(line["logits_magnitude"]) / 10 for line in own]
        assert by_name[name]["LoMa"] == pytest.approx(sum(magnitudes) / len(own))
    joint = evaluate.main("--dataset digits --cur_stage stage1".split())
    [line] = [line for line in lines if line["method"] == "joint"]
    assert line["top1"] == joint["top1"] and by_name["joint"]["LoMa"] == pytest.approx(joint["logits_magnitude"][0])
    assert by_name["joint"]["norm_spread"] == pytest.approx(joint["weight_norm"][1], rel=1e-5)
    assert (folder / "class_profiles.png").read_bytes().startswith(b"\x89PNG")
    assert not Path(STAGE2).exists() and "ECE" in printed


def test_compare_tunes_on_held_out_images(held_out, capsys) -> None:
    rows = compare.main(
        "--dataset digits --seed 0 --finetune_epoch 2 --views 2 --tune --finetune_scope fc --method los lade tau-norm "
        "joint --finetune_lr 0.05".split()
    )
    assert {row["method"] for row in rows} == {"los", "lade", "tau-norm", "joint"} and len(rows) == 4
    records = [json.loads(line) for line in (run_folder("compare") / "metrics.jsonl").read_text().splitlines()]
    los = {r["setting"]: r["val_class_mean"] for r in records if r["setting"].startswith("los ") and r["epoch"] == 2}
    assert len(los) == 3 and all(
        "finetune_lr 0.05" in name for name in los
    )  # the typed lr stays, label_smooth is tuned
    [row] = [row for row in rows if row["method"] == "los"]
    assert row["val_class_mean"] == max(los.values()) and row["ECE_scaled"] is not None
    assert "options chosen on held-out images" in capsys.readouterr().out


def test_every_column_of_compare_with_flips_and_held_out_images(workdir, small_cifar10) -> None:
    data_flags = f"--dataset cifar10 --data_dir {small_cifar10} --imb_ratio 4"
    main_stage1.main(f"{data_flags} --network resnet8 --epochs 3 --lr 0.05 --val_split 0.3 --seed 0".split())
    rows = compare.main(f"{data_flags} --method joint los --seed 0 --finetune_scope fc --flip_tta --show los".split())
    file = checkpoints.read("checkpoints/cifar10_exp4_resnet8_stage1.pt")
    data = datasets.load("cifar10", small_cifar10, imb_ratio=4, val_indices=file.data["val_indices"])
    model = build_model("resnet8", 10)
    model.load_state_dict(file.model)
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.spec.mean, data.spec.std))

    def logits(part: str, flip: bool) -> torch.Tensor:
        images = (getattr(data, part).images.float() / 255 - mean) / std
        with torch.no_grad():
            plain = model.eval()(images)
            return (plain + model(images.flip(3))) / 2 if flip else plain

    [row] = [row for row in rows if row["row"] == "joint"]
    statistics = logit_statistics(logits("test", False), data.test.labels)
    magnitude, rsd = (torch.tensor(statistics[name]) for name in ("logits_magnitude", "rsd"))
    assert row["LoMa"] == pytest.approx(float(magnitude.mean()), rel=1e-3)
    assert row["LoMa_spread"] == pytest.approx(float(magnitude.std(correction=0)), rel=1e-3)
    assert row["RSD"] == pytest.approx(float(rsd.mean()), rel=1e-2)
    norms = file.model["fc.weight"].norm(dim=1)
    assert row["norm_spread"] == pytest.approx(float(norms.std(correction=0)), rel=1e-4)
    test, val = logits("test", True), logits("val", True)
    temperature = fit_temperature(val, data.val.labels)
    assert row["ECE"] == pytest.approx(calibration_error(test, data.test.labels), rel=1e-3)
    assert row["ECE_scaled"] == pytest.approx(calibration_error(test, data.test.labels, temperature), rel=1e-2)
    assert abs(row["ECE_scaled"] - row["ECE"]) > 1e-3
    evaluated = evaluate.main(f"{data_flags} --cur_stage stage1 --flip_tta".split())
    assert evaluated["temperature"] == pytest.approx(temperature, rel=1e-3)
    assert evaluated["ece_calibrated"] == pytest.approx(row["ECE_scaled"], rel=1e-3)
    hits = test.argmax(dim=1) == data.test.labels
    assert row["all"] == pytest.approx(float(hits.double().mean()))


def test_compare_tunes_each_scope_apart_and_shows_what_it_chose(held_out, capsys) -> None:
    flags = "--dataset digits --seed 0 --finetune_epoch 1 --views 1 --tune --method crt joint tau-norm"
    rows = compare.main(flags.split())
    assert [row["method"] for row in rows].count("crt") == 3
    printed = capsys.readouterr().out
    assert "except with the backbone" in printed and "tau-norm tau " in printed and "crt lr " in printed


def test_one_bare_state_dict_will_do(chain) -> None:
    file = checkpoints.read("checkpoints/digits_exp100_resnet8_stage1.pt")
    torch.save(file.model, "bare.pt")
    rows = compare.main("--dataset digits --pretrained_pth bare.pt --method joint ncm --features orbit".split())
    assert {row["row"] for row in rows} == {"joint", "ncm"}
