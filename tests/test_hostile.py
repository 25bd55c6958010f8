"""Files made to take memory or time, or to act as what they are not: each kind is refused before it costs anything."""

from __future__ import annotations

import io
import json
import pickle
import struct
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_imagenet_lt
from PIL import Image
from test_own import make_folder

import evaluate
import main_stage1
import predict
from benchmarks.fuzz import _checkpoint
from datasets import files, prepare
from datasets.files import decode, image_size, is_deep, read_image
from experiment.options import DataOptions, data_name
from models import foreign, sketch
from utils.checkpoints import checksum, read
from utils.errors import UsageError
from utils.pickles import MOST_LONG, MOST_STEPS
from utils.readers import MOST_PARTS, Unreadable, parse_tensors, read_arrays, read_sealed, read_table


def archive(content: bytes, name: str = "archive/data.pkl") -> bytes:
    """A file of torch.save with another pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as parts:
        parts.writestr(name, content)
        parts.writestr("archive/version", "3\n")
        parts.writestr("archive/byteorder", "little")
    return file.getvalue()


def codec(name: str) -> bytes:
    """A pickle that asks for a text in another form, again and again."""
    text = b"X" + struct.pack("<I", 4) + b"abcd"
    code = b"X" + struct.pack("<I", len(name.encode())) + name.encode()
    call = b"c_codecs\nencode\n" + text + code + b"\x86R"
    return b"\x80\x02" + call + b"."


def long(number: int) -> bytes:
    content = number.to_bytes(10, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


PICKLES = {
    "memory": b"\x80\x02cbuiltins\nbytearray\nK\x05\x85R.",
    "a codec that doubles": codec("hex"),
    "a codec that doubles, by another name": codec("HEX-codec"),
    "a slow codec": codec("idna"),
    "a codec of a long name": codec("hex" + "!" * 60),
    "a codec of a name with letters that do not count": codec("he\u00e9x"),
    "a codec after very many signs": codec("!" * 20_000 + "hex"),
    "a codec, then a name in pieces": codec("hex")[:-1] + b"\x93.",
    "a codec after steps that do nothing": codec("hex").replace(b"\x86R", b"\x80\x02\x80\x02\x80\x02\x86R"),
    "a key that takes for ever": b"\x80\x02}K\x01K\x02\x86q\x00"
    + b"".join(b"h" + bytes([k]) + b"h" + bytes([k]) + b"\x86q" + bytes([k + 1]) for k in range(40))
    + b"Ns.",
    "steps": b"\x80\x02]" + b"(" + b"N" * (MOST_STEPS + 1) + b"e.",
    "keys that collide": b"\x80\x02}(" + b"".join(long(k * (2**61 - 1)) + b"N" for k in range(MOST_LONG + 2)) + b"u.",
}


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/DATA.PKL", "legacy"])
@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_that_asks_for_too_much_is_not_run(kind: str, name: str, monkeypatch) -> None:
    monkeypatch.setattr(torch, "load", lambda *arguments, **more: pytest.fail("it was run"))
    blob = PICKLES[kind] if name == "legacy" else archive(PICKLES[kind], name)
    began = time.process_time()
    with pytest.raises(Unreadable):
        parse_tensors(blob)
    assert time.process_time() - began < 15


def test_what_torch_saves_is_read(tmp_path: Path) -> None:
    content = {
        "state_dict": {"a": torch.ones(3)},
        "best": np.float64(0.5),
        "epoch": 2**40,
        "x": [1, None, (1, (2, "a")), -1],
    }
    for modern in (True, False):
        torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=modern)
        found = parse_tensors((tmp_path / "x.pt").read_bytes())
        assert torch.equal(found["state_dict"]["a"], torch.ones(3)) and found["epoch"] == 2**40


def test_a_tensor_of_memory_that_the_file_does_not_have_is_refused() -> None:
    rows = b"ctorch\nTensor\nJ\x00\x00\x10\x00K\x40\x86R"
    with pytest.raises(Unreadable):
        parse_tensors(archive(b"\x80\x02}X\x01\x00\x00\x00a" + rows + b"s."))


def test_names_of_an_archive_s_parts_are_compared_as_torch_does() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as parts:
        parts.writestr("archive/data.pkl", pickle.dumps(1, 2))
        parts.writestr("archive/DATA.pkl", pickle.dumps(2, 2))
    with pytest.raises(Unreadable, match="one name"):
        parse_tensors(file.getvalue())


def test_an_archive_of_very_many_parts_is_refused() -> None:
    began = time.process_time()
    with pytest.raises(Unreadable, match="parts"):
        parse_tensors(b"PK\x03\x04" + b"PK\x01\x02" * (MOST_PARTS + 1))
    assert time.process_time() - began < 2


def test_a_head_of_very_many_tensors_is_refused() -> None:
    head = json.dumps({f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(MOST_PARTS + 1)})
    with pytest.raises(Unreadable, match="head"):
        parse_tensors(len(head).to_bytes(8, "little") + head.encode())


@pytest.mark.parametrize("case", ["long names", "shared"])
def test_paths_within_a_file_are_bounded(case: str, tmp_path: Path) -> None:
    content: object = {"x" * 10**6: [0.0] * 3000} if case == "long names" else [1]
    for _ in range(0 if case == "long names" else 22):
        content = {"a": content, "b": content}
    torch.save({"state_dict": content}, tmp_path / "x.pt")
    began = time.process_time()
    with pytest.raises(Unreadable, match="without end"):
        parse_tensors((tmp_path / "x.pt").read_bytes())
    assert time.process_time() - began < 5


def test_long_names_are_cut_in_messages() -> None:
    assert len(str(foreign._no_place(["x" * 10**6], "a.pt"))) < 500


def test_a_network_of_no_classes_is_none(workdir: Path) -> None:
    model = _checkpoint().model
    model |= {"fc.weight": model["fc.weight"][:0], "fc.bias": model["fc.bias"][:0]}
    torch.save(model, "x.pt")
    Image.new("L", (8, 8)).save("a.png")
    with pytest.raises(SystemExit) as ended:
        predict.main(["a.png", "--from", "x.pt", "--dataset", "digits"])
    assert ended.value.code == 2


def test_a_stored_timm_name_takes_no_memory_for_its_network() -> None:
    pytest.importorskip("timm")
    assert next(sketch("timm:vit_giant_patch14_clip_224", 10).parameters()).device.type == "meta"


PLAIN = {
    **{"a tensor": torch.ones(2), "a set": {1}, "bytes": b"x", "a complex number": 1j},
    **{"a key of two": {(1, 2): 3}, "keys of two kinds": {"seed": {1: 2, "a": 3}}},
}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("field", ["options", "data", "metrics", "provenance"])
def test_our_own_files_hold_plain_values(kind: str, field: str, tmp_path: Path) -> None:
    """Else the checksum could not cover them, nor what stands beside them."""
    _checkpoint().save(tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    content[field]["seed"] = PLAIN[kind]
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UsageError, match=r"plain value|pickled|damaged"):
        read(tmp_path / "x.pt")


@pytest.mark.parametrize("value", ["4", 4.0, None, [4]])
def test_a_format_that_is_no_number_makes_no_file_another_program_s(value: object, tmp_path: Path) -> None:
    _checkpoint().save(tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    content["format"] = value
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="of format"):
        read(tmp_path / "x.pt")


def test_a_checksum_covers_all_that_is_plain() -> None:
    content = vars(_checkpoint()) | {"format": 4}
    before = checksum(content)
    assert before != checksum(content | {"metrics": {**content["metrics"], "temperature": 50.0}})


def test_an_empty_file_of_proc_is_not_waited_for(workdir: Path) -> None:
    if not Path("/proc/kmsg").exists():
        pytest.skip("no /proc/kmsg here")
    began = time.monotonic()
    assert image_size("/proc/kmsg") is None and not is_deep("/proc/kmsg")
    assert not evaluate.is_replaced({"path": "/proc/kmsg", "sha256": "x"})
    Path("a.csv").write_text("path,label,split\n/proc/kmsg,0,train\n")
    with pytest.raises(SystemExit):
        main_stage1.main(["--dataset", "csv", "--data_dir", "a.csv"])
    assert time.monotonic() - began < 10


def test_no_memory_is_not_a_damaged_image(workdir: Path, monkeypatch) -> None:
    make_folder(Path("pets"))

    def full(content: bytes, strict: bool = True) -> None:
        raise MemoryError

    monkeypatch.setattr(files, "_from_pil", full)
    with pytest.raises(SystemExit) as ended:
        main_stage1.main(["--dataset", "folder", "--data_dir", "pets", "--skip_damaged", "--workers", "0"])
    assert ended.value.code == 1 and not list(Path("cache").rglob("damaged.csv"))


def test_large_images_are_decoded_as_memory_has_room(monkeypatch) -> None:
    monkeypatch.setattr(files, "free_memory", lambda device: 100 * files.PIXEL_BYTES)
    room, events = files._InFlight(), []

    def one(number: int) -> None:
        with room.decoding(60):
            events.append(("in", number))
            time.sleep(0.05)
            events.append(("out", number))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert [what for what, _ in events] == ["in", "out"] * 3
    with room.decoding(10**9):  # alone, even the largest
        pass


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", progressive=True)
    assert decode(file.getvalue(), "a.jpg").shape == (3, 16, 16)
    content = file.getvalue()
    scan = content[content.index(b"\xff\xda") : content.rindex(b"\xff\xd9")]
    with pytest.raises(UsageError, match="scans"):
        decode(content[:-2] + scan * 100 + b"\xff\xd9", "a.jpg")


@pytest.mark.parametrize("kind", ["QOI", "DDS", "BLP"])
def test_formats_that_pillow_decodes_in_python_are_not_read(kind: str, tmp_path: Path) -> None:
    assert kind not in files.formats()
    if kind == "DDS":
        Image.new("RGB", (8, 8)).save(tmp_path / "x.dds")
        with pytest.raises(UsageError):
            read_image(tmp_path / "x.dds")


TABLES = {
    "columns": b"path,label," + b"a," * 5000 + b"split\n",
    "a long first line": b"path,label,split" + b"x" * 10**6 + b"\n",
    "a name twice": b"path,label,split,label\na,b,c,d\n",
    "a long cell": b"path,label,split\na," + "e\u0301".encode() * 20_000 + b",train\n",
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_are_bounded(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(TABLES[kind])
    began = time.process_time()
    with pytest.raises(Unreadable) as refused:
        read_table(tmp_path / "a.csv")
    assert len(str(refused.value)) < 300 and time.process_time() - began < 3


def test_two_arrays_of_one_name_are_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as parts:
        parts.writestr("a.npy", file.getvalue())
        parts.writestr("a", file.getvalue())
    with pytest.raises(Unreadable, match="one name"):
        read_arrays(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["a\nb", "esc\x1b[31m", "x" * 205, "é" * 110, "a\u2028b"])
def test_a_folder_of_any_name_is_trained_and_found_again(name: str, workdir: Path) -> None:
    make_folder(Path(name))
    quick = ["--network", "resnet8", "--epochs", "1", "--seed", "0", "--workers", "0"]
    trained = main_stage1.main(["--dataset", "folder", "--data_dir", name, *quick])
    again = evaluate.main(["--dataset", "folder", "--data_dir", name, "--workers", "0"])
    assert again["top1"] == trained["top1"]


def test_names_of_data_differ_where_folders_do() -> None:
    names = ["x" * 200, "x" * 201, "a\nb", "a_b", "a\tb"]
    assert len({data_name(DataOptions(dataset="folder", data_dir=f"/{name}")) for name in names}) == len(names)


@pytest.mark.parametrize(
    "name", ["train_features.npy", "val_labels.npy", "train_256.npy", "manifest.npz", "damaged.csv"]
)
def test_prepare_replaces_and_removes_its_own_files_alone(name: str, workdir: Path, monkeypatch) -> None:
    make_imagenet_lt(workdir / "root")
    home = Path("data/imagenet_lt")
    home.mkdir(parents=True, exist_ok=True)
    (home / name).write_bytes(b"the user's own")
    run = ["imagenet_lt", "--root", "root", "--any_counts"]
    if name in ("manifest.npz", "damaged.csv"):
        with pytest.raises(SystemExit) as ended:
            prepare.main(run)
        assert ended.value.code == 2
    else:
        prepare.main(run)
    assert (home / name).read_bytes() == b"the user's own"


@pytest.mark.parametrize("content", ['{"result": 5}', '{"result": {}}', "damaged", "sealed"])
def test_what_a_finished_run_says_is_checked(content: str, workdir: Path, capsys) -> None:
    quick = ["--dataset", "digits", "--epochs", "1", "--seed", "0", "--wd", "0", "5e-4"]
    main_stage1.main(quick)
    (sweep,) = Path("output").glob("*/*")
    (sweep / "finished.json").unlink()
    child = next(path for path in sweep.iterdir() if path.is_dir()) / "finished.json"
    before = read_sealed(child)
    if content == "sealed":
        child.write_text(child.read_text().replace('"top1": 0.', '"top1": 0.9', 1))
    else:
        child.write_text(content)
    main_stage1.main(["--resume", str(sweep)])  # made anew
    assert read_sealed(child)["result"]["selection"]["test"] == before["result"]["selection"]["test"]


def test_a_run_s_options_name_its_seeds(workdir: Path) -> None:
    main_stage1.main(["--dataset", "digits", "--epochs", "1", "--seed", "0"])
    (run,) = Path("output").glob("*/*")
    begun = json.loads((run / "options.json").read_text())
    (run / "options.json").write_text(json.dumps(begun | {"seed": []}))
    with pytest.raises(SystemExit) as ended:
        main_stage1.main(["--resume", str(run)])
    assert ended.value.code == 2
    main_stage1.main(["--dataset", "digits", "--epochs", "1", "--seed", "0", "--resume", "auto"])
