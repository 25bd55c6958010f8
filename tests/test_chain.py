"""The commands one after the other on digits: what they write, and that it chains, repeats and evaluates exactly."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT

import datasets
import evaluate
import main_stage1
import main_stage2
from models import build_model
from utils import checkpoints
from utils.files import sha256

QUICK = ["--dataset", "digits", "--epochs", "2", "--seed", "0"]
QUICK2 = ["--dataset", "digits", "--finetune_epoch", "2", "--seed", "0"]
STAGE1, STAGE2 = (Path(f"checkpoints/digits_exp100_resnet8_{stage}.pt") for stage in ("stage1", "stage2"))


RESULT_KEYS = {
    *(
        "checkpoint",
        "sha256",
        "stage",
        "dataset",
        "imb_type",
        "imb_ratio",
        "subset",
        "subset_seed",
        "network",
        "seed",
        "image_size",
        "stem",
        "input",
    ),
    *(
        "method",
        "label_smooth",
        "select",
        "select_by",
        "epoch",
        "flip_tta",
        "top1",
        "top5",
        "class_mean",
        "worst_class",
        "harmonic_mean",
    ),
    *(
        "macro_f1",
        "ece",
        "groups",
        "temperature",
        "statistics",
        "ece_calibrated",
        "by_group",
        "prior",
        "test_imb",
        "logits_magnitude",
        "rsd",
        "logits_magnitude_row",
    ),
    *("rsd_row", "weight_norm", "class_counts", "class_names", "per_class", "training", "provenance"),
}


def metrics_of(stage: str) -> list[dict]:
    """The records of the only run folder of a stage, without their times."""
    [path] = Path("output").glob(f"*_{stage}/*/metrics.jsonl")
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


def test_the_four_commands_as_processes(shell, workdir) -> None:
    first = shell("main_stage1.py", *QUICK, "--imb_ratio", "100", "--cur_stage", "stage1")
    assert first.returncode == 0, first.stderr
    one = shell("evaluate.py", "--dataset", "digits", "--imb-ratio", "100", "--cur_stage", "stage1")
    assert one.returncode == 0 and "the same figures as in training" in one.stdout, one.stderr + one.stdout
    second = shell("main_stage2.py", *QUICK2, "--imb_ratio", "100", "--cur_stage", "stage2", "--label_smooth", "0.98")
    assert second.returncode == 0, second.stderr
    two = shell("evaluate.py", "--dataset", "digits", "--json", "two.json", "--csv", "two.csv")
    assert two.returncode == 0 and "the same figures as in training" in two.stdout, two.stderr
    assert not any(process.stderr for process in (first, one, second, two))  # no bar, no warning

    result, stored = json.loads(Path("two.json").read_text()), checkpoints.read(STAGE2)
    assert (result["stage"], result["label_smooth"], result["flip_tta"]) == ("stage2", 0.98, False)
    for key in ("top1", "top5", "class_mean", "groups"):
        assert result[key] == stored.metrics[key]
    assert [row["accuracy"] for row in result["per_class"]] == stored.metrics["per_class"]
    table = pd.read_csv("two.csv")
    assert len(table) == 10 and table["accuracy"].mean() == pytest.approx(result["top1"])
    assert set(result) == RESULT_KEYS and result["class_names"] == list("0123456789")
    assert result["class_counts"] == [124, 74, 44, 26, 16, 9, 5, 3, 2, 1] and result["ece_calibrated"] is None
    assert f"{100 * result['top1']:.2f}" in two.stdout and "flip averaging here: off" in two.stdout


def test_what_a_run_leaves(workdir, capsys) -> None:
    report = main_stage1.main(QUICK)
    [folder] = Path("output/digits_exp100_resnet8_stage1").iterdir()
    assert folder.name.endswith("_seed0")
    names = {path.name.split(".17")[0] for path in folder.iterdir()}
    assert {"checkpoint.pt", "log.txt", "metrics.jsonl", "options.json", "curves.png", "per_class.png"} < names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (folder / "log.txt").read_text() == capsys.readouterr().out
    assert [record["epoch"] for record in metrics_of("stage1")] == [1, 2]
    assert metrics_of("stage1")[-1]["test_top1"] == report["top1"]
    for figure in ("curves.png", "per_class.png"):
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")

    content = torch.load(STAGE1, weights_only=True)
    assert (
        content["format"] == 4
        and content["stem"] == "small"
        and content["head"] == "linear"
        and content["stage"] == "stage1"
        and content["network"] == "resnet8"
    )
    assert content["options"]["seed"] == 0 and content["options"]["wd"] == 5e-3
    assert content["data"]["class_counts"] == [124, 74, 44, 26, 16, 9, 5, 3, 2, 1]
    assert content["data"]["class_names"] == list("0123456789") and content["data"]["val_indices"] == []
    assert content["metrics"]["select"] == "last" and content["metrics"]["epoch"] == 2
    assert content["parent"] is None and content["provenance"]["command"].startswith("python main_stage1.py --dataset")
    assert sha256(folder / "checkpoint.pt") == sha256(STAGE1)


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path, monkeypatch) -> None:
    runs = []
    for number, seed in enumerate(("0", "0", "1")):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        main_stage1.main([*QUICK, "--seed", seed])
        main_stage2.main([*QUICK2, "--seed", seed])
        runs.append((metrics_of("stage1"), metrics_of("stage2")))
    assert runs[0] == runs[1] and runs[0][0] != runs[2][0]


def test_stage2_changes_the_classifier_alone_and_names_its_parent(workdir) -> None:
    main_stage1.main(QUICK)
    main_stage2.main(QUICK2)
    one, two = checkpoints.read(STAGE1), checkpoints.read(STAGE2)
    changed = {name for name in one.model if not torch.equal(one.model[name], two.model[name])}
    assert changed == {"fc.weight", "fc.bias"}
    chosen = {"epoch": 2, "select": "last", "flip_tta": False}
    assert two.parent == {
        "path": str(STAGE1), "sha256": sha256(STAGE1), "seed": 0, "chosen": chosen, "parent": None,
    }  # fmt: skip


def test_published_protocol_lets_the_statistics_drift_and_says_how_it_selected(workdir, small_cifar10, capsys) -> None:
    common = ["--dataset", "cifar10", "--data_dir", small_cifar10, "--imb_ratio", "10", "--protocol", "published"]
    main_stage1.main([*common, "--network", "resnet8", "--epochs", "2", "--seed", "0"])
    main_stage2.main([*common, "--finetune_epoch", "2", "--seed", "0"])  # finds the only other network's file
    one, two = (checkpoints.read(f"checkpoints/cifar10_exp10_resnet8_{stage}.pt") for stage in ("stage1", "stage2"))
    changed = {name.split(".")[-1] for name in one.model if not torch.equal(one.model[name], two.model[name])}
    assert "running_mean" in changed
    assert two.options["label_smooth"] == 0.98 and two.metrics["select"] == "best_test"
    evaluate.main(["--dataset", "cifar10", "--data_dir", small_cifar10, "--imb_ratio", "10"])
    out = capsys.readouterr().out
    assert "the best on the TEST set; with flip averaging" in out and "the same figures as in training" in out
    evaluate.main(["--dataset", "cifar10", "--data_dir", small_cifar10, "--imb_ratio", "10", "--no-flip_tta"])
    assert "flip averaging here: off" in capsys.readouterr().out


def test_validation_split_reaches_stage2(workdir) -> None:
    main_stage1.main([*QUICK, "--val_split", "0.2", "--select", "best_val"])
    main_stage2.main([*QUICK2, "--select", "best_val"])
    one, two = checkpoints.read(STAGE1), checkpoints.read(STAGE2)
    assert one.data["val_indices"] and sorted(two.data["val_indices"]) == sorted(one.data["val_indices"])
    assert all(record["val_class_mean"] is not None for record in metrics_of("stage2"))
    assert one.data["class_counts"] == [124, 74, 44, 26, 16, 9, 5, 3, 2, 1]  # the benchmark's groups


def test_replacing_another_run_is_announced_and_keeps_it(workdir, capsys) -> None:
    main_stage1.main(QUICK)
    before = sha256(STAGE1)
    capsys.readouterr()
    main_stage1.main([*QUICK, "--out", "elsewhere"])  # the same run again
    assert "kept as" not in capsys.readouterr().out and not STAGE1.with_name(STAGE1.name + ".prev").exists()
    again = sha256(STAGE1)
    os.link(STAGE1, "held")  # a reader that has the old file open
    main_stage1.main([*QUICK, "--wd", "1e-3"])
    assert f"kept as {STAGE1}.prev" in capsys.readouterr().out
    assert sha256(f"{STAGE1}.prev") == again and before != sha256(STAGE1)
    assert sha256("held") == again  # the new file took the name, it was not written over the old one


def test_a_new_parent_makes_another_run(workdir, capsys) -> None:
    main_stage1.main(QUICK)
    main_stage2.main(QUICK2)
    main_stage1.main([*QUICK, "--wd", "0"])
    evaluate.main(["--dataset", "digits"])
    assert f"note: {STAGE1} has been replaced" in capsys.readouterr().out
    parent = STAGE1.read_bytes()
    STAGE1.write_bytes(b"no checkpoint any more")  # the note needs the hash alone
    evaluate.main(["--dataset", "digits"])
    assert f"note: {STAGE1} has been replaced" in capsys.readouterr().out
    STAGE1.write_bytes(parent)
    main_stage2.main(QUICK2)
    assert f"kept as {STAGE2}.prev" in capsys.readouterr().out
    evaluate.main(["--dataset", "digits"])
    assert "has been replaced" not in capsys.readouterr().out


def test_evaluation_epochs(workdir) -> None:
    main_stage1.main([*QUICK, "--epochs", "9", "--eval_every", "2"])
    assert [r["epoch"] for r in metrics_of("stage1") if "test_top1" in r] == [2, 4, 5, 6, 7, 8, 9]


def test_the_temperature_comes_from_the_held_out_images(workdir, capsys) -> None:
    main_stage1.main([*QUICK, "--val_split", "0.2"])
    held_out = checkpoints.read(STAGE1).data["val_indices"]
    result = evaluate.main(["--dataset", "digits"])
    assert result["temperature"] > 0 and 0 <= result["ece_calibrated"] <= 1
    assert f"{len(held_out)} held out" in capsys.readouterr().out
    main_stage1.main([*QUICK, "--val_split", "0.2", "--seed", "3"])
    assert checkpoints.read(STAGE1).data["val_indices"] != held_out


def test_a_diverging_run_stops_and_leaves_the_old_file(workdir, capsys) -> None:
    main_stage1.main(QUICK)
    before = sha256(STAGE1)
    with pytest.raises(SystemExit) as stop:
        main_stage1.main([*QUICK, "--lr", "1e20"])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "the loss is" in error and "lr 1e+20" in error
    assert sha256(STAGE1) == before and sorted(Path("checkpoints").iterdir()) == [STAGE1]


def test_a_write_that_fails_leaves_the_old_file(workdir, monkeypatch, capsys) -> None:
    main_stage1.main(QUICK)
    before, write = sha256(STAGE1), checkpoints.Checkpoint.write

    def full_disk(self, path) -> None:
        if Path(path).parent.name == "checkpoints":
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "no space left")
        write(self, path)

    monkeypatch.setattr(checkpoints.Checkpoint, "write", full_disk)
    with pytest.raises(SystemExit) as stop:
        main_stage1.main([*QUICK, "--wd", "0"])
    assert sha256(STAGE1) == before and sorted(Path("checkpoints").iterdir()) == [STAGE1]
    said = capsys.readouterr().err  # which file and disk, how much room, where the weights are
    assert stop.value.code == 1 and f"no space left: {STAGE1} (" in said and f"disk of {workdir}/checkpoints)" in said
    [copy] = [path for path in Path("output").rglob("checkpoint.pt") if str(path) in said]
    assert checkpoints.read(copy).options["wd"] == 0


def test_stage2_names_the_parent_that_it_read(workdir, monkeypatch) -> None:
    main_stage1.main(QUICK)
    read = sha256(STAGE1)
    begin = main_stage2.begin
    monkeypatch.setattr(
        main_stage2, "begin", lambda *a, **k: (STAGE1.write_bytes(b"replaced meanwhile"), begin(*a, **k))[1]
    )
    main_stage2.main(QUICK2)
    assert checkpoints.read(STAGE2).parent["sha256"] == read


def test_a_terminal_shows_a_bar_and_a_closed_output_does_not_end_a_training(workdir) -> None:
    terminal, stderr = pty.openpty()
    flags = "--dataset digits --epochs 40 --seed 0 --eval_every 1 --threads 1".split()
    command = [sys.executable, str(ROOT / "main_stage1.py"), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        os.close(stderr)
        lines = [process.stdout.readline() for _ in range(20)]
        process.stdout.close()
        process.wait(timeout=300)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    assert any(line.split()[:1] == ["epoch"] for line in lines)
    assert b"ETA" in shown and b"epoch 1/40" in shown, shown[-2000:]
    assert not re.search(rb"Traceback|Exception|Error", shown), shown[-2000:]
    assert process.returncode == 0 and checkpoints.read(STAGE1).metrics["epoch"] == 40
    [log] = Path("output").rglob("log.txt")
    assert f"saved {STAGE1}" in log.read_text() and len(log.read_text().splitlines()) > len(lines) + 25


def test_a_bare_state_dict_serves_evaluate_and_stage2(workdir, small_cifar10, capsys) -> None:
    torch.save(build_model("resnet34", 10).state_dict(), "published.pt")
    common = ["--pretrained_pth", "published.pt", "--dataset", "cifar10", "--data_dir", small_cifar10]
    result = evaluate.main([*common, "--imb_ratio", "10"])
    assert result["network"] == "resnet34" and result["select"] is None
    assert "selected in training: unknown" in capsys.readouterr().out
    main_stage2.main([*common, "--imb_ratio", "10", "--finetune_epoch", "1"])
    two = checkpoints.read("checkpoints/cifar10_exp10_resnet34_stage2.pt")
    assert two.parent["sha256"] == sha256("published.pt") and two.parent["seed"] is None


def test_stage1_can_start_from_a_file(workdir) -> None:
    main_stage1.main(QUICK)
    before = checkpoints.read(STAGE1).model
    main_stage1.main([*QUICK, "--imb_ratio", "50", "--pretrained_pth", str(STAGE1), "--lr", "1e-12", "--wd", "0"])
    after = checkpoints.read("checkpoints/digits_exp50_resnet8_stage1.pt")
    assert torch.allclose(before["fc.weight"], after.model["fc.weight"], atol=1e-6)
    assert after.parent["path"] == str(STAGE1)


def test_stage1_starts_from_another_number_of_classes_with_a_new_classifier(workdir, capsys) -> None:
    torch.manual_seed(1)
    other = build_model("resnet8", 7, 1)
    torch.save(other.state_dict(), "seven.pt")
    rates = ["--pretrained_pth", "seven.pt", "--lr", "1e-12", "--wd", "0"]
    main_stage1.main([*QUICK, *rates])
    assert "seven.pt, of 7 classes: the classifier begins anew" in capsys.readouterr().out
    model = checkpoints.read(STAGE1).model
    assert torch.allclose(model["conv1.weight"], other.state_dict()["conv1.weight"], atol=1e-6)
    main_stage1.main([*QUICK, *rates, "--train_scope", "last_block"])
    frozen = checkpoints.read(STAGE1).model
    moved = {name for name, value in frozen.items() if not torch.equal(value, other.state_dict()[name])}
    assert moved and all(name.startswith(("layer3.0.", "fc.")) for name in moved)  # statistics stay as well
    assert frozen["fc.weight"].shape == (10, 64)


def test_the_only_other_network_is_found_and_several_are_listed(workdir, capsys) -> None:
    main_stage1.main([*QUICK, "--network", "resnet20"])
    result = evaluate.main(["--dataset", "digits", "--cur_stage", "stage1"])
    assert result["network"] == "resnet20"
    main_stage1.main([*QUICK, "--network", "resnet32"])
    with pytest.raises(SystemExit):
        evaluate.main(["--dataset", "digits", "--cur_stage", "stage1"])
    assert "--network with one of resnet20, resnet32" in capsys.readouterr().err


def test_workers_says_that_nothing_is_decoded(workdir, capsys) -> None:
    main_stage1.main([*QUICK, "--workers", "4"])
    assert "--workers 4: digits is held in memory" in capsys.readouterr().out


def test_statistics_of_the_training_images_on_request(workdir) -> None:
    main_stage1.main(QUICK)
    test, train = (evaluate.main(["--dataset", "digits", *flags]) for flags in ([], ["--statistics", "train"]))
    assert test["top1"] == train["top1"] and test["weight_norm"] == train["weight_norm"]
    assert test["logits_magnitude"] != train["logits_magnitude"] and train["statistics"] == "train"
    file, data = checkpoints.read(STAGE1), datasets.load("digits", "")
    model = build_model("resnet8", 10, 1)
    model.load_state_dict(file.model)
    images = (data.train.images.float() / 255 - data.spec.mean[0]) / data.spec.std[0]
    with torch.no_grad():
        z = model.eval()(images)[:, 3]
    own = data.train.labels == 3
    [row] = [row for row in train["per_class"] if row["class"] == 3]
    assert row["logits_magnitude"] == pytest.approx(float(z[own].mean() - z[~own].mean()), rel=1e-4)
