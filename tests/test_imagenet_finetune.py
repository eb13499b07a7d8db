"""Fine-tuning in bench.imagenet: data sets as they are published, weights to start from, the paper's settings."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from imagenet_images import FLAGS, checkpoint, pil, rows, write_tree
from torch import nn

from bench.imagenet import __main__ as imagenet
from bench.imagenet import datasets, finetune

np = pytest.importorskip("numpy")
savemat = pytest.importorskip("scipy.io").savemat
SIZE = 24


def picture(path, grey):
    """A JPEG file all of one grey, which tells whose label it has; not square."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pil.new("RGB", (41, 30), (grey,) * 3).save(path)


def write_flowers(root, monkeypatch):
    vision = pytest.importorskip("torchvision").datasets.Flowers102
    labels = [5, 102, 1, 33]  # of the images 1 to 4, counted from 1
    for number, label in enumerate(labels, 1):
        picture(root / "flowers-102" / "jpg" / f"image_{number:05d}.jpg", 2 * label)
    savemat(root / "flowers-102" / "imagelabels.mat", {"labels": [labels]})
    savemat(root / "flowers-102" / "setid.mat", {"trnid": [[2, 3]], "valid": [[1, 4]], "tstid": [[4, 2]]})
    for name, file in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        digest = hashlib.md5((root / "flowers-102" / file).read_bytes()).hexdigest()
        monkeypatch.setitem(vision._file_dict, name, (file, digest))
    return [101, 0, 4, 32], [32, 101]


def write_cars(root, monkeypatch):
    base = root / "stanford_cars"
    names = [[f"car {number}" for number in range(196)]]
    kinds = [("fname", "O"), ("class", "i4")]
    for part, file, labels in (
        ("cars_train", "devkit/cars_train_annos.mat", [196, 3]),
        ("cars_test", "cars_test_annos_withlabels.mat", [7, 1, 2]),
    ):
        for number, label in enumerate(labels):
            picture(base / part / f"{number:05d}.jpg", label)
        (base / file).parent.mkdir(parents=True, exist_ok=True)
        entries = np.array([(f"{number:05d}.jpg", label) for number, label in enumerate(labels)], dtype=kinds)
        savemat(base / file, {"annotations": entries})
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    return [195, 2], [6, 0, 1]


def write_pets(root, monkeypatch):
    base = root / "oxford-iiit-pet"
    for part, labels in (("trainval", [37, 2]), ("test", [1, 4, 9])):
        lines = [f"Some_pet_{part}{i} {label} 1 1" for i, label in enumerate(labels)]
        for line, label in zip(lines, labels, strict=True):
            picture(base / "images" / f"{line.split()[0]}.jpg", 6 * label)
        (base / "annotations").mkdir(exist_ok=True)
        (base / "annotations" / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return [36, 1], [0, 3, 8]


def write_aircraft(root, monkeypatch):
    data = root / "fgvc-aircraft-2013b" / "data"
    for part, labels in (("trainval", [99, 0]), ("test", [5, 6, 7])):
        lines = [f"{part}{i} Model {label} X" for i, label in enumerate(labels)]
        for i, label in enumerate(labels):
            picture(data / "images" / f"{part}{i}.jpg", 2 * label)
        (data / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
    (data / "variants.txt").write_text("".join(f"Model {i} X\n" for i in range(100)))
    return [99, 0], [5, 6, 7]


def write_food(root, monkeypatch):
    base = root / "food-101"
    for part, labels in (("train", [100, 2]), ("test", [0, 1, 50])):
        listed = {f"dish {i:03d}": [] for i in range(101)}
        for label in labels:
            listed[f"dish {label:03d}"].append(f"dish {label:03d}/{part}")
            picture(base / "images" / f"dish {label:03d}" / f"{part}.jpg", 2 * label)
        (base / "meta").mkdir(exist_ok=True)
        (base / "meta" / f"{part}.json").write_text(json.dumps(listed))
    return sorted([100, 2]), [0, 1, 50]


WRITERS = {
    "fgvc-aircraft": (write_aircraft, 2, 0),
    "flowers": (write_flowers, 2, 2),
    "food101": (write_food, 2, 0),
    "oxford-iiit-pets": (write_pets, 6, 6),
    "stanford-cars": (write_cars, 1, 1),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_data_set_is_read_as_it_is_published(name, tmp_path, monkeypatch):
    write, times, plus = WRITERS[name]
    expected = write(tmp_path, monkeypatch)
    train, test, classes = datasets.read(name, tmp_path, SIZE, datasets.usual_augmentation(name))
    assert classes == datasets.SOURCES[name].classes
    for part, labels in ((train, expected[0]), (test, expected[1])):
        assert [int(part[i][1]) for i in range(len(part))] == labels
        for i, label in enumerate(labels):
            image = part[i][0]
            assert (image.dtype, image.shape) == (torch.uint8, (3, SIZE, SIZE))
            assert (image.int() - (times * label + plus)).abs().max() <= 2  # the file of this label
    assert not (set(WRITERS) ^ set(datasets.SOURCES)) - {"cifar10", "cifar100"}
    with pytest.raises(FileNotFoundError, match=f"No {name} in .*nowhere as torchvision's"):
        datasets.read(name, tmp_path / "nowhere", SIZE, "none")


def test_small_images_are_resized_as_a_whole_and_cifar_has_its_policy():
    from torchvision.transforms import v2

    usual = [datasets.usual_augmentation(name) for name in ("folders", "cifar100", "flowers")]
    assert usual == ["none", "autoaugment", "none"]
    assert datasets.usual_augmentation("folders", finetune=False) == "crop"
    image = pil.new("RGB", (32, 32))
    image.paste((255, 255, 255), (0, 0, 1, 32))  # a white edge, which a central crop would cut off
    for small in (True, False):
        made = datasets.augmentation(v2, 64, "none", small)(image)
        assert made.shape == (3, 64, 64)
        assert bool(made[:, :, 0].max() > 100) == small
    torch.manual_seed(3)
    changed = datasets.augmentation(v2, 64, "autoaugment", True)
    assert len({changed(image).float().mean().item() for _ in range(6)}) > 3


def test_efficientnet_l2_is_as_large_as_published():
    from torchvision import models

    with torch.device("meta"):
        model = finetune.efficientnet_l2(models, 1000)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
        480.3, abs=0.05
    )  # as timm's card of it says


def net(classes):
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, classes))


