"""Bad input is answered with two lines, naming flag, value and what is allowed, and exit status 2."""

from __future__ import annotations

import os
import pickle
import re
from importlib import import_module
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from PIL import Image

import compare
import evaluate
import main_stage1
import main_stage2
import predict
from models import build_model
from utils.checkpoints import checksum
from utils.options import Choice, Flag, Number, Vector, spec_of

MAIN = {
    "main_stage1.py": main_stage1.main,
    "main_stage2.py": main_stage2.main,
    "compare.py": compare.main,
    "evaluate.py": evaluate.main,
    "predict.py": predict.main,
}
DIGITS = "--dataset digits --imb_ratio 100"


def forge(path: str, content: dict[str, object]) -> None:
    """Writes a checkpoint as somebody would who knows its checksum."""
    torch.save(content | {"checksum": checksum(content)}, path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short digits run of both stages, and files that are none of ours."""
    folder = tmp_path_factory.mktemp("finished")
    before = os.getcwd()
    os.chdir(folder)
    try:
        main_stage1.main(["--dataset", "digits", "--epochs", "1", "--seed", "0"])
        main_stage2.main(["--dataset", "digits", "--finetune_epoch", "1", "--seed", "0"])
        Path("text.pt").write_text("not a checkpoint")
        Path("empty.pt").touch()
        Path("plain.pt").write_bytes(pickle.dumps({"a": 1}, protocol=2))
        Path("cut.pt").write_bytes(Path("checkpoints/digits_exp100_resnet8_stage1.pt").read_bytes()[:20_000])
        torch.save(build_model("resnet8", 10, 1), "module.pt")
        torch.save({"state_dict": {"a": torch.zeros(1)}, "epoch": 3}, "other.pt")
        torch.save({"a": torch.zeros(1)}, "unknown.pt")
        torch.save(build_model("resnet8", 7, 1).state_dict(), "seven.pt")
        own = torch.load("checkpoints/digits_exp100_resnet8_stage1.pt", weights_only=True)
        torch.save(own | {"format": 99}, "newer.pt")
        forge("field.pt", own | {"metrics": None})
        forge("mean.pt", own | {"data": own["data"] | {"mean": [0.5]}})
        forge("x.pt", own | {"model": {k: v * torch.nan for k, v in own["model"].items() if v.is_floating_point()}})
        blob = bytearray(Path("checkpoints/digits_exp100_resnet8_stage1.pt").read_bytes())
        blob[len(blob) // 2] ^= 1
        Path("bit.pt").write_bytes(blob)
        Path("checkpoints/digits_exp77_resnet8_stage1.pt").write_bytes(Path("newer.pt").read_bytes())
        torch.save(own, "checkpoints/digits_exp66_resnet8_stage1.pt")
        Path("file").touch()
        Path("notes.txt").write_text("mine")
        Image.new("L", (8, 8)).save("a.png")
        os.mkfifo("pipe")
        torch.save(build_model("resnet8", 10, 1).state_dict(), "best.tar")
    finally:
        os.chdir(before)
    return folder


ROWS = [  # script, arguments, words that the two lines must hold
    ("main_stage2.py", f"{DIGITS} --label_smooth 1.5", "--label_smooth 1.5 [0, 1] auto"),
    ("main_stage2.py", f"{DIGITS} --label_smooth -0.1", "--label_smooth -0.1 [0, 1]"),
    ("main_stage2.py", f"{DIGITS} --label_smooth much", "--label_smooth much [0, 1]"),
    ("main_stage1.py", f"{DIGITS} --label_smooth nan", "--label_smooth nan [0, 1]"),
    ("main_stage1.py", "--imb_ratio 0.5", "--imb_ratio 0.5 from 1"),
    ("main_stage1.py", "--imb_ratio inf", "--imb_ratio inf from 1"),
    ("main_stage1.py", "--dataset digits --imb_ratio 500", "--imb_ratio 500 1 to 124"),
    ("main_stage1.py", "--dataset cifar1000", "--dataset cifar1000 cifar100, cifar10, digits"),
    ("main_stage1.py", "--network resnet33", "--network resnet33 resnet34, resnet32"),
    ("main_stage1.py", f"{DIGITS} --epochs 0", "--epochs 0 whole number"),
    ("main_stage1.py", f"{DIGITS} --epochs 1.5", "--epochs 1.5 whole number"),
    ("main_stage1.py", f"{DIGITS} --lr 0", "--lr 0 (0,"),
    ("main_stage1.py", f"{DIGITS} --seed x", "--seed x 2147483647"),
    ("main_stage1.py", f"{DIGITS} --momentum 0 --nesterov", "--nesterov --momentum"),
    ("main_stage1.py", f"{DIGITS} --finetune_lr 1", "--finetune_lr --lr"),
    ("main_stage1.py", f"{DIGITS} --select best_val", "--select best_val --val_split"),
    ("main_stage1.py", f"{DIGITS} --subset_seed 1", "--subset_seed --subset shuffled"),
    ("main_stage1.py", f"{DIGITS} --flip_tta", "--flip_tta digits --no-flip_tta"),
    ("main_stage1.py", f"{DIGITS} --cur_stage stage2", "--cur_stage stage2 stage1's allowed: stage1"),
    ("main_stage2.py", f"{DIGITS} --cur_stage stage1", "--cur_stage stage1 stage2's allowed: stage2"),
    ("main_stage1.py", f"{DIGITS} --num_class 100", "--num_class 100 10 digits"),
    ("evaluate.py", f"{DIGITS} --num_class 11", "--num_class 11 10 digits"),
    ("main_stage1.py", f"{DIGITS} --out file/run", "--out file/run written"),
    ("main_stage2.py", f"{DIGITS} --select best_val", "--select best_val main_stage1.py --val_split 0.1"),
    ("main_stage2.py", "--imb_ratio 50", "exp50_resnet34_stage1.pt digits_exp100_resnet8_stage1.pt main_stage1.py"),
    ("evaluate.py", "--dataset digits --imb_ratio 20 --cur_stage stage2", "exp20 python main_stage2.py --dataset"),
    ("evaluate.py", "--dataset digits --imb_ratio 20", "exp20 python main_stage1.py --dataset"),
    ("evaluate.py", "--pretrained_pth nowhere.pt", "nowhere.pt digits_exp100_resnet8_stage1.pt"),
    ("evaluate.py", "--pretrained_pth text.pt", "text.pt digits_exp100_resnet8_stage1.pt"),
    ("evaluate.py", "--pretrained_pth empty.pt", "empty.pt digits_exp100_resnet8_stage1.pt"),
    ("evaluate.py", "--pretrained_pth plain.pt", "plain.pt"),
    ("evaluate.py", "--pretrained_pth cut.pt", "cut.pt damaged digits_exp100_resnet8_stage1.pt"),
    ("evaluate.py", "--pretrained_pth module.pt", "module.pt pickled state_dict()"),
    ("evaluate.py", "--pretrained_pth other.pt", "other.pt another program digits_exp100_resnet8_stage1.pt"),
    ("evaluate.py", "--pretrained_pth unknown.pt", "unknown.pt resnet34, resnet18"),
    ("evaluate.py", "--pretrained_pth seven.pt --dataset digits", "seven.pt 7 classes 10"),
    ("evaluate.py", "--pretrained_pth newer.pt", "newer.pt format 99 4"),
    ("evaluate.py", "--pretrained_pth field.pt", "field.pt metrics None"),
    ("evaluate.py", "--pretrained_pth mean.pt", "mean.pt mean"),
    ("evaluate.py", "--pretrained_pth bit.pt", "bit.pt damaged"),
    ("evaluate.py", "--dataset digits --imb_ratio 77 --cur_stage stage1", "exp77 format 99"),
    ("main_stage2.py", "--dataset digits --imb_ratio 66", "exp66 exp100 --pretrained_pth"),
    ("evaluate.py", f"{DIGITS} --json x.pt", "--json x.pt checkpoint"),
    ("evaluate.py", f"{DIGITS} --csv checkpoints", "--csv checkpoints plain"),
    ("evaluate.py", f"{DIGITS} --csv same.txt --json same.txt", "--csv --json same.txt another"),
    ("main_stage1.py", f"{DIGITS} --lr 1e300", "--lr 1e300 1e+30"),
    ("main_stage1.py", f"{DIGITS} --lr -1e-5", "--lr -1e-5 (0,"),
    ("main_stage1.py", f"{DIGITS} --subset shuffled --subset_seed 4294967296", "--subset_seed 4294967296 4294967295"),
    ("main_stage1.py", f"{DIGITS} --network resnet18 --epochs 1 --batch_size 101", "one image --batch_size"),
    ("main_stage1.py", f"{DIGITS} --pretrained_pth seven.pt --val_split 0.1", "--val_split --pretrained_pth"),
    ("main_stage2.py", "--pretrained_pth checkpoints/digits_exp100_resnet8_stage2.pt", "stage-2 stage-1"),
    ("evaluate.py", "--pretrained_pth checkpoints/digits_exp100_resnet8_stage1.pt --imb_ratio 50", "--imb_ratio 100"),
    ("evaluate.py", "--pretrained_pth checkpoints/digits_exp100_resnet8_stage1.pt --cur_stage stage2", "stage2 stage1"),
    ("evaluate.py", f"{DIGITS} --json file/x.json", "--json file/x.json folder"),
    ("evaluate.py", f"{DIGITS} --protocol published", "--protocol --help"),
]  # fmt: skip


@pytest.mark.parametrize("script, arguments, words", ROWS, ids=[f"{script} {a}" for script, a, _ in ROWS])
def test_bad_input(finished: Path, monkeypatch, capsys, script: str, arguments: str, words: str) -> None:
    monkeypatch.chdir(finished)
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*.pt*")}
    with pytest.raises(SystemExit) as stop:
        MAIN[script](arguments.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    lines = error.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("allowed: "), error
    assert all(word in error for word in words.split()), error
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*.pt*")} == before


#: Command lines with the exact first line of what they are answered: script, arguments, line.
TABLE = [line.split("\t") for line in Path(__file__).with_name("bad_input.tsv").read_text().splitlines()]


@pytest.mark.parametrize(
    "script, arguments, line", TABLE, ids=[f"{script} {arguments}" for script, arguments, _ in TABLE]
)
def test_first_line(finished: Path, monkeypatch, capsys, script: str, arguments: str, line: str) -> None:
    monkeypatch.chdir(finished)
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        MAIN[script](arguments.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.splitlines()[0] == line and len(error.splitlines()) == 2, error
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("script", MAIN)
def test_every_flag_has_a_line_for_what_is_beyond_its_limits(script: str) -> None:
    """Numbers and names; of text and paths there are none."""
    tried = {flag for name, arguments, _ in TABLE if name == script for flag in re.findall(r"--(\w+)", arguments)}
    everywhere = {flag for _, arguments, _ in TABLE for flag in re.findall(r"--(\w+)", arguments)}
    for name, spec in spec_of(import_module(script.removesuffix(".py")).Options).items():
        kind = spec.kind.kind if isinstance(spec.kind, Vector) else spec.kind
        assert not isinstance(kind, Number) or name in tried, name
        assert not isinstance(kind, Choice | Flag) or name in everywhere, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("flags, words", [("--device cuda", "--device cuda cpu"), ("--gpu 0", "--gpu 0 none")])
def test_a_gpu_where_there_is_none(finished: Path, monkeypatch, capsys, flags: str, words: str) -> None:
    test_bad_input(finished, monkeypatch, capsys, "main_stage1.py", f"{DIGITS} {flags}", words)


def test_gpu_beside_cpu(finished: Path, monkeypatch, capsys) -> None:
    test_bad_input(
        finished, monkeypatch, capsys, "evaluate.py", f"{DIGITS} --gpu 0 --device cpu", "--gpu 0 --device cpu"
    )


def test_data_that_cannot_be_downloaded(workdir: Path, monkeypatch, capsys) -> None:
    def no_network(self: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", no_network)
    with pytest.raises(SystemExit) as stop:
        main_stage1.main(["--data_dir", "nothing"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 2
    assert all(word in error for word in ("--data_dir nothing", "cifar-100-python.tar.gz", "no network"))


def test_as_a_process(shell) -> None:
    process = shell("main_stage2.py", "--label_smooth", "1.5")
    assert process.returncode == 2 and not process.stdout
    assert process.stderr == "error: --label_smooth 1.5\nallowed: a number in [0, 1] or auto or val; each value once\n"
