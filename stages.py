"""What the commands share: their common options, and how a stage begins, logs an epoch and ends."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import datasets
from datasets import DATASETS, IMB_TYPES, INPUTS, NATURAL, SUBSETS, Batches, ImageSet, LongTailed, Shown
from engine import Selection, TrainStats, evaluate, is_due, predict
from models import BACKBONES, HEADS, STEMS, TIMM, Network, build_model, imagenet_weights, pick_stem, recognise
from models.foreign import translate, translate_timm
from utils import checkpoints
from utils.checkpoints import IDENTITY, SELECT, STAGES, Checkpoint, NoCheckpoint
from utils.distributed import by_first, in_turn, launcher, meet, processes, rank
from utils.files import require_room, require_writable
from utils.metrics import GROUPS, Logits, Report, fit_temperature, per_class_csv, per_class_rows, percent, report
from utils.options import (
    Choice,
    Flag,
    Many,
    Number,
    Resolved,
    Text,
    Unsaved,
    UsageError,
    Vector,
    check,
    convert,
    option,
    published_values,
    ratio_number,
    resolve,
    shown,
)
from utils.plots import learning_curves, per_class_accuracy
from utils.resume import Stateful, TrainState, completed_run
from utils.run import Run, make_folder, one_line
from utils.system import ROOT, deterministic_words, draw_seed, pick_graph, provenance

T = TypeVar("T", bound="DataOptions")

#: Images per step of an evaluation, by device; constants, so that stored and later figures agree to the last digit.
EVAL_BATCH = {"cpu": 50, "cuda": 500}
SEED = Number(int, 0, 2**31 - 1, words=("None",))
#: --pretrained_pth of stage 1 that is no file: torchvision's ImageNet weights, or random ones.
START_WORDS = ("imagenet", "none")
#: Options that do not make a run another one, since they change nothing that it computes but perhaps its rounding; and
#: those that may change beside them when a run is resumed by its folder, since files may have been moved.
INCIDENTAL = ("resume", "save_every", "keep_states", "out", "workers", "threads", "device", "gpu", "parallel")
MAY_MOVE = (*INCIDENTAL, "data_dir", "cache_dir", "pretrained_pth")
#: Checkpoints of a run that its folder needs room for: one, and another that replaces it.
COPIES = 2
#: What a state takes beside a checkpoint: weights, momentum, averaged weights, and those selected so far.
STATE = 4
HUGE = 1e30  # the largest learning rate or weight decay: beyond, float32 overflows


@dataclass(frozen=True)
class DataOptions:
    """Data, network and device: options of every command."""

    dataset: str = option("cifar100", Choice(DATASETS), "data set; it brings its recipe")
    recipe: str | None = option(None, Text("a name"), "which of the data set's recipes; the first, if not given")
    data_dir: str = option(
        "data/", Text("a folder or file"), "where the data sets lie, or are downloaded to; data of one's own itself"
    )
    num_class: int | None = option(None, Number(int, 2), "number of classes; follows the data set and must agree")
    imb_ratio: float | str = option(
        100,
        Number(ratio_number, 1, words=(NATURAL,)),
        "images of the largest over the smallest class; natural: as it is",
    )
    imb_type: str = option("exp", Choice(IMB_TYPES), "class sizes: exponential decay, or a step to half the classes")
    subset: str = option(
        "first",
        Choice(SUBSETS),
        "images of a class: the first in file order (LOS, weight balancing), or shuffled (LDAM-DRW's generator)",
    )
    subset_seed: int = option(0, Number(int, 0, 2**32 - 1), "seed of --subset shuffled; 0 is LDAM-DRW's subset")
    image_size: int | None = option(
        None,
        Number(int, 8, 1024),
        "side in pixels that photos are shown at; 224, of small images their own, if not given",
    )
    mean: Any = option(None, Vector(Number(float, 0, 1)), "own data: of each channel; computed, if not given")
    std: Any = option(None, Vector(Number(float, 0, 1, above=True)), "own data: the same of standard deviations")
    jitter: float | None = option(
        None,
        Number(float, 0, 1),
        "photos: colours vary by it, ColorJitter's three; the data set's, if not given",
    )
    flip: bool | None = option(None, Flag(), "photos and own data: mirror half of the training images; None: it does")
    input: str = option(
        "files",
        Choice(INPUTS),
        "photos: decoded on the fly, read from what datasets.prepare --cache decoded, or decoded by the GPU",
    )
    network: str = option("resnet34", Choice(BACKBONES, prefix=TIMM), "backbone; timm:NAME where timm is installed")
    stem: str = option(
        "auto", Choice(("auto", *STEMS)), "3x3 for small images or 7x7 for photos; auto: what suits them"
    )
    workers: int = option(
        16, Number(int, 0, 256), "processes that decode photos, up to the CPUs there are; images in memory need none"
    )
    device: str = option("auto", Choice(("auto", "cpu", "cuda")), "auto: a GPU where there is one")
    gpu: int | None = option(None, Number(int, 0), "number of the GPU")
    threads: int | None = option(
        None, Number(int, 1, 4096), "CPU threads; as many as the process may use, if not given"
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class TrainOptions(DataOptions):
    """What both training stages add. Options of Any type take several values, which are swept; see ``Many``."""

    batch_size: Any = option(64, Many(Number(int, 1, 10**9)), "images per step")
    momentum: float = option(0.9, Number(float, 0, 1), "SGD momentum")
    nesterov: bool = option(False, Flag(), "Nesterov momentum")
    protocol: str = option("honest", Choice(("honest", "published")), "how epochs are chosen and averaged")
    select: str = option("last", Choice(SELECT), "which evaluated epoch is kept", published="best_test")
    flip_tta: bool = option(False, Flag(), "average the logits of an image and its mirror", published=True)
    eval_every: int = option(10, Number(int, 1), "epochs between evaluations; the last five always", published=1)
    seed: Any = option(None, Many(SEED), "of everything random; without it one is drawn and printed")
    out: str = option("output", Text("a folder"), "where run folders are made")
    resume: str | None = option(
        None,
        Text("auto or a run folder"),
        "continue a run that was cut off: the one in this folder, or auto: the newest of the same command under --out, "
        "where there is none a new one",
    )
    save_every: int | None = option(
        None, Number(int, 1), "epochs between saves of what --resume needs; if not given, every ten minutes"
    )
    keep_states: int = option(2, Number(int, 1, 1000), "how many of those saves are kept")
    graph: str = option(
        "auto", Choice(("auto", "on", "off")), "steps as CUDA graphs; auto: on a GPU, where they prove themselves"
    )
    deterministic: bool = option(False, Flag(), "the same bits run after run on one machine; slower")
    la_tau: Any = option(None, Many(Number(float, -10, 10)), "logit adjustment: factor of the log prior")
    focal_gamma: Any = option(None, Many(Number(float, 0, 20)), "focal: power of 1 - p")
    cb_beta: Any = option(None, Many(Number(float, 0, 1 - 1e-9)), "class-balanced weights: beta")
    ldam_margin: Any = option(None, Many(Number(float, 0, 2)), "ldam: the largest margin")
    cosine_scale: Any = option(None, Many(Number(float, 0, 1000, above=True)), "cosine heads: factor of the cosine")
    las_head: Any = option(None, Many(Number(float, 0, 1)), "label-aware smoothing of the largest class")
    las_tail: Any = option(None, Many(Number(float, 0, 1)), "label-aware smoothing of the smallest class")
    grw_rho: Any = option(None, Many(Number(float, 0, 10)), "generalised re-weighting: power of the class weights")
    lade_alpha: Any = option(None, Many(Number(float, 0, 100)), "lade: factor of the regulariser")
    lade_lambda: Any = option(None, Many(Number(float, 0, 100)), "lade: factor of the squared bound in it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.momentum == 0:
            raise UsageError("--nesterov with --momentum 0", "a momentum above 0")


@dataclass(frozen=True)
class Resumed:
    """A run to go on with: its folder and, where it is complete, what its command returned."""

    folder: Path
    result: Any = None
    is_complete: bool = False


def find_run(
    cls: type[TrainOptions], typed: dict[str, Any], script: str, start_of: Callable[[Mapping[str, Any]], str | None]
) -> tuple[dict[str, Any], Resumed | None]:
    """The run that --resume names, and the typed flags with those that it was begun with; None for a new run.

    ``start_of`` gives the hash of the checkpoint that typed flags choose to start from: a run that was begun from
    another is another run.

    Raises:
        UsageError: no such run, one of another command, or flags or a checkpoint that contradict it.
    """
    wanted = typed.get("resume")
    if wanted is None:
        return typed, None
    if wanted == "auto":
        out = Path(str(typed.get("out", cls.out)))
        for path in sorted(out.glob("*/*/options.json"), key=lambda path: path.parent.name, reverse=True):
            begun = read_begun(path)
            is_same = begun and begun["script"] == script and comparable(begun["typed"]) == as_json(comparable(typed))
            if begun and is_same and begun["start"] == start_of(typed):
                return find_run(cls, typed | {"resume": str(path.parent)}, script, start_of)
        print(f"--resume auto: no earlier run of this command in {out}; a new one begins")
        return typed, None
    folder = Path(wanted)
    begun = read_begun(folder / "options.json")
    if begun is None:
        raise UsageError(f"--resume {wanted}: no run that can be resumed", "auto, or the folder of a run")
    if begun["script"] != script:
        other = begun["script"]
        raise UsageError(f"--resume {wanted}: a run of {other}", f"python {other} --resume {wanted}")
    stored = typed_again(cls, begun["typed"], folder)
    for name, value in typed.items():
        if name not in MAY_MOVE and stored.get(name) != value:
            was = f"with --{name} {shown(stored[name])}" if name in stored else "without it"
            raise UsageError(f"--{name} {shown(value)}: {wanted} was begun {was}", "the same, or a new run")
    fixed = {name: begun["options"][name] for name in ("amp", "compile") if name in begun["options"]}
    moved = {name: value for name, value in typed.items() if name in MAY_MOVE}
    found = {**stored, **fixed, **moved, "seed": tuple(begun["seed"])}
    done = completed_run(folder)
    if done is None and begun["start"] != start_of(found):
        raise UsageError(f"--resume {wanted} was begun from another checkpoint", "the same file, or a new run")
    return found, Resumed(folder, done and done["result"], done is not None)


def comparable(typed: Mapping[str, Any]) -> dict[str, Any]:
    """The typed flags that make a run what it is."""
    return {name: value for name, value in typed.items() if name not in INCIDENTAL}


def as_json(content: Any) -> Any:
    """A value as it comes back from a JSON file."""
    return json.loads(json.dumps(content))


def typed_again(cls: type[TrainOptions], stored: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Typed flags as options.json has them; UsageError where a value cannot be one."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = set(stored) - set(fields)
    if unknown:
        raise UsageError(f"{place}: {', '.join(sorted(unknown))} is no option", "a run of this version")
    return {name: convert(fields[name], value) for name, value in stored.items()}


def read_begun(path: Path) -> dict[str, Any] | None:
    """What :func:`begin` wrote into a run's options.json; None where it has not."""
    kinds: dict[str, Any] = {"script": str, "typed": dict, "seed": list, "start": (str, type(None)), "options": dict}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    is_whole = isinstance(content, dict) and all(isinstance(content.get(k, 0), kind) for k, kind in kinds.items())
    return content if is_whole else None