def test_only_a_last_layer_of_other_classes_stays_random(tmp_path):
    given = net(5).state_dict()
    torch.save({"model": given, "epoch": 3}, tmp_path / "checkpoint.pt")  # as bench.imagenet leaves it
    weights = finetune.weights_of(None, "resnet18", str(tmp_path / "checkpoint.pt"))
    for classes in (5, 7):
        model = net(classes)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        finetune.start(model, weights)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name] if name.startswith("2.") and classes == 7 else given[name]), name
    del weights["0.weight"]
    with pytest.raises(ValueError, match=r"Invalid weights: 0\.weight differs\. Must be those of this model\."):
        finetune.start(net(5), weights)
    with pytest.raises(ValueError, match="for efficientnet_l2"):
        finetune.weights_of(None, "efficientnet_l2", "torchvision")


def test_a_run_starts_from_weights_and_leaves_frozen_statistics_alone(tmp_path):
    from torchvision import models

    tree = write_tree(tmp_path / "tree")
    given = models.shufflenet_v2_x0_5(num_classes=5).state_dict()
    torch.save(given, tmp_path / "weights.pt")
    flags = ["--model", "shufflenet_v2_x0_5", "--optimizer", "sgd", "--epochs", "3", "--lr", "1e-12"]
    flags += ["--weights", str(tmp_path / "weights.pt"), "--freeze-batchnorm", "--evaluate-every", "2"]
    assert imagenet.main(["--data-dir", str(tree), *FLAGS, *flags, "--out", str(tmp_path / "out")]) == 0
    for name, value in checkpoint(tmp_path / "out")["model"].items():
        if not name.startswith("fc."):
            torch.testing.assert_close(value, given[name], rtol=0, atol=1e-8)
    (row,) = rows(tmp_path / "out")
    assert [point["epoch"] for point in row["history"]] == [2, 3]


def test_the_papers_settings_are_defaults(monkeypatch):
    def parsed(*flags):
        return vars(imagenet.parse_args(["--synthetic", "--finetune", *flags]))

    shared = {"weight_decay": 1e-5, "nesterov": True, "freeze_batchnorm": True, "label_smoothing": 0.0, "epochs": None}
    assert shared.items() <= parsed("--model", "efficientnet_b7").items()
    small = parsed("--model", "efficientnet_b7", "--lr", "0.5")
    assert (small["image_size"], small["batch_size"], small["lr"], small["micro_batches"]) == (600, 1024, 0.5, 64)
    assert (small["m_sharpness"], small["rho"], small["max_grad_norm"]) == ("micro", 0.05, 5.0)
    monkeypatch.setenv("WORLD_SIZE", "8")
    large = parsed("--model", "efficientnet_l2", "--optimizer", "sgd")
    assert (large["image_size"], large["batch_size"], large["lr"], large["micro_batches"]) == (475, 512, 0.008, 16)
    assert (large["finetuning_steps"], large["max_grad_norm"], large["rho"]) == (10_000, 5.0, 0.05)
    assert parsed("--model", "vit_b_16")["image_size"] == 224
