"""Which run --resume goes on with, and what is saved for it; the state itself is in utils/resume.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict, cast

import torch

from datasets import LongTailed
from experiment.options import MAY_MOVE, TrainOptions
from experiment.restore import final_path_of
from utils import checkpoints
from utils.checkpoints import HOW_IT_RUNS
from utils.console import show
from utils.distributed import launched, world_size
from utils.errors import UsageError
from utils.files import sweep
from utils.options import Values, convert_typed, shown, spec_of
from utils.readers import Unreadable, read_json
from utils.resume import Stateful, TrainState, can_go_on, completed_run
from utils.run import Run
from utils.system import available_cpus
from utils.typed import fits


class Resumed(NamedTuple):
    """A run to go on with: its folder, the options it goes on with although nobody typed them, and how it ended.

    ``result`` is what its command returned, where it is complete.
    """

    folder: Path
    kept: Sequence[str] = ()
    result: object = None
    is_complete: bool = False


def find_run(
    cls: type[TrainOptions], typed: Values, script: str, start_of: Callable[[Values], str | None]
) -> tuple[Values, Resumed | None]:
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
            is_same = is_same and begun is not None and begun.get("processes", 1) == processes_of(script)
            if begun and is_same and begun["start"] == start_of(typed):
                if can_go_on(path.parent):
                    return find_run(cls, {**typed, "resume": str(path.parent)}, script, start_of)
                show(f"note: all states of {path.parent} are damaged")
        show(f"--resume auto: no earlier run of this command in {out}; a new one begins")
        return typed, None
    folder = Path(str(wanted))
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
    of_machine = {name: begun["options"][name] for name in ("amp", "compile") if name in begun["options"]}
    kept: Values = {name: value for name, value in of_machine.items() if value != getattr(cls, name)}
    threads = begun["options"].get("threads")
    if isinstance(threads, int) and threads <= available_cpus():
        kept = {**kept, "threads": threads}  # which decides the last bits
    kept = {**kept, "seed": tuple(begun["seed"])}
    moved = {name: value for name, value in typed.items() if name in MAY_MOVE}
    found: dict[str, object] = {**stored, **kept, **moved}
    done = completed_run(folder)
    if done is None and begun["start"] != start_of(found):
        raise UsageError(f"--resume {wanted} was begun from another checkpoint", "the same file, or a new run")
    return found, Resumed(folder, [*(kept.keys() - stored)], done and done["result"], done is not None)


def processes_of(script: str) -> int:
    """How many processes make a run of a command what it is: stage 2's classifiers are trained by one of them."""
    return launched() if script == "main_stage1.py" else 1


def comparable(typed: Values) -> dict[str, object]:
    """The typed flags that make a run what it is."""
    return {name: value for name, value in typed.items() if name not in HOW_IT_RUNS}


def as_json(content: object) -> object:
    """A value as it comes back from a JSON file."""
    back: object = json.loads(json.dumps(content))
    return back


def typed_again(cls: type[TrainOptions], stored: Values, place: Path) -> dict[str, object]:
    """Typed flags as options.json has them; UsageError where a value cannot be one."""
    specs = spec_of(cls)
    unknown = set(stored) - set(specs)
    if unknown:
        raise UsageError(f"{place}: {', '.join(sorted(unknown))} is no option", "a run of this version")
    return {name: convert_typed(name, specs[name], value) for name, value in stored.items()}


class Begun(TypedDict):
    """options.json of a run folder."""

    script: str
    typed: dict[str, object]
    seed: list[int]
    start: str | None
    processes: int
    options: dict[str, object]


def read_begun(path: Path) -> Begun | None:
    """What :func:`experiment.record.begin` wrote into a run's options.json; None where it has not."""
    kinds = {"script": str, "typed": dict, "seed": list, "start": str | None, "options": dict, "processes": int}
    try:
        content = read_json(path)
    except Unreadable:
        return None
    is_whole = isinstance(content, dict) and all(isinstance(content.get(k, 0), kind) for k, kind in kinds.items())
    is_whole = is_whole and fits(content["seed"], list[int]) and bool(content["seed"])
    return cast(Begun, content) if is_whole else None


def say_complete(resumed: Resumed) -> object:
    """Says that a run is complete, and publishes it where another has been since; returns what its command returned."""
    show(f"{resumed.folder} is complete: nothing to resume. Without --resume it is made anew.")
    sweep(resumed.folder.parent, deep=True)  # it may have been killed after its result was written
    weights = resumed.folder / "checkpoint.pt"
    if weights.is_file():
        file = checkpoints.read(weights)
        if not checkpoints.same_run(file, final_path_of(file)):
            show(checkpoints.save_final(file, final_path_of(file), weights.read_bytes()))
    return resumed.result


def make_state(
    run: Run, options: TrainOptions, stored: Values, data: LongTailed, device: torch.device, **always: Stateful
) -> TrainState:
    """What is saved of a run while it trains, and taken up again by --resume; only with the same ``stored`` options."""
    parts = {"training": data.train, "test": data.test, "held-out": data.val}
    inputs: dict[str, object] = {"number of processes": world_size()}
    inputs["set of options"] = as_json({name: v for name, v in stored.items() if name not in MAY_MOVE})
    for name, part in parts.items():
        inputs[f"set of {name} images"] = part and f"{part.summary()} {part.sample()}"
        inputs[f"set of {name} labels"] = part and hashlib.sha256(part.labels.numpy().tobytes()).hexdigest()
    return TrainState(run, device, options.save_every, options.keep_states, inputs, **always)