def fill_options(cls: type[T], typed: Mapping[str, Any], stage: str, file: Checkpoint | None = None) -> Resolved[T]:
    """Typed flags over the file's data and network over the data set's recipe over the protocol over the defaults.

    Raises:
        UsageError: a typed flag contradicts the command's stage, the file or the data set.
    """
    if typed.get("cur_stage", stage) != stage:
        raise UsageError(f"--cur_stage {typed['cur_stage']}: this command is {stage}'s", stage)
    seeds = typed.get("seed")
    if isinstance(seeds, tuple) and len(seeds) > 1 and "None" in seeds:
        raise UsageError(f"--seed {shown(seeds)}", "None alone, or numbers")
    layers: dict[str, Mapping[str, Any]] = {}
    if file is not None:
        stored = file_identity(file)
        refuse_contradictions(typed, stored, str(file.path))
        layers[str(file.path)] = stored
        layers[f"{file.path}, its options"] = file_defaults(file)
    dataset = next((layer["dataset"] for layer in (typed, *layers.values()) if "dataset" in layer), "cifar100")
    if dataset not in DATASETS:
        raise UsageError(f"a file of data set {dataset}", ", ".join(DATASETS))
    stated = file_defaults(file) | file_identity(file) if file else {}
    layers |= recipe_layers(dataset, stated | dict(typed), stage)
    if typed.get("protocol") == "published":
        layers["--protocol published"] = published_values(cls) | dict(DATASETS[dataset].published)
    layers["drawn"] = {"seed": by_first(draw_seed)}
    typed = {name: value for name, value in typed.items() if name != "seed" or value not in ("None", ("None",))}
    resolved = resolve(cls, typed, layers)
    check_data_flags(resolved.options, typed)
    return resolved


