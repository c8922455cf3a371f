"""The streaming pipeline: the same batches however they are made, images decoded once, errors that name the file."""

import gc
import os
import weakref
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.nets import half
from helpers.trees import make_clothing1M, make_webvision
from PIL import ExifTags, Image
from torchvision import transforms

import dataloader_clothing1M
import dataloader_webvision
from dividemix import DivideMixError, DivideMixWarning, engine
from dividemix.data import images, store
from dividemix.data.images import Views
from dividemix.data.stream import Pipeline
from dividemix.runtime.device import Runtime
from dividemix.runtime.ranks import Ranks
from PreResNet import ResNet18

VIEWS = Views(36, 32)
CPU, ALONE = torch.device("cpu"), Ranks()


@pytest.fixture(scope="module")
def clothing(tmp_path_factory):
    return dataloader_clothing1M.load(make_clothing1M(tmp_path_factory.mktemp("clothing"), noise=0))


@pytest.fixture
def own_clothing(tmp_path):
    """One that may be spoilt."""
    return dataloader_clothing1M.load(make_clothing1M(tmp_path / "data"))


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


def assert_same(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def decoded(monkeypatch):
    """The paths of all images that this process decodes, in order."""
    paths, read = [], images.read
    monkeypatch.setattr(images, "read", lambda path, boundary: paths.append(path) or read(path, boundary))
    return paths


# ---- Pixels ----


@pytest.mark.parametrize("workers", [0, 1])
def test_pixels_for_the_device(clothing, workers):
    """Sets that live on the device would be of other pixels than those that are read in each pass, or in another
    order."""
    index = np.array([5, 3, 40, *range(20)])
    with pipeline(clothing, workers=workers) as streamed:
        pixels = streamed.pixels("train", index)
        seen = torch.cat([x for x, _ in streamed.images("train", index).eval_batches(7)])
        assert pixels.dtype == np.uint8 and pixels.shape == (23, 32, 32, 3)
        torch.testing.assert_close(streamed.normalise(torch.from_numpy(pixels)), seen, rtol=0, atol=0)


def test_the_bar_goes_along_with_the_images(clothing, decoded, tmp_path):
    """A bar that is full at once, before minutes of reading."""
    ticks = []

    def bar(steps):
        for step in steps:
            ticks.append(len(decoded))
            yield step

    with pipeline(clothing, cache_dir=tmp_path) as made:
        made.pixels("train", np.arange(24), bar)
        assert ticks == [0, 8, 16]
        made.build_cache(bar)
        assert ticks[3:] == list(range(24, 24 + 56 + 28, 8))


def test_originals_are_the_files_and_with_a_cache_its_images(own_clothing, tmp_path):
    """Else the report shows another image beside a label; or none, where the files went away once they were cached."""
    index = np.array([7, 3, 50])
    with pipeline(own_clothing, cache_dir=tmp_path / "cache") as pipe:
        data, paths = pipe.images("train", index), [own_clothing.train.path(i) for i in (50, 7)]
        expected = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
        for found, pixels in zip(data.originals(np.array([2, 0])), expected, strict=True):
            np.testing.assert_array_equal(found, pixels)
        pipe.build_cache()
        Path(paths[1]).write_bytes(b"not an image")
        for found, pixels in zip(data.originals(np.array([2, 0])), expected, strict=True):
            np.testing.assert_array_equal(found, VIEWS.resized(Image.fromarray(pixels)))
    with pipeline(own_clothing) as pipe, pytest.raises(DivideMixError, match=f"{paths[1]}: not an image"):
        list(pipe.images("train", index).originals(np.array([2, 0])))


def test_evaluation_is_torchvisions_in_the_order_of_the_samples(clothing):
    """Losses and accuracies of other pixels than the paper's, or given to other samples."""
    expected = transforms.Compose(
        [
            transforms.Resize(36),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(clothing.mean, clothing.std),
        ]
    )
    index = rng().permutation(56)[:30]
    with pipeline(clothing) as made:
        data = made.images("train", index)
        batches = list(data.eval_batches(8))
        assert len(data) == 30
        assert len(data.eval_batches(8)) == len(batches) == 4
        assert data.eval_batches(8).sizes == [(8,), (8,), (8,), (6,)]
    x, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    assert labels.tolist() == clothing.train.labels[index].tolist() == data.labels.tolist()
    for k, i in enumerate(index):
        image = Image.open(clothing.train.path(i)).convert("RGB")
        torch.testing.assert_close(x[k], expected(image), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("views", [VIEWS, Views(36, 32, "resized_crop")], ids=lambda views: views.kind)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_memory_change_nothing(clothing, views, keep, workers):
    """A run could not be repeated on a machine with more cores or less memory."""
    with pipeline(clothing, views) as plain, pipeline(clothing, views, workers=workers) as other:
        index = rng().permutation(56)[:50]
        assert_same(
            everything(other.images("train", index, keep=keep)), everything(plain.images("train", index, keep=False))
        )


@pytest.mark.parametrize("keep", [False, True])
def test_views_belong_to_labels_and_weights(clothing, keep):
    """An image trained on with the label or the weight of another one; both views of it the same."""
    division = half(56, 40)
    division.clean_probability[:] = np.linspace(0.9, 0.1, 56)
    with pipeline(clothing) as made:
        data = made.images("train", keep=keep)
        seen, differ, digests = [], 0, {}  # digests: all crops that there are of an image
        for i in range(56):
            image, _ = made.workers.reader.image("train", None, i)
            digests[i] = {
                side[top : top + 32, left : left + 32].tobytes()
                for side in (image, image[:, ::-1])
                for top in range(len(image) - 31)
                for left in range(image.shape[1] - 31)
            }

        def shown(view):
            return {i for i in digests if view.numpy().tobytes() in digests[i]}

        batches = data.mixmatch_batches(division, 16, rng())
        for (n, m), (x1, x2, labels, w, u1, u2) in zip(batches.sizes, batches, strict=True):
            assert (len(x1), len(u1)) == (n, m)
            for k in range(n):
                both = shown(x1[k]) & shown(x2[k])
                fits = [
                    i for i in both if labels[k] == data.labels[i] and abs(w[k] - division.clean_probability[i]) < 1e-6
                ]
                assert len(fits) == 1
                seen += fits
                differ += bool((x1[k] != x2[k]).any())
            for k in range(m):
                assert any(i >= 40 for i in shown(u1[k]) & shown(u2[k]))
    assert sorted(seen) == list(range(40))
    assert differ > 30


def test_all_kinds_of_images_in_one_list(own_clothing):
    """One grey or CMYK photo would end a run of days."""
    train = own_clothing.train
    for i, mode in enumerate(["L", "P", "CMYK", "RGBA", "LA", "1"]):
        image = Image.open(train.path(i)).convert(mode)
        image.save(
            train.path(i), "JPEG" if mode in ("L", "CMYK") else "PNG", **{"transparency": 1} if mode == "P" else {}
        )
    with pipeline(own_clothing, workers=1) as made:
        [(x, _)] = made.images("train", np.arange(6)).eval_batches(6)
        for i in range(6):
            plain = VIEWS.eval(VIEWS.resized(Image.open(train.path(i)).convert("RGB")))
            assert torch.equal(x[i], made.normalise(torch.from_numpy(plain.copy())[None])[0])


def test_the_published_pixels_are_kept_and_own_images_are_read_as_shown(own_clothing, tmp_path):
    """Clothing1M would be other pixels than the paper's; own photos would lie on their side, in training or beside
    their label in the report."""
    train, exif = own_clothing.train, Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    with Image.open(train.path(0)) as image:
        image.convert("RGB").save(train.path(0), "PNG", exif=exif)
        stored = np.asarray(image.convert("RGB"))
    for as_shown, expected in ((False, stored), (True, stored[::-1, ::-1])):
        expected = VIEWS.eval(VIEWS.resized(Image.fromarray(np.ascontiguousarray(expected))))
        lists = {"train": replace(train, as_shown=as_shown)}
        for cache_dir in (None, tmp_path / "cache"):
            with Pipeline(lists, VIEWS, (0.5,) * 3, (0.5,) * 3, Runtime(), workers=0, cache_dir=cache_dir) as made:
                if cache_dir:
                    made.build_cache()
                np.testing.assert_array_equal(made.pixels("train", np.arange(1))[0], expected)
                [original] = made.images("train").originals(np.array([0]))
                original = VIEWS.resized(Image.fromarray(original))
                np.testing.assert_array_equal(VIEWS.eval(original), expected)
                assert len(made.said()) == as_shown and made.said() == []


def test_draws_come_from_the_generator_alone(clothing):
    """Epochs that all see the same crops, or a continued run that sees others than the uninterrupted one."""
    with pipeline(clothing) as made:
        first, again, other = (
            [batch[0].clone() for batch in made.images("train").warmup_batches(16, rng(seed))] for seed in (3, 3, 4)
        )
    assert_same(first, again)
    assert not torch.equal(torch.cat(first), torch.cat(other))


def test_all_draws_are_made_before_the_first_batch(clothing):
    """The engine draws from the same generator afterwards: prefetching would decide what it gets."""
    generators = rng(), rng()
    with pipeline(clothing) as made:
        for generator in generators:
            batches = made.images("train").mixmatch_batches(half(56), 16, generator)
            if generator is generators[0]:
                list(batches)
    assert generators[0].random() == generators[1].random()


def test_no_unlabeled_images(clothing):
    """When all samples are taken for clean, the epoch would end in an error."""
    with pipeline(clothing) as made:
        for keep in (False, True):
            batches = made.images("train", keep=keep).mixmatch_batches(half(56, 56), 16, rng())
            assert [size[1] for size in batches.sizes] == [0] * 4
            for batch in batches:
                *_, u1, u2 = made.normalise.mixmatch_views(*batch)
                assert u1.shape == u2.shape == (0, 3, 32, 32)


# ---- Ranks ----


@pytest.mark.parametrize("batch_size", [15, 30])
def test_three_ranks_have_the_rows_of_one(clothing, batch_size):
    """Ranks that train on the same images, or on other pairs of views than a single process."""
    division = half(56, 37)
    shares = []
    for rank in range(3):
        with pipeline(clothing, ranks=Ranks(rank, 3)) as made:
            data = made.images("train", keep=True)
            assert data.place is None
            passes = data.warmup_batches(batch_size, rng()), data.mixmatch_batches(division, batch_size, rng())
            shares.append([list(batches) for batches in passes])
            for batches, sizes in zip(shares[-1], (passes[0].sizes, passes[1].sizes), strict=True):
                rows = [(len(batch[0]), len(batch[4])) if len(batch) > 2 else (len(batch[0]),) for batch in batches]
                assert rows == sizes
    with pipeline(clothing) as made:
        data = made.images("train")
        # a world of three whose rows are all here: filled batches, nothing left out
        data.ranks = namedtuple("All", "pad_to_world shard_rows")(Ranks(0, 3).pad_to_world, lambda rows: rows)
        passes = data.warmup_batches(batch_size, rng()), data.mixmatch_batches(division, batch_size, rng())
        for k, batches in enumerate(passes):
            for step, batch in enumerate(batches):
                for column, tensor in enumerate(batch):
                    for rank in range(3):
                        assert torch.equal(shares[rank][k][step][column], tensor[rank::3])


def test_three_ranks_evaluate_each_image_once(clothing):
    """Losses of samples that no rank has looked at, or in the order of another sample."""
    with pipeline(clothing) as made:
        whole = list(made.images("train").eval_batches(10))
    for rank in range(3):
        with pipeline(clothing, ranks=Ranks(rank, 3)) as made:
            share = list(made.images("train").eval_batches(10))
        assert len(share) == len(whole[rank::3])
        for (x, labels), (expected, expected_labels) in zip(share, whole[rank::3], strict=True):
            assert torch.equal(x, expected)
            assert torch.equal(labels, expected_labels)


# ---- Kept ----


def test_kept_images_are_decoded_once(clothing, decoded):
    """Clothing1M: every image would be decoded twice an epoch, at half the speed."""
    with pipeline(clothing) as made:
        index = rng().permutation(56)[:30]
        everything(made.images("train", index, keep=True))
    assert decoded == [clothing.train.path(i) for i in index]


@pytest.mark.parametrize("kind", ["mixmatch", "warmup"])
def test_kept_images_are_read_before_they_are_needed(clothing, decoded, kind):
    """After a resume the division is there, but its images are not in memory: the epoch would end in an error."""
    with pipeline(clothing) as made:
        data = made.images("train", keep=True)
        if kind == "mixmatch":
            batches = data.mixmatch_batches(half(56), 16, rng())
        else:
            batches = data.warmup_batches(16, rng())
        assert len(decoded) == 56
        list(batches)
    assert len(decoded) == 56


def test_half_a_pass_is_not_kept(clothing, decoded):
    """After an evaluation that broke off, images that were never read would be black."""
    with pipeline(clothing) as made, pipeline(clothing) as plain:
        data = made.images("train", keep=True)
        next(iter(data.eval_batches(20)))
        assert_same(everything(data), everything(plain.images("train")))


def test_views_are_cut_ahead_of_the_training_and_abandoned_with_it(clothing):
    """An epoch that ends early would leave a thread that cuts views until the end of the run."""
    with pipeline(clothing) as made:
        data = made.images("train", keep=True)
        expected = [batch[0].clone() for batch in data.warmup_batches(4, rng())]
        abandoned = iter(data.warmup_batches(4, rng()))
        next(abandoned)
        assert_same([batch[0] for batch in data.warmup_batches(4, rng())], expected)
        assert_same([batch[0] for batch in abandoned], expected[1:])


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_is_freed_with_the_data_set(clothing, workers):
    """Each epoch draws new images: after a few of them the machine would have no memory left."""
    with pipeline(clothing, workers=workers) as made:
        data = made.images("train", keep=True)
        nets = [ResNet18(14, width=4) for _ in range(2)]
        optimizer = data.runtime.optimizer(nets[0], 0.01, 5e-4)
        engine.per_sample_loss(nets[0], data)
        train(nets, optimizer, data)
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
        assert made.images("train", keep=True).place == CPU
        assert made.images("train").place is None
        free = 0  # what is free then depends on what is kept
        assert made.images("train", np.arange(20), keep=True).place == CPU
    free = need / 0.6 - 10
    with pipeline(clothing, keep="auto") as made, pytest.warns(DivideMixWarning, match="decoded again in each pass"):
        assert made.images("train", keep=True).place is None
    for keep, place in (("no", None), ("host", CPU), ("device", CPU)):
        with pipeline(clothing, keep=keep) as made:
            assert made.images("train", keep=True).place == place


# ---- Cached ----


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_are_those_that_are_decoded(tmp_path, workers):
    """WebVision: the cache would change the training."""
    data = dataloader_webvision.load(make_webvision(tmp_path / "data"), num_class=10)
    views = Views(40, 32, "resized_crop")
    with pipeline(data, views) as plain:
        expected = everything(plain.images("train"))
    with pipeline(data, views, cache_dir=tmp_path / "cache", workers=workers) as made:
        list(made.images("val").eval_batches(10))  # the workers run already when the cache is built
        bars = []
        made.build_cache(bar=lambda parts: bars.append(len(parts)) or parts)
        assert bars == [5, 3]  # in parts of 8 images
        for i in range(len(data.train)):
            os.rename(data.train.path(i), data.train.path(i) + ".gone")
        for keep in (False, True):
            assert_same(everything(made.images("train", keep=keep)), expected)


def test_a_cache_serves_later_runs_and_other_ranks(clothing, tmp_path, decoded):
    """Each run would decode all images again, and fill the disk with another 27 GB."""
    with pipeline(clothing, cache_dir=tmp_path) as made:
        made.build_cache()
        assert len(decoded) == 56 + 28
    before = sorted(os.listdir(tmp_path))
    for ranks in (Ranks(), Ranks(1, 1)):
        with pipeline(clothing, cache_dir=tmp_path, ranks=ranks) as made:
            made.build_cache()
            everything(made.images("train"))
    assert len(decoded) == 56 + 28
    assert sorted(os.listdir(tmp_path)) == before


def test_a_damaged_cache_is_built_anew(clothing, tmp_path):
    """A copy that broke off: shifted pixels, or workers that die of reading past the end."""
    with pipeline(clothing) as plain:
        expected = everything(plain.images("train"))
    with pipeline(clothing, cache_dir=tmp_path) as made:
        made.build_cache()
    for path in tmp_path.glob("*.images"):
        os.truncate(path, 1000)
    with pipeline(clothing, cache_dir=tmp_path) as made:
        with pytest.warns(DivideMixWarning, match="built anew"):
            made.build_cache()
        assert_same(everything(made.images("train")), expected)


def test_a_cache_that_vanishes_is_one_line(clothing, tmp_path):
    """A cleaned scratch disk: a traceback out of a worker."""
    with pipeline(clothing, cache_dir=tmp_path, workers=1) as made:
        made.build_cache()
        for path in tmp_path.iterdir():
            path.unlink()
        with pytest.raises(DivideMixError, match="cache of resized images cannot be read") as error:
            list(made.images("train").eval_batches(10))
    assert "\n" not in str(error.value)


def test_a_bad_image_ends_the_build_and_leaves_nothing(own_clothing, tmp_path):
    """Half a cache on the disk."""
    bad = own_clothing.train.path(50)
    Path(bad).write_bytes(b"")
    with pipeline(own_clothing, cache_dir=tmp_path / "cache") as made, pytest.raises(DivideMixError, match="empty"):
        made.build_cache()
    assert not [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".lock")]


# ---- What is wrong ----


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["missing", "empty", "text", "truncated", "link", "bomb"])
def test_a_bad_image_is_named(own_clothing, tmp_path, workers, how, monkeypatch, start_method):
    """Which of a million images ended the run, and what to do about it, would be left to guess."""
    train = own_clothing.train
    path = train.path(41)
    content = Path(path).read_bytes()
    if how in ("missing", "link"):
        os.unlink(path)
    if how == "link":
        (tmp_path / "outside.jpg").write_bytes(content)
        os.symlink(tmp_path / "outside.jpg", path)
    elif how == "bomb":
        Image.new("RGB", (300, 300)).save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    elif how != "missing":
        Path(path).write_bytes({"empty": b"", "text": b"<html>", "truncated": content[:-300]}[how])
    start_method("fork")
    with pipeline(own_clothing, workers=workers) as made:
        for data in (made.images("train"), made.images("train", np.arange(30, 56), keep=True)):
            with pytest.raises(DivideMixError) as error:
                list(data.eval_batches(10))
            message = str(error.value)
            what = {"text": "not an image", "link": "leads out", "bomb": "pixels"}.get(how, how)
            assert message.startswith(f"{path}: ")
            assert what in message
            assert train.where(41) in message
            assert "--check_data full" in message
            assert "--skip_bad_images full" in message
            assert "\n" not in message
        list(made.images("train", np.arange(30)).eval_batches(10))  # the others can still be used


