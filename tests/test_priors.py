"""Class priors at deployment: the equations longhand, EM, other test sets, which prior a classifier was made for."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import evaluate
import main_stage1
import main_stage2
import predict
from datasets.readers import DIGITS, read_digits
from datasets.spec import ImageOptions
from experiment.priors import DRAWN, PLAIN, made_for, priors_of
from losses import LOSSES
from retraining.methods import METHODS
from utils import checkpoints, metrics
from utils.checkpoints import Checkpoint
from utils.errors import UsageError
from utils.metrics import accuracies, shifted
from utils.priors import estimate, log_ratio, long_tailed, read_prior, shares

STAGE1 = Path("checkpoints/digits_exp100_resnet8_stage1.pt")
TRAIN1 = ["--dataset", "digits", "--seed", "0", "--epochs", "6", "--val_split", "0.2", "--imb_ratio", "10"]


def test_the_equation_longhand() -> None:
    p, source, test = [0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.3, 0.6]
    parts = [a * t / s for a, t, s in zip(p, test, source)]
    z = torch.tensor(p).log() + 3.0  # logits are known up to a constant
    found = (z + log_ratio(shares(test), shares(source))).softmax(dim=0)
    assert found.tolist() == pytest.approx([part / sum(parts) for part in parts], rel=1e-6)
    without = (z + log_ratio(shares([1, 0, 1]), shares(source))).softmax(dim=0)
    assert without[1] == 0 and without.sum() == pytest.approx(1)
    assert log_ratio(shares(source), shares(source)).tolist() == [0, 0, 0]


def calibrated(prior: Tensor, source: Tensor, images: int, generator: torch.Generator) -> Tensor:
    """Posteriors under ``source`` of images drawn with ``prior`` from known densities, N(2 j, 1) on a line."""
    labels = torch.multinomial(prior, images, replacement=True, generator=generator)
    x = 2.0 * labels + torch.randn(images, generator=generator, dtype=torch.float64)
    centres = 2.0 * torch.arange(len(prior), dtype=torch.float64)
    return (source.log() - (x[:, None] - centres).square() / 2).softmax(dim=1)


def test_em_finds_a_known_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    source, test = shares([100, 30, 10, 3]), shares([1, 2, 4, 8])
    rows = calibrated(test, source, 40_000, generator)
    found = estimate(rows, source)
    assert found.tolist() == pytest.approx(test.tolist(), abs=0.01) and float(found.sum()) == pytest.approx(1)
    same = estimate(calibrated(source, source, 40_000, generator), source)
    assert same.tolist() == pytest.approx(source.tolist(), abs=0.01)


def test_em_by_its_equations() -> None:
    generator = torch.Generator().manual_seed(1)
    source = shares([5, 3, 2])
    rows = calibrated(shares([1, 1, 1]), source, 50, generator)
    prior = source.tolist()
    for _ in range(3000):  # Eq. 2.9, image by image
        sums = [0.0] * 3
        for row in rows.tolist():
            parts = [q / s * p for q, s, p in zip(prior, source.tolist(), row)]
            sums = [total + part / sum(parts) for total, part in zip(sums, parts)]
        prior = [total / len(rows) for total in sums]
    assert estimate(rows, source).tolist() == pytest.approx(prior, abs=1e-5)
    assert estimate(rows[:1], source).sum() == pytest.approx(1)


def test_long_tails_by_hand() -> None:
    weights = [1, 10**-0.5, 0.1]
    by_size = [weight / sum(weights) for weight in weights]
    assert long_tailed([50, 20, 9], 10).tolist() == pytest.approx(by_size)
    assert long_tailed([9, 50, 20], 10).tolist() == pytest.approx([by_size[2], by_size[0], by_size[1]])
    assert long_tailed([9, 50, 20], 10, is_reversed=True).tolist() == pytest.approx([by_size[i] for i in (0, 2, 1)])
    assert long_tailed([9, 50, 20], 1).tolist() == pytest.approx([1 / 3] * 3)
    assert long_tailed([7], 10).tolist() == [1]


def test_other_test_sets_against_drawn_ones() -> None:
    """Images repeated in proportion give the figures exactly, a large drawn set nearly."""
    generator = torch.Generator().manual_seed(0)
    counts = [500, 200, 60, 25, 8, 3]
    labels = torch.arange(6).repeat_interleave(20)
    predicted = torch.where(torch.rand(120, generator=generator) < 0.6, labels, (labels + 1) % 6)
    per_class = accuracies(predicted, labels, counts)["per_class"]
    prior = shares([4, 1, 2, 3, 1, 5])
    groups = {"top1": range(6), "many": (0, 1), "medium": (2, 3), "few": (4, 5)}

    def of(chosen: Tensor) -> dict[str, float]:
        right = (predicted == labels)[chosen].double()
        inside = {name: torch.isin(labels[chosen], torch.tensor(list(part))) for name, part in groups.items()}
        return {name: float(right[mask].mean()) for name, mask in inside.items()}

    repeated = torch.arange(120).repeat_interleave(torch.tensor([4, 1, 2, 3, 1, 5])[labels])
    assert shifted(per_class, prior, counts) == pytest.approx(of(repeated))
    drawn = torch.multinomial(prior[labels], 200_000, replacement=True, generator=generator)
    assert shifted(per_class, prior, counts) == pytest.approx(of(drawn), abs=0.01)
    uniform = shifted(per_class, long_tailed(counts, 1), counts)
    report = accuracies(predicted, labels, counts)
    assert uniform["top1"] == pytest.approx(report["class_mean"])
    assert uniform["few"] == pytest.approx(report["groups"]["few"]["accuracy"])
    assert shifted([1.0, None], shares([1, 3]), [200, 2]) == {"top1": 1.0, "many": 1.0, "medium": None, "few": None}


NAMES = ["cat", "dog", "3"]


@pytest.mark.parametrize(
    "content, expected",
    [
        ("class,weight\ncat,1\ndog,2\n3,1\n", [0.25, 0.5, 0.25]),
        ("class,weight\n3,0\ndog,1e300\ncat,1e300\n", [0.5, 0.5, 0]),
        ("class,weight\n2,6\n1,3\n0,1\n", [0.1, 0.3, 0.6]),
        (" [1, 2.0, 1]\n", [0.25, 0.5, 0.25]),
    ],
)
def test_a_file_of_weights(tmp_path, content: str, expected: list[float]) -> None:
    (tmp_path / "prior").write_text(content)
    assert read_prior("--test_prior", str(tmp_path / "prior"), NAMES).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "content, words",
    [
        ("class,weight\ncat,1\ndog,2\n", "class 3 is missing"),
        ("class,weight\ncat,1\ndog,2\ncat,2\n", "class cat twice"),
        ("class,weight\ncat,1\nbird,2\n3,3\n", "class bird is unknown"),
        ("class,weight\n0,1\n1,2\n3,3\n", "class 0 is unknown"),
        ("class,weight\ncat,1\ndog,-2\n3,3\n", "class dog is -2"),
        ("class,weight\ncat,1\ndog,\n3,3\n", "the weight"),
        ("class,weight\ncat,1\ndog,many\n3,3\n", "weight many"),
        ("class,weight\ncat,1\ndog,nan\n3,3\n", "dog is nan"),
        ("class,weight\ncat,0\ndog,0\n3,0\n", "all weights are 0"),
        ("name,weight\ncat,1\ndog,2\n3,3\n", "the columns name, weight"),
        ("", "empty"),
        ("[1, 2]", "2 weights"),
        ("[1, 2, true]", "no list of numbers"),
        ('[1, 2, "3"]', "no list of numbers"),
        ("[1, 2, Infinity]", "3 is inf"),
        (f"[1, 2, 1{'0' * 400}]", "the weight"),
        ("[1, 2,", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[0, 0, 0]", "all weights are 0"),
        ('{"cat": 1}', "the columns"),
    ],
)
def test_wrong_files_are_refused(tmp_path, content: str, words: str) -> None:
    (tmp_path / "prior").write_text(content)
    with pytest.raises(UsageError) as caught:
        read_prior("--test_prior", str(tmp_path / "prior"), NAMES)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 2


def made(**options: object) -> str | None:
    return made_for(Checkpoint("stage2", "resnet8", 10, 1, {}, options))[0]


def test_the_prior_that_a_classifier_was_made_for() -> None:
    assert made() is None
    for loss in LOSSES:
        plain = loss in ("ce", "focal")
        assert made(loss=loss, sampler="instance", drw_epoch=None) == ("train" if plain else "balanced"), loss
    assert made(loss="ce", sampler="class") == made(loss="ce", sampler="progressive") == "balanced"
    assert made(loss="ce", sampler="sqrt") is made(loss="ce") is None
    assert made(loss="ce", sampler="instance", drw_epoch=160) == "balanced"
    assert made(loss="logit-adjustment", sampler="instance", la_tau=1.0) == "balanced"
    assert made(loss="logit-adjustment", sampler="instance", la_tau=0.5) is None
    for method in set(METHODS) - {"joint"}:
        expected = "train" if method in ("ce", "los", "focal", "cosine") else "balanced"
        assert made(method=method, sampler=getattr(METHODS[method], "sampler", None)) == expected, method
    assert made(method="crt", sampler="instance") == "train" and made(method="joint", sampler=None) is None
    assert set(PLAIN) <= {*LOSSES, *METHODS} and set(DRAWN) == {"instance", "class", "progressive"}


def test_smoothed_labels_have_a_prior_between() -> None:
    """The mean of the labels that cross-entropy sees, of 2 classes with 3 and 1 images."""
    options = {"method": "los", "sampler": "instance", "label_smooth": 0.4}
    file = Checkpoint("stage2", "resnet8", 2, 1, {}, options)
    priors = priors_of("balanced", None, file, ["a", "b"], [3, 1])
    labels = torch.tensor([[0.8, 0.2]] * 3 + [[0.2, 0.8]])
    assert torch.allclose(priors.source.float(), labels.mean(dim=0)) and "smoothed by 0.4" in priors.source_name
    assert priors_of("balanced", "train", file, ["a", "b"], [3, 1]).source.tolist() == [0.75, 0.25]


def test_joint_has_the_prior_of_the_loss_of_stage_1(workdir, capsys) -> None:
    quick = ["--dataset", "digits", "--seed", "0", "--epochs", "1"]
    for loss, prior in (("ce", "train"), ("balanced-softmax", "balanced")):
        main_stage1.main([*quick, "--loss", loss])
        main_stage2.main(["--dataset", "digits", "--seed", "0", "--method", "joint"])
        result = evaluate.main(["--dataset", "digits", "--test_prior", "balanced"])
        assert result["prior"]["source"] == prior and f"stage 1's loss {loss}" in capsys.readouterr().out
    STAGE1.unlink()
    with pytest.raises(SystemExit):
        evaluate.main(["--dataset", "digits", "--test_prior", "balanced"])
    assert "--source_prior" in capsys.readouterr().err
    assert evaluate.main(["--dataset", "digits", "--test_prior", "train", "--source_prior", "train"])["prior"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stage-1 file of digits, its test images as PNG files, and files of weights."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main_stage1.main(TRAIN1)
        images = read_digits("", ImageOptions()).test.images
        Path("images").mkdir()
        for place, image in enumerate(torch.as_tensor(np.asarray(images))):
            Image.fromarray(image[0].numpy()).save(f"images/{place:04d}.png")
        Path("prior.json").write_text(json.dumps([0, *range(1, 10)]))
    return folder


ARGUMENTS = ["--from", "checkpoints/digits_exp10_resnet8_stage1.pt"]


@pytest.mark.parametrize("prior", ["balanced", "train", "em", "prior.json", "balanced --source_prior balanced"])
def test_evaluate_and_predict_agree_image_by_image(trained, monkeypatch, capsys, prior: str) -> None:
    monkeypatch.chdir(trained)
    seen: list[Tensor] = []
    report = metrics.report

    def spy(logits: Tensor, labels: Tensor, class_counts: Sequence[int]) -> metrics.Report:
        seen.append(logits.softmax(dim=1))
        return report(logits, labels, class_counts)

    monkeypatch.setattr(metrics, "report", spy)
    flags = ["--test_prior", *prior.split()]
    result = evaluate.main([*ARGUMENTS, *flags])
    found = predict.main(["images", *ARGUMENTS, *flags, "--top_k", "10", "--json", "p.json"])
    rows = torch.zeros(len(found), 10)
    for row, each in zip(rows, found):
        for top in each["top"]:
            row[top["class"]] = top["probability"]
    assert torch.allclose(rows, seen[0], atol=1e-5)
    labels = torch.arange(10).repeat_interleave(50)
    truth = read_digits("", ImageOptions()).test.labels
    assert torch.equal(torch.bincount(truth), torch.bincount(labels))
    assert result["top1"] == pytest.approx(float((rows.argmax(dim=1) == truth).double().mean()))
    content = json.loads(Path("p.json").read_text())
    assert content["images"] == found and content["prior"]["test"] == prior.split()[0] == result["prior"]["test"]
    assert content["prior"]["test_prior"] == pytest.approx(result["prior"]["test_prior"], abs=1e-4)
    assert result["prior"]["source"] == ("balanced" if "--source_prior" in prior else "train")
    out = capsys.readouterr().out
    assert out.count("estimated test prior, %:") == (2 if prior == "em" else 0)
    if prior == "prior.json":
        assert not rows[:, 0].any()
    predict.main(["images/0000.png", *ARGUMENTS, "--json", "p.json"])  # an earlier report, of the other form
    assert isinstance(json.loads(Path("p.json").read_text()), list)


def test_nothing_changes_where_the_priors_are_the_same(trained, monkeypatch) -> None:
    monkeypatch.chdir(trained)
    plain, same = evaluate.main(ARGUMENTS), evaluate.main([*ARGUMENTS, "--test_prior", "train"])
    assert plain["prior"] is None and plain["test_imb"] is None
    assert (plain["top1"], plain["per_class"]) == (same["top1"], same["per_class"])
    assert same["ece"] == pytest.approx(plain["ece_calibrated"], abs=1e-6) == same["ece_calibrated"]


def test_other_test_sets_of_a_file(trained, monkeypatch, capsys) -> None:
    monkeypatch.chdir(trained)
    result = evaluate.main([*ARGUMENTS, "--test_imb", "10", "50", "--json", "o.json"])
    rows = json.loads(Path("o.json").read_text())["test_imb"]
    assert [(row["distribution"], row["ratio"]) for row in rows] == [
        ("uniform", 1), ("forward", 10), ("forward", 50), ("backward", 10), ("backward", 50),
    ]  # fmt: skip
    accuracy = [row["accuracy"] for row in result["per_class"]]
    weights = [10 ** (-place / 9) for place in range(10)]
    forward = sum(a * w for a, w in zip(accuracy, weights)) / sum(weights)
    backward = sum(a * w for a, w in zip(accuracy, weights[::-1])) / sum(weights)
    assert rows[0]["top1"] == pytest.approx(result["top1"]) and rows[1]["top1"] == pytest.approx(forward)
    assert rows[3]["top1"] == pytest.approx(backward)
    assert "nothing is drawn" in (out := capsys.readouterr().out) and f"{100 * forward:.2f}" in out

    known = evaluate.main([*ARGUMENTS, "--test_imb", "10", "50", "--test_prior", "known"])
    balanced = evaluate.main([*ARGUMENTS, "--test_prior", "balanced"])
    assert known["top1"] == balanced["top1"] == pytest.approx(known["test_imb"][0]["top1"])
    Path("forward.json").write_text(json.dumps(weights))
    forward = evaluate.main([*ARGUMENTS, "--test_imb", "10", "--test_prior", "forward.json"])["test_imb"][1]
    assert known["test_imb"][1] == forward and math.isfinite(forward["top1"])


def test_a_file_that_says_nothing(workdir, capsys) -> None:
    main_stage1.main(["--dataset", "digits", "--seed", "0", "--epochs", "1"])
    torch.save(checkpoints.read(STAGE1).model, "theirs.pth")
    arguments = ["--from", "theirs.pth", "--dataset", "digits", "--test_prior", "balanced"]
    Image.new("L", (8, 8)).save("a.png")
    for main, first in ((evaluate.main, []), (predict.main, ["a.png"])):
        with pytest.raises(SystemExit):
            main([*first, *arguments])
        assert "theirs.pth does not say which prior" in capsys.readouterr().err
        assert main([*first, *arguments, "--source_prior", "balanced"])
    with pytest.raises(SystemExit):
        predict.main(["a.png", *arguments, "--source_prior", "train"])
    assert "does not say how many training images" in capsys.readouterr().err
    assert evaluate.main([*arguments, "--source_prior", "train"])["prior"]["source"] == "train"
    assert list(DIGITS) == [str(digit) for digit in range(10)]
