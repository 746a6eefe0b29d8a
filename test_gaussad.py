# SPDX-License-Identifier: MIT
"""Every test: the maths against independent references, the command lines by running them.

    python -m pytest

runs offline on the CPU on drawn data and random weights. With GAUSSAD_DATA (an MVTec AD root with
screw in it) and GAUSSAD_WEIGHTS (a state dict of mobilenet_v2) it also runs on the real thing.
"""

import copy
import csv
import json
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import struct
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

import evaluate
import gaussad
import train
from gaussad import FeatureExtractor, Gaussian, GaussianAD, Moments

HERE = Path(__file__).parent
BACKBONE = "mobilenet_v3_small"


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


@pytest.mark.parametrize("condition", [1.0, 1e8])
@pytest.mark.parametrize("n, c", [(12, 40), (40, 40), (3000, 15), (2, 5)])
def test_ledoit_wolf_equals_the_paper_and_scikit_learn(n, c, condition):
    x = random_samples(n, c, condition=condition)
    covariance, shrinkage = gaussad.ledoit_wolf(torch.tensor(x))
    expected, expected_shrinkage = naive_ledoit_wolf(x)
    assert relative(covariance, expected) < 1e-10
    assert abs(shrinkage.item() - expected_shrinkage) < 1e-10
    expected, expected_shrinkage = pytest.importorskip("sklearn.covariance").ledoit_wolf(x)
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
    for cuts in ([1, 2, 50], [96], [5, 90]):
        parts = np.split(np.arange(97), cuts)
        for order in (parts, parts[::-1]):
            moments = Moments()
            for part in order:
                moments.add(x[:, part])
            covariance, shrinkage = moments.ledoit_wolf()
            assert relative(covariance, whole) < 1e-9
            assert relative(shrinkage, whole_shrinkage) < 1e-9
            assert relative(moments.mean, x.mean(1)) < 1e-12


def test_samples_that_fit_no_gaussian_are_errors():
    with pytest.raises(ValueError, match="two samples"):
        gaussad.ledoit_wolf(torch.ones(1, 3))
    with pytest.raises(ValueError, match="two samples"):
        Moments().ledoit_wolf()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN"):
            gaussad.ledoit_wolf(torch.tensor([[1.0, 2.0], [bad, 0.0]]))
    covariance, shrinkage = gaussad.ledoit_wolf(torch.ones(5, 3))
    assert not covariance.any() and shrinkage == 0
    for rounding in (0, 3e-8):
        same = 5 + rounding * torch.randn(5, 3, dtype=torch.float64)
        with pytest.raises(ValueError, match="do not vary"):
            Gaussian.fit(Moments().add(same))
    with pytest.raises(ValueError, match="three samples"):
        Gaussian.fit(Moments().add(torch.rand(2, 3)))
    with pytest.raises(ValueError, match="not positive definite"):
        gaussad.whitening_matrix(torch.ones(2, 2))


@pytest.mark.parametrize("covariance", ["diagonal", "identity"])
def test_ablated_covariances(covariance):
    x = random_samples(50, 8, condition=1e4)
    variance = np.diag(naive_ledoit_wolf(x)[0]) if covariance == "diagonal" else 1
    expected = np.sqrt(((x - x.mean(0)) ** 2 / variance).sum(1))
    gaussian = Gaussian.fit(Moments().add(torch.tensor(x)), covariance=covariance)
    assert relative(gaussian.distance(torch.tensor(x)), expected) < 1e-10


def test_one_constant_feature_among_others_is_fitted():
    x = torch.tensor(random_samples(30, 4))
    x[:, 2] = 7.0
    assert Gaussian.fit(Moments().add(x)).distance(x).isfinite().all()


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


SHAPES = [(40, 3), (7, 12), (2, 3, 30, 5)]  # (..., N, C)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_distances_are_finite_and_not_negative(shape, dtype, seed):
    scale = 10.0 ** np.random.default_rng(seed).uniform(-6, 6)
    x = torch.tensor(scale * random_samples(*shape, condition=1e3, seed=seed), dtype=dtype)
    gaussian = Gaussian.fit(Moments().add(x))
    for samples in (x, x + 1e3 * scale, gaussian.mean.unsqueeze(-2)):
        distance = gaussian.distance(samples.movedim(-2, 0))
        assert distance.isfinite().all() and (distance >= 0).all()
    assert not distance.any()  # of the mean itself


@pytest.mark.parametrize("seed", range(5))
def test_distance_without_shrinkage_is_invariant_under_affine_maps(seed):
    rng = np.random.default_rng(seed)
    x = random_samples(200, 6, condition=1e2, seed=seed)
    mapped = x @ rng.normal(size=(6, 6)) * 10.0 ** rng.uniform(-6, 6, 6) + rng.normal(size=6)
    a, b = (Gaussian(torch.tensor(y.mean(0)),
                     gaussad.whitening_matrix(torch.tensor(np.cov(y.T, bias=True))))
            .distance(torch.tensor(y)) for y in (x, mapped))  # fmt: skip
    assert relative(a, b) < 1e-6


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scale_of_the_features_changes_no_ranking(scale):
    x = torch.tensor(random_samples(60, 20, condition=1e4, offset=1.0), dtype=torch.float32)
    y = torch.tensor(random_samples(60, 20, offset=1.0, seed=1), dtype=torch.float32)
    distances = [Gaussian.fit(Moments().add(s * x)).distance(s * y) for s in (1, scale)]
    assert torch.equal(*(distance.argsort() for distance in distances))


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


@pytest.mark.parametrize(
    "scores, labels",
    [([1.0, 2.0], [1, 1]), ([1.0, 2.0], [0, 0]), ([], []), ([1.0, float("nan")], [0, 1]),
     ([1.0, 2.0], [0, 2]), ([1.0, 2.0, 3.0], [0, 1])],
)  # fmt: skip
def test_auroc_of_what_has_none_is_an_error(scores, labels):
    with pytest.raises(ValueError, match="AUROC"):
        gaussad.auroc(torch.tensor(scores), torch.tensor(labels))


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_of_ranks_alone_and_turns_round_with_the_sign(seed):
    rng = np.random.default_rng(seed)
    labels = torch.tensor(rng.random(80) < rng.uniform(0.1, 0.9))
    scores = torch.tensor(rng.integers(-9, 9, 80)).to([torch.float32, torch.float64][seed % 2])
    found = gaussad.auroc(scores, labels)
    for monotone in (lambda x: 3 * x + 7, torch.exp, torch.atan, lambda x: x**3):
        assert gaussad.auroc(monotone(scores), labels) == found
    assert gaussad.auroc(-scores, labels) == pytest.approx(1 - found, abs=1e-15)
    assert gaussad.auroc(scores, ~labels) == pytest.approx(1 - found, abs=1e-15)


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
        assert 0 <= found <= 1


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


def test_aupro_of_a_perfect_and_of_an_inverted_map():
    masks = torch.zeros(2, 20, 20, dtype=torch.bool)
    masks[0, 5:8, 5:8] = True
    assert gaussad.aupro(masks.float(), masks) == 1
    assert gaussad.aupro(-masks.float(), masks) == 0


@pytest.mark.parametrize("seed", range(5))
def test_aupro_is_a_share_of_ranks_alone_that_rises_with_a_better_map(seed):
    rng = np.random.default_rng(seed)
    masks = torch.tensor(rng.random((3, 15, 12)) < 0.2)
    maps = torch.tensor(rng.integers(0, 50, masks.shape), dtype=torch.float64)
    worse = gaussad.aupro(maps, masks)
    assert 0 <= worse <= 1 and gaussad.aupro(torch.exp(maps), masks) == worse
    for rise in (3, 10, 60):  # the last one puts all anomalous pixels first
        better = gaussad.aupro(maps + rise * masks, masks)
        assert worse - 1e-12 < better <= 1
        worse = better
    assert worse == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    "maps, masks, message",
    [
        (torch.rand(2, 4, 4), torch.zeros(2, 4, 4), "anomalous and normal pixels"),
        (torch.rand(2, 4, 4), torch.ones(2, 4, 4), "anomalous and normal pixels"),
        (torch.full((2, 4, 4), torch.nan), torch.eye(4).expand(2, 4, 4), "NaN"),
        (torch.rand(2, 4, 4), torch.rand(2, 4, 4), "0 and 1"),
        (torch.rand(2, 4, 4), torch.ones(2, 4, 5), r"\(N, H, W\)"),
        (torch.rand(4, 4), torch.ones(4, 4), r"\(N, H, W\)"),
    ],
)
def test_aupro_of_what_has_none_is_an_error(maps, masks, message):
    with pytest.raises(ValueError, match=message):
        gaussad.aupro(maps, masks)
    with pytest.raises(ValueError, match="limit"):
        gaussad.aupro(torch.rand(1, 4, 4), torch.eye(4)[None], 0.0)


