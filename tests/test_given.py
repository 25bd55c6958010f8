"""Features that are given in place of images: every command on them, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import compare
import datasets
import evaluate
import main_stage1
import main_stage2
import predict
from datasets.rows import RowBatches, Rows
from models.given import REFERENCE_NORM
from retraining.methods import METHODS, Stage1
from retraining.start import STARTS, make_start, without_stage1
from utils import checkpoints
from utils.errors import UsageError
from utils.metrics import bootstrap_interval, group_accuracies

COUNTS = [120, 60, 30, 12, 6]
WIDTH = 7
DATA = ["--dataset", "features", "--data_dir", "f"]
QUICK = ["--seed", "0", "--finetune_epoch", "3"]
STAGE2 = "checkpoints/features-f_natural_features_stage2.pt"


def make_arrays(seed: int = 0, scale: float = 1.0, **more: np.ndarray) -> dict[str, np.ndarray]:
    """Five classes around means of their own."""
    rng = np.random.default_rng(seed)
    means, found = rng.normal(size=(5, WIDTH)) + 1, {}
    for split, counts in (("train", COUNTS), ("test", [20] * 5)):
        labels = np.repeat(np.arange(5), counts)
        features = (means[labels] + rng.normal(size=(len(labels), WIDTH))) * scale
        found |= {f"{split}_features": features.astype(np.float32), f"{split}_labels": labels}
    return found | more


def write_folder(arrays: dict[str, np.ndarray], folder: str = "f") -> Path:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(Path(folder, name), array)
    return Path(folder)


def stage1_of(arrays: dict[str, np.ndarray]) -> Stage1:
    features, labels = torch.from_numpy(arrays["train_features"]), torch.from_numpy(arrays["train_labels"])
    parts = list(zip(features.split(50), labels.split(50)))
    return Stage1(nn.Linear(WIDTH, 5).requires_grad_(False), COUNTS, lambda: parts, None)


def test_all_commands_agree_on_rows(workdir, capsys) -> None:
    arrays = make_arrays(test_groups=np.array(["b", "a", "c", "d"])[np.arange(100) % 4])
    write_folder(arrays)
    Path("f/class_names.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    with pytest.raises(SystemExit):
        main_stage1.main(DATA)
    report = main_stage2.main([*DATA, *QUICK, "--method", "logit-adjustment"])
    said = capsys.readouterr().out
    assert "features: 228 training rows of 7, 100 test rows" in said and "--start class_mean" in said
    result = evaluate.main(["--from", STAGE2])
    said = capsys.readouterr().out
    assert "the same figures as in training" in said and "4 groups: mean" in said
    assert result["top1"] == report["top1"] > 0.6
    np.save("rows.npy", arrays["test_features"])
    predict.main(["rows.npy", "--from", STAGE2, "--top_k", "1", "--csv", "o.csv"])
    rows = list(csv.DictReader(Path("o.csv").read_text().splitlines()))
    hits = np.array([int(row["class"]) for row in rows]) == arrays["test_labels"]
    assert hits.mean() == pytest.approx(report["top1"]) and rows[25]["path"] == "rows.npy[25]"
    assert {row["name"] for row in rows} <= {"ant", "bee", "cat", "dog", "eel"}
    by_group = [hits[np.arange(100) % 4 == number].mean() for number in (1, 0, 2, 3)]
    assert result["by_group"]["top1"] == pytest.approx(by_group)
    file = checkpoints.read(Path(STAGE2))
    assert (file.network, file.stem, file.in_channels, file.parent) == ("features", "rows", WIDTH, None)


def test_compare_takes_every_method_and_start(workdir) -> None:
    write_folder(make_arrays())
    rows = compare.main([*DATA, *QUICK, "--method", *METHODS])
    assert {row["method"] for row in rows} == set(METHODS)
    starts = {row["method"]: row["start"] for row in rows}
    assert starts["crt"] == "random" and starts["los"] == "class_mean"
    np.save("proto.npy", np.eye(5, WIDTH))
    named = ["random", "class_mean", "logistic", "proto.npy"]
    rows = compare.main([*DATA, *QUICK, "--method", "los", "balanced-softmax", "maxnorm", "--start", *named])
    assert len(rows) == 12 and {row["start"] for row in rows} == set(named)


@pytest.mark.parametrize("standardize", ["none", "l2", "zscore"])
def test_the_norm_of_features_changes_nothing(standardize: str, workdir) -> None:
    """So that one learning rate serves all."""
    flags = [*QUICK, "--method", "crt", "los", "maxnorm", "--standardize", standardize]
    found = []
    for scale in (1.0, 2.0**-9, 2.0**9):
        write_folder(make_arrays(scale=scale), f"s{scale}/f")
        data = ["--dataset", "features", "--data_dir", f"s{scale}/f"]
        found.append(compare.main([*data, *flags]))
    for row in zip(*found):
        assert len({each["all"] for each in row}) == 1


@pytest.mark.parametrize("standardize", ["none", "l2", "zscore"])
def test_standardized_rows_longhand(standardize: str, workdir) -> None:
    arrays = make_arrays()
    arrays["train_features"][:, 3] = arrays["test_features"][:, 3] = 4.0  # which says nothing
    write_folder(arrays)
    data = datasets.load("features", "f", imb_ratio="natural")
    file = without_stage1(data, standardize)
    x = arrays["train_features"].astype(np.float64)
    if standardize == "zscore":
        x = (x - x.mean(axis=0)) / np.where(x.std(axis=0) > 1e-6, x.std(axis=0), 1)
    if standardize == "l2":
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    x *= REFERENCE_NORM / np.sqrt((x**2).sum(axis=1).mean())
    from experiment.restore import built

    found = built(file).features(torch.from_numpy(arrays["train_features"]))
    assert np.abs(found.numpy() - x).max() < 1e-4


def test_logistic_is_scikit_learns(workdir) -> None:
    from sklearn.linear_model import LogisticRegression

    arrays = make_arrays()
    head = make_start("logistic", stage1_of(arrays), 0)
    theirs = LogisticRegression(class_weight="balanced", tol=1e-8, max_iter=2000)
    theirs.fit(arrays["train_features"].astype(np.float64), arrays["train_labels"])
    expected = theirs.decision_function(arrays["test_features"])
    logits = head(torch.from_numpy(arrays["test_features"])).detach().numpy()
    differences = logits - logits.mean(axis=1, keepdims=True) - (expected - expected.mean(axis=1, keepdims=True))
    assert np.abs(differences).max() < 2e-2 and np.abs(expected).max() > 2


def test_class_means_and_rows_of_a_file_are_directions(workdir) -> None:
    arrays = make_arrays()
    stage1, x = stage1_of(arrays), arrays["train_features"].astype(np.float64)
    means = np.stack([x[arrays["train_labels"] == label].mean(axis=0) for label in range(5)])
    length = 30 / np.linalg.norm(x, axis=1).mean()
    expected = means / np.linalg.norm(means, axis=1, keepdims=True) * length
    head = make_start("class_mean", stage1, 0)
    assert np.abs(head.weight.detach().numpy() - expected).max() < 1e-5 and not head.bias.any()
    np.save("rows.npy", 7 * means)
    assert np.abs(make_start("rows.npy", stage1, 0).weight.detach().numpy() - expected).max() < 1e-5
    one, other = (make_start("random", stage1, seed).weight for seed in (0, 1))
    assert not torch.equal(one, other) and list(STARTS) == ["stage1", "random", "class_mean", "logistic"]


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64", ">f4"])
def test_kinds_of_numbers(kind: str, workdir) -> None:
    arrays = make_arrays()
    exact = torch.from_numpy(arrays["train_features"])
    for name in ("train_features", "test_features"):
        if kind == "bfloat16":
            bits = torch.from_numpy(arrays[name]).bfloat16().view(torch.int16).numpy()
            arrays[name] = bits.view("V2")
        else:
            arrays[name] = arrays[name].astype(kind)
    write_folder(arrays)
    rows = datasets.load("features", "f", imb_ratio="natural").train.images.to(torch.device("cpu"))
    assert rows.dtype == torch.float32 and torch.allclose(rows, exact, atol=0.02)
    np.savez("f.npz", **arrays)
    again = datasets.load("features", "f.npz", imb_ratio="natural").train.images.to(torch.device("cpu"))
    assert torch.equal(rows, again)


def test_rows_are_made_long_tailed_and_held_out(workdir) -> None:
    write_folder(make_arrays(val_features=np.ones((3, WIDTH), np.float32), val_labels=np.array([0, 1, 4])))
    data = datasets.load("features", "f", imb_ratio=3)
    assert data.class_counts == [6, 4, 3, 2, 2] and data.val is not None and len(data.val) == 3
    assert data.train.images.shape == (17, WIDTH)
    for name in ("val_features", "val_labels"):
        Path(f"f/{name}.npy").unlink()
    flags = ["--method", "tau-norm", "--tau", "val", "--val_split", "0.2", "--select", "best_val"]
    main_stage2.main([*DATA, "--seed", "0", *flags])
    held = checkpoints.read(Path(STAGE2)).data["val_indices"]
    assert len(held) == 24 + 12 + 6 + 2 + 1


def test_rows_in_any_order_and_in_batches() -> None:
    array = torch.arange(24.0).view(8, 3).half()
    rows = Rows(array, torch.tensor([5, 1, 2]), "x")
    cpu = torch.device("cpu")
    assert rows.to(cpu).tolist() == array[[5, 1, 2]].tolist() and rows[torch.tensor([0])].to(cpu)[0, 0] == 15
    assert torch.cat([part.to(cpu) for part in rows.split(2)]).tolist() == rows.to(cpu).tolist()
    assert rows.through(lambda x: 2 * x).to(cpu)[0, 0] == 30 and rows.nbytes == 36
    assert rows.fingerprint() != Rows(array, torch.tensor([5, 2, 1]), "x").fingerprint()
    labels = torch.tensor([0, 1, 2])
    shares = [list(RowBatches(rows, labels, 1, cpu, (rank, 2)).epoch()) for rank in (0, 1)]
    assert [int(own[0]) for _, own in shares[0]] == [0, 2] and len(shares[1]) == 1


def test_epochs_go_through_the_views(workdir) -> None:
    arrays = make_arrays()
    views = {f"train_views_{k}": arrays["train_features"] + k for k in (0, 1)}
    write_folder(arrays | views)
    one = main_stage2.main([*DATA, *QUICK, "--method", "crt"])
    images = checkpoints.read(Path(STAGE2)).data["train_images"]
    for name in views:
        Path(f"f/{name}.npy").unlink()
    other = main_stage2.main([*DATA, *QUICK, "--method", "crt"])
    assert one["per_class"] != other["per_class"]
    assert checkpoints.read(Path(STAGE2)).data["train_images"] != images


def test_groups_longhand() -> None:
    hits, groups = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool), torch.tensor([0, 0, 2, 2, 2, 0])
    assert group_accuracies(hits, groups).tolist() == pytest.approx([1 / 3, 0, 2 / 3])
    low, high = bootstrap_interval(hits, groups)
    assert low == pytest.approx(1 / 3) and high == pytest.approx(2 / 3)
    single = bootstrap_interval(torch.rand(1000) < 0.5, torch.arange(1000))  # every row a group: the binomial's
    assert single[1] - single[0] == pytest.approx(2 * 1.96 * (0.25 / 1000) ** 0.5, rel=0.15)


BAD = {
    "no train_labels": lambda a: a.pop("train_labels"),
    "is not finite": lambda a: a["train_features"].__setitem__((17, 2), np.nan),
    "row 3 is not finite": lambda a: a["test_features"].__setitem__((3, 0), np.inf),
    "class 1 has no training row": lambda a: a["train_labels"].__setitem__(a["train_labels"] == 1, 2),
    "one whole number for each of 228 rows": lambda a: a.__setitem__("train_labels", a["train_labels"][:-1]),
    "whole numbers from 0": lambda a: a["test_labels"].__setitem__(0, -1),
    "has 9, of 5 classes": lambda a: a["test_labels"].__setitem__(0, 9),
    "of several lengths": lambda a: a.__setitem__("test_features", a["test_features"][:, :5]),
    "a number or a text for each of 100 rows": lambda a: a.__setitem__("test_groups", np.arange(99)),
    "train_features is int64": lambda a: a.__setitem__("train_features", a["train_features"].astype(int)),
    "(N, D)": lambda a: a.__setitem__("train_features", a["train_features"][:, 0]),
    "4 class names": lambda a: a.__setitem__("class_names", np.array(["a", "b", "c", "d"])),
    "has b twice": lambda a: a.__setitem__("class_names", np.array(["a", "b", "c", "b", "e"])),
    "train_views_0 is (3, 7)": lambda a: a.__setitem__("train_views_0", a["train_features"][:3]),
    "float labels": lambda a: a.__setitem__("train_labels", a["train_labels"] + 0.5),
}


@pytest.mark.parametrize("how", ["folder", "npz"])
@pytest.mark.parametrize("words", BAD)
def test_what_is_wrong_is_said_in_two_lines(words: str, how: str, workdir, capsys) -> None:
    arrays = make_arrays()
    BAD[words](arrays)
    place = str(write_folder(arrays)) if how == "folder" else "f.npz"
    np.savez("f.npz", **arrays)
    with pytest.raises(SystemExit) as ended:
        main_stage2.main(["--dataset", "features", "--data_dir", place, *QUICK])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said.splitlines()) == 2
    assert words in said or words == "float labels", said


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--start stage1", "has no stage 1"),
        ("--start nowhere.npy", "nowhere.npy"),
        ("--finetune_scope all", "no backbone"),
        ("--views 3", "which are given"),
        ("--features replay", "which are given"),
        ("--network resnet20", "--network resnet20"),
        ("--fit pad", "which has no images"),
        ("--flip_tta", "not mirrored"),
        ("--select best_val", "--val_split 0.1"),
        ("--label_smooth val", "--val_split 0.1"),
        ("--test_split 0.2", "which has no images"),
    ],
)
def test_what_has_no_use_is_refused(flags: str, words: str, workdir, capsys) -> None:
    write_folder(make_arrays())
    with pytest.raises(SystemExit) as ended:
        main_stage2.main([*DATA, *QUICK, *flags.split()])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and len(said.splitlines()) == 2


def test_predict_names_the_rows_that_it_cannot_take(workdir, capsys) -> None:
    arrays = make_arrays()
    write_folder(arrays)
    main_stage2.main([*DATA, "--seed", "0", "--method", "ncm"])
    rows = arrays["test_features"][:4].copy()
    rows[2, 1] = np.nan
    np.savez("x.npz", features=rows)
    found = predict.main(["x.npz", "--from", STAGE2, "--json", "o.json"])
    assert [each["error"] is None for each in found] == [True, True, False, True]
    assert json.loads(Path("o.json").read_text())[2]["path"] == "x.npz[2]"
    np.save("y.npy", rows[:, :3])
    with pytest.raises(SystemExit):
        predict.main(["y.npy", "--from", STAGE2])
    assert "rows of 3 numbers" in capsys.readouterr().err


def test_a_run_on_rows_is_resumed_and_refuses_others(workdir, capsys) -> None:
    write_folder(make_arrays())
    command = [*DATA, *QUICK, "--method", "los", "--resume", "auto"]
    one = main_stage2.main(command)
    assert main_stage2.main(command) == one and "is complete" in capsys.readouterr().out
    again = write_folder(make_arrays(seed=1))
    assert again.exists()
    with pytest.raises(UsageError):
        datasets.load("features", "nowhere", imb_ratio="natural")
