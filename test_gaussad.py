# SPDX-License-Identifier: MIT
"""Every test: the maths against independent references, the command lines by running them.

    python -m pytest

runs offline on the CPU on drawn data and random weights. With GAUSSAD_DATA (an MVTec AD root with
screw in it) and GAUSSAD_WEIGHTS (a state dict of mobilenet_v2) it also runs on the real thing.
"""

import csv
import gc
import json
import os
import pickle
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # networks here are too small to gain by more threads

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models

import evaluate
import gaussad
import train
from gaussad import FeatureExtractor, Gaussian, GaussianAD, Moments

HERE = Path(__file__).parent
BACKBONE = "mobilenet_v3_small"
TINY = ["--backbone", BACKBONE, "--weights", "random", "--image-size", "64"]


@pytest.fixture(autouse=True)
def seeds():
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


def random_samples(*shape, condition=1.0, offset=0.0, seed=0):
    """Samples (..., N, C) whose features have standard deviations from 1 to condition^(-1/2)."""
    rng = np.random.default_rng(seed)
    mix, _ = np.linalg.qr(rng.normal(size=(shape[-1], shape[-1])))
    return offset + rng.normal(size=shape) * np.geomspace(1, condition**-0.5, shape[-1]) @ mix


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))


# ------------------------------------------------------------------------------------------------
# Gaussian
# ------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("n, c, condition", [(12, 40, 1), (40, 40, 1e8), (999, 15, 1e8), (2, 5, 1)])
@pytest.mark.parametrize("reference", ["naive", "sklearn"])
def test_ledoit_wolf_equals_the_paper_and_scikit_learn(n, c, condition, reference):
    oracle = naive_ledoit_wolf
    if reference == "sklearn":
        oracle = pytest.importorskip("sklearn.covariance").ledoit_wolf
    x = random_samples(n, c, condition=condition)
    covariance, shrinkage = gaussad.ledoit_wolf(torch.tensor(x))
    expected, expected_shrinkage = oracle(x)
    assert relative(covariance, expected) < 1e-10
    assert abs(shrinkage.item() - expected_shrinkage) < 1e-10


def test_leading_dimensions_are_independent_gaussians():
    x = torch.tensor(random_samples(2, 3, 20, 6))
    covariance, shrinkage = gaussad.ledoit_wolf(x)
    gaussian = Gaussian.fit(Moments().add(x))
    distance = gaussian.distance(x.permute(2, 0, 1, 3))
    assert covariance.shape == (2, 3, 6, 6) and shrinkage.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        one, one_shrinkage = gaussad.ledoit_wolf(x[i, j])
        assert relative(covariance[i, j], one) < 1e-12
        assert relative(shrinkage[i, j], one_shrinkage) < 1e-12
        alone = Gaussian.fit(Moments().add(x[i, j])).distance(x[i, j])
        assert relative(distance[:, i, j], alone) < 1e-10


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_do_not_depend_on_the_batches(offset):
    x = torch.tensor(random_samples(2, 97, 10, condition=1e4, offset=offset))
    x[:, 0] += 30  # an outlier that comes first or last
    whole, whole_shrinkage = gaussad.ledoit_wolf(x - offset)
    parts = x.split([1, 1, 48, 47], dim=1)
    for order in (parts, parts[::-1]):
        moments = Moments()
        for part in order:
            moments.add(part)
        covariance, shrinkage = moments.ledoit_wolf()
        assert relative(covariance, whole) < 1e-9
        assert relative(shrinkage, whole_shrinkage) < 1e-9
        assert relative(moments.mean, x.mean(1)) < 1e-12


def test_samples_that_fit_no_gaussian_are_errors():
    for of_too_few in (Moments(), Moments().add(torch.ones(1, 3))):
        with pytest.raises(ValueError, match="two samples"):
            of_too_few.ledoit_wolf()
    with pytest.raises(ValueError, match="three samples"):
        Gaussian.fit(Moments().add(torch.rand(2, 3)))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN"):
            gaussad.ledoit_wolf(torch.tensor([[1.0, 2.0], [bad, 0.0]]))
    for rounding in (0, 3e-8):
        same = 5 + rounding * torch.randn(5, 3, dtype=torch.float64)
        with pytest.raises(ValueError, match="do not vary"):
            Gaussian.fit(Moments().add(same))
    with pytest.raises(ValueError, match="not positive definite"):
        gaussad.whitening_matrix(torch.ones(2, 2))


@pytest.mark.parametrize("covariance", ["diagonal", "identity"])
def test_ablated_covariances(covariance):
    x = random_samples(50, 8, condition=1e4)
    variance = np.diag(naive_ledoit_wolf(x)[0]) if covariance == "diagonal" else 1
    expected = np.sqrt(((x - x.mean(0)) ** 2 / variance).sum(1))
    gaussian = Gaussian.fit(Moments().add(torch.tensor(x)), covariance=covariance)
    assert relative(gaussian.distance(torch.tensor(x)), expected) < 1e-10


def test_distance_is_mahalanobis_and_its_gradient_is_finite_at_the_mean():
    x = random_samples(50, 8, condition=1e4)
    gaussian = Gaussian.fit(Moments().add(torch.tensor(x)))
    y = x - x.mean(0)
    covariance, _ = naive_ledoit_wolf(x)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", y, np.linalg.inv(covariance), y))
    assert relative(gaussian.distance(torch.tensor(x)), expected) < 1e-10
    at_mean = gaussian.mean.clone()[None].requires_grad_()
    gaussian.distance(at_mean).sum().backward()
    assert at_mean.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_of_any_scale_are_finite_and_zero_at_the_mean(scale, dtype):
    x = torch.tensor(scale * random_samples(2, 3, 30, 5, condition=1e3), dtype=dtype)
    x[..., 2] = 7 * scale  # one feature that does not vary
    gaussian = Gaussian.fit(Moments().add(x))
    for samples in (x, x + 1e3 * scale):
        assert gaussian.distance(samples.movedim(-2, 0)).isfinite().all()
    assert not gaussian.distance(gaussian.mean[None]).any()


# ------------------------------------------------------------------------------------------------
# AUROC
# ------------------------------------------------------------------------------------------------


def test_auroc_counts_pairs_with_ties_as_half():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 60) / 3, rng.random(60) < 0.4
    pairs = scores[labels][:, None] - scores[~labels][None]
    expected = ((pairs > 0) + (pairs == 0) / 2).mean()
    assert gaussad.auroc(torch.tensor(scores), torch.tensor(labels)) == pytest.approx(expected)
    assert gaussad.auroc(torch.zeros(4), torch.tensor([0, 1, 1, 0])) == 0.5


def test_auroc_equals_scikit_learn_on_a_million_tied_scores():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 500, 10**6) / 7, rng.random(10**6) < 0.1
    expected = metrics.roc_auc_score(labels, scores)
    assert abs(gaussad.auroc(torch.tensor(scores), torch.tensor(labels)) - expected) < 1e-12


def test_auroc_of_what_has_none_is_an_error():
    for labels in ([1, 1], [0, 0], [0, 2], [0, 1, 1]):
        with pytest.raises(ValueError, match="AUROC"):
            gaussad.auroc(torch.tensor([1.0, 2.0]), torch.tensor(labels))
    with pytest.raises(ValueError, match="NaN"):
        gaussad.auroc(torch.tensor([1.0, float("nan")]), torch.tensor([0, 1]))


# ------------------------------------------------------------------------------------------------
# AU-PRO
# ------------------------------------------------------------------------------------------------


def naive_regions(mask):
    """The 8-connected regions of a mask (H, W), each a list of its pixels, by flood fill."""
    left, regions = set(zip(*np.nonzero(mask))), []
    while left:
        region, edge = [], [left.pop()]
        while edge:
            row, column = edge.pop()
            region.append((row, column))
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            edge.extend(near)
        regions.append(region)
    return regions


def naive_aupro(maps, masks, limit):
    """Every score a threshold, one after the other; trapezoids, the last one cut at the limit."""
    regions = [[(i, *pixel) for pixel in region]
               for i, mask in enumerate(masks) for region in naive_regions(mask)]  # fmt: skip
    area, x0, y0 = 0.0, 0.0, 0.0
    for threshold in np.unique(maps)[::-1]:
        told = maps >= threshold
        x = told[masks == 0].mean()
        y = np.mean([np.mean([told[pixel] for pixel in region]) for region in regions])
        if x >= limit:
            y = y0 + (y - y0) * (limit - x0) / (x - x0)
            return (area + (limit - x0) * (y0 + y) / 2) / limit
        area, x0, y0 = area + (x - x0) * (y0 + y) / 2, x, y


def random_masks(kind, rng):
    masks = np.zeros((4, 14, 17), bool)
    if kind == "touching":  # by a corner: one region
        masks[0, :5, :5] = masks[0, 5:8, 5:9] = masks[2, 3, 3] = True
    if kind == "tiny":
        masks[1, 4, 4] = masks[1, 4, 6] = masks[3, 0, 16] = True
    if kind == "filling":
        masks[2], masks[1, 2:4, :] = True, True
    if kind == "random":
        masks = rng.random(masks.shape) < 0.3
    return masks


