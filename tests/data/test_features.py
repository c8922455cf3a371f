"""Features in place of images: the stored views of the right images, by a frozen network without its classifier."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.nets import half
from helpers.trees import make_folder
from scipy.stats import chisquare
from torch import nn
from torchvision import models

import dataloader_folder
from dividemix import DivideMixError, DivideMixWarning, engine, networks
from dividemix.data import features
from dividemix.data.features import FeatureSet, as_views
from dividemix.data.images import Views
from dividemix.data.stream import Pipeline
from dividemix.runtime import Runtime

VIEWS = Views(20, 16)


def numbered(v: int, n: int, dtype=np.float32) -> FeatureSet:
    """Features (v, n, 2): the number of the view, and of the sample."""
    return FeatureSet(np.stack(np.meshgrid(range(v), range(n), indexing="ij"), axis=2).astype(dtype), np.arange(n))


# ---- Passes ----


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_training_view_is_a_draw_of_the_samples_stored_ones(dtype):
    """A view of another sample, one that is never drawn, or the same one twice in a step: wrong targets, or no
    augmentation."""
    data, rng = numbered(4, 40, dtype), np.random.default_rng(0)
    division = half(40, 24)
    division.clean_probability[:] = np.linspace(0, 1, 40)
    drawn = []
    for _ in range(20):
        for index, view in data.warmup_batches(16, rng):
            x, labels = data.warmup_views(index, view)
            assert x.dtype == torch.float32 and x[:, 1].tolist() == labels.tolist() == index.tolist()
        for batch in data.mixmatch_batches(division, 8, rng):
            x1, x2, labels, w, u1, u2 = data.mixmatch_views(*batch)
            assert x1[:, 1].tolist() == x2[:, 1].tolist() == labels.tolist()
            assert u1[:, 1].tolist() == u2[:, 1].tolist() == batch[1].tolist()
            assert w.tolist() == pytest.approx(labels / 39)
            drawn += [*zip(x1[:, 0].tolist(), x2[:, 0].tolist(), strict=True)]
            drawn += [*zip(u1[:, 0].tolist(), u2[:, 0].tolist(), strict=True)]
    pairs = np.array(drawn) @ [4, 1]
    assert chisquare(np.bincount(pairs.astype(int), minlength=16)).pvalue > 1e-4


def test_evaluation_takes_the_first_view():
    """Else the list depends on draws, and `predict`, which sees one view, is another classifier than the one tested."""
    batches = [*numbered(3, 10).eval_batches(4)]
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    x, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    assert (x[:, 0] == 0).all() and x[:, 1].tolist() == labels.tolist() == [*range(10)]


def test_a_batch_of_one_row_is_trained():
    """The last batch of a pass may have one row, which batch norm refuses: one set in 128 would crash at random."""
    data = FeatureSet(np.random.default_rng(0).normal(size=(1, 9, 5)).astype(np.float32), np.arange(9) % 2)
    nets = [networks.head(5, 2), networks.head(5, 2)]
    optimizer = data.runtime.optimizer(nets[0], 0.1, 0)
    mixmatch = engine.MixMatch(2, batch_size=4)
    before = [parameter.clone() for parameter in nets[0].parameters()]
    engine.warmup_epoch(nets[0], optimizer, data, mixmatch, engine.Phase())  # 8 rows, then 1
    terms = engine.train_epoch(*nets, optimizer, data, half(9, 5), mixmatch, engine.Phase())  # 4 labeled, then 1
    assert np.isfinite(terms).all()
    assert all(not torch.equal(a, b) for a, b in zip(before, nets[0].parameters(), strict=True))


def test_features_that_the_device_cannot_hold(monkeypatch):
    """After hours of making them, a run would end in a traceback."""
    monkeypatch.setattr(torch.Tensor, "to", mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(DivideMixError, match=r"^not enough memory for the features: 0\.0 GB"):
        numbered(2, 3)


# ---- Features of others ----


def test_features_of_any_real_type_become_views():
    """A double, or a list of lists, would stop the first layer; float16 would take twice the memory."""
    plain = [[1, 2], [3, 4], [5, 6]]
    for given in (plain, np.array(plain, np.float64), np.array([plain], np.int64), torch.tensor(plain)):
        views = as_views(given)
        assert views.dtype == np.float32 and views.tolist() == [plain]
    assert as_views(np.zeros((2, 3, 4), np.float16)).dtype == np.float16


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros(5),
        np.zeros((1, 2, 3, 4)),
        np.zeros((0, 3)),
        np.zeros((256, 2, 2)),
        np.full((4, 2), np.nan),
        np.full((4, 2), 1e300),
        np.full((4, 2), "a"),
        [[1, 2], [3]],
        torch.ones((4, 2), dtype=torch.bfloat16),
        torch.ones((4, 2), requires_grad=True),
    ],
)
def test_other_arrays_are_refused(wrong):
    """Else NaN losses, or a traceback of torch's; or samples are taken for views."""
    with pytest.raises(DivideMixError, match="FILE"), np.errstate(over="ignore"):
        as_views(wrong, "FILE")


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """8 images in each of two lists."""
    return dataloader_folder.load(make_folder(tmp_path_factory.mktemp("f") / "tree", 8, splits=("train", "test"))).lists


