# SPDX-License-Identifier: MIT
"""Every test: the maths against independent references, the command lines by running them.

    python -m pytest

runs offline on the CPU on drawn data and random weights. With GAUSSAD_DATA (an MVTec AD root with
screw in it) and GAUSSAD_WEIGHTS (a state dict of mobilenet_v2) it also runs on the real thing."""

import base64
import csv
import hashlib
import io
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from unicodedata import normalize as unicode_form

os.environ["OMP_NUM_THREADS"] = "1"  # networks here are too small to gain by more threads

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models
from torchvision.transforms.functional import normalize

import evaluate
import gaussad
import train
from gaussad import AugmentationValidator, FeatureExtractor, Gaussian, GaussianAD, fine_tune

HERE = Path(__file__).parent
BACKBONE = "mobilenet_v3_small"
TINY = f"--backbone {BACKBONE} --levels 4 9 --weights random --image-size 64 --device cpu".split()

gaussad.FIRST_CHECK = 2  # checks at steps 0, 2, 4, … in place of 0, 32, 64, …: they are faster


@pytest.fixture(autouse=True)
def seeds():
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


def random_images(n, size=32):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))


# ---- The maths ---------------------------------------------------------------------------------


def random_samples(*shape, condition):
    """Samples (..., N, C) whose features have standard deviations from 1 to condition^(-1/2)."""
    rng = np.random.default_rng(0)
    mix, _ = np.linalg.qr(rng.normal(size=(shape[-1], shape[-1])))
    return rng.normal(size=shape) * np.geomspace(1, condition**-0.5, shape[-1]) @ mix


def naive_ledoit_wolf(x):
    """Ledoit and Wolf 2004, section 3.2, term by term with an outer product for each sample."""
    n, c = x.shape
    y = x - x.mean(0)
    s = y.T @ y / n
    target = np.trace(s) / c * np.eye(c)
    d2 = ((s - target) ** 2).sum()
    b2 = min(d2, sum(((np.outer(row, row) - s) ** 2).sum() for row in y) / n**2)
    return b2 / d2 * target + (1 - b2 / d2) * s, b2 / d2


def naive_distance(x, covariance):
    """The Mahalanobis distance of samples (..., N, C) to their mean."""
    y = x - x.mean(-2, keepdims=True)
    return np.sqrt(np.einsum("...ni,...ij,...nj->...n", y, np.linalg.inv(covariance), y))


@pytest.mark.parametrize("n, c, condition", [(12, 40, 1), (40, 40, 1e8), (999, 15, 1e8), (6, 2, 1)])
def test_ledoit_wolf_equals_the_paper_and_scikit_learn(n, c, condition):
    x = random_samples(n, c, condition=condition)
    found = [gaussad.ledoit_wolf(torch.tensor(x + offset)) for offset in (0, 1e4)]
    expected = naive_ledoit_wolf(x)
    for _ in range(2):
        for (covariance, shrinkage), tolerance in zip(found, (1e-10, 1e-9)):
            assert relative(covariance, expected[0]) < tolerance
            assert abs(shrinkage.item() - expected[1]) < tolerance
        expected = pytest.importorskip("sklearn.covariance").ledoit_wolf(x)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("ridge", [0, 0.1])
@pytest.mark.parametrize("covariance", ["full", "diagonal", "identity"])
def test_distance_is_mahalanobis_and_its_gradient_zero_at_the_mean(covariance, ridge, scale):
    x = scale * random_samples(2, 20, 50, 8, condition=1e4)  # 40 Gaussians, fitted 32 at a time
    x[..., 2] = 7 * scale  # a feature that does not vary
    sigmas = [naive_ledoit_wolf(y)[0] + scale**2 * ridge * np.eye(8) for y in x.reshape(40, 50, 8)]
    if covariance != "full":
        sigmas = [np.diag(np.diag(s)) if covariance == "diagonal" else np.eye(8) for s in sigmas]
    gaussian = Gaussian.fit(torch.tensor(x), scale**2 * ridge, covariance)
    found = gaussian.distance(torch.tensor(x).movedim(2, 0)).movedim(0, 2)
    assert relative(found, naive_distance(x, np.reshape(sigmas, (2, 20, 8, 8)))) < 1e-9
    at_mean = gaussian.mean.clone()[None].requires_grad_()
    gaussian.distance(at_mean).sum().backward()
    assert not gaussian.distance(at_mean).any() and not at_mean.grad.any()


def test_auroc_counts_pairs_with_ties_as_half_and_equals_scikit_learn():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 9, 60) / 7, rng.random(60) < 0.3
    pairs = scores[labels][:, None] - scores[~labels]
    expected = ((pairs > 0) + (pairs == 0) / 2).mean()
    assert abs(gaussad.auroc(scores.tolist(), labels.tolist()) - expected) < 1e-12
    scores, labels = rng.integers(0, 500, 10**6), rng.random(10**6) < 0.3
    expected = pytest.importorskip("sklearn.metrics").roc_auc_score(labels, scores)
    assert abs(gaussad.auroc(scores, torch.tensor(labels)) - expected) < 1e-12


def naive_aupro(maps, masks, limit):
    """Every score a threshold, one after the other; trapezoids, the last one cut at the limit."""
    label = pytest.importorskip("scipy.ndimage").label
    numbered = [label(mask, np.ones((3, 3)))[0] for mask in masks]
    regions = [(i, x == k) for i, x in enumerate(numbered) for k in range(1, x.max() + 1)]
    area, x0, y0 = 0.0, 0.0, 0.0
    for threshold in np.unique(maps)[::-1]:
        detected = maps >= threshold
        x = detected[masks == 0].mean()
        y = np.mean([detected[i][region].mean() for i, region in regions])
        if x >= limit:
            y = y0 + (y - y0) * (limit - x0) / (x - x0)
            return (area + (limit - x0) * (y0 + y) / 2) / limit
        area, x0, y0 = area + (x - x0) * (y0 + y) / 2, x, y


@pytest.mark.parametrize("distinct", [1, 5, 10**6])  # of normal scores
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_equals_brute_force(distinct, limit):
    rng = np.random.default_rng(0)
    masks = np.zeros((5, 11, 13), bool)
    masks[0, :5, :5] = masks[0, 5:8, 5:9] = True  # they touch by a corner
    masks[1, 4, 4:8:2] = masks[1, 0, 12] = masks[2] = True  # dots; all of a mask
    masks[3] = rng.random((11, 13)) < 0.3
    masks[4, ::2] = masks[4, 1::4, -1] = masks[4, 3::4, 0] = True  # one long serpentine
    maps = (rng.integers(0, distinct, masks.shape) / distinct + 0.3 * masks).clip(max=0.7)
    expected = naive_aupro(maps, masks, limit)
    assert gaussad.aupro(maps, masks, limit) == pytest.approx(expected, abs=1e-9)
    monotone = torch.tensor(maps).exp().where(torch.tensor(maps < 0.7), torch.inf)
    assert gaussad.aupro(monotone, torch.tensor(masks), limit) == pytest.approx(expected, abs=1e-9)


def test_tail_quantile_keeps_the_false_alarm_rate_of_few_and_of_many():
    rng = np.random.default_rng(0)
    future = rng.gamma(20, size=10**4)
    for n, tolerance in ((6, 0.02), (64, 0.01), (2000, 0.003)):
        found = [gaussad.tail_quantile(torch.tensor(x), 0.95) for x in rng.gamma(20, size=(400, n))]
        assert (future[:, None] > found).mean() == pytest.approx(0.05, abs=tolerance)
    few = [gaussad.tail_quantile(torch.tensor(x), 0.95) for x in rng.exponential(size=(9000, 16))]
    assert np.exp(-np.array(few)).mean() == pytest.approx(0.05, abs=0.002)  # exact for its model
    assert gaussad.tail_quantile(torch.tensor(future), 0.5) == pytest.approx(np.median(future))


# ---- Networks and weights ----------------------------------------------------------------------

STATISTICS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]}


NETWORKS = [
    ("efficientnet_b0", [5, 6, 7, 8, 9], {3: "features.2", 9: "features.8"}),
    ("mobilenet_v2", [11, 14, 17, 18, 19], {4: "features.3", 11: "features.10"}),
    ("resnet18", [4, 5], {1: "relu", 2: "layer1", 3: "layer2", 5: "layer4"}),
]