@pytest.mark.parametrize("kind", ["touching", "tiny", "filling", "random"])
@pytest.mark.parametrize("distinct", [5, 10**6])  # many ties, and none
def test_aupro_equals_brute_force(kind, distinct):
    rng = np.random.default_rng(0)
    for limit in (0.05, 0.3, 1.0):
        masks = random_masks(kind, rng)
        maps = rng.integers(0, distinct, masks.shape) / distinct + 0.3 * masks
        found = gaussad.aupro(torch.tensor(maps), torch.tensor(masks), limit)
        assert found == pytest.approx(naive_aupro(maps, masks, limit), abs=1e-9)


def test_regions_are_those_of_a_flood_fill():
    masks = np.random.default_rng(0).random((6, 20, 30)) < 0.4
    masks[5] = False
    masks[5, ::2] = masks[5, 1::4, -1] = masks[5, 3::4, 0] = True  # one long serpentine
    labels = gaussad.label_regions(torch.tensor(masks)).numpy()
    regions = [(i, region) for i, mask in enumerate(masks) for region in naive_regions(mask)]
    assert ((labels > 0) == masks).all() and sum(i == 5 for i, _ in regions) == 1
    numbers = [{labels[(i, *pixel)] for pixel in region} for i, region in regions]
    assert all(len(number) == 1 for number in numbers)
    assert len(set.union(*numbers)) == len(regions)


def test_aupro_takes_equal_infinities_as_ties():
    maps, masks = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)
    maps[0, ::2], masks[0, :2, :2] = 9, True
    expected = gaussad.aupro(maps, masks, 1.0)
    assert gaussad.aupro(maps.where(maps == 0, torch.inf), masks, 1.0) == expected


def test_aupro_of_what_has_none_is_an_error():
    maps, masks = torch.rand(2, 4, 4), torch.eye(4).expand(2, 4, 4)
    for wrong, message in ((masks * 0, "anomalous and normal pixels"), (masks / 2, "0 and 1"),
                           (masks * 0 + 1, "anomalous and normal pixels"),
                           (masks[..., :3], r"\(N, H, W\)")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            gaussad.aupro(maps, wrong)
    with pytest.raises(ValueError, match="NaN"):
        gaussad.aupro(maps * torch.nan, masks)
    with pytest.raises(ValueError, match="limit"):
        gaussad.aupro(maps, masks, 0.0)


# ------------------------------------------------------------------------------------------------
# Features
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone, levels", [
    ("efficientnet_b0", [5, 6, 7, 8, 9]), ("mobilenet_v2", [11, 14, 17, 18, 19]),
    ("resnet18", [4, 5]),
])  # fmt: skip
def test_default_levels_and_no_batch_norm(backbone, levels):
    with torch.device("meta"):
        extractor = FeatureExtractor(backbone, weights="random")
    assert extractor.levels == levels
    assert not [m for m in extractor.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(p.requires_grad for p in extractor.parameters())


def normalised(images):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean[:, None, None]) / std[:, None, None]


def with_statistics(network):
    """With batch norm that does something, as after training."""
    for module in network.eval().modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.running_var, module.weight.data):
                values.uniform_(0.5, 2)
            for values in (module.running_mean, module.bias.data):
                values.normal_()
    return network


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["efficientnet_b0", "mobilenet_v3_small"])
def test_levels_are_torchvisions_feature_maps(backbone, tmp_path):
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    network = with_statistics(models.get_model(backbone))
    without_classifier = {k: v for k, v in network.state_dict().items() if "classifier" not in k}
    torch.save(without_classifier, tmp_path / "weights.pth")
    maps = FeatureExtractor(backbone, [3, 9], tmp_path / "weights.pth")(images)
    for level, found in zip([3, 9], maps):
        expected = network.features[:level](normalised(images / 255))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_levels_of_a_resnet_are_its_stem_and_stages(tmp_path):
    network, outputs = with_statistics(models.get_model("resnet18")), []
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    for module in (network.relu, network.layer1, network.layer2, network.layer3, network.layer4):
        module.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    images = torch.rand(2, 3, 64, 64)
    network(normalised(images))
    maps = FeatureExtractor("resnet18", [1, 2, 3, 4, 5], tmp_path / "weights.pth")(images)
    for found, expected in zip(maps, outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def own_stages():
    """A small network of three stages, of stride 4, 8 and 16, with batch norm."""
    conv = lambda c, d, stride: torch.nn.Sequential(
        torch.nn.Conv2d(c, d, 3, stride, 1), torch.nn.BatchNorm2d(d), torch.nn.ReLU())
    return [conv(3, 8, 4), conv(8, 12, 2), conv(12, 16, 2)]


@torch.no_grad()
def test_ones_own_network_is_taken_as_it_is(tmp_path):
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.2, 0.3]
    stages, images = own_stages(), torch.rand(9, 3, 64, 64)
    extractor = FeatureExtractor(stages, [2, 3], mean=mean, std=std)
    x = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    expected = torch.nn.Sequential(*stages).eval()(x)
    torch.testing.assert_close(extractor(images)[1], expected)
    assert FeatureExtractor(stages, mean=mean, std=std).levels == [3]
    detector = GaussianAD(extractor).fit([images]).calibrate([images])
    detector.save(tmp_path / "own.pt")
    again = FeatureExtractor(own_stages(), [2, 3], mean=mean, std=std)
    assert torch.equal(GaussianAD.load(tmp_path / "own.pt", extractor=again)(images),
                       detector(images))  # fmt: skip
    for other in (None, FeatureExtractor(own_stages(), [3], mean=mean, std=std)):
        with pytest.raises(ValueError, match="own.pt is not .* the extractor given"):
            GaussianAD.load(tmp_path / "own.pt", extractor=other)
    with pytest.raises(ValueError, match="mean and std"):
        FeatureExtractor(own_stages())
    with pytest.raises(ValueError, match="feature maps"):
        FeatureExtractor([torch.nn.Flatten()], mean=mean, std=std)


# ------------------------------------------------------------------------------------------------
# Detector
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    images = torch.rand(24, 3, 64, 64)
    return GaussianAD(FeatureExtractor(BACKBONE, [2, 4, 9], "random")).fit(images.split(5)), images


@torch.no_grad()
def test_score_is_the_sum_of_distances_of_pooled_features(fitted):
    detector, images = fitted
    expected = 0
    for features in detector.extractor(images):
        x = features.double().mean((2, 3)).numpy()
        covariance, _ = naive_ledoit_wolf(x)
        y = x - x.mean(0)
        expected = expected + np.sqrt(np.einsum("ni,ij,nj->n", y, np.linalg.inv(covariance), y))
    assert relative(detector(images), expected) < 1e-4  # features are float32
    assert detector.loss(images).item() == pytest.approx(expected.mean(), rel=1e-4)


@torch.no_grad()
def test_map_is_the_distance_at_each_location_resized_and_summed(fitted):
    detector, images = fitted
    assert detector.map_levels == [9]  # of stride 16
    detector = GaussianAD(detector.extractor, [4, 9]).fit(images.split(7))
    expected = 0
    for features in detector.extractor(images)[1:]:
        x = features.double().permute(2, 3, 0, 1).numpy()
        found = np.array([[naive_ledoit_wolf(at)[0] for at in row] for row in x])
        floor = gaussad.MAP_FLOOR * np.trace(found, axis1=2, axis2=3).mean() / x.shape[-1]
        inverse = np.linalg.inv(found + floor * np.eye(x.shape[-1]))
        y = x - x.mean(2, keepdims=True)
        distance = torch.tensor(np.sqrt(np.einsum("hwni,hwij,hwnj->nhw", y, inverse, y)))
        expected = expected + torch.nn.functional.interpolate(
            distance[:, None], (64, 64), mode="bilinear"
        )
    scores, maps = detector.scores_and_maps(images)
    assert maps.shape == (24, 64, 64) and maps.dtype == torch.float32
    assert relative(maps, expected[:, 0]) < 1e-3
    assert torch.equal(maps, detector.anomaly_map(images))
    assert torch.equal(scores, detector(images))


