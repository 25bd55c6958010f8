"""From the prior that a classifier was made for to that of the images it meets: --test_prior and --source_prior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from utils.checkpoints import Checkpoint, read
from utils.errors import UsageError
from utils.metrics import percent
from utils.options import Choice, Text, option
from utils.priors import estimate, log_ratio, read_prior, shares
from utils.types import Json

#: Losses of stage 1 and methods of stage 2 that look at no class counts: their classifier has the prior of what is
#: drawn for it.
PLAIN = ("ce", "los", "focal", "cosine", "crt", "lws", "tail-sampling", "h2t")
#: The prior of what samplers draw, at the end of training; what the square-root sampler draws is neither.
DRAWN = {"instance": "train", "class": "balanced", "progressive": "balanced"}
#: Classes of an estimate that are named, of the largest and of the smallest.
NAMED = 3


def test_prior_option(more: str = "") -> str | None:
    """The --test_prior option."""
    words = f"re-weight probabilities to these shares of the classes: balanced, train, em (estimated){more} or a file"
    return option(None, Text("balanced, train, em or a file"), words, "evaluation")


def source_prior_option() -> str | None:
    """The --source_prior option."""
    words = "the shares that the classifier was made for; None: by its loss or method, and its sampler"
    return option(None, Choice(("balanced", "train")), words, "evaluation")


@dataclass(frozen=True)
class Priors:
    """How probabilities are re-weighted.

    Attributes:
        wanted: what --test_prior says.
        source_name: "train" or "balanced", or in words what of "train" smoothed labels have left.
        why: how that is known, in words.
        source: the prior that the classifier was made for, (C,).
        given: the test prior, (C,); None where it is estimated.
    """

    wanted: str
    source_name: str
    why: str
    source: Tensor
    given: Tensor | None

    def test(self, probabilities: Callable[[], Tensor]) -> Tensor:
        """The test prior (C,); ``probabilities`` gives those of the test images, (N, C), to estimate it from."""
        return estimate(probabilities(), self.source) if self.given is None else self.given

    def reweighted(self, logits: Tensor, test: Tensor) -> Tensor:
        """Logits z / T (N, C) of a classifier -> logits whose softmax is that of Eq. 2.4, see :mod:`utils.priors`."""
        return logits + log_ratio(test, self.source).to(logits.device)

    def describe(self, test: Tensor, names: Sequence[str]) -> str:
        """A line on both priors; of an estimate another, with its largest and smallest classes."""
        line = f"prior: the classifier's is {self.source_name} ({self.why}), re-weighted to {self.wanted}"
        if self.wanted != "em":
            return line
        order = test.argsort(descending=True, stable=True).tolist()
        named = [f"{names[place]} {percent(float(test[place]))}" for place in order]
        if len(named) > 2 * NAMED:
            named[NAMED:-NAMED] = ["..."]
        return f"{line}\nestimated test prior, %: {', '.join(named)}"

    def report(self, test: Tensor) -> Json:
        """What reports hold of it."""
        return {"source": self.source_name, "test": self.wanted, "test_prior": test.tolist()}


def priors_of(
    wanted: str | None, source: str | None, file: Checkpoint, names: Sequence[str], counts: Sequence[int] | None
) -> Priors | None:
    """What the two options ask for; None without --test_prior.

    ``names`` and ``counts`` (C,) are of the classes, None where nothing says how many training images they have.

    Raises:
        UsageError: nothing says which prior the classifier was made for; there are no counts, or one is 0; the file
            holds no prior.
    """
    if wanted is None:
        if source is not None:
            raise UsageError(f"--source_prior {source} without --test_prior", "both, or neither")
        return None
    stated, why, smooth = (source, "--source_prior", 0.0) if source else made_for(file)
    if stated is None:
        problem = f"--test_prior {wanted}: {file.path} does not say which prior its classifier was made for ({why})"
        raise UsageError(problem, "--source_prior balanced or train beside it")
    if "train" in (wanted, stated) and (counts is None or min(counts) == 0):
        lacking = "does not say how many training images classes have" if counts is None else "has a class without any"
        raise UsageError(f"prior train: {file.path} {lacking}", "--source_prior balanced, and another --test_prior")
    known = {"balanced": shares([1.0] * len(names)), "train": shares(counts or [1.0])}
    given = None if wanted == "em" else known.get(wanted)
    if given is None and wanted != "em":
        given = read_prior("--test_prior", wanted, names)
    own, name = known[stated], stated
    if smooth and stated == "train":
        own, name = (1 - smooth) * own + smooth * known["balanced"], f"train, smoothed by {smooth:g}"
    return Priors(wanted, name, why, own, given)


def made_for(file: Checkpoint) -> tuple[str | None, str, float]:
    """The prior that a checkpoint's classifier was made for, by what that is known, and d of its smoothed labels.

    None: it does not say.

    ``train`` where a loss that looks at no class counts was trained on images as they are. ``balanced`` where such a
    one was trained on images drawn evenly, or with deferred weights; and of every other loss and method, which are
    made for balanced test sets. Stage 1's own classifier (``joint``) has stage 1's, class means and logistic regression
    in its place are balanced. Labels that are smoothed by d have the shares (1 - d) pi + d / C, to which a classifier's
    mean probabilities go: nearly balanced ones with Label Over-Smooth's d of 0.98 at C 100.
    """
    options = file.options
    what = "method" if "method" in options else "loss"
    if options.get("method") == "joint" and options.get("start") in ("class_mean", "logistic"):
        return "balanced", f"start {options['start']}", 0.0
    if options.get("method") == "joint":
        return _of_parent(file)
    if what not in options:
        return None, "no loss or method", 0.0
    tau, sampler, words = options.get("la_tau"), options.get("sampler"), f"{what} {options[what]}"
    if options[what] not in PLAIN:
        return ("balanced" if tau in (None, 1) else None), words if tau is None else f"{words}, la_tau {tau}", 0.0
    if options.get("drw_epoch") is not None:
        return "balanced", f"{words}, drw_epoch {options['drw_epoch']}", 0.0
    smooth = options.get("label_smooth")
    return DRAWN.get(str(sampler)), f"{words}, sampler {sampler}", smooth if isinstance(smooth, float) else 0.0


def _of_parent(file: Checkpoint) -> tuple[str | None, str, float]:
    """The same of the file that training began from, if it is still there."""
    with suppress(UsageError):
        parent = read(file.parent["path"]) if file.parent else None
        if parent and file.parent and parent.sha256 == file.parent["sha256"] and parent.stage == "stage1":
            stated, why, smooth = made_for(parent)
            return stated, f"stage 1's {why}", smooth
    return None, "method joint, whose stage-1 file is not there", 0.0
