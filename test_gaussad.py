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


def random_samples(*shape, condition):
    """Samples (..., N, C) whose features have standard deviations from 1 to condition^(-1/2)."""
    rng = np.random.default_rng(0)
    mix, _ = np.linalg.qr(rng.normal(size=(shape[-1], shape[-1])))
    return rng.normal(size=shape) * np.geomspace(1, condition**-0.5, shape[-1]) @ mix


def random_images(n, size=32):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))


# ---- Gaussian ----------------------------------------------------------------------------------


def naive_ledoit_wolf(x):
    """Ledoit and Wolf 2004, section 3.2, term by term with an outer product for each sample."""
    n, c = x.shape
    y = x - x.mean(0)
    s = y.T @ y / n
    norm2 = lambda a: (a * a).sum() / c
    m = np.trace(s) / c
    d2 = norm2(s - m * np.eye(c))
    b2 = min(d2, sum(norm2(np.outer(row, row) - s) for row in y) / n**2)
    return b2 / d2 * m * np.eye(c) + (1 - b2 / d2) * s, b2 / d2


def naive_distance(x, covariance):
    """The Mahalanobis distance of samples (..., N, C) to their mean."""
    y = x - x.mean(-2, keepdims=True)
    return np.sqrt(np.einsum("...ni,...ij,...nj->...n", y, np.linalg.inv(covariance), y))


@pytest.mark.parametrize("n, c, condition", [(12, 40, 1), (40, 40, 1e8), (999, 15, 1e8), (6, 2, 1)])
@pytest.mark.parametrize("reference", ["naive", "sklearn"])
def test_ledoit_wolf_equals_the_paper_and_scikit_learn(n, c, condition, reference):
    oracle = naive_ledoit_wolf
    if reference == "sklearn":
        oracle = pytest.importorskip("sklearn.covariance").ledoit_wolf
    x = random_samples(2, 1, n, c, condition=condition)
    for offset, tolerance in ((0, 1e-10), (1e4, 1e-9)):
        covariance, shrinkage = gaussad.ledoit_wolf(torch.tensor(x + offset))
        for i in range(2):
            expected, expected_shrinkage = oracle(x[i, 0])
            assert relative(covariance[i, 0], expected) < tolerance
            assert abs(shrinkage[i, 0].item() - expected_shrinkage) < tolerance
    assert not gaussad.ledoit_wolf(torch.tensor(x[..., :1]))[1].any()  # one feature is as it is


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


# ---- AUROC and AU-PRO --------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["pairs", "sklearn"])
def test_auroc_counts_pairs_with_ties_as_half_and_equals_scikit_learn(reference):
    rng, n = np.random.default_rng(0), 60 if reference == "pairs" else 10**6
    scores, labels = rng.integers(0, n**0.5 / 2, n) / 7, rng.random(n) < 0.3
    if reference == "pairs":
        pairs = scores[labels][:, None] - scores[~labels]
        expected = ((pairs > 0) + (pairs == 0) / 2).mean()
    else:
        expected = pytest.importorskip("sklearn.metrics").roc_auc_score(labels, scores)
    assert abs(gaussad.auroc(torch.tensor(scores), torch.tensor(labels)) - expected) < 1e-12


def naive_regions(mask):
    """The 8-connected regions of a mask (H, W), each a list of its pixels, by flood fill."""
    left, regions = set(zip(*np.nonzero(mask))), []
    while left:
        regions.append([left.pop()])
        for row, column in regions[-1]:  # which grows meanwhile
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            regions[-1].extend(near)
    return regions


def naive_aupro(maps, masks, limit):
    """Every score a threshold, one after the other; trapezoids, the last one cut at the limit."""
    regions = [(i, *zip(*region)) for i, mask in enumerate(masks) for region in naive_regions(mask)]
    area, x0, y0 = 0.0, 0.0, 0.0
    for threshold in np.unique(maps)[::-1]:
        detected = maps >= threshold
        x = detected[masks == 0].mean()
        y = np.mean([detected[region].mean() for region in regions])
        if x >= limit:
            y = y0 + (y - y0) * (limit - x0) / (x - x0)
            return (area + (limit - x0) * (y0 + y) / 2) / limit
        area, x0, y0 = area + (x - x0) * (y0 + y) / 2, x, y


@pytest.mark.parametrize("distinct", [1, 5, 10**6])  # of normal scores
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_equals_brute_force(distinct, limit):
    rng = np.random.default_rng(0)
    masks = np.zeros((4, 10, 13), bool)
    masks[0, :5, :5] = masks[0, 5:8, 5:9] = True  # they touch by a corner
    masks[1, 4, 4:8:2] = masks[1, 0, 12] = masks[2] = True  # dots; all of a mask
    masks[3] = rng.random((10, 13)) < 0.3
    maps = (rng.integers(0, distinct, masks.shape) / distinct + 0.3 * masks).clip(max=0.7)
    found = gaussad.aupro(torch.tensor(maps), torch.tensor(masks), limit)
    assert found == pytest.approx(naive_aupro(maps, masks, limit), abs=1e-9)
    monotone = torch.tensor(maps).exp().where(torch.tensor(maps < 0.7), torch.inf)
    assert gaussad.aupro(monotone, torch.tensor(masks), limit) == found
    tied = gaussad.aupro(torch.ones(masks.shape), torch.tensor(masks), limit)
    assert tied == pytest.approx(limit / 2, abs=1e-12)  # the diagonal


def test_regions_are_those_of_a_flood_fill():
    masks = np.random.default_rng(0).random((6, 20, 30)) < 0.4
    masks[5] = False
    masks[5, ::2] = masks[5, 1::4, -1] = masks[5, 3::4, 0] = True  # one long serpentine
    for mask in masks:
        labels, regions = gaussad.label_regions(torch.tensor(mask)).numpy(), naive_regions(mask)
        assert ((labels > 0) == mask).all() and len(np.unique(labels[mask])) == len(regions)
        assert all(len({labels[pixel] for pixel in region}) == 1 for region in regions)
    assert len(regions) == 1


# ---- Features ----------------------------------------------------------------------------------

NETWORKS = [
    ("efficientnet_b0", [5, 6, 7, 8, 9], {3: "features.2", 9: "features.8"}, None),
    ("mobilenet_v2", [11, 14, 17, 18, 19], {4: "features.3", 11: "features.10"}, "state_dict"),
    ("resnet18", [4, 5], {1: "relu", 2: "layer1", 3: "layer2", 5: "layer4"}, "model"),
]


@torch.no_grad()
@pytest.mark.parametrize("backbone, default, names, key", NETWORKS)
def test_levels_are_torchvisions_feature_maps(backbone, default, names, key, tmp_path):
    network, outputs, path = models.get_model(backbone).eval(), [], tmp_path / "weights.pth"
    for values in network.state_dict().values():
        if values.ndim == 1:  # batch norm that does something, as after training
            values.uniform_(0.5, 2)
    for name in names.values():
        keep = lambda module, args, output: outputs.append(output.clone())
        network.get_submodule(name).register_forward_hook(keep)
    images = random_images(2)
    network(normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    head = lambda name: name.startswith(("classifier", "fc"))  # of another number of classes
    state = {name: x[:5] if head(name) else x for name, x in network.state_dict().items()}
    bare = {name: x for name, x in state.items() if not head(name)}
    torch.save({key: state, "epoch": 3} if key else bare, path)
    for x, y in zip(FeatureExtractor(backbone, names, path)(images), outputs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * y.abs().max())
    extractor = FeatureExtractor(backbone, weights=path)
    assert extractor.levels == default
    assert not [m for m in extractor.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(p.requires_grad for p in extractor.parameters())
    assert FeatureExtractor(backbone, weights="random")(images)[-1].std(0).mean() > 0.01


def own_stages(width=12):
    """A small network of three stages, of stride 4, 8 and 16, with batch norm."""
    nn, stages = torch.nn, []
    relu = {"forward": lambda self, x: nn.BatchNorm2d.forward(self, x).relu()}
    fused = type("BatchNormAct2d", (nn.BatchNorm2d,), relu)  # as timm has it
    for c, d, stride in ((3, 8, 4), (8, width, 2), (width, 16, 2)):
        layers = [nn.Conv2d(c, d, 3, stride, padding=1), nn.BatchNorm2d(d)]
        stages.append(nn.Sequential(*layers, nn.Conv2d(d, d, 1), fused(d)))
    return stages


@torch.no_grad()
def test_ones_own_network_is_taken_as_it_is(tmp_path):
    stages, images, path = own_stages(), torch.rand(9, 3, 64, 64), tmp_path / "own.pt"
    given = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]}
    extractor = FeatureExtractor(stages, [2, 3], **given)
    expected = torch.nn.Sequential(*stages).eval()(normalize(images, **given))
    torch.testing.assert_close(extractor(images)[1], expected)
    gaussad.fold_batch_norm(folded := deepcopy(extractor))
    torch.testing.assert_close(folded(images)[1], expected)
    assert type(folded.stages[0][1]) is torch.nn.Identity
    assert FeatureExtractor(stages, **given).levels == [3]
    assert FeatureExtractor(stages[:2], **given).levels == [2]  # of stride 8, but the last
    detector = GaussianAD(extractor).fit([images]).calibrate([images])
    detector.save(path)
    loaded = GaussianAD.load(path, extractor=FeatureExtractor(own_stages(), [2, 3], **given))
    assert torch.equal(loaded(images), detector.train()(images))  # with batch norm as it was
    level_3 = FeatureExtractor(own_stages(), [3], **given)
    wider = FeatureExtractor(own_stages(13), [2, 3], **given)
    for other, message in ((None, "extractor"), (level_3, r"levels \[2, 3\]"), (wider, "holds no")):
        with pytest.raises(ValueError, match=message):
            GaussianAD.load(path, extractor=other)