def test_a_feature_file_has_the_lists_one_after_the_other(lists, tmp_path):
    """Features of test images would train, under labels of other images."""
    path = tmp_path / "FILE.npy"
    np.save(path, np.arange(16 * 3, dtype=np.float32).reshape(16, 3))
    parts = features.read_file(str(path), lists, lists)
    assert (
        [*parts] == ["train", "test"]
        and parts["train"].shape == (1, 8, 3)
        and parts["test"][0, 0].tolist() == [24, 25, 26]
    )
    np.save(path, np.ones((16, 3)))
    assert features.digest(features.read_file(str(path), lists, lists)) != features.digest(parts)
    for content in (np.ones((8, 3)), np.array([None] * 16)):
        np.save(path, content)
        with pytest.raises(DivideMixError, match="FILE"):
            features.read_file(str(path), lists, lists)
    np.savez(tmp_path / "F.npz", a=np.ones((16, 3)))
    for other in ("F.npz", "absent.npy"):
        with pytest.raises(DivideMixError, match=other):
            features.read_file(str(tmp_path / other), lists, lists)


def test_a_sorted_or_shorter_table_keeps_its_features(tmp_path):
    """The corrected labels of a run, sorted by somebody in a spreadsheet, would get the features of other images."""
    tree, path = make_folder(tmp_path / "tree", 8, num_class=2), tmp_path / "F.npy"
    first = dataloader_folder.load(tree).lists
    names = [first["train"].name(i) for i in range(8)]
    np.save(path, np.arange(8.0)[:, None])
    table = tmp_path / "sorted.csv"
    table.write_text("path,label\n" + "".join(f"{name},a{k % 2}\n" for k, name in enumerate(names[:1:-1])))
    lists = dataloader_folder.load(tree, table).lists
    stored = features.read_file(path, lists, dataloader_folder.feature_order(tree, table, lists))
    assert stored["train"][0, :, 0].tolist() == [7, 6, 5, 4, 3, 2]
    (tmp_path / "flat").mkdir()  # no labels but those of the table: its order
    assert dataloader_folder.feature_order(tmp_path / "flat", table, lists) is lists


# ---- Features of a network ----