@torch.no_grad()
@pytest.mark.parametrize("backbone, default, names", NETWORKS)
def test_levels_are_torchvisions_feature_maps(backbone, default, names, tmp_path):
    network, outputs, path = models.get_model(backbone).eval(), [], tmp_path / "weights.pth"
    for values in network.state_dict().values():
        if values.ndim == 1:  # batch norm that does something, as after training
            values.uniform_(0.5, 2)
    for name in names.values():
        module = network.get_submodule(name)
        module.register_forward_hook(lambda *given: outputs.append(given[-1].clone()))
    images = random_images(2)
    network(normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.save(network.state_dict(), path)
    for x, y in zip(FeatureExtractor(backbone, names, path)(images), outputs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * y.abs().max())
    extractor = FeatureExtractor(backbone, weights=path)
    assert extractor.levels == default and all(p.requires_grad for p in extractor.parameters())
    assert not [m for m in extractor.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert FeatureExtractor(backbone, weights="random")(images)[-1].std(0).mean() > 0.01


def own_stages(width=12):
    """A small network of three stages, of stride 4, 8 and 16, with batch norm."""
    nn, stages = torch.nn, []
    for c, d, stride in ((3, 8, 4), (8, width, 2), (width, 16, 2)):
        layers = [nn.Conv2d(c, d, 3, stride, padding=1), nn.BatchNorm2d(d)]
        stages.append(nn.Sequential(*layers, nn.Conv2d(d, d, 1), nn.ReLU()))
    return stages


@torch.no_grad()
def test_ones_own_network_is_taken_as_it_is(tmp_path):
    stages, images, path = own_stages(), torch.rand(9, 3, 64, 64), tmp_path / "own.pt"
    extractor = FeatureExtractor(stages, [2, 3], **STATISTICS)
    expected = torch.nn.Sequential(*stages).eval()(normalize(images, **STATISTICS))
    gaussad.fold_batch_norm(folded := deepcopy(extractor))
    for features in (extractor(images)[1], folded(images)[1]):
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * expected.max())
    assert type(folded.stages[0][1]) is torch.nn.Identity
    for n in (3, 2):  # of stride 16; of stride 8, but the last
        assert FeatureExtractor(stages[:n], **STATISTICS).levels == [n]
    wrong = [([124, 116, 104], [58, 57, 57]), ([0.5], [0.2]), ([0, -0.1, 0], [1, 1, 1])]
    for mean, std in (*wrong, *(([0.5] * 3, [0.2, x, 0.2]) for x in (0, torch.nan, 2))):
        with pytest.raises(ValueError, match=r"3 means in \[0, 1\] and 3 stds in \(0, 1\]"):
            FeatureExtractor(stages, mean=mean, std=std)
    detector = GaussianAD(extractor).fit([images]).calibrate(images)
    detector.save(path)
    loaded = GaussianAD.load(path, extractor=FeatureExtractor(own_stages(), [2, 3], **STATISTICS))
    assert torch.equal(loaded(images), detector.train()(images))  # with batch norm as it was
    for levels, message in (([3], r"levels \[2, 3\]"), ([2, 3], "holds no detector")):
        with pytest.raises(ValueError, match=message):
            GaussianAD.load(path, "cpu", FeatureExtractor(own_stages(13), levels, **STATISTICS))


def packed(content, **given):
    """The bytes that torch.save writes."""
    torch.save(content, buffer := io.BytesIO(), **given)
    return buffer.getvalue()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_weights_are_found_in_any_checkpoint_or_refused_with_a_reason(tmp_path, monkeypatch):
    network, path, images = models.get_model(BACKBONE), tmp_path / "weights.pth", random_images(2)
    state = network.state_dict()
    (name, first), *others = state.items()
    path.write_bytes(packed(state))
    [expected] = FeatureExtractor(BACKBONE, [2], path)(images)
    body = {name: x for name, x in state.items() if "classifier" not in name}
    body |= {"classifier.3.weight": torch.ones(5)}  # of another number of classes
    for nest in ("state_dict", "model", "model_state_dict", "model_ema"):
        for prefix in ("model.", "module.", "module.model."):
            prefixed = {prefix + name: x for name, x in body.items()}
            path.write_bytes(packed({"epoch": 3, "optimizer": {"state": {}}, nest: prefixed}))
            assert torch.equal(FeatureExtractor(BACKBONE, [2], path)(images)[0], expected)

    torch.jit.save(torch.jit.script(torch.nn.ReLU()), script := io.BytesIO())
    data, values = packed(state), first.numpy().tobytes()
    middle = data.index(values) + len(values) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    told = [("damage", flipped), ("or is damaged", data[:-9999]), ("not written by", b"text")]
    told += [("size mismatch for features", packed({**state, name: first[:3]}))]
    told += [("see own.x", packed({**state, "own.x": first})), ("a list", packed([state]))]
    told += [(f"see {name}; it has features.0.1", packed({"model": dict(others)}))]
    more = [packed(network), packed(network, _use_new_zipfile_serialization=False)]
    more += [packed({"model": state, "best": x}) for x in (np.float64(0.9), SimpleNamespace(lr=1))]
    more += [script.getvalue()]
    told += [(r"holds more than tensors: save its state_dict\(\)", content) for content in more]
    for message, content in told:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"weights.pth .*{message}") as error:
            FeatureExtractor(BACKBONE, weights=path)
        assert not re.search(r"\n|remove|delete", str(error.value))
    monkeypatch.delattr(models, "get_model")  # as a download that breaks
    with pytest.raises(ConnectionError, match="no ImageNet weights .*get_model.*give --weights"):
        FeatureExtractor(BACKBONE)


def test_float32_is_never_rounded_whatever_torch_is_set_to():
    def look(*given):
        seen.append((len(given), [switch.fp32_precision for switch in switches]))
        if given[-1].requires_grad:
            given[-1].register_hook(look)  # which has one argument, in the backward pass

    cuda, cudnn, cpu = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    switches, seen, images = [cuda.matmul, cudnn.conv, cpu.matmul, cpu.conv], [], random_images(6)
    network = torch.nn.Conv2d(3, 8, 3, 16)
    detector = GaussianAD(FeatureExtractor([network], **STATISTICS))
    network.register_forward_hook(look)
    for switch in switches:
        switch.fp32_precision = "tf32"
    detector.fit([images])(images)
    list(fine_tune(detector, [images], images, steps=1))
    assert {n for n, _ in seen} == {1, 3} and all(found == 4 * ["ieee"] for _, found in seen)
    network.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        detector(images)
    assert all(switch.fp32_precision == "tf32" for switch in switches)  # as the caller set them
    gaussad.pick_device("cpu")
    assert all(switch.fp32_precision == "ieee" for switch in switches)


# ---- Detector ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    """A detector and the images that it is fitted to, which are not square."""
    torch.manual_seed(0)
    images = torch.rand(24, 3, 64, 128)
    return GaussianAD(FeatureExtractor(BACKBONE, [2, 4, 9], "random")).fit(images.split(5)), images


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", "cuda"][: 1 + torch.cuda.is_available()])
def test_score_sums_the_levels_and_map_joins_them_at_each_location(fitted, device):
    images, extractor, score, joined = fitted[1], fitted[0].extractor, 0, []
    assert fitted[0].map_levels == [9]  # of stride 16
    for level, features in zip([2, 4, 9], extractor(images), strict=True):
        pooled = features.double().numpy().mean((2, 3))
        score += naive_distance(pooled, naive_ledoit_wolf(pooled)[0])
        if level > 2:  # of stride 8 and 16
            joined.append(interpolate(features, (8, 16), mode="bilinear"))
    x = torch.cat(joined, 1).double().permute(2, 3, 0, 1).numpy()
    ridge = gaussad.MAP_RIDGE * x.var(2).mean() * np.eye(x.shape[-1])
    distance = naive_distance(x, [[naive_ledoit_wolf(at)[0] + ridge for at in row] for row in x])
    distance = torch.tensor(distance).permute(2, 0, 1).unsqueeze(1)
    detector = GaussianAD(deepcopy(extractor), [4, 9]).to(gaussad.pick_device(device))
    scores, maps = detector.fit(images.split(7)).scores_and_maps(images)
    assert relative(scores.cpu(), score) < 1e-4  # features are float32
    assert relative(maps.cpu(), interpolate(distance, (64, 128), mode="bilinear")[:, 0]) < 1e-3
    assert relative(detector(images).cpu(), score) < 1e-4
    assert gaussad.mahalanobis_loss(detector, images).item() == pytest.approx(score.mean(), 1e-4)


def test_anomaly_score_is_standardised_over_held_out_images_but_for_outliers(recwarn):
    extractor = FeatureExtractor([torch.nn.AvgPool2d(16)], mean=3 * [0], std=3 * [1])  # colours
    images = (0.5 + 0.01 * torch.randn(40, 3, 1, 1)).repeat(1, 1, 64, 64)
    times = torch.tensor([0.6, 0.8, 0.9, 1, 1, 1, 1.1, 2.4, 2.6, -3, 1])  # how far off they are
    held_out = images.mean(0) + 0.05 * times.view(-1, 1, 1, 1)
    held_out[10, :, :16, :16] += 0.05 * 1.8  # far off in one place
    detector = GaussianAD(extractor).fit([images]).calibrate(held_out, batch_size=4)
    told = " ".join(str(warning.message) for warning in recwarn)
    found = re.findall(r"image (\d+) scores ([\d.]+) times the median of held-out images", told)
    assert found == [("8", "2.6"), ("9", "3.0"), ("10", "2.8")]
    detector.fit([images])  # which keeps the calibration
    usual, found = (detector.scores_and_maps(x) for x in (held_out[:8], images))
    expected = 0
    for x, normal in ((found[0], usual[0]), (found[1].amax((1, 2)), usual[1].amax((1, 2)))):
        expected += (x - normal.mean()) / normal.std()
    assert relative(detector.anomaly_score(*found), expected) < 1e-4
    for rate in (0.05, 0.1):
        expected = gaussad.tail_quantile(detector.anomaly_score(*usual), 1 - rate)
        assert detector.threshold(rate) == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match="at least three held-out images"):
        detector.calibrate(held_out[[3, 4, 8, 9]])


