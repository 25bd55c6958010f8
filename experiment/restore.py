"""From checkpoint files to networks: which file, what is in it, whether it fits the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from datasets import DATASETS, FITS, LongTailed
from datasets.own import identity_of
from datasets.spec import SPLITS
from experiment.options import DataOptions, data_name, flags_of, layout_of, recipe_layers
from experiment.pretrained import shown_of
from models import BACKBONES, HEADS, TIMM, Network, PretrainedNetwork, build_model, imagenet_weights, recognise, sketch
from models.foreign import translate, translate_timm
from utils import checkpoints
from utils.checkpoints import Checkpoint, NoCheckpoint, require_weights, short
from utils.console import counted, show
from utils.distributed import main_process_first
from utils.errors import UsageError
from utils.options import Values, resolve


def open_checkpoint(typed: Values, stage: str, cls: type[DataOptions]) -> Checkpoint:
    """The file of --pretrained_pth, or the default file of a stage that the typed flags choose.

    Raises:
        UsageError: see :func:`utils.checkpoints.find` and :func:`utils.checkpoints.read`; or not a known network.
    """
    if "pretrained_pth" in typed:
        path = Path(str(typed["pretrained_pth"]))
        path = path / "checkpoint.pt" if (path / "checkpoint.pt").is_file() else path
        runs = sorted(path.glob("*/checkpoint.pt")) if path.is_dir() else []
        if runs:
            raise UsageError(
                f"{path} holds {counted(len(runs), 'run')}", ", ".join(str(run.parent) for run in runs[-5:])
            )
    else:
        dataset = str(typed.get("dataset", "cifar100"))
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
    if file.data and file.data["dataset"] not in DATASETS:
        raise UsageError(f"{path} is of the data set {short(file.data['dataset'])}", ", ".join(DATASETS))
    if file.data.get("fit", "crop") not in FITS:
        raise UsageError(f"{path}: its images were fitted by {short(file.data['fit'])}", ", ".join(FITS))
    if file.stage is not None:
        if "pretrained_pth" not in typed and path.name != final_path_of(file).name:
            raise UsageError(f"{path} holds what belongs at {final_path_of(file)}", "--pretrained_pth, if it is meant")
        return file
    wanted = str(typed.get("network", ""))
    if wanted.startswith(TIMM):
        timm, classes, channels = translate_timm(file.foreign, wanted.removeprefix(TIMM), str(path))
        show(f"{path}: {timm.known_as}")
        return dataclasses.replace(
            file,
            network=wanted,
            stem="imagenet",
            num_classes=classes,
            in_channels=channels,
            model=timm.model,
            foreign={},
        )
    found = translate(file.foreign, str(path))
    known = None if found is None else recognise(found.model, found.head)
    if found is None or known is None:
        named = "" if found is None else f", {found.known_as}, of no network known here"
        raise UsageError(
            f"{path} is a checkpoint of another program{named}",
            f"names and shapes of one of {', '.join(BACKBONES)}; {checkpoints.listing()}",
        )
    show(f"{path}: {found.known_as}")
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


def open_latest(typed: Values, cls: type[DataOptions]) -> Checkpoint:
    """The file of --cur_stage; without it stage 2's default file or, where there is none, stage 1's."""
    if "cur_stage" in typed or "pretrained_pth" in typed:
        return open_checkpoint(typed, str(typed.get("cur_stage", "stage2")), cls)
    try:
        file = open_checkpoint(typed, "stage2", cls)
    except NoCheckpoint:
        return open_checkpoint(typed, "stage1", cls)
    require_same_run(file, checkpoints.sibling(final_path_of(file)))
    return file


def require_same_run(stage2: Checkpoint, path: Path) -> None:
    """Raises UsageError where a stage-1 file of the same name is of other data than stage 2's."""
    if not path.is_file() or not stage2.data or not DATASETS[stage2.data["dataset"]].own:
        return
    stage1 = checkpoints.read(path)
    for key in ("class_names", "train_images"):
        if stage1.data.get(key) != stage2.data.get(key):
            raise UsageError(
                f"{stage2.path} was made from other data than {path} is of", f"--from {path}, --from {stage2.path}"
            )


def only_file() -> Path:
    """The latest stage's default file, where nothing was typed that chooses one.

    Raises:
        UsageError: there are files of several runs.
    """
    runs: dict[str, Path] = {}
    for path in sorted(checkpoints.FOLDER.glob("*_stage[12].pt")):  # a run's second stage comes last
        runs[path.stem.rpartition("_")[0]] = path
    if len(runs) > 1:
        files = ", ".join(map(str, runs.values()))
        raise UsageError(f"which checkpoint? There are {files}", "--from with one of them, or a run folder")
    if not runs:
        raise UsageError(f"there is no checkpoint in {checkpoints.FOLDER}", "--from with a file or a run folder")
    path = next(iter(runs.values()))
    if path.stem.endswith("_stage2"):
        require_same_run(checkpoints.read(path), checkpoints.sibling(path))
    return path


