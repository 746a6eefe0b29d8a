# SPDX-License-Identifier: MIT
"""Every test: the maths against independent references, the command lines by running them.

    python -m pytest

runs offline on the CPU on drawn data and random weights. With GAUSSAD_DATA (an MVTec AD root with
screw in it) and GAUSSAD_WEIGHTS (a state dict of mobilenet_v2) it also runs on the real thing.
"""

import csv
import json
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

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


@pytest.mark.parametrize("condition", [1.0, 1e8])
@pytest.mark.parametrize("n, c", [(12, 40), (40, 40), (3000, 15), (2, 5)])
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
def test_levels_of_a_resnet_are_its_stem_and_stages(tmp_path):
    network, outputs = with_statistics(models.get_model("resnet50")), []
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    for module in (network.relu, network.layer1, network.layer2, network.layer3, network.layer4):
        module.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    images = torch.rand(2, 3, 64, 64)
    network(normalised(images))
    maps = FeatureExtractor("resnet50", [1, 2, 3, 4, 5], tmp_path / "weights.pth")(images)
    for found, expected in zip(maps, outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


@torch.no_grad()
def test_bytes_and_floats_are_the_same_image():
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    extractor = FeatureExtractor(BACKBONE, weights="random")
    for a, b in zip(extractor(images), extractor(images / 255)):
        assert relative(a, b) < 1e-4


@torch.no_grad()
def test_features_of_random_weights_do_not_vanish_with_depth():
    extractor = FeatureExtractor("mobilenet_v2", [2, 11, 19], "random")
    spread = [maps.mean((2, 3)).std(0).mean() for maps in extractor(torch.rand(8, 3, 64, 64))]
    assert spread[2] > 0.1 * spread[0]


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
def test_map_points_at_the_defect_even_where_all_normal_images_are_blank(fitted):
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
def test_one_score_is_both_standardised_over_the_images_held_out(fitted):
    detector, images = GaussianAD(fitted[0].extractor).fit([fitted[1]]), torch.rand(5, 3, 64, 64)
    with pytest.raises(ValueError, match="calibrate it first"):
        detector.anomaly_score(*detector.scores_and_maps(images))
    held_out = torch.rand(12, 3, 64, 64)
    assert detector.calibrate(held_out.split(5)) is detector
    found = detector.anomaly_score(*detector.scores_and_maps(images)).numpy()
    expected = 0
    for of in (lambda x: detector(x).numpy(), lambda x: detector.anomaly_map(x).amax((1, 2)).numpy()):
        usual = np.concatenate([of(part) for part in held_out.split(5)])
        expected = expected + (of(images) - usual.mean()) / usual.std(ddof=1)
    assert relative(found, expected) < 1e-5
    own = detector.anomaly_score(*detector.scores_and_maps(held_out))
    assert own.mean().abs() < 1e-3  # of held-out images, by definition 0
    assert detector.threshold(0.05) == pytest.approx(gaussad.tail_quantile(own, 0.95), rel=1e-3)
    maxima = detector.anomaly_map(held_out).amax((1, 2))
    assert detector.map_threshold(0.1) == pytest.approx(gaussad.tail_quantile(maxima, 0.9), rel=1e-4)
    threshold = detector.threshold()
    assert detector.fit([fitted[1]]).threshold() == threshold < detector.threshold(0.01)
    with pytest.raises(ValueError, match="two held-out images"):
        detector.calibrate([held_out[:1].expand(3, -1, -1, -1)])
    for share in (0, 1):
        with pytest.raises(ValueError, match="quantile"):
            detector.threshold(share)


@torch.no_grad()
def test_fit_and_calibrate_is_a_fit_a_calibration_and_a_fit_to_all(fitted):
    images, held_out = fitted[1], torch.randint(0, 256, (20, 3, 64, 64), dtype=torch.uint8)
    extractor = fitted[0].extractor
    found = GaussianAD(extractor).fit_and_calibrate(images.split(7), held_out)
    apart = GaussianAD(extractor).fit(images.split(7)).calibrate(held_out.split(16))
    assert torch.equal(found.held_out, apart.held_out)
    apart.fit([*images.split(7), *held_out.split(16)])
    assert torch.equal(found(images), apart(images))
    assert torch.equal(found.anomaly_map(images), apart.anomaly_map(images))


@pytest.mark.parametrize("n, tolerance", [(6, 0.02), (30, 0.01), (64, 0.01), (2000, 0.003)])
@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_tail_quantile_keeps_the_false_alarm_rate(n, tolerance, rate):
    rng = np.random.default_rng(0)
    draw = lambda *shape: 40 + 5 * rng.gamma(20, size=shape) / 20**0.5
    future, thresholds = draw(10**5), []
    for scores in draw(200, n):
        thresholds.append(gaussad.tail_quantile(torch.tensor(scores), 1 - rate))
    assert (future[:, None] > np.array(thresholds)).mean() == pytest.approx(rate, abs=tolerance)


def test_tail_quantile_of_few_many_and_equal_scores():
    many = torch.rand(3000, dtype=torch.float64)
    assert gaussad.tail_quantile(many, 0.5) == pytest.approx(np.quantile(many, 0.5), abs=1e-12)
    assert gaussad.tail_quantile(torch.tensor([2.0]), 0.99) == 2
    assert gaussad.tail_quantile(torch.full((9,), 3.0), 0.99) == 3
    for scores, quantile in (([], 0.9), ([1.0, float("nan")], 0.9), ([1.0, 2.0], 1.0)):
        with pytest.raises(ValueError, match="quantile"):
            gaussad.tail_quantile(torch.tensor(scores), quantile)


def test_ten_times_the_images_take_no_more_memory_to_fit():
    code = f"""if True:
        import resource, torch
        from gaussad import FeatureExtractor, GaussianAD
        detector = GaussianAD(FeatureExtractor("{BACKBONE}", weights="random"))
        peaks = []
        for n in (10, 100):  # of 10 images
            detector.fit(torch.rand(10, 3, 64, 64) for _ in range(n))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        print(peaks[1] / peaks[0])
    """
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert float(done.stdout) < 1.05, done.stderr


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


@pytest.mark.parametrize("change", [
    {"image_size": 64}, {"image_size": [96, 64]}, {"state": []}, {"detector": {}},
    {"gaussians.pooled 2.mean": torch.zeros(3, dtype=torch.float64)},
    {"gaussians.map 9.whitening": torch.eye(24).int()},
])  # fmt: skip
def test_altered_detector_is_found_when_loaded(change, fitted, tmp_path):
    fitted[0].save(tmp_path / "detector.pt")
    content = torch.load(tmp_path / "detector.pt")
    (content["state"] if "gaussians" in str(change) else content).update(change)
    torch.save(content, tmp_path / "detector.pt")
    with pytest.raises(ValueError, match="detector.pt is not a detector saved by this gaussad"):
        GaussianAD.load(tmp_path / "detector.pt")


def test_files_that_cannot_be_written_or_read_are_told_as_such(fitted, tmp_path, monkeypatch):
    detector, _ = fitted
    with pytest.raises(OSError, match="No such file or directory.*missing"):
        detector.save(tmp_path / "missing/detector.pt")
    with pytest.raises(OSError, match="No such file or directory.*nowhere"):
        GaussianAD.load(tmp_path / "nowhere.pt")
    detector.save(tmp_path / "detector.pt")
    before = (tmp_path / "detector.pt").read_bytes()
    with full_disk(20_000), pytest.raises(OSError, match="File too large"):
        detector.save(tmp_path / "detector.pt")
    assert (tmp_path / "detector.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["detector.pt"]
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
            GaussianAD.load(tmp_path / "detector.pt", "cuda")

    def no_memory(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(ValueError, match="can't allocate memory"):
        GaussianAD.load(tmp_path / "detector.pt")


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
    fresh = GaussianAD(detector.extractor)
    with pytest.raises(ValueError, match=r"images of \[64, 64\] and \[64, 32\]"):
        fresh.fit([images, images[..., :32]])
    with pytest.raises(ValueError, match="no images"):
        fresh.fit([])
    with pytest.raises(ValueError, match="three samples"):
        fresh.fit([images[:2]])
    with pytest.raises(ValueError, match="do not vary"):
        fresh.fit([images[:1].expand(9, -1, -1, -1)] * 3)
    with pytest.raises(ValueError, match="fitted without maps"):
        fresh.fit([images], maps=False).anomaly_map(images)


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_scores_and_maps_of_a_gpu_are_those_of_the_cpu(fitted):
    detector, images = fitted
    device = gaussad.pick_device("cuda")
    for on_gpu in (GaussianAD(detector.extractor).to(device).fit(images.split(5)),):
        found = [values.cpu() for values in on_gpu.scores_and_maps(images.to(device))]
    detector.to("cpu")
    for values, expected in zip(found, detector.scores_and_maps(images)):
        assert relative(values, expected) < 1e-3


# ------------------------------------------------------------------------------------------------
# Augmentation validator
# ------------------------------------------------------------------------------------------------


@pytest.fixture
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
    one, same, other = (
        gaussad.AugmentationValidator(images, seed, 11, gaussad.AUGMENTATIONS) for seed in (1, 1, 2))
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
    for augmented in validator.augmented.values():
        versions = np.log(spread(augmented).numpy()).reshape(3, 20)
        expected.append((versions - log).mean() / log.std())
    assert found.separation == pytest.approx(np.mean(expected), rel=1e-12)
    assert found.parts.mean().item() == found.separation


def test_aurocs_of_the_validator_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    validator = gaussad.AugmentationValidator(images, versions=60)
    found = validator(spread)
    for name, augmented in validator.augmented.items():
        scores = torch.cat([spread(images), spread(augmented)])
        expected = metrics.roc_auc_score([0] * 20 + [1] * 60, scores)
        assert found.auroc[name] == pytest.approx(expected, abs=1e-12)


def test_auroc_of_log_normal_scores_is_that_of_their_separation():
    rng = np.random.default_rng(0)
    log = rng.normal(size=4000)
    scores = iter(np.exp([log, rng.permutation(log) + 1.2]))  # normal ones, then augmented ones
    images = torch.zeros(4000, 3, 2, 2, dtype=torch.uint8)
    validator = gaussad.AugmentationValidator(images, augmentations={"none": lambda x: x})
    found = validator(lambda batch: torch.tensor(next(scores)), batch_size=4000)
    normal_cdf = torch.special.ndtr(torch.tensor(found.separation / 2**0.5)).item()
    assert found.auroc["none"] == pytest.approx(normal_cdf, abs=0.01)


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


@pytest.mark.parametrize("score", [lambda x: spread(x) * 0, lambda x: -spread(x),
                                   lambda x: spread(x) * torch.nan, lambda x: spread(x) * 0 + 1])
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


def test_fine_tuning_lowers_the_distance_to_the_pretrained_gaussian(task):
    detector, loader, held_out = task
    before = [parameter.clone() for parameter in detector.parameters()]
    checks = list(gaussad.fine_tune(detector, loader, held_out, steps=40, patience=9))
    assert [check.step for check in checks] == [0, 32, 40]
    assert checks[0].loss is None and checks[2].loss < checks[1].loss
    assert checks[0].kept and checks[0].gain is None
    assert not any(map(torch.equal, before, detector.parameters()))
    assert all(np.isfinite(check.validation.separation) for check in checks)


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


def test_kept_detector_is_fitted_to_all_and_calibrated_and_others_have_no_maps(task, monkeypatch):
    detector, loader, held_out = task
    gains = iter([(3.0, 1.0), (1.0, 1.0), (2.1, 1.0), (-5.0, 1.0), (1.9, 1.0)])
    monkeypatch.setattr(gaussad.Validation, "gain_over", lambda self, other: next(gains))
    checks, images = [], loader.dataset.tensors[0]
    for check in gaussad.fine_tune(detector, loader, held_out, steps=10**6, lr=0, patience=2):
        checks.append(check)
        if check.kept:
            with torch.no_grad():
                everything = GaussianAD(detector.extractor).fit([images, held_out])
                assert relative(detector(held_out), everything(held_out)) < 1e-6
            assert len(detector.held_out) == 10 and detector.threshold() > 0
        else:
            with pytest.raises(ValueError, match="without maps"):
                detector.anomaly_map(held_out)
        if check.step == 256:
            break
    assert [check.kept for check in checks] == [True, True, False, True, False]
    for seen in ([(0.0, 0.0)] * 9, [(-9.0, 1.0)] * 9):  # frozen is kept, and patience ends it
        gains = iter(seen)
        monkeypatch.setattr(gaussad.Validation, "gain_over", lambda self, other: next(gains))  # noqa
        steps = [c.step for c in gaussad.fine_tune(detector, loader, held_out, lr=0, patience=2)]
        assert steps == [0, 32, 64]


def test_any_check_is_gone_on_from_to_the_same_bits(task):
    detector, loader, held_out = task
    given = {"steps": 70, "lr": 1e-3, "patience": 9, "seed": 5}
    start = {key: value.clone() for key, value in detector.extractor.state_dict().items()}
    checks = list(gaussad.fine_tune(detector, loader, held_out, **given))
    assert [check.step for check in checks] == [0, 32, 64, 70]
    with torch.no_grad():
        expected = detector(held_out)
    for check in checks[:3]:
        again = GaussianAD(FeatureExtractor(BACKBONE, [4, 9], "random"))
        again.extractor.load_state_dict(start)
        torch.rand(7)  # what the caller draws in between changes nothing
        rest = list(gaussad.fine_tune(again, loader, held_out, state=check.state, **given))
        found, whole = rest[-1], checks[-1]
        assert len(rest) == len(checks) - 1 - checks.index(check)
        assert (found.loss, found.gain, found.kept) == (whole.loss, whole.gain, whole.kept)
        with torch.no_grad():
            assert torch.equal(again(held_out), expected)


def test_zero_steps_fit_and_do_not_validate(task, monkeypatch):
    detector, loader, held_out = task
    monkeypatch.delattr(gaussad, "AugmentationValidator")
    [check] = gaussad.fine_tune(detector, loader, held_out, steps=0)
    assert check.kept and check.validation is None and detector.anomaly_map(held_out).shape[0] == 10


def test_training_that_fails_ends_with_a_word_and_what_cannot_be_trained_with_an_error(task):
    detector, loader, held_out = task
    *_, last = gaussad.fine_tune(detector, loader, held_out, steps=64, lr=1e30)
    assert last.step == 32 and not last.kept and "try a smaller learning rate" in last.failure
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


def test_readme_examples_train_and_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = torch.randint(0, 256, (24, 3, 64, 64), dtype=torch.uint8)
    names = {"dataset": TensorDataset(images, torch.zeros(24)), "held_out": images[:12].flip(-1)}
    exec(readme_example(0).replace("steps=512", "steps=2"), names)
    assert names["scores"].shape == (16,) and names["maps"].shape == (16, 64, 64)
    assert names["anomalous"].dtype == torch.bool
    exec(readme_example(1), names)
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


def test_whole_image_is_resized_to_a_square(tmp_path):
    image = Image.new("L", (100, 20))
    image.paste(255, (0, 0, 50, 20))
    image.save(tmp_path / "wide.png")
    found = gaussad.load_image(tmp_path / "wide.png", 64)
    assert (found[..., :31] == 255).all() and (found[..., 33:] == 0).all()


def test_samples_of_the_layout(demo):
    normal = gaussad.list_samples(demo, "demo", "train")
    test = gaussad.list_samples(demo, "demo", "test")
    assert {(s.defect, s.mask) for s in normal} == {("good", None)} and len(normal) == 48
    assert {s.defect for s in test} == {"good", "hole_missing", "scratch", "stain"}
    for sample in test:
        assert (sample.defect != "good") == (sample.mask is not None)
        if sample.mask:
            image, mask = (np.asarray(Image.open(p)) for p in (sample.path, sample.mask))
            assert image.shape == mask.shape and mask.any()


@pytest.mark.parametrize("n, held", [(6, 3), (7, 3), (31, 15), (40, 16), (79, 16), (320, 64)])
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


@pytest.fixture
def evaluated(trained, demo, cli, tmp_path):
    """Evaluate the run with some options more; (results' folder, metrics, rows of scores.csv)."""

    def call(*more):
        code, output, error = cli("evaluate.py", "--data", demo, "--category", "demo", "--model",
                                  trained[0], "--out", tmp_path / "out", *more)  # fmt: skip
        assert code == 0 and "all anomalous" in output, error
        with (tmp_path / "out/scores.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return tmp_path / "out", json.loads((tmp_path / "out/metrics.json").read_text()), rows

    return call


def test_train_writes_one_file_and_a_copy_of_its_history(trained):
    folder, output = trained
    history = json.loads((folder / "history.json").read_text())
    content = gaussad.load_plain(folder / "detector.pt")
    training = content["training"]
    assert training.pop("state") is None and training["finished"] and training == {
        key: history[key] for key in training}  # fmt: skip
    assert [check["step"] for check in history["checks"]] == [0, 32, 33]
    assert history["checks"][0]["loss"] is None and history["checks"][2]["loss"] > 0
    assert history["settings"]["seed"] == 0 and history["settings"]["backbone"] == BACKBONE
    assert Path(history["settings"]["data"]).is_absolute()
    assert set(history["checks"][1]["auroc"]) == {"cutout", "cutmix"}
    assert f"Step {history['best_step']}" in output
    visible = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    assert sorted(visible) == ["detector.pt", "history.json"]


def test_saved_detector_is_the_one_the_validator_saw_with_gaussians_of_all_images(trained, demo):
    folder, _ = trained
    history = json.loads((folder / "history.json").read_text())
    parts = gaussad.hold_out(gaussad.list_samples(demo, "demo", "train"), 0)
    fit, held_out = (gaussad.load_images([s.path for s in part], 64) for part in parts)
    saved, again = (GaussianAD.load(folder / "detector.pt") for _ in range(2))
    with torch.no_grad():
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
    assert metrics["pixel_auroc"] == pytest.approx(metrics_of(masks.ravel(), maps.ravel()), abs=1e-6)
    assert metrics["aupro"] == pytest.approx(gaussad.aupro(*map(torch.tensor, (maps, masks))), 1e-4)


def test_report_is_one_file_with_the_figures_and_pictures_in_any_case(evaluated):
    folder, metrics, rows = evaluated()
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"http|<script|<link|src=\"(?!data:)", page)
    for key in evaluate.RESULTS:
        assert f"<td>{key}</td><td>{100 * metrics[key]:.1f}</td>" in page
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
    assert code == 0 and "8 anomalous images have no mask" in output and "No AUROC" in output, error
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["pixel_auroc"] is metrics["image_auroc_both"] is metrics["aupro"] is None
    assert metrics["n_without_mask"] == 8 and metrics["miss_rate"] >= 0
    assert metrics["false_alarm_rate"] is None


def test_same_seed_same_bits_and_every_other_setting_another_run(trained, demo, cli, tmp_path):
    given = ["--data", demo, "--category", "demo", *TINY, "--out", tmp_path, "--steps", 33]
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
    for name in ("a.pth", "b.pth"):  # the same weights by another name are the same run
        torch.save(models.get_model(BACKBONE).state_dict(), tmp_path / name)
        torch.manual_seed(0)
    shutil.copy(tmp_path / "b.pth", tmp_path / "c.pth")
    for name, finished in (("a.pth", False), ("b.pth", False), ("c.pth", True)):
        output = cli("train.py", *given, "--weights", tmp_path / name)[1]
        assert ("is finished" in output) == finished


def test_diverging_training_keeps_the_best_and_says_so(demo, cli, tmp_path):
    code, output, error = cli("train.py", "--data", demo, "--category", "demo", *TINY, "--steps",
                              64, "--lr", "1e30", "--out", tmp_path)  # fmt: skip
    assert (code, error) == (0, "")
    assert "Step 32: training has failed" in output and "Step 0 (the frozen network)" in output
    assert GaussianAD.load(tmp_path / "detector.pt").image_size == [64, 64]


def test_run_that_is_killed_goes_on_to_the_same_bits(demo, cli, tmp_path):
    given = ["--data", demo, "--category", "demo", *TINY, "--lr", "1e-5", "--steps", "96",
             "--patience", "9", "--out"]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, HERE / "train.py", *map(str, given), str(killed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("   32"):
                break
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and len(json.loads((
                killed / "history.json").read_text())["checks"]) < 2:  # fmt: skip
            time.sleep(0.05)
        result = cli("train.py", *given, killed)
        assert_one_line(result, "another train.py is at work in .*killed")
        process.send_signal(signal.SIGKILL)
    history = json.loads((killed / "history.json").read_text())
    assert not history["finished"] and len(history["checks"]) == 2
    code, output, error = cli("evaluate.py", "--data", demo, "--category", "demo", "--out", killed)
    assert code == 0 and "is not finished" in output, error
    (killed / ".detector.pt.part").touch()  # of a kill at another moment
    code, output, _ = cli("train.py", *given, killed)
    assert code == 0 and re.findall(r"(?m)^ +(\d+) ", output) == ["64", "96"]
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
    assert categories["plate"]["image_auroc_both"] == expected == results["mean"]["image_auroc_both"]
    assert results["standard_error"]["image_auroc"] == 0  # twice the same data
    rows = list(csv.reader((tmp_path / "results.csv").open(newline="")))
    names = ["category", "disc", "plate", "mean", "standard_error"]
    assert [row[0] for row in rows] == names and float(rows[1][1]) >= 0
    assert re.search("(?m)^mean .*\n^standard_error", output)


def test_processes_of_torchrun_share_the_categories_and_wait_for_each_other(two, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               HERE / "train.py", "--data", two, "--category", "broken", "disc", "plate", *TINY,
               "--steps", "2", "--out", tmp_path]  # fmt: skip
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


@pytest.mark.parametrize("pixels, n, message", [(0, 2, "too few"), (200, 40, "do not vary")])
def test_normal_images_that_fit_no_gaussian(pixels, n, message, cli, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(n):
        Image.new("RGB", (64, 64), (pixels, pixels, 0)).save(tmp_path / f"images/{i}.png")
    given = ["--normal", tmp_path / "images", "--out", tmp_path / "run", *TINY]
    assert_one_line(cli("train.py", *given), message)
    assert not list(tmp_path.glob("run/[!.]*"))


def test_demo_ends_in_a_detector_better_than_chance(tmp_path):
    command = [sys.executable, HERE / "train.py", "--demo", "--weights", "random", "--steps", "32",
               "--out", tmp_path]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stderr
    assert json.loads((tmp_path / "metrics.json").read_text())["image_auroc_both"] > 0.7


@pytest.fixture(scope="module")
def broken(demo, tmp_path_factory):
    """A data root with a category for each thing that can be wrong with one."""
    root = tmp_path_factory.mktemp("broken")
    (root / "no_train_good/train").mkdir(parents=True)
    for category in ("empty", "truncated", "four"):
        folder = root / category / "train/good"
        folder.mkdir(parents=True)
        images = sorted((demo / "demo/train/good").iterdir())[: 4 if category == "four" else 8]
        for path in images if category != "empty" else []:
            (folder / path.name).write_bytes(path.read_bytes())
    path = root / "truncated/train/good/003.png"
    path.write_bytes(path.read_bytes()[:200])
    (root / "file").write_text("not a folder")
    torch.save(models.mobilenet_v3_small().state_dict(), root / "mobilenet_v3_small.pth")
    torch.save(Malicious(root / "executed"), root / "malicious.pth")
    for name in ("file", "mobilenet_v3_small.pth", "malicious.pth"):
        (root / "runs" / name).mkdir(parents=True)
        (root / "runs" / name / "detector.pt").write_bytes((root / name).read_bytes())
    yield root
    assert not (root / "executed").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        ("--data ROOT/nowhere --category x", "no data set at .*nowhere"),
        ("--data DEMO --category screw", "no category 'screw'.*there are: demo"),
        ("--data ROOT --category no_train_good", "train/good"),
        ("--data ROOT --category empty", "no images at .*empty/train/good"),
        ("--data ROOT --category four", "too few"),
        ("--data ROOT --category truncated", "truncated/train/good/003.png"),
        ("--data DEMO --category demo --levels 0 3", "the levels 1 to 13"),
        ("--data DEMO --category demo --map-levels 99", "map levels .99. are not among"),
        ("--data DEMO --category demo --image-size 0", "size"),
        ("--data DEMO --category demo --steps -1", "steps"),
        ("--data DEMO --category demo --augmentations blur", "--augmentations"),
        ("--data DEMO --category demo --lr nan", "rate"),
        ("--data DEMO --category demo --lr fast", "--lr"),
        ("--data DEMO --category demo --batch-size 0", "batch_size"),
        ("--data DEMO --category demo --backbone vgg16", "no backbone 'vgg16'"),
        ("--data DEMO --category demo --weights ROOT/nowhere.pth", "nowhere.pth"),
        ("--data DEMO --category demo --weights ROOT/file", "ROOT/file is not"),
        ("--data DEMO --category demo --weights ROOT/malicious.pth", "malicious.pth is not"),
        ("--data DEMO --category demo --weights ROOT/mobilenet_v3_small.pth --backbone resnet18",
         "does not hold the weights of resnet18"),
        ("--data DEMO --category demo --out ROOT/file/run", "ROOT/file/run.*--out"),
        ("--data DEMO --category demo --out ROOT/runs/file", "is not a file saved by torch.save"),
        ("--data DEMO --category demo --out ROOT/runs/mobilenet_v3_small.pth", "not of train.py"),
        ("--data DEMO", "--category"),
        ("--normal ROOT/nowhere", "no images at .*nowhere"),
        ("--normal ROOT --data ROOT", "--normal goes with --out"),
        ("", "--demo"),
        ("--demo --data ROOT", "--demo draws its own data"),
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
        ("--model ROOT/runs/file", "file/detector.pt is not a file saved by torch.save"),
        ("--model ROOT/runs/mobilenet_v3_small.pth", "is not a detector saved by this gaussad.py"),
        ("--model ROOT/runs/malicious.pth", "malicious.pth/detector.pt is not a file saved"),
        ("--model RUN --data ROOT --category empty", "the detector of 'demo', not of 'empty'"),
        ("--model RUN --data NO_TEST", "demo/test"),
        ("--model RUN --false-alarms 5", "between 0 and 1"),
        ("--model RUN --images ROOT", "--images goes with --model"),
    ],
)
def test_bad_input_to_evaluate_is_told_in_one_line(args, message, broken, demo, trained, cli):
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


def saved(path, size=(64, 64), mode="RGB", **options):
    Image.new(mode, size, 60 if mode in ("L", "I;16") else None).save(path, **options)


ODD = {  # what one odd file among normal images is, and what train.py says: None if it trains
    "new\nline größe 寸法.png": (saved, None),
    "not_text_\udcff.png": (saved, None),
    "UPPER.PNG": (saved, None),
    "one_pixel.png": (lambda path: saved(path, (1, 1)), None),
    "cmyk.jpg": (lambda path: saved(path, mode="CMYK"), None),
    "animated.gif": (lambda path: saved(path, mode="P", save_all=True,
                                        append_images=[Image.new("P", (64, 64), 9)]), None),
    "dangling.png": (lambda path: path.symlink_to("nowhere"), None),
    "notes.txt": (lambda path: path.write_text("not an image"), None),
    "._003.png": (lambda path: path.write_text("macOS's notes on a file"), None),
    f"{240 * 'n'}.png": (saved, None),
    "empty.png": (lambda path: path.touch(), "cannot read the image .*empty.png"),
    "float.tiff": (lambda path: saved(path, mode="F"), "float.tiff: floating-point pixels"),
    "br\noken_\udcff.png": (lambda path: path.touch(), "cannot read the image .*br oken_"),
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
    assert code == 0 and "error" not in error, error
    with (out / "scored/scores.csv").open(newline="", errors="surrogateescape") as file:
        scored = [Path(row["path"]).name for row in csv.DictReader(file)]
    read = (folder / name).is_file() and name not in ("notes.txt", "._003.png")
    assert (name in scored) == read and len(scored) == 8 + read


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_asked_for_and_absent(demo, cli, tmp_path):
    given = ["--data", demo, "--category", "demo", *TINY, "--device", "cuda", "--out", tmp_path]
    assert_one_line(cli("train.py", *given), "no CUDA device")


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
    fit = [sample.path for sample in gaussad.list_samples(data, "screw", "train")][::2]
    test = gaussad.list_samples(data, "screw", "test")
    levels = [2, 4, 7, 11, 14, 17, 18, 19]  # what the independent program had
    detector = GaussianAD(FeatureExtractor("mobilenet_v2", levels, weights), [14])
    detector.fit(gaussad.load_images(fit, 320).split(16))
    images = gaussad.load_images([sample.path for sample in test], 320).split(16)
    scores, maps = map(torch.cat, zip(*[detector.scores_and_maps(batch) for batch in images]))
    found = gaussad.auroc(scores, torch.tensor([s.defect != "good" for s in test]))
    assert 100 * found == pytest.approx(77.5, abs=3)
    none = torch.zeros(320, 320, dtype=torch.bool)
    masks = torch.stack([gaussad.load_mask(s.mask, 320) if s.mask else none for s in test])
    assert 100 * gaussad.auroc(maps, masks) == pytest.approx(98.5, abs=0.5)
    assert 100 * gaussad.aupro(maps, masks) == pytest.approx(93.7, abs=1)
