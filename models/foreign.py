"""Checkpoints of other programs: :func:`translate` knows them by their keys and gives their weights our names.

* Label Over-Smooth, torchvision, timm: our names, in a bare state dict or under one of ``_ENTRIES``.
* Weight Balancing (CVPR 2022): ``encoder.`` before every name.
* classifier-balancing (Decoupling, ICLR 2020): ``feat_model`` and ``classifier`` under ``state_dict_best`` (its final
  file) or ``state_dict`` (its latest); LWS adds ``classifier.scales`` (C,), factors of the logits.
* LDAM-DRW (NeurIPS 2019): the classifier is ``linear``. Trained with LDAM it is a cosine classifier, ``weight`` (D, C)
  without bias; its scale, 30, is part of the loss.
* MiSLAS (CVPR 2021): ``state_dict_model`` and ``state_dict_classifier``, after stage 2 also ``state_dict_lws_model``
  with ``learned_norm`` (1, C), factors of the logits.
* pytorch-cifar: ``linear``, and ``shortcut`` for ``downsample``.

``module.`` of DataParallel and ``_orig_mod.`` of torch.compile may stand anywhere. Numbers, words and the state of
training are left behind; a parameter that has no place in our networks is an error, whatever it is for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.heads import HEADS
from models.imagenet import timm_names
from utils.errors import UsageError

#: Entries that hold the weights of a whole network; the first that a file has is taken.
_ENTRIES = ("state_dict_best", "state_dict", "model_state_dict", "model_state", "model", "network", "net")
#: Entries that no prediction depends on.
_TRAINING = re.compile("optim|sched|scaler|rng|criterion|loss")
#: Classes of the data sets that MiSLAS renumbers: ImageNet-LT, Places-LT and iNaturalist 2018. Many classes are of the
#: same size, and how those are ordered depends on NumPy's version and on the CPU, so that the order cannot be undone.
_RENUMBERED = (1000, 365, 8142)
_WRAPPERS = ("module", "_orig_mod")
_LAYOUTS = {  # what a name begins with -> who names so
    "state_dict_model.": "MiSLAS",
    "feat_model.": "classifier-balancing",
    "encoder.": "Weight Balancing",
    "linear.": "LDAM-DRW",
}
_RENAMES = (
    (r"^((state_dict_model|feat_model|encoder|backbone|model|net)\.)+", ""),
    (r"^((state_dict_)?classifier\.(fc\.)?|linear\.)", "fc."),
    (r"^state_dict_lws_model\.learned_norm$", "fc.scales"),
    (r"\.shortcut\.", ".downsample."),
)
_BACKBONE = re.compile(
    r"(conv1|layer\d+\.\d+\.(conv\d|downsample\.0))\.weight"
    r"|(bn1|layer\d+\.\d+\.(bn\d|downsample\.1))\.(weight|bias|running_mean|running_var|num_batches_tracked)"
)
#: LDAM-DRW's, which its files do not hold.
_COSINE_SCALE = 30.0


@dataclass(frozen=True)
class Foreign:
    """Weights under our names, the kind of their classifier (a key of ``HEADS``), and what they were recognised as."""

    model: dict[str, Tensor]
    head: str
    known_as: str


def translate(content: Mapping[object, object], source: str) -> Foreign | None:
    """The network in the dict of another program's file ``source``, or None where there is none of our kind.

    Raises:
        UsageError: parameters that have no place here, no classifier, or one of a kind that the file does not tell.
    """
    beside = [str(name) for name in content if _is_training(str(name)) and "." in str(name)]
    entries = {str(name): value for name, value in content.items() if _may_matter(str(name), value)}
    entry = next((name for name in _ENTRIES if isinstance(entries.get(name), Mapping)), None)
    named = _named(entries if entry is None else entries.pop(entry))
    beside += [theirs for theirs, _ in named.values() if _is_training(theirs)]
    named = {ours: pair for ours, pair in named.items() if not _is_training(pair[0])}
    if "conv1.weight" not in named:
        return None

    rest = [] if entry is None else list(entries)
    copies = [name for name in rest if _named(entries[name]).keys() >= named.keys()]  # averaged or older weights
    strange = [name for name in rest if name not in copies]
    strange += [theirs for ours, (theirs, value) in named.items() if not _has_place(ours, value)]
    if strange:
        raise _no_place(strange, source)
    state = {ours: value for ours, (_, value) in named.items() if isinstance(value, Tensor)}
    notes = _convert_classifier(state)
    classifier = {name for name in state if name.startswith("fc.")}
    with torch.device("meta"):
        kinds = {kind: {f"fc.{name}" for name in make(1, 1).state_dict()} for kind, make in HEADS.items()}
    head = next((kind for kind, names in kinds.items() if names == classifier), None)
    if not classifier:
        raise UsageError(f"{source} is a feature extractor: it holds no classifier", "a file of the whole network")
    if classifier == {"fc.weight"}:
        raise UsageError(
            f"{source} has a classifier without bias: linear and cosine ones look the same",
            "the file with fc.bias, zeros, if it is linear, or with fc.scale, a number, if it is cosine",
        )
    if head is None:
        raise _no_place(sorted(named[name][0] for name in classifier), source)
    for name in [name for name in state if name.endswith(".running_mean")]:  # PyTorch 0.4.1 brought the counters
        state.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))

    names = [_unwrapped(theirs) for theirs, _ in named.values()]
    whose = next((who for start, who in _LAYOUTS.items() if any(n.startswith(start) for n in names)), "torchvision")
    words = [f"weights named as in {whose}", *([f"under {entry}"] if entry else [])]
    if whose == "MiSLAS" and len(state["fc.weight"]) in _RENUMBERED:
        raise UsageError(
            f"{source} is of MiSLAS, whose data sets number the {len(state['fc.weight']):,} classes by falling size",
            "a file whose classifier's rows are in the order of the published lists",
        )
    words += [f"without {beside[0]}" + (f" and {len(beside) - 1} more" if beside[1:] else "")] if beside else []
    return Foreign(state, head, ", ".join([*words, *(f"not those under {name}" for name in copies), *notes]))


def plain_weights(content: Mapping[object, object]) -> dict[str, Tensor]:
    """The tensors of the network in a file's dict, by their own names without wrappers."""
    entry = next((key for key in _ENTRIES if isinstance(content.get(key), Mapping)), None)
    leaves = _leaves(content if entry is None else content[entry])
    return {_unwrapped(key): value for key, value in leaves.items() if isinstance(value, Tensor)}