def recipe_layers(dataset: str, known: Mapping[str, Any], stage: str = "") -> dict[str, Mapping[str, Any]]:
    """Layers of option values that a data set brings: its recipe, and what suits the data in a place.

    ``known`` are the flags that choose them. What a recipe starts from is for stage 1 alone. Raises UsageError where
    there is no such recipe.
    """
    spec = DATASETS[dataset]
    name = known.get("recipe") or next(iter(spec.recipes))
    if name not in spec.recipes:
        raise UsageError(f"--recipe {name} with --dataset {dataset}", ", ".join(spec.recipes))
    recipe = dict(spec.recipes[name])
    if stage != "stage1":
        recipe.pop("pretrained_pth", None)
    if (spec.own or spec.natural) and "imb_ratio" not in known:
        recipe["imb_ratio"] = NATURAL
    label = f"--dataset {dataset}" + (f", {name}" if len(spec.recipes) > 1 else "")
    layers: dict[str, Mapping[str, Any]] = {label: recipe}
    if spec.suited:
        layers["for its images"] = spec.suited(known.get("data_dir", "data/"), known.get("image_size"))
    return layers


def file_identity(file: Checkpoint) -> dict[str, Any]:
    """The data set, subset and network that a checkpoint states; another program's states its network alone."""
    own = ("mean", "std") if file.data and DATASETS[file.data["dataset"]].own else ()
    stated = {key: file.data[key] for key in IDENTITY if key in file.data}
    return {"network": file.network, "stem": file.stem} | stated | {key: tuple(file.data[key]) for key in own}