def test_weights_of_another_network_are_refused(tmp_path, monkeypatch):
    state, path = models.get_model(BACKBONE).state_dict(), tmp_path / "weights.pth"
    (name, first), *others = state.items()
    wrong = {"size mismatch": {**state, name: first[:3]}, "own.x": {**state, "own.x": first}}
    wrong |= {name: {"model": dict(others)}, "holds a list": [state]}
    for message, content in wrong.items():
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"weights.pth .*{message}"):
            FeatureExtractor(BACKBONE, weights=path)
    monkeypatch.delattr(models, "get_model")  # as a download that breaks
    with pytest.raises(ConnectionError, match="get_model.*checkpoints: delete it"):
        FeatureExtractor(BACKBONE)


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
    assert torch.equal(scores, detector(images))


@torch.no_grad()
def test_anomaly_score_is_both_standardised_over_the_images_held_out(fitted):
    detector, images = GaussianAD(fitted[0].extractor).fit([fitted[1]]), torch.rand(5, 3, 64, 128)
    held_out, expected = torch.rand(12, 3, 64, 128), 0
    assert detector.calibrate(held_out.split(5)) is detector
    usual, found = (detector.scores_and_maps(x) for x in (held_out, images))
    for of in (lambda scores, maps: scores, lambda scores, maps: maps.amax((1, 2))):
        expected += (of(*found) - of(*usual).mean()) / of(*usual).std()
    assert relative(detector.anomaly_score(*found), expected) < 1e-4
    for rate in (0.05, 0.1):
        expected = gaussad.tail_quantile(detector.anomaly_score(*usual), 1 - rate)
        assert detector.threshold(rate) == pytest.approx(expected, rel=1e-3)


def test_tail_quantile_keeps_the_false_alarm_rate_of_few_and_of_many():
    rng = np.random.default_rng(0)
    draw = lambda *shape: 40 + 5 * rng.gamma(20, size=shape) / 20**0.5
    future = draw(10**4)
    for n, tolerance in ((6, 0.02), (64, 0.01), (2000, 0.003)):
        found = [gaussad.tail_quantile(torch.tensor(scores), 0.95) for scores in draw(400, n)]
        alarms = (future[:, None] > np.array(found)).mean()
        assert alarms == pytest.approx(0.05, abs=tolerance)
    few = [gaussad.tail_quantile(x, 0.95) for x in torch.empty(9000, 16).exponential_()]
    assert np.exp(-np.array(few)).mean() == pytest.approx(0.05, abs=0.002)  # exact for its model
    far = torch.tensor([gaussad.tail_quantile(x, 0.99) for x in torch.randn(900, 200)])
    assert torch.special.ndtr(-far).mean().item() == pytest.approx(0.01, abs=0.002)
    assert gaussad.tail_quantile(torch.tensor(future), 0.5) == pytest.approx(np.median(future))


