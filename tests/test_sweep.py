"""Several values per flag: one pass, a sorted table, one saved classifier; and every method through the whole chain."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import compare
import evaluate
import main_stage1
import main_stage2
from retraining import features
from retraining.methods import METHODS
from utils import checkpoints

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
    epochs = " --finetune_epoch 2" if METHODS[method].is_trained else ""
    main_stage2.main(f"--dataset digits --seed 0 --views 2 --method {method}{epochs}".split())
    file = checkpoints.read(STAGE2)
    result = evaluate.main(["--dataset", "digits"])
    assert file.options["method"] == method and file.head in ("linear", "cosine", "prototypes", "disalign")
    assert result["top1"] == file.metrics["top1"]
    assert [row["accuracy"] for row in result["per_class"]] == file.metrics["per_class"]
    own = set(METHODS[method].options) | ({"seed", "batch_size", "sampler"} if METHODS[method].is_trained else set())
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
    assert float(rows[0][6]) == pytest.approx(100 * means["std"].iloc[0], abs=0.011)
    assert "chosen by accuracy on the TEST set" in printed
    file = checkpoints.read(STAGE2)
    best = means.iloc[0]
    assert (file.options["finetune_lr"], file.options["label_smooth"]) == (best["finetune_lr"], best["label_smooth"])
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


def test_the_winner_is_chosen_on_held_out_images_where_there_are_any(held_out, capsys) -> None:
    main_stage2.main(f"{QUICK} --method los crt tau-norm --label_smooth 0 0.9".split())
    printed = capsys.readouterr().out
    table = pd.read_csv(run_folder("stage2") / "sweep.csv")
    assert "chosen by accuracy on held-out images" in printed and "TEST" not in printed
    file = checkpoints.read(STAGE2)
    best = table.loc[table["val_class_mean"].idxmax()]
    assert file.options["method"] == best["method"] and file.metrics["top1"] == best["test_top1"]
    assert [line for line in printed.splitlines() if " val " in line]


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


def test_a_cosine_head_may_be_trained_with_the_backbone(chain) -> None:
    main_stage2.main("--dataset digits --seed 0 --finetune_epoch 1 --finetune_scope all --method ldam cosine".split())
    file = checkpoints.read(STAGE2)
    assert file.head == "cosine"
    assert evaluate.main(["--dataset", "digits"])["top1"] == file.metrics["top1"]


def test_a_diverging_backbone_does_not_stop_the_others(chain, capsys) -> None:
    flags = "--method ce --finetune_scope fc all --finetune_lr 1e20 --finetune_epoch 3"
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
        (main_stage2, "--select best_val", "--select best_val --val_split"),
        (main_stage2, "--cache_dir /proc/none", "--cache_dir /proc/none"),
        (compare, "--tune", "--tune --val_split"),
        (compare, "--method los --finetune_scope all", "--finetune_scope crt"),
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
    trained = sum(method.is_trained for method in METHODS.values())
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
    assert row["val"] == max(los.values()) and row["ECE_scaled"] is not None
    assert "each tuned on held-out images" in capsys.readouterr().out


def test_one_bare_state_dict_will_do(chain) -> None:
    file = checkpoints.read("checkpoints/digits_exp100_resnet8_stage1.pt")
    torch.save(file.model, "bare.pt")
    rows = compare.main("--dataset digits --pretrained_pth bare.pt --method joint ncm --features orbit".split())
    assert {row["row"] for row in rows} == {"joint", "ncm"}