def file_defaults(file: Checkpoint) -> dict[str, Any]:
    """What a checkpoint's own run was given and the next may change: where data of one's own lies, how it is read."""
    if not file.data:
        return {}
    names = ("recipe", "jitter", "flip", "input", *(["data_dir"] if DATASETS[file.data["dataset"]].own else []))
    return {name: file.options[name] for name in names if file.options.get(name) is not None}


def refuse_contradictions(typed: Mapping[str, Any], stored: Mapping[str, Any], source: str) -> None:
    """Raises UsageError where a typed flag disagrees with what a file states."""
    for name, value in stored.items():
        if name in typed and typed[name] != value:
            raise UsageError(f"--{name} {typed[name]} contradicts {source}", f"--{name} {value}, or another file")


def check_data_flags(options: DataOptions, typed: Mapping[str, Any]) -> None:
    """Says which typed flags have nothing to do here; raises UsageError for those that the data set rules out."""
    spec = DATASETS[options.dataset]
    pick_stem(options.network, 0, options.stem)
    if options.input == "nvjpeg" and not torch.cuda.is_available():
        raise UsageError("--input nvjpeg without a GPU", "files, cache")
    if "subset_seed" in typed and options.subset == "first":
        raise UsageError("--subset_seed without --subset shuffled", "--subset shuffled")
    if options.imb_ratio == NATURAL:
        for name in ("imb_type", "subset", "subset_seed"):
            if name in typed:
                raise UsageError(f"--{name} with a training set taken as it is", "--imb_ratio R beside it, or without")
    elif spec.natural:
        raise UsageError(f"--imb_ratio {options.imb_ratio}: {options.dataset} is long-tailed as it is", NATURAL)
    flips = spec.augment.flip if options.flip is None else options.flip
    if getattr(options, "flip_tta", False) and not flips:
        raise UsageError(f"--flip_tta: mirrored {options.dataset} are other characters", "--no-flip_tta")
    for name in ("image_size", "jitter", "flip", "input"):
        if name in typed and not spec.photos:
            raise UsageError(
                f"--{name} {typed[name]}: {options.dataset} has images of one size, held in memory",
                f"without it, or one of {', '.join(key for key, each in DATASETS.items() if each.photos)}",
            )
    for name in ("mean", "std"):
        if name in typed and not spec.own:
            own = ", ".join(key for key, each in DATASETS.items() if each.own)
            raise UsageError(f"--{name}: that of {options.dataset} is fixed", f"without it, or one of {own}")
    if "data_dir" in typed and spec.embedded:
        print(f"--data_dir {options.data_dir}: {options.dataset} comes with the installation; nothing is read there")
    if "workers" in typed and not spec.photos:
        print(f"--workers {options.workers}: {options.dataset} is held in memory; no worker process is started")


def data_name(options: DataOptions) -> str:
    """What files of a data set are called: its name, and of data of one's own the name of its folder or file too."""
    place = Path(options.data_dir).resolve()
    own = f"-{place.stem if place.is_file() else place.name}" if DATASETS[options.dataset].own else ""
    return f"{options.dataset}{own}"


def load_data(options: DataOptions, **held_out: Any) -> LongTailed:
    """The long-tailed data set of the options; ``held_out`` goes to :func:`datasets.load`.

    Raises:
        UsageError: also where --num_class disagrees with the data.
    """
    names = ("image_size", "mean", "std", "jitter", "flip", "input", "workers")
    shown = Shown(*(getattr(options, name) for name in names))
    with in_turn():
        data = datasets.load(
            options.dataset,
            options.data_dir,
            shown=shown,
            imb_type=options.imb_type,
            imb_ratio=options.imb_ratio,
            subset=options.subset,
            subset_seed=options.subset_seed,
            **held_out,
        )
    untested = sorted(set(range(data.num_classes)) - set(data.test.labels.tolist()))
    if untested:
        some = ", ".join(data.class_names[i] for i in untested[:5]) + (" ..." if len(untested) > 5 else "")
        print(f"note: no test images of {len(untested)} classes, which count in no accuracy: {some}")
    if options.num_class not in (None, data.num_classes):
        raise UsageError(f"--num_class {options.num_class}", f"{data.num_classes}, as {options.dataset} has")
    return data


