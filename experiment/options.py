"""Options that the commands share, and the layers that a value may come from: flags, checkpoint, recipe, default."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from datasets import DATASETS, FITS, IMB_TYPES, INPUTS, NATURAL, SUBSETS, ImageOptions, Natural
from models import BACKBONES, STEMS, TIMM, pick_stem, timm_constants
from utils.checkpoints import HOW_IT_RUNS, IDENTITY, SELECT, STAGES, Checkpoint
from utils.console import show
from utils.distributed import on_main_process
from utils.errors import UsageError
from utils.metrics import FIGURES, Figure
from utils.options import (
    Choice,
    Flag,
    Number,
    Resolved,
    Text,
    Values,
    Vector,
    check,
    option,
    published_values,
    ratio_number,
    resolve,
    shown,
)
from utils.system import draw_seed

T = TypeVar("T", bound="DataOptions")
SEED = Number(int, 0, 2**31 - 1, words=("None",))
#: --pretrained_pth of stage 1 that is no file: torchvision's ImageNet weights, or random ones.
START_WORDS = ("imagenet", "none")
#: Options that may change when a run is resumed by its folder, since files may have been moved.
MAY_MOVE = (*HOW_IT_RUNS, "data_dir", "cache_dir", "pretrained_pth")
#: What says how data of one's own are read, and is kept in the checkpoint.
LAYOUT = ("class_level", "test_split", "test_seed", "skip_damaged", "drop_duplicates")
MOST_NAME = 100  # bytes of a folder's name in the names of its files
HUGE = 1e30  # the largest learning rate or weight decay: beyond, float32 overflows


@dataclass(frozen=True)
class DataOptions:
    """Data, network and device: options of every command."""

    dataset: str = option("cifar100", Choice(DATASETS), "data set; it brings its recipe", "data")
    recipe: str | None = option(None, Text("a name"), "which of the data set's recipes; None: the first", "data")
    data_dir: str = option(
        "data/",
        Text("a folder or file"),
        "where the data sets lie, or are downloaded to; data of one's own itself",
        "data",
    )
    num_class: int | None = option(None, Number(int, 2), "number of classes; follows the data and must agree", "data")
    imb_ratio: float | Natural = option(
        100,
        Number(ratio_number, 1, words=(NATURAL,)),
        "images of the largest over the smallest class; natural: as it is",
        "data",
    )
    imb_type: str = option(
        "exp", Choice(IMB_TYPES), "class sizes: exponential decay, or a step to half the classes", "data"
    )
    subset: str = option(
        "first",
        Choice(SUBSETS),
        "images of a class: the first in file order (LOS, weight balancing), or shuffled (LDAM-DRW's generator)",
        "data",
    )
    subset_seed: int = option(0, Number(int, 0, 2**32 - 1), "seed of --subset shuffled; 0 is LDAM-DRW's subset", "data")
    image_size: int | None = option(
        None,
        Number(int, 8, 1024),
        "side in pixels of what networks see; None: 224, small images' own",
        "data",
    )
    mean: tuple[float, ...] | None = option(
        None, Vector(Number(float, 0, 1)), "own data: mean of each channel; None: computed", "data"
    )
    std: tuple[float, ...] | None = option(
        None, Vector(Number(float, 0, 1, above=True)), "own data: standard deviations; None: computed", "data"
    )
    jitter: float | None = option(
        None, Number(float, 0, 1), "photos: ColorJitter's three strengths; None: the data set's", "data"
    )
    flip: bool | None = option(
        None, Flag(), "photos and own data: mirror half of the training images; None: it does", "data"
    )
    input: str = option(
        "files",
        Choice(INPUTS),
        "photos: decoded on the fly, read from what datasets.prepare --cache decoded, or decoded by the GPU",
        "data",
    )
    range: tuple[int, ...] | None = option(
        None,
        Vector(Number(int, 0, 65535), "two of them"),
        "own data, 16-bit grey images: the values that become black and white; None: the training images' extremes "
        "where all are such, else 0 65535",
        "data",
    )
    fit: str = option(
        "crop",
        Choice(FITS),
        "own data, of images that are not square: show the centre, all with other proportions, or all between black "
        "bars",
        "data",
    )
    class_level: int = option(
        1, Number(int, 1, 20), "folder: how many folders below the split's the classes are", "data"
    )
    test_split: float = option(
        0.0,
        Number(float, 0, 0.9),
        "own data without test images: share of every class to test on; also of a folder of class folders alone",
        "data",
    )
    test_seed: int = option(0, Number(int, 0, 2**31 - 1), "seed of --test_split", "data")
    skip_damaged: bool = option(False, Flag(), "own data: go on without files that cannot be read", "data")
    drop_duplicates: bool = option(
        False, Flag(), "own data: train without images that are in another split too", "data"
    )
    network: str = option(
        "resnet34", Choice(BACKBONES, prefix=TIMM), "backbone; timm:NAME where timm is installed", "network"
    )
    stem: str = option(
        "auto", Choice(("auto", *STEMS)), "3x3 for small images or 7x7 for photos; auto: what suits them", "network"
    )
    workers: int = option(
        16, Number(int, 0, 256), "processes that decode photos, at most the CPUs; images in memory need none", "machine"
    )
    device: str = option("auto", Choice(("auto", "cpu", "cuda")), "auto: a GPU where there is one", "machine")
    gpu: int | None = option(None, Number(int, 0), "number of the GPU", "machine")
    threads: int | None = option(
        None, Number(int, 1, 4096), "CPU threads; None: as many as the process may use", "machine"
    )

    def __post_init__(self) -> None:
        check(self)
        if self.range is not None and not (len(self.range) == 2 and self.range[0] < self.range[1]):
            words = " ".join(f"{value:.0f}" for value in self.range)
            raise UsageError(f"--range {words}", "two values, the smaller one first")


def image_options_of(options: DataOptions) -> ImageOptions:
    """What :func:`datasets.load` takes of them."""
    return ImageOptions(
        options.image_size,
        options.mean,
        options.std,
        options.jitter,
        options.flip,
        options.input,
        options.workers,
        None if options.range is None else (int(options.range[0]), int(options.range[1])),
        options.fit,
        options.class_level,
        options.test_split,
        options.test_seed,
        options.skip_damaged,
        options.drop_duplicates,
    )


@dataclass(frozen=True)
class TrainOptions(DataOptions):
    """What both training stages add."""

    batch_size: int = option(64, Number(int, 1, 10**9), "images per step", "optimisation", sweep=True)
    momentum: float = option(0.9, Number(float, 0, 0.9999), "SGD momentum", "optimisation")
    nesterov: bool = option(False, Flag(), "Nesterov momentum", "optimisation")
    protocol: str = option(
        "honest", Choice(("honest", "published")), "how epochs are chosen and averaged", "evaluation"
    )
    select: str = option("last", Choice(SELECT), "which evaluated epoch is kept", "evaluation", published="best_test")
    select_by: Figure = option(
        "class_mean", Choice(FIGURES), "the figure that choices on held-out images go by", "evaluation"
    )
    flip_tta: bool = option(
        False, Flag(), "average the logits of an image and its mirror", "evaluation", published=True
    )
    eval_every: int = option(
        10, Number(int, 1), "epochs between evaluations; the last five always", "evaluation", published=1
    )
    seed: int | None = option(
        None, SEED, "of everything random; None: one is drawn and printed", "optimisation", sweep=True
    )
    out: str = option("output", Text("a folder"), "where run folders are made", "files")
    resume: str | None = option(
        None,
        Text("auto or a run folder"),
        "continue a run that was cut off: the one in this folder, or auto: the newest of the same command under --out, "
        "where there is none a new one",
        "files",
    )
    save_every: int | None = option(
        None, Number(int, 1), "epochs between saves of what --resume needs; None: every ten minutes", "files"
    )
    keep_states: int = option(2, Number(int, 1, 1000), "how many of those saves are kept", "files")
    print_options: bool = option(False, Flag(), "print all options with their sources, and end", "before a run")
    dry_run: bool = option(
        False,
        Flag(),
        "check everything, time ten steps, say how long it takes and how much memory, and end",
        "before a run",
    )
    graph: str = option(
        "auto",
        Choice(("auto", "on", "off")),
        "steps as CUDA graphs; auto: on a GPU, where they prove themselves",
        "machine",
    )
    deterministic: bool = option(False, Flag(), "the same bits run after run on one machine; slower", "machine")
    la_tau: float | None = option(
        None, Number(float, -10, 10), "logit adjustment: factor of the log prior", "recipe", sweep=True
    )
    vs_gamma: float | None = option(
        None,
        Number(float, 0, 10),
        "vector scaling, cdt: power of n_max / n_j in the temperatures",
        "recipe",
        sweep=True,
    )
    focal_gamma: float | None = option(None, Number(float, 0, 20), "focal: power of 1 - p", "recipe", sweep=True)
    cb_beta: float | None = option(
        None, Number(float, 0, 1 - 1e-9), "class-balanced weights: beta", "recipe", sweep=True
    )
    ldam_margin: float | None = option(None, Number(float, 0, 2), "ldam: the largest margin", "recipe", sweep=True)
    cosine_scale: float | None = option(
        None, Number(float, 0, 1000, above=True), "cosine heads: factor of the cosine", "recipe", sweep=True
    )
    las_head: float | None = option(
        None, Number(float, 0, 1), "label-aware smoothing of the largest class", "recipe", sweep=True
    )
    las_tail: float | None = option(
        None, Number(float, 0, 1), "label-aware smoothing of the smallest class", "recipe", sweep=True
    )
    grw_rho: float | None = option(
        None, Number(float, 0, 10), "generalised re-weighting: power of the class weights", "recipe", sweep=True
    )
    lade_alpha: float | None = option(
        None, Number(float, 0, 100), "lade: factor of the regulariser", "recipe", sweep=True
    )
    lade_lambda: float | None = option(
        None, Number(float, 0, 100), "lade: factor of the squared bound in it", "recipe", sweep=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.momentum == 0:
            raise UsageError("--nesterov with --momentum 0", "a momentum above 0")

    @property
    def place(self) -> tuple[str, int | None, int | None, bool]:
        """What :func:`utils.system.pick_device` takes."""
        return self.device, self.gpu, self.threads, self.deterministic

    @property
    def drawn_seed(self) -> int:
        """The seed, once the command has drawn one where none was given."""
        assert self.seed is not None
        return self.seed


def fill_options(cls: type[T], typed: Values, stage: str, file: Checkpoint | None = None) -> Resolved[T]:
    """Typed flags over the file's data and network over the data set's recipe over the protocol over the defaults.

    Raises:
        UsageError: a typed flag contradicts the command's stage, the file or the data set.
    """
    if typed.get("cur_stage", stage) != stage:
        raise UsageError(f"--cur_stage {typed['cur_stage']}: this command is {stage}'s", stage)
    if typed.get("stem") == "pretrained":
        raise UsageError("--stem pretrained", "--network timm:NAME --pretrained, which has it")
    seeds = typed.get("seed")
    if isinstance(seeds, tuple) and len(seeds) > 1 and "None" in seeds:
        raise UsageError(f"--seed {shown(seeds)}", "None alone, or numbers")
    layers: dict[str, Values] = {}
    if stage == "stage1" and DATASETS[str(typed.get("dataset", "cifar100"))].rows:
        raise UsageError(
            f"main_stage1.py --dataset {typed['dataset']}: there is no backbone", "main_stage2.py, compare.py"
        )
    if file is not None:
        stored = file_identity(file)
        refuse_contradictions(typed, stored, str(file.path))
        layers[str(file.path)] = stored
        layers[f"{file.path}, its options"] = file_defaults(file)
    pretrained = typed.get("pretrained_pth") if file is None else None
    dataset = next((layer["dataset"] for layer in (typed, *layers.values()) if "dataset" in layer), "cifar100")
    if dataset not in DATASETS:
        raise UsageError(f"a file of data set {dataset}", ", ".join(DATASETS))
    stated = file_defaults(file) | file_identity(file) if file else {}
    if file is not None and DATASETS[dataset].own and "dataset" not in file.data:
        layers[f"{file.path}'s weights"] = dict(constants_of(file))
    elif pretrained == "imagenet" and DATASETS[dataset].own:
        spec = DATASETS["imagenet_lt"]
        layers["ImageNet's weights"] = {"mean": spec.mean, "std": spec.std}
    layers |= recipe_layers(dataset, stated | dict(typed), stage)
    if typed.get("protocol") == "published":
        layers["--protocol published"] = {**published_values(cls), **DATASETS[dataset].published}
    layers["drawn"] = {"seed": on_main_process(draw_seed)}
    typed = {name: value for name, value in typed.items() if name != "seed" or value not in ("None", ("None",))}
    resolved = resolve(cls, typed, layers)
    check_data_flags(resolved.options, typed)
    return resolved


def recipe_layers(dataset: str, known: Values, stage: str = "") -> dict[str, Values]:
    """Layers of option values that a data set brings: its recipe, and what suits the data in a place.

    ``known`` are the flags that choose them. What a recipe starts from is for stage 1 alone. Raises UsageError where
    there is no such recipe.
    """
    spec = DATASETS[dataset]
    name = str(known.get("recipe") or next(iter(spec.recipes)))
    if name not in spec.recipes:
        raise UsageError(f"--recipe {name} with --dataset {dataset}", ", ".join(spec.recipes))
    recipe = dict(spec.recipes[name])
    if stage != "stage1":
        recipe.pop("pretrained_pth", None)
    if (spec.own or spec.natural) and "imb_ratio" not in known:
        recipe["imb_ratio"] = NATURAL
    label = f"--dataset {dataset}" + (f", {name}" if len(spec.recipes) > 1 else "")
    layers: dict[str, Values] = {label: recipe}
    if spec.suited:
        looked = layout_of(known)
        layers["from its images"] = spec.suited(str(known.get("data_dir", "data/")), looked)
    return layers


def needs_held_out(resolved: Resolved[TrainOptions]) -> list[str]:
    """Those flags of both stages that choose on held-out images."""
    by, is_best = resolved.options.select_by, resolved.options.select == "best_val"
    is_typed = resolved.sources["select_by"] == "typed"
    return ["--select best_val"] * is_best + [f"--select_by {by}"] * is_typed


def layout_of(known: Values) -> ImageOptions:
    """How data of one's own are laid out, of what flags or a checkpoint say."""
    size, level, share, seed = (known.get(name) for name in ("image_size", "class_level", "test_split", "test_seed"))
    return ImageOptions(
        image_size=size if isinstance(size, int) else None,
        class_level=level if isinstance(level, int) else 1,
        test_split=share if isinstance(share, float) else 0.0,
        test_seed=seed if isinstance(seed, int) else 0,
    )