def translate_timm(content: Mapping[object, object], name: str, source: str) -> tuple[Foreign, int, int]:
    """The network ``timm:name`` in the dict of a file ``source``, its number of classes and of input channels.

    Raises:
        UsageError: the file is of another network.
    """
    weights = plain_weights(content)
    classifier, first = timm_names(name)
    missing = [key for key in (f"{classifier}.weight", f"{classifier}.bias", f"{first}.weight") if key not in weights]
    if missing:
        raise UsageError(f"{source} holds no {missing[0]}, which {name} has", "the --network that it is of")
    state = {
        f"fc.{key.rpartition('.')[2]}" if key.startswith(f"{classifier}.") else f"body.{key}": value
        for key, value in weights.items()
    }
    state["fc.weight"] = state["fc.weight"].flatten(1)  # some are 1x1 convolutions
    channels = state[f"body.{first}.weight"].shape[1]
    if not (len(state["fc.weight"]) and channels):
        raise UsageError(f"{source} has no classes or no channels", "a whole checkpoint")
    return Foreign(state, "linear", f"weights named as in timm's {name}"), len(state["fc.weight"]), channels


def _may_matter(name: str, value: object) -> bool:
    """Whether an entry of a file may be part of a network: a parameter's name, or a tensor of several numbers."""
    if "." in name:
        return not _is_training(name)
    tensors = (leaf for leaf in _leaves(value).values() if isinstance(leaf, Tensor))
    return _TRAINING.search(name) is None and any(tensor.numel() > 1 for tensor in tensors)


def _is_training(name: str) -> bool:
    """Whether a name begins with a part of training beside the network: "criterion.weight", "module.loss.counts"."""
    return _TRAINING.search(_unwrapped(name).split(".")[0]) is not None


def _leaves(value: object, path: str = "") -> dict[str, object]:
    """{path: leaf} of nested dicts, lists and tuples, the parts of a path joined by dots."""
    found: dict[str, object] = {}
    left = [(path, value)]
    while left:
        path, value = left.pop()
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            left += [(f"{path}.{key}".lstrip("."), item) for key, item in [*value.items()][::-1]]
        else:
            found[path] = value
    return found


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _named(weights: object) -> dict[str, tuple[str, object]]:
    """{our name: (their name, value)} of nested weights; a second value for a name gets one that has no place."""
    named: dict[str, tuple[str, object]] = {}
    for theirs, value in _leaves(weights).items():
        ours = _unwrapped(theirs)
        for pattern, replacement in _RENAMES:
            ours = re.sub(pattern, replacement, ours)
        named[f"{ours} of {theirs}" if ours in named else ours] = theirs, value
    return named


def _has_place(name: str, value: object) -> bool:
    """Whether a value may be that parameter of a residual network."""
    return isinstance(value, Tensor) and (name.startswith("fc.") or _BACKBONE.fullmatch(name) is not None)


def _no_place(names: Sequence[str], source: str) -> UsageError:
    few = ", ".join(name if len(name) < 100 else f"{name[:97]}..." for name in names[:4])
    some = few + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return UsageError(
        f"{source} is a checkpoint of another program, and no network here has a place for {some}",
        "a file without, if they are not needed to classify",
    )


def _convert_classifier(state: dict[str, Tensor]) -> list[str]:
    """Puts the classifier ``fc`` into a form that ``HEADS`` has, where there is one; says what was done."""
    parts = {name for name in state if name.startswith("fc.")}
    weight = state.get("fc.weight", torch.tensor(0))
    num_features = max((value.numel() for name, value in state.items() if name.endswith("running_mean")), default=0)
    scales = state.get("fc.scales", torch.tensor(0)).flatten()
    if parts == {"fc.weight", "fc.bias", "fc.scales"} and scales.shape == weight.shape[:1]:
        del state["fc.scales"]
        state |= {"fc.weight": scales[:, None] * weight, "fc.bias": scales * state["fc.bias"]}
        return ["the learned scales multiplied into the classifier"]
    if parts == {"fc.weight"} and weight.ndim == 2 and weight.shape[0] == num_features != weight.shape[1]:
        state |= {"fc.weight": weight.T.contiguous(), "fc.scale": torch.tensor(_COSINE_SCALE)}
        return [f"a cosine classifier, scale {_COSINE_SCALE:g}"]
    return []