def eval_batches(data: LongTailed, part: ImageSet, device: torch.device) -> Batches:
    """The plain batches of a test or validation split, of several processes each one's own."""
    size, share = EVAL_BATCH[device.type], (rank(), processes())
    return Batches(part.images, part.labels, size, data.spec.mean, data.spec.std, device, share=share)


def open_checkpoint(typed: Mapping[str, Any], stage: str, cls: type[DataOptions]) -> Checkpoint:
    """The file of --pretrained_pth, or the default file of a stage that the typed flags choose.

    Raises:
        UsageError: see :func:`utils.checkpoints.find` and :func:`utils.checkpoints.read`; or not a known network.
    """
    if "pretrained_pth" in typed:
        path = Path(typed["pretrained_pth"])
    else:
        dataset = typed.get("dataset", "cifar100")
        options = resolve(cls, typed, recipe_layers(dataset, typed)).options
        path = checkpoints.find(
            data_name(options),
            options.imb_type,
            options.imb_ratio,
            options.network,
            stage,
            exact="network" in typed,
            flags=flags_of(options, "dataset", *(["data_dir"] if DATASETS[dataset].own else [])),
        )
    file = checkpoints.read(path)
    if file.stage is not None:
        if "pretrained_pth" not in typed and path.name != _own_name(file).name:
            raise UsageError(f"{path} holds what belongs at {_own_name(file)}", "--pretrained_pth, if it is meant")
        return file
    wanted = str(typed.get("network", ""))
    if wanted.startswith(TIMM):
        timm, classes, channels = translate_timm(file.foreign, wanted.removeprefix(TIMM), str(path))
        print(f"{path}: {timm.known_as}")
        made: dict[str, Any] = {"network": wanted, "stem": "imagenet", "num_classes": classes, "in_channels": channels}
        return dataclasses.replace(file, **made, model=timm.model, foreign={})
    found = translate(file.foreign, str(path))
    known = None if found is None else recognise(found.model, found.head)
    if found is None or known is None:
        named = "" if found is None else f", {found.known_as}, of no network known here"
        raise UsageError(
            f"{path} is a checkpoint of another program{named}",
            f"names and shapes of one of {', '.join(BACKBONES)}; {checkpoints.listing()}",
        )
    print(f"{path}: {found.known_as}")
    network, stem, num_classes, in_channels = known
    return dataclasses.replace(
        file,
        network=network,
        stem=stem,
        num_classes=num_classes,
        in_channels=in_channels,
        model=found.model,
        head=found.head,
        foreign={},
    )


def open_latest(typed: Mapping[str, Any], cls: type[DataOptions]) -> Checkpoint:
    """The file of --cur_stage; without it stage 2's default file or, where there is none, stage 1's."""
    if "cur_stage" in typed or "pretrained_pth" in typed:
        return open_checkpoint(typed, typed.get("cur_stage", "stage2"), cls)
    try:
        return open_checkpoint(typed, "stage2", cls)
    except NoCheckpoint:
        return open_checkpoint(typed, "stage1", cls)


def _own_name(file: Checkpoint) -> Path:
    """The default path of a checkpoint, by what it says of itself."""
    data = file.data
    name = data.get("name", data["dataset"])  # older files have none, and are not of data of one's own
    return checkpoints.default_path(name, data["imb_type"], data["imb_ratio"], file.network, str(file.stage))


def published_start(network: str) -> Checkpoint:
    """torchvision's ImageNet weights of a network, as a file to start from."""
    with in_turn():  # it may be a download
        state, place = imagenet_weights(network), Path("torchvision", f"{network}-IMAGENET1K_V1")
    return Checkpoint(None, network, len(state["fc.weight"]), 3, state, stem="imagenet", path=place)


def require_val(data: LongTailed, options: Any) -> None:
    """Raises UsageError where epochs are to be chosen on held-out images and there are none."""
    if options.select == "best_val" and data.val is None:
        raise UsageError("--select best_val without held-out images", "--val_split F beside it, 0.1 for instance")


