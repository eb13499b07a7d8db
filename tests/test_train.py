"""bench.training.fashion_mnist: reading the data, and a tiny job from start to table."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision_ops

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from bench.paper.training import Training
from bench.training import data
from bench.training import fashion_mnist as train

BY_TORCHVISION = data.by_torchvision
TINY = ["--train-size", "214", "--batch-size", "64", "--epochs", "2", "--width", "1", "--threads", "1"]


def idx(array: torch.Tensor, kind: int = 8) -> bytes:
    header = bytes([0, 0, kind, array.dim()]) + struct.pack(f">{array.dim()}I", *array.shape)
    return header + array.to(torch.uint8).numpy().tobytes()


def write_set(folder: Path, *, compressed: bool = True, count: int = 6) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in data.FILES:
        shape = (count, 28, 28) if "images" in name else (count,)
        content = idx(torch.arange(torch.Size(shape).numel()).reshape(shape) % 10)
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """Neither Debian's package nor an earlier download nor a network."""
    monkeypatch.setattr(data, "DEBIAN_DIR", tmp_path / "debian")
    monkeypatch.setattr(data, "CACHE_DIR", tmp_path / "cache")
    monkeypatch.setattr(data, "TORCHVISION_DIR", tmp_path / "torchvision")

    def unreachable(folder: Path, **options: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(data, "download", unreachable)
    monkeypatch.setattr(data, "by_torchvision", unreachable)
    return tmp_path


# idx files


GOOD = gzip.compress(idx(torch.arange(2000) % 251))
BROKEN = {
    b"": "Must begin with '000008'",
    b"\x7fELF" + bytes(20): "begins with '7f454c46'",
    idx(torch.zeros(4), kind=13): "begins with '00000d01'",
    idx(torch.zeros(4))[:-1]: r"11 bytes. Must be 12 for shape=\[4\]",
    gzip.compress(idx(torch.zeros(4)) + b"\x00"): r"13 bytes. Must be 12 for shape=\[4\]",
    GOOD[: len(GOOD) // 2]: "damaged gzip data",
    GOOD[:-6] + b"\xff" + GOOD[-5:]: "damaged gzip data",
}


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_idx_files_that_are_damaged_are_named(tmp_path, content):
    path = tmp_path / ("three.gz" if content[:1] == GOOD[:1] else "three")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=BROKEN[content]) as error:
        data.read_idx(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-images-idx3-ubyte", torch.zeros(6, 20, 28), r"shape \[6, 20, 28\] in .* Must be \[N, 28, 28\]"),
        ("train-labels-idx1-ubyte", torch.zeros(5), r"shape \[5\].*Must be \[6\]"),
        ("t10k-labels-idx1-ubyte", torch.full((6,), 10), "Invalid label 10"),
    ],
)
def test_load_folder_refuses(tmp_path, name, array, message):
    (write_set(tmp_path) / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    with pytest.raises(ValueError, match=message):
        data.load_folder(tmp_path)


# where the data comes from


def test_sources_in_their_order(nowhere):
    said: list[str] = []
    assert data.load(say=said.append).name == "digits"
    assert "scikit-learn's digits" in said[-1]
    assert "no route to host" in said[-1]

    kept_by_torchvision = data.TORCHVISION_DIR / data.KEPT
    for folder in (kept_by_torchvision, data.CACHE_DIR, data.DEBIAN_DIR, nowhere / "own"):
        write_set(folder, compressed=folder != data.DEBIAN_DIR)
        found = data.load(folder if folder.name == "own" else None)
        assert found.source == str(folder)
        assert torch.equal(found.train.images.flatten(), (torch.arange(6 * 28 * 28) % 10).byte())
    (nowhere / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"No train-images-idx3-ubyte\.gz or train-images-idx3-ubyte in"):
        data.load(nowhere / "empty")  # never replaced by another


@pytest.mark.skipif(torchvision_ops.import_or_reason() is not None, reason="no torchvision")
def test_torchvision_downloads_where_it_is_there(nowhere, monkeypatch):
    from torchvision.datasets import FashionMNIST

    folder = write_set(nowhere / "server", compressed=True)
    sums = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in folder.iterdir()]
    monkeypatch.setattr(data, "by_torchvision", BY_TORCHVISION)
    monkeypatch.setattr(FashionMNIST, "resources", sums)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        found = data.load()
        server.shutdown()
    assert (found.name, found.source, found.flip) == ("Fashion-MNIST", str(data.TORCHVISION_DIR), True)
    again = data.load(data.TORCHVISION_DIR)  # by our own reader, as where there is no torchvision
    for ours, theirs in ((again.train, found.train), (again.test, found.test)):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs))
    assert found.train.images.shape == (6, 28, 28)