def require_same_data(file: Checkpoint, data_dir: str) -> None:
    """Checks that a file found by the name of data of one's own is of the data in that place, if they are there.

    Raises:
        UsageError: its classes are others.
    """
    if not file.data or not DATASETS[file.data["dataset"]].own:
        return
    if not Path(data_dir).exists():
        show(f"note: {data_dir} is not there: {file.path} is taken by its name alone")
        return
    names, listing = identity_of(file.data["dataset"], data_dir, layout_of(file.options))
    if names != file.data["class_names"]:
        theirs, ours = next((a, b) for a, b in zip([*file.data["class_names"], "none"], [*names, "none"]) if a != b)
        previous = [f"--from {path}" for path in places_before(file)]
        raise UsageError(
            f"{file.path} is of other data than {data_dir}: class {theirs} where {data_dir} has {ours}",
            ", ".join([*previous, "--from with another file or a run folder"]),
        )
    if file.data.get("listing", "") not in ("", listing):
        for older in places_before(file):
            if checkpoints.read(older).data.get("listing") == listing:
                raise UsageError(
                    f"{file.path} is of other images than {data_dir}, of which {older} is",
                    f"--from {older}, or --from {file.path} if it is meant",
                )
        show(f"note: the images in {data_dir} are not those that {file.path} was trained on, though the classes are")


def places_before(file: Checkpoint) -> list[Path]:
    """The files that a file has replaced, the latest first."""
    return [path for path in checkpoints.previous(file.path) if path.is_file()] if file.path else []


def files_read(file: Checkpoint, options: DataOptions) -> list[Path]:
    """Files that a command reads, beside images: a checkpoint, the one before it, data of one's own or its lists."""
    place = Path(options.data_dir)
    parents = [Path(file.parent["path"])] if file.parent else []
    return [*([file.path] if file.path else []), *parents, place, *(place / f"{split}.csv" for split in SPLITS)]


def final_path_of(file: Checkpoint) -> Path:
    """The default path of a checkpoint, by what it says of itself."""
    data = file.data
    name = data.get("name", data["dataset"])  # older files have none, and are not of data of one's own
    return checkpoints.default_path(name, data["imb_type"], data["imb_ratio"], file.network, str(file.stage))


def final_path(options: DataOptions, stage: str) -> Path:
    """Where a stage of these options puts its final file."""
    return checkpoints.default_path(data_name(options), options.imb_type, options.imb_ratio, options.network, stage)


def imagenet_start(network: str) -> Checkpoint:
    """torchvision's ImageNet weights of a network, as a file to start from."""
    with main_process_first():  # it may be a download
        state, place = imagenet_weights(network), Path("torchvision", f"{network}-IMAGENET1K_V1")
    return Checkpoint(None, network, len(state["fc.weight"]), 3, state, stem="imagenet", path=place)


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
    images = data.train.summary()
    is_same = file.data.get("train_images", images) == images
    if data.spec.own and not is_same:
        refuse_replaced(file, images)
    stated, spec = file.data, data.spec
    known: dict[str, tuple[Sequence[object], Sequence[object]]] = {}
    if "class_names" in stated:
        known = {
            "class_names": (stated["class_names"], data.class_names),
            "class_counts": (stated["class_counts"], data.class_counts),
            "mean": (stated["mean"], list(spec.mean)),
            "std": (stated["std"], list(spec.std)),
        }
    for key, (theirs_all, ours_all) in known.items():
        if theirs_all != ours_all:
            theirs, ours = next((a, b) for a, b in zip([*theirs_all, "none"], [*ours_all, "none"]) if a != b)
            where = f"; it was --data_dir {file.options['data_dir']}" if data.spec.own else ""
            raise UsageError(
                f"{file.path} was trained with other {key}: {theirs} where the data has {ours}",
                f"the data that it was trained on{where}",
            )
    if not is_same:
        show(f"note: the training images are not those that {file.path} was trained on")
    if file.head not in HEADS or head not in (None, file.head):
        fitting = f"--head {file.head}, or another file" if file.head in ("linear", "cosine") else "another file"
        raise UsageError(f"{file.path} has a {file.head} head", fitting)
    return built(file)


def refuse_replaced(file: Checkpoint, images: str) -> None:
    """Raises UsageError where a file has replaced one of these training images, see :meth:`ImageSet.summary`."""
    for older in places_before(file):
        if checkpoints.read(older).data.get("train_images") == images:
            raise UsageError(
                f"{file.path} was trained on other images, {older} on these",
                f"--from {older}, or a --data_dir with the images that it was trained on",
            )


def starting_weights(file: Checkpoint, data: LongTailed, head: str) -> dict[str, Tensor]:
    """A checkpoint's weights to train on from; without its classifier where that is of another number of classes.

    Raises:
        UsageError: see :func:`restore`.
    """
    if file.stem == "pretrained":
        raise UsageError(f"{file.path}: a pretrained network, frozen", "main_stage2.py, or another file")
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
    if file.head not in HEADS:
        raise UsageError(f"{file.path} has a {short(file.head)} head", ", ".join(HEADS))
    require_weights(file.model, str(file.path))
    rows = file.model.get("fc.weight")
    what = (file.network, file.num_classes, file.in_channels, file.head, file.stem)
    if rows is not None and rows.dim() == 2 and len(rows) == file.num_classes:
        expected = sketch(*what).state_dict()
        if {name: value.shape for name, value in expected.items()} == {n: v.shape for n, v in file.model.items()}:
            for name, value in file.model.items():
                is_float = expected[name].is_floating_point() and value.is_floating_point()
                if not is_float and value.dtype != expected[name].dtype:
                    kinds = [str(each.dtype).removeprefix("torch.") for each in (value, expected[name])]
                    raise UsageError(f"{file.path}: {name} is of {kinds[0]}", f"{kinds[1]}, as {file.network} has it")
            model = build_model(*what)
            model.load_state_dict(file.model)
            if isinstance(model, PretrainedNetwork):
                model.shown = shown_of(file)
            return model
    raise UsageError(f"{file.path}: its weights do not fit {file.network}", "an undamaged checkpoint")