def restore(file: Checkpoint, data: LongTailed, head: str | None = None) -> Network:
    """The network of a checkpoint with its weights, checked against the data and, where given, the kind of its head.

    Raises:
        UsageError: another kind of head, another number of classes or channels, other class counts, or weights that do
            not fit.
    """
    if (file.num_classes, file.in_channels) != (data.num_classes, data.channels):
        raise UsageError(
            f"{file.path} has {file.num_classes} classes and {file.in_channels} input channels",
            f"{data.num_classes} and {data.channels}, as {data.spec.name} has",
        )
    known: dict[str, list[Any]] = {
        "class_names": data.class_names,
        "class_counts": data.class_counts,
        "mean": list(data.spec.mean),
        "std": list(data.spec.std),
    }
    for key, value in known.items():
        if file.data and file.data[key] != value:
            theirs, ours = next((a, b) for a, b in zip([*file.data[key], "none"], [*value, "none"]) if a != b)
            where = f"; it was --data_dir {file.options['data_dir']}" if data.spec.own else ""
            raise UsageError(
                f"{file.path} was trained with other {key}: {theirs} where the data has {ours}",
                f"the data that it was trained on{where}",
            )
    if file.data.get("train_images", data.train.summary()) != data.train.summary():
        print(f"note: the training images are not those that {file.path} was trained on")
    if file.head not in HEADS or head not in (None, file.head):
        fitting = f"--head {file.head}, or another file" if file.head in ("linear", "cosine") else "another file"
        raise UsageError(f"{file.path} has a {file.head} head", fitting)
    return built(file)


def starting_weights(file: Checkpoint, data: LongTailed, head: str) -> dict[str, Tensor]:
    """A checkpoint's weights to train on from; without its classifier where that is of another number of classes.

    Raises:
        UsageError: see :func:`restore`.
    """
    if file.num_classes == data.num_classes:
        return restore(file, data, head).state_dict()
    if file.in_channels != data.channels:
        raise UsageError(
            f"{file.path} has {file.in_channels} input channels", f"{data.channels}, as {data.spec.name} has"
        )
    return {name: value for name, value in built(file).state_dict().items() if not name.startswith("fc.")}


def built(file: Checkpoint) -> Network:
    """The network of a checkpoint with its weights; UsageError where there is no such network or they do not fit."""
    is_known = file.network.startswith(TIMM) or file.stem in BACKBONES.get(file.network, {})
    if not is_known:
        raise UsageError(f"{file.path} holds a {file.network} with the {file.stem} stem", ", ".join(BACKBONES))
    model = build_model(file.network, file.num_classes, file.in_channels, file.head, file.stem)
    try:
        model.load_state_dict(file.model)
    except RuntimeError:
        raise UsageError(f"{file.path}: its weights do not fit {file.network}", "an undamaged checkpoint") from None
    return model


def final_path(options: DataOptions, stage: str) -> Path:
    """Where a stage of these options puts its final file."""
    return checkpoints.default_path(data_name(options), options.imb_type, options.imb_ratio, options.network, stage)


def begin(
    resolved: Resolved[Any],
    stage: str,
    data: LongTailed,
    device: torch.device,
    typed: Mapping[str, Any],
    start: Checkpoint | None,
    resumed: Resumed | None,
    runs: int = 1,
) -> Run:
    """Opens the folder of a run, or of so many, and says what will run; fails now what would fail later.

    ``typed`` are the flags that --resume, beside the seeds, begins with again; ``start`` is the file it begins from.
    """
    options = resolved.options
    pick_graph(options.graph, device)
    seeds = options.seed if isinstance(options.seed, tuple) else (options.seed,)
    label = f"seed{seeds[0]}" if len(seeds) == 1 else f"{len(seeds)}seeds"
    label = f"{runs}runs" if runs > 1 else label

    def make() -> Path:
        require_writable("the folder", checkpoints.FOLDER)
        if resumed:
            require_writable("--resume", resumed.folder)
            return resumed.folder
        size = 0 if stage == "compare" else weight_bytes(options, data)
        states = STATE * size * (options.keep_states + 1) if stage == "stage1" else 0
        require_room(
            {options.out: COPIES * runs * size + states, checkpoints.FOLDER: size},
            f"a run with checkpoints of {size / 1e6:,.0f} MB",
        )
        return make_folder(options.out, final_path(options, stage).stem, label)

    folder = by_first(make)
    run = Run(folder if rank() == 0 else None, is_locked=True)
    run.say(resolved.describe())
    where = f"{device}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    if processes() > 1:
        where = f"{where.replace(':0', '')} in each of {processes()} processes"
    run.say(f"{data.describe()}\ndevice {where}, seed {shown(options.seed)}, run folder {run.folder}")
    if options.deterministic:
        run.say(deterministic_words(device))
    script = "compare.py" if stage == "compare" else f"main_{stage}.py"
    here = script if Path(script).is_file() else str(ROOT / script)
    run.resume_by = shlex.join([*launcher(), here, f"--resume={run.folder}"])
    if not resumed:
        run.write_json(
            "options.json",
            {
                "script": script,
                "typed": {name: value for name, value in typed.items() if name != "resume"},
                "seed": seeds,
                "start": None if start is None else start.sha256,
                "options": dataclasses.asdict(options),
                "sources": dict(resolved.sources),
            },
        )
    return run