def test_size_of_the_maps_gaussians_is_told_before_any_is_fitted(recwarn):
    for channels in (2700, 3000):
        detector = GaussianAD(FeatureExtractor([torch.nn.Conv2d(3, channels, 1, 16)], **STATISTICS))
        with pytest.raises(ValueError, match="must be a tensor"):
            detector.fit([random_images(1, 64), None])
    [told] = recwarn  # of 8 bytes * 4 * 4 * 3000²
    assert "Gaussians take 1.2 GB" in str(told.message)


def same(a, b):
    """Whether two detectors hold the same, to the bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_detector_is_loaded_to_the_bit_and_no_code_in_its_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = random_images(40)
    detector = GaussianAD(FeatureExtractor(BACKBONE, [2, 4], "random"), np.array([4]), "diagonal")
    detector.fit(images[:30].split(10)).calibrate(images[30:]).save("detector.pt")
    before, loaded = torch.get_rng_state(), GaussianAD.load("detector.pt")
    with open("detector.pt", "rb") as file:
        assert same(detector, loaded) and same(detector, GaussianAD.load(file))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loaded(images), detector(images))
    assert all(p.requires_grad for p in loaded.parameters())  # it can be trained on
    content = gaussad.load_plain("detector.pt")
    malicious = type("Malicious", (), {"__reduce__": lambda self: (os.mkdir, ("executed",))})()
    for more in ({"network": {}}, {"gaussians": [{"mean": 3}]}, {"levels": 3}, {"x": malicious}):
        torch.save({**content, **more}, "detector.pt")
        with pytest.raises(ValueError, match="detector.pt holds"):
            GaussianAD.load("detector.pt")
    assert os.listdir() == ["detector.pt"]


def test_folder_is_replaced_whole_or_not_at_all(tmp_path):
    def put(text):
        with gaussad.replacing(tmp_path / "out") as new:
            new.mkdir()
            for part in "ab":
                (new / part).write_text(text)
            assert text != "fail"

    put("old")
    with pytest.raises(AssertionError):
        put("fail")
    assert {(tmp_path / "out" / part).read_text() for part in "ab"} == {"old"}
    with ThreadPoolExecutor(2) as pool:  # two at once
        list(pool.map(put, map(str, range(200))))
    [text] = {(tmp_path / "out" / part).read_text() for part in "ab"}  # of one and the same
    assert text.isdigit() and os.listdir(tmp_path) == ["out"]


def test_cutout_and_cutmix_fill_one_square_and_scar_a_thin_rectangle():
    noise = 255 * (random_images(60, 200) > 127).byte()  # which nothing else equals
    mean, other = noise.double().mean((2, 3), keepdim=True).round().byte(), noise.roll(1, 0)
    for augment, filling in ((gaussad.cutout, mean), (gaussad.cutmix, other)):
        found = augment(noise)
        changed = (found != noise).any(1)
        rows, columns = changed.any(2), changed.any(1)
        inside = rows[:, None, :, None] & columns[:, None, None]
        assert torch.equal(found, torch.where(inside, filling, noise))
        cut = rows[:, [0, -1]].any(1) | columns[:, [0, -1]].any(1)  # by the border
        height, width = rows.sum(1)[~cut], columns.sum(1)[~cut]
        area = height * width / 200**2
        assert ((height - width).abs() <= 1).all() and 0.05 < area.max() < 0.107
        assert 0.001 < area.min() < 0.005
    tilts, shades = [], []
    for image, found, colour in zip(noise, gaussad.scar(noise), mean):
        points = (image != found).any(0).nonzero()
        shades.append((found[0, *points.T] > 100).all().item())
        assert (found[:, *points.T] == (colour if shades[-1] else colour // 2)[:, 0]).all()
        if points.min() > 0 and points.max() < 199:  # not cut by the border
            points = points - points.double().mean(0)
            axes = torch.linalg.svd(points, full_matrices=False)[2]
            length, width = np.ptp((points @ axes.T).numpy(), axis=0)
            assert 0.1 * 200 - 2 < length < 0.35 * 200 + 2 and 1 < width < 0.025 * 200 + 2
            assert len(points) > 0.7 * length * width  # solid
            tilts.append(axes[0].abs().min().item())
    assert min(tilts) < 0.1 and max(tilts) > 0.6 and 0.2 < np.mean(shades) < 0.8


def spread(images):
    """A score with ties that has nothing to do with a detector, in whole numbers."""
    return (images.long().square().sum((1, 2, 3)) // 200_000).double()


def test_validation_is_that_of_its_definition_and_its_error_that_of_leaving_images_out():
    def tuned(images):
        return spread(images) + spread(images[:, :1])

    def auroc_without(i, C, owner):
        return C[np.arange(60) != i][:, owner != i].mean()

    images, before = random_images(60, 16), torch.get_rng_state()
    local = {"cutout": gaussad.cutout, "scar": gaussad.scar}
    validator, again, other = (AugmentationValidator(images, i, 120, local) for i in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    found, gains = [validator(score, batch_size=7) for score in (tuned, spread)], 0
    for validation, score, sign in zip(found, (tuned, spread), (1, -1)):
        for name, versions in validator.augmented.items():
            assert torch.equal(versions, again.augmented[name])
            assert not torch.equal(versions, other.augmented[name])
            owner = (images != versions[:, None]).flatten(2).sum(2).argmin(1).numpy()
            assert (np.bincount(owner) == 2 * 3).all()  # each shares most pixels with its image
            pairs = score(versions).numpy() - score(images).numpy()[:, None]
            C = (pairs > 0) + (pairs == 0) / 2
            assert (C == 0.5).any() and validation.aurocs[name] == pytest.approx(C.mean(), abs=1e-9)
            aurocs = np.array([auroc_without(i, C, owner) for i in (None, *range(60))])
            gains = gains + sign * aurocs / 2
    gain, error = found[0].gain_over(found[1])
    assert gain == pytest.approx(gains[0], abs=1e-9)
    assert error == pytest.approx(np.sqrt(59 * np.var(gains[1:])), rel=0.1)
    assert validator(spread, normal=spread(images) - 1e6).auroc == 1
    [dimmed] = AugmentationValidator(images, 0, 60, {"dim": lambda x: x // 4}).augmented.values()
    blends = [images + x * (images // 4 - images.double()) for x in (1, 0.5, 0.25)]
    assert (dimmed - torch.cat(blends)).abs().max() <= 0.5


# ---- Fine-tuning -------------------------------------------------------------------------------


@pytest.fixture
def task():
    """A detector, normal images in a loader that shuffles, and images held out."""
    images = random_images(30)
    loader = DataLoader(TensorDataset(images[:20], torch.zeros(20)), 7, shuffle=True)
    return GaussianAD(FeatureExtractor(BACKBONE, [2, 4], "random")), loader, images[20:]


def test_steps_are_adams_on_the_mean_score_by_the_pretrained_gaussians(task):
    detector, loader, held_out = task
    reference, losses, told = deepcopy(detector), [], []
    given = {"lr": 1e-3, "seed": 3, "on_step": lambda *step_and_loss: told.append(step_and_loss)}
    with torch.no_grad():  # which callers may well have set
        checks = list(fine_tune(detector, loader, held_out, 4, **given))
    reference.fit(loader)
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3)
    for check in checks[1:]:
        with gaussad.seeded(3 + check.step):
            batches = [images for images, _ in loader][:2]
        for images in batches:
            optimizer.zero_grad()
            loss = reference(images).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert check.loss == pytest.approx(np.mean(losses[-2:]), rel=1e-4)
        for key, x in reference.extractor.state_dict().items():
            assert (check.state["network"][key] - x).abs().max() < 1e-4  # a step is of 1e-3
    assert [step for step, _ in told] == [1, 2, 3, 4] and checks[0].loss is None
    assert [loss for _, loss in told] == pytest.approx(losses, rel=1e-4)


def test_detector_is_that_of_the_last_check_kept_fitted_to_all_but_outliers(task, monkeypatch):
    detector, loader, held_out = task
    held_out[4] = 0  # a black frame
    images, usual = loader.dataset.tensors[0], held_out[torch.arange(10) != 4]
    gains = iter([(0.1, 0.1), (0.2, 0.1), (-0.5, 0.1), (0.1, 0.2)])
    kept, checks, passed, map_fits, judged = [], [], [], [], []

    def spy(owner, name, note):
        spied = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: note(*given) or spied(*given))

    def gain_over(validation, last_kept):
        assert torch.equal(last_kept.influence, kept[-1].influence)
        return next(gains)

    def count(_, images):
        passed.append(0 if torch.is_grad_enabled() else len(images))

    spy(FeatureExtractor, "forward", count)
    spy(Gaussian, "fit", lambda samples, *_: map_fits.append(samples.ndim == 4))
    spy(AugmentationValidator, "__call__", lambda _, score, *__: judged.append(deepcopy(score)))
    monkeypatch.setattr(gaussad.Validation, "gain_over", gain_over)
    given = {"names": [f"photo {i}" for i in range(10)], "batch_size": 4}
    with pytest.warns(UserWarning) as told, torch.no_grad():
        for check in fine_tune(detector, loader, held_out, 999, 1e-3, 2, **given):
            checks.append((check.step, check.kept, check.gain))
            assert sum(passed) == 20 + 10 + 3 * 3 * 70  # normal images once, and their versions
            assert max(passed) == 7 and any(map_fits) == check.kept
            expected = GaussianAD(deepcopy(detector.extractor))
            expected.extractor.load_state_dict(check.state["network"])
            assert relative(judged[-1](usual), expected.fit([images])(usual)) < 1e-3
            if check.kept:
                kept.append(check.validation)
                expected.calibrate(usual).fit([images, usual])
                assert relative(detector.held_out_scores, expected.held_out_scores) < 1e-3
                pairs = zip(detector.scores_and_maps(images), expected.scores_and_maps(images))
                assert all(relative(*pair) < 1e-3 for pair in pairs)
                last = deepcopy(detector)
            assert same(detector, last) and len(str(check)) < 500  # it can be printed
            passed.clear()
            map_fits.clear()
    assert same(detector, last) and list(check.validation.aurocs) == ["cutout", "scar", "augmix"]
    assert checks[:2] == [(0, True, None), (2, False, 0.1)]  # not more than its standard error
    assert checks[2:] == [(4, True, 0.2), (8, False, -0.5), (16, False, 0.1)]
    assert len(re.findall("held-out photo 4 scores", str([*map(str, told)]))) == 1  # of two


def test_any_check_is_resumed_bit_identically_and_divergence_leaves_the_last_kept(task, tmp_path):
    detector, loader, held_out = task
    given, checks = {"steps": 5, "lr": 1e-3, "patience": 9, "seed": 5}, []
    for check in fine_tune(detector, loader, held_out, **given):
        gaussad.save_plain(check.state, tmp_path / str(check.step))
        checks.append((deepcopy(detector), check))
    assert [check.step for _, check in checks] == [0, 2, 4, 5]
    for i, (again, check) in enumerate(checks):
        state = gaussad.load_plain(tmp_path / str(check.step))
        torch.rand(7)  # what the caller draws in between changes nothing
        rest = list(fine_tune(again, loader, held_out, state=state, **given))
        assert list(map(str, rest)) == [str(later) for _, later in checks[i + 1 :]]
        assert same(again, detector)
    diverging = fine_tune(again, loader, held_out, lr=1e30, augmentations=gaussad.AUGMENTATIONS)
    assert list(next(diverging).validation.aurocs) == list(gaussad.AUGMENTATIONS)
    before = deepcopy(again)
    with pytest.raises(ValueError, match="not finite|do not vary"):
        next(diverging)
    assert same(again, before)


def test_readme_examples_train_on_a_folder_and_score_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (HERE / "README.md").read_text(encoding="utf-8")
    text = text.replace("steps=512", "steps=2").replace("380", "32")
    text = text.replace('"efficientnet_b4"', f'"{BACKBONE}", [1, 2], weights="random"')
    for i in range(12):
        image = Image.fromarray(random_images(1)[0].permute(1, 2, 0).numpy())
        image.save(draw(tmp_path / f"photos/good/{i}.png"))
    image.save(tmp_path / "photos/new.png")
    names = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(example, names)
    assert names["score"].shape == names["anomalous"].shape == (1,)
    assert names["anomaly_map"].shape == (1, 32, 32)


def own_network(*stages):
    """A network of these stages after a first one."""
    return FeatureExtractor([torch.nn.Conv2d(3, 8, 3, 16), *stages], **STATISTICS)


ERRORS = [
    (lambda d, x: Gaussian.fit(torch.rand(2, 3)), "three samples"),
    (lambda d, x: Gaussian.fit(5 + 3e-8 * torch.rand(5, 3).double()), "do not vary"),
    (lambda d, x: FeatureExtractor("efficientnet-b4"), "did you mean efficientnet_b4"),
    (lambda d, x: own_network(torch.nn.Flatten()), "module 2 must return feature maps"),
    (lambda d, x: own_network(torch.nn.ReLU(inplace=True)), "module 2 changes its input in place"),
    (lambda d, x: own_network(torch.nn.Hardswish(True)), "module 2 .* in place: set inplace=False"),
    (lambda d, x: own_network(*own_stages()), r"module 2 cannot take \[1, 8, 14, 14\]: "),
    (lambda d, x: GaussianAD(d.extractor, [3]), r"\[3\] are not among \[2, 4, 9\]"),
    (lambda d, x: GaussianAD(d.extractor)(x), "is not fitted"),
    (lambda d, x: d(255 * x), r"in \[0, 1\]"),
    (lambda d, x: d(x.numpy()), r"a tensor \(B, 3, H, W\), .*not float32 of shape \[24, 3, 64"),
    (lambda d, x: d.fit([PICTURE]), r"a tensor \(B, 3, H, W\), .*not Image of shape \[\]"),
    (lambda d, x: d.fit(x), r"a tensor \(B, 3, H, W\), .* of shape \[3, 64, 128\]"),
    (lambda d, x: d.fit([x, x[..., :32]]), r"\[64, 32\] after those of \[64, 128\]"),
    (lambda d, x: d.fit([x * d.extractor.std.fill_(0)]), "features are not finite"),
    (lambda d, x: d.calibrate(x[:2]), "three held-out images that differ"),
    (lambda d, x: d.anomaly_score(*d.scores_and_maps(x)), "not calibrated"),
    (lambda d, x: d.calibrate(x).anomaly_score(x[:, 0, 0, 0] / 0, x[:, 0]), "not finite"),
    (lambda d, x: next(fine_tune(d, [x], random_images(3), -1)), "at least 0"),
    (lambda d, x: next(fine_tune(d, [x], random_images(3), patience=0)), "patience"),
    (lambda d, x: list(fine_tune(d, iter([random_images(9)]), random_images(3), 1)), "an iterator"),
    (lambda d, x: AugmentationValidator(x), "uint8"),
    (lambda d, x: gaussad.hold_out(range(5)), "too few"),
    (lambda d, x: gaussad.load_images([], 32), "at least one path"),
]


@pytest.mark.parametrize("call, message", ERRORS)
def test_what_cannot_be_done_is_told(call, message, fitted):
    with pytest.raises(ValueError, match=message):
        call(deepcopy(fitted[0]), fitted[1])


# ---- Files: cameras, masks, folders ------------------------------------------------------------

GRAY = (np.indices((40, 60)).sum(0) * 255 // 98).astype(np.int32)  # 0 to 255
PICTURE = Image.fromarray(GRAY.astype(np.uint8))
DEFECT = np.zeros((50, 70), bool)
DEFECT[10:20, 30:60] = True
# An orientation in EXIF that is a text, and two that are no EXIF.
TEXT = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0006\0\0\0\0\0\0\0"
BROKEN_EXIF = {"text": TEXT, "none": b"Exif\0\0none", "cut": TEXT[:18]}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_images_of_any_kind_become_the_same_rgb(tmp_path):
    for suffix in ("png", "jfif", "jp2", "TGA"):
        PICTURE.save(tmp_path / f"a.{suffix}", quality=100)
    for mode in ("RGB", "RGBA", "LA", "P"):
        PICTURE.convert(mode).save(tmp_path / f"{mode}.png")
    for name, exif in BROKEN_EXIF.items():
        PICTURE.save(tmp_path / f"{name}.jpg", quality=100, exif=exif)
        PICTURE.save(tmp_path / f"{name}.png", exif=exif)  # Pillow raises other errors here
    two = {"save_all": True, "append_images": [PICTURE.copy()]}
    PICTURE.save(tmp_path / "phone.jpg", "MPO", quality=100, **two)
    for dtype in (np.uint16, np.int32):
        Image.fromarray((GRAY * 257).astype(dtype)).save(tmp_path / f"{dtype.__name__}.tif")
    expected = gaussad.load_image(tmp_path / "a.png", 32).int()
    assert torch.equal(gaussad.load_images(str(tmp_path / "a.png"), 32)[0], expected.byte())
    assert len(paths := gaussad.list_images([tmp_path])) == 17
    for path, found in zip(paths, gaussad.load_images(paths, 32, workers=3)):
        assert found.dtype == torch.uint8 and (found - expected).abs().max() <= 1, path.name


def saved(image, kind="TIFF", **given):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.copy().save(content := io.BytesIO(), kind, **given)
    return content.getvalue()


# A pixel of 1023 in 16 bits per colour, which Pillow reads but cannot write.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABEAIAAADA54+dAAAADElEQVR42mNg/g+CAAkiAwdf4EfLAAAAAElFTkSuQmCC"


def test_files_of_other_depths_of_several_pictures_and_damaged_ones_are_refused(tmp_path):
    files = [("not an image", b"text"), ("truncated", saved(PICTURE, "PNG")[:60])]
    two = {"save_all": True, "append_images": [PICTURE.rotate(180)]}
    files += [("it holds 2 pict", saved(PICTURE, x, **two)) for x in ("GIF", "TIFF", "WEBP", "PNG")]
    bitmap = saved(PICTURE, "BMP")  # its sides are bytes 18 to 25
    files += [("exceeds limit", bitmap[:18] + 2 * b"\xff\xff\0\0" + bitmap[26:])]
    deep = [GRAY * 257 - 300, GRAY * 514, GRAY.astype(np.float32)]
    deep = [("pixels beyond 0 to 65535: convert", saved(x)) for x in deep]
    dark = [GRAY * (2**bits - 1) // 255 for bits in (8, 10, 12, 14)]
    dark = [base64.b64decode(PNG), *map(saved, dark), *(saved(x.astype(np.uint16)) for x in dark)]
    deep += [("uses little of its 16 bits: convert", content) for content in dark]
    for load, refused in ((gaussad.load_image, files + deep), (gaussad.load_mask, files)):
        for message, content in refused:
            (tmp_path / "a.png").write_bytes(content)
            with pytest.raises(ValueError, match=f"/a.png.* {message}"):
                load(tmp_path / "a.png", 32)


def drawn(colour, rest, mode):
    """The defect in one colour, the rest in another."""
    image = Image.new(mode, DEFECT.shape[::-1], rest)
    image.paste(colour, mask=Image.fromarray(DEFECT))
    if mode == "P":
        image.putpalette([0] * 768)  # all black
    return image.convert("I;16") if mode == "I" else image


BLACK, WHITE, CLEAR = (0, 0, 0, 255), (255, 255, 255, 255), (255, 255, 255, 0)
MASKS = [(WHITE, CLEAR, "RGBA"), (BLACK, CLEAR, "RGBA"), (WHITE, BLACK, "RGBA")]
MASKS += [((0, 0, 1), (0, 0, 0), "RGB"), ((1, 255), (0, 255), "LA"), *((1, 0, x) for x in "PI1")]


@pytest.mark.parametrize("colour, rest, mode", MASKS)
def test_mask_of_any_kind_is_where_the_defect_is(colour, rest, mode, tmp_path):
    path, image = tmp_path / "mask.png", tmp_path / "image.png"
    drawn(colour, rest, mode).save(path)
    expected = Image.fromarray(DEFECT).resize((350, 350), Image.Resampling.NEAREST)
    for size in ((70, 50), (700, 500), (35, 25), (467, 333)):  # of its image; the last is rounded
        Image.new("RGB", size).save(image)
        assert np.array_equal(gaussad.load_mask(path, 350, image), expected)
    for size in ((70, 40), (50, 70), (70, 70)):
        Image.new("RGB", size).save(image)
        with pytest.raises(ValueError, match=r"mask.png: the mask is \d+ x \d+, the image"):
            gaussad.load_mask(path, 64, image)
    assert np.array_equal(gaussad.load_mask(path, DEFECT.shape), DEFECT)
    if mode == "RGBA":  # as an image: transparent pixels are composited onto black
        assert np.array_equal(gaussad.load_image(path, DEFECT.shape)[0], DEFECT * colour[0])
    drawn(rest, rest, mode).save(path)
    assert not gaussad.load_mask(path, 64).any()


def test_mask_is_turned_by_its_own_exif_and_loses_no_pixel_when_made_smaller(tmp_path):
    mask, exif, turned = drawn(255, 0, "L"), Image.Exif(), tmp_path / "turned.png"
    mask.save(tmp_path / "upright.png")
    for exif[0x0112], turn in ((3, "ROTATE_180"), (5, "TRANSPOSE"), (6, "ROTATE_90")):
        mask.transpose(Image.Transpose[turn]).save(turned, exif=exif)
        assert np.array_equal(gaussad.load_image(turned, DEFECT.shape)[0] > 0, DEFECT)
        for path in (tmp_path / "upright.png", turned):
            assert np.array_equal(gaussad.load_mask(path, DEFECT.shape, turned), DEFECT)
    for i in (0, 300, 511, 1023):
        dot = Image.new("1", (1024, 1024))
        dot.putpixel((1023 - i, i), 1)
        dot.save(turned)
        assert gaussad.load_mask(turned, 380)[i * 380 // 1024, (1023 - i) * 380 // 1024]


def draw(path, value=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (64, 64), value).save(path)
    return path


def test_samples_and_their_masks_are_found_by_the_conventions(tmp_path):
    part = tmp_path / unicode_form("NFD", "größe")
    images = ["a.jpg", "a.png", "b.jpg", "c.png", "d.PNG", "deep/e.webp", "f.1.png", "g.png"]
    masks = ["a_mask.png", "b.png", "c.bmp", "d_mask.PNG", "deep/e_mask.tif", "f.1/000.png"]
    for path in [*(f"test/cut/{x}" for x in images), *(f"ground_truth/cut/{x}" for x in masks)]:
        draw(part / path)
    draw(part / "ground_truth/cut/f.1/001.png", 0)
    for place in (part / "test/cut/deep", part / "ground_truth/cut/deep"):
        place.symlink_to(place.rename(tmp_path / f"linked_{place.parent.parent.name}"))
    links = {"again": ".", "other": "../cut", "h.png": "a.png", "lost.png": "none", "self": "self"}
    for name, target in links.items():  # which lead to no other image
        (part / "test/cut" / name).symlink_to(target)
    for other in ("train/Good/a", "train/bad/a", "test/GOOD/a", "test/ok/a", "test/cut/.hidden/a"):
        draw(part / f"{other}.png")
    for hidden in ("test/cut/.hidden.png", "test/.hidden/a.png", "../.trash/test/good/a.png"):
        draw(part / hidden)
    (part / "test/cut/notes.txt").touch()
    (part / "test/none").mkdir()
    assert gaussad.list_categories(tmp_path) == [part.name]
    asked = unicode_form("NFC", part.name)
    assert [s.defect for s in gaussad.list_samples(tmp_path, asked, "train")] == ["good"]
    with pytest.warns() as told:
        found = gaussad.list_samples(tmp_path, asked, "test")
    told = str([*map(str, told)])
    order = r"skipped 3 files .*\(, .png, .txt\), such as lost.png.*none is empty.*ok is treated as"
    assert re.search(order + ".*größe: 1 images share the mask", told)
    assert [sample.defect for sample in found] == ["good"] + 8 * ["cut"] + ["ok"]
    assert [s.path for s in found[1:9]] == [part / "test/cut" / x for x in images]
    assert all(gaussad.load_mask(s.mask, 32, s.path).all() for s in found[1:8])
    assert not found[0].mask and not found[8].mask


def test_held_out_are_a_fifth_rounded_up_but_sixteen_or_half():
    for n, held in ((6, 3), (7, 3), (40, 16), (320, 64), (321, 65)):
        fit, held_out = gaussad.hold_out(range(n), seed=0)
        assert len(held_out) == held and sorted(fit + held_out) == list(range(n))
        assert gaussad.hold_out(range(n), 0) == (fit, held_out) != gaussad.hold_out(range(n), 1)


# ---- Command lines -----------------------------------------------------------------------------

# What tests start as processes of their own imports torch once for all of them.
multiprocessing.set_forkserver_preload(["torchvision.transforms.v2"])


def run(script, *given):
    """Run a script as `python` would, but in this process, as it takes seconds to import torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(HERE / script), *map(str, given)])
        runpy.run_path(str(HERE / script), run_name="__main__")


