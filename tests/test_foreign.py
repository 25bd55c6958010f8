"""Files as other programs write them: the same logits as the network that was stored, or a refusal that says why."""

from __future__ import annotations

import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT
from torch import Tensor, nn

import compare
import evaluate
import main_stage2
from engine import predict
from models import build_model
from models.foreign import translate
from utils import checkpoints

State = dict[str, Any]
DIGITS = ["--dataset", "digits", "--pretrained_pth"]


def network(name: str = "resnet8", head: str = "linear") -> nn.Module:
    """A digits network whose BatchNorm statistics are not those of a fresh one."""
    torch.manual_seed(0)
    model = build_model(name, 10, 1, head)
    model.train()(torch.randn(16, 1, 8, 8))
    return model.eval()


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def renamed(state: State, old: str, new: str) -> State:
    return {name.replace(old, new): value for name, value in state.items()}


def split(state: State, wrapper: str = "") -> tuple[State, State]:
    """Backbone and classifier, modules of their own."""
    parts = ({}, {})
    for name, value in state.items():
        parts[name.startswith("fc.")][wrapper + name] = value
    return parts


def momentum(model: nn.Module) -> State:
    """The state of an optimizer after a step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.0, 0.9)
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def classifier_balancing(state: State, wrapper: str = "module.", **extra: Tensor) -> State:
    """Its final file."""
    backbone, classifier = split(state, wrapper)
    best = {"feat_model": backbone, "classifier": classifier | prefixed(wrapper, extra)}
    return {"epoch": 90, "best_epoch": 88, "state_dict_best": best, "best_acc": np.float64(0.5), "centroids": None}


def mislas(state: State, wrapper: str = "module.", **extra: Tensor) -> State:
    """Its files of both stages."""
    backbone, classifier = split(state, wrapper)
    content = {"epoch": 3, "state_dict_model": backbone, "state_dict_classifier": classifier}
    content |= {"state_dict_lws_model": prefixed(wrapper, extra)} if extra else {}
    return content | {"best_acc1": torch.tensor([41.0]), "its_ece": np.float64(3.5)}


def ldam(model: nn.Module, wrapper: str = "module.") -> State:
    """Its file; a cosine classifier is its NormedLinear, (D, C) and without scale."""
    state = renamed(model.state_dict(), "fc.", "linear.")
    if "linear.scale" in state:
        del state["linear.scale"]
        state["linear.weight"] = state["linear.weight"].T.clone()
    content = {
        "epoch": 200,
        "arch": "resnet32",
        "state_dict": prefixed(wrapper, state),
        "best_acc1": torch.tensor(42.0),
    }
    return content | {"optimizer": momentum(model)}


def noise(model: nn.Module) -> State:
    """Other weights of the same network."""
    return {name: torch.rand_like(value, dtype=torch.float) for name, value in model.state_dict().items()}


LAYOUTS: dict[str, tuple[str, Callable[[nn.Module], State], str]] = {  # network, what is saved, as what it is known
    "LOS": ("resnet8", lambda m: m.state_dict(), "torchvision"),
    "LOS, DataParallel": ("resnet8", lambda m: nn.DataParallel(m).state_dict(), "torchvision"),
    "LOS, compiled": ("resnet8", lambda m: prefixed("_orig_mod.", m.state_dict()), "torchvision"),
    "Weight Balancing": ("resnet18", lambda m: prefixed("encoder.", m.state_dict()), "Weight Balancing"),
    "Weight Balancing, DataParallel": (
        "resnet8",
        lambda m: prefixed("module.encoder.", m.state_dict()),
        "Weight Balancing",
    ),
    "classifier-balancing": (
        "resnet8",
        lambda m: classifier_balancing(m.state_dict()),
        "classifier-balancing, under state_dict_best",
    ),
    "classifier-balancing, one GPU": (
        "resnet8",
        lambda m: classifier_balancing(m.state_dict(), ""),
        "classifier-balancing, under state_dict_best",
    ),
    "classifier-balancing, latest": (
        "resnet8",
        lambda m: {"epoch": 1, "state_dict": classifier_balancing(m.state_dict())["state_dict_best"]},
        "classifier-balancing, under state_dict",
    ),
    "classifier-balancing, both": (
        "resnet8",
        lambda m: (
            classifier_balancing(m.state_dict()) | {"state_dict": classifier_balancing(noise(m))["state_dict_best"]}
        ),
        "classifier-balancing, under state_dict_best, not those under state_dict",
    ),
    "LDAM-DRW": ("resnet8", ldam, "LDAM-DRW, under state_dict"),
    "LDAM-DRW, one GPU": ("resnet8", lambda m: ldam(m, ""), "LDAM-DRW, under state_dict"),
    "MiSLAS": ("resnet8", lambda m: mislas(m.state_dict()), "MiSLAS"),
    "MiSLAS, one GPU": ("resnet8", lambda m: mislas(m.state_dict(), ""), "MiSLAS"),
    "pytorch-cifar": (
        "resnet18",
        lambda m: {
            "net": prefixed("module.", renamed(renamed(m.state_dict(), "downsample", "shortcut"), "fc.", "linear.")),
            "acc": 95.1,
        },
        "LDAM-DRW, under net",
    ),
    "timm": (
        "resnet8",
        lambda m: {
            "state_dict": m.state_dict(),
            "state_dict_ema": noise(m),
            "args": Namespace(lr=0.1, betas=[0.9, 0.99]),
            "metric": np.float32(1),
        },
        "torchvision, under state_dict, not those under state_dict_ema",
    ),
    "torchvision": (
        "resnet8",
        lambda m: {
            "model": m.state_dict(),
            "model_ema": {"n_averaged": torch.tensor(3)} | prefixed("module.", noise(m)),
            "optimizer": momentum(m),
        },
        "torchvision, under model, not those under model_ema",
    ),
    "model_state_dict": (
        "resnet8",
        lambda m: {"model_state_dict": m.state_dict(), "loss": torch.ones(3), "rng_state": np.arange(9)},
        "torchvision, under model_state_dict",
    ),
    "Lightning": (
        "resnet8",
        lambda m: {"state_dict": prefixed("net.", m.state_dict()), "optimizer_states": [momentum(m)]},
        "torchvision, under state_dict",
    ),
    "before PyTorch 0.4.1": (
        "resnet8",
        lambda m: {name: value for name, value in m.state_dict().items() if "num_batches" not in name},
        "torchvision",
    ),
    "a cosine network of ours": ("resnet8", lambda m: m.state_dict(), "torchvision"),
}


@pytest.fixture
def logits(monkeypatch) -> list[Tensor]:
    """What evaluate.main predicts on the test images, and ``logits.of`` what a network itself says of them."""

    class Seen(list):
        def of(self, model: nn.Module) -> Tensor:
            return predict(model, self.batches)[0]

    seen = Seen()

    def spy(model: nn.Module, batches: Any, **options: Any) -> tuple[Tensor, Tensor]:
        seen.batches = batches
        found = predict(model, batches, **options)
        seen.append(found[0])
        return found

    monkeypatch.setattr(evaluate, "predict", spy)
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_logits_are_those_of_the_stored_network(workdir, logits, capsys, layout: str) -> None:
    name, build, known_as = LAYOUTS[layout]
    model = network(name, "cosine" if "cosine" in layout else "linear")
    torch.save(build(model), "theirs.pth")
    result = evaluate.main([*DIGITS, "theirs.pth"])
    assert result["network"] == name
    assert capsys.readouterr().out.startswith(f"theirs.pth: weights named as in {known_as}\n")
    assert torch.equal(logits[0], logits.of(model))


@pytest.mark.parametrize("wrapper", ["module.", ""])
@pytest.mark.parametrize("layout", ["classifier-balancing", "MiSLAS"])
def test_learned_scales_are_multiplied_into_the_classifier(workdir, logits, capsys, layout: str, wrapper: str) -> None:
    model, scales = network(), torch.rand(10) + 0.5
    if layout == "MiSLAS":
        content = mislas(model.state_dict(), wrapper, learned_norm=scales[None])
    else:
        content = classifier_balancing(model.state_dict(), wrapper, scales=scales)
    torch.save(content, "theirs.pth")
    evaluate.main([*DIGITS, "theirs.pth"])
    assert "the learned scales multiplied into the classifier" in capsys.readouterr().out
    assert torch.allclose(logits[0], scales * logits.of(model), atol=1e-5)


def test_ldam_is_a_cosine_classifier(workdir, logits, capsys) -> None:
    model = network(head="cosine")
    content = ldam(model)
    torch.save(content, "theirs.pth")
    evaluate.main([*DIGITS, "theirs.pth"])
    assert "LDAM-DRW, under state_dict, a cosine classifier, scale 30" in capsys.readouterr().out
    assert torch.equal(logits[0], logits.of(model))
    model.fc = nn.Identity()
    weight = content["state_dict"]["module.linear.weight"]
    theirs = F.normalize(logits.of(model), dim=1).mm(F.normalize(weight, dim=0))
    assert weight.shape == (64, 10) and torch.allclose(logits[0], 30 * theirs, atol=1e-4)


def test_stage2_and_compare_continue_from_them(workdir, capsys) -> None:
    model, scales = network(), torch.rand(10) + 0.5
    torch.save(classifier_balancing(model.state_dict(), scales=scales), "theirs.pth")
    main_stage2.main([*DIGITS, "theirs.pth", "--finetune_epoch", "1", "--seed", "0"])
    two = checkpoints.read("checkpoints/digits_exp100_resnet8_stage2.pt")
    assert two.parent["path"] == "theirs.pth" and set(two.model) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert name.startswith("fc.") or torch.equal(two.model[name], value)
    start = {"fc.weight": scales[:, None] * model.fc.weight, "fc.bias": scales * model.fc.bias}
    main_stage2.main([*DIGITS, "theirs.pth", "--method", "joint", "--seed", "0"])
    two = checkpoints.read("checkpoints/digits_exp100_resnet8_stage2.pt")
    assert all(torch.equal(two.model[name], value) for name, value in start.items())
    rows = compare.main([*DIGITS, "theirs.pth", "--method", "joint", "tau-norm", "--finetune_scope", "fc"])
    assert {row["method"] for row in rows} == {"joint", "tau-norm"}


def test_stage2_of_a_cosine_classifier(workdir, capsys) -> None:
    torch.save(ldam(network(head="cosine")), "theirs.pth")
    with pytest.raises(SystemExit):
        main_stage2.main([*DIGITS, "theirs.pth"])
    assert "--method los: theirs.pth has a cosine head" in capsys.readouterr().err
    main_stage2.main([*DIGITS, "theirs.pth", "--method", "crt", "--finetune_epoch", "1"])


@pytest.mark.parametrize("numpy_core", ["numpy._core", "numpy.core"])
def test_numpy_and_arguments_are_not_built(workdir, numpy_core: str) -> None:
    """Also in files older than PyTorch 1.6, and in those of either NumPy 1 or 2."""
    content = classifier_balancing(network().state_dict()) | {"args": Namespace(lr=0.1), "history": np.eye(2)}
    torch.save(content, "theirs.pth", _use_new_zipfile_serialization=False)
    blob = Path("theirs.pth").read_bytes()
    core = np.float64(0).__reduce__()[0].__module__.encode()
    assert blob.count(core) == 2
    Path("theirs.pth").write_bytes(blob.replace(core, numpy_core.encode() + b".multiarray"))
    foreign = checkpoints.read("theirs.pth").foreign
    assert {type(foreign[name]).__name__ for name in ("best_acc", "args", "history")} == {"_Dropped"}
    evaluate.main([*DIGITS, "theirs.pth"])


OBJECTS: dict[str, tuple[Callable[[nn.Module], Any], State]] = {  # what is saved, and how
    "the module": (lambda m: m, {}),
    "a module beside others": (
        lambda m: {"net": nn.DataParallel(m), "optimizer": torch.optim.SGD(m.parameters()), "epoch": 3},
        {"_use_new_zipfile_serialization": False},
    ),
    "nothing but weights, in a newer protocol": (lambda m: m.state_dict(), {"pickle_protocol": 4}),
}


@pytest.mark.parametrize("held", OBJECTS)
def test_the_conversion_that_is_offered_works(workdir, logits, capsys, monkeypatch, held: str) -> None:
    build, options = OBJECTS[held]
    model, folder = network(), workdir / "with spaces"
    folder.mkdir()
    torch.save(build(model), folder / "theirs.pth.tar", **options)
    with pytest.raises(SystemExit):
        evaluate.main([*DIGITS, "with spaces/theirs.pth.tar"])
    error = capsys.readouterr().err
    assert "pickled Python objects, which are not run here" in error
    command = error.splitlines()[1].split("that wrote it: ")[1]
    assert command.startswith("python -c ")
    _, _, code, *paths = shlex.split(command)
    if held == "the module":  # and as it is told
        subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True, cwd=ROOT)
    else:
        monkeypatch.setattr(sys, "argv", ["-c", *paths])
        exec(code, {})
    evaluate.main([*DIGITS, str(folder / "theirs.pth.tensors.pt")])
    assert torch.equal(logits[0], logits.of(model))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {  # what is saved, words of the answer
    "self-attention": (
        lambda: classifier_balancing(network().state_dict() | {"modulatedatt.g.weight": torch.ones(2)}),
        "module.modulatedatt.g.weight place",
    ),
    "a layer before the classifier": (
        lambda: classifier_balancing(network().state_dict() | {"fc_add.weight": torch.ones(2, 2)}),
        "module.fc_add.weight",
    ),
    "a classifier of its own": (
        lambda: classifier_balancing(network().state_dict(), cosnorm_classifier=torch.ones(10, 64)),
        "classifier.module.cosnorm_classifier",
    ),
    "a memory": (lambda: classifier_balancing(network().state_dict()) | {"centroids": torch.ones(10, 64)}, "centroids"),
    "a block": (
        lambda: mislas(network().state_dict()) | {"state_dict_block": {"conv1.weight": torch.ones(2)}},
        "block",
    ),
    "many of them": (lambda: network().state_dict() | {f"p{i}.x": torch.ones(1) for i in range(9)}, "p3.x and 5 more"),
    "something instead of a tensor": (lambda: network().state_dict() | {"bn1.bias": np.zeros(16)}, "bn1.bias"),
    "a name twice": (lambda: network().state_dict() | {"module.bn1.bias": torch.ones(16)}, "module.bn1.bias"),
    "scales of another size": (
        lambda: classifier_balancing(network().state_dict(), scales=torch.ones(9)),
        "classifier.module.scales",
    ),
    "no classifier": (lambda: {"model": split(network().state_dict())[0]}, "feature extractor no classifier"),
    "nearest class means": (
        lambda: {"state_dict_best": {"feat_model": split(network().state_dict())[0], "classifier": {}}},
        "feature extractor no classifier",
    ),
    "no bias": (
        lambda: {name: value for name, value in network().state_dict().items() if name != "fc.bias"},
        "without bias linear cosine fc.scale",
    ),
    "no network of ours": (
        lambda: network().state_dict() | {"layer9.0.conv1.weight": torch.ones(1)},
        "named as in torchvision no network resnet34, resnet18",
    ),
    "other classes": (lambda: build_model("resnet8", 7, 1).state_dict(), "7 classes 10"),
    "no dict": (lambda: [torch.ones(2)], "another program no dict"),
    "no weights": (lambda: {"epoch": 3}, "another program resnet34"),
    "nothing": (dict, "another program resnet34"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_and_why(workdir, capsys, what: str) -> None:
    build, words = REFUSED[what]
    torch.save(build(), "theirs.pth")
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*DIGITS, "theirs.pth"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 2 and "theirs.pth" in error
    assert all(word in error for word in words.split()), error


def test_a_square_classifier_without_bias_is_not_guessed() -> None:
    state = build_model("resnet8", 64).state_dict()
    del state["fc.bias"]
    with pytest.raises(checkpoints.UsageError, match="linear and cosine"):
        translate(state, "theirs.pth")


def test_a_file_of_ours_that_lost_a_field_is_not_taken_for_another_programs(workdir, capsys) -> None:
    torch.save({"format": 3, "model": network().state_dict()}, "ours.pt")
    with pytest.raises(SystemExit):
        evaluate.main([*DIGITS, "ours.pt"])
    assert "ours.pt lacks data, head, in_channels" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet152", "resnext50_32x4d"])
def test_every_parameter_of_the_large_networks_has_a_place(name: str) -> None:
    with torch.device("meta"):
        state = getattr(torchvision.models, name)(num_classes=20).state_dict()
    assert translate(classifier_balancing(state), "theirs.pth").model.keys() == state.keys()