def say_complete(resumed: Resumed) -> Any:
    """Says that a run is complete, and publishes it where another has been since; returns what its command returned."""
    print(f"{resumed.folder} is complete: nothing to resume. Without --resume it is made anew.")
    weights = resumed.folder / "checkpoint.pt"
    if weights.is_file():  # of a sweep they are in the folder of one of its runs
        file = checkpoints.read(weights)
        if not checkpoints.same_run(file, _own_name(file)):
            print(checkpoints.publish(file, _own_name(file)))
    return resumed.result


def make_state(run: Run, options: Any, data: LongTailed, device: torch.device, **always: Stateful) -> TrainState:
    """What is saved of a run while it trains, and taken up again by --resume."""
    parts = {"training": data.train, "test": data.test, "held-out": data.val}
    inputs: dict[str, Any] = {"number of processes": processes()}
    inputs["set of options"] = as_json({name: v for name, v in vars(options).items() if name not in MAY_MOVE})
    for name, part in parts.items():
        inputs[f"set of {name} images"] = part and part.summary()
        inputs[f"set of {name} labels"] = part and hashlib.sha256(part.labels.numpy().tobytes()).hexdigest()
    return TrainState(run, device, options.save_every, options.keep_states, inputs, **always)


def weight_bytes(options: DataOptions, data: LongTailed) -> int:
    """About how many bytes a checkpoint of the options' network takes."""
    stem = pick_stem(options.network, data.train.side, options.stem)
    device = "cpu" if options.network.startswith(TIMM) else "meta"  # some of timm's look at values while they are built
    with torch.random.fork_rng(devices=[]), torch.device(device):
        model = build_model(options.network, data.num_classes, data.channels, stem=stem)
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def calibrated(logits: Logits, labels: Tensor, class_counts: list[int]) -> Report:
    """The report of held-out images, with the ``temperature`` that suits them."""
    return report(logits, labels, class_counts) | {"temperature": fit_temperature(logits, labels)}


class Evaluator:
    """Evaluates a model after the epochs that are due, logs every epoch, and keeps the selected one."""

    def __init__(self, run: Run, data: LongTailed, device: torch.device, options: Any, epochs: int) -> None:
        self.run, self.class_counts, self.options, self.epochs = run, data.class_counts, options, epochs
        self.test = eval_batches(data, data.test, device)
        self.val = eval_batches(data, data.val, device) if data.val else None
        self.selection = Selection(options.select)

    def state_dict(self) -> dict[str, Any]:
        """What has been selected so far."""
        return self.selection.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.selection.load_state_dict(state)

    def after(self, epoch: int, model: nn.Module, train: TrainStats, lr: float, seconds: float) -> None:
        """Logs epoch (from 0); ``seconds`` is the time of its training part."""
        record: dict[str, Any] = {
            "epoch": epoch + 1,
            "lr": lr,
            "train_loss": train.loss,
            "train_top1": train.top1,
            "seconds": seconds,
        }
        if is_due(epoch, self.epochs, self.options.eval_every):
            flip = self.options.flip_tta
            test = evaluate(model, self.test, self.class_counts, flip)
            val = calibrated(*predict(model, self.val, flip), self.class_counts) if self.val else None
            self.selection.offer(epoch + 1, model, test, val)
            record |= {f"test_{key}": test[key] for key in ("top1", "top5")}
            record |= {f"test_{group}": test["groups"][group]["accuracy"] for group in GROUPS}
            if val is not None:
                record["val_class_mean"] = val["class_mean"]
        self.run.log(record)
        meet()