@torch.no_grad()
def test_one_score_is_both_standardised_over_the_images_held_out(fitted):
    detector, images = GaussianAD(fitted[0].extractor).fit([fitted[1]]), torch.rand(5, 3, 64, 64)
    with pytest.raises(ValueError, match="calibrate it first"):
        detector.anomaly_score(*detector.scores_and_maps(images))
    held_out = torch.rand(12, 3, 64, 64)
    assert detector.calibrate(held_out.split(5)) is detector
    found = detector.anomaly_score(*detector.scores_and_maps(images)).numpy()
    expected = 0
    for of in (lambda x: detector(x).numpy(),
               lambda x: detector.anomaly_map(x).amax((1, 2)).numpy()):  # fmt: skip
        usual = np.concatenate([of(part) for part in held_out.split(5)])
        expected = expected + (of(images) - usual.mean()) / usual.std(ddof=1)
    assert relative(found, expected) < 1e-5
    own = detector.anomaly_score(*detector.scores_and_maps(held_out))
    assert own.mean().abs() < 1e-3  # of held-out images, by definition 0
    assert detector.threshold(0.05) == pytest.approx(gaussad.tail_quantile(own, 0.95), rel=1e-3)
    maxima = detector.anomaly_map(held_out).amax((1, 2))
    expected = gaussad.tail_quantile(maxima, 0.9)
    assert detector.map_threshold(0.1) == pytest.approx(expected, rel=1e-4)
    threshold = detector.threshold()
    assert detector.fit([fitted[1]]).threshold() == threshold < detector.threshold(0.01)
    with pytest.raises(ValueError, match="two held-out images"):
        detector.calibrate([held_out[:1].expand(3, -1, -1, -1)])
    for share in (0, 1):
        with pytest.raises(ValueError, match="quantile"):
            detector.threshold(share)


@pytest.mark.parametrize("n, tolerance", [(6, 0.02), (64, 0.01), (2000, 0.003)])
def test_tail_quantile_keeps_the_false_alarm_rate(n, tolerance):
    rng = np.random.default_rng(0)
    draw = lambda *shape: 40 + 5 * rng.gamma(20, size=shape) / 20**0.5
    future = draw(10**4)
    found = [gaussad.tail_quantile(torch.tensor(scores), 0.95) for scores in draw(400, n)]
    assert (future[:, None] > np.array(found)).mean() == pytest.approx(0.05, abs=tolerance)


def test_tail_quantile_of_few_many_and_equal_scores():
    many = torch.rand(3000, dtype=torch.float64)
    assert gaussad.tail_quantile(many, 0.5) == pytest.approx(np.quantile(many, 0.5), abs=1e-12)
    assert gaussad.tail_quantile(torch.tensor([2.0]), 0.99) == 2
    assert gaussad.tail_quantile(torch.full((9,), 3.0), 0.99) == 3
    for scores, quantile in (([], 0.9), ([1.0, float("nan")], 0.9), ([1.0, 2.0], 1.0)):
        with pytest.raises(ValueError, match="quantile"):
            gaussad.tail_quantile(torch.tensor(scores), quantile)


def test_ten_times_the_images_take_no_more_memory_to_fit(fitted):
    held = []

    def batches():
        for i in range(40):
            yield torch.rand(6, 3, 64, 64)
            if i in (3, 39):
                held.append(sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor))

    GaussianAD(fitted[0].extractor).fit(batches())
    assert held[0] == held[1]