def test_a_worker_that_dies_while_the_network_trains(clothing):
    """torch interrupts whatever the main process does then: a traceback from the middle of a training step."""
    text = "DataLoader worker (pid 7) is killed by signal: Killed. "
    with pytest.raises(DivideMixError, match="continues after the last finished epoch"), pipeline(clothing):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="shapes"), pipeline(clothing):
        raise RuntimeError("shapes")
    with pytest.raises(KeyboardInterrupt), pipeline(clothing):
        raise KeyboardInterrupt


# ---- With the engine ----


MIXMATCH = engine.MixMatch(14, 16, alpha=0.5, lambda_u=0, unlabeled_loss=False, warm_up=1)


def train(nets, optimizer, data):
    division = half(len(data), 2 * len(data) // 3)
    return engine.train_epoch(*nets, optimizer, data, division, MIXMATCH, engine.Phase(2))


@pytest.mark.parametrize(("workers", "keep"), [(0, False), (2, False), (2, True)])
def test_the_engine_runs_on_it(clothing, workers, keep):
    """An epoch of Clothing1M: the losses would depend on how the images come, or come to no end."""
    results = []
    for processes, kept in ((0, False), (workers, keep)):
        torch.manual_seed(0)
        with pipeline(clothing, workers=processes) as made:
            made.runtime.eval_batch_size = 25
            nets = [made.runtime.prepare(ResNet18(14, width=4)) for _ in range(2)]
            optimizer = made.runtime.optimizer(nets[0], 0.01, 5e-4)
            data = made.images("train", keep=kept)
            warm = engine.warmup_epoch(nets[0], optimizer, data, MIXMATCH, engine.Phase())
            scores = engine.per_sample_loss(nets[0], data)
            terms = train(nets, optimizer, data)
            accuracy = engine.test(nets, {"val": made.images("val")})
        results.append((warm, scores.loss.tolist(), scores.prediction.tolist(), terms, accuracy))
        assert np.isfinite(terms).all()
    assert results[0] == results[1]


def test_all_data_sets_of_a_run_share_their_views(clothing):
    """A step is captured for its views: each epoch's new sample would be captured anew, and the old one never freed."""
    with pipeline(clothing) as made:
        a, b = made.images("train", keep=True), made.images("val")
        assert {a.mixmatch_views, b.mixmatch_views} == {made.normalise.mixmatch_views}
        assert {a.warmup_views, b.warmup_views} == {made.normalise.warmup_views}


def test_one_read_serves_both_views(clothing, decoded):
    """Decoding is what training waits for: one decode per view would halve the speed."""
    with pipeline(clothing) as made:
        batches = made.images("train").mixmatch_batches(half(56), 28, rng())
        list(batches)
    assert len(decoded) == len(set(decoded)) == 56
