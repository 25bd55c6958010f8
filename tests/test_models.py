import pytest
import torch

from models import BACKBONES, build_model, recognise

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


@pytest.mark.parametrize("network", BACKBONES)
def test_parameter_counts(network: str) -> None:
    with torch.device("meta"):
        model = build_model(network, 100)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[network]


@pytest.mark.parametrize("network", BACKBONES)
def test_logits_are_the_classifier_on_the_features(network: str) -> None:
    model = build_model(network, 7, in_channels=1).eval()
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        features = model.features(images)
        assert features.shape == (2, model.fc.in_features)
        assert torch.equal(model(images), model.fc(features))


def test_resnet34_has_the_published_names() -> None:
    """Those of a torchvision ResNet-34, which LOS and Weight Balancing use, with a 3x3 stem."""
    import torchvision

    with torch.device("meta"):
        ours, theirs = build_model("resnet34", 100), torchvision.models.resnet34(num_classes=100)
    names = list(ours.state_dict())
    assert set(names) == set(theirs.state_dict())
    assert names[0] == "conv1.weight" and {"layer1.0.conv1.weight", "layer2.0.downsample.0.weight", "fc.bias"} < {
        *names
    }
    assert ours.conv1.weight.shape == (64, 3, 3, 3)


def test_resnet34_computes_what_torchvision_computes() -> None:
    import torchvision

    torch.manual_seed(0)
    ours, theirs = build_model("resnet34", 10).eval(), torchvision.models.resnet34(num_classes=10).eval()
    theirs.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)


@pytest.mark.parametrize("network", BACKBONES)
def test_a_state_dict_is_recognised(network: str) -> None:
    with torch.device("meta"):
        state = build_model(network, 13, in_channels=1).state_dict()
    assert recognise(state) == (network, 13, 1)
    state["conv1.bias"] = torch.zeros(1)
    assert recognise(state) is None
    assert recognise({"weight": torch.zeros(2)}) is None
