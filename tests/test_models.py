import sys

import pytest
import torch
import torchvision
from torch import nn

from engine import for_evaluation
from models import BACKBONES, build_model, pick_stem, recognise, trained_part
from models.imagenet import IMAGENET
from models.resnet import SMALL
from utils.errors import UsageError

NETWORKS = [(network, stem) for network, makers in BACKBONES.items() for stem in makers if stem != "rows"]
PARAMETERS = {  # of the convolutional networks with C = 100, colour images
    "resnet18": 11_220_132,
    "resnet34": 21_328_292,
    "resnet50": 23_705_252,
    "resnet8": 81_140,
    "resnet20": 275_572,
    "resnet32": 470_004,
    "resnet44": 664_436,
    "resnet56": 858_868,
    "resnet32x4": 7_409_316,
}


@pytest.mark.parametrize("network", SMALL)
def test_parameter_counts(network: str) -> None:
    with torch.device("meta"):
        model = build_model(network, 100)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[network]


@pytest.mark.parametrize("network", IMAGENET)
def test_networks_for_photos_are_torchvisions(network: str) -> None:
    makers = vars(torchvision.models) | {"resnet10": lambda: torchvision.models.ResNet(block, [1, 1, 1, 1])}
    block = torchvision.models.resnet.BasicBlock
    ours, theirs = build_model(network, 1000, stem="imagenet").eval(), makers[network]().eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-4)


def test_a_stem_suits_the_images() -> None:
    assert [pick_stem("resnet50", side) for side in (28, 64, 65, 224)] == ["small", "small", "imagenet", "imagenet"]
    assert pick_stem("resnet32", 224) == "small" and pick_stem("resnet101", 32) == "imagenet"
    assert pick_stem("resnet50", 32, "imagenet") == "imagenet" and pick_stem("timm:vit_tiny", 32) == "imagenet"
    with pytest.raises(UsageError, match="--stem imagenet with --network resnet20"):
        pick_stem("resnet20", 32, "imagenet")
    with pytest.raises(UsageError, match="which has its own"):
        pick_stem("timm:vit_tiny", 32, "small")


@pytest.mark.parametrize("network, stem", [("resnet20", "small"), ("resnet10", "imagenet")])
def test_what_is_trained(network: str, stem: str) -> None:
    model = build_model(network, 5, stem=stem)
    assert trained_part(model, "all") is model
    part = trained_part(model, "last_block")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    last = {"resnet20": "layer3.2.", "resnet10": "layer4.0."}[network]
    assert trained == {n for n, _ in model.named_parameters() if n.startswith((last, "fc."))} and len(trained) > 7
    assert sum(1 for _ in part.parameters()) == len(trained)


def test_timm_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="pip install timm"):
        build_model("timm:resnet18", 5)


def test_networks_of_timm() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    model = build_model("timm:test_resnet", 5, in_channels=1, head="cosine").eval()
    images = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), model.fc(model.features(images))) and model(images).shape == (2, 5)
    with pytest.raises(UsageError, match="timm:resnet5000"):
        build_model("timm:resnet5000", 5)
    with pytest.raises(UsageError, match="last block"):
        _ = model.last_block


@pytest.mark.parametrize("network, stem", NETWORKS)
def test_logits_are_the_classifier_on_the_features(network: str, stem: str) -> None:
    model = build_model(network, 7, in_channels=1, stem=stem).eval()
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        features = model.features(images)
        assert features.shape == (2, model.fc.in_features)
        assert torch.equal(model(images), model.fc(features))


def test_resnet34_has_the_published_names() -> None:
    """Those of a torchvision ResNet-34, which LOS and Weight Balancing use, with a 3x3 stem."""
    with torch.device("meta"):
        ours, theirs = build_model("resnet34", 100), torchvision.models.resnet34(num_classes=100)
    names = list(ours.state_dict())
    assert set(names) == set(theirs.state_dict())
    assert names[0] == "conv1.weight" and {"layer1.0.conv1.weight", "layer2.0.downsample.0.weight", "fc.bias"} < {
        *names
    }
    assert ours.conv1.weight.shape == (64, 3, 3, 3)


@pytest.mark.parametrize(
    "name, stem", [("resnet20", "small"), ("resnet34", "small"), ("resnet50", "small"), ("resnet50", "imagenet")]
)
def test_batchnorm_is_folded_into_the_convolutions(name: str, stem: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, 10, 3, stem=stem).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                value.add_(0.3 * torch.rand_like(value))
    images = torch.randn(8, 3, 32, 32)
    fast = for_evaluation(model)
    with torch.inference_mode():
        expected, found = model(images), fast(images)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_resnet34_computes_what_torchvision_computes() -> None:
    torch.manual_seed(0)
    ours, theirs = build_model("resnet34", 10).eval(), torchvision.models.resnet34(num_classes=10).eval()
    theirs.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)


@pytest.mark.parametrize("network, stem", NETWORKS)
def test_a_state_dict_is_recognised(network: str, stem: str) -> None:
    with torch.device("meta"):
        state = build_model(network, 13, in_channels=1, stem=stem).state_dict()
    assert recognise(state) == (network, stem, 13, 1)
    state["conv1.bias"] = torch.zeros(1)
    assert recognise(state) is None
    assert recognise({"weight": torch.zeros(2)}) is None
