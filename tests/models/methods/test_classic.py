"""The classic hashes, and the frozen extractor that they take images by."""

import math
from collections.abc import Iterator

import faiss
import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from data.rows import DomainBatch
from models.codes import signs
from models.fitting import fitting_rows
from models.methods.classic import ITQ, LSH, PCA, ClassicConfig, KMeansHashing, SpectralHashing
from models.methods.idr_ae import IDRAE
from models.networks.extractors import Extractor


def clouds(n: int = 600, width: int = 24) -> torch.Tensor:
    """Vectors of unlike spread along their axes, turned."""
    spread = torch.linspace(3, 0.3, width)
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(5)))[0]
    return torch.randn(n, width, generator=torch.Generator().manual_seed(6)) * spread @ turn + 1


def test_itq_is_as_near_to_its_signs_as_faiss_s_and_is_of_its_seed_but_not_of_the_threads() -> None:
    x, threads, found = clouds(), torch.get_num_threads(), []

    def error(projected: torch.Tensor) -> float:
        return float((projected.sign() * projected.abs().mean() - projected).square().mean())

    try:
        for seed, count in ((0, 1), (0, 2), (1, 2)):
            torch.set_num_threads(count)
            faiss.omp_set_num_threads(count)
            torch.manual_seed(seed)
            itq = ITQ(ClassicConfig(), (24,), 3, 16)
            itq.fit(x)
            found.append(itq.hashing(x))
    finally:
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)
    assert not torch.equal(found[1] > 0, found[2] > 0)
    other = faiss.ITQTransform(24, 16, True)
    other.train(x.numpy())
    assert all(error(each) < 1.05 * error(torch.from_numpy(other.apply(x.numpy()))) for each in found)
    torch.testing.assert_close(itq.hashing.axes @ itq.hashing.axes.T, torch.eye(16), atol=1e-5, rtol=0)


def test_pca_codes_are_a_random_rotation_of_the_principal_components() -> None:
    x, found = clouds(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        pca = PCA(ClassicConfig(), (24,), 3, 16)
        pca.fit(x)
        found.append(pca.hashing.axes.clone())
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2], atol=0.1)
    torch.testing.assert_close(found[0] @ found[0].T, torch.eye(16), atol=1e-5, rtol=0)
    z = torch.nn.functional.normalize(x - x.mean(0))
    axes = torch.linalg.svd(z - z.mean(0), full_matrices=False).Vh[:16]
    torch.testing.assert_close(found[2].T @ found[2], axes.T @ axes, atol=1e-4, rtol=0)  # the same space


def test_lsh_is_of_its_seed() -> None:
    x, codes = clouds(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        lsh = LSH(ClassicConfig(), (24,), 3, 16)
        lsh.fit(x)
        codes.append(lsh.hashing(x) > 0)
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])
    assert (codes[0].float().mean(0) - 0.5).abs().max() < 0.15  # through the mean
    with pytest.raises(ValueError, match="at most one bit of a feature"):
        ITQ(ClassicConfig(), (24,), 3, 32).fit(x)


def test_spectral_hashing_takes_the_smoothest_waves() -> None:
    x = torch.stack([torch.linspace(0, 8, 400), torch.linspace(0, 0.5, 400)[torch.randperm(400, generator=torch.Generator().manual_seed(0))]], 1)
    method = SpectralHashing(ClassicConfig(), (2,), 3, 8)
    method.fit(x)
    # along the axis of length 8 the k-th wave has frequency k pi / 8: eight of them come before the first of length 0.5
    assert method.hashing.frequency.sort().values.tolist() == pytest.approx([k * math.pi / 8 for k in range(1, 9)], rel=0.02)
    first = method.hashing(x)[:, method.hashing.frequency.argmin()] > 0
    assert first[:190].unique().numel() == 1 and first[210:].unique().numel() == 1 and first[0] != first[-1]


def test_kmeans_hashing_lowers_its_objective_and_its_distances_follow_the_bits() -> None:
    x = clouds(2000)
    method = KMeansHashing(ClassicConfig(), (24,), 3, 16)
    method.fit(x)
    codes, module = signs(method.hashing(x)), method.hashing
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    part = ((x - module.mean) @ module.axes.T)[:, : module.width]
    nearest = torch.cdist(part, module.centroids[0]).argmin(1)
    assert torch.equal(((codes[:, :4] > 0) * torch.tensor([1, 2, 4, 8])).sum(1), nearest)
    bits = (torch.arange(16).unsqueeze(1) // torch.tensor([1, 2, 4, 8])) % 2
    hamming = (bits.unsqueeze(0) != bits.unsqueeze(1)).sum(2).float()
    places = torch.triu_indices(16, 16, 1).unbind()

    def followed(centroids: torch.Tensor) -> float:
        return float(np.corrcoef(torch.cdist(centroids, centroids)[places].numpy(), hamming.sqrt()[places].numpy())[0, 1])

    plain = torch.from_numpy(KMeans(16, n_init=3, random_state=0).fit(part.numpy()).cluster_centers_)
    assert followed(module.centroids[0]) > 0.9 > followed(plain) + 0.2  # numbers of plain k-means mean nothing
    error = torch.cdist(part, module.centroids[0]).amin(1).square().mean()
    assert error < 0.8 * part.square().sum(1).mean()


def test_fc7_is_taken_of_small_images_too_and_as_it_is() -> None:
    torch.manual_seed(0)
    extractor = Extractor("alexnet", (1, 32, 32), "none", normalised=False).eval()
    found = extractor(torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8))
    assert found.shape == (2, 4096) and (found >= 0).all()
    extractor.normalised = True
    scaled = extractor(torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8))
    assert scaled.square().mean(1).tolist() == pytest.approx([1, 1], rel=1e-3)
    paper = IDRAE.preset("paper")
    assert (paper.extractor, paper.normalised, paper.error, paper.matching_weight, IDRAE.presets["paper"].epochs) == ("vgg16", False, "sum", 0.01, 100)


def test_a_fit_takes_its_number_of_rows_however_small_the_batches_are() -> None:
    """Photographs that are streamed come in batches of fewer rows than digits in memory."""
    x = clouds(n=130)

    class Streamed:
        total = len(x)

        def rows(self) -> Iterator[DomainBatch]:
            yield from (DomainBatch(part, (), None, torch.arange(len(part))) for part in x.split(9))

    for wanted, expected in ((100, 100), (500, 130)):
        method = LSH(ClassicConfig(fit_rows=wanted), (24,), 3, 16)
        found, labels = fitting_rows(Streamed(), method.config.fit_rows, method.extractor, method.device)
        torch.testing.assert_close(found, method.extractor(x[:expected]))
        assert labels is None