# ------------------------------------------------------------------------------------------------
# Features
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backbone, levels",
    [
        ("efficientnet_b0", [5, 6, 7, 8, 9]),
        ("efficientnet_v2_s", [5, 6, 7, 8]),
        ("mobilenet_v2", [11, 14, 17, 18, 19]),
        ("mobilenet_v3_large", [11, 13, 16, 17]),
        ("resnet18", [4, 5]),
        ("resnext50_32x4d", [4, 5]),
        ("wide_resnet50_2", [4, 5]),
    ],
)
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
@pytest.mark.parametrize("backbone", ["efficientnet_b0", "mobilenet_v2", "mobilenet_v3_small"])
def test_levels_are_torchvisions_feature_maps(backbone, tmp_path):
    images, network = torch.rand(2, 3, 64, 64), with_statistics(models.get_model(backbone))
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    maps = FeatureExtractor(backbone, [3, 9], tmp_path / "weights.pth")(images)
    for level, found in zip([3, 9], maps):
        expected = network.features[:level](normalised(images))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_levels_of_a_resnet_are_its_stem_and_stages(backbone, tmp_path):
    network, outputs = with_statistics(models.get_model(backbone)), []
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    for module in (network.relu, network.layer1, network.layer2, network.layer3, network.layer4):
        module.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    images = torch.rand(2, 3, 64, 64)
    network(normalised(images))
    maps = FeatureExtractor(backbone, [1, 2, 3, 4, 5], tmp_path / "weights.pth")(images)
    for found, expected in zip(maps, outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


@torch.no_grad()
def test_bytes_and_floats_are_the_same_image():
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    extractor = FeatureExtractor(BACKBONE, weights="random")
    for a, b in zip(extractor(images), extractor(images / 255)):
        torch.testing.assert_close(a, b)


def test_weights_from_a_file_without_classifier(tmp_path):
    network = models.mobilenet_v3_small()
    features = {k: v for k, v in network.state_dict().items() if k.startswith("features.")}
    torch.save(features, tmp_path / "features.pth")
    extractor = FeatureExtractor(BACKBONE, weights=tmp_path / "features.pth")
    images = torch.rand(1, 3, 64, 64)
    expected = network.eval().features(normalised(images))
    torch.testing.assert_close(extractor(images)[-1], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="does not hold the weights of mobilenet_v2"):
        FeatureExtractor("mobilenet_v2", weights=tmp_path / "features.pth")


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
        floor = 1e-3 * np.trace(found, axis1=2, axis2=3).mean() / x.shape[-1]
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
def test_map_points_at_the_defect_even_where_all_normal_images_are_blank(fitted):
    torch.manual_seed(0)
    images = torch.rand(30, 3, 64, 64)
    images[..., :48] = 0.5  # with the features of half the locations constant
    detector = GaussianAD(fitted[0].extractor, [2]).fit([images])
    image = images[:1].clone()
    image[..., 20:28, 8:16] = 1.0
    maps = detector.anomaly_map(image)[0]
    assert maps.isfinite().all()
    row, column = divmod(maps.argmax().item(), 64)
    assert 12 <= row < 36 and column < 24


@torch.no_grad()
def test_calibration_is_of_the_images_given_and_outlasts_a_fit(fitted):
    images = fitted[1]
    detector = GaussianAD(fitted[0].extractor).fit([images])
    assert detector.threshold.isnan() and detector.map_threshold.isnan()
    held_out = torch.rand(12, 3, 64, 64)
    found = detector.held_out_scores(held_out.split(5))
    detector.calibrate(found)
    scores, maps = detector.scores_and_maps(held_out)
    assert detector.threshold > scores.max() and detector.map_threshold > maps.max()
    assert detector.threshold == gaussad.tail_quantile(scores, 0.99)
    usual = np.sort(maps.flatten(1).numpy())[:, int(0.99 * 64 * 64)]
    assert np.sort(usual)[5] == detector.map_usual
    for column, expected in zip(found.T, (scores, maps.amax((1, 2)), usual), strict=True):
        assert np.allclose(column, expected, rtol=1e-6, atol=0)
    threshold = detector.threshold.item()
    assert detector.fit([images, held_out]).threshold == threshold
    with pytest.raises(ValueError, match="no normal images"):
        detector.held_out_scores([])


@pytest.mark.parametrize("n, tolerance", [(6, 0.007), (30, 0.005), (64, 0.004), (2000, 0.002)])
def test_tail_quantile_keeps_the_false_alarm_rate(n, tolerance):
    rng = np.random.default_rng(0)
    draw = lambda *shape: 40 + 5 * rng.gamma(20, size=shape) / 20**0.5
    future, thresholds = draw(10**5), []
    for scores in draw(200, n):
        thresholds.append(gaussad.tail_quantile(torch.tensor(scores), 0.99))
    assert (future[:, None] > np.array(thresholds)).mean() == pytest.approx(0.01, abs=tolerance)


def test_tail_quantile_of_few_many_and_equal_scores():
    many = torch.rand(3000, dtype=torch.float64)
    assert gaussad.tail_quantile(many, 0.5) == pytest.approx(np.quantile(many, 0.5), abs=1e-12)
    assert gaussad.tail_quantile(torch.tensor([2.0]), 0.99) == 2
    assert gaussad.tail_quantile(torch.full((9,), 3.0), 0.99) == 3
    for scores, quantile in (([], 0.9), ([1.0, float("nan")], 0.9), ([1.0, 2.0], 1.0)):
        with pytest.raises(ValueError, match="quantile"):
            gaussad.tail_quantile(torch.tensor(scores), quantile)


@pytest.mark.parametrize("batches", [10, pytest.param(100, marks=pytest.mark.benchmark)])
def test_ten_times_the_images_take_no_more_memory_to_fit(batches):
    code = f"""if True:
        import resource, torch
        from gaussad import FeatureExtractor, GaussianAD
        detector = GaussianAD(FeatureExtractor("{BACKBONE}", weights="random"))
        peaks = []
        for n in ({batches}, 10 * {batches}):  # of 10 images
            detector.fit(torch.rand(10, 3, 64, 64) for _ in range(n))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        print(peaks[1] / peaks[0])
    """
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert float(done.stdout) < 1.05, done.stderr


def test_saved_detector_is_the_same_to_the_bit_and_needs_no_download(fitted, tmp_path):
    detector, images = fitted
    detector.calibrate(detector.held_out_scores([images])).save(tmp_path / "detector.pt")
    generator_state = torch.random.get_rng_state()
    loaded = GaussianAD.load(tmp_path / "detector.pt")
    assert torch.equal(torch.random.get_rng_state(), generator_state)
    assert torch.equal(loaded(images), detector(images))
    assert torch.equal(loaded.anomaly_map(images), detector.anomaly_map(images))
    assert loaded.threshold == detector.threshold and not loaded.threshold.isnan()
    assert all(p.requires_grad for p in loaded.parameters())  # it can be trained on
    assert [path.name for path in tmp_path.iterdir()] == ["detector.pt"]


@pytest.mark.parametrize("change", [
    {"image_size": 64}, {"image_size": [0, 0]}, {"image_size": [None, 64]},
    {"image_size": [96, 64]}, {"gaussians.0.mean": torch.zeros(3, dtype=torch.float64)},
    {"gaussians.0.whitening": torch.eye(24).int()},
    {"extractor.mean": torch.full((3, 1, 1), torch.nan)},
    {"map_gaussians.0.mean": torch.full((4, 4, 24), torch.nan, dtype=torch.float64)},
])  # fmt: skip
def test_altered_detector_is_found_when_loaded(change, fitted, tmp_path):
    fitted[0].save(tmp_path / "detector.pt")
    content = torch.load(tmp_path / "detector.pt")
    (content if "image_size" in change else content["state"]).update(change)
    torch.save(content, tmp_path / "detector.pt")
    with pytest.raises(ValueError, match="detector.pt is not a detector saved by this gaussad"):
        GaussianAD.load(tmp_path / "detector.pt")


def test_failed_save_keeps_the_old_file(fitted, tmp_path, monkeypatch):
    detector, _ = fitted
    detector.save(tmp_path / "detector.pt")
    before = (tmp_path / "detector.pt").read_bytes()

    def full_disk(content, path):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        detector.save(tmp_path / "detector.pt")
    assert (tmp_path / "detector.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["detector.pt"]


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


def readme_example(number):
    text = (HERE / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[number]
    return code.replace('"efficientnet_b4"', f'"{BACKBONE}", weights="random"')


def test_readme_examples_train_and_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"batches": [torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)] * 3}
    torch.manual_seed(0)
    exec(readme_example(0), names)
    torch.manual_seed(0)  # which drew the random weights it began with
    assert names["scores"].shape == (8,) and names["maps"].shape == (8, 64, 64)
    before = FeatureExtractor(BACKBONE, weights="random").state_dict()
    after = GaussianAD.load("detector.pt").extractor.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    exec(readme_example(1), names)
    exported = torch.export.load("detector.pt2").module()
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    expected = GaussianAD.load("detector.pt").scores_and_maps(images)
    for found, value in zip(exported(images), expected, strict=True):
        torch.testing.assert_close(found, value)


def test_misuse_of_a_detector_is_an_error(fitted):
    detector, images = fitted
    with pytest.raises(ValueError, match="images are uint8, or floating-point .* torch.int64"):
        detector(images.long())
    with pytest.raises(ValueError, match="not fitted"):
        GaussianAD(FeatureExtractor(BACKBONE, [2], "random"))(images)
    with pytest.raises(ValueError, match="was fitted to"):
        detector(images[..., :32])
    for levels in ([3], []):
        with pytest.raises(ValueError, match="map levels"):
            GaussianAD(detector.extractor, levels)
    with pytest.raises(ValueError, match="several sizes"):
        GaussianAD(detector.extractor).fit([images, images[..., :32]])
    for batches in ([], [images[:2]]):
        with pytest.raises(ValueError, match="three samples"):
            GaussianAD(detector.extractor).fit(batches)
    with pytest.raises(ValueError, match="do not vary"):
        GaussianAD(detector.extractor).fit([images[:1].expand(9, -1, -1, -1)] * 3)


# ------------------------------------------------------------------------------------------------
# Augmentation validator
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos():
    """Images of one colour each, so that what came from where can be told."""
    colour = torch.arange(8, dtype=torch.uint8) * 30
    return colour[:, None, None, None].expand(8, 3, 64, 64).contiguous()


def test_mixup_lies_between_an_image_and_the_one_before(photos):
    mixed = gaussad.mixup(photos).int()
    low, high = torch.minimum(photos, photos.roll(1, 0)), torch.maximum(photos, photos.roll(1, 0))
    assert mixed.shape == photos.shape and (mixed >= low).all() and (mixed <= high).all()
    assert (mixed.flatten(1).amin(1) == mixed.flatten(1).amax(1)).all()  # one λ for each image


def test_cutout_and_cutmix_change_one_square_of_the_stated_area(photos):
    torch.manual_seed(0)
    noise = torch.randint(0, 256, (50, 3, 64, 64), dtype=torch.uint8)
    for augment in (gaussad.cutout, gaussad.cutmix):
        changed = (augment(noise) != noise).any(1)
        assert changed.flatten(1).any(1).float().mean() > 0.9  # a few lie across the border
        for where in changed:
            rows, columns = where.any(1).sum(), where.any(0).sum()
            assert rows * columns <= 0.11 * 64 * 64
    pasted = gaussad.cutmix(photos)
    assert ((pasted == photos) | (pasted == photos.roll(1, 0))).all()


def test_validator_draws_once_from_its_seed_and_leaves_the_generator_alone():
    images = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    before = torch.random.get_rng_state()
    one, same, other = (gaussad.AugmentationValidator(images, s, versions=11) for s in (1, 1, 2))
    assert len(gaussad.AugmentationValidator(images).augmented["mixup"]) == 132  # 22 of each
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(one.augmented) == ["mixup", "cutout", "cutmix", "augmix"]
    for name, augmented in one.augmented.items():
        assert augmented.dtype == torch.uint8 and augmented.shape == (12, 3, 64, 64)
        assert not torch.equal(augmented[:6], augmented[6:])
        assert torch.equal(augmented, same.augmented[name])
        assert not torch.equal(augmented, other.augmented[name])
    with pytest.raises(ValueError, match="two"):
        gaussad.AugmentationValidator(images[:1])


def test_validator_is_auroc_and_separation_of_normal_against_augmented():
    metrics = pytest.importorskip("sklearn.metrics")
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    validator = gaussad.AugmentationValidator(images, versions=60)
    score = lambda batch: batch.double().std((1, 2, 3))
    found = validator(score, batch_size=7)
    expected = torch.zeros(20, dtype=torch.float64)
    for name, augmented in validator.augmented.items():
        scores = torch.cat([score(images), score(augmented)])
        auroc = metrics.roc_auc_score([0] * 20 + [1] * 60, scores)
        assert found.auroc[name] == pytest.approx(auroc, abs=1e-12)
        for i, image in enumerate(score(augmented).tolist()):
            expected[i % 20] += np.log(image) / 12
    expected -= 2 * score(images).log()
    assert relative(found.separation, expected) < 1e-12
    mean = np.mean(list(found.auroc.values()))
    assert found.components.mean().item() == pytest.approx(mean, abs=1e-12)


def test_components_are_those_of_the_auroc_by_leaving_images_out():
    """DeLong's standard error is the infinitesimal jackknife's: nearly that of leaving out, one
    at a time, an image with all its versions."""
    metrics = pytest.importorskip("sklearn.metrics")
    images = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8)
    validator = gaussad.AugmentationValidator(
        images, versions=180, augmentations={"mixup": gaussad.mixup}
    )
    score = lambda batch: batch.double().mean((1, 2, 3)).round(decimals=1)  # with ties
    found = validator(score)
    normal, augmented = score(images).numpy(), score(validator.augmented["mixup"]).numpy()
    left = []
    for i in range(60):
        a, b = np.delete(normal, i), np.delete(augmented.reshape(3, 60), i, 1).ravel()
        left.append(metrics.roc_auc_score([0] * 59 + [1] * 177, np.r_[a, b]))
    jackknife = np.sqrt(59 * np.var(left))
    error = found.components.std().item() / 60**0.5
    assert error == pytest.approx(jackknife, rel=0.05)