@pytest.fixture
def cli(capfd):
    """Run a script; its exit code, output and errors. Its warnings are then `cli.told`."""

    def call(*given):
        capfd.readouterr()  # of processes before
        with warnings.catch_warnings(record=True) as told, pytest.raises(SystemExit) as stop:
            run(*given)
        call.told = [str(warning.message) for warning in told]
        return stop.value.code, *capfd.readouterr()

    return call


def assert_one_line(result, message):
    code, _, error = result
    assert code == 2 and error.count("\n") == 1 and re.search(message, error), error


def contents(folder):
    """Digests of all files in a folder, hidden ones too."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def read_scores(folder):
    """The rows of scores.csv, and of each the anomaly score, the pooled one, the map's maximum."""
    with (folder / "scores.csv").open(newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    return rows, np.array([list(row.values())[-3:] for row in rows], float)


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def every_check_gains(self, other):
    """In place of Validation.gain_over."""
    return 1.0, 0.5


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The options that name a small data set."""
    root = tmp_path_factory.mktemp("demo")
    train.draw_demo(root, size=64)
    (root / "demo/ground_truth/stain/003_mask.png").unlink()
    return ["--data", str(root), "--category", "demo"]


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """A folder where train.py has run, on data without test images, and kept every check."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(Path(demo[1], "demo/train"), root / "data/demo/train")
    _, held_out = gaussad.hold_out(gaussad.list_images(root / "data"))
    black = draw(held_out[3], 0)  # a black frame
    with pytest.MonkeyPatch.context() as patch, pytest.warns() as told:
        patch.chdir(root)
        patch.setattr(gaussad.Validation, "gain_over", every_check_gains)
        assert train.main(["--data", "data", "--category", "demo", *TINY, "--steps", "3"]) == 0
    few, outlier = [str(warning.message) for warning in told]  # once, though left out three times
    times = re.match(f"held-out {black.relative_to(root)} scores (.*) times the median", outlier)[1]
    assert "only 32 images to fit" in few and float(times) > gaussad.OUTLIER
    return root


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of its folder of runs."""
    return shutil.copytree(trained / "runs", tmp_path / "runs")


@pytest.fixture(scope="module")
def evaluated(trained, demo, tmp_path_factory):
    """What evaluate.py writes, and what the library says of the same images."""
    e = SimpleNamespace(run=tmp_path_factory.mktemp("evaluated") / "demo")
    shutil.copytree(trained / "runs/demo", e.run)
    given = ["--runs", str(e.run.parent), "--pictures", "--false-alarms", "0.1"]
    with pytest.warns(match="demo: pixel figures leave out 1 images whose mask is missing"):
        assert evaluate.main([*demo, *given, "--batch-size", "7"]) == 0
    e.out, e.detector = e.run / "results", GaussianAD.load(e.run / "detector.pt")
    e.metrics, (e.rows, e.found) = read_metrics(e.out), read_scores(e.out)
    e.samples = gaussad.list_samples(demo[1], "demo", "test")
    with torch.no_grad():
        images = gaussad.load_images([sample.path for sample in e.samples], 64)
        e.scores, e.maps = e.detector.scores_and_maps(images)
    e.labels, e.masks = np.array([x.defect != "good" for x in e.samples]), torch.zeros(40, 64, 64)
    for i in (i for i in range(40) if e.samples[i].mask):
        e.masks[i] = gaussad.load_mask(e.samples[i].mask, 64)
    return e


def test_train_writes_what_the_library_makes_bit_for_bit(demo, cli, tmp_path):
    assert cli("train.py", *demo, *TINY, "--steps", 3, "--runs", tmp_path)[0] == 0
    assert sorted(os.listdir(tmp_path / "demo")) == ["checkpoint.pt", "detector.pt"]
    written = gaussad.load_plain(tmp_path / "demo/checkpoint.pt")
    assert written.keys() == {"settings", "checks", "state"} and written["state"] is None
    paths = [sample.path for sample in gaussad.list_samples(demo[1], "demo", "train")]
    digests = contents(Path(demo[1], "demo/train"))
    assert written["settings"]["images"] == [digests[path] for path in paths]
    fit, held_out = (gaussad.load_images(part, 64) for part in gaussad.hold_out(paths))
    torch.manual_seed(0)
    detector = GaussianAD(FeatureExtractor(BACKBONE, [4, 9], "random"))
    checks = gaussad.fine_tune(detector, DataLoader(fit, 16, shuffle=True), held_out, steps=3)
    for check, row in zip(checks, written["checks"], strict=True):
        for key in ("step", "loss", "kept", "gain", "standard_error"):
            assert getattr(check, key) == row[key]
        assert check.validation.auroc == row["auroc"]
        assert check.validation.aurocs == row["auroc_per_augmentation"]
    assert same(GaussianAD.load(tmp_path / "demo/detector.pt"), detector)


def test_finished_run_is_left_alone_and_no_other_without_force(demo, cli, tmp_path):
    for name in "ac":
        torch.save(models.get_model(BACKBONE).state_dict(), tmp_path / f"{name}.pth")
    shutil.copy(tmp_path / "a.pth", tmp_path / "b.pth")
    photos = shutil.copytree(Path(demo[1], "demo/train/good"), tmp_path / "data/demo/train/good")
    given = ["train.py", "--data", tmp_path / "data", *demo[2:], *TINY, "--steps", 0]
    given += ["--runs", tmp_path / "runs", "--weights", tmp_path / "a.pth"]
    assert cli(*given)[0] == 0
    folder = tmp_path / "runs/demo"
    for name in ("results", "scored"):
        draw(folder / name / "pictures/1.png")
    before = contents(tmp_path / "runs")
    same_run = ["--device auto", f"--data {demo[1]}", "--category demo/", "--category demo demo"]
    for more in (*same_run, "--workers 1", f"--weights {tmp_path}/b.pth"):
        finished = (0, f"{folder} is finished; --force trains anew\n", "")
        assert cli(*given, *more.split()) == finished, more
    other = ["seed 1", "lr 1e-3", "steps 1", "patience 2", "batch-size 8", "augmentations scar"]
    other += ["levels 4", "map-levels 4", "covariance diagonal", "image-size 32"]
    for more in (*other, f"weights {tmp_path}/c.pth", "backbone resnet18"):
        name, value = more.split()
        message = rf"has other settings: {name.replace('-', '_')} \(.*, now .*\); --force"
        assert_one_line(cli(*given, f"--{name}", value), f"{folder} {message}")
    draw(photos / "000.png", 9)  # as many images as before
    assert_one_line(cli(*given), f"{folder} has other settings: images; --force")
    assert contents(tmp_path / "runs") == before
    assert cli(*given, "--force")[0] == 0
    after = contents(tmp_path / "runs")
    assert after.keys() == {folder / "detector.pt", folder / "checkpoint.pt"}
    assert not after.items() & before.items()


def run_until_killed(count, *given):
    """A run of train.py that is killed when it has written half of its file number `count`."""

    def killed(path, content, whole=Path.write_bytes):
        nonlocal count
        count -= 1
        whole(path, content[: len(content) // (1 if count else 2)])
        if not count:
            os.kill(os.getpid(), signal.SIGKILL)

    Path.write_bytes, gaussad.Validation.gain_over = killed, every_check_gains
    run("train.py", *given)


# Files are written in this order: detector.pt and checkpoint.pt of steps 0, 2, 3; the last one.
@pytest.mark.parametrize("count, seed, known", [(3, 0, 1), (6, 0, 2), (2, 1, 0)])
def test_killed_run_ends_in_the_same_bits(count, seed, known, trained, runs, cli, monkeypatch):
    monkeypatch.setattr(gaussad.Validation, "gain_over", every_check_gains)
    given = ["--data", trained / "data", "--category", "demo", *TINY, "--steps", 3, "--runs", runs]
    draw(runs / "demo/results/pictures/1.png")
    forced = count, *given, "--seed", seed, "--force"
    process = multiprocessing.get_context("forkserver").Process(
        target=run_until_killed, args=forced
    )
    process.start()
    process.join()
    path = runs / "demo/checkpoint.pt"
    before = gaussad.load_plain(path)["checks"] if path.exists() else []
    assert process.exitcode == -signal.SIGKILL and len(before) == known
    code, output, error = cli("train.py", *given)  # with another seed it was another run
    assert code == 0 and re.findall(r"(?m)^ +(\d+) ", output) == ["0", "2", "3"], error
    assert same(*(GaussianAD.load(x / "demo/detector.pt") for x in (trained / "runs", runs)))
    assert {x.name for x in path.parent.glob("[!.]*")} == {"detector.pt", "checkpoint.pt"}
    expected, found = (gaussad.load_plain(x) for x in (trained / "runs/demo/checkpoint.pt", path))
    assert found["checks"][: len(before)] == before  # their seconds, too
    for check in expected["checks"] + found["checks"]:
        del check["seconds"]
    assert expected == found


def test_evaluate_writes_scores_verdicts_and_figures(evaluated):
    e = evaluated
    expected = [e.detector.anomaly_score(e.scores, e.maps), e.scores, e.maps.amax((1, 2))]
    assert relative(e.found, torch.stack(expected, 1)) < 1e-5
    assert [row["path"] for row in e.rows] == [sample.path.as_posix() for sample in e.samples]
    assert [row["label"] == "1" for row in e.rows] == e.labels.tolist()
    for rate, judged in [*e.metrics["at_false_alarms"].items(), (0.1, e.metrics)]:
        above = e.found[:, 0] > e.detector.threshold(float(rate))
        assert judged["false_alarm_rate"] == above[~e.labels].mean()
        assert judged["miss_rate"] == (~above)[e.labels].mean()
        hits = (above & e.labels).sum()
        assert judged["f1"] == pytest.approx(2 * hits / (above.sum() + e.labels.sum()))
    assert [row["verdict"] == "anomalous" for row in e.rows] == above.tolist()
    for key, values in zip(("both", "", "from_map"), e.found.T):
        key = f"image_auroc_{key}".rstrip("_")
        assert e.metrics[key] == pytest.approx(gaussad.auroc(values, e.labels), abs=1e-12)
    for defect, rate in e.metrics["miss_rate_per_defect"].items():
        own = np.array([sample.defect == defect for sample in e.samples])
        assert rate == (~above)[own].mean()
        area = gaussad.auroc(e.found[own | ~e.labels, 0], e.labels[own | ~e.labels])
        assert e.metrics["image_auroc_per_defect"][defect] == pytest.approx(area, abs=1e-12)
    known = e.masks.any((1, 2)).numpy() | ~e.labels
    maps, masks = e.maps[known], e.masks[known]
    assert e.metrics["pixel_auroc"] == pytest.approx(gaussad.auroc(maps, masks), abs=1e-6)
    assert e.metrics["aupro"] == pytest.approx(gaussad.aupro(maps, masks), abs=1e-4)
    expected = {"detector_sha256": contents(e.run)[e.run / "detector.pt"], "backbone": BACKBONE}
    expected |= {"image_size": [64, 64], "best_step": 3, "expected_false_alarms": 0.1}
    expected |= {"checks": gaussad.load_plain(e.run / "checkpoint.pt")["checks"]}
    expected |= {"n_normal": 16, "n_anomalous": 24, "n_without_mask": 1}
    assert e.metrics.items() >= expected.items() and e.metrics.keys() >= {"date", "detector"}


def test_report_shows_words_figures_pictures_and_a_histogram_with_the_threshold(evaluated):
    e, page = evaluated, (evaluated.out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"http|<script|<link|src=\"(?!data:)", page)  # needs no other file
    kinds = Counter((row["label"], row["verdict"]) for row in e.rows)
    missed = Counter(x["defect"] for x in e.rows if (x["label"], x["verdict"]) == ("1", "normal"))
    by_kind = ", ".join(f"{n} of 8 {defect}" for defect, n in missed.most_common())
    words = f"{kinds['1', 'anomalous']} of 24 defective images found, {kinds['0', 'anomalous']} of "
    words += f"16 good ones rejected, at 10 % expected false alarms; missed: {by_kind}; with 10 % "
    assert f"{words}expected, {missed.total()} would be missed." in page
    assert all(f"<b>{e.metrics[key]:.1%}</b>" in page for key in evaluate.FIGURES)
    assert page.count("<img ") == sum(min(evaluate.SHOWN, n) for n in kinds.values())
    worst = [i for i in e.found[:, 0].argsort() if e.labels[i]][0]  # of the missed, shown first
    assert page.index(f"{e.samples[worst].path.name}: normal") == page.index(": normal") - 7
    threshold = e.metrics["threshold"]
    low, high = (extreme([*e.found[:, 0], threshold]) for extreme in (min, max))
    line, right = map(float, re.search(r"M([\d.]+) 10V210M50 10V210H(\d+)", page).groups())
    place = (line - 50) / (right - 50) * (high - low) + low
    assert place == pytest.approx(threshold, abs=(high - low) / 3000)


def test_pictures_sort_as_the_scores_and_outline_true_and_predicted_regions(evaluated):
    erode = pytest.importorskip("scipy.ndimage").binary_erosion
    e, names = evaluated, sorted(os.listdir(evaluated.out / "pictures"))
    limit = gaussad.tail_quantile(e.detector.held_out_scores[:, 1], 0.9)
    for name, sample, heat, mask in zip(names, e.samples, e.maps, e.masks, strict=True):
        picture = np.asarray(Image.open(e.out / "pictures" / name))
        plain, painted = picture[:, :64], picture[:, -64:]
        assert (plain == np.asarray(Image.open(sample.path).convert("RGB"))).all()
        regions = mask.numpy() > 0, heat.numpy() > limit  # their outlines are two pixels wide
        true, predicted = (x & ~erode(x, np.ones((5, 5)), border_value=1) for x in regions)
        assert ((painted == evaluate.TRUE).all(-1) == true).all()
        assert ((painted == evaluate.PREDICTED).all(-1) == predicted & ~true).all()


def test_evaluation_or_training_that_fails_keeps_what_was_there(runs, demo, cli, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    shutil.copytree(demo[1], tmp_path / "data")
    given = ["--data", tmp_path / "data", *demo[2:], "--runs", runs]
    stain, normal = tmp_path / "data/demo/test/stain", tmp_path / "data/demo/train/good"
    train_anew = ["train.py", *given, *TINY, "--force"]
    assert cli("evaluate.py", *given, "--pictures")[0] == 0
    assert cli("evaluate.py", *given[2:], "--images", stain, "--pictures")[0] == 0
    before = contents(runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaussad, "aupro", interrupted)
        assert cli("evaluate.py", *given)[0] == 130
        patch.setattr(gaussad, "fine_tune", interrupted)
        code, _, error = cli(*train_anew)
        assert code == 130 and "interrupted; nothing is saved yet, without --force" in error
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as python -W error
        assert_one_line(cli("evaluate.py", *given), "^evaluate.py: error: demo: .*pixel figures")
        assert_one_line(cli(*train_anew), "^train.py: error: demo: only 32 images to fit")
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for command in (["evaluate.py", *given], train_anew):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))  # as a disk that is full
        result = cli(*command)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert_one_line(result, f"File too large: {runs}/demo/.*(detector|results).*: check this")
    os.truncate(stain / "007.png", 200)  # the last one
    assert_one_line(cli("evaluate.py", *given, "--batch-size", 9), "cannot read .*stain/007.png")
    os.truncate(normal / "003.png", 200)
    assert_one_line(cli(*train_anew), "cannot read .*good/003.png")
    assert contents(runs) == before


def test_contradictions_in_a_data_set_are_told_with_their_count(demo, trained, runs, cli, tmp_path):
    root = shutil.copytree(Path(demo[1], "demo"), tmp_path / "demo")
    test, truth = root / "test", root / "ground_truth"
    for i in range(5):
        shutil.copy(root / f"train/good/{i:03d}.png", test / f"good/{i:03d}.png")
    for i in range(2):
        shutil.copy(test / f"stain/{i:03d}.png", test / f"scratch/again{i}.png")
        draw(truth / f"scratch/again{i}_mask.png", 255)  # as some of transistor's: all of it
    for path in (truth / "good/000_mask.png", test / "stain/000_mask.png"):
        draw(path)
    given = ["evaluate.py", "--category", "demo", "--runs", runs, "--data", tmp_path]
    assert cli(*given)[0] == 0
    assert [re.sub(r"demo: |[;:] .*|\.$| and is.*", "", message) for message in cli.told] == [
        "1 images share the mask of another of the same name",
        "5 of these images were trained on",
        "pixel figures leave out 1 images whose mask is missing or empty",
        "1 masks of good images are ignored",
        "1 masks lie among the images and are scored",
        "2 images lie in a second folder of test/, too",
    ]
    for path in truth.glob("*/00?_mask.png"):
        Image.eval(Image.open(path).convert("L"), lambda value: 255 - value).save(path)
    assert cli(*given)[0] == 0
    inverted = r"demo: 2\d of 2\d masks mark more than half .*are they inverted\?"
    assert any(re.match(inverted, message) for message in cli.told)
    assert cli(*given[:-2], "--images", trained / "data")[0] == 0
    assert cli.told == ["demo: 48 of these images were trained on: their scores mean little"]


def test_several_categories_shared_by_torchrun_are_tabulated_though_one_fails(demo, cli, tmp_path):
    (tmp_path / "data/empty/train/good").mkdir(parents=True)
    for name in ("disc", "plate"):
        shutil.copytree(Path(demo[1], "demo"), tmp_path / "data" / name)
    for lacking in ("test/good", "test/stain", "ground_truth"):
        shutil.rmtree(tmp_path / "data/disc" / lacking)
    given = ["--data", str(tmp_path / "data"), "--runs", str(tmp_path), "--category", "all"]
    options = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "max_restarts": 0}
    launch = LaunchConfig(1, 1, 2, start_method="forkserver", **options)
    with pytest.raises(ChildFailedError) as failed:  # once the other one is done
        elastic_launch(launch, run)("train.py", *given, *TINY, "--steps", "2")
    assert {rank: failure.exitcode for rank, failure in failed.value.failures.items()} == {1: 2}
    code, output, error = cli("evaluate.py", *given)
    assert code == 2 and re.search("no detector .*empty/detector.pt; there are: disc, pl", error)
    assert any("disc: no good test images" in message for message in cli.told)
    disc, plate = (read_metrics(tmp_path / name / "results") for name in ("disc", "plate"))
    assert disc["image_auroc_both"] is disc["pixel_auroc"] is disc["false_alarm_rate"] is None
    rows = {row["category"]: row for row in csv.DictReader((tmp_path / "results.csv").open())}
    assert [*rows] == ["disc", "plate", "mean", "standard_error"]
    assert float(rows["plate"]["aupro"]) == float(rows["mean"]["aupro"]) == plate["aupro"]
    assert rows["disc"]["aupro"] == rows["standard_error"]["aupro"] == ""
    misses = [disc["miss_rate"], plate["miss_rate"]]
    assert float(rows["mean"]["miss_rate"]) == pytest.approx(np.mean(misses))
    error = np.std(misses, ddof=1) / np.sqrt(2)
    assert float(rows["standard_error"]["miss_rate"]) == pytest.approx(error)
    assert re.search(rf"(?m)^mean .* {np.mean(misses):.3f} ", output)


def test_own_images_by_any_name_are_trained_on_and_scored_but_for_one(demo, cli, tmp_path):
    images, stain = tmp_path / "images", Path(demo[1], "demo/test/stain/000.png")
    shutil.copytree(Path(demo[1], "demo/train/good"), images / "in a folder")
    names = ["new\nline größe 寸法.png", "not_text_\udcff.png", "UPPER.PNG", f"{240 * 'n'}.png"]
    for i, name in enumerate([*names, "copy.png"]):
        draw(images / name, 40 + i % 4)
    (images / "dangling.png").symlink_to("nowhere")
    names += ["copy.png", *(f"{i:03d}.png" for i in range(48)), stain.name]
    common = ["--category", "mine größe", "--runs", tmp_path]
    given = ["train.py", "--normal", images, *common, *TINY, "--steps", 0]
    code, output, error = cli(*given)
    assert code == 0 and "evaluate.py --images PATH --category 'mine größe' --runs" in output, error
    told = "skipped 1 .*dangling.* as normal: ., in a folder.*1 of 53 .* copies"
    assert re.search(told, " ".join(cli.told))
    (images / "br\noken_\udcff.png").touch()
    assert_one_line(cli(*given, "--force"), "cannot read .*br oken_")
    given, folder = ["evaluate.py", *common, "--images"], tmp_path / "mine größe/scored"
    result = cli(*given, images, stain, stain, "--pictures")
    assert_one_line(result, "cannot read .*br oken_")
    rows, found = read_scores(folder)
    assert sorted(Path(row["path"]).name for row in rows) == sorted(names)
    assert len(os.listdir(folder / "pictures")) == len(names)
    assert re.search(rf"{found[-1, 0]:.2f} +{rows[-1]['verdict']} +{stain}\n", result[1])
    ranked = sorted(found[:, 0], reverse=True)
    printed = re.findall(r"(?m)^ *(-?\d+\.\d\d) (?:normal|anom)", result[1])
    assert printed == [f"{x:.2f}" for x in ranked]
    n = sum(row["verdict"] == "anomalous" for row in rows)
    words = f"{n} of {len(names)} images are called anomalous"
    page = (folder / "report.html").read_text(encoding="utf-8", errors="surrogateescape")
    assert words in result[1] and words in page and "1 images could not be read." in page
    pictured = re.findall(r"<img .*?: \w+, score (\S+), ", page)  # the most anomalous
    assert pictured == [f"{x:.1f}" for x in ranked[: evaluate.SHOWN]]
    before = contents(folder)
    assert cli(*given, images / "br\noken_\udcff.png")[0] == 2 and contents(folder) == before


def test_network_of_a_python_file_imports_its_neighbour(demo, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, neighbour, path = Path("network.py"), Path("my_layers.py"), list(sys.path)
    neighbour.write_text(
        "from torch import manual_seed, nn\nmanual_seed(1)\nsizes = (3, 8), (8, 12), (12, 16)\n"
        "stages = [nn.Sequential(nn.Conv2d(*x, 5, 2, 2), nn.ReLU()) for x in sizes]\n"
    )
    file.write_text(content := "from my_layers import stages\nmean, std = [0.5] * 3, [0.2] * 3\n")
    given = [*demo, "--backbone", file]
    code, output, error = cli("train.py", *given, "--image-size", 64, "--steps", 2)
    assert code == 0, error
    command = re.search("python (evaluate.py .*)", output)[1].split()  # what it says to do next
    assert str(file) in command and cli(*command)[0] == 0
    assert_one_line(cli("evaluate.py", *demo), "your own network: give its extractor")
    broken = {"1 / 0": "cannot run network.py: ZeroDivisionError: .*; it must define"}
    broken |= {"del std": "cannot run network.py: KeyError", "stages[1] = stages[0]": "module 2"}
    for more, message in broken.items():
        file.write_text(content + more)
        for script, force in (("train.py", ["--force"]), ("evaluate.py", [])):
            code, _, error = cli(script, *given, *force, "--category", "demo", "more")
            lines = f"{script}: error: demo: {message}.*\n{script}: error: more: .*\n"
            assert code == 2 and re.fullmatch(lines, error), error
    file.write_text(content)
    neighbour.write_text(neighbour.read_text().replace("16", "160"))
    assert FeatureExtractor(str(file)).stages[2][0].out_channels == 160  # as it is now
    assert sys.path == path


def test_demo_ends_in_a_detector_better_than_chance_though_its_pipe_is_closed(
    tmp_path, monkeypatch
):
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does
    given = ["--demo", "--image-size", "64", "--steps", "0", "--runs", str(tmp_path)]
    with open(writing, "w") as nobody_reads, pytest.warns(match="only 32 images to fit"):
        monkeypatch.setattr(sys, "stdout", nobody_reads)
        assert train.main(given) == 0
    assert read_metrics(tmp_path / "demo/results")["image_auroc_both"] > 0.7


@pytest.fixture(scope="module")
def broken(demo, trained, tmp_path_factory):
    """A folder of what can be wrong with data and runs."""
    root = tmp_path_factory.mktemp("broken")
    (root / "file").write_text("of text")
    shutil.copytree(Path(demo[1], "demo/test/good"), root / "photos/good")
    for run in ("photos/runs/demo", "old/demo"):
        shutil.copytree(trained / "runs/demo", root / run)
    gaussad.save_plain({"version": 1}, root / "old/demo/checkpoint.pt")
    for name in ("results", "scored/deep"):
        draw(root / "photos/runs/demo" / name / "1.png")
    return root


ON_DEMO = "--data DATA --category demo"


BAD_INPUT = [
    ("train.py --data DATA/demo --category demo", "no categories in .*; try --data .*/demo0$"),
    ("train.py --data DATA --category screw", "screw: no category 'screw'.*there are: demo"),
    ("train.py --data DATA --category ../x", "--category '../x' is not the name of a folder"),
    (f"train.py {ON_DEMO} --backbone own.py", "--weights is for torchvision's networks"),
    (f"train.py {ON_DEMO} --runs ROOT/file", "Not a directory: .*/file/demo.*: check this"),
    (f"train.py {ON_DEMO} --runs DATA/demo/test/good", "lies in .*/test, whose images are re"),
    (f"train.py {ON_DEMO} --runs ROOT/old", "is not of this version of train.py"),
    ("train.py --normal DATA --category a", "looks like a data set: give --data"),
    ("train.py --normal ROOT/photos --category photos/ --runs ROOT", "images are read"),
    ("train.py --normal MINE/demo/scored/deep --category demo --runs MINE", "in results of"),
    ("evaluate.py --images MINE/demo/results --category demo --runs MINE", "in results of"),
    ("evaluate.py --images ROOT/photos --category demo --runs MINE", "images are read"),
    ("evaluate.py --images ROOT/x --category demo --runs RUNS", "/x does not exist"),
    ("evaluate.py --images DATA --category / --runs RUNS", "--category '' is not the name"),
    ("evaluate.py --images DATA --category x --runs RUNS", "x/detector.pt; there are: demo"),
    (f"evaluate.py {ON_DEMO} --runs ROOT", "no detector .*/demo/detector.pt; run train.py"),
]


@pytest.mark.parametrize("given, message", BAD_INPUT)
def test_bad_input_is_told_in_one_line(given, message, broken, demo, trained, cli, tmp_path):
    places = {"ROOT": broken, "MINE": broken / "photos/runs", "DATA": demo[1]}
    for name, path in {**places, "RUNS": trained / "runs"}.items():
        given = given.replace(name, str(path))
    script, *more = given.split()
    options = [*TINY, "--steps", "2"] if script == "train.py" else []
    before = contents(broken) | contents(trained)
    assert_one_line(cli(script, *options, "--runs", tmp_path, *more), message)
    assert contents(broken) | contents(trained) == before and not os.listdir(tmp_path)


# ---- The real thing ----------------------------------------------------------------------------

DATA, WEIGHTS = os.environ.get("GAUSSAD_DATA"), os.environ.get("GAUSSAD_WEIGHTS")
real = pytest.mark.skipif(not (DATA and WEIGHTS), reason="GAUSSAD_DATA or _WEIGHTS is not set")


@real
@torch.inference_mode()
def test_frozen_mobilenet_on_screw_agrees_with_an_independent_program():
    levels = [2, 4, 7, 11, 14, 17, 18, 19]  # what the independent program had
    detector = GaussianAD(FeatureExtractor("mobilenet_v2", levels, WEIGHTS), [14])
    normal, test = (gaussad.list_samples(DATA, "screw", split) for split in ("train", "test"))
    fit, _ = gaussad.hold_out([sample.path for sample in normal])
    detector.fit(gaussad.load_images(fit, 320).split(16))
    images = gaussad.load_images([sample.path for sample in test], 320).split(16)
    scores, maps = map(torch.cat, zip(*map(detector.scores_and_maps, images)))
    masks = torch.zeros(len(test), 320, 320, dtype=torch.bool)
    for mask, sample in zip(masks, test):
        if sample.mask:
            mask[:] = gaussad.load_mask(sample.mask, 320, sample.path)
    labels = torch.tensor([sample.defect != "good" for sample in test])
    assert 100 * gaussad.auroc(scores, labels) == pytest.approx(77.5, abs=2)
    assert 100 * gaussad.auroc(maps, masks) == pytest.approx(98.5, abs=0.5)
    assert 100 * gaussad.aupro(maps, masks) == pytest.approx(93.7, abs=1)