@torch.no_grad()
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_saved_detector_is_the_same_to_the_bit(default, tmp_path):
    path, images = tmp_path / "detector.pt", random_images(40)
    try:
        torch.set_default_dtype(default)
        AugmentationValidator(images, augmentations=gaussad.AUGMENTATIONS)
        extractor = FeatureExtractor(BACKBONE, [2, 4], "random")
        detector = GaussianAD(extractor, np.array([4]), "diagonal")
        detector.fit_and_calibrate(images[:30].split(10), images[30:])
        detector.save(path, note="mine", state=0, detector=0)
        before = torch.get_rng_state()
        loaded = GaussianAD.load(path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    for found, expected in zip(loaded.scores_and_maps(images), detector.scores_and_maps(images)):
        assert torch.equal(found, expected)
    assert loaded.threshold() == detector.threshold()
    assert all(p.requires_grad for p in loaded.parameters())  # it can be trained on
    assert gaussad.load_plain(path)["note"] == "mine" and os.listdir(tmp_path) == [path.name]


def test_altered_file_is_refused_and_no_code_in_it_is_run(fitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitted[0].save("detector.pt")
    content = gaussad.load_plain("detector.pt")
    no_tensor = {**content["state"], "map_gaussian.mean": 3}
    malicious = type("Malicious", (), {"__reduce__": lambda self: (os.mkdir, ("executed",))})()
    for more in ({"detector": "text"}, {"state": {}}, {"state": no_tensor}, {"more": malicious}):
        torch.save({**content, **more}, "detector.pt")
        with pytest.raises(ValueError, match="detector.pt (holds no|is not a)"):
            GaussianAD.load("detector.pt")
    assert os.listdir() == ["detector.pt"]


# ---- Augmentation validator --------------------------------------------------------------------


def black_and_white(n, size):
    """Noise of 0 and 255, which nothing else equals, and its mean colour."""
    noise = 255 * (random_images(n, size) > 127).byte()
    return noise, noise.double().mean((2, 3), keepdim=True).round().byte()


def test_cutout_and_cutmix_fill_one_square():
    noise, mean = black_and_white(60, 100)
    other, mixed = noise.roll(1, 0), gaussad.mixup(noise)
    assert (mixed >= noise.minimum(other)).all() and (mixed <= noise.maximum(other)).all()
    for augment, filling in ((gaussad.cutout, mean), (gaussad.cutmix, other)):
        found = augment(noise)
        changed = (found != noise).any(1)
        rows, columns = changed.any(2), changed.any(1)
        inside = rows[:, None, :, None] & columns[:, None, None]
        assert torch.equal(found, torch.where(inside, filling, noise))
        cut = rows[:, [0, -1]].any(1) | columns[:, [0, -1]].any(1)  # by the border
        height, width = rows.sum(1)[~cut], columns.sum(1)[~cut]
        assert ((height - width).abs() <= 1).all()
        assert 0.001 < (height * width).min() / 100**2 < 0.005
        assert 0.05 < (height * width).max() / 100**2 < 0.107


def test_scar_fills_one_thin_rectangle_at_any_angle():
    noise, mean = black_and_white(60, 400)
    angles, shades = [], []
    for image, found, colour in zip(noise, gaussad.scar(noise), mean):
        changed = (image != found).any(0)
        shades.append((found[0, changed] > 100).all().item())
        assert (found[:, changed] == (colour if shades[-1] else colour // 2)[:, 0]).all()
        if not (changed[[0, -1]].any() or changed[:, [0, -1]].any()):  # cut by the border
            points = changed.nonzero().double()
            axes = torch.linalg.svd(points - points.mean(0), full_matrices=False)[2]
            length, width = np.ptp((points @ axes.T).numpy(), axis=0)
            assert 0.1 * 400 - 2 < length < 0.35 * 400 + 2 and 1 < width < 0.025 * 400 + 2
            assert len(points) > 0.8 * length * width  # solid
            angles.append(torch.atan2(*axes[0]).item() % np.pi)
    assert {int(angle / np.pi * 3) for angle in angles} == {0, 1, 2} and 0.2 < np.mean(shades) < 0.8


def test_validator_draws_once_from_its_seed_and_blends_by_each_opacity():
    images, before = random_images(6), torch.get_rng_state()
    augmentations = {**gaussad.AUGMENTATIONS, "negative": lambda x: 255 - x}
    draw = lambda seed: AugmentationValidator(images, seed, 11, augmentations).augmented
    one, same, other = map(draw, (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for name in gaussad.AUGMENTATIONS:
        assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
        assert one[name].dtype == torch.uint8 and not torch.equal(*one[name].split(18))
    versions = one["negative"].double().view(2, 3, *images.shape)  # two draws of three opacities
    opacity = torch.tensor([1, 0.5, 0.25]).view(3, 1, 1, 1, 1)
    expected = images + opacity * (255 - 2 * images.double())
    assert (versions - expected).abs().max() <= 0.5


def spread(batch):
    """A score with ties that has nothing to do with a detector."""
    return batch.double().std((1, 2, 3)).round(decimals=1)


def comparisons(validator, score):
    """Of each augmentation C[i, j], 1 where version j scores above image i and ½ where they tie,
    and the image that each version is of: the one with which it shares most of its pixels."""
    normal, found = validator.normal, []
    for versions in validator.augmented.values():
        owner = [(normal != version).flatten(1).sum(1).argmin().item() for version in versions]
        scores = score(versions).tolist()
        C = [[(of > x) + (of == x) / 2 for of in scores] for x in score(normal).tolist()]
        found.append((np.array(C), np.array(owner)))
    return found


def test_validation_is_that_of_its_definition():
    validator = AugmentationValidator(random_images(12), n_augmented=24)
    found, influences = validator(spread, batch_size=7), []
    for auroc, (C, owner) in zip(found.aurocs.values(), comparisons(validator, spread)):
        assert (C == 0.5).any() and (np.bincount(owner) == 2 * 3).all()
        assert auroc == pytest.approx(C.mean(), abs=1e-12)
        own = [C[:, owner == i].mean() for i in range(12)]
        influences.append(C.mean(1) + own - 2 * C.mean())
    assert np.abs(found.influence.numpy() - np.mean(influences, 0)).max() < 1e-12
    assert found.auroc == pytest.approx((found.aurocs["cutout"] + found.aurocs["scar"]) / 2)


def test_standard_error_of_a_gain_is_that_of_leaving_images_out():
    validator = AugmentationValidator(random_images(60, 16), n_augmented=120)
    tuned = lambda batch: spread(batch) + spread(batch[:, :1])
    gain, error = validator(tuned).gain_over(validator(spread))
    pairs = list(zip(comparisons(validator, tuned), comparisons(validator, spread)))

    auroc = lambda i, C, owner: C[np.arange(60) != i][:, owner != i].mean()  # without image i
    gain_without = lambda i: np.mean([auroc(i, *new) - auroc(i, *old) for new, old in pairs])
    assert gain == pytest.approx(gain_without(None), abs=1e-12)
    expected = np.sqrt(59 * np.var([gain_without(i) for i in range(60)]))
    assert error == pytest.approx(expected, rel=0.1)


# ---- Fine-tuning -------------------------------------------------------------------------------


@pytest.fixture
def task():
    """A detector, normal images in a loader that shuffles, and images held out."""
    torch.manual_seed(0)
    images = random_images(30)
    loader = DataLoader(TensorDataset(images[:20], torch.zeros(20)), 7, shuffle=True)
    return GaussianAD(FeatureExtractor(BACKBONE, [2, 4], "random")), loader, images[20:]


def test_steps_are_adams_on_the_mean_score_by_the_pretrained_gaussians(task):
    detector, loader, held_out = task
    reference, losses, told = deepcopy(detector), [], []
    with gaussad.seeded(3):
        reference.fit(loader)
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3)
    for check in (2, 4):
        with gaussad.seeded(3 + check):
            batches = [images for images, _ in loader][:2]
        for images in batches:
            optimizer.zero_grad()
            loss = reference(images).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    on_step = lambda step, loss: told.append((step, loss))
    checks = list(fine_tune(detector, loader, held_out, 4, lr=1e-3, seed=3, on_step=on_step))
    assert told == list(enumerate(losses, start=1))
    assert [check.loss for check in checks] == [None, np.mean(losses[:2]), np.mean(losses[2:])]
    assert all(map(torch.equal, detector.parameters(), reference.parameters()))


def test_check_validates_and_a_kept_one_is_fitted_to_all_and_calibrated(task, monkeypatch):
    detector, loader, held_out = task
    gains, kept, checks = iter([(0.1, 0.1), (0.2, 0.1), (-0.5, 0.1), (0.1, 0.2)]), [], []

    def gain_over(validation, best):
        assert torch.equal(best.influence, kept[-1].influence)
        return next(gains)

    monkeypatch.setattr(gaussad.Validation, "gain_over", gain_over)
    for check in fine_tune(detector, loader, held_out, 10**6, lr=1e-3, patience=2, seed=3):
        checks.append((check.step, check.kept, check.gain))
        expected = GaussianAD(detector.extractor).fit([loader.dataset.tensors[0]])
        validation = AugmentationValidator(held_out, seed=3)(expected)
        assert check.validation.aurocs == pytest.approx(validation.aurocs, abs=1e-3)
        if check.kept:
            kept.append(check.validation)
            scores = expected.calibrate([held_out]).held_out_scores
            assert relative(detector.held_out_scores, scores) < 1e-4
            expected.fit([loader.dataset.tensors[0], held_out])
        else:
            with pytest.raises(ValueError, match="not calibrated.*load the last detector kept"):
                detector.threshold()
        with torch.no_grad():
            for pair in zip(detector.scores_and_maps(held_out), expected.scores_and_maps(held_out)):
                assert relative(*pair) < 1e-4
        assert len(str(check)) < 500 and "state" not in str(check)  # it can be printed
    assert checks[:2] == [(0, True, None), (2, False, 0.1)]  # not more than its standard error
    assert checks[2:] == [(4, True, 0.2), (8, False, -0.5), (16, False, 0.1)]


def test_any_check_is_resumed_bit_identically_by_a_detector_in_any_condition(task):
    detector, loader, held_out = task
    given, start = {"steps": 5, "lr": 1e-3, "patience": 9, "seed": 5}, deepcopy(detector)
    checks = list(fine_tune(detector, loader, held_out, **given))
    assert [check.step for check in checks] == [0, 2, 4, 5]
    other = deepcopy(detector).fit([random_images(9, 64)])
    figures = lambda check: (check.step, check.kept, check.loss, check.gain, check.standard_error)
    for i, check in enumerate(checks[:3]):
        for again in map(deepcopy, (start, other)):  # from one and the same state
            torch.rand(7)  # what the caller draws in between changes nothing
            rest = list(fine_tune(again, loader, held_out, state=check.state, **given))
            assert list(map(figures, rest)) == list(map(figures, checks[i + 1 :]))
            for pair in zip(again.scores_and_maps(held_out), detector.scores_and_maps(held_out)):
                assert torch.equal(*pair)


def test_without_steps_there_is_one_check_and_divergence_is_told_after_it(task):
    [check] = fine_tune(*task, steps=0, augmentations=gaussad.AUGMENTATIONS)
    assert check.kept and list(check.validation.aurocs) == list(gaussad.AUGMENTATIONS)
    checks = fine_tune(*task, steps=4, lr=1e30)
    assert next(checks).kept and task[0].threshold()
    with pytest.raises(ValueError, match="not finite|do not vary"):
        next(checks)


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


@torch.no_grad()
def test_exported_detector_scores_without_this_module():
    detector, images = GaussianAD(FeatureExtractor(BACKBONE, [1, 2], "random")), random_images(9)
    expected = detector.fit([images]).scores_and_maps(images)
    detector.forward, batch = detector.scores_and_maps, {0: torch.export.Dim("batch")}
    program = torch.export.export(detector, (images[:5],), dynamic_shapes=(batch,)).module()
    torch.testing.assert_close(program(images), expected)


# ---- Errors ------------------------------------------------------------------------------------


@torch.no_grad()
def with_nan(detector):
    next(detector.parameters())[0] = torch.nan
    return detector


def judged(detector, images):
    return detector.anomaly_score(*detector.scores_and_maps(images))


def tuned(detector, images, **given):
    return list(fine_tune(detector, images, random_images(3), **given))


ERRORS = [
    (lambda d, x: Gaussian.fit(torch.rand(2, 3)), "three samples"),
    (lambda d, x: Gaussian.fit(5 + 3e-8 * torch.rand(5, 3).double()), "do not vary"),
    (lambda d, x: Gaussian.fit(torch.tensor([[1.0, 0], [-1, 0]]).repeat(2, 1)), "do not vary"),
    (lambda d, x: gaussad.ledoit_wolf(torch.rand(1, 3)), "two samples"),
    (lambda d, x: gaussad.auroc(x, 0 * x), "both classes"),
    (lambda d, x: gaussad.aupro(x[:, 0], 0 * x[:, 0]), "anomalous and normal"),
    (lambda d, x: FeatureExtractor("efficientnet-b4"), "did you mean efficientnet_b4"),
    (lambda d, x: FeatureExtractor(own_stages()), "mean and std"),
    (lambda d, x: FeatureExtractor([torch.nn.Flatten()], mean=3 * [0], std=3 * [1]), "maps"),
    (lambda d, x: GaussianAD(d.extractor, [3]), r"\[3\] are not among \[2, 4, 9\]"),
    (lambda d, x: GaussianAD(d.extractor, covariance="none"), "full, diagonal or identity"),
    (lambda d, x: GaussianAD(d.extractor)(x), "is not fitted"),
    (lambda d, x: d(x.long()), "uint8 or in"),
    (lambda d, x: d(255 * x), r"in \[0, 1\]"),
    (lambda d, x: d(x[..., :32]), "was fitted to"),
    (lambda d, x: d.fit([x, x[..., :32]]), r"\[64, 128\] and \[64, 32\]"),
    (lambda d, x: with_nan(d).fit([x]), "features are not finite"),
    (lambda d, x: with_nan(d).calibrate([x]), "three held-out images that differ"),
    (lambda d, x: d.calibrate([x[:2]]), "three held-out images"),
    (lambda d, x: d.calibrate([x[:1].expand(3, -1, -1, -1)]), "images that differ"),
    (lambda d, x: judged(d, x), "not calibrated"),
    (lambda d, x: judged(with_nan(d.calibrate([x])), x), "scores are not finite"),
    (lambda d, x: d.held_out_scores.resize_(3, 2).fill_(torch.nan) is d.threshold(), "not finite"),
    (lambda d, x: d.calibrate([x]).threshold(0), "quantile"),
    (lambda d, x: gaussad.tail_quantile(torch.ones(0), 0.5), "at least one score"),
    (lambda d, x: tuned(d, [x], steps=-1), "at least 0"),
    (lambda d, x: tuned(d, [x], lr=torch.nan), "finite"),
    (lambda d, x: tuned(d, [x], patience=0), "patience"),
    (lambda d, x: AugmentationValidator(random_images(2)), "three held-out images"),
    (lambda d, x: AugmentationValidator(x), "uint8"),
    (lambda d, x: tuned(d, iter([random_images(9)]), steps=1), "not an iterator"),
    (lambda d, x: AugmentationValidator(random_images(3))(lambda b: spread(b) / 0), "not finite"),
    (lambda d, x: gaussad.hold_out(range(5)), "too few"),
]


@pytest.mark.parametrize("call, message", ERRORS)
def test_what_cannot_be_done_is_told(call, message, fitted):
    with pytest.raises(ValueError, match=message):
        call(deepcopy(fitted[0]), fitted[1])


# ---- Files: cameras, masks, folders ------------------------------------------------------------

GRAY = (np.indices((40, 60)).sum(0) * 255 // 98).astype(np.int32)  # 0 to 255
PICTURE = Image.fromarray(GRAY.astype(np.uint8))
two = lambda: {"save_all": True, "append_images": [PICTURE.rotate(180)]}  # in one file
DEFECT = np.zeros((50, 70), bool)
DEFECT[10:20, 30:60] = True
# An orientation in EXIF that is a text, one that is 0 / 0, and two that are no EXIF.
TEXT = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0006\0\0\0\0\0\0\0"
RATIO = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\x1a" + bytes(16)
BROKEN_EXIF = {"text": TEXT, "ratio": RATIO, "none": b"Exif\0\0none", "cut": TEXT[:18]}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_images_of_any_kind_become_the_same_rgb(tmp_path):
    for suffix in ("png", "jfif", "jp2", "TGA"):
        PICTURE.save(tmp_path / f"a.{suffix}", quality=100)
    for mode in ("RGB", "RGBA", "LA", "P"):
        PICTURE.convert(mode).save(tmp_path / f"{mode}.png")
    for name, exif in BROKEN_EXIF.items():
        PICTURE.save(tmp_path / f"{name}.jpg", quality=100, exif=exif)
        PICTURE.save(tmp_path / f"{name}.png", exif=exif)  # Pillow raises other errors here
    PICTURE.save(tmp_path / "phone.jpg", "MPO", quality=100, **two())
    for dtype in (np.uint16, np.int32):
        Image.fromarray((GRAY * 257).astype(dtype)).save(tmp_path / f"{dtype.__name__}.tif")
    expected = gaussad.load_image(tmp_path / "a.png", 32).int()
    assert expected.shape == (3, 32, 32)
    assert gaussad.load_image(tmp_path / "a.png", (20, 30)).shape == (3, 20, 30)
    assert len(paths := gaussad.list_images([tmp_path])) == 19
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
    files += [
        ("it holds 2 pict", saved(PICTURE, x, **two())) for x in ("GIF", "TIFF", "WEBP", "PNG")
    ]
    bitmap = saved(PICTURE, "BMP")  # its sides are bytes 18 to 25
    files += [("exceeds limit", bitmap[:18] + 2 * b"\xff\xff\0\0" + bitmap[26:])]
    odd = (GRAY * 257 - 300, GRAY * 514, GRAY.astype(np.float32))
    deep = [("its pixels are not from 0 to 65535", saved(x)) for x in odd]
    dark = [GRAY * (2**bits - 1) // 255 for bits in (8, 10, 12, 14)]
    dark = [base64.b64decode(PNG), *map(saved, dark), *(saved(x.astype(np.uint16)) for x in dark)]
    deep += [("convert all images to 8 bits", content) for content in dark]
    for load, refused in ((gaussad.load_image, files + deep), (gaussad.load_mask, files)):
        for message, content in refused:
            (tmp_path / "a.png").write_bytes(content)
            with pytest.raises(ValueError, match=f"cannot read .*/a.png: .*{message}"):
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


def test_no_pixel_of_a_defect_vanishes_when_its_mask_is_made_smaller(tmp_path):
    for i in (0, 300, 511, 1023):
        mask = np.zeros((1024, 1024), bool)
        mask[i, 1023 - i] = True
        Image.fromarray(mask).save(tmp_path / "dot.png")
        found = gaussad.load_mask(tmp_path / "dot.png", 380)
        assert found[i * 380 // 1024, (1023 - i) * 380 // 1024]


def test_image_and_mask_are_each_turned_by_their_own_exif(tmp_path):
    mask, exif, turned = drawn(255, 0, "L"), Image.Exif(), tmp_path / "turned.png"
    mask.save(tmp_path / "upright.png")
    ratio = b"\x1a\x01\x0a\0\1\0\0\0\x26" + bytes(7) + b"\xff\xff\xff\xff" + bytes(4)  # -1 / 0
    broken = b"Exif\0\0II*\0\x08\0\0\0\2\0\x12\x01\3\0\1\0\0\0\6\0\0\0" + ratio
    for exif[0x0112], turn in ((3, "ROTATE_180"), (5, "TRANSPOSE"), (6, "ROTATE_90"), (0, "")):
        image = mask.transpose(Image.Transpose[turn or "ROTATE_90"])
        image.save(turned, exif=exif if turn else broken)
        assert np.array_equal(gaussad.load_image(turned, DEFECT.shape)[0] > 0, DEFECT)
        for path in (tmp_path / "upright.png", turned):
            assert np.array_equal(gaussad.load_mask(path, DEFECT.shape, turned), DEFECT)


def draw(path, value=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (64, 64), value).save(path)
    return path


def test_samples_and_their_masks_are_found_by_the_conventions(tmp_path):
    images = ["a.png", "b.jpg", "c.png", "d.PNG", "deep/e.webp", "f.1.png", "g.png"]
    masks = ["a_mask.png", "b.png", "c.bmp", "d_mask.PNG", "deep/e_mask.tif", "f.1/000.png"]
    for path in [*(f"test/cut/{x}" for x in images), *(f"ground_truth/cut/{x}" for x in masks)]:
        draw(tmp_path / "part" / path)
    draw(tmp_path / "part/ground_truth/cut/f.1/001.png", 0)
    for place in (tmp_path / "part/test/cut/deep", tmp_path / "part/ground_truth/cut/deep"):
        place.symlink_to(place.rename(tmp_path / f"linked_{place.parent.parent.name}"))
    for other in ("train/Good/a", "train/bad/a", "test/GOOD/a", "test/ok/a", "test/cut/.hidden/a"):
        draw(tmp_path / f"part/{other}.png")
    (tmp_path / "part/test/cut/.hidden.png").touch()
    draw(tmp_path / "part/test/.hidden/a.png")
    (tmp_path / "part/test/cut/notes.txt").touch()
    assert [s.defect for s in gaussad.list_samples(tmp_path, "part", "train")] == ["good"]
    with pytest.warns(UserWarning) as told:
        found = gaussad.list_samples(tmp_path, "part", "test")
    told = str([*map(str, told)])
    assert re.search(r"skipped 1 files .*\(.txt\), such as notes.txt.*ok is treated as", told)
    assert [sample.defect for sample in found] == ["good"] + 7 * ["cut"] + ["ok"]
    assert [s.path for s in found[1:8]] == [tmp_path / "part/test/cut" / x for x in images]
    assert all(gaussad.load_mask(s.mask, 32, s.path).all() for s in found[1:7])
    assert not found[0].mask and not found[7].mask


def test_links_lead_to_each_image_once_and_those_that_lead_nowhere_are_told(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "deep/b.png")
    links = {"one": ".", "two": tmp_path, "same.png": "a.png", "lost.png": "none", "self": "self"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    given = [tmp_path, tmp_path / "a.png", str(tmp_path / "same.png"), tmp_path / "deep"]
    with pytest.warns(UserWarning, match=r"skipped 2 files .*\(, .png\), such as lost.png"):
        assert gaussad.list_images(given) == [tmp_path / "a.png", tmp_path / "deep/b.png"]


@pytest.mark.parametrize("written, asked", [("NFC", "NFD"), ("NFD", "NFC")])
def test_category_is_found_by_either_form_of_its_name(written, asked, tmp_path):
    written, asked = (unicode_form(form, "größe") for form in (written, asked))
    draw(tmp_path / written / "train/good/a.png")
    draw(tmp_path / ".trash/train/good/a.png")
    assert gaussad.list_categories(tmp_path) == [written]
    assert len(gaussad.list_samples(tmp_path, asked, "train")) == 1
    with pytest.raises(ValueError, match="no category 'x' in .*; there are: größe"):
        gaussad.list_samples(tmp_path, "x", "train")
    with pytest.raises(ValueError, match=f"--data {tmp_path}$"):  # the category given for the root
        gaussad.list_categories(tmp_path / written)


def test_held_out_are_a_fifth_but_sixteen_or_half():
    for n, held in ((6, 3), (7, 3), (40, 16), (320, 64)):
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
    """Run a script; its exit code, output and errors."""

    def call(*given):
        with pytest.raises(SystemExit) as stop:
            run(*given)
        return stop.value.code, *capfd.readouterr()

    return call


def assert_one_line(result, message):
    code, _, error = result
    assert code == 2 and error.count("\n") == 1 and re.search(message, error), error


def read_scores(folder):
    """The rows of scores.csv, and of each the anomaly score, the pooled one, the map's maximum."""
    with (folder / "scores.csv").open(newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    return rows, np.array([list(row.values())[-3:] for row in rows], float)


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The options that name a small data set."""
    root = tmp_path_factory.mktemp("demo")
    train.draw_demo(root, size=64)
    (root / "demo/ground_truth/stain/003_mask.png").unlink()
    return ["--data", str(root), "--category", "demo"]


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """A folder where train.py has run, on data without test images."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(Path(demo[1], "demo/train"), root / "data/demo/train")
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.warns(UserWarning, match="only 32 images to fit"),
    ):
        patch.chdir(root)
        assert train.main(["--data", "data", "--category", "demo", *TINY, "--steps", "3"]) == 0
    return root


@pytest.fixture(scope="module")
def evaluated(trained, demo, tmp_path_factory):
    """What evaluate.py writes, and what the library says of the same images."""
    out, runs = tmp_path_factory.mktemp("evaluated"), trained / "runs"
    given = ["--model", str(runs), "--out", str(out), "--pictures", "--false-alarms", "0.1"]
    with pytest.warns(UserWarning, match="leave out 1 images whose mask is missing"):
        assert evaluate.main([*demo, *given]) == 0
    rows, found = read_scores(out)
    detector = GaussianAD.load(runs / "demo/detector.pt")
    samples = gaussad.list_samples(demo[1], "demo", "test")
    with torch.no_grad():
        images = gaussad.load_images([sample.path for sample in samples], 64)
        scores, maps = detector.scores_and_maps(images)
    return SimpleNamespace(
        out=out,
        metrics=read_json(out / "metrics.json"),
        rows=rows,
        found=found,
        samples=samples,
        detector=detector,
        scores=scores,
        maps=maps,
        labels=np.array([sample.defect != "good" for sample in samples]),
        masks=torch.stack([evaluate.load(sample, [64, 64], True)[3] for sample in samples]),
    )


def test_train_writes_the_detector_that_the_library_makes_and_its_history(trained, demo):
    history = read_json(trained / "runs/demo/history.json")
    content = gaussad.load_plain(trained / "runs/demo/detector.pt")
    assert content["training"].pop("state") is None and content["training"]["finished"]
    assert content["training"].items() <= history.items()
    paths = [sample.path for sample in gaussad.list_samples(demo[1], "demo", "train")]
    fit, held_out = map(torch.stack, gaussad.hold_out(gaussad.load_images(paths, 64)))
    torch.manual_seed(0)
    detector = GaussianAD(FeatureExtractor(BACKBONE, [4, 9], "random"))
    checks = gaussad.fine_tune(detector, DataLoader(fit, 16, shuffle=True), held_out, steps=3)
    for check, written in zip(checks, history["checks"], strict=True):
        for key in ("step", "loss", "kept", "gain", "standard_error"):
            assert getattr(check, key) == written[key]
        assert check.validation.auroc == written["auroc"]
        assert check.validation.aurocs == written["auroc_per_augmentation"]
        if check.kept:
            step, best = check.step, deepcopy(detector.state_dict())
    assert history["best_step"] == step and best.keys() == content["state"].keys()
    assert all(torch.equal(best[key], content["state"][key]) for key in best)


def test_evaluate_writes_scores_verdicts_and_what_thresholds_give(evaluated, trained):
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
    for defect, rate in e.metrics["miss_rate_per_defect"].items():
        assert rate == np.mean([not x for x, s in zip(above, e.samples) if s.defect == defect])
    content = (trained / "runs/demo/detector.pt").read_bytes()
    assert e.metrics["detector_sha256"] == hashlib.sha256(content).hexdigest()
    assert e.metrics["backbone"] == BACKBONE and e.metrics["image_size"] == [64, 64]


def test_words_count_what_is_found_missed_and_rejected(evaluated):
    e, sample = evaluated, lambda defect: gaussad.Sample(Path("x"), defect, None)
    verdicts = {"good": [1, 0, 0], "cut": [1, 0, 0, 1], "dent": [0], "hole": [1]}
    images = [
        evaluate.Scored(sample(kind), kind != "good", None, None, above, 0, 0, None, 0.5, [])
        for kind, scores in verdicts.items()
        for above in scores
    ]
    metrics = {"expected_false_alarms": 0.05, "at_false_alarms": {"0.1": {"miss_rate": 1 / 3}}}
    words = evaluate.in_words(images, metrics)
    for part in (
        "3 of 6 defective",
        "1 of 3 good",
        "at 5 %",
        "2 of 4 cut, 1 of 1 dent",
        "10 % expected, 2 ",
    ):
        assert part in words
    assert "missed" not in evaluate.in_words(images[:1], e.metrics)


def test_aurocs_of_evaluate_are_scikit_learns(evaluated):
    auroc, e = pytest.importorskip("sklearn.metrics").roc_auc_score, evaluated
    keys = ("image_auroc_both", "image_auroc", "image_auroc_from_map")
    for key, values in zip(keys, e.found.T):
        assert e.metrics[key] == pytest.approx(auroc(e.labels, values), abs=1e-12)
    for defect, value in e.metrics["image_auroc_per_defect"].items():
        chosen = np.array([sample.defect in ("good", defect) for sample in e.samples])
        expected = auroc(e.labels[chosen], e.found[chosen, 0])
        assert value == pytest.approx(expected, abs=1e-12)
    known = [i for i, sample in enumerate(e.samples) if sample.mask or sample.defect == "good"]
    maps, masks = e.maps[known], e.masks[known]
    expected = auroc(masks.flatten(), maps.flatten())
    assert len(known) == 39 and e.metrics["pixel_auroc"] == pytest.approx(expected, abs=1e-6)
    assert e.metrics["aupro"] == pytest.approx(gaussad.aupro(maps, masks), abs=1e-4)


def test_report_and_pictures_show_the_figures_and_the_regions_true_and_predicted(evaluated):
    e, folder = evaluated, evaluated.out / "pictures"
    page = (e.out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"http|<script|<link|src=\"(?!data:)", page)  # needs no other file
    assert all(f"{100 * e.metrics[key]:.1f} %" in page for key in evaluate.FIGURES)
    right = [(row["verdict"] == "anomalous") == (row["label"] == "1") for row in e.rows]
    kinds = [right[:16].count(True), right[:16].count(False)]  # the first 16 are good
    kinds += [right[16:].count(True), right[16:].count(False)]
    assert page.count("<img ") == sum(min(evaluate.SHOWN, n) for n in kinds)
    assert len(os.listdir(folder)) == 40
    i = max(range(16, 40), key=lambda i: e.maps[i].max())
    name = f"{i + 1:03d}_{e.samples[i].defect}_{e.samples[i].path.name}"
    picture = np.asarray(Image.open(folder / name))
    plain, painted = picture[:, :64], picture[:, -64:]
    assert (plain == np.asarray(Image.open(e.samples[i].path).convert("RGB"))).all()
    predicted = e.maps[i] > gaussad.tail_quantile(e.detector.held_out_scores[:, 1], 0.9)
    for colour, region in ((evaluate.TRUE, e.masks[i]), (evaluate.PREDICTED, predicted)):
        outline = (painted == colour).all(-1)
        assert outline.any() and not (outline & ~region.numpy()).any()


def run_until_killed(*given):
    """A run of train.py that is killed after its second check is written."""

    def killed(*arguments, whole=gaussad.fine_tune, **options):
        for check in whole(*arguments, **options):
            if check.step > 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield check

    gaussad.fine_tune = killed
    run("train.py", *given)


def test_run_that_is_killed_is_resumed_to_the_same_bits(trained, demo, cli, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    given = ["--data", trained / "data", *demo[2:], *TINY, "--steps", 3, "--out", tmp_path]
    process = multiprocessing.get_context("forkserver").Process(target=run_until_killed, args=given)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = gaussad.load_plain(tmp_path / "detector.pt")["training"]["checks"]
    code, output, error = cli("evaluate.py", *demo, "--out", tmp_path)
    assert code == 0 and "is not finished" in output, error
    with (tmp_path / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_one_line(cli("train.py", *given), "another train.py is running in")
    (tmp_path / ".detector.pt.123.part").touch()  # of a kill at another moment
    code, output, _ = cli("train.py", *given)
    assert code == 0 and re.findall(r"(?m)^ +(\d+) ", output) == ["0", "2", "3"]
    assert "resumed from step 2" in output and not list(tmp_path.glob(".*.part"))
    a, b = (gaussad.load_plain(path / "detector.pt") for path in (trained / "runs/demo", tmp_path))
    assert all(torch.equal(a["state"][key], b["state"][key]) for key in a["state"])
    assert b["training"]["checks"][: len(before)] == before  # their seconds, too
    for check in a["training"]["checks"] + b["training"]["checks"]:
        del check["seconds"]
    assert a["training"] == b["training"]


def test_run_that_is_interrupted_says_where_it_goes_on(demo, cli, tmp_path, monkeypatch):
    def interrupted(*arguments, whole=gaussad.fine_tune, **options):
        yield next(whole(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(gaussad, "fine_tune", interrupted)
    code, _, error = cli("train.py", *demo, *TINY, "--out", tmp_path)
    assert code == 130 and error.endswith("the same command goes on from step 0\n")


def test_finished_run_is_left_alone_and_every_other_setting_is_another_run(demo, cli, tmp_path):
    torch.save(models.get_model(BACKBONE).state_dict(), tmp_path / "a.pth")
    shutil.copy(tmp_path / "a.pth", tmp_path / "b.pth")  # by another name it is the same run
    shutil.copytree(Path(demo[1], "demo/train"), tmp_path / "demo/train")
    given = ["--data", tmp_path, "--category", "demo", *TINY, "--steps", 0, "--out", tmp_path]
    for more, finished in (
        (["--device", "cpu"], False),
        (["--device", "auto"], True),
        (demo[:2], True),  # the same images elsewhere
        (["--force"], False),
        (["--weights", tmp_path / "a.pth"], False),
        (["--weights", tmp_path / "b.pth"], True),
        (["--seed", 1], False),
    ):
        code, output, error = cli("train.py", *given, *more)
        assert code == 0 and ("is finished" in output) == finished, error
    draw(tmp_path / "demo/train/good/000.png", 9)  # another photo in place of one
    assert "is finished" not in cli("train.py", *given)[1]


def test_run_that_diverges_ends_in_one_line_with_the_best_detector_saved(demo, cli, tmp_path):
    given = ["train.py", *demo, *TINY, "--steps", 4, "--lr", 1e30, "--out", tmp_path]
    for _ in range(2):  # it is resumed, and diverges again
        assert_one_line(cli(*given), "not finite: lower the learning rate")
        history = read_json(tmp_path / "history.json")
        assert not history["finished"] and history["best_step"] == 0
    assert GaussianAD.load(tmp_path / "detector.pt").threshold() > 0


def test_results_of_an_earlier_detector_and_old_pictures_are_removed(demo, trained, tmp_path):
    shutil.copytree(trained / "runs/demo", tmp_path / "run")
    (tmp_path / "run/pictures").mkdir()
    (tmp_path / "run/pictures/mine.png").touch()
    given = [*demo, "--out", str(tmp_path / "run")]
    assert evaluate.main([*given, "--pictures"]) == 0
    old = tmp_path / "run/pictures/999_good_old.png"
    old.touch()
    assert evaluate.main([*given, "--pictures"]) == 0 and not old.exists()
    assert len(os.listdir(tmp_path / "run/pictures")) == 41
    model = ["--model", str(tmp_path / "run/detector.pt"), "--pictures"]
    assert evaluate.main([*model, "--images", str(Path(demo[1], "demo/test/stain"))]) == 0
    assert evaluate.main([*model[:2], "--images", str(Path(demo[1], "demo/test/good"))]) == 0
    assert not os.listdir(tmp_path / "run/scored/pictures")
    assert train.main([*given, *TINY, "--steps", "0"]) == 0
    left = {path.name for path in (tmp_path / "run").rglob("*")}
    assert left == {".lock", "detector.pt", "history.json", "pictures", "mine.png", "scored"}


def test_several_categories_shared_by_torchrun_are_tabulated_though_one_fails(demo, cli, tmp_path):
    (tmp_path / "data/empty/train/good").mkdir(parents=True)
    for name in ("disc", "plate"):
        shutil.copytree(Path(demo[1], "demo"), tmp_path / "data" / name)
    for lacking in ("test/good", "test/stain", "ground_truth"):
        shutil.rmtree(tmp_path / "data/disc" / lacking)
    draw(tmp_path / "data/disc/ground_truth/scratch/003_mask.png", 0)
    given = ["--data", str(tmp_path / "data"), "--category", "all", "--out", str(tmp_path / "runs")]
    options = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "max_restarts": 0}
    launch = LaunchConfig(1, 1, 2, start_method="forkserver", **options)
    with pytest.raises(ChildFailedError) as failed:  # once the other one is done
        elastic_launch(launch, run)("train.py", *given, *TINY, "--steps", "2")
    assert {rank: failure.exitcode for rank, failure in failed.value.failures.items()} == {1: 2}
    with pytest.warns(UserWarning, match="disc: no good test images"):
        code, _, error = cli("evaluate.py", *given)
    assert code == 2 and "no detector of 'empty' in" in error
    tmp_path /= "runs"
    disc, plate = (read_json(tmp_path / name / "metrics.json") for name in ("disc", "plate"))
    assert disc["image_auroc_both"] is disc["pixel_auroc"] is disc["false_alarm_rate"] is None
    assert disc["n_without_mask"] == 16 and plate["n_without_mask"] == 1
    _, mean, error = read_json(tmp_path / "results.json").values()
    assert mean["aupro"] == plate["aupro"] and error["aupro"] is None
    values = [disc["miss_rate"], plate["miss_rate"]]
    assert mean["miss_rate"] == pytest.approx(np.mean(values))
    assert error["miss_rate"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(2))
    rows = list(csv.reader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row[0] for row in rows[1:]] == ["disc", "plate", "mean", "standard_error"]
    assert float(rows[2][1]) == plate[rows[0][1]]
    assert "href='plate/report.html'" in (tmp_path / "results.html").read_text()
    (tmp_path / "results.csv").unlink()
    (tmp_path / "plate/metrics.json").unlink()  # as one of several, and by the folder of all
    assert cli("evaluate.py", *given[:2], "--category", "plate", "--out", tmp_path)[0] == 0
    assert read_json(tmp_path / "plate/metrics.json") | {"date": 0} == plate | {"date": 0}
    assert cli("evaluate.py", *given[:4], "--model", tmp_path)[0] == 2
    assert (tmp_path / "results.csv").exists()


def test_own_images_by_any_name_are_trained_on_and_scored_but_for_one(demo, cli, tmp_path):
    images, stain = tmp_path / "images", Path(demo[1], "demo/test/stain/000.png")
    shutil.copytree(Path(demo[1], "demo/train/good"), images / "in a folder")
    names = ["new\nline größe 寸法.png", "not_text_\udcff.png", "UPPER.PNG", f"{240 * 'n'}.png"]
    for i, name in enumerate(names):
        draw(images / name, i)
    draw(images / "copy.png", 0)
    (images / "dangling.png").symlink_to("nowhere")
    (images / "._003.png").write_text("not an image")
    names += ["copy.png", *(f"{i:03d}.png" for i in range(48)), stain.name]
    given = ["train.py", "--normal", images, "--out", tmp_path / "run", *TINY, "--steps", 0]
    with pytest.warns(UserWarning) as told:
        assert cli(*given)[0] == 0
    told = str([*map(str, told)])
    assert re.search("skipped 1 .*dangling.* as normal: ., in a folder.*1 of 53 .* copies", told)
    result = cli("train.py", "--normal", demo[1], "--out", tmp_path / "run")
    assert_one_line(result, "looks like a data set: give --data")
    (images / "br\noken_\udcff.png").touch()
    assert_one_line(cli(*given), "cannot read .*br oken_")
    given = ["evaluate.py", "--model", tmp_path / "run/detector.pt", "--images"]
    result = cli(*given, images, stain, stain, "--pictures")
    assert_one_line(result, "cannot read .*br oken_")
    rows, found = read_scores(tmp_path / "run/scored")
    assert sorted(Path(row["path"]).name for row in rows) == sorted(names)
    assert len(os.listdir(tmp_path / "run/scored/pictures")) == len(names)
    assert re.search(rf"{found[-1, 0]:.2f} +{rows[-1]['verdict']} +{stain}\n", result[1])
    printed = [float(x) for x in re.findall(r"(?m)^ *(-?\d+\.\d\d) (?:normal|anom)", result[1])]
    assert printed == sorted(printed, reverse=True)  # the worst first
    n = sum(row["verdict"] == "anomalous" for row in rows)
    assert f"{n} of {len(names)} images are called anomalous" in result[1]
    cli(*given, images / "br\noken_\udcff.png")
    assert len(read_scores(tmp_path / "run/scored")[0]) == len(names)  # and not lost


def test_network_of_a_python_file_and_a_detector_that_is_not_square(demo, cli, tmp_path):
    file, name = tmp_path / "network.py", f"{gaussad.__name__}, torch, test_gaussad"
    file.write_text(
        f"import {name}\ntorch.manual_seed(1)\nstages = test_gaussad.own_stages()\n"
        "mean, std = [0.5] * 3, [0.2] * 3\n"
    )
    given = [*demo, "--out", tmp_path / "run", "--backbone", file]
    code, output, error = cli("train.py", *given, "--image-size", 64, "--steps", 2)
    assert code == 0, error
    command = re.search("python (evaluate.py .*)", output)[1].split()  # what it says to do next
    assert cli(*command)[0] == 0 and command[-1] == str(file)
    assert_one_line(cli("evaluate.py", *given[:-2]), "your own network: give its extractor")
    paths = [sample.path for sample in gaussad.list_samples(demo[1], "demo", "train")]
    images = torch.stack([gaussad.load_image(path, (64, 128)) for path in paths])
    detector = GaussianAD(FeatureExtractor(BACKBONE, [4, 9], "random"))
    detector.fit_and_calibrate([images[:32]], images[32:]).save(tmp_path / "wide.pt")
    code, _, error = cli("evaluate.py", *demo, "--model", tmp_path / "wide.pt", "--out", tmp_path)
    assert code == 0 and read_json(tmp_path / "metrics.json")["image_size"] == [64, 128], error


def test_masks_that_contradict_their_images_are_told(demo, trained, cli, tmp_path):
    shutil.copytree(Path(demo[1], "demo"), tmp_path / "demo")
    truth = tmp_path / "demo/ground_truth"
    for i in range(2):
        path = truth / f"scratch/{i:03d}_mask.png"
        Image.fromarray(255 - np.asarray(Image.open(path).convert("L"))).save(path)
    draw(truth / "good/000_mask.png", 255)
    draw(tmp_path / "demo/test/stain/000_mask.png", 255)
    given = ["--data", tmp_path, "--category", "demo", "demo", "--out", tmp_path / "out"]
    with pytest.warns(UserWarning) as told:
        code, _, error = cli("evaluate.py", *given, "--model", trained / "runs")
    assert code == 0, error
    told = [str(warning.message) for warning in told]
    for expected in (
        "2 masks mark more",
        "1 masks of good images are ignored",
        "1 masks lie among",
    ):
        assert sum(expected in message for message in told) == 1, told
    Image.new("L", (64, 32), 255).save(truth / "stain/001_mask.png")
    result = cli("evaluate.py", *given, "--model", trained / "runs")
    assert_one_line(result, "stain/001_mask.png: the mask is 64 x 32, the image 64 x 64")


def test_scores_that_are_not_finite_are_no_verdict(demo, trained, cli, tmp_path):
    content = gaussad.load_plain(trained / "runs/demo/detector.pt")
    for key in ("held_out_scores", "extractor.mean"):
        altered = {**content, "state": {**content["state"]}}
        altered["state"][key] = torch.full_like(content["state"][key], torch.nan)
        gaussad.save_plain(altered, tmp_path / "nan.pt")
        given = ["--images", demo[1], "--model", tmp_path / "nan.pt", "--out", tmp_path / "out"]
        given[1] = Path(demo[1], "demo/test/stain")
        assert_one_line(cli("evaluate.py", *given), "not finite: .*nan.pt")
        assert not (tmp_path / "out").exists()


def test_demo_ends_in_a_detector_better_than_chance(tmp_path):
    given = ["--demo", "--image-size", "64", "--steps", "0"]
    assert train.main([*given, "--out", str(tmp_path)]) == 0
    assert read_json(tmp_path / "metrics.json")["image_auroc_both"] > 0.7


@pytest.fixture(scope="module")
def broken(demo, tmp_path_factory):
    """A folder of what can be wrong with data, weights and runs."""
    root = tmp_path_factory.mktemp("broken")
    (root / "empty/train/good").mkdir(parents=True)
    shutil.copytree(Path(demo[1], "demo/train"), root / "truncated/train")
    os.truncate(root / "truncated/train/good/003.png", 200)
    torch.save(models.get_model(BACKBONE).state_dict(), root / "weights.pth")
    (root / "file").write_text("of text")
    for name in ("file", "weights.pth"):
        (root / "runs" / name).mkdir(parents=True)
        shutil.copy(root / name, root / "runs" / name / "detector.pt")
    return root


@pytest.mark.parametrize(
    "given, message",
    [
        ("train.py --data ROOT/nowhere", "no categories in .*nowhere"),
        ("train.py --data DATA/demo", "no categories in .*; try --data"),
        ("train.py --category screw", "no category 'screw'.*there are: demo"),
        ("train.py --data ROOT --category empty", "no images in .*empty/train/good"),
        ("train.py --data ROOT --category truncated", "truncated/train/good/003.png"),
        ("train.py --levels 0 3", "the levels 1 to 13"),
        ("train.py --steps -1", "--steps must be from 0"),
        ("train.py --lr inf", "--lr must be from 0"),
        ("train.py --image-size 10000", "--image-size must be from 32 to 4096"),
        ("train.py --normal DATA/nowhere", "not allowed with argument"),
        ("train.py --backbone mobilenet_v22", "did you mean mobilenet_v2"),
        ("train.py --weights ROOT/weights.pth --backbone resnet18", "not a state dict of resnet18"),
        ("train.py --out ROOT/file", "--out .*file is a file: give a folder"),
        ("train.py --out ROOT/file/run", "Not a directory: .*file/run"),
        ("train.py --out DATA/demo/test/good", "lies in .*demo/test, whose images are read"),
        ("train.py --out ROOT/runs/file", "detector.pt is not a file saved by torch.save"),
        ("train.py --out ROOT/runs/weights.pth", "was not written by train.py"),
        ("train.py --normal ROOT", "not allowed with argument"),
        ("evaluate.py --model RUN --data ROOT --category empty", "'demo', not of 'empty'"),
        ("evaluate.py --model RUN --data RUN/../../data", "demo/test"),  # what it was trained from
        ("evaluate.py --model RUN --out DATA/demo/train", "lies in .*, whose images are read"),
        ("evaluate.py --model ROOT/runs --category x", "of 'x' in .*: file, weights.pth"),
        ("evaluate.py --model RUN --false-alarms 5", "between 0 and 1"),
        ("evaluate.py --model RUN --image-size 5", "the detector knows its size"),
        ("evaluate.py --model RUN/detector.pt --category a b", "is no folder of <category>"),
        ("train.py --dem", "one of the arguments|not allowed|unrecognized"),
    ],
)
def test_bad_input_is_told_in_one_line(given, message, broken, demo, trained, cli, tmp_path):
    for name, path in {"ROOT": broken, "DATA": demo[1], "RUN": trained / "runs/demo"}.items():
        given = given.replace(name, str(path))
    script, *more = given.split()
    options = [*TINY, "--steps", "2", "--out", tmp_path] if script == "train.py" else []
    assert_one_line(cli(script, *demo, *options, *more), message)


def test_output_among_the_images_that_are_read_is_refused(demo, trained, cli, tmp_path):
    shutil.copytree(Path(demo[1], "demo/train/good"), tmp_path / "photos")
    model, photos = trained / "runs/demo/detector.pt", tmp_path / "photos"
    for out in (photos, photos / "deep/run"):
        assert_one_line(cli("train.py", "--normal", photos, "--out", out, *TINY), "whose images")
        result = cli("evaluate.py", "--images", photos, "--model", model, "--out", out)
        assert_one_line(result, "whose images")
    assert len(os.listdir(photos)) == 48
    beside = tmp_path / "photos and more"
    result = cli("evaluate.py", "--images", photos, "--model", model, "--out", beside)
    assert result[0] == 0


def test_error_with_a_line_break_in_a_file_name_is_one_line(capsys):
    train.print_error(NotADirectoryError(20, "Not a directory", "a\nb"))
    assert capsys.readouterr().err.endswith(
        "Not a directory: a b: check this path, or give another\n"
    )
    with pytest.raises(ZeroDivisionError):
        train.print_error(ZeroDivisionError())


def test_full_disk_keeps_what_was_there(trained, demo, cli, tmp_path):
    resource = pytest.importorskip("resource")
    path, before = tmp_path / "detector.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    shutil.copy(trained / "runs/demo/detector.pt", path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # bytes of a file, at most
        for script, more in (("train.py", [*TINY, "--steps", 0]), ("evaluate.py", [])):
            result = cli(script, *demo, "--out", tmp_path, *more)
            assert_one_line(result, f"File too large: {tmp_path}/(detector.pt|scores.csv): check")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == (trained / "runs/demo/detector.pt").read_bytes()
    assert not list(tmp_path.glob(".*.part"))


# ---- The real thing ----------------------------------------------------------------------------

NAMED = {"GAUSSAD_DATA", "GAUSSAD_WEIGHTS"} <= os.environ.keys()
real = pytest.mark.skipif(not NAMED, reason="GAUSSAD_DATA and GAUSSAD_WEIGHTS are not set")


@real
@torch.inference_mode()
def test_frozen_mobilenet_on_screw_agrees_with_an_independent_program():
    data, weights = os.environ["GAUSSAD_DATA"], os.environ["GAUSSAD_WEIGHTS"]
    normal = [sample.path for sample in gaussad.list_samples(data, "screw", "train")]
    fit, _ = gaussad.hold_out(normal, 0)
    test = gaussad.list_samples(data, "screw", "test")
    levels = [2, 4, 7, 11, 14, 17, 18, 19]  # what the independent program had
    detector = GaussianAD(FeatureExtractor("mobilenet_v2", levels, weights), [14])
    detector.fit(gaussad.load_images(fit, 320).split(16))
    images = gaussad.load_images([sample.path for sample in test], 320).split(16)
    scores, maps = map(torch.cat, zip(*[detector.scores_and_maps(batch) for batch in images]))
    found = gaussad.auroc(scores, torch.tensor([s.defect != "good" for s in test]))
    assert 100 * found == pytest.approx(77.5, abs=2)
    masks = torch.zeros(len(test), 320, 320, dtype=torch.bool)
    for mask, sample in zip(masks, test):
        if sample.mask:
            mask[:] = gaussad.load_mask(sample.mask, 320, sample.path)
    assert 100 * gaussad.auroc(maps, masks) == pytest.approx(98.5, abs=0.5)
    assert 100 * gaussad.aupro(maps, masks) == pytest.approx(93.7, abs=1)


@real
@torch.inference_mode()
def test_efficientnet_lite0_on_transistor_through_ones_own_network(monkeypatch):
    shared, data = Path(os.environ["GAUSSAD_WEIGHTS"]).parent.parent, os.environ["GAUSSAD_DATA"]
    monkeypatch.syspath_prepend(shared / "tools")
    lite = pytest.importorskip("efficientnet_lite")
    extractor = FeatureExtractor(list(lite.lite0().features), mean=lite.MEAN, std=lite.STD)
    assert extractor.levels == [5, 6, 7, 8, 9]
    normal, test = (gaussad.list_samples(data, "transistor", split) for split in ("train", "test"))
    fit, held_out = gaussad.hold_out(gaussad.load_images([s.path for s in normal], 256))
    detector = GaussianAD(extractor)
    detector.fit_and_calibrate(torch.stack(fit).split(16), torch.stack(held_out))
    images = gaussad.load_images([sample.path for sample in test], 256).split(16)
    found = [detector.scores_and_maps(batch) for batch in images]
    labels = torch.tensor([sample.defect != "good" for sample in test])
    pooled = gaussad.auroc(torch.cat([scores for scores, _ in found]), labels)
    both = gaussad.auroc(torch.cat([detector.anomaly_score(*pair) for pair in found]), labels)
    assert 100 * pooled == pytest.approx(97.2, abs=1) and both > 0.99