def test_gain_is_paired():
    before = torch.tensor(random_samples(30, 1, offset=9.0))[:, 0]
    change = 0.1 + 0.01 * torch.tensor(random_samples(30, 1, seed=1))[:, 0]
    one = gaussad.Validation({}, -before, before)
    two = gaussad.Validation({}, -before - change, before + change)
    gain, error = two.gain_over(one)
    assert gain == pytest.approx(change.mean().item())
    assert error == pytest.approx(np.std(change.numpy(), ddof=1) / 30**0.5)
    assert two.auroc_gain_over(one) == pytest.approx((-gain, error))


@pytest.mark.parametrize(
    "gain, auroc_gain, better", [(3, 0, True), (1, 3, False), (3, -1, True), (3, -3, False)]
)
def test_better_is_a_gain_beyond_noise_and_no_fall_of_the_auroc(gain, auroc_gain, better):
    noise = torch.tensor(random_samples(30, 2)).T
    noise = (noise - noise.mean(1, keepdim=True)) / noise.std(1, keepdim=True) * 30**0.5
    zero = torch.zeros(30, dtype=torch.float64)
    before = gaussad.Validation({}, zero, zero)
    after = gaussad.Validation({}, auroc_gain + noise[0], gain + noise[1])  # standard errors of 1
    assert after.is_better_than(before) == better
    assert not before.is_better_than(before)


def test_folds_are_pooled():
    folds = [gaussad.Validation({"mixup": value}, torch.full((n,), value), torch.arange(n) * value)
             for n, value in ((2, 0.5), (3, 0.7))]  # fmt: skip
    pooled = gaussad.Validation.pooled(folds)
    assert pooled.auroc == {"mixup": pytest.approx(0.62)}
    assert pooled.components.tolist() == pytest.approx([0.5, 0.5, 0.7, 0.7, 0.7])
    assert pooled.separation.tolist() == pytest.approx([0, 0.5, 0, 0.7, 1.4])


def test_separation_falls_when_normal_images_drift_and_when_augmented_ones_fall_together():
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    validator = gaussad.AugmentationValidator(images, augmentations={"cutmix": gaussad.cutmix})
    known = {image.numpy().tobytes() for image in images}

    def score(normal, augmented):
        return lambda batch: torch.tensor(
            [normal if image.numpy().tobytes() in known else augmented for image in batch]
        )

    frozen = validator(score(10.0, 12.0))
    assert validator(score(10.0, 13.0)).gain_over(frozen)[0] > 0
    assert validator(score(9.0, 10.8)).gain_over(frozen)[0] > 0  # nearer by the same ratio
    assert validator(score(10.0, 11.0)).gain_over(frozen)[0] < 0
    assert validator(score(11.0, 13.2)).gain_over(frozen)[0] < 0


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


def test_whole_image_is_resized_to_a_square(tmp_path):
    image = Image.new("L", (100, 20))
    image.paste(255, (0, 0, 50, 20))
    image.save(tmp_path / "wide.png")
    found = gaussad.load_image(tmp_path / "wide.png", 64)
    assert (found[..., :31] == 255).all() and (found[..., 33:] == 0).all()


def test_samples_of_the_layout(demo):
    train = gaussad.list_samples(demo, "demo", "train")
    test = gaussad.list_samples(demo, "demo", "test")
    assert {(s.defect, s.label, s.mask) for s in train} == {("good", 0, None)} and len(train) == 48
    assert {s.defect for s in test} == {"good", "hole_missing", "scratch", "stain"}
    for sample in test:
        assert sample.label == (sample.defect != "good") == (sample.mask is not None)
        if sample.mask:
            image, mask = (np.asarray(Image.open(p)) for p in (sample.path, sample.mask))
            assert image.shape == mask.shape and mask.any()


def test_split_is_drawn_by_its_seed_and_loses_nothing():
    samples = list(range(320))
    [(fit, held_out)] = gaussad.split_normal(samples, seed=0)
    assert len(fit) == 256 and sorted(fit + held_out) == samples
    assert gaussad.split_normal(samples, seed=0) == [(fit, held_out)]
    assert gaussad.split_normal(samples, seed=1) != [(fit, held_out)]
    with pytest.raises(ValueError, match="too few"):
        gaussad.split_normal(range(5), 0)


@pytest.mark.parametrize("n, folds", [(6, 3), (7, 3), (9, 4), (10, 5), (39, 5), (40, 1)])
def test_few_images_are_each_held_out_once(n, folds):
    splits = gaussad.split_normal(range(n), seed=0)
    assert len(splits) == folds
    for fit, held_out in splits:
        assert sorted(fit + held_out) == list(range(n)) and len(fit) >= 3 and len(held_out) >= 2
    if folds > 1:
        assert sorted(i for _, held_out in splits for i in held_out) == list(range(n))


def test_batches_hold_every_image_once_and_in_order(demo):
    paths = [sample.path for sample in gaussad.list_samples(demo, "demo", "train")]
    images = gaussad.Images(paths, 32, workers=3)
    expected = torch.stack([gaussad.load_image(path, 32) for path in paths])
    assert torch.equal(torch.cat(list(images.batches(7))), expected)
    shuffled = torch.cat(list(images.batches(7, torch.Generator().manual_seed(0))))
    assert not torch.equal(shuffled, expected)
    assert torch.equal(shuffled.flatten(1).sum(1).sort()[0], expected.flatten(1).sum(1).sort()[0])


# ------------------------------------------------------------------------------------------------
# Command lines
# ------------------------------------------------------------------------------------------------