def file_identity(file: Checkpoint) -> dict[str, object]:
    """The data set, subset and network that a checkpoint states; another program's states its network alone."""
    stated: dict[str, object] = {"network": file.network, "stem": file.stem}
    stated |= {key: value for key, value in file.data.items() if key in IDENTITY}
    if "dataset" in file.data and DATASETS[file.data["dataset"]].own:
        stated |= {"mean": tuple(file.data["mean"]), "std": tuple(file.data["std"])}
        stated |= {"range": tuple(file.data["levels"])} if file.data.get("levels") else {}
        stated |= {"fit": file.data.get("fit", "crop")}
    return stated


#: The data set that a photo network of another program is taken to be of, by its number of classes.
OF_CLASSES = {365: "places_lt", 8142: "inat2018"}


def constants_of(file: Checkpoint) -> dict[str, tuple[float, ...]]:
    """Mean and std that the images were normalised with which a file's weights were trained on; {} where unknown.

    Of other programs' files: timm's own, and for networks of photos those of ImageNet, or of iNaturalist 2018 where
    there are 8,142 classes.
    """
    if "mean" in file.data and "std" in file.data:
        return {"mean": tuple(file.data["mean"]), "std": tuple(file.data["std"])}
    if file.network.startswith(TIMM):
        mean, std = timm_constants(file.network.removeprefix(TIMM))
        return {"mean": mean, "std": std}
    if file.stem == "imagenet" and file.in_channels == 3:
        spec = DATASETS[OF_CLASSES.get(file.num_classes, "imagenet_lt")]
        return {"mean": spec.mean, "std": spec.std}
    return {}