def test_saved_detector_is_the_same_to_the_bit_and_needs_no_download(fitted, tmp_path):
    detector, images = fitted
    detector = GaussianAD(detector.extractor, np.array([4, 9])).fit([images]).calibrate([images])
    detector.save(tmp_path / "detector.pt", note="mine")
    generator_state = torch.random.get_rng_state()
    loaded = GaussianAD.load(tmp_path / "detector.pt")
    assert torch.equal(torch.random.get_rng_state(), generator_state)
    assert torch.equal(loaded(images), detector(images))
    assert torch.equal(loaded.anomaly_map(images), detector.anomaly_map(images))
    assert loaded.threshold() == detector.threshold()
    assert all(p.requires_grad for p in loaded.parameters())  # it can be trained on
    assert [path.name for path in tmp_path.iterdir()] == ["detector.pt"]
    content = gaussad.load_plain(tmp_path / "detector.pt")
    assert content["note"] == "mine" and type(content["detector"]["map_levels"][0]) is int


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_loading_runs_no_code(tmp_path):
    (tmp_path / "detector.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    torch.save(Malicious(tmp_path / "executed"), tmp_path / "weights.pth")
    for name in ("detector.pt", "weights.pth"):
        with pytest.raises(ValueError, match=name):
            GaussianAD.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_misuse_of_a_detector_is_an_error(fitted, tmp_path):
    detector, images = fitted
    with pytest.raises(ValueError, match="images are uint8, or floating-point .* torch.int64"):
        detector(images.long())
    with pytest.raises(ValueError, match="was fitted to"):
        detector(images[..., :32])
    for levels in ([3], []):
        with pytest.raises(ValueError, match="map levels"):
            GaussianAD(detector.extractor, levels)
    fresh = GaussianAD(detector.extractor)
    with pytest.raises(ValueError, match="not fitted"):
        fresh(images)
    for batches, message in (([images, images[..., :32]], r"images of \[64, 64\] and \[64, 32\]"),
                             ([], "no images"), ([images[:2]], "three samples"),
                             ([images[:1].expand(9, -1, -1, -1)] * 3, "do not vary")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            fresh.fit(batches)
    with pytest.raises(ValueError, match="fitted without maps"):
        fresh.fit([images], maps=False).anomaly_map(images)
    with pytest.raises(OSError, match="No such file or directory.*missing"):
        detector.save(tmp_path / "missing/detector.pt")
    with pytest.raises(OSError, match="No such file or directory.*nowhere"):
        GaussianAD.load(tmp_path / "nowhere.pt")


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_scores_and_maps_of_a_gpu_are_those_of_the_cpu(fitted):
    images, device = fitted[1], gaussad.pick_device("cuda")
    expected = fitted[0].scores_and_maps(images)
    on_gpu = GaussianAD(deepcopy(fitted[0].extractor)).to(device).fit(images.split(5))
    for found, values in zip(on_gpu.scores_and_maps(images.to(device)), expected, strict=True):
        assert relative(found.cpu(), values) < 1e-3


# ------------------------------------------------------------------------------------------------
# Augmentation validator
# ------------------------------------------------------------------------------------------------


def test_cutout_and_cutmix_change_one_square_of_the_stated_area():
    noise = torch.randint(0, 256, (50, 3, 64, 64), dtype=torch.uint8)
    for augment in (gaussad.cutout, gaussad.cutmix):
        changed = (augment(noise) != noise).any(1)
        assert changed.flatten(1).any(1).float().mean() > 0.9  # a few lie across the border
        for where in changed:
            rows, columns = where.any(1).sum(), where.any(0).sum()
            assert rows * columns <= 0.11 * 64 * 64
    pasted, partners = gaussad.cutmix(noise), noise.roll(1, 0)
    assert ((pasted == noise) | (pasted == partners)).all()
    mixed = gaussad.mixup(noise)
    assert (mixed >= noise.minimum(partners)).all() and (mixed <= noise.maximum(partners)).all()


def test_validator_draws_once_from_its_seed_and_leaves_the_generator_alone():
    images = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    before = torch.random.get_rng_state()
    one, same, other = (
        gaussad.AugmentationValidator(images, seed, 11, gaussad.AUGMENTATIONS)
        for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(one.augmented) == ["mixup", "cutout", "cutmix", "augmix"]
    assert list(gaussad.AugmentationValidator(images).augmented) == ["cutout", "cutmix"]
    for name, augmented in one.augmented.items():
        assert augmented.dtype == torch.uint8 and augmented.shape == (12, 3, 64, 64)
        assert not torch.equal(augmented[:6], augmented[6:])
        assert torch.equal(augmented, same.augmented[name])
        assert not torch.equal(augmented, other.augmented[name])
    for wrong in (images[:1], images / 255):
        with pytest.raises(ValueError, match="two held-out images"):
            gaussad.AugmentationValidator(wrong)


def spread(batch):
    """A score of images that is above zero and has nothing to do with a detector."""
    return batch.double().std((1, 2, 3))


def test_separation_is_that_of_its_formula():
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    validator = gaussad.AugmentationValidator(images, versions=60)
    found = validator(spread, batch_size=7)
    log = np.log(spread(images).numpy())
    expected = []
    for name, augmented in validator.augmented.items():
        versions = np.log(spread(augmented).numpy()).reshape(3, 20)
        expected.append((versions - log).mean() / log.std())
        labels = torch.arange(80) >= 20
        scores = torch.cat([spread(images), spread(augmented)])
        assert found.auroc[name] == pytest.approx(gaussad.auroc(scores, labels), abs=1e-12)
    assert found.separation == pytest.approx(np.mean(expected), rel=1e-12)


def test_standard_error_of_a_gain_is_that_of_leaving_images_out():
    rng = np.random.default_rng(0)
    log = rng.normal(size=(2, 80)) * 0.2 + rng.normal(size=80)
    augmented = log + rng.normal(1.0, 0.3, size=(2, 80))
    s = lambda keep: np.diff([(a - x)[keep].mean() / x[keep].std() for x, a in zip(log, augmented)])
    images = torch.zeros(80, 3, 2, 2, dtype=torch.uint8)
    validator = gaussad.AugmentationValidator(images, 1, 1, {"none": lambda x: x})
    found = []
    for pair in zip(log, augmented):
        scores = iter(np.exp(pair))
        found.append(validator(lambda batch: torch.tensor(next(scores)), batch_size=80))
    gain, error = found[1].gain_over(found[0])
    left_out = [s(np.arange(80) != i).item() for i in range(80)]
    assert gain == pytest.approx(s(np.arange(80) >= 0).item())
    assert error == pytest.approx(np.sqrt(79 * np.var(left_out)), rel=0.1)


@pytest.mark.parametrize("score", [lambda x: -spread(x), lambda x: spread(x) * torch.nan,
                                   lambda x: spread(x) * 0 + 1])
def test_scores_that_cannot_be_judged_are_an_error(score):
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    with pytest.raises(gaussad.DegenerateError, match="above zero|all the same"):
        gaussad.AugmentationValidator(images)(score)


# ------------------------------------------------------------------------------------------------
# Fine-tuning
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def task():
    """A detector, normal images in a loader that shuffles, and images held out."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (30, 3, 64, 64), dtype=torch.uint8)
    loader = DataLoader(TensorDataset(images[:20], torch.zeros(20)), 7, shuffle=True)
    return GaussianAD(FeatureExtractor(BACKBONE, [4, 9], "random")), loader, images[20:]


@pytest.fixture
def early_checks(monkeypatch):
    """Checks at steps 0, 2, 4, 8, … in place of 0, 32, 64, 128, …: a test has no time for more."""
    monkeypatch.setattr(gaussad, "FIRST_CHECK", 2)


def test_one_step_is_adams_on_the_mean_score(task):
    detector, loader, held_out = task
    reference = GaussianAD(FeatureExtractor(BACKBONE, [4, 9], "random"))
    reference.extractor.load_state_dict(detector.extractor.state_dict())
    with gaussad.seeded(3):
        reference.fit(loader, maps=False)
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3)
    with gaussad.seeded(3 + 1):
        images, _ = next(iter(loader))
    loss = reference(images).mean()
    loss.backward()
    optimizer.step()
    checks = list(gaussad.fine_tune(detector, loader, held_out, steps=1, lr=1e-3, seed=3))
    assert checks[1].loss == loss.item()
    assert all(map(torch.equal, reference.parameters(), detector.parameters()))


def test_kept_detector_is_fitted_to_all_and_calibrated_and_others_have_no_maps(
        task, early_checks, monkeypatch):  # fmt: skip
    detector, loader, held_out = task
    gains = iter([(3.0, 1.0), (1.0, 1.0), (2.1, 1.0), (-5.0, 1.0), (1.9, 1.0)])
    monkeypatch.setattr(gaussad.Validation, "gain_over", lambda self, other: next(gains))
    checks, images = [], loader.dataset.tensors[0]
    for check in gaussad.fine_tune(detector, loader, held_out, steps=10**6, lr=0, patience=2):
        checks.append((check.step, check.kept))
        if check.kept:
            with torch.no_grad():
                everything = GaussianAD(detector.extractor).fit([images, held_out])
                assert relative(detector(held_out), everything(held_out)) < 1e-6
            assert len(detector.held_out) == 10 and detector.threshold() > 0
        else:
            with pytest.raises(ValueError, match="without maps"):
                detector.anomaly_map(held_out)
    assert checks == [(0, True), (2, True), (4, False), (8, True), (16, False), (32, False)]


def test_any_check_is_gone_on_from_to_the_same_bits(task, early_checks):
    detector, loader, held_out = task
    given = {"steps": 5, "lr": 1e-3, "patience": 9, "seed": 5}
    start = {key: value.clone() for key, value in detector.extractor.state_dict().items()}
    checks = list(gaussad.fine_tune(detector, loader, held_out, **given))
    assert [check.step for check in checks] == [0, 2, 4, 5]
    with torch.no_grad():
        expected = detector(held_out)
    for i, check in enumerate(checks[:3]):
        detector.extractor.load_state_dict(start)
        again = GaussianAD(detector.extractor)
        torch.rand(7)  # what the caller draws in between changes nothing
        rest = list(gaussad.fine_tune(again, loader, held_out, state=check.state, **given))
        found, whole = rest[-1], checks[-1]
        assert len(rest) == 3 - i
        assert (found.loss, found.gain, found.kept) == (whole.loss, whole.gain, whole.kept)
        with torch.no_grad():
            assert torch.equal(again(held_out), expected)


def test_zero_steps_fit_and_do_not_validate(task, monkeypatch):
    detector, loader, held_out = task
    monkeypatch.delattr(gaussad, "AugmentationValidator")
    [check] = gaussad.fine_tune(detector, loader, held_out, steps=0)
    assert check.kept and check.validation is None and detector.anomaly_map(held_out).shape[0] == 10


def test_training_that_fails_ends_with_a_word_and_what_cannot_be_trained_with_an_error(
        task, early_checks):  # fmt: skip
    detector, loader, held_out = task
    *_, last = gaussad.fine_tune(detector, loader, held_out, steps=64, lr=1e30)
    assert last.step == 2 and not last.kept and "try a smaller learning rate" in last.failure
    detector = GaussianAD(FeatureExtractor(BACKBONE, [4, 9], "random"))
    for wrong in ({"steps": -1}, {"lr": float("nan")}, {"patience": 0}):
        with pytest.raises(ValueError, match="0 or more"):
            next(gaussad.fine_tune(detector, loader, held_out, **wrong))
    once = (images for images, _ in loader)
    with pytest.raises(ValueError, match="cannot be iterated again"):
        list(gaussad.fine_tune(detector, once, held_out, steps=1))


def readme_example(number):
    text = (HERE / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[number]
    return code.replace('"efficientnet_b4"', f'"{BACKBONE}", weights="random"')


def test_readme_examples_train_take_ones_own_network_and_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = torch.randint(0, 256, (24, 3, 64, 64), dtype=torch.uint8)
    names = {"dataset": TensorDataset(images, torch.zeros(24)), "held_out": images[:12].flip(-1),
             "network": models.mobilenet_v3_small()}  # fmt: skip
    exec(readme_example(0).replace("steps=512", "steps=2"), names)
    assert names["scores"].shape == (16,) and names["maps"].shape == (16, 64, 64)
    assert names["anomalous"].dtype == torch.bool
    exec(readme_example(1), names)
    assert GaussianAD.load("own.pt", extractor=names["extractor"])(images).shape == (24,)
    exec(readme_example(2), names)
    exported = torch.export.load("detector.pt2").module()
    expected = GaussianAD.load("detector.pt").scores_and_maps(images[:3])
    for found, value in zip(exported(images[:3]), expected, strict=True):
        torch.testing.assert_close(found, value)


# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------


def test_images_of_any_mode_become_the_same_rgb(tmp_path):
    gray = (np.indices((40, 60)).sum(0) * 2).astype(np.uint8)
    image = Image.fromarray(gray)
    image.save(tmp_path / "l.png")
    image.convert("RGB").save(tmp_path / "rgb.png")
    image.convert("RGBA").save(tmp_path / "rgba.png")
    image.convert("LA").save(tmp_path / "la.png")
    image.quantize(256).save(tmp_path / "palette.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "16bit.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "16bit.tif")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by a quarter
    image.convert("RGB").rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    expected = gaussad.load_image(tmp_path / "l.png", 32)
    assert expected.shape == (3, 32, 32) and expected.dtype == torch.uint8
    for path in tmp_path.iterdir():
        found = gaussad.load_image(path, 32)
        assert (found.int() - expected.int()).abs().max() <= 1, path.name


@pytest.mark.parametrize("n, held", [(7, 3), (40, 16), (320, 64)])
def test_held_out_are_a_fifth_but_sixteen_or_half(n, held):
    fit, held_out = gaussad.hold_out(range(n), seed=0)
    assert len(held_out) == held and sorted(fit + held_out) == list(range(n))
    assert gaussad.hold_out(range(n), seed=0) == (fit, held_out) != gaussad.hold_out(range(n), 1)
    with pytest.raises(ValueError, match="too few"):
        gaussad.hold_out(range(5))


def test_images_are_loaded_in_order(demo):
    paths = [sample.path for sample in gaussad.list_samples(demo, "demo", "train")]
    expected = torch.stack([gaussad.load_image(path, 32) for path in paths])
    assert torch.equal(gaussad.load_images(paths, 32, workers=3), expected)


# ------------------------------------------------------------------------------------------------
# Command lines
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    train.draw_demo(root, size=64)
    return root


@pytest.fixture
def cli(monkeypatch, capfd):
    """Run a script as `python` would, in this process to save the seconds of importing torch."""

    def call(script, *args):
        monkeypatch.setattr(sys, "argv", [str(HERE / script), *map(str, args)])
        try:
            runpy.run_path(str(HERE / script), run_name="__main__")
        except SystemExit as stop:
            return stop.code or 0, *capfd.readouterr()
        return 0, *capfd.readouterr()

    return call


def early_train(*args, **options):
    """A process of train.py, with checks at steps 0, 2, 4, 8, … in place of 0, 32, 64, 128, …"""
    code = "import sys, gaussad, train; gaussad.FIRST_CHECK = 2; sys.exit(train.main())"
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], text=True,
                            stdout=subprocess.PIPE, env=environment, **options)  # fmt: skip


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """A run of train.py as a process of its own, without the test images; (run folder, output)."""
    work = tmp_path_factory.mktemp("work")
    (work / "data/demo").mkdir(parents=True)
    (work / "data/demo/train").symlink_to(demo / "demo/train")
    given = ["--data", "data", "--category", "demo", *TINY, "--steps", 3]
    with early_train(*given, cwd=work) as process:
        output = process.communicate()[0]
    assert process.returncode == 0
    return work / "runs/demo", output


@pytest.fixture
def evaluated(trained, demo, cli, tmp_path):
    """Evaluate the run with some options more; (results' folder, metrics, rows of scores.csv)."""

    def call(*more):
        code, output, error = cli("evaluate.py", "--data", demo, "--category", "demo", "--model",
                                  trained[0], "--out", tmp_path / "out", *more)  # fmt: skip
        assert code == 0 and "AUROC" in output, error
        with (tmp_path / "out/scores.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return tmp_path / "out", json.loads((tmp_path / "out/metrics.json").read_text()), rows

    return call


def test_train_writes_the_detector_the_validator_saw_and_a_copy_of_its_history(trained, demo):
    folder, output = trained
    history = json.loads((folder / "history.json").read_text())
    training = gaussad.load_plain(folder / "detector.pt")["training"]
    assert training.pop("state") is None and training["finished"] and training == {
        key: history[key] for key in training}  # fmt: skip
    assert [check["step"] for check in history["checks"]] == [0, 2, 3]
    assert history["checks"][0]["loss"] is None and history["checks"][2]["loss"] > 0
    assert history["settings"]["seed"] == 0 and history["settings"]["backbone"] == BACKBONE
    assert Path(history["settings"]["data"]).is_absolute()
    assert set(history["checks"][1]["auroc"]) == {"cutout", "cutmix"}
    assert f"Step {history['best_step']}" in output
    visible = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    assert sorted(visible) == ["detector.pt", "history.json"]
    parts = gaussad.hold_out(gaussad.list_samples(demo, "demo", "train"), 0)
    fit, held_out = (gaussad.load_images([s.path for s in part], 64) for part in parts)
    saved, again = (GaussianAD.load(folder / "detector.pt") for _ in range(2))
    with torch.no_grad():  # saved with Gaussians of all images
        assert relative(again.fit([fit, held_out])(held_out), saved(held_out)) < 1e-6
        again.fit([fit]).calibrate(held_out.split(16))
    assert again.threshold() == pytest.approx(saved.threshold(), rel=1e-3)
    found = gaussad.AugmentationValidator(held_out, 0)(again)
    chosen = next(r for r in history["checks"] if r["step"] == history["best_step"])
    assert found.separation == pytest.approx(chosen["separation"], rel=1e-3)


def test_evaluate_writes_scores_and_their_metrics(trained, evaluated):
    _, metrics, rows = evaluated("--false-alarms", 0.1)
    detector = GaussianAD.load(trained[0] / "detector.pt")
    assert metrics["n_normal"] == 16 and metrics["n_anomalous"] == 24 and len(rows) == 40
    last = rows[32:]  # the last batch: the same batch gives the same bits
    images = gaussad.load_images([row["path"] for row in last], 64)
    with torch.no_grad():
        scores, maps = detector.scores_and_maps(images)
    both = detector.anomaly_score(scores, maps)
    for name, expected in (("score", scores), ("map_maximum", maps.amax((1, 2))),
                           ("anomaly_score", both)):  # fmt: skip
        assert [float(row[name]) for row in last] == expected.tolist()
    labels = np.array([row["label"] == "1" for row in rows])
    values = np.array([float(row["anomaly_score"]) for row in rows])
    for rate, found in [(0.1, metrics), *metrics["at_false_alarms"].items()]:
        above = values > detector.threshold(float(rate))
        assert found["false_alarm_rate"] == above[~labels].mean()
        assert found["miss_rate"] == (~above)[labels].mean()
        hits = (above & labels).sum()
        assert found["f1"] == pytest.approx(2 * hits / (above.sum() + labels.sum()))
    above = values > detector.threshold(0.1)
    assert [row["verdict"] == "anomalous" for row in rows] == above.tolist()
    assert list(metrics["at_false_alarms"]) == ["0.01", "0.05", "0.1"]


def test_aurocs_of_evaluate_are_scikit_learns(trained, evaluated, demo):
    metrics_of = pytest.importorskip("sklearn.metrics").roc_auc_score
    _, metrics, rows = evaluated()
    labels = np.array([int(row["label"]) for row in rows])
    for key, column in (("image_auroc", "score"), ("image_auroc_from_map", "map_maximum"),
                        ("image_auroc_both", "anomaly_score")):  # fmt: skip
        scores = np.array([float(row[column]) for row in rows])
        assert metrics[key] == pytest.approx(metrics_of(labels, scores), abs=1e-12)
    for defect, value in metrics["image_auroc_per_defect"].items():
        chosen = np.array([row["defect"] in ("good", defect) for row in rows])
        assert value == pytest.approx(metrics_of(labels[chosen], scores[chosen]), abs=1e-12)
    samples = gaussad.list_samples(demo, "demo", "test")
    images = gaussad.load_images([sample.path for sample in samples], 64)
    with torch.no_grad():
        maps = GaussianAD.load(trained[0] / "detector.pt").anomaly_map(images).numpy()
    masks = np.stack([np.asarray(Image.open(s.mask)) > 0 if s.mask else np.zeros((64, 64), bool)
                      for s in samples])  # fmt: skip
    expected = metrics_of(masks.ravel(), maps.ravel())
    assert metrics["pixel_auroc"] == pytest.approx(expected, abs=1e-6)
    assert metrics["aupro"] == pytest.approx(gaussad.aupro(*map(torch.tensor, (maps, masks))), 1e-4)


def test_report_is_one_file_with_the_figures_and_pictures_in_any_case(evaluated):
    folder, metrics, rows = evaluated()
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"http|<script|<link|src=\"(?!data:)", page)
    for key in evaluate.RESULTS:
        assert f"<td>{100 * metrics[key]:.1f}</td>" in page
    wrong = [(row["verdict"], row["label"]) for row in rows]
    count = lambda of: min(evaluate.SHOWN, wrong.count(of))
    expected = count(("normal", "1")) + count(("anomalous", "0")) + 2 * evaluate.SHOWN
    assert page.count("<img ") == expected


def test_pictures_outline_the_true_and_the_predicted_region(trained, demo, evaluated):
    folder, _, rows = evaluated("--pictures")
    names = {path.name for path in (folder / "pictures").iterdir()}
    assert len(names) == 40 and "good_003.png" in names
    rows = [row for row in rows if row["label"] == "1"]
    sample = Path(max(rows, key=lambda row: float(row["map_maximum"]))["path"])
    defect = sample.parent.name
    picture = np.asarray(Image.open(folder / f"pictures/{defect}_{sample.name}")).astype(int)
    plain, painted = picture[-64:, :64], picture[-64:, 64:]
    assert (plain == gaussad.load_image(sample, 64).permute(1, 2, 0).numpy()).all()
    detector = GaussianAD.load(trained[0] / "detector.pt")
    with torch.no_grad():
        predicted = detector.anomaly_map(gaussad.load_image(sample, 64)[None])[0].numpy()
    predicted = predicted > detector.map_threshold(0.05)
    mask = demo / "demo/ground_truth" / defect / f"{sample.stem}_mask.png"
    for colour, region in ((evaluate.GREEN, np.asarray(Image.open(mask)) > 0),
                           (evaluate.BLUE, predicted)):  # fmt: skip
        outline = (painted == colour).all(-1)
        assert outline.any() and not (outline & ~region).any()


def test_category_without_masks_or_normal_images_gets_what_can_be_computed(trained, demo, cli,
                                                                           tmp_path):  # fmt: skip
    (tmp_path / "a/test").mkdir(parents=True)
    (tmp_path / "a/test/stain").symlink_to(demo / "demo/test/stain")
    given = ["--data", tmp_path, "--model", trained[0] / "detector.pt", "--out", tmp_path]
    (tmp_path / "demo").symlink_to(tmp_path / "a")
    code, output, error = cli("evaluate.py", *given, "--category", "demo", "--pictures")
    assert code == 0 and "8 have no mask" in output and "No AUROC" in output, error
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["pixel_auroc"] is metrics["image_auroc_both"] is metrics["aupro"] is None
    assert metrics["n_without_mask"] == 8 and metrics["miss_rate"] >= 0
    assert metrics["false_alarm_rate"] is None


def test_same_seed_same_bits_and_every_other_setting_another_run(trained, demo, cli, early_checks,
                                                                 tmp_path):  # fmt: skip
    given = ["--data", demo, "--category", "demo", *TINY, "--out", tmp_path, "--steps", 3]
    code, _, error = cli("train.py", *given)
    assert code == 0, error
    one, two = (gaussad.load_plain(p / "detector.pt")["state"] for p in (trained[0], tmp_path))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    given[-1] = 0
    assert "is finished" not in cli("train.py", *given)[1]
    written = (tmp_path / "detector.pt").stat().st_mtime_ns
    assert "is finished; --force trains it anew" in cli("train.py", *given, "--device", "cpu")[1]
    assert (tmp_path / "detector.pt").stat().st_mtime_ns == written
    assert "is finished" not in cli("train.py", *given, "--force")[1]
    torch.save(models.get_model(BACKBONE).state_dict(), tmp_path / "a.pth")
    shutil.copy(tmp_path / "a.pth", tmp_path / "b.pth")  # by another name it is the same run
    for name, finished in (("a.pth", False), ("b.pth", True)):
        output = cli("train.py", *given, "--weights", tmp_path / name)[1]
        assert ("is finished" in output) == finished


def test_run_that_is_killed_goes_on_to_the_same_bits(demo, cli, early_checks, tmp_path):
    given = ["--data", demo, "--category", "demo", *TINY, "--lr", "1e-5", "--steps", 16,
             "--patience", 9, "--out"]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    checks = lambda: json.loads((killed / "history.json").read_text())["checks"]
    with early_train(*given, killed) as process:
        while not (killed / "history.json").exists() or len(checks()) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)
        assert_one_line(cli("train.py", *given, killed), "another train.py is at work in .*killed")
        process.kill()
    left = ["0", "2", "4", "8", "16"][len(checks()) :]
    code, output, error = cli("evaluate.py", "--data", demo, "--category", "demo", "--out", killed)
    assert code == 0 and left and "is not finished" in output, error
    (killed / ".detector.pt.part").touch()  # of a kill at another moment
    code, output, _ = cli("train.py", *given, killed)
    assert code == 0 and re.findall(r"(?m)^ +(\d+) ", output) == left
    assert cli("train.py", *given, whole)[0] == 0
    a, b = (gaussad.load_plain(path / "detector.pt") for path in (whole, killed))
    assert all(torch.equal(a["state"][key], b["state"][key]) for key in a["state"])
    for record in [*a["training"]["checks"], *b["training"]["checks"]]:
        del record["seconds"]
    assert a["training"] == b["training"]


@pytest.fixture(scope="module")
def two(demo, tmp_path_factory):
    """A data root with two categories, and one that is broken."""
    root = tmp_path_factory.mktemp("two")
    for name in ("disc", "plate"):
        (root / name).symlink_to(demo / "demo")
    (root / "broken/train/good").mkdir(parents=True)
    return root


def test_several_categories_one_of_which_fails(two, cli, tmp_path):
    given = ["--data", two, "--category", "all", "--out", tmp_path]
    code, output, error = cli("train.py", *given, *TINY, "--steps", 0)
    assert code == 2 and re.search(r"^train.py: error: broken: no images at .*\n$", error)
    code, output, error = cli("evaluate.py", *given)
    assert code == 2 and re.search("^evaluate.py: error: broken: no detector at", error)
    results = json.loads((tmp_path / "results.json").read_text())
    categories = results["categories"]
    assert list(categories) == ["disc", "plate"]
    expected = json.loads((tmp_path / "plate/metrics.json").read_text())["image_auroc_both"]
    assert categories["plate"]["image_auroc_both"] == expected
    assert results["mean"]["image_auroc_both"] == expected
    assert results["standard_error"]["image_auroc"] == 0  # twice the same data
    rows = list(csv.reader((tmp_path / "results.csv").open(newline="")))
    names = ["category", "disc", "plate", "mean", "standard_error"]
    assert [row[0] for row in rows] == names and float(rows[1][1]) >= 0
    assert re.search("(?m)^mean .*\n^standard_error", output)


def test_processes_of_torchrun_share_the_categories_and_wait_for_each_other(two, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               HERE / "train.py", "--data", two, "--category", "broken", "disc", "plate", *TINY,
               "--steps", "0", "--out", tmp_path]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 1 and "train.py: error: broken: no images at" in done.stderr
    for name in ("disc", "plate"):
        assert json.loads((tmp_path / name / "history.json").read_text())["finished"]


def test_mean_and_standard_error_of_results(tmp_path, capsys):
    figures = [{"image_auroc": a, "aupro": b} for a, b in ((0.9, None), (0.8, 0.5), (0.4, None))]
    rows = {str(i): dict.fromkeys(evaluate.RESULTS) | row for i, row in enumerate(figures)}
    evaluate.write_results(tmp_path, rows)
    results = json.loads((tmp_path / "results.json").read_text())
    values = [0.9, 0.8, 0.4]
    assert results["mean"]["image_auroc"] == pytest.approx(np.mean(values))
    expected = np.std(values, ddof=1) / np.sqrt(3)
    assert results["standard_error"]["image_auroc"] == pytest.approx(expected)
    assert results["mean"]["aupro"] == 0.5 and results["standard_error"]["aupro"] is None
    assert results["mean"]["f1"] is None


def test_own_images_are_trained_on_and_scored(demo, cli, tmp_path):
    good, stain = demo / "demo/test/good", demo / "demo/test/stain/000.png"
    code, _, error = cli("train.py", "--normal", demo / "demo/train/good", "--out", tmp_path,
                         *TINY, "--steps", 0)  # fmt: skip
    assert code == 0, error
    code, output, error = cli("evaluate.py", "--model", tmp_path / "detector.pt", "--images", good,
                              stain, "--pictures")  # fmt: skip
    assert code == 0, error
    rows = list(csv.DictReader((tmp_path / "scored/scores.csv").open(newline="")))
    assert [row["path"] for row in rows] == [*(p.as_posix() for p in sorted(good.iterdir())),
                                             stain.as_posix()]  # fmt: skip
    detector = GaussianAD.load(tmp_path / "detector.pt")
    with torch.no_grad():
        found = detector.scores_and_maps(gaussad.load_image(stain, 64)[None])
    score = detector.anomaly_score(*found).item()
    assert float(rows[-1]["anomaly_score"]) == pytest.approx(score, rel=1e-4)
    assert rows[-1]["verdict"] == ("anomalous" if score > detector.threshold() else "normal")
    assert f"{score:8.2f} {rows[-1]['verdict']:<9} {stain}" in output
    assert len(list((tmp_path / "scored/pictures").iterdir())) == 17


def test_demo_ends_in_a_detector_better_than_chance(tmp_path):
    command = [sys.executable, HERE / "train.py", "--demo", "--weights", "random", "--steps", "0",
               "--out", tmp_path]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "metrics.json").read_text())["image_auroc_both"] > 0.7


@pytest.fixture(scope="module")
def broken(demo, tmp_path_factory):
    """A data root with a category for each thing that can be wrong with one."""
    root = tmp_path_factory.mktemp("broken")
    (root / "no_train_good/train").mkdir(parents=True)
    (root / "empty/train/good").mkdir(parents=True)
    shutil.copytree(demo / "demo", root / "truncated")
    path = root / "truncated/train/good/003.png"
    path.write_bytes(path.read_bytes()[:200])
    (root / "file").write_text("not a folder")
    torch.save(models.mobilenet_v3_small().state_dict(), root / "weights.pth")
    torch.save(Malicious(root / "executed"), root / "malicious.pth")
    for name in ("file", "weights.pth", "malicious.pth"):
        (root / "runs" / name).mkdir(parents=True)
        shutil.copy(root / name, root / "runs" / name / "detector.pt")
    yield root
    assert not (root / "executed").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        ("--data ROOT/nowhere --category x", "no data set at .*nowhere"),
        ("--data DEMO --category screw", "no category 'screw'.*there are: demo"),
        ("--data ROOT --category no_train_good", "train/good"),
        ("--data ROOT --category empty", "no images at .*empty/train/good"),
        ("--data ROOT --category truncated", "truncated/train/good/003.png"),
        ("--data DEMO --category demo --levels 0 3", "the levels 1 to 13"),
        ("--data DEMO --category demo --lr fast", "--lr"),
        ("--data DEMO --category demo --batch-size 0", "batch_size"),
        ("--data DEMO --category demo --weights ROOT/malicious.pth", "malicious.pth is not"),
        ("--data DEMO --category demo --weights ROOT/weights.pth --backbone resnet18",
         "does not hold the weights of resnet18"),
        ("--data DEMO --category demo --out ROOT/file/run", "ROOT/file/run.*--out"),
        ("--data DEMO --category demo --out ROOT/runs/file", "is not a file saved by torch.save"),
        ("--data DEMO --category demo --out ROOT/runs/weights.pth", "not of train.py"),
        ("--normal ROOT --data ROOT", "--normal goes with --out"),
    ],
)  # fmt: skip
def test_bad_input_to_train_is_told_in_one_line(args, message, broken, demo, cli, tmp_path):
    place = lambda text: text.replace("ROOT", str(broken)).replace("DEMO", str(demo))
    given = [*TINY, "--steps", "2", "--out", tmp_path, *place(args).split()]
    assert_one_line(cli("train.py", *given), place(message))