TINY = ["--backbone", BACKBONE, "--weights", "random", "--image-size", "64"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    gaussad.draw_demo(root, size=64)
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


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """A run of train.py as a process of its own, without the test images; (run folder, output)."""
    work = tmp_path_factory.mktemp("work")
    (work / "data/demo").mkdir(parents=True)
    (work / "data/demo/train").symlink_to(demo / "demo/train")
    command = [sys.executable, HERE / "train.py", "--data", "data", "--category", "demo", *TINY]
    done = subprocess.run([*command, "--steps", "33"], cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return work / "runs/demo", done.stdout


def test_train_writes_the_history_and_the_best_detector(trained):
    folder, output = trained
    history = json.loads((folder / "history.json").read_text())
    assert [record["step"] for record in history["checks"]] == [0, 32, 33]
    assert history["checks"][0]["loss"] is None and history["checks"][2]["loss"] > 0
    assert history["settings"]["seed"] == 0 and history["settings"]["backbone"] == BACKBONE
    assert history["checks"][0]["gain"] == 0 and set(history["checks"][1]["auroc"]) == {
        "mixup", "cutout", "cutmix", "augmix"}  # fmt: skip
    chosen = next(r for r in history["checks"] if r["step"] == history["best_step"])
    assert chosen["step"] == 0 or chosen["gain"] > 0
    assert f"Step {history['best_step']}" in output
    assert sorted(p.name for p in folder.iterdir()) == ["detector.pt", "history.json"]


def test_saved_detector_is_the_one_the_validator_saw_with_gaussians_of_all_images(trained, demo):
    folder, _ = trained
    history = json.loads((folder / "history.json").read_text())
    [parts] = gaussad.split_normal(gaussad.list_samples(demo, "demo", "train"), 0)
    load = lambda part: torch.stack([gaussad.load_image(sample.path, 64) for sample in part])
    fit, held_out = map(load, parts)
    saved = GaussianAD.load(folder / "detector.pt")
    again = GaussianAD.load(folder / "detector.pt").fit([*fit.split(16), *held_out.split(16)])
    assert torch.equal(saved(held_out), again(held_out))
    again.fit(fit.split(16))
    again.calibrate(again.held_out_scores(held_out.split(16)))
    assert again.threshold == saved.threshold and again.map_threshold == saved.map_threshold
    found = gaussad.AugmentationValidator(held_out, 0)(again, 16)
    chosen = next(r for r in history["checks"] if r["step"] == history["best_step"])
    assert found.auroc == chosen["auroc"]


def test_evaluate_writes_metrics_and_scores(trained, demo, cli):
    metrics_of = pytest.importorskip("sklearn.metrics").roc_auc_score
    folder, _ = trained
    code, output, error = cli("evaluate.py", "--data", demo, "--category", "demo", "--out", folder)
    assert code == 0 and "all anomalous" in output, error
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = list(csv.DictReader((folder / "scores.csv").open(newline="")))
    assert metrics["n_normal"] == 16 and metrics["n_anomalous"] == 24 and len(rows) == 40
    assert metrics["best_step"] == json.loads((folder / "history.json").read_text())["best_step"]
    scores = np.array([float(row["score"]) for row in rows])
    labels = np.array([int(row["label"]) for row in rows])
    assert metrics["image_auroc"] == pytest.approx(metrics_of(labels, scores), abs=1e-12)
    for defect, value in metrics["image_auroc_per_defect"].items():
        chosen = np.array([row["defect"] in ("good", defect) for row in rows])
        assert value == pytest.approx(metrics_of(labels[chosen], scores[chosen]), abs=1e-12)
    last = rows[32:]  # the last batch: the same batch gives the same bits
    images = torch.stack([gaussad.load_image(row["path"], 64) for row in last])
    with torch.no_grad():
        expected = GaussianAD.load(folder / "detector.pt")(images)
    assert [float(row["score"]) for row in last] == expected.tolist()
    maxima = np.array([float(row["map_maximum"]) for row in rows])
    expected = metrics_of(labels, maxima)
    assert metrics["image_auroc_from_map"] == pytest.approx(expected, abs=1e-12)


def test_report_is_one_file_with_the_figures(trained, demo, cli):
    folder, _ = trained
    assert cli("evaluate.py", "--data", demo, "--category", "demo", "--out", folder)[0] == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"http|<script|<link|src=\"(?!data:)", page)
    metrics = json.loads((folder / "metrics.json").read_text())
    for key in evaluate.RESULTS:
        assert f"<td>{key}</td><td>{100 * metrics[key]:.1f}</td>" in page
    rows = list(csv.DictReader((folder / "scores.csv").open(newline="")))
    wrong = [row for row in rows if (row["verdict"] == "anomalous") != (row["label"] == "1")]
    assert page.count("<img ") == min(12, sum(row["label"] == "1" for row in wrong)) + min(
        12, sum(row["label"] == "0" for row in wrong))  # fmt: skip
    values = np.array([float(row["map_maximum"]) for row in rows])
    labels = np.array([int(row["label"]) for row in rows])
    points = [tuple(map(float, point.split(",")))
              for point in re.findall(r'points="([^"]*)"', page)[1].split()]  # fmt: skip
    expected = [(0, 0)] + [((values[labels == 0] >= t).mean(), (values[labels == 1] >= t).mean())
                           for t in sorted(values, reverse=True)]  # fmt: skip
    found = np.array([(x / 400, 1 - y / 250) for x, y in points])
    np.testing.assert_allclose(found, np.array(expected), atol=1e-3)


def test_pixel_metrics_are_those_of_the_maps_and_masks(trained, demo, cli):
    metrics_of = pytest.importorskip("sklearn.metrics").roc_auc_score
    folder, _ = trained
    code, _, error = cli("evaluate.py", "--data", demo, "--category", "demo", "--out", folder)
    assert code == 0, error
    metrics = json.loads((folder / "metrics.json").read_text())
    samples = gaussad.list_samples(demo, "demo", "test")
    images = torch.stack([gaussad.load_image(sample.path, 64) for sample in samples])
    with torch.no_grad():
        maps = GaussianAD.load(folder / "detector.pt").anomaly_map(images).numpy()
    masks = np.stack([np.asarray(Image.open(s.mask)) > 0 if s.mask else np.zeros((64, 64), bool)
                      for s in samples])  # fmt: skip
    expected = metrics_of(masks.ravel(), maps.ravel())
    assert metrics["pixel_auroc"] == pytest.approx(expected, abs=1e-6)
    assert metrics["aupro"] == pytest.approx(gaussad.aupro(*map(torch.tensor, (maps, masks))), 1e-4)
    assert metrics["n_without_mask"] == 0


def test_pictures_take_the_place_of_no_image(trained, demo, cli, tmp_path):
    shutil.copytree(demo / "demo/test/stain", tmp_path / "pictures")
    given = ["--model", trained[0] / "detector.pt", "--out", tmp_path, "--pictures", "--images"]
    result = cli("evaluate.py", *given, tmp_path / "pictures")
    assert_one_line(result, "the images are in .*pictures.* another --out")
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
    assert len(list((tmp_path / "pictures").iterdir())) == 8


def test_images_of_one_name_have_pictures_of_their_own(trained, demo, cli, tmp_path):
    for folder, name in (("false", "alarms.png"), ("a", "b_c.png"), ("a_b", "c.png"),
                         ("good", "0.png"), ("good", "0.bmp")):  # fmt: skip
        (tmp_path / "demo/test" / folder).mkdir(parents=True, exist_ok=True)
        saved(tmp_path / "demo/test" / folder / name)
    code, _, error = cli("evaluate.py", "--data", tmp_path, "--category", "demo", "--out",
                         trained[0], "--pictures")  # fmt: skip
    shutil.copytree(trained[0] / "pictures", tmp_path / "pictures")
    shutil.rmtree(trained[0] / "pictures")
    assert code == 0 and {path.stem for path in (tmp_path / "pictures").iterdir()} >= {
        "false_alarms_2", "a_b_c", "a_b_c_2", "good_0", "good_0_2"}, error  # fmt: skip


def test_pictures_of_every_image_on_one_scale(trained, demo, cli):
    folder, _ = trained
    code, output, error = cli("evaluate.py", "--data", demo, "--category", "demo", "--out", folder,
                              "--pictures")  # fmt: skip
    assert code == 0 and "Pictures are in" in output, error
    names = {path.name for path in (folder / "pictures").iterdir()}
    assert len(names - {"misses.png", "false_alarms.png"}) == 40 and "good_003.png" in names
    rows = csv.DictReader((folder / "scores.csv").open(newline=""))
    rows = [(float(row["map_maximum"]), row["defect"], row["path"]) for row in rows]
    _, defect, sample = max(row for row in rows if row[1] != "good")
    sample = Path(sample)
    picture = np.asarray(Image.open(folder / f"pictures/{defect}_{sample.name}")).astype(int)
    height = picture.shape[0] - 64
    plain, painted = picture[height:, :64], picture[height:, 64:]
    assert (plain == gaussad.load_image(sample, 64).permute(1, 2, 0).numpy()).all()
    mask = demo / "demo/ground_truth" / defect / f"{sample.stem}_mask.png"
    mask = np.asarray(Image.open(mask)) > 0
    outline = (painted == (0, 255, 0)).all(-1)
    assert outline.any() and not (outline & ~mask).any()
    detector = GaussianAD.load(folder / "detector.pt")
    with torch.no_grad():
        heat = detector.anomaly_map(gaussad.load_image(sample, 64)[None])[0].numpy()
    usual, threshold = detector.map_usual.item(), detector.map_threshold.item()
    heat = ((heat - usual) / (threshold - usual)).clip(0, 2)[..., None] / 2
    colour = np.concatenate([0 * heat + 1, 1 - heat, 0 * heat], -1) * 255
    expected = plain + (colour - plain) * 0.8 * np.sqrt(heat)
    assert heat.max() > 0 and np.abs(painted - expected)[~outline].max() < 2


def test_category_without_masks_gets_what_can_be_computed(trained, demo, cli, tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/test").symlink_to(demo / "demo/test")
    code, output, error = cli("evaluate.py", "--data", tmp_path, "--category", "demo",
                              "--out", trained[0], "--pictures")  # fmt: skip
    assert code == 0 and "24 anomalous images have no mask" in output, error
    metrics = json.loads((trained[0] / "metrics.json").read_text())
    assert metrics["pixel_auroc"] is None and metrics["aupro"] is None
    assert metrics["image_auroc"] > 0 and metrics["image_auroc_from_map"] > 0
    assert metrics["n_without_mask"] == 24


def test_masks_without_a_normal_pixel_leave_the_pixel_figures_out(trained, cli, tmp_path, demo):
    (tmp_path / "demo/test").mkdir(parents=True)
    (tmp_path / "demo/test/stain").symlink_to(demo / "demo/test/stain")
    (tmp_path / "demo/ground_truth/stain").mkdir(parents=True)
    for i in range(8):
        mask = Image.new("L", (64, 64), 255)
        mask.save(tmp_path / f"demo/ground_truth/stain/{i:03d}_mask.png")
    code, _, error = cli("evaluate.py", "--data", tmp_path, "--category", "demo", "--out",
                         trained[0])  # fmt: skip
    metrics = json.loads((trained[0] / "metrics.json").read_text())
    assert (code, metrics["pixel_auroc"], metrics["aupro"]) == (0, None, None), error


def test_same_seed_same_bits(trained, demo, cli, tmp_path):
    code, _, error = cli("train.py", "--data", demo, "--category", "demo", *TINY, "--steps", 33,
                         "--out", tmp_path)  # fmt: skip
    assert code == 0, error
    for name in ("history.json", "detector.pt"):
        assert (tmp_path / name).is_file()
    one, two = (GaussianAD.load(p / "detector.pt").state_dict() for p in (trained[0], tmp_path))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_diverging_training_keeps_the_best_and_says_so(demo, cli, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "history.json").write_text('{"settings": {}}')
    for name in ("detector.pt", "metrics.json", "scores.csv", "pictures/good_000.png"):
        (tmp_path / name).write_text("{}")
    code, output, error = cli("train.py", "--data", demo, "--category", "demo", *TINY, "--steps",
                              64, "--lr", "1e6", "--out", tmp_path)  # fmt: skip
    assert (code, error) == (0, "")
    assert "diverged" in output and "Step 0 (the frozen network)" in output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["detector.pt", "history.json"]
    assert GaussianAD.load(tmp_path / "detector.pt").image_size == [64, 64]


def test_step_without_a_finite_loss_changes_no_weight(fitted):
    detector, images = fitted
    optimizer = torch.optim.Adam(detector.parameters())
    before = [parameter.clone() for parameter in detector.parameters()]
    with pytest.raises(gaussad.DegenerateError, match="the loss is nan"):
        train.train_step(detector, optimizer, images * torch.nan)
    assert all(map(torch.equal, before, detector.parameters()))


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
    frozen = [*given, *TINY, "--steps", 0]
    code, output, error = cli("train.py", *frozen)
    assert code == 2 and re.search(r"^train.py: error: broken: no images in .*\n$", error)
    detectors = [tmp_path / name / "detector.pt" for name in ("disc", "plate")]
    written = [path.stat().st_mtime_ns for path in detectors]
    code, output, error = cli("evaluate.py", *given)
    assert code == 2 and re.search("^evaluate.py: error: broken: no detector.pt", error)
    results = json.loads((tmp_path / "results.json").read_text())
    categories = results["categories"]
    assert list(categories) == ["disc", "plate"]
    metrics = json.loads((tmp_path / "plate/metrics.json").read_text())
    expected = metrics["image_auroc"]
    assert categories["plate"]["image_auroc"] == expected == results["mean"]["image_auroc"]
    assert results["standard_error"]["image_auroc"] == 0  # twice the same data
    rows = list(csv.reader((tmp_path / "results.csv").open(newline="")))
    names = ["category", "disc", "plate", "mean", "standard_error"]
    assert [row[0] for row in rows] == names and float(rows[1][1]) >= 0
    assert re.search("(?m)^mean .*\n^standard_error", output)

    code, output, _ = cli("train.py", *frozen[:2], "--category", "disc", "plate", *frozen[4:])
    assert code == 0 and output.count("is finished; --force trains it anew") == 2
    assert [path.stat().st_mtime_ns for path in detectors] == written
    code, output, _ = cli("train.py", *frozen[:2], "--category", "disc", "plate", *frozen[4:],
                          "--seed", 1)  # fmt: skip
    assert code == 0 and "is finished" not in output  # other settings
    before = (tmp_path / "disc/detector.pt").stat().st_mtime_ns
    code, output, _ = cli("train.py", *frozen[:2], "--category", "disc", "plate", *frozen[4:],
                          "--seed", 1, "--force")  # fmt: skip
    assert code == 0 and (tmp_path / "disc/detector.pt").stat().st_mtime_ns > before


def test_where_all_categories_fail_each_is_told_once(two, cli, tmp_path):
    for name in ("disc", "plate"):
        (tmp_path / name / "train").mkdir(parents=True)
    for script, more in (("train.py", TINY), ("evaluate.py", [])):
        code, _, error = cli(script, "--data", tmp_path, "--category", "all", "--out",
                             tmp_path / "runs", *more)  # fmt: skip
        assert code == 2 and re.findall(r"error: (\w+):", error) == ["disc", "plate"]
    assert not list(tmp_path.glob("runs/*.json"))


def test_folder_that_cannot_be_made_is_told_before_scoring(trained, demo, cli, tmp_path):
    (tmp_path / "file").touch()
    result = cli("evaluate.py", "--model", trained[0] / "detector.pt", "--images",
                 demo / "demo/test/stain", "--out", tmp_path / "file/run")  # fmt: skip
    assert result[1] == ""
    assert_one_line(result, "cannot make the folder .*file/run: .*; choose one by --out")


def test_processes_of_torchrun_share_the_categories_and_wait_for_each_other(two, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               HERE / "train.py", "--data", two, "--category", "broken", "disc", "plate", *TINY,
               "--steps", "2", "--out", tmp_path]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 1 and "train.py: error: broken: no images in" in done.stderr
    assert sorted(path.parent.name for path in tmp_path.glob("*/detector.pt")) == ["disc", "plate"]
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


def test_verdicts_are_counted():
    labels, ratios = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1.1, 0.3, 1.0, 2.0, 0.9])
    names = "false_alarm_rate", "miss_rate", "f1"
    counted = lambda chosen: tuple(
        evaluate.measure_verdicts(labels[chosen], ratios[chosen])[name] for name in names)
    assert counted(slice(5)) == pytest.approx((1 / 3, 1 / 2, 1 / 2))
    assert counted(slice(3)) == (pytest.approx(1 / 3), None, None)
    assert counted(slice(3, 5)) == (None, 1 / 2, pytest.approx(2 / 3))
    ratios[0] = torch.nan
    assert counted(slice(5)) == (None, None, None)


