"""The streaming pipeline: the same batches however they are made, images decoded once, errors that name the file."""

import gc
import os
import weakref
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.errors import assert_refused
from helpers.nets import half
from helpers.trees import make_clothing1M, make_webvision
from PIL import ExifTags, Image
from torchvision import transforms

import dataloader_clothing1M
import dataloader_webvision
from dividemix import DivideMixError, DivideMixWarning, engine
from dividemix.data import autoaugment, images, store
from dividemix.data.images import Views
from dividemix.data.lists import ImageList
from dividemix.data.stream import Pipeline
from dividemix.runtime.device import Runtime
from dividemix.runtime.ranks import Ranks
from PreResNet import ResNet18

VIEWS = Views(36, 32)
CPU, ALONE = torch.device("cpu"), Ranks()


def make(folder: Path) -> dataloader_clothing1M.Clothing1M:
    """56 images to train on, 28 others."""
    return dataloader_clothing1M.load(make_clothing1M(folder, 56, 14, 14, noise=0))


@pytest.fixture(scope="module")
def clothing(tmp_path_factory):
    return make(tmp_path_factory.mktemp("clothing"))


@pytest.fixture
def clothing_copy(tmp_path):
    """One that may be spoilt."""
    return make(tmp_path / "data")


def pipeline(data, views=VIEWS, ranks=ALONE, **options):
    lists, runtime = {"train": data.train, "val": data.val}, Runtime(CPU, ranks=ranks)
    return Pipeline(lists, views, data.mean, data.std, runtime, **{"workers": 0, "keep": "host"} | options)


def rng(seed=0):
    return np.random.default_rng(seed)