@pytest.mark.parametrize(
    "args, message",
    [
        ("--model ROOT/nowhere", "no detector at .*nowhere: run train.py first"),
        ("--model ROOT/runs/weights.pth", "is not a detector saved by this gaussad.py"),
        ("--model ROOT/runs/malicious.pth", "malicious.pth/detector.pt is not a file saved"),
        ("--model RUN --data ROOT --category empty", "the detector of 'demo', not of 'empty'"),
        ("--model RUN --data RUN/../../data", "demo/test"),  # what it was trained from
        ("--model RUN --false-alarms 5", "between 0 and 1"),
    ],
)
def test_bad_input_to_evaluate_is_told_in_one_line(args, message, broken, demo, trained, cli):
    place = lambda text: text.replace("ROOT", str(broken)).replace("RUN", str(trained[0]))
    given = ["--data", demo, "--category", "demo", *place(args).split()]
    assert_one_line(cli("evaluate.py", *given), message)


def assert_one_line(result, message):
    code, _, error = result
    assert code == 2
    assert error.count("\n") == 1 and "Traceback" not in error
    assert re.search(message, error), error


def test_odd_files_among_the_images(demo, cli, tmp_path):
    shutil.copytree(demo / "demo/train/good", tmp_path / "images")
    names = ["new\nline größe 寸法.png", "not_text_\udcff.png", "UPPER.PNG", f"{240 * 'n'}.png"]
    for i, name in enumerate(names):
        Image.new("RGB", (64, 64), (i, 60, 60)).save(tmp_path / "images" / name)
    Image.new("CMYK", (1, 1)).save(tmp_path / "images/one_pixel.jpg")
    (tmp_path / "images/dangling.png").symlink_to("nowhere")
    for name in ("notes.txt", "._003.png"):
        (tmp_path / "images" / name).write_text("not an image")
    out = tmp_path / "run"
    given = ["--normal", tmp_path / "images", "--out", out, *TINY, "--steps", 0]
    assert cli("train.py", *given)[0] == 0
    code, _, error = cli("evaluate.py", "--model", out / "detector.pt", "--images",
                         tmp_path / "images", "--pictures")  # fmt: skip
    assert code == 0, error
    with (out / "scored/scores.csv").open(newline="", errors="surrogateescape") as file:
        scored = {Path(row["path"]).name for row in csv.DictReader(file)}
    assert scored == {*names, "one_pixel.jpg", *os.listdir(demo / "demo/train/good")}
    (tmp_path / "images/br\noken_\udcff.png").touch()
    assert_one_line(cli("train.py", *given), "cannot read the image .*br oken_")