def test_detector_without_thresholds_is_evaluated_without_verdicts(demo, cli, tmp_path):
    images = torch.stack([gaussad.load_image(sample.path, 64)
                          for sample in gaussad.list_samples(demo, "demo", "train")])  # fmt: skip
    detector = GaussianAD(FeatureExtractor(BACKBONE, weights="random")).fit([images])
    detector.save(tmp_path / "detector.pt")
    code, _, error = cli("evaluate.py", "--data", demo, "--category", "demo", "--out", tmp_path,
                         "--pictures")  # fmt: skip
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (code, error, metrics["f1"]) == (0, "", None) and metrics["image_auroc"] > 0
    rows = csv.DictReader((tmp_path / "scores.csv").open(newline=""))
    assert {row["verdict"] for row in rows} == {"-"}


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
    image = gaussad.load_image(stain, 64)[None]
    with torch.no_grad():
        ratio = (detector.anomaly_map(image).max() / detector.map_threshold).item()
        score = (detector(image) / detector.threshold).item()
    last = rows[-1]
    assert float(last["map_of_threshold"]) == pytest.approx(ratio, rel=1e-5)
    assert float(last["score_of_threshold"]) == pytest.approx(score, rel=1e-5)
    assert last["verdict"] == ("anomalous" if ratio > 1 else "normal")
    assert f"{ratio:8.3f} {last['verdict']:<9} {stain}" in output
    assert len(list((tmp_path / "scored/pictures").iterdir())) == 17