def file_defaults(file: Checkpoint) -> dict[str, object]:
    """What a checkpoint's own run was given and the next may change: where its data lie, if they do, how it is read."""
    if "dataset" not in file.data:
        return {}
    is_own, place = DATASETS[file.data["dataset"]].own, str(file.options.get("data_dir"))
    is_there = is_own or (Path(place).is_dir() and not DATASETS[file.data["dataset"]].embedded)
    names = ("recipe", "jitter", "flip", "input", *["data_dir"] * is_there, *(LAYOUT if is_own else ()))
    return {name: file.options[name] for name in names if file.options.get(name) is not None}


def refuse_contradictions(typed: Values, stored: Values, source: str) -> None:
    """Raises UsageError where a typed flag disagrees with what a file states."""
    for name, value in stored.items():
        if name in typed and typed[name] != value:
            raise UsageError(
                f"--{name} {shown(typed[name])} contradicts {source}", f"--{name} {shown(value)}, or another file"
            )


def check_data_flags(options: DataOptions, typed: Values) -> None:
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
        raise UsageError(f"--flip_tta: images of {options.dataset} are not mirrored in training", "--no-flip_tta")
    for name in ("image_size", "jitter", "flip", "input"):
        if name in typed and not spec.photos:
            raise UsageError(
                f"--{name} {typed[name]}: {options.dataset} has images of one size, held in memory",
                f"without it, or one of {', '.join(key for key, each in DATASETS.items() if each.photos)}",
            )
    if (options.network in BACKBONES and "rows" in BACKBONES[options.network]) != spec.rows:
        others = [name for name, stems in BACKBONES.items() if ("rows" in stems) == spec.rows]
        raise UsageError(f"--network {options.network} with --dataset {options.dataset}", ", ".join(others))
    for name in ("mean", "std", "range", "fit", *LAYOUT):
        if name in typed and spec.rows:
            raise UsageError(f"--{name} with --dataset {options.dataset}, which has no images", "without it")
        if name in typed and not spec.own:
            own = ", ".join(key for key, each in DATASETS.items() if each.own and not each.rows)
            raise UsageError(f"--{name}: {options.dataset} is no data of one's own", f"without it, or one of {own}")
    if "data_dir" in typed and spec.embedded:
        show(f"--data_dir {options.data_dir}: {options.dataset} comes with the installation; nothing is read there")
    if "workers" in typed and not spec.photos:
        show(f"--workers {options.workers}: {options.dataset} is held in memory; no worker process is started")