def packed(
    run: Run,
    stage: str,
    options: Any,
    data: LongTailed,
    selection: Selection,
    argv: Sequence[str],
    device: torch.device,
    parent: Checkpoint | None = None,
    stored: Mapping[str, Any] | None = None,
    head: str = "linear",
    sweep: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """The checkpoint of a run that has ended.

    ``stored`` are the options to keep where the run had several values of one, ``head`` the kind of the classifier,
    ``sweep`` how many settings it was chosen from and on what.
    """
    stem = pick_stem(options.network, data.train.side, options.stem)
    file = Checkpoint(
        stage=stage,
        network=options.network,
        num_classes=data.num_classes,
        in_channels=data.channels,
        model=selection.state,
        options=dict(stored or vars(options)),
        data={key: getattr(options, key) for key in IDENTITY}
        | {
            "name": data_name(options),
            "image_size": data.train.side,
            "stem": stem,
            "train_images": data.train.summary(),
            "read": data.train.read,
            "class_names": data.class_names,
            "class_counts": data.class_counts,
            "mean": list(data.spec.mean),
            "std": list(data.spec.std),
            "val_indices": [] if data.val is None else data.val.indices.tolist(),
        },
        metrics=selection.test
        | {"epoch": selection.epoch, "select": selection.rule, "flip_tta": options.flip_tta}
        | ({"sweep": dict(sweep)} if sweep else {}),
        parent=None if parent is None else checkpoints.describe_parent(parent),
        provenance=provenance(f"main_{stage}.py", argv, device, run.seconds) | {"resumed": run.resumed},
        head=head,
        stem=stem,
    )
    if selection.val is not None:
        file.metrics["temperature"] = selection.val["temperature"]
    return file


def finish(
    run: Run,
    file: Checkpoint,
    selection: Selection,
    is_final: bool = True,
    beside: Callable[[], None] | None = None,
) -> Report:
    """Writes the checkpoint (final path and run folder), then the plots and the per-class table; returns the report.

    A run that is not ``is_final``, one of several, leaves the final path alone. ``beside`` shows what else there is,
    once the weights are safe.

    Raises:
        Unsaved: the final path could not be written to; the run folder's copy then stands.
    """
    ending = keep(file, run, _own_name(file) if is_final else None)
    if beside is not None:
        beside()
    rows = per_class_rows(selection.test, file.data["class_names"], file.data["class_counts"])
    with run.side_output("per_class.csv") as path:
        path.write_bytes(per_class_csv(rows).encode(errors="surrogateescape"))
    method = f" {file.options['method']}" if "method" in file.options else ""
    title = f"{file.data['dataset']}, ratio {file.data['imb_ratio']}, {file.network}, {file.stage}{method}"
    if run.epochs:  # some methods train nothing
        with run.side_output("curves.png") as path:
            learning_curves(run.epochs, title, path)
    with run.side_output("per_class.png") as path:
        per_class_accuracy(selection.test, rows, f"{title}: {percent(selection.test['top1'])} %", path)

    test, (best_epoch, best) = selection.test, selection.oracle
    groups = ", ".join(f"{group} {percent(test['groups'][group]['accuracy'])}" for group in GROUPS)
    run.say(f"test top-1 {percent(test['top1'])} % ({groups}); {selection_words(file.metrics)}")
    for words in ancestors(file):
        run.say(words)
    if selection.rule != "best_test" and "sweep" not in file.metrics:
        run.say(f"best on the test set, not used: {percent(best['top1'])} % at epoch {best_epoch}")
    run.say(f"{ending()}; {run.seconds:.0f} s")
    return test


def keep(file: Checkpoint, run: Run, final: Path | None, copy: Path | None = None) -> Callable[[], str]:
    """Writes finished weights to their final path and to the run folder, where they do not lie already as ``copy``.

    A disk that refuses one does not keep the other back. Returns what to call at the very end: it gives the line that
    says where they are.

    Raises:
        Unsaved: what is returned, where the final path could not be written to; with where the weights are.
    """
    failed: Exception | None = None
    told = ""
    if final is not None:
        try:
            told = checkpoints.publish(file, final)
        except (OSError, UsageError) as error:
            failed = error
    if copy is None:
        copy = run.folder / "checkpoint.pt"
        with run.side_output(copy.name) as path:
            file.save(path)
    told = told or (f"saved {copy}" if copy.is_file() else "trained")

    def ending() -> str:
        if failed is None:
            return told
        where = f"the weights are in {copy}" if copy.is_file() else "there is no copy of the weights"
        raise Unsaved(f"{final} has not been written: {one_line(failed)}; {where}") from failed

    return ending


def selection_words(metrics: Mapping[str, Any]) -> str:
    """How the stored epoch was chosen, in words: "epoch 200, the last; no flip averaging"."""
    rule = {"last": "the last", "best_test": "the best on the TEST set", "best_val": "the best on held-out images"}
    flip = "with flip averaging" if metrics["flip_tta"] else "no flip averaging"
    swept = metrics.get("sweep")
    setting = f"; the best of {swept['settings']} settings on {swept['chosen_on']}" if swept else ""
    return f"epoch {metrics['epoch']}, {rule[metrics['select']]}{setting}; {flip}"


def ancestors(file: Checkpoint) -> list[str]:
    """How the weights that a file began from were chosen, a line for each file before it."""
    lines, parent = [], file.parent
    while parent:
        if parent.get("chosen"):  # older files do not say
            lines.append(f"began from {parent['path']}: {selection_words(parent['chosen'])}")
        parent = parent.get("parent")
    return lines


def flags_of(options: DataOptions, *names: str) -> str:
    """The flags that repeat those options which are not at their defaults: " --imb_ratio 50 --imb_type step"."""
    fields = {field.name: field.default for field in dataclasses.fields(options)}
    values = {name: getattr(options, name) for name in names}
    return "".join(f" --{name} {value}" for name, value in values.items() if value != fields[name])


def stage_option(stage: str) -> Any:
    """The --cur_stage option of a training command."""
    return option(stage, Choice(STAGES), f"the stage; {stage} here, and nothing else")