def test_download(monkeypatch, tmp_path):
    served = {p.name: p.read_bytes() for p in write_set(tmp_path / "server").iterdir()}
    checksums = {name: hashlib.sha256(served[f"{name}.gz"]).hexdigest() for name in data.FILES}
    monkeypatch.setattr(data, "FILES", checksums)
    asked = []

    def opener(url: str, timeout: float) -> contextlib.AbstractContextManager[io.BytesIO]:
        asked.append(url)
        assert timeout <= 30
        return contextlib.closing(io.BytesIO(served[url.rpartition("/")[2]]))

    data.download(tmp_path / "cache", opener)
    assert [url.startswith("https://") for url in asked] == [True] * 4
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == sorted(served)
    data.download(tmp_path / "cache", opener)
    assert len(asked) == 4

    served = dict.fromkeys(served, b"a login page")
    with pytest.raises(ValueError, match=r"Invalid download of train-images-idx3-ubyte.gz: sha256 is "):
        data.download(tmp_path / "other", opener)
    assert list((tmp_path / "other").iterdir()) == []


# batches


def test_batches_shift_and_flip():
    train_set = data.Images(torch.randint(1, 256, (10, 28, 28), dtype=torch.uint8), torch.arange(10))
    batches = data.Batches(train_set, 4, shift=2, flip=True, seed=1, device=torch.device("cpu"))
    variants = set()
    for images, labels in batches.epoch(0):
        for image, label in zip(images, labels):
            pixels = ((image * batches.std + batches.mean)[0] * 255).round().to(torch.uint8)
            padded = torch.nn.functional.pad(train_set.images[label], (2,) * 4)
            found = [
                (top, left, mirrored)
                for top, left, mirrored in itertools.product(range(5), range(5), (False, True))
                for window in [padded[top : top + 28, left : left + 28]]
                if torch.equal(window.flip(1) if mirrored else window, pixels)
            ]
            assert len(found) == 1
            variants.add(found[0])
    assert len(variants) > 4
    first, again, second = (torch.cat([x for x, _ in batches.epoch(e)]) for e in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


# whole jobs


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def without_times(rows: list[dict]) -> list[dict]:
    timed = ("date", "seconds", "step_ms", "optimizer_ms")
    rows = [row | {"history": [point | {"seconds": 0} for point in row["history"]]} for row in rows]
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def test_job_ends_with_table_picture_and_rows(nowhere, capsys):
    out = nowhere / "out"
    assert train.main([*TINY, "--seeds", "0", "1", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "using scikit-learn's digits" in shown.lower()
    assert "SGD 4 epochs x 3 steps x 1 pass = SAM 2 epochs x 3 steps x 2 passes" in shown
    assert shown.count(" left\n") == 8  # at each measurement, where the output is no terminal
    assert shown.count("±") >= 4
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    sgd, sam, *others = rows_of(out)
    assert [(r["optimizer"], r["seed"]) for r in (sgd, sam, *others)] == [
        (k, s) for s in (0, 1) for k in ("sgd", "sam")
    ]
    assert sam["rho"] == 0.1
    for row in (sgd, sam):
        assert row["kind"] == "train"
        assert row["job"] == "digits-noise40"
        assert row["test_error_final"] == row["history"][-1]["test_error"]
        best = min(row["history"], key=lambda point: (point["held_out_error"], point["epoch"]))
        assert (row["test_error_best"], row["best_epoch"]) == (best["test_error"], best["epoch"])
        for name, images in (("test_error", 359), ("held_out_error", 21)):
            wrong = best[name] / 100 * images
            assert wrong == pytest.approx(round(wrong), abs=1e-6)
        assert 0 < row["optimizer_ms"] < row["step_ms"]
    assert [p["passes"] for p in sgd["history"]] == [p["passes"] for p in sam["history"]] == [2, 4]


@pytest.mark.parametrize(("measured", "more"), [(2, []), (6, ["--resume"])], ids=["in SGD", "in SAM"])
def test_an_interrupted_job_goes_on_to_what_an_uninterrupted_one_gives(nowhere, monkeypatch, capsys, measured, more):
    flags = [*TINY, "--no-plot", "--out"]
    assert train.main([*flags, str(nowhere / "whole")]) == 0

    calls = []

    def interrupted(*args: object) -> tuple[float, float]:
        if len(calls) == measured:
            raise KeyboardInterrupt
        calls.append(args)
        return evaluate(*args)

    evaluate = Training.evaluate
    monkeypatch.setattr(Training, "evaluate", interrupted)
    assert train.main([*flags, str(nowhere / "halved")]) == 130
    monkeypatch.setattr(Training, "evaluate", evaluate)
    capsys.readouterr()
    assert train.main([*flags, str(nowhere / "halved"), *more]) == 0
    assert ("Going on" in capsys.readouterr().out) == (not more)
    assert without_times(rows_of(nowhere / "halved")) == without_times(rows_of(nowhere / "whole"))


def test_resume_refuses_other_values_and_missing_checkpoints(nowhere, capsys):
    flags = [*TINY, "--no-plot", "--optimizer", "sgd", "--out", str(nowhere / "out")]
    assert train.main([*flags, "--resume"]) == 1
    assert "No checkpoint to resume from" in capsys.readouterr().out
    assert train.main(flags) == 0
    assert train.main([*flags, "--resume", "--lr", "0.2"]) == 1
    assert "Invalid lr=0.2. Must be 0.1 as in" in capsys.readouterr().out
    assert train.main([*flags, "--seeds", "1"]) == 0  # another job, not begun
    assert "Going on" not in capsys.readouterr().out
    assert [row["seed"] for row in rows_of(nowhere / "out")] == [0, 1]


def test_non_finite_loss_stops_the_job(nowhere, capsys):
    flags = [*TINY, "--no-plot", "--optimizer", "sgd", "--lr", "1e30", "--out", str(nowhere / "out")]
    assert train.main(flags) == 1
    shown = capsys.readouterr().out
    assert "Training stopped: loss is" in shown
    assert "SGD, seed 0: Training stopped" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "Invalid epochs=0. Must be >= 1."),
        (["--shift", "-1"], "Invalid shift=-1. Must be >= 0."),
        (["--label-noise", "1"], "Invalid label_noise=1.0. Must be in [0, 1)."),
        (["--backend", "none"], "Invalid backend='none'"),
        (["--record"], "Must be Fashion-MNIST"),
        (["--batch-size", "500"], "Must be <= 193, the images that are not held out"),
        (["--data-dir", "nowhere"], "No train-images-idx3-ubyte.gz or train-images-idx3-ubyte in nowhere"),
    ],
)
def test_job_refuses(nowhere, capsys, flags, message):
    try:
        status = train.main([*TINY, *flags])
    except SystemExit as stop:  # flags that cannot be read
        status = stop.code
    shown = capsys.readouterr()
    assert status == (2 if shown.err else 1)
    assert message in shown.out + shown.err