def data_name(options: DataOptions) -> str:
    """What files of a data set are called: its name, and of data of one's own the name of its folder or file too."""
    place = Path(options.data_dir).resolve()
    if not DATASETS[options.dataset].own:
        return options.dataset
    name = place.stem if place.is_file() else place.name
    safe = re.sub(r"[\x00-\x1f\x7f]", "_", name)
    if safe != name or len(os.fsencode(safe)) > MOST_NAME:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
        safe = f"{os.fsencode(safe)[:MOST_NAME].decode(errors='ignore')}-{digest}"
    return f"{options.dataset}-{safe}"


def flags_of(options: DataOptions, *names: str) -> str:
    """The flags that repeat those options which are not at their defaults: " --imb_ratio 50 --imb_type step"."""
    fields = {field.name: field.default for field in dataclasses.fields(options)}
    values = {name: getattr(options, name) for name in names}
    return "".join(f" --{name} {value}" for name, value in values.items() if value != fields[name])


def checkpoint_option(what: str = "the checkpoint", run: str = "the run that left it") -> str | None:
    """The --pretrained_pth option, also called --from, of a command that goes on with a file."""
    words = f"{what}, or the folder of {run}; without it, the one left by default"
    return option(None, Text("a file or a run folder"), words, "files", aliases=("from",))


def stage_option(stage: str) -> str:
    """The --cur_stage option of a training command."""
    return option(stage, Choice(STAGES), f"the stage; {stage} here, and nothing else", "files")