@contextmanager
def full_disk(size):
    """Files cannot grow past `size` bytes; what fails then is what fails on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_keeps_what_was_there(trained, demo, cli, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    before = (tmp_path / "run/detector.pt").read_bytes()
    given = ["--data", demo, "--category", "demo", "--out", tmp_path / "run"]
    with full_disk(2_000):
        for script, more in (("train.py", [*TINY, "--steps", 0]), ("evaluate.py", [])):
            assert_one_line(cli(script, *given, *more), "File too large")
    assert (tmp_path / "run/detector.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*.part"))


# ------------------------------------------------------------------------------------------------
# What users really have: cameras, masks, folders, weights
# ------------------------------------------------------------------------------------------------


def png_of(values):
    """A 16-bit RGB PNG (H, W, 3), which Pillow reads but cannot write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunk = lambda kind, data: (struct.pack(">I", len(data)) + kind + data
                                + struct.pack(">I", zlib.crc32(kind + data)))  # fmt: skip
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))  # fmt: skip


GRAY = (np.indices((40, 60)).sum(0) * 255 // 98).astype(np.int64)  # 0 to 255


@pytest.mark.parametrize("kind", ["I;16", "I", "RGB"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_camera_data_in_16_bits_is_read_right_or_refused(kind, bits, tmp_path):
    values, path = GRAY * (2**bits - 1) // 255, tmp_path / "image.png"
    if kind == "RGB":
        path.write_bytes(png_of(np.stack([values] * 3, -1)))
    else:
        path = path.with_suffix(".tif")
        Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32}[kind])).save(path)
    if bits == 16:
        Image.fromarray(GRAY.astype(np.uint8)).save(tmp_path / "gray.png")
        expected = gaussad.load_image(tmp_path / "gray.png", 32).int()
        assert (gaussad.load_image(path, 32).int() - expected).abs().max() <= 1
    else:
        with pytest.raises(ValueError, match=f"{path.name}: .* or save as 8 bits"):
            gaussad.load_image(path, 32)


