"""Instance-dependent noise: the published algorithm, computed in blocks."""

import numpy as np
import pytest

from dividemix.noise import synthetic
from dividemix.noise.synthetic import expected_wrong, inject_instance_dependent, label_distribution
from dividemix.seeds import draws


def pictures(n: int, seed: int = 0, side: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def step_by_step(images, labels, r, num_class, seed):
    """The algorithm as the paper writes it, a sample at a time, from the same draws."""
    from scipy import stats  # scikit-learn needs it, the project does not

    rng = draws(seed, "noise")
    rates = stats.truncnorm((0 - r) / 0.1, (1 - r) / 0.1, loc=r, scale=0.1)
    normal = stats.norm(r, 0.1)
    q = rates.ppf(
        (rng.uniform(normal.cdf(0), normal.cdf(1), len(labels)) - normal.cdf(0)) / np.diff(normal.cdf([0, 1]))
    )
    chance = rng.random(len(labels))
    w = [rng.standard_normal((images[0].size, num_class)) for _ in range(num_class)]
    given = []
    for x, y, q_i, u in zip(images, labels, q, chance, strict=True):
        p = x.reshape(-1).astype(float) @ w[y]
        p[y] = -np.inf
        p = q_i * np.exp(p - p.max()) / np.exp(p - p.max()).sum()
        p[y] += 1 - q_i
        assert p.sum() == pytest.approx(1)
        given.append(int(np.searchsorted(p.cumsum(), u, side="right")))
    return np.array(given)


@pytest.mark.parametrize("r", [0.05, 0.4, 0.95])
def test_it_is_the_algorithm_of_the_paper(monkeypatch, r):
    """Noise by another rule cannot be compared with anybody's numbers at this rate."""
    images, labels = pictures(300) // 64, np.random.default_rng(1).integers(0, 4, 300)  # dark: not nearly a choice
    expected = step_by_step(images, labels, r, 4, 7)
    np.testing.assert_array_equal(inject_instance_dependent(images, labels, r, 4, 7), expected)
    monkeypatch.setattr(synthetic, "_BLOCK", 13)
    np.testing.assert_array_equal(inject_instance_dependent(images, labels, r, 4, 7), expected)


def test_a_seed_gives_one_list_and_leaves_its_input(tmp_path):
    """Noise that changes between runs makes two results incomparable; true labels that are changed, all of them."""
    images, labels = pictures(200), np.arange(200) % 5
    before = images.copy(), labels.copy()
    first = inject_instance_dependent(images, labels, 0.4, 5, 3)
    np.testing.assert_array_equal(first, inject_instance_dependent(images, labels, 0.4, 5, 3))
    assert (first != inject_instance_dependent(images, labels, 0.4, 5, 4)).mean() > 0.2
    np.testing.assert_array_equal(images, before[0])
    np.testing.assert_array_equal(labels, before[1])
    assert first.dtype == np.int64


@pytest.mark.parametrize("r", [0, 0.1, 0.5, 0.9, 1])
def test_the_share_of_wrong_labels_is_as_expected(r):
    """Else our own file would be refused, or another rate's accepted. Near 0 and 1 the flip rates are cut."""
    from scipy import stats

    mean = stats.truncnorm(-r / 0.1, (1 - r) / 0.1, loc=r, scale=0.1).mean()
    assert expected_wrong(r) == pytest.approx(mean, abs=1e-9)
    labels = np.arange(40_000) % 10
    wrong = (inject_instance_dependent(pictures(40_000, side=1), labels, r, 10, 0) != labels).mean()
    assert wrong == pytest.approx(mean, abs=0.012)  # five standard deviations


def test_what_a_label_becomes_depends_on_the_image():
    """Else it is class-dependent noise under another name: of one class, images alike must go to one class and other
    images to others."""
    images = np.repeat(pictures(8), 50, axis=0)
    given = inject_instance_dependent(images, np.zeros(400, dtype=np.int64), 0.5, 10, 0).reshape(8, 50)
    became = [set(part[part != 0]) for part in given]
    assert [len(classes) for classes in became] == [1] * 8 and len(set.union(*became)) > 1


def test_the_distribution_of_a_label():
    """Rows that do not add up to 1 would shift the rate; infinite scores would end in NaN."""
    scores = np.array([[1e5, -1e5, 3.0], [0.0, 1.0, 2.0]])
    p = label_distribution(scores, 0, np.array([0.3, 0.6]))
    np.testing.assert_allclose(p[0], [0.7, 0, 0.3])
    np.testing.assert_allclose(p[1], [0.4, 0.6 / (1 + np.e), 0.6 * np.e / (1 + np.e)])
