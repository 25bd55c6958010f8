"""Networks of timm's with weights that somebody trained, and how images are to be shown to them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from models.foreign import plain_weights
from models.given import INTERPOLATIONS, Preprocessing
from models.imagenet import TIMM, TimmNetwork
from utils.errors import UsageError


def pretrained_network(
    name: str, weights: Mapping[object, object] | None, source: str, image_size: int | None = None
) -> tuple[TimmNetwork, Preprocessing, str]:
    """timm's network ``name`` with the weights of a file's content, or where there is none its own, downloaded.

    Its preprocessing is that of timm's data config, at ``image_size`` pixels where that is given. Returned too is the
    licence that timm states for its own weights.

    Raises:
        UsageError: there is no such network, its weights cannot be had, or the file's are of another network.
    """
    network = TimmNetwork(name, 1, pretrained=weights is None)
    if weights is not None:
        load_body(network, weights, name, source)
    from timm.data.config import resolve_model_data_config  # here, since it is slow to import

    config = resolve_model_data_config(network.body)  # type: ignore[no-untyped-call]
    size = image_size or int(config["input_size"][-1])
    try:
        with torch.inference_mode():
            network.eval().features(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        usual = int(config["input_size"][-1])
        raise UsageError(f"--image_size {size} with --network {TIMM}{name}: {reason}", f"{usual}, its own") from None
    kind = str(config["interpolation"])
    how = Preprocessing(
        size,
        math.floor(size / float(config["crop_pct"])),
        kind if kind in INTERPOLATIONS else "bicubic",
        tuple(config["mean"]),
        tuple(config["std"]),
    )
    licence = cast(Mapping[str, object], network.body.pretrained_cfg).get("license")
    return network, how, str(licence or "not stated")


def crop_mode(network: TimmNetwork) -> str:
    """What timm shows of images that are not square: their "center", all of them ("squash"), or more ("border")."""
    return str(cast(Mapping[str, object], network.body.pretrained_cfg).get("crop_mode") or "center")


def load_body(network: TimmNetwork, content: Mapping[object, object], name: str, source: str) -> None:
    """Puts the weights of another program's file, without their classifier, into a network of timm's.

    Raises:
        UsageError: they do not fit, with the first name that does not.
    """
    wanted = network.body.state_dict()
    found = plain_weights(content)
    if any(key.startswith("_blocks.") for key in found):
        found = from_efficientnet_pytorch(found, list(wanted))
    classifier = str(cast(Mapping[str, object], network.body.pretrained_cfg)["classifier"])
    found = {key: value for key, value in found.items() if not key.startswith(f"{classifier}.")}
    for key, value in wanted.items():  # older PyTorch had no counters
        if key.endswith("num_batches_tracked"):
            found.setdefault(key, value)
    wrong = [key for key, value in wanted.items() if key not in found or found[key].shape != value.shape]
    wrong += [key for key in found if key not in wanted]
    if wrong:
        raise UsageError(f"{source}: {wrong[0]} is missing, of another shape or not of {TIMM}{name}", "its own weights")
    if not all(bool(value.isfinite().all()) for value in found.values()):
        raise UsageError(f"{source}: its weights are not finite", "an undamaged file")
    network.body.load_state_dict(found)


#: Names in efficientnet_pytorch and its ports -> timm's, outside of blocks and in them: where a block has an expansion,
#: and where it has none.
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
}
_PLAIN = _EXPANDED | {"_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def from_efficientnet_pytorch(weights: Mapping[str, Tensor], wanted: list[str]) -> dict[str, Tensor]:
    """EfficientNet's weights under timm's names, of which ``wanted`` gives the blocks."""
    blocks = list(dict.fromkeys(found[0] for key in wanted if (found := re.match(r"blocks\.\d+\.\d+", key))))
    renamed = {}
    for key, value in weights.items():
        part, _, rest = key.partition(".")
        if part == "_blocks":
            number, part, rest = rest.split(".", 2)
            table = _EXPANDED if f"_blocks.{number}._expand_conv.weight" in weights else _PLAIN
            inside = blocks[int(number)] if int(number) < len(blocks) else f"blocks.{number}"
            renamed[f"{inside}.{table.get(part, part)}.{rest}"] = value
        else:
            renamed[f"{_OUTSIDE.get(part, part)}.{rest}"] = value
    return renamed