@pytest.mark.parametrize("mode, change, options", [
    ("int32", lambda x: x - 300, {}), ("int32", lambda x: 2 * x, {}),
    ("uint16", lambda x: x, {"tiffinfo": {262: 0}}), ("float32", lambda x: x, {}),
])  # fmt: skip
def test_pixels_of_another_meaning_are_refused(mode, change, options, tmp_path):
    values = change(GRAY * 257).astype(mode)
    Image.fromarray(values).save(tmp_path / "odd.tif", **options)
    with pytest.raises(ValueError, match="odd.tif: pixels are not from 0, black, to 65535, white"):
        gaussad.load_image(tmp_path / "odd.tif", 32)


def test_what_is_not_opaque_is_drawn_over_black(tmp_path):
    for colour in (0, 255):
        pixels = np.full((64, 64, 4), colour, np.uint8)
        pixels[:32] = (90, 120, 30, 255)
        pixels[32:, :, 3] = 0
        Image.fromarray(pixels).save(tmp_path / f"{colour}.png")
    black, white = (gaussad.load_image(tmp_path / f"{colour}.png", 32) for colour in (0, 255))
    assert torch.equal(black, white) and not black[:, 17:].any() and (black[1, :15] == 120).all()


def test_image_past_pillows_limit_is_refused_with_the_way_round_it(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "scan.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="scan.png is too big .*: shrink it, or cut it"):
        gaussad.load_image(tmp_path / "scan.png", 32)


DEFECT = np.zeros((50, 70), bool)
DEFECT[10:20, 30:60] = True


def drawn(colour, rest, mode="RGBA", palette=None):
    """The defect in one colour, the rest in another."""
    image = Image.new(mode, DEFECT.shape[::-1], rest)
    image.paste(colour, mask=Image.fromarray(DEFECT))
    if palette:
        image.putpalette(palette)
    return image


MASKS = {
    "white_on_transparent_white": drawn((255, 255, 255, 255), (255, 255, 255, 0)),
    "black_on_transparent": drawn((0, 0, 0, 255), (0, 0, 0, 0)),
    "white_on_opaque_black": drawn((255, 255, 255, 255), (0, 0, 0, 255)),
    "dark_instance": drawn((0, 0, 1), (0, 0, 0), "RGB"),
    "dark_gray_with_alpha": drawn((1, 255), (0, 255), "LA"),
    "all_black_palette": drawn(1, 0, "P", [0] * 768),
    "16_bits": Image.fromarray(DEFECT.astype(np.uint16)),
    "one_bit": drawn(1, 0, "1"),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_of_any_kind_is_where_the_defect_is(name, tmp_path):
    MASKS[name].save(tmp_path / "mask.png")
    expected = Image.fromarray(DEFECT).resize((350, 350), Image.Resampling.NEAREST)
    found = gaussad.load_mask(tmp_path / "mask.png", 350)
    assert found.dtype == torch.bool and np.array_equal(found, np.asarray(expected))
    for colour, mode in (((0, 0, 0, 0), "RGBA"), ((0, 0, 0, 255), "RGBA"), (0, "L")):
        Image.new(mode, (50, 50), colour).save(tmp_path / "empty.png")
        assert not gaussad.load_mask(tmp_path / "empty.png", 64).any()


def test_no_pixel_of_a_defect_vanishes_when_its_mask_is_made_smaller(tmp_path):
    for place in ((0, 0), (511, 300), (1023, 1023)):
        mask = np.zeros((1024, 1024), np.uint8)
        mask[place] = 255
        Image.fromarray(mask).save(tmp_path / "dot.png")
        found = gaussad.load_mask(tmp_path / "dot.png", 380).nonzero()
        assert [place[0] * 380 // 1024, place[1] * 380 // 1024] in found.tolist()


def test_image_turned_by_exif_and_its_mask_of_the_raw_size_go_together(tmp_path):
    exif = Image.Exif()
    for orientation in (1, 5, 6, 7, 8):
        exif[0x0112] = orientation
        picture = Image.fromarray((255 * DEFECT).astype(np.uint8))
        picture.save(tmp_path / "image.png", exif=exif)
        picture.save(tmp_path / "mask.png")
        image = gaussad.load_image(tmp_path / "image.png", 350)[0] > 127
        mask = gaussad.load_mask(tmp_path / "mask.png", 350, tmp_path / "image.png")
        assert (image != mask).float().mean() < 0.01, orientation


def test_masks_by_other_names_and_folders_of_masks_are_found(tmp_path):
    names = {"a.png": "a_mask.png", "b.jpg": "b.png", "c.png": "c.bmp", "d.png": "d_mask.PNG",
             "deep/e.png": "deep/e_mask.tif", "f.png": "f/000.png", "g.png": None}  # fmt: skip
    for image, mask in names.items():
        for path in [f"test/cut/{image}"] + [f"ground_truth/cut/{mask}"] * bool(mask):
            path = tmp_path / "part" / path
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (64, 64), 255).save(path)
    Image.new("L", (64, 64), 0).save(tmp_path / "part/ground_truth/cut/f/001.png")
    found = gaussad.list_samples(tmp_path, "part", "test")
    assert len(found) == len(names)
    for sample in found:
        mask = names[sample.path.relative_to(tmp_path / "part/test/cut").as_posix()]
        assert (sample.mask is None) == (mask is None) and sample.defect == "cut"
        assert mask is None or gaussad.load_mask(sample.mask, 32).all()


def test_images_are_found_by_any_suffix_at_any_depth_and_others_are_counted(tmp_path):
    names = ["a.jfif", "b.jp2", "c.tga", "d.PNG", "deep/deeper/e.webp"]
    for name in [*names, ".hidden.png", ".ipynb_checkpoints/a.png", "notes.txt", "deep/data.csv"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match="2 files in .* passed over"):
        found = gaussad.list_images([tmp_path])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == names


def test_normal_folder_is_good_in_any_case_and_one_like_it_is_told(tmp_path):
    for folder in ("train/Good", "test/GOOD", "test/ok"):
        (tmp_path / "part" / folder).mkdir(parents=True)
        Image.new("L", (64, 64)).save(tmp_path / "part" / folder / "a.png")
    assert len(gaussad.list_samples(tmp_path, "part", "train")) == 1
    with pytest.warns(UserWarning, match="ok counts as a defect: normal images are in .* 'good'"):
        found = gaussad.list_samples(tmp_path, "part", "test")
    assert [sample.defect for sample in found] == ["good", "ok"]


def test_copies_are_told_and_left_out(demo, cli, tmp_path):
    paths = sorted((demo / "demo/train/good").iterdir())[:12]
    (tmp_path / "images").mkdir()
    for i, path in enumerate([*paths, *paths[:5] * 2]):
        shutil.copy(path, tmp_path / f"images/{i:02d}.png")
    given = ["--normal", tmp_path / "images", "--out", tmp_path / "run", *TINY, "--steps", 0]
    with pytest.warns(UserWarning, match="10 of 22 normal images are copies, and are left out"):
        code, output, _ = cli("train.py", *given)
    assert code == 0 and "6 images to fit, 6 held out" in output


def test_one_unreadable_file_of_many_is_named_and_the_rest_is_scored(trained, demo, cli, tmp_path):
    shutil.copytree(demo / "demo/test/stain", tmp_path / "images")
    (tmp_path / "images/003.png").write_text("not an image")
    given = ["--model", trained[0] / "detector.pt", "--out", tmp_path, "--images"]
    result = cli("evaluate.py", *given, tmp_path / "images")
    assert_one_line(result, "cannot read the image .*003.png")
    rows = list(csv.DictReader((tmp_path / "scores.csv").open(newline="")))
    assert len(rows) == 7 and "003.png" not in str(rows)


def test_anomalous_images_without_a_mask_or_with_an_empty_one_are_counted(trained, demo, cli,
                                                                          tmp_path):  # fmt: skip
    shutil.copytree(demo / "demo", tmp_path / "demo")
    (tmp_path / "demo/ground_truth/stain/003_mask.png").unlink()
    Image.new("L", (64, 64)).save(tmp_path / "demo/ground_truth/stain/004_mask.png")
    code, output, error = cli("evaluate.py", "--data", tmp_path, "--category", "demo", "--model",
                              trained[0], "--out", tmp_path)  # fmt: skip
    assert code == 0 and "_mask" in output, error
    assert json.loads((tmp_path / "metrics.json").read_text())["n_without_mask"] == 2


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_weights_of_a_training_are_understood(prefix, key, tmp_path):
    network = models.mobilenet_v3_small()
    state = {prefix + name: value for name, value in network.state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "weights.pth")
    extractor = FeatureExtractor(BACKBONE, weights=tmp_path / "weights.pth")
    images = torch.rand(1, 3, 64, 64)
    expected = network.eval().features(normalised(images))
    assert relative(extractor(images)[-1].detach(), expected.detach()) < 1e-4


def test_weights_that_cannot_be_used_are_told_for_what_they_are(tmp_path):
    state = models.mobilenet_v3_small().state_dict()
    torch.save({f"encoder.{name}": value for name, value in state.items()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="it has encoder.features.*, and features.* are needed"):
        FeatureExtractor(BACKBONE, weights=tmp_path / "other.pth")
    state["features.0.0.weight"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="weights in .*nan.pth are not all finite"):
        FeatureExtractor(BACKBONE, weights=tmp_path / "nan.pth")


def test_safetensors_are_read_where_the_package_is(tmp_path, monkeypatch):
    tensors = {"x": torch.rand(3)}
    (tmp_path / "a.safetensors").write_bytes(b"none")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # not installed
    with pytest.raises(ValueError, match="a.safetensors, pip install safetensors"):
        gaussad.load_plain(tmp_path / "a.safetensors")
    monkeypatch.undo()
    pytest.importorskip("safetensors.torch").save_file(tensors, tmp_path / "a.safetensors")
    assert torch.equal(gaussad.load_plain(tmp_path / "a.safetensors")["x"], tensors["x"])


def test_broken_download_is_told_with_what_to_delete(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("invalid hash value")

    monkeypatch.setattr(models, "get_model", broken)
    with pytest.raises(ConnectionError, match="invalid hash value.*delete .*checkpoints"):
        FeatureExtractor(BACKBONE)


@pytest.mark.parametrize("change", [lambda x: 255 * x, lambda x: (x - 0.5) / 0.25])
def test_float_images_of_another_range_are_an_error(change, fitted):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        fitted[0](change(fitted[1]))


# ------------------------------------------------------------------------------------------------
# The real thing
# ------------------------------------------------------------------------------------------------

real = pytest.mark.skipif(
    not {"GAUSSAD_DATA", "GAUSSAD_WEIGHTS"} <= os.environ.keys(),
    reason="GAUSSAD_DATA and GAUSSAD_WEIGHTS name no data and weights",
)


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
    none = torch.zeros(320, 320, dtype=torch.bool)
    masks = torch.stack([gaussad.load_mask(s.mask, 320) if s.mask else none for s in test])
    assert 100 * gaussad.auroc(maps, masks) == pytest.approx(98.5, abs=0.5)
    assert 100 * gaussad.aupro(maps, masks) == pytest.approx(93.7, abs=1)


@real
@torch.inference_mode()
def test_efficientnet_lite0_on_transistor_through_ones_own_network(monkeypatch):
    shared = Path(os.environ["GAUSSAD_WEIGHTS"]).parent.parent
    monkeypatch.syspath_prepend(shared / "tools")
    lite = pytest.importorskip("efficientnet_lite")
    extractor = FeatureExtractor(list(lite.lite0().features), mean=lite.MEAN, std=lite.STD)
    assert extractor.levels == [5, 6, 7, 8, 9]
    normal, test = (gaussad.list_samples(os.environ["GAUSSAD_DATA"], "transistor", split)
                    for split in ("train", "test"))  # fmt: skip
    fit, held_out = gaussad.hold_out(gaussad.load_images([s.path for s in normal], 256))
    detector = GaussianAD(extractor)
    detector.fit_and_calibrate(torch.stack(fit).split(16), torch.stack(held_out))
    images = gaussad.load_images([sample.path for sample in test], 256).split(16)
    found = [detector.scores_and_maps(batch) for batch in images]
    labels = torch.tensor([sample.defect != "good" for sample in test])
    pooled = gaussad.auroc(torch.cat([scores for scores, _ in found]), labels)
    both = gaussad.auroc(torch.cat([detector.anomaly_score(*pair) for pair in found]), labels)
    assert 100 * pooled == pytest.approx(97.2, abs=1) and both > 0.99