def everything(data, batch_size=20):
    """All tensors of all kinds of passes."""
    n = len(data)
    division = half(n, 2 * n // 3)
    passes = data.eval_batches(batch_size), data.warmup_batches(batch_size, rng())
    passes += data.mixmatch_batches(division, batch_size, rng(1)), data.eval_batches(batch_size)
    return [tensor.clone() for batches in passes for batch in batches for tensor in batch]


def assert_same(tensors, expected):
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


@pytest.fixture
def decoded(monkeypatch):
    """The paths of all images that this process decodes, in order."""
    paths, read = [], images.read
    monkeypatch.setattr(images, "read", lambda path, boundary: paths.append(path) or read(path, boundary))
    return paths


# ---- Pixels ----


def test_evaluation_is_torchvisions_in_the_order_of_the_samples(clothing):
    """Losses and accuracies would be of other pixels than the paper's, or of other samples."""
    normalise = transforms.Normalize(clothing.mean, clothing.std)
    prepare = [transforms.Resize(36), transforms.CenterCrop(32), transforms.ToTensor(), normalise]
    index = rng().permutation(56)[:30]
    with pipeline(clothing, workers=1) as made:
        data = made.images("train", index)
        batches = list(data.eval_batches(8))
        assert len(data) == 30 and data.eval_batches(8).sizes == [(8,), (8,), (8,), (6,)]
        pixels = made.pixels("train", index)
        assert pixels.dtype == np.uint8 and pixels.shape == (30, 32, 32, 3)
        x, labels = (torch.cat(column) for column in zip(*batches, strict=True))
        assert torch.equal(made.normalise(torch.from_numpy(pixels)), x)
    assert labels.tolist() == clothing.train.labels[index].tolist() == data.labels.tolist()
    for k, i in enumerate(index):
        image = Image.open(clothing.train.path(i)).convert("RGB")
        torch.testing.assert_close(x[k], transforms.Compose(prepare)(image), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "keep", "workers"),
    [("crop", False, 2), ("crop", True, 1), ("resized_crop", False, 1), ("resized_crop", True, 0)],
)
def test_workers_and_memory_change_nothing(clothing, kind, keep, workers):
    """A run could not be repeated on a machine with more cores or less memory."""
    index, views = rng().permutation(56)[:50], Views(36, 32, kind)
    with pipeline(clothing, views) as plain, pipeline(clothing, views, workers=workers) as quick:
        expected = everything(plain.images("train", index))
        assert_same(everything(quick.images("train", index, keep=keep)), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_strong_views_leave_the_others_as_they_are(clothing, workers, monkeypatch):
    """The targets would be found on other views than without them, or each image be decoded twice for one step; kept
    images would train on another policy than those that are read; or the strong views be crops of the weak ones."""
    division, views = half(56, 37), Views(36, 32, strong=True)
    with pipeline(clothing) as weak, pipeline(clothing, views, workers=workers) as strong:
        a, b = (made.images("train").mixmatch_batches(division, 15, rng()) for made in (weak, strong))
        kept = strong.images("train", keep=True)
        batches = list(zip(a, b, strict=True))
        for batch, (*shared, x3, x4, u3, u4) in batches:
            assert_same(shared, batch)
            assert x3.shape == x4.shape == batch[0].shape and u3.shape == u4.shape == batch[4].shape
            assert not torch.equal(x3, x4) and not torch.equal(x3, batch[0])
        for (_, expected), batch in zip(batches, kept.mixmatch_batches(division, 15, rng()), strict=True):
            assert_same(batch, expected)
        assert len(strong.normalise.mixmatch_views(*batch)) == 10
    monkeypatch.setattr(autoaugment, "augment_one", lambda image, _: image)
    with pipeline(clothing, views) as cropped:
        x1, x2, *_, x3, x4, _, _ = next(iter(cropped.images("train").mixmatch_batches(division, 15, rng())))
    assert len({tuple(x.flatten().tolist()) for x in (x1, x2, x3, x4)}) == 4


def test_strong_views_of_images_on_a_card_are_those_of_the_workers():
    """Where memory decides where images are kept, it would decide what is trained on."""
    pixels, seeds = rng().integers(0, 256, (12, 40, 40, 3), dtype=np.uint8), rng(1).integers(0, 2**40, (12, 4))
    views = Views(40, 32, strong=True)
    on_host, on_card = views.batch([*pixels], seeds), views.batch([*torch.from_numpy(pixels)], seeds)
    assert torch.equal(on_host[:2], on_card[:2]) and torch.equal(
        on_host[:2], replace(views, strong=False).batch([*pixels], seeds[:, :2])
    )
    assert ((on_host[2:].int() - on_card[2:].int()).abs() > 20).float().mean() < 0.01
    assert repr(views) == repr(Views(40, 32))  # else features that are there would be made again


@pytest.mark.parametrize(("labeled", "keep"), [(17, False), (24, False), (24, True)])  # 24: none is unlabeled
def test_views_belong_to_labels_and_weights(tmp_path, labeled, keep):
    """An image trained on with the label or the weight of another one; an image left out or shown twice."""
    for i in range(24):
        Image.new("RGB", (40, 36), (i,) * 3).save(tmp_path / f"{i}.png")
    listed = ImageList(tmp_path, tmp_path, "", [b"%d.png" % i for i in range(24)], np.arange(24), 24)
    division, seen = half(24, labeled), []
    division.clean_probability[:] = np.linspace(0.9, 0.1, 24)
    with Pipeline({"train": listed}, VIEWS, (0.5,) * 3, (0.5,) * 3, Runtime(), workers=0) as made:
        batches = made.images("train", keep=keep).mixmatch_batches(division, 5, rng())
        for (n, m), (x1, x2, labels, w, u1, u2) in zip(batches.sizes, batches, strict=True):
            assert (len(x1), len(u1)) == (n, m) and (m > 0) == (labeled < 24)
            assert x1[:, 9, 9, 0].tolist() == x2[:, 9, 9, 0].tolist() == labels.tolist()
            assert u1[:, 9, 9, 0].tolist() == u2[:, 9, 9, 0].tolist() and (u1 >= 17).all()
            np.testing.assert_allclose(w, division.clean_probability[labels], rtol=1e-6)
            seen += labels.tolist()
    assert sorted(seen) == list(range(labeled))


def test_the_published_pixels_are_kept_and_own_images_are_read_as_shown(clothing_copy, tmp_path):
    """Clothing1M would be other pixels than the paper's; own photos would lie on their side."""
    train, exif = clothing_copy.train, Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    with Image.open(train.path(7)) as image:
        image.convert("RGB").save(train.path(7), "PNG", exif=exif)
        stored = np.asarray(image.convert("RGB"))
    for as_shown, original in ((False, stored), (True, stored[::-1, ::-1])):
        resized, lists = VIEWS.resized(Image.fromarray(original.copy())), {"train": replace(train, as_shown=as_shown)}
        for cache_dir, expected in ((None, original), (tmp_path / "cache", resized)):
            with Pipeline(lists, VIEWS, (0.5,) * 3, (0.5,) * 3, Runtime(), workers=0, cache_dir=cache_dir) as made:
                if cache_dir:
                    made.build_cache()
                np.testing.assert_array_equal(made.pixels("train", np.array([7]))[0], VIEWS.eval(resized))
                assert len(made.describe_images(np.array([]))) == as_shown
                assert made.describe_images(np.array([])) == []
                pixels = [*made.images("train", np.array([3, 50, 7])).originals(np.array([2, 0]))]
                np.testing.assert_array_equal(pixels[0], expected)


def test_draws_come_from_the_generator_alone_and_before_the_first_batch(clothing):
    """A continued run would see other crops, and prefetching would decide what the engine draws next."""
    generators = [rng(3), rng(3), rng(4)]
    with pipeline(clothing) as made:
        first, again, third = (made.images("train").mixmatch_batches(half(56), 16, g) for g in generators)
        tensors, expected = ([tensor.clone() for batch in batches for tensor in batch] for batches in (first, again))
        assert_same(tensors, expected)
        x1, x2, *_ = tensors
        assert (x1 != x2).flatten(1).any(1).float().mean() > 0.9  # the two views of an image
        assert not torch.equal(x1, next(iter(third))[0])
        made.images("train").mixmatch_batches(half(56), 16, rng_unread := rng(3))
        # A step is captured for its views: each epoch's new sample would be captured anew, and no graph freed.
        a, b = made.images("train", keep=True), made.images("val")
        assert a.mixmatch_views == b.mixmatch_views and a.warmup_views == b.warmup_views
    assert generators[0].random() == rng_unread.random()


# ---- Ranks ----


def test_three_ranks_have_the_rows_of_one(clothing):
    """Ranks would train on the same images, or score samples in another order than a single process."""
    division, shares = half(56, 37), []

    def passes(data):
        return data.warmup_batches(15, rng()), data.mixmatch_batches(division, 15, rng())

    with pipeline(clothing) as made:
        data = made.images("train")
        evaluated = list(data.eval_batches(10))
        for rank in range(3):
            with pytest.warns(DivideMixWarning, match="--keep_images"):
                of_rank = pipeline(clothing, ranks=Ranks(rank, 3))
            with of_rank:
                share = of_rank.images("train", keep=True)
                assert share.memory is None
                for batch, expected in zip(share.eval_batches(10), evaluated[rank::3], strict=True):
                    assert_same(batch, expected)
                shares.append([list(batches) for batches in passes(share)])
                for batches, sizes in zip(shares[-1], (batches.sizes for batches in passes(share)), strict=True):
                    assert sizes == [tuple(len(batch[i]) for i in range(0, len(batch), 4)) for batch in batches]
        # a world of three whose rows are all here: filled batches, nothing left out
        data.ranks = namedtuple("All", "pad_to_world shard_rows")(Ranks(0, 3).pad_to_world, lambda rows: rows)
        for k, batches in enumerate(passes(data)):
            for step, batch in enumerate(batches):
                for rank in range(3):
                    assert_same(shares[rank][k][step], [tensor[rank::3] for tensor in batch])


# ---- Kept ----


def test_images_are_decoded_once(clothing, decoded):
    """Decoding is what training waits for: a second decode would halve the speed."""
    paths, index = [clothing.train.path(i) for i in range(56)], rng().permutation(56)[:30]
    with pipeline(clothing) as made:
        list(made.images("train").mixmatch_batches(half(56), 28, rng()))
        assert sorted(decoded) == sorted(paths)
        decoded.clear()
        expected = everything(made.images("train", index, keep=True))
        assert decoded == [paths[i] for i in index]
        data = made.images("train", index, keep=True)
        next(iter(data.eval_batches(20)))
        assert_same(everything(data), expected)


def test_memory_is_freed_with_the_data_set(clothing):
    """Each epoch draws new images: after a few of them the machine would have no memory left."""
    with pipeline(clothing, workers=1) as made:
        data = made.images("train", np.arange(20), keep=True)
        nets = [ResNet18(14, width=4) for _ in range(2)]
        optimizer = data.runtime.optimizer(nets[0], 0.01, 5e-4)
        engine.per_sample_loss(nets[0], data)
        mixmatch = engine.MixMatch(14, 16, alpha=0.5, lambda_u=0, unlabeled_loss=False, warm_up=1)
        terms = engine.train_epoch(*nets, optimizer, data, half(20), mixmatch, engine.Phase(2))
        assert np.isfinite(terms).all()
        held = weakref.ref(data._kept)
        assert held() is not None
        gc.disable()  # at once, not when the collector comes by
        try:
            del data
            assert held() is None
        finally:
            gc.enable()


def test_where_images_are_kept(clothing, monkeypatch):
    """The run would be killed for want of memory; or decode twice where there is enough of it, without a word."""
    need = 2 * store.estimate(56, 36)
    free = need / 0.6 + 10
    monkeypatch.setattr(store, "host_memory", lambda: free)
    with pipeline(clothing, keep="auto") as made:
        assert made.images("train", keep=True).memory == CPU
        assert made.images("train").memory is None
        free = 0  # what is free then depends on what is kept
        assert made.images("train", np.arange(20), keep=True).memory == CPU
    free = need / 0.6 - 10
    with pipeline(clothing, keep="auto") as made, pytest.warns(DivideMixWarning, match="decoded again in each pass"):
        assert made.images("train", keep=True).memory is None
    for keep, memory in (("no", None), ("host", CPU), ("device", CPU)):
        with pipeline(clothing, keep=keep) as made:
            assert made.images("train", keep=True).memory == memory
    monkeypatch.setattr(store.KeptImages, "add", mock.Mock(side_effect=torch.OutOfMemoryError))
    with pipeline(clothing) as made, pytest.raises(DivideMixError, match="--keep_images"):
        list(made.images("train", keep=True).eval_batches(8))


# ---- Cached ----


def test_cached_images_are_those_that_are_decoded(tmp_path):
    """The cache would change the training, or each run decode all images again."""
    data = dataloader_webvision.load(make_webvision(tmp_path / "data"), num_class=10)
    views, bars, cache = Views(40, 32, "resized_crop"), [], tmp_path / "cache"
    with pipeline(data, views) as plain:
        expected = everything(plain.images("train"))
    with pipeline(data, views, cache_dir=cache, workers=2) as made:
        list(made.images("val").eval_batches(10))  # the workers run already when the cache is built
        made.build_cache(bar=lambda tasks: bars.append(len(tasks)) or tasks)
        assert bars == [5, 3]  # tasks of 8 images
        for keep in (False, True):
            assert_same(everything(made.images("train", keep=keep)), expected)
    files = sorted(os.listdir(cache))
    for ranks in (Ranks(1, 1), Ranks()):
        with pipeline(data, views, cache_dir=cache, ranks=ranks) as later, mock.patch.object(images, "read") as decode:
            later.build_cache()
            tensors = everything(later.images("train"))
        assert not decode.called and sorted(os.listdir(cache)) == files
    assert_same(tensors, expected)
    for path in cache.glob("*.images"):
        os.truncate(path, 1000)
    with pipeline(data, views, cache_dir=cache) as later:
        with pytest.warns(DivideMixWarning, match=str(cache)):
            later.build_cache()
        assert_same(everything(later.images("train")), expected)


def test_a_cache_that_is_gone_and_one_that_cannot_be_built(clothing_copy, tmp_path):
    """The report would show no images after the files went away; or half a cache fill the disk."""
    path, cache = clothing_copy.train.path(7), tmp_path / "cache"
    with pipeline(clothing_copy, cache_dir=cache, workers=1) as made:
        made.build_cache()
        Path(path).write_bytes(b"not an image")
        data = made.images("train", np.array([7, 3]))
        assert len([*data.originals(np.array([0]))]) == 1
        for file in cache.iterdir():
            file.unlink()
        assert_refused(lambda: list(data.eval_batches(10)), cache)
    with pipeline(clothing_copy, cache_dir=cache) as made:
        with pytest.raises(DivideMixError, match=path):
            list(made.images("train", np.array([7])).originals(np.array([0])))
        with pytest.raises(DivideMixError, match=path):
            made.build_cache()
        assert all(name.endswith(".lock") for name in os.listdir(cache))


# ---- What is wrong ----


@pytest.mark.parametrize(("workers", "reason"), [(0, "empty"), (2, "leads out")])
def test_a_bad_image_is_named(clothing_copy, tmp_path, workers, reason):
    """Which of a million images ended the run, and what to do about it, would be left to guess."""
    train = clothing_copy.train
    path = Path(train.path(41))
    if reason == "empty":
        path.write_bytes(b"")
    else:
        path.rename(tmp_path / "outside.jpg")
        path.symlink_to(tmp_path / "outside.jpg")
    with pipeline(clothing_copy, workers=workers) as made:
        for data in (made.images("train"), made.images("train", np.arange(30, 56), keep=True)):
            words = f"{path}: ", reason, train.where(41), "--check_data", "--skip_bad_images"
            assert_refused(lambda data=data: list(data.eval_batches(10)), *words)
        list(made.images("train", np.arange(30)).eval_batches(10))  # the others can still be used


def test_a_worker_that_dies_while_the_network_trains(clothing):
    """torch interrupts whatever the main process does then: a traceback from the middle of a training step."""
    report = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    for error, expected in ((report, DivideMixError), (RuntimeError("shapes"), RuntimeError)):
        with pytest.raises(expected, match=r"--workers|shapes"), pipeline(clothing):
            raise error
