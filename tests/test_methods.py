"""Every method of stage 2 against its equation longhand, and the rules of what goes with what."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from experiment.sweeps import varying
from losses import SoftmaxLoss, weighted
from models.heads import HEADS, head_name, make_linear, pool_adjacent_violators
from retraining.methods import METHODS, Method, Stage1, Trained, spaced
from retraining.options import Options
from retraining.settings import TUNABLE, by_stream, make_methods
from retraining.solver import Solver, TrainableHead
from retraining.start import make_start
from utils.errors import UsageError
from utils.options import spec_of

COUNTS = [40, 20, 8, 4, 2]
COMMON = {"seed": (0,), "batch_size": (64,), "finetune_epoch": (20,)}


@pytest.fixture(scope="module")
def start() -> Stage1:
    torch.manual_seed(0)
    labels = torch.arange(5).repeat_interleave(torch.tensor(COUNTS))
    features = (torch.randn(74, 6) + torch.randn(5, 6)[labels]).relu() + 0.01
    held_out = (torch.randn(50, 6) + 1).relu(), torch.arange(5).repeat(10)
    return Stage1(nn.Linear(6, 5).requires_grad_(False), COUNTS, lambda: [(features, labels)], lambda: [held_out])


def only(name: str, **wanted) -> Method:
    [method] = make_methods([name], COMMON | {k: (v,) for k, v in wanted.items()}, wanted, 5)
    return method


def head_of(start: Stage1, method: str, **wanted) -> nn.Module:
    return only(method, **wanted).chosen(start).head(start)


def numpy_of(start: Stage1) -> tuple[np.ndarray, np.ndarray]:
    return start.linear.weight.numpy().astype(np.float64), start.linear.bias.numpy().astype(np.float64)


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.9])
def test_tau_norm(start, tau: float) -> None:
    head, (weight, _) = head_of(start, "tau-norm", tau=tau), numpy_of(start)
    expected = np.stack([row / np.sqrt((row**2).sum()) ** tau for row in weight])
    assert np.abs(head.weight.detach().numpy() - expected).max() < 1e-6 and not head.bias.any()


def test_tau_comes_from_the_held_out_images(start) -> None:
    weight, _ = numpy_of(start)
    [(features, labels)] = start.held_out()
    scores = []
    for tau in np.arange(21) / 10:
        logits = features.numpy() @ (weight / np.linalg.norm(weight, axis=1, keepdims=True) ** tau).T
        hits = logits.argmax(axis=1) == labels.numpy()
        scores.append(np.mean([hits[labels.numpy() == j].mean() for j in range(5)]))
    assert len(set(scores)) > 2
    best = np.argmax(scores) / 10
    assert torch.allclose(head_of(start, "tau-norm").weight, head_of(start, "tau-norm", tau=best).weight)
    without = dataclasses.replace(start, held_out=None)
    assert torch.allclose(head_of(without, "tau-norm").weight, head_of(start, "tau-norm", tau=1.0).weight)


@pytest.mark.parametrize("tau", [0.0, 0.65, 1.3])
def test_multiplicative_logit_adjustment(start, tau: float) -> None:
    head, (weight, bias) = head_of(start, "mla", mla_tau=tau), numpy_of(start)
    features = start.held_out()[0][0]
    z = features.numpy().astype(np.float64) @ weight.T + bias
    expected = z * (np.array(COUNTS) / sum(COUNTS)) ** -tau
    assert np.abs(head(features).detach().numpy() / expected - 1).max() < 1e-4


def test_tau_of_mla_comes_from_the_held_out_images(start) -> None:
    start = dataclasses.replace(
        start, head=make_linear(start.linear.weight, start.linear.bias + torch.tensor([2, 1.5, 1, 0.5, 0]))
    )
    weight, bias = (part.detach().numpy() for part in (start.linear.weight, start.linear.bias))
    [(features, labels)] = start.held_out()
    scores = []
    for tau in np.arange(21) / 20:
        z = (features.numpy() @ weight.T + bias) * (np.array(COUNTS) / sum(COUNTS)) ** -tau
        scores.append(np.mean([(z.argmax(axis=1) == j)[labels.numpy() == j].mean() for j in range(5)]))
    assert len(set(scores)) > 2 and np.argmax(scores) > 0
    assert only("mla").chosen(start).mla_tau == pytest.approx(np.argmax(scores) / 20)
    assert only("mla", mla_tau=0.3).chosen(start).mla_tau == 0.3
    assert only("mla").chosen(dataclasses.replace(start, held_out=None)).mla_tau == 0.65


def test_l2_norm(start) -> None:
    head, (weight, bias) = head_of(start, "l2-norm"), numpy_of(start)
    expected = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    assert np.abs(head.weight.detach().numpy() - expected).max() < 1e-6
    assert np.abs(head.bias.detach().numpy() - bias).max() < 1e-6


@pytest.mark.parametrize("metric", ["centred", "cosine", "l2"])
def test_ncm(start, metric: str) -> None:
    features, labels = (part.numpy() for part in start.clean()[0])
    features = features.astype(np.float64)
    queries = np.random.default_rng(0).random((30, 6)) * 2
    if metric == "centred":
        center = features.mean(axis=0)
        features, queries_ = features - center, queries - center
    else:
        queries_ = queries
    if metric != "l2":
        features = features / np.linalg.norm(features, axis=1, keepdims=True)
        queries_ = queries_ / np.linalg.norm(queries_, axis=1, keepdims=True)
    means = np.stack([features[labels == j].mean(axis=0) for j in range(5)])
    if metric == "cosine":
        expected = (queries_ @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T).argmax(axis=1)
    else:
        expected = ((queries_[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    logits = head_of(start, "ncm", ncm_metric=metric)(torch.tensor(queries, dtype=torch.float32))
    assert len(set(expected)) > 2 and logits.argmax(dim=1).tolist() == expected.tolist()


def test_post_hoc_logit_adjustment_and_joint(start) -> None:
    weight, bias = numpy_of(start)
    head = head_of(start, "logit-adjustment-posthoc", la_tau=1.5)
    prior = np.array(COUNTS) / sum(COUNTS)
    assert np.abs(head.bias.detach().numpy() - (bias - 1.5 * np.log(prior))).max() < 1e-6
    assert np.abs(head.weight.detach().numpy() - weight).max() == 0
    joint = head_of(start, "joint")
    assert torch.equal(joint.weight, start.linear.weight) and torch.equal(joint.bias, start.linear.bias)


@pytest.mark.parametrize("radius", ["published", 0.4])
def test_maxnorm(start, radius) -> None:
    weight, bias = numpy_of(start)
    norms = np.linalg.norm(weight, axis=1)
    limit = norms.min() + 0.1 * (norms.max() - norms.min()) if radius == "published" else radius
    expected = np.stack([row * min(1, limit / norm) for row, norm in zip(weight, norms)])
    assert np.abs(expected - weight).max() > 1e-3
    method = only("maxnorm", maxnorm_radius=radius)
    head = method.head(start)
    method.project(head, start)
    assert np.abs(head.weight.detach().numpy() - expected).max() < 1e-6
    assert np.abs(head.bias.detach().numpy() - bias).max() < 1e-7


def test_crt_starts_afresh_from_its_seed(start) -> None:
    one, same, other = (make_start(only("crt", seed=seed).start, start, seed) for seed in (0, 0, 1))
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)
    assert not torch.equal(one.bias, start.linear.bias)
    assert METHODS["crt"].options()["sampler"] == "class"


def test_heads_longhand(start) -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.rand(9, 6, generator=generator)
    weight, bias = start.linear.weight, start.linear.bias
    z = features @ weight.T + bias
    scale, shift = torch.rand(2, 5, generator=generator)

    lws = head_of(start, "lws")
    assert torch.allclose(lws(features), z, atol=1e-6)
    lws.scale.data.copy_(scale)
    assert torch.allclose(lws(features), scale * z, atol=1e-6)
    marc = head_of(start, "marc")
    assert torch.allclose(marc(features), z, atol=1e-6)
    marc.scale.data.copy_(scale)
    marc.shift.data.copy_(shift)
    assert torch.allclose(marc(features), scale * z + shift * weight.norm(dim=1), atol=1e-6)
    for name, head in (("lws", lws), ("marc", marc)):
        linear = only(name).finished(head)
        assert head_name(linear) == "linear" and torch.allclose(linear(features), head(features), atol=1e-6)
        assert {n for n, p in head.named_parameters() if p.requires_grad} <= {"scale", "shift"}

    disalign = head_of(start, "disalign")
    first = torch.sigmoid(0.1 * features.sum(dim=1, keepdim=True))
    assert torch.allclose(disalign(features), (1 + first) * z, atol=1e-6)
    assert {n.split(".")[0] for n, p in disalign.named_parameters() if p.requires_grad} == {
        "scale", "shift", "confidence",
    }  # fmt: skip
    disalign.scale.data.copy_(scale)
    disalign.shift.data.copy_(shift)
    confidence = torch.sigmoid(0.1 * features.sum(dim=1, keepdim=True))
    assert torch.allclose(disalign(features), (1 + confidence * scale) * z + confidence * shift, atol=1e-6)

    cosine = head_of(start, "cosine", cosine_scale=7.0)
    expected = 7 * torch.cosine_similarity(features[:, None], weight[None], dim=2)
    assert torch.allclose(cosine(features), expected, atol=1e-5)


def falling(values: np.ndarray) -> np.ndarray:
    """The nearest sequence that never rises, by the max-min formula of isotonic regression."""
    mean, number = (lambda first, last: values[first : last + 1].mean()), len(values)
    return np.array([min(max(mean(a, b) for b in range(k, number)) for a in range(k + 1)) for k in range(number)])


def test_samn_longhand(start) -> None:
    weight, bias = numpy_of(start)
    features, _ = start.clean()[0]
    order = [1, 3, 0, 4, 2]  # classes need not come sorted
    mixed = dataclasses.replace(start, class_counts=[COUNTS[k] for k in order])
    head = head_of(mixed, "samn")
    first = np.array(mixed.class_counts) / 40
    assert np.abs(head.scale.detach().numpy() - first).max() < 1e-7 and torch.equal(head.scale, head.shift)
    ranked = np.argsort(-np.array(mixed.class_counts), kind="stable")
    generator = np.random.default_rng(0)
    for scale, shift in ((first, first), (generator.normal(size=5), generator.normal(size=5)), (np.arange(5.0),) * 2):
        head.scale.data, head.shift.data = (torch.tensor(part, dtype=torch.float32) for part in (scale, shift))
        factors = []
        for part in (scale, shift):
            monotone = np.empty(5)
            monotone[ranked] = falling(part[ranked])
            factors.append(np.exp(1 / np.log1p(np.exp(monotone))))
        unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
        expected = features.numpy() @ (unit * factors[0][:, None]).T + bias + factors[1]
        found = head(features).detach()
        assert np.abs(found.numpy() / expected - 1).max() < 1e-4
        assert torch.allclose(only("samn").finished(head)(features), found, atol=1e-4)
        assert (head.to_linear().weight.norm(dim=1)[ranked.copy()].diff() >= -1e-5).all()
    assert {name for name, part in head.named_parameters() if part.requires_grad} == {"scale", "shift"}


def test_pooling_has_the_gradient_of_its_blocks() -> None:
    values = torch.tensor([1.0, 3.0, 1.5, 0.5, 0.7, -1.0], dtype=torch.float64, requires_grad=True)
    pooled = pool_adjacent_violators(values)
    assert pooled.detach().numpy() == pytest.approx(falling(values.detach().numpy()))
    assert torch.autograd.gradcheck(pool_adjacent_violators, [values])
    for seed in range(20):
        drawn = np.random.default_rng(seed).normal(size=9)
        assert pool_adjacent_violators(torch.tensor(drawn)).numpy() == pytest.approx(falling(drawn))


def test_norms_of_samn_are_monotone_after_training(start) -> None:
    method, [(features, labels)] = only("samn"), start.clean()
    head = method.head(start)
    trainee = TrainableHead(head, lambda progress: method.loss(start, progress), 0.1, 0.0)
    Solver([trainee]).train_epoch([(features, labels)] * 12, 0.0, 1.0)
    norms = head.to_linear().weight.norm(dim=1)
    assert (head.scale.diff() > 0).any() and (norms.diff() >= -1e-6).all()
    assert torch.allclose(nn.functional.normalize(head.to_linear().weight), nn.functional.normalize(start.weight))


def test_cb_sigmoid_starts_calibrated(start) -> None:
    weight, bias = numpy_of(start)
    method, [(features, _)] = only("cb-sigmoid"), start.clean()
    norms = np.linalg.norm(weight, axis=1)
    head = method.head(start)
    own = features.numpy() @ (weight / norms[:, None]).T * norms.mean() + bias
    shifts = head(features).detach().numpy() - own
    assert np.ptp(shifts) < 1e-5 and abs(shifts.mean()) > 0.1
    assert head(features).sigmoid().sum(dim=1).mean().item() == pytest.approx(1, abs=1e-4)
    again = dataclasses.replace(start, head=method.finished(head).requires_grad_(False))
    assert torch.allclose(method.head(again).bias, head.bias, atol=1e-4)  # nothing to be done
    assert torch.allclose(method.finished(head)(features), head(features), atol=1e-5)


def test_cb_sigmoid_looks_at_evenly_spaced_images_whatever_the_blocks(start) -> None:
    [(features, labels)] = start.clean()
    seen = []
    for size in (74, 7, 1):
        blocks = list(zip(features.split(size), labels.split(size)))
        seen.append(spaced(dataclasses.replace(start, clean=lambda blocks=blocks: blocks), 30))
    assert all(torch.equal(rows, features[::3]) for rows in seen)
    assert torch.equal(spaced(start, 74), features)


def test_ldam_defers_its_weights(start) -> None:
    before, after = (only("ldam", drw=0.8).loss(start, progress) for progress in (0.75, 0.8))
    assert bool((before.weight == 1).all()) and after.weight[-1] > after.weight[0]
    margins = 0.5 * np.array(COUNTS) ** -0.25 / max(np.array(COUNTS) ** -0.25)
    assert np.abs(before.margin.numpy() - 30 * margins).max() < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_made_trained_and_stored(start, name: str) -> None:
    method = only(name).chosen(start)
    assert "class counts" in " ".join(str(type(method).__doc__).split())
    head = method.head(start)
    assert isinstance(method, Trained) == (method.stream is not None)
    if isinstance(method, Trained):
        before = {key: value.clone() for key, value in head.state_dict().items()}
        trainee = TrainableHead(head, lambda progress: method.loss(start, progress), 0.1, 0.0)
        [(features, labels)] = start.clean()
        [(loss, *_)] = Solver([trainee]).train_epoch([(features, labels)], 0.0, 1.0)
        assert np.isfinite(loss)
        assert any(not torch.equal(before[key], value) for key, value in head.state_dict().items())
    stored = method.finished(head)
    again = HEADS[head_name(stored)](6, 5)
    again.load_state_dict(stored.state_dict())
    queries = torch.rand(4, 6)
    assert torch.allclose(again(queries), head(queries), atol=1e-5) and stored.get_parameter("weight").shape == (5, 6)


def test_smoothing_combines_with_the_published_plug_ins() -> None:
    takers = {name for name, method in METHODS.items() if "label_smooth" in method.options()}
    assert takers == {"los", "ce", "crt", "lws", "cosine", "maxnorm"}


def test_every_option_of_a_method_is_a_flag_and_the_other_way_round() -> None:
    flags = spec_of(Options)
    assert set(TUNABLE) <= set(flags)
    for name, method in METHODS.items():
        for option, default in method.options().items():
            assert default is None or flags[option].kind(default) == default, (name, option)
    assert {name for name, spec in flags.items() if spec.sweep} == {*TUNABLE, "method"}


@pytest.mark.parametrize("name", METHODS)
def test_grids_have_one_size(name: str) -> None:
    settings = make_methods([name], COMMON, [], 100, tune=True)
    default = make_methods([name], COMMON, [], 100)
    if issubclass(METHODS[name], Trained) or name in ("tau-norm", "mla", "logit-adjustment-posthoc"):
        assert len(settings) == 9
    else:
        assert len(settings) == {"ncm": 3, "l2-norm": 1, "joint": 1}[name]
    if name not in ("tau-norm", "mla"):  # whose default looks at the held-out images itself
        assert default[0] in settings


def test_a_sweep_is_the_product_of_what_each_method_takes() -> None:
    wanted = COMMON | {"seed": (0, 1), "label_smooth": (0.5, "auto"), "tau": (1.0, 1.9), "batch_size": (32, 64)}
    settings = make_methods(["los", "tau-norm", "lade"], wanted, wanted, 100)
    by_method = {name: [s for s in settings if s.name == name] for name in ("los", "tau-norm", "lade")}
    assert {name: len(group) for name, group in by_method.items()} == {"los": 8, "tau-norm": 2, "lade": 4}
    assert {s.label_smooth for s in by_method["los"]} == {0.5, 100 / 102.04}
    assert varying([s.setting for s in settings]) == ["batch_size", "finetune_lr", "label_smooth", "tau"]
    rates = {(s.batch_size, s.finetune_lr) for s in by_method["los"]}
    assert rates == {(32, 2.5e-4), (64, 5e-4)}  # a default follows the batch size
    typed = make_methods(["los"], wanted | {"finetune_lr": (0.1,)}, [], 100)
    assert {s.finetune_lr for s in typed} == {0.1}
    groups = by_stream(settings)
    assert len(groups) == 5 and len(groups[None]) == 2
    assert {stream.batch_size for stream in groups if stream} == {32, 64}


def test_val_is_a_grid_around_what_would_stand_without_it() -> None:
    wanted = COMMON | {"batch_size": (32, 64), "finetune_lr": ("val", 0.3), "label_smooth": ("val",)}
    settings = make_methods(["los", "lade", "tau-norm"], wanted, wanted, 100)
    assert [s.setting.method for s in settings].count("los") == 2 * 6 * 7 and len(settings) == 2 * 6 * (7 + 1) + 1
    rates = [s.finetune_lr for s in settings if s.name == "lade" and s.batch_size == 32]
    assert rates == pytest.approx([2.5e-4, 1e-5, 5e-5, 1.25e-3, 6.25e-3, 0.3])  # the default first; typed ones as typed
    smooths = list(dict.fromkeys(s.label_smooth for s in settings if s.name == "los"))
    assert smooths[0] == 100 / 102.04
    assert sorted(smooths) == pytest.approx([0, *(100 / (100 + 2.04 * 4**k) for k in (4, 3, 2, 1, 0, -1))])
    recipe = make_methods(["lade"], wanted | {"label_smooth": (None,)}, [], 100, recipe={"finetune_lr": 0.02})
    rates = [s.finetune_lr for s in recipe if s.batch_size == 32]
    assert rates == pytest.approx([0.02, 8e-4, 4e-3, 0.1, 0.5, 0.3])
    tuned = make_methods(["los"], COMMON | {"label_smooth": ("val",)}, ["label_smooth"], 100, tune=True)
    assert len(tuned) == 3 * 7  # a grid for the learning rate, times that of val


@pytest.mark.parametrize(
    "methods, flags, words",
    [
        ("los", {"tau": (1.0,)}, "--tau --method los tau-norm"),
        ("ncm", {"sampler": ("class",)}, "--sampler --method ncm los"),
        ("tau-norm l2-norm", {"finetune_lr": (0.1,)}, "--finetune_lr tau-norm"),
        ("lade", {"label_smooth": (0.9,)}, "--label_smooth los ce crt lws maxnorm cosine"),
        ("lws", {"finetune_scope": ("all",)}, "--finetune_scope all lws"),
        ("maxnorm", {"label_smooth": (0.9,), "cb_form": ("bce",)}, "--label_smooth --cb_form ce"),
        ("maxnorm", {"maxnorm_every": ("step",), "finetune_scope": ("all",)}, "--maxnorm_every step"),
    ],
)
def test_wrong_combinations_are_refused_by_name(methods: str, flags: dict, words: str) -> None:
    with pytest.raises(UsageError) as error:
        make_methods(methods.split(), COMMON | flags, flags, 10)
    for word in words.split():
        assert word in str(error.value)


def test_a_linear_head_is_a_copy(start) -> None:
    head = make_linear(start.linear.weight, start.linear.bias)
    with torch.no_grad():
        head.weight.add_(1)
    assert not torch.equal(head.weight, start.linear.weight)


def test_smoothing_takes_maxnorms_other_loss_along() -> None:
    wanted = COMMON | {"label_smooth": (0.0, 0.5)}
    settings = make_methods(["maxnorm"], wanted, ["label_smooth"], 10)
    assert [s.cb_form for s in settings] == ["bce", "ce"]


LOGITS = torch.randn(12, 5, generator=torch.Generator().manual_seed(9))
TARGETS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4])
N = torch.tensor(COUNTS, dtype=torch.float64)
PRIOR = N / N.sum()


def weighted_ce(z: torch.Tensor, weights: torch.Tensor, smooth: float = 0.0) -> float:
    log_p = z.double().log_softmax(dim=1)
    rows = [-(1 - smooth) * p[y] - smooth * p.mean() for p, y in zip(log_p, TARGETS)]
    chosen = weights.double()[TARGETS]
    return float((torch.stack(rows) * chosen).sum() / chosen.sum())


def effective(beta: float) -> torch.Tensor:
    return (1 - beta) / (1 - beta**N)


LONGHAND = {
    "los": ({"label_smooth": 0.3}, lambda: weighted_ce(LOGITS, torch.ones(5), 0.3)),
    "ce": ({"label_smooth": 0.2}, lambda: weighted_ce(LOGITS, torch.ones(5), 0.2)),
    "crt": ({"label_smooth": 0.1}, lambda: weighted_ce(LOGITS, torch.ones(5), 0.1)),
    "lws": ({"label_smooth": 0.1}, lambda: weighted_ce(LOGITS, torch.ones(5), 0.1)),
    "cosine": ({"label_smooth": 0.4}, lambda: weighted_ce(LOGITS, torch.ones(5), 0.4)),
    "balanced-softmax": ({}, lambda: weighted_ce(LOGITS + N.log(), torch.ones(5))),
    "logit-adjustment": ({"la_tau": 1.7}, lambda: weighted_ce(LOGITS + 1.7 * PRIOR.log(), torch.ones(5))),
    "vs": (
        {"vs_gamma": 0.45, "la_tau": 1.7},
        lambda: weighted_ce(LOGITS / (40 / N) ** 0.45 + 1.7 * PRIOR.log(), torch.ones(5)),
    ),
    "cdt": ({"vs_gamma": 0.7}, lambda: weighted_ce(LOGITS / (40 / N) ** 0.7, torch.ones(5))),
    "class-balanced": ({"cb_beta": 0.9}, lambda: weighted_ce(LOGITS, effective(0.9))),
    "maxnorm": (
        {"cb_beta": 0.9, "label_smooth": 0.5, "cb_form": "ce"},
        lambda: weighted_ce(LOGITS, effective(0.9), 0.5),
    ),
    "disalign": ({"grw_rho": 0.7}, lambda: weighted_ce(LOGITS, PRIOR**-0.7)),
    "marc": ({"grw_rho": 0.7}, lambda: weighted_ce(LOGITS, PRIOR**-0.7)),
}


@pytest.mark.parametrize("name", LONGHAND)
def test_losses_longhand_away_from_their_defaults(start, name: str) -> None:
    wanted, expected = LONGHAND[name]
    loss = only(name, **wanted).loss(start, 0.0)
    assert float(loss(LOGITS, TARGETS)) == pytest.approx(expected(), rel=1e-5)


def test_the_other_losses_longhand_away_from_their_defaults(start) -> None:
    def value(name: str, progress: float = 0.0, **wanted) -> float:
        return float(only(name, **wanted).loss(start, progress)(LOGITS, TARGETS))

    p = LOGITS.double().softmax(dim=1)[range(12), TARGETS]
    assert value("focal", focal_gamma=1.5) == pytest.approx(float(-((1 - p) ** 1.5 * p.log()).mean()), rel=1e-5)
    smooth = 0.05 + 0.5 * torch.sin(torch.pi * (N - 2) / (2 * 38))
    log_p = LOGITS.double().log_softmax(dim=1)
    rows = [-(1 - smooth[y]) * z[y] - smooth[y] * z.mean() for z, y in zip(log_p, TARGETS)]
    found = value("label-aware-smoothing", las_head=0.55, las_tail=0.05)
    assert found == pytest.approx(float(torch.stack(rows).mean()), rel=1e-5)
    lade = weighted.LADE(COUNTS, alpha=0.3, lam=0.2)
    assert value("lade", lade_alpha=0.3, lade_lambda=0.2) == pytest.approx(float(lade(LOGITS, TARGETS)), rel=1e-6)
    assert value("lade", lade_alpha=0.2, lade_lambda=0.3) != pytest.approx(float(lade(LOGITS, TARGETS)), rel=1e-3)
    weights = effective(0.9) / effective(0.9).sum() * 5
    p = LOGITS.double().sigmoid()
    rows = [-(z[y].log() + sum((1 - z[j]).log() for j in range(5) if j != y)) for z, y in zip(p, TARGETS)]
    expected = float((weights[TARGETS] * torch.stack(rows)).mean())
    assert value("cb-sigmoid", cb_beta=0.9) == pytest.approx(expected, rel=1e-5)
    bce = weighted.ClassBalancedBCE(COUNTS, 0.9)
    assert value("weight-decay", cb_beta=0.9) == pytest.approx(float(bce(LOGITS, TARGETS)), rel=1e-6)
    margins = 0.2 * N**-0.25 / (N**-0.25).max() * 10
    shifted = LOGITS - margins[None] * torch.nn.functional.one_hot(TARGETS, 5)
    ldam = {"ldam_margin": 0.2, "cosine_scale": 10.0, "drw": 0.5, "cb_beta": 0.9}
    assert value("ldam", 0.4, **ldam) == pytest.approx(weighted_ce(shifted, torch.ones(5)), rel=1e-5)
    assert value("ldam", 0.5, **ldam) == pytest.approx(weighted_ce(shifted, effective(0.9)), rel=1e-5)


def test_class_balanced_bce_tells_a_nan_instead_of_ending_the_program() -> None:
    loss = weighted.ClassBalancedBCE(COUNTS)(torch.full((2, 5), torch.nan), torch.tensor([0, 1]))
    assert bool(loss.isnan())


def test_published_defaults() -> None:
    expected = {
        "los": {"finetune_lr": 5e-4, "finetune_wd": 0.0, "label_smooth": "auto"},
        "crt": {"finetune_lr": 0.2 * 64 / 512, "finetune_wd": 5e-4, "sampler": "class"},
        "lws": {"finetune_lr": 0.2 * 64 / 512, "finetune_wd": 5e-4, "sampler": "class"},
        "balanced-softmax": {"finetune_lr": 0.02 * 64 / 256, "finetune_wd": 5e-4},
        "label-aware-smoothing": {"finetune_lr": 0.02 * 64 / 128, "las_head": 0.4, "las_tail": 0.1, "sampler": "class"},
        "disalign": {"finetune_lr": 0.1 * 64 / 256, "finetune_wd": 5e-4, "grw_rho": 1.2},
        "marc": {"finetune_lr": 0.1 * 64 / 512, "finetune_wd": 5e-4, "grw_rho": 1.2},
        "ldam": {"ldam_margin": 0.5, "cosine_scale": 30.0, "drw": 0.8, "cb_beta": 0.9999},
        "maxnorm": {"finetune_lr": 0.01, "finetune_wd": 0.1, "cb_form": "bce", "cb_beta": 0.9999},
        "lade": {"lade_alpha": 0.1, "lade_lambda": 0.01},
        "vs": {"vs_gamma": 0.3, "la_tau": 1.2, "finetune_lr": 5e-4, "finetune_wd": 0.0},
        "cdt": {"vs_gamma": 0.2},
        "samn": {"finetune_lr": 5e-4, "finetune_wd": 0.0, "sampler": "instance"},
        "cb-sigmoid": {"finetune_lr": 1e-4, "finetune_wd": 0.0, "cb_beta": 0.9999},
    }
    for name, values in expected.items():
        for option, value in values.items():
            assert METHODS[name].options()[option] == pytest.approx(value), (name, option)


def test_grids_go_down_and_up_and_begin_with_the_default() -> None:
    settings = make_methods(["crt"], COMMON, [], 100, tune=True)
    assert [s.finetune_lr for s in settings][::3] == pytest.approx([0.025, 0.005, 0.125])
    assert [s.finetune_wd for s in settings][:3] == [5e-4, 0.0, 5e-3]


def test_tau_goes_by_class_mean_where_the_held_out_images_are_unbalanced(start) -> None:
    [(features, _)] = start.held_out()
    weight, _ = numpy_of(start)
    for seed in range(200):  # labels for which the two rules disagree
        labels = np.random.default_rng(seed).choice(5, 50, p=[0.7, 0.15, 0.05, 0.05, 0.05])
        if len(set(labels)) < 5:
            continue
        hits = [
            (features.numpy() @ (weight / np.linalg.norm(weight, axis=1, keepdims=True) ** tau).T).argmax(1) == labels
            for tau in np.arange(21) / 10
        ]
        by_class = [np.mean([hit[labels == j].mean() for j in range(5)]) for hit in hits]
        if np.argmax(by_class) != np.argmax([hit.mean() for hit in hits]):
            break
    lopsided = dataclasses.replace(start, held_out=lambda: [(features, torch.tensor(labels))])
    assert only("tau-norm").chosen(lopsided).tau == pytest.approx(np.argmax(by_class) / 10)
    by_image = np.argmax([hit.mean() for hit in hits]) / 10
    assert only("tau-norm").chosen(lopsided, "top1").tau == pytest.approx(by_image)


@pytest.mark.parametrize("name", ["maxnorm", "weight-decay"])
def test_published_schedule_is_a_scheduler_stepped_before_each_epoch(name: str) -> None:
    """Weight Balancing's code: 10 epochs, CosineAnnealingLR stepped first."""
    axes = {"seed": (0,), "batch_size": (64,), "finetune_epoch": (20,), "finetune_scope": ("fc",)}
    (plain,) = make_methods([name], axes, [], 10)
    (published,) = make_methods([name], axes, [], 10, published=True)
    (typed,) = make_methods(
        [name], axes | {"finetune_schedule": ("cosine",)}, axes.keys() | {"finetune_schedule"}, 10, True
    )
    assert (plain.finetune_epoch, published.finetune_epoch, typed.finetune_epoch) == (20, 10, 20)
    for method, is_first in ((plain, False), (published, True), (typed, False)):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=method.finetune_lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, method.finetune_epoch)
        for epoch in range(method.finetune_epoch):
            optimizer.step()
            if is_first:
                scheduler.step()
            expected = optimizer.param_groups[0]["lr"]
            assert method.finetune_lr * method.rate(epoch) == pytest.approx(expected, rel=1e-9, abs=1e-12)
            if not is_first:
                scheduler.step()
    assert published.finetune_lr * published.rate(0) == pytest.approx(0.00976, abs=5e-6)


def test_heads_with_schedules_of_their_own_are_trained_as_alone() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(64, 6), torch.randint(0, 4, (64,))
    one, other = (
        [TrainableHead(torch.nn.Linear(6, 4), lambda progress: SoftmaxLoss(4), 0.5, 0.1) for _ in range(2)]
        for _ in range(2)
    )
    for mine, theirs in zip(one, other):
        theirs.head.load_state_dict(mine.head.state_dict())
    Solver(one).train_epoch([(features, labels)], 0.0, [1.0, 0.25])
    for head, rate in zip(other, (1.0, 0.25)):
        Solver([head]).train_epoch([(features, labels)], 0.0, rate)
    for mine, theirs in zip(one, other):
        assert torch.allclose(mine.head.weight, theirs.head.weight, atol=1e-7)
    assert not torch.allclose(one[0].head.weight, one[1].head.weight)