def test_run_that_is_killed_goes_on_to_the_same_bits(demo, cli, tmp_path):
    given = ["--data", demo, "--category", "demo", *TINY, "--lr", "1e-5", "--steps", "96",
             "--patience", "9", "--out"]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, HERE / "train.py", *map(str, given), str(killed)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not (killed / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    checks = json.loads((killed / "history.json").read_text())["checks"]
    assert not json.loads((killed / "history.json").read_text())["finished"] and len(checks) < 4
    code, _, error = cli("train.py", *given, killed, "--resume", "--seed", 1)
    assert code == 2 and "is of a run with other settings: leave out --resume" in error
    result = cli("train.py", *given, killed)
    assert_one_line(result, "holds an interrupted run: --resume goes on with it, --force")
    (killed / ".detector.new.1.part").touch()  # of a kill at another moment
    assert cli("train.py", *given, killed, "--resume")[0] == 0
    assert cli("train.py", *given, whole)[0] == 0
    assert_same_run(whole, killed)
    assert sorted(p.name for p in killed.iterdir()) == ["detector.pt", "history.json"]


def assert_same_run(*folders):
    """The same detectors to the bit, and the same history but for its seconds; its checks."""
    a, b = (torch.load(path / "detector.pt")["state"] for path in folders)
    assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = (json.loads((path / "history.json").read_text()) for path in folders)
    for record in [*a["checks"], *b["checks"]]:
        del record["seconds"]
    assert a["checks"] == b["checks"] and a["best_step"] == b["best_step"]
    return a["checks"]


@pytest.fixture(scope="module")
def few(demo, tmp_path_factory):
    """A folder of six normal images: three folds."""
    folder = tmp_path_factory.mktemp("few")
    for path in sorted((demo / "demo/train/good").iterdir())[:6]:
        shutil.copy(path, folder)
    return folder


def test_few_images_are_judged_and_thresholds_taken_with_each_held_out_once(few, cli, tmp_path):
    code, output, error = cli("train.py", "--normal", few, *TINY, "--steps", 0, "--out", tmp_path)
    assert code == 0 and "4 images to fit, 2 held out, in turn all: 3 folds" in output, error
    torch.manual_seed(0)
    detector = GaussianAD(FeatureExtractor(BACKBONE, weights="random"))
    load = lambda part: torch.stack([gaussad.load_image(path, 64) for path in part])
    held_out_scores, aurocs = [], []
    for fit, held_out in gaussad.split_normal(sorted(few.iterdir()), 0):
        detector.fit([load(fit)])
        held_out_scores.append(detector.held_out_scores([load(held_out)]))
        validator = gaussad.AugmentationValidator(load(held_out), len(aurocs), versions=43)
        aurocs.append(validator(detector, 16).auroc["cutmix"])
    scores, maxima, _ = torch.cat(held_out_scores).T
    saved = GaussianAD.load(tmp_path / "detector.pt")
    assert saved.threshold.item() == pytest.approx(gaussad.tail_quantile(scores, 0.99), rel=1e-6)
    assert saved.map_threshold.item() == pytest.approx(gaussad.tail_quantile(maxima, 0.99), 1e-6)
    images = load(sorted(few.iterdir()))
    assert torch.allclose(saved(images), detector.fit([images])(images), rtol=1e-5)
    [check] = json.loads((tmp_path / "history.json").read_text())["checks"]
    assert check["auroc"]["cutmix"] == pytest.approx(np.mean(aurocs), abs=1e-9)


def test_interrupted_folds_go_on_to_the_same_bits(few, cli, tmp_path, monkeypatch):
    given = ["--normal", few, *TINY, "--lr", "1e-5", "--steps", "33", "--out"]
    step, taken = torch.optim.Adam.step, []

    def interrupted(optimizer):
        taken.append(step(optimizer))
        if len(taken) == 3 * 32 + 2:  # between the folds' last steps
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", interrupted)
        code, output, _ = cli("train.py", *given, tmp_path / "cut")
    assert code == 130 and "--resume goes on" in output
    assert cli("train.py", *given, tmp_path / "cut", "--resume")[0] == 0
    assert cli("train.py", *given, tmp_path / "whole")[0] == 0
    assert len(assert_same_run(tmp_path / "whole", tmp_path / "cut")) == 3


CHECK = {"step": 0, "loss": None, "auroc": {"mixup": 0.5}, "gain": 0, "standard_error": 0,
         "auroc_gain": 0, "auroc_standard_error": 0}  # fmt: skip


@pytest.mark.parametrize("text", [
    "", "[]", '{"settings": {}, "checks": 3}', '{"checks": []}',
    '{"settings": {}, "checks": [{"step": 0}]}',
    *(json.dumps({"settings": {}, "checks": [{**CHECK, key: value}]})
      for key, value in (("auroc", [0.5]), ("gain", None), ("loss", "x")))])  # fmt: skip
def test_history_that_is_none_is_left_out_of_the_report(text, trained, demo, cli, tmp_path):
    shutil.copy(trained[0] / "detector.pt", tmp_path)
    (tmp_path / "history.json").write_text(text)
    code, _, error = cli("evaluate.py", "--data", demo, "--category", "demo", "--out", tmp_path)
    assert (code, error) == (0, "") and (tmp_path / "report.html").is_file()
    assert json.loads((tmp_path / "metrics.json").read_text())["best_step"] is None


def test_files_of_others_in_the_run_folder_are_not_replaced(demo, cli, tmp_path):
    given = ["--data", demo, "--category", "demo", "--out", tmp_path, *TINY, "--steps", 0]
    for name in ("scores.csv", "detector.pt"):  # the latter of another program
        (tmp_path / name).write_text("mine")
        assert_one_line(cli("train.py", *given), f"{name} would be replaced.*another --out")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}


def test_resume_of_another_run_or_another_file_is_refused(few, cli, tmp_path, monkeypatch):
    given = ["--normal", few, *TINY, "--steps", 0, "--out", tmp_path]
    assert cli("train.py", *given)[0] == 0
    before = (tmp_path / "detector.pt").read_bytes()
    assert_one_line(cli("train.py", *given, "--seed", 1, "--resume"), "with other settings")
    torch.save({"settings": {}, "best": torch.zeros(3)}, tmp_path / "checkpoint.pt")
    result = cli("train.py", *given, "--seed", 1, "--resume")
    assert_one_line(result, "checkpoint.pt was not saved by this train.py")
    assert (tmp_path / "detector.pt").read_bytes() == before
    monkeypatch.chdir(few)  # the same run by another spelling of its paths
    code, output, _ = cli("train.py", "--normal", ".", *given[2:])
    assert code == 0 and "is finished" in output


@pytest.mark.parametrize("gain, change, kept", [
    (9.0, -1.5, [True, True, False, False, False]),  # the AUROC falls little by little
    (0.5, 0.0, [True, False, False, False]),  # three without a gain
    (-2.5, 0.0, [True, False, False]),  # and such as are worse, which count twice
])  # fmt: skip
def test_which_checks_are_kept_and_when_a_run_ends(gain, change, kept, few, cli, tmp_path,
                                                   monkeypatch):  # fmt: skip
    """At check t, J and the AUROC are t times a change in units of its standard error."""
    noise = torch.tensor(random_samples(6, 5))
    noise = torch.linalg.qr(noise - noise.mean(0))[0].T * 15**0.5  # differences: an error of 1
    checks = iter(enumerate(noise))

    def pooled(folds):
        t, error = next(checks)
        return gaussad.Validation({"mixup": 0.5}, change * t + error, gain * t + error)

    monkeypatch.setattr(gaussad.Validation, "pooled", pooled)
    monkeypatch.setattr(GaussianAD, "loss", lambda self, images: next(self.parameters()).sum() * 0)
    given = ["--normal", few, *TINY, "--steps", 256, "--out", tmp_path]
    assert cli("train.py", *given)[0] == 0
    history = json.loads((tmp_path / "history.json").read_text())
    assert [check["kept"] for check in history["checks"]] == kept and history["finished"]


def test_images_in_the_run_folder_are_not_deleted(demo, cli, tmp_path):
    shutil.copytree(demo / "demo/train/good", tmp_path / "pictures")
    given = [*TINY, "--steps", 0, "--out", tmp_path]
    assert_one_line(cli("train.py", "--normal", tmp_path / "pictures", *given), "another --out")
    normal = ["--normal", demo / "demo/train/good"]
    assert_one_line(cli("train.py", *normal, *given), "pictures would be replaced")
    shutil.move(tmp_path / "pictures", tmp_path / "away")
    assert cli("train.py", *normal, *given)[0] == 0
    shutil.move(tmp_path / "away", tmp_path / "pictures")  # of a run, but not evaluated
    assert cli("train.py", *normal, *given, "--force")[0] == 0
    assert len(list((tmp_path / "pictures").iterdir())) == 48


def test_category_without_anomalous_images_is_scored(trained, cli, tmp_path, demo):
    (tmp_path / "demo/test").mkdir(parents=True)
    (tmp_path / "demo/test/good").symlink_to(demo / "demo/test/good")
    folder, _ = trained
    code, output, error = cli("evaluate.py", "--data", tmp_path, "--category", "demo",
                              "--out", folder)  # fmt: skip
    assert code == 0 and "No AUROC" in output, error
    assert json.loads((folder / "metrics.json").read_text())["image_auroc"] is None


def test_workers_do_not_depend_on_how_processes_start(demo, cli, tmp_path):
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)  # that of Windows and macOS
    try:
        code, _, error = cli("train.py", "--data", demo, "--category", "demo", *TINY, "--steps", 0,
                             "--workers", 3, "--out", tmp_path)  # fmt: skip
    finally:
        multiprocessing.set_start_method(method, force=True)
    assert code == 0, error


def test_demo(cli, tmp_path):
    code, output, error = cli("train.py", "--demo", "--weights", "random", "--image-size", 64,
                              "--steps", 4, "--out", tmp_path)  # fmt: skip
    assert code == 0 and "all anomalous" in output, error
    assert (tmp_path / "metrics.json").is_file()


