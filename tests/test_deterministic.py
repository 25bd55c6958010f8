"""--deterministic: the same command twice gives the same bits; a result says what it takes to repeat it."""

from __future__ import annotations

import os

import pytest
import torch

import compare
import main_stage1
import main_stage2
from utils import checkpoints, system

QUICK = "--dataset digits --network resnet8 --epochs 2 --seed 3 --device cpu --aug randaugment --mixup 0.2".split()
STAGES = {
    "stage1": (main_stage1.main, QUICK),
    "stage2": (main_stage2.main, "--dataset digits --finetune_epoch 2 --seed 3 --device cpu --method los ldam".split()),
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    system.make_deterministic(False)


@pytest.mark.parametrize("flags", [["--deterministic"], []])
def test_the_same_command_twice_gives_the_same_bits(workdir, capsys, flags: list[str]) -> None:
    """Also without the flag, on a CPU."""
    states: dict[str, list] = {stage: [] for stage in STAGES}
    for turn in range(2):
        for stage, (main, argv) in STAGES.items():
            fresh = ["--cache_dir", f"cache{turn}"] if stage == "stage2" else []
            main([*argv, *fresh, *flags])
            said = capsys.readouterr().out
            assert ("deterministic: the same bits" in said) == bool(flags)
            [file] = [checkpoints.read(path) for path in (workdir / "checkpoints").glob(f"*{stage}*.pt")]
            states[stage].append(file.model)
            assert file.provenance["deterministic"] == torch.are_deterministic_algorithms_enabled() == bool(flags)
            if flags:
                assert file.provenance["environment"]["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    for first, second in states.values():
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_it_sets_all_there_is_to_set_and_takes_it_back(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)

    def settings() -> tuple[bool, ...]:
        fill = torch.utils.deterministic.fill_uninitialized_memory
        return (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic, fill)

    system.pick_device("cpu", deterministic=True)
    assert settings() == (True, True, True) and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    system.pick_device("cpu")
    assert settings() == (False, False, False)
    for device, words in (("cpu", "7 % slower"), ("cuda", "not measured")):
        line = system.deterministic_words(torch.device(device))
        assert words in line and "\n" not in line and "another machine" in line


def test_a_result_says_what_it_takes_to_repeat_it(monkeypatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("SOMETHING_ELSE", "1")
    made = system.provenance("x.py", [], torch.device("cpu"), 1.0)
    assert made["environment"]["ATEN_CPU_CAPABILITY"] == "avx2" and "SOMETHING_ELSE" not in made["environment"]
    assert made["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert made["cpu"]["model"] or not os.path.exists("/proc/cpuinfo")
    assert made["threads"] == torch.get_num_threads() and made["deterministic"] is False
    assert set(made["versions"]) == {"python", "torch", "torchvision", "numpy", "cuda", "cudnn"}
    assert compare.Options().deterministic is False