class Counted(nn.Module):
    """Images as their own features; counts the images that it sees."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(1))
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return x.flatten(1)


def pipeline(lists, views=VIEWS):
    return Pipeline(lists, views, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), Runtime(), workers=0)


def test_the_views_are_centre_mirror_and_crops(lists):
    """The first is what `predict` sees. A view of another image or at another place, or a digit that is mirrored after
    --no_flip, is a wrong sample."""
    source = pipeline(lists)
    [(centre, _)] = source.images("train").eval_batches(8)
    made = features.make(Counted(), source.images("train"), 4).reshape(4, 8, 3, 16, 16)
    torch.testing.assert_close(torch.from_numpy(made[0]), centre)
    torch.testing.assert_close(torch.from_numpy(made[1]), centre.flip(3))
    assert not (made[2] == made[3]).all(axis=(1, 2, 3)).any() and not (made[0] == made[2]).all(axis=(1, 2, 3)).any()
    pixels = np.round((made[2].transpose(0, 2, 3, 1) * 0.2 + (0.5, 0.4, 0.3)) * 255).astype(np.uint8)
    seed = np.random.default_rng(0).integers(0, 2**63 - 1, (8, 2))[5, 0]
    resized, *_ = source.workers.reader.image("train", None, 5)
    assert np.array_equal(pixels[5], VIEWS.train(resized, int(seed)))
    unflipped = features.make(Counted(), pipeline(lists, Views(20, 16, flip=False)).images("train"), 2)
    torch.testing.assert_close(torch.from_numpy(unflipped[0]), centre.flatten(1))
    assert not np.array_equal(unflipped[1].reshape(made[1].shape), made[1])
    assert len(features.make(Counted(), source.images("train"), 1)) == 1


def of_network(net, lists, folder: Path, views=VIEWS, num_views=3):
    said: list[str] = []
    return features.of_network(net, pipeline(lists, views), folder, num_views, said.append), said


def test_features_are_made_once_for_the_same_images_network_and_views(lists, tmp_path, monkeypatch):
    """Else minutes or hours are spent again at each start; or features of other weights, or of images that have changed
    since, are taken."""
    net, folder = Counted(), tmp_path / "new" / "cache"
    first, said = of_network(net, lists, folder)
    assert net.seen == 3 * 16 and str(folder) in said[0] and "8 images, 3 views" in said[1]
    again, said = of_network(net, lists, folder)
    assert net.seen == 3 * 16 and str(folder) in said[0]
    assert all(np.array_equal(first[name], again[name]) for name in ("train", "test"))
    for views, num_views, weight in (
        (Views(20, 16, flip=False), 3, 1),
        (Views(18, 16), 3, 1),
        (VIEWS, 2, 1),
        (VIEWS, 3, 2),
    ):
        net.seen = 0
        net.weight.fill_(weight)
        of_network(net, lists, folder, views, num_views)
        assert net.seen == num_views * 16
    net.weight.fill_(1)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:200])
    with pytest.warns(DivideMixWarning, match="cannot be read"):
        again, _ = of_network(net, lists, folder)
    assert all(np.array_equal(first[name], again[name]) for name in ("train", "test"))
    image = Path(lists["test"].path(0))
    image.write_bytes(Path(lists["test"].path(1)).read_bytes())
    net.seen = 0
    changed, _ = of_network(net, lists, folder)
    assert net.seen == 3 * 8 and not np.array_equal(changed["test"], first["test"])
    monkeypatch.setattr(features, "HALF_FROM", 1000)
    halves, _ = of_network(net, lists, tmp_path / "halves")
    assert halves["train"].dtype == np.float16
    np.testing.assert_allclose(halves["train"], first["train"], rtol=1e-3, atol=1e-3)


def test_a_folder_that_cannot_be_written_is_named(lists, tmp_path):
    """Else an hour of features ends in a traceback."""
    (tmp_path / "file").touch()
    with pytest.raises(DivideMixError, match="file/cache"):
        of_network(Counted(), lists, tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    "arch",
    ["preresnet18", "resnet18", "squeezenet1_1", "mobilenet_v3_small", "densenet121", "efficientnet_b0", "vit_b_16"],
)
def test_the_classifier_of_the_features_is_the_network(arch):
    """Features of another layer, or with the classifier's 1,000 logits, find fewer wrong labels, and nobody notices."""
    side = 224 if arch == "vit_b_16" else 64
    net = networks.build(arch, 5).eval() if arch == "preresnet18" else models.get_model(arch, num_classes=5).eval()
    layer = net.get_submodule(networks.classifier_of(net))
    state, rng = net.state_dict(), torch.get_rng_state()
    backbone = networks.backbone(arch, weights=state)
    assert torch.equal(torch.get_rng_state(), rng) and not backbone.training
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        found, logits = backbone(x), net(x)
    assert found.shape == (2, backbone.num_features)
    if isinstance(layer, nn.Linear):  # of squeezenet the classifier comes before the mean
        torch.testing.assert_close(nn.functional.linear(found, layer.weight, layer.bias), logits, rtol=1e-4, atol=1e-4)