@pytest.fixture(scope="module")
def broken(demo, tmp_path_factory):
    """A data root with a category for each thing that can be wrong with one."""
    root = tmp_path_factory.mktemp("broken")
    (root / "no_train_good/train").mkdir(parents=True)
    for category in ("empty", "truncated", "text", "four"):
        folder = root / category / "train/good"
        folder.mkdir(parents=True)
        images = sorted((demo / "demo/train/good").iterdir())[: 4 if category == "four" else 8]
        for path in images if category != "empty" else []:
            (folder / path.name).write_bytes(path.read_bytes())
    path = root / "truncated/train/good/003.png"
    path.write_bytes(path.read_bytes()[:200])
    (root / "text/train/good/003.png").write_text("not an image")
    (root / "empty/train/good/folder.png").mkdir()
    if hasattr(os, "mkfifo"):  # not on Windows
        os.mkfifo(root / "empty/train/good/pipe.png")
    (root / "file").write_text("not a folder")
    (root / "pickle.pth").write_bytes(pickle.dumps(Path("x")))
    torch.save(models.mobilenet_v3_small().state_dict(), root / "mobilenet_v3_small.pth")
    torch.save(Malicious(root / "executed"), root / "malicious.pth")
    settings = {"backbone": BACKBONE, "levels": [9]}
    torch.save({"settings": settings}, root / "older.pth")
    torch.save({"settings": settings, "map_levels": 3, "covariance": "full", "state": [],
                "image_size": 64}, root / "altered.pth")  # fmt: skip
    yield root
    assert not (root / "executed").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        ("--data ROOT/nowhere --category x", "no data set at"),
        ("--data DEMO --category screw", "no category 'screw'.*there are: demo"),
        ("--data ROOT --category no_train_good", "train/good"),
        ("--data ROOT --category empty", "no images in .*empty/train/good"),
        ("--data ROOT --category four", "too few"),
        ("--data ROOT --category truncated", "truncated/train/good/003.png"),
        ("--data ROOT --category text", "text/train/good/003.png"),
        ("--data DEMO --category demo --levels 0 3", "levels of mobilenet_v3_small are 1 to 13"),
        ("--data DEMO --category demo --levels 99", "levels of mobilenet_v3_small are 1 to 13"),
        ("--data DEMO --category demo --levels", "--levels"),
        ("--data DEMO --category demo --map-levels 99", "map levels .99. are not among"),
        ("--data DEMO --category demo --image-size 0", "--image-size"),
        ("--data DEMO --category demo --steps -1", "--steps"),
        ("--data DEMO --category demo --augmentations blur", "--augmentations"),
        ("--data DEMO --category demo --covariance half", "--covariance"),
        ("--data DEMO --category demo --lr nan", "--lr"),
        ("--data DEMO --category demo --lr fast", "--lr"),
        ("--data DEMO --category demo --backbone vgg16", "no backbone 'vgg16'"),
        ("--data DEMO --category demo --weights ROOT/nowhere.pth", "nowhere.pth"),
        ("--data DEMO --category demo --weights ROOT/file", "ROOT/file is not"),
        ("--data DEMO --category demo --weights ROOT/pickle.pth", "pickle.pth is not"),
        ("--data DEMO --category demo --weights ROOT/malicious.pth", "malicious.pth is not"),
        ("--data DEMO --category demo --weights ROOT/mobilenet_v3_small.pth --backbone resnet18",
         "does not hold the weights of resnet18"),
        ("--data DEMO --category demo --out ROOT/file/run", "ROOT/file/run.*--out"),
        ("--data DEMO", "--category"),
        ("--data ROOT/empty --category all", "no category in .*empty"),
        ("--data ROOT/nowhere --category all", "no data set at .*nowhere"),
        ("--normal ROOT/empty/train/good", "no images at .*give image files"),
        ("--normal ROOT/nowhere", "no images at .*nowhere"),
        ("--normal ROOT --data ROOT", "--normal goes with --out"),
        ("", "--demo"),
        ("--demo --data ROOT", "--demo draws its own data"),
    ],
)  # fmt: skip
def test_bad_input_to_train_is_told_in_one_line(args, message, broken, demo, cli, tmp_path):
    place = lambda text: text.replace("ROOT", str(broken)).replace("DEMO", str(demo))
    given = [*TINY, "--steps", "0", "--out", tmp_path, *place(args).split()]
    assert_one_line(cli("train.py", *given), place(message))


@pytest.mark.parametrize(
    "args, message",
    [
        ("--out ROOT/nowhere", "run train.py first"),
        ("--out ROOT/not_a_detector", "not_a_detector/detector.pt is not"),
        ("--out ROOT/truncated", "truncated/detector.pt is not a file of tensors"),
        ("--out ROOT/weights_only", "weights_only/detector.pt is not a detector"),
        ("--out ROOT/malicious", "malicious/detector.pt is not a file of tensors"),
        ("--out ROOT/older", "older/detector.pt is not a detector saved by this gaussad.py"),
        ("--out RUN --data ROOT --category empty", "the detector of 'demo', not of 'empty'"),
        ("--out RUN --data NO_TEST", "demo/test"),
        ("--model RUN/detector.pt", "--model and --images go together"),
        ("--out ROOT/altered", "altered/detector.pt is not a detector"),
    ],
)
def test_bad_input_to_evaluate_is_told_in_one_line(args, message, broken, demo, trained, cli):
    for name, file in (("not_a_detector", "file"), ("weights_only", "mobilenet_v3_small.pth"),
                       ("malicious", "malicious.pth"), ("older", "older.pth"),
                       ("altered", "altered.pth")):
        (broken / name).mkdir(exist_ok=True)
        (broken / name / "detector.pt").write_bytes((broken / file).read_bytes())
    (broken / "truncated/detector.pt").write_bytes((trained[0] / "detector.pt").read_bytes()[:5000])
    no_test = trained[0].parent.parent / "data"  # the root it was trained from
    place = lambda text: (text.replace("ROOT", str(broken)).replace("RUN", str(trained[0]))
                          .replace("NO_TEST", str(no_test)))  # fmt: skip
    given = ["--data", demo, "--category", "demo", *place(args).split()]
    assert_one_line(cli("evaluate.py", *given), message)


def assert_one_line(result, message):
    code, _, error = result
    assert code == 2
    assert error.count("\n") == 1 and "Traceback" not in error
    assert re.search(message, error), error


def png_of(side):
    """A PNG of a few bytes that claims to be `side` x `side`, all black."""
    chunk = lambda kind, data: (struct.pack(">I", len(data)) + kind + data
                                + struct.pack(">I", zlib.crc32(kind + data)))  # fmt: skip
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
            + chunk(b"IEND", b""))  # fmt: skip


def saved(path, size=(64, 64), mode="RGB", **options):
    Image.new(mode, size, 60 if mode in ("L", "I;16") else None).save(path, **options)


ODD = {  # what one odd file among normal images is, and what train.py says: None if it trains
    "name with spaces.png": (saved, None),
    "new\nline.png": (saved, None),
    "größe 寸法.png": (saved, None),
    "not_text_\udcff.png": (saved, None),
    "UPPER.PNG": (saved, None),
    "one_pixel.png": (lambda path: saved(path, (1, 1)), None),
    "line.png": (lambda path: saved(path, (20000, 20)), None),
    "cmyk.jpg": (lambda path: saved(path, mode="CMYK"), None),
    "deep.tiff": (lambda path: saved(path, mode="I;16"), None),
    "animated.gif": (lambda path: saved(path, mode="P", save_all=True,
                                        append_images=[Image.new("P", (64, 64), 9)]), None),
    "dangling.png": (lambda path: path.symlink_to("nowhere"), None),
    "loop.png": (lambda path: path.symlink_to(path), None),
    "nested": (lambda path: (path.mkdir(), saved(path / "inside.png")), None),
    "notes.txt": (lambda path: path.write_text("not an image"), None),
    "._003.png": (lambda path: path.write_text("macOS's notes on a file"), None),
    f"{240 * 'n'}.png": (saved, None),
    "empty.png": (lambda path: path.touch(), "cannot read the image .*empty.png"),
    "bomb.png": (lambda path: path.write_bytes(png_of(30000)), "bomb.png: Image size .* exceeds"),
    "float.tiff": (lambda path: saved(path, mode="F"), "float.tiff: pixels are floating-point"),
    "short.png": (lambda path: path.write_bytes(png_of(64)), "cannot read the image .*short.png"),
    "br\noken_\udcff.png": (lambda path: path.touch(), r"br oken_.udcff.png"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_file_among_the_images(name, demo, cli, tmp_path):
    make, message = ODD[name]
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((demo / "demo/train/good").iterdir())[:8]:
        (folder / path.name).symlink_to(path)
    make(folder / name)
    out = tmp_path / "run"
    result = cli("train.py", "--normal", folder, "--out", out, *TINY, "--steps", 0)
    if message:
        return assert_one_line(result, message)
    assert result[0] == 0, result
    code, output, error = cli("evaluate.py", "--model", out / "detector.pt", "--images", folder,
                              "--pictures")  # fmt: skip
    assert (code, error) == (0, ""), error
    with (out / "scored/scores.csv").open(newline="", errors="surrogateescape") as file:
        scored = [Path(row["path"]).name for row in csv.DictReader(file)]
    read = (folder / name).is_file() and name not in ("notes.txt", "._003.png")
    assert (name in scored) == read and len(scored) == 8 + read
    assert output.count("normal") + output.count("anomalous") >= len(scored)


@pytest.mark.parametrize(
    "pixels, n, message",
    [(0, 1, "too few"), (0, 2, "too few"), (0, 100, "do not vary"), (200, 100, "do not vary")],
)
def test_normal_images_that_fit_no_gaussian(pixels, n, message, cli, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(n):
        Image.new("RGB", (64, 64), (pixels, pixels, 0)).save(tmp_path / f"images/{i}.png")
    given = ["--normal", tmp_path / "images", "--out", tmp_path / "run", *TINY]
    assert_one_line(cli("train.py", *given), message)
    assert not list(tmp_path.glob("run/*"))


def test_mask_of_another_size_and_mask_without_an_image(trained, demo, cli, tmp_path):
    data = tmp_path / "demo"
    (data / "ground_truth/stain").mkdir(parents=True)
    (data / "test").symlink_to(demo / "demo/test")
    for mask in (demo / "demo/ground_truth/stain").iterdir():
        larger = Image.open(mask).resize((256, 192), Image.Resampling.NEAREST)
        larger.save(data / "ground_truth/stain" / mask.name)
    larger.save(data / "ground_truth/stain/999_mask.png")
    sample = gaussad.list_samples(tmp_path, "demo", "test")[-1]
    expected = np.asarray(Image.open(demo / "demo/ground_truth/stain/007_mask.png")) > 0
    assert np.array_equal(gaussad.load_mask(sample.mask, 64), expected)
    code, _, error = cli("evaluate.py", "--data", tmp_path, "--category", "demo", "--out",
                         trained[0])  # fmt: skip
    metrics = json.loads((trained[0] / "metrics.json").read_text())
    assert code == 0 and metrics["n_without_mask"] == 16 and 0 < metrics["aupro"] < 1, error


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
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    given = ["--data", demo, "--category", "demo", "--out", out]
    for limit in (20_000, 2_000):  # enough for some of the files, and for none
        for script, more in (("train.py", [*TINY, "--steps", 0, "--seed", 1]), ("evaluate.py", [])):
            with full_disk(limit):
                result = cli(script, *given, *more)
            if script == "train.py" or limit == 2_000:
                assert_one_line(result, "is the disk full|File too large")
            for name in before if script == "train.py" else ["detector.pt", "history.json"]:
                assert (out / name).read_bytes() == before[name]
            assert not list(out.glob(".*"))
        shutil.copytree(trained[0], out, dirs_exist_ok=True)


def test_image_that_may_not_be_read(demo, tmp_path):
    (tmp_path / "secret.png").write_bytes((demo / "demo/train/good/000.png").read_bytes())
    (tmp_path / "secret.png").chmod(0)
    root = hasattr(os, "geteuid") and os.geteuid() == 0  # who may read all
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(ValueError, match="cannot read the image .*secret.png.*ermission"):
            gaussad.load_image(tmp_path / "secret.png", 32)
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_asked_for_and_absent(demo, cli, tmp_path):
    given = ["--data", demo, "--category", "demo", *TINY, "--device", "cuda", "--out", tmp_path]
    assert_one_line(cli("train.py", *given), "no CUDA device")


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_scores_and_maps_of_a_gpu_are_those_of_the_cpu(fitted):
    detector, images = fitted
    device = evaluate.pick_device("cuda")
    on_gpu = copy.deepcopy(detector).to(device)
    for fit in (False, True):
        if fit:
            on_gpu.fit(images.to(device).split(5))
        for found, expected in zip(on_gpu.scores_and_maps(images.to(device)),
                                   detector.scores_and_maps(images)):  # fmt: skip
            assert relative(found.cpu(), expected) < 1e-3


# ------------------------------------------------------------------------------------------------
# Benchmark: python -m pytest -m benchmark
# ------------------------------------------------------------------------------------------------

benchmark = pytest.mark.benchmark


def seconds(**works):
    """The median time of each of some works, done in turns five times after a first round."""
    times = {name: [] for name in works}
    for _ in range(6):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: np.median(values[1:]) for name, values in times.items()}


@pytest.fixture
def told(capsys):
    """Print the ratio of each time to the first, with the limit it must keep to."""

    def tell(times, **limits):
        first = next(iter(times.values()))
        with capsys.disabled():
            for name, value in times.items():
                limit = f"  (limit {limits[name]})" if name in limits else ""
                print(f"\n{name:<40} {value:8.3f} s  {value / first:6.2f}{limit}", end="")
        assert all(times[name] / first < limit for name, limit in limits.items())

    return tell


@pytest.fixture
def decoded(demo):
    """A detector of 320 px, the images it was fitted to, all in memory, and their batches."""
    paths = [sample.path for sample in gaussad.list_samples(demo, "demo", "train")]
    images = gaussad.Images(paths, 320)
    batches = list(images.batches(16))
    detector = GaussianAD(FeatureExtractor("mobilenet_v2", weights="random")).fit(batches)
    return detector, images, batches


@benchmark
def test_scoring_takes_little_longer_than_the_network(decoded, told):
    detector, images, batches = decoded

    @torch.inference_mode()
    def through(work, batches):
        for batch in batches:
            work(batch)

    told(
        seconds(
            network=lambda: through(detector.extractor, batches),
            scores=lambda: through(detector, images.batches(16)),
            scores_and_maps=lambda: evaluate.score(detector, images, 16, torch.device("cpu")),
        ),
        scores=1.10, scores_and_maps=1.35,
    )  # fmt: skip


@benchmark
def test_training_takes_little_longer_than_bare_steps(decoded, told):
    detector, images, batches = decoded
    optimizer = torch.optim.Adam(detector.parameters(), lr=1e-9)
    stream = train.endless(images, 16, torch.Generator())

    def bare(batch):
        optimizer.zero_grad()
        sum(maps.mean() for maps in detector.extractor(batch)).backward()
        optimizer.step()

    told(
        seconds(
            bare_steps=lambda: [bare(batch) for batch in batches],
            training=lambda: [train.train_step(detector, optimizer, batch)
                              for batch in islice(stream, len(batches))],
        ),
        training=1.10,
    )  # fmt: skip


@benchmark
def test_ledoit_wolf_is_as_fast_as_scikit_learns(told):
    covariance = pytest.importorskip("sklearn.covariance")
    x = random_samples(320, 1792)
    tensor = torch.tensor(x)
    told(
        seconds(
            sklearn_ledoit_wolf=lambda: covariance.ledoit_wolf(x),
            ours=lambda: gaussad.ledoit_wolf(tensor),
        ),
        ours=1.0,
    )
    told(
        seconds(
            sklearn_LedoitWolf_fit=lambda: covariance.LedoitWolf().fit(x),
            ours=lambda: gaussad.ledoit_wolf(tensor),
        ),
        ours=0.2,
    )


@benchmark
def test_metrics_are_fast(told):
    roc_auc_score = pytest.importorskip("sklearn.metrics").roc_auc_score
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=10**6), rng.random(10**6) < 0.1
    tensors = torch.tensor(scores), torch.tensor(labels)
    told(
        seconds(
            sklearn_roc_auc_score=lambda: roc_auc_score(labels, scores),
            auroc=lambda: gaussad.auroc(*tensors),
        ),
        auroc=1.0,
    )
    maps, masks = torch.rand(160, 320, 320), torch.zeros(160, 320, 320, dtype=torch.bool)
    masks[41:, 40:120, 50:90] = masks[60:, 200:290, 150:300] = True
    found = seconds(aupro_of_160_maps=lambda: gaussad.aupro(maps, masks))
    told(found)
    assert found["aupro_of_160_maps"] < 10


@benchmark
def test_start_is_fast(told):
    python = lambda *args: subprocess.run([sys.executable, *args], cwd=HERE, check=True,
                                          stdout=subprocess.DEVNULL)  # fmt: skip
    found = seconds(
        import_torch_and_torchvision=lambda: python("-c", "import torch, torchvision"),
        import_gaussad=lambda: python("-c", "import torch, torchvision, gaussad"),
        help_of_train=lambda: python("train.py", "--help"),
    )
    told(found)
    assert found["import_gaussad"] - found["import_torch_and_torchvision"] < 0.05
    assert found["help_of_train"] < 4


# ------------------------------------------------------------------------------------------------
# The real thing
# ------------------------------------------------------------------------------------------------

real = pytest.mark.skipif(
    not {"GAUSSAD_DATA", "GAUSSAD_WEIGHTS"} <= os.environ.keys(),
    reason="GAUSSAD_DATA and GAUSSAD_WEIGHTS name no data and weights",
)


@real
def test_frozen_mobilenet_on_screw_agrees_with_an_independent_program():
    data, weights = os.environ["GAUSSAD_DATA"], os.environ["GAUSSAD_WEIGHTS"]
    [(fit, _)] = gaussad.split_normal(gaussad.list_samples(data, "screw", "train"), 0)
    test = gaussad.list_samples(data, "screw", "test")
    levels = [2, 4, 7, 11, 14, 17, 18, 19]  # what the independent program had
    detector = GaussianAD(FeatureExtractor("mobilenet_v2", levels, weights), [14])
    detector.fit(gaussad.Images([s.path for s in fit], 320).batches(16))
    with torch.inference_mode():
        images = gaussad.Images([s.path for s in test], 320).batches(16)
        scores, maps = map(torch.cat, zip(*[detector.scores_and_maps(batch) for batch in images]))
    found = gaussad.auroc(scores, torch.tensor([s.label for s in test]))
    assert 100 * found == pytest.approx(77.5, abs=2)
    none = torch.zeros(320, 320, dtype=torch.bool)
    masks = torch.stack([gaussad.load_mask(s.mask, 320) if s.mask else none for s in test])
    assert 100 * gaussad.auroc(maps, masks) == pytest.approx(98.5, abs=0.5)
    assert 100 * gaussad.aupro(maps, masks) == pytest.approx(93.7, abs=1)
