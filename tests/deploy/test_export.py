"""`python -m dividemix export`: the file is the run's ensemble, needs only PyTorch, and says how to use it."""

import contextlib
import copy
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers.pages import refused, rows_of
from helpers.scripts import ROOT
from helpers.trained import COLOUR, GREY, NAMES, command, draw_photos, make_trained
from torch.export.passes import move_to_device_pass

import PreResNet
from dividemix import networks
from dividemix.data.images import READING
from dividemix.deploy import ensemble as deploy
from dividemix.deploy import export, predict
from dividemix.run.description import Preparation, read_description


def load(path: Path) -> tuple[torch.export.ExportedProgram, dict]:
    """The program and the metadata, as anybody would read them."""
    extra = {"metadata.json": ""}
    exported = torch.export.load(path, extra_files=extra)
    return exported, json.loads(extra["metadata.json"])


def assert_same(exported, run: Path, sizes: tuple[int, ...] = (1, 2, 3, 17)) -> None:
    """The program's answers are the run's ensemble's, for batches of any size."""
    description, program = read_description(run), exported.module()
    ensemble, p = deploy.load_ensemble(run, description), description.preparation
    for n in sizes:
        x = torch.rand(n, p.channels, p.image_size, p.image_size)
        with torch.no_grad():
            expected = ensemble(x)
            assert expected.std(dim=1).min() > 0.1
            torch.testing.assert_close(program(x), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of grey images with a border, and its export; of half of ResNet-18's blocks, as tracing takes seconds."""
    root = tmp_path_factory.mktemp("export")
    half = networks.Architecture(lambda *size: PreResNet.ResNet(PreResNet.PreActBlock, [1] * 4, *size), 16, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.ARCHITECTURES, "half", half)
        networks.architecture("half")  # it remembers it
    run, file = make_trained(root / "a run", GREY, arch="half"), root / "model.pt2"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        export.main([str(run), str(file)])
    exported, metadata = load(file)
    return SimpleNamespace(run=run, content=file.read_bytes(), exported=exported, metadata=metadata, out=out.getvalue())


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    return command(export, tmp_path, monkeypatch, capsys)


def test_the_export_equals_the_ensemble(done):
    """Else what is deployed is not what was trained, or nobody knows whether that was compared."""
    assert_same(done.exported, done.run)
    assert re.search(r"1, 2, 5 images: largest difference \d\.\de[+-]\d\d ", done.out)
    assert "two half, width 4, 6 classes, grey images of 14x14; weights of the best epoch 1; " in done.out


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*networks.ARCHITECTURES, "regnet_y_400mf"])  # one of torchvision's that is odd
def test_every_network_can_be_exported(arch, start, tmp_path):
    """Else it is found out after the training."""
    side = max(16, networks.architecture(arch).min_side or 64)
    preparation = Preparation((0.5,) * 3, (0.5,) * 3, side, side)
    width = 4 if networks.architecture(arch).has_width else networks.WIDTH
    run = make_trained(tmp_path / "run", preparation, arch=arch, width=width, last=False)
    status, _, error = start(run, "model.pt2")
    assert (status, error) == (0, "")
    assert_same(load(tmp_path / "model.pt2")[0], run, sizes=(1, 3))


def test_the_metadata_say_what_goes_in_and_what_comes_out(done):
    """Else whoever gets the file alone guesses sizes, colours, mean, and which class is number 3."""
    metadata, side = done.metadata, GREY.image_size
    images = {"name": "images", "dtype": "float32", "shape": ["batch", 1, side, side], "range": [0, 1]}
    assert metadata["input"] == images and str(images["shape"]) in done.out
    assert metadata["output"]["shape"] == ["batch", 6] and metadata["classes"] == NAMES
    expected = {"channels": 1, "resize": side, "image_size": side, "border": 2, "interpolation": "bilinear"}
    expected |= {"mean": list(GREY.mean), "std": list(GREY.std), "in_the_program": ["border", "mean", "std"]}
    assert {name: metadata["preprocessing"][name] for name in expected} == expected
    steps = metadata["preprocessing"]["steps"]  # turned, on white, 16 bits: before they are resized
    assert steps[: len(READING)] == list(READING) == metadata["preprocessing"]["reading"]
    assert metadata["networks"] == {"arch": "half", "count": 2, "width": 4, "num_class": 6}
    assert metadata["run"] == {"name": "a run", "weights": "best", "epochs": [1, 1], "averaged": False}
    assert metadata["versions"]["torch"] == torch.__version__
    assert str(done.run.parent) not in json.dumps(metadata) and str(ROOT) not in json.dumps(metadata)


def test_the_program_is_bound_to_no_device(done):
    """Else a file that was written on a CPU cannot be moved to a card, which 'meta' stands for."""
    program = move_to_device_pass(copy.deepcopy(done.exported), "meta")
    graphs = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    values = [v for graph in graphs for node in graph.graph.nodes for v in (*node.args, *node.kwargs.values())]
    assert len(values) > 50
    named = {str(v) for v in values if isinstance(v, torch.device) or re.match("cpu|cuda|meta", str(v))}
    assert named <= {"meta"}
    side = GREY.image_size
    assert program.module()(torch.empty(3, 1, side, side, device="meta")).shape == (3, 6)


@pytest.mark.gpu
def test_the_program_on_a_card_equals_the_ensemble(done):
    """Else the deployed network answers otherwise than the tested one."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    program = move_to_device_pass(copy.deepcopy(done.exported), "cuda").module()
    ensemble = deploy.load_ensemble(done.run, read_description(done.run))
    x = torch.rand(17, 1, GREY.image_size, GREY.image_size)
    with torch.no_grad():
        torch.testing.assert_close(program(x.cuda()).cpu(), ensemble(x), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("preparation", [COLOUR, GREY], ids=["colour", "grey"])
def test_the_documented_code_gives_the_answers_of_predict(preparation, start, tmp_path):
    """Else the file cannot be used without this project, or the recipe prepares images otherwise."""
    run = make_trained(tmp_path / "run", preparation)
    assert start(run, "model.pt2")[0] == 0
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-images.md").read_text(), re.DOTALL)
    [code] = [block for block in blocks if "torch.export.load" in block]
    away = tmp_path / "elsewhere"
    away.mkdir()
    (tmp_path / "model.pt2").rename(away / "model.pt2")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    for path in draw_photos(tmp_path / "photos", 3):
        path.rename(away / "photo.jpg")
        end = "\nimport sys\nassert 'dividemix' not in sys.modules and 'torchvision' not in sys.modules\n"
        process = [sys.executable, "-c", code + end]
        ended = subprocess.run(process, cwd=away, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        predict.main([str(run), str(away / "photo.jpg"), "--device", "cpu"])
        [row] = rows_of(tmp_path / "predictions.csv")
        name, probability = ended.stdout.split()
        assert (name, float(probability)) == (row["class"], pytest.approx(float(row["confidence"]), abs=1e-3))


@pytest.mark.parametrize(("change", "difference"), [(0.01, "0[1-9]"), (float("nan"), "nan")])
def test_a_program_that_differs_is_not_written(done, start, monkeypatch, tmp_path, change, difference):
    """Else a fault of the exporter, or networks that diverged, go into production."""
    run = make_trained(tmp_path / "run", GREY, arch="half")
    state = torch.load(run / "best.pt", weights_only=True)
    state["nets"][0]["linear.bias"][0] += change
    torch.save(state, run / "best.pt")
    monkeypatch.setattr(export, "export", lambda *_: done.content)
    monkeypatch.setattr(torch.export, "load", lambda *_: done.exported)
    Path("model.pt2").write_bytes(b"before")
    ended = start(run, "model.pt2")
    refused(ended, "model.pt2: not written")
    assert re.search(f"by [^ ]*{difference} of", ended[2])
    assert Path("model.pt2").read_bytes() == b"before" and sorted(os.listdir()) == ["model.pt2", "run"]


def test_weights_last_and_what_cannot_be_exported(done, start, monkeypatch):
    """Else the best epoch's networks are deployed as the last one's, or the tracer's lines hide the reason."""
    refused(start(done.run, "model.pt"), "model.pt: ", ".pt2")
    refused(start("nowhere", "model.pt2"), "nowhere")
    failure = RuntimeError("Could not guard\n  on data-dependent expression\n" + "x" * 5000)
    monkeypatch.setattr(torch.export, "export", mock.Mock(side_effect=failure))
    refused(start(done.run, "model.pt2"), "Could not guard on data-dependent")
    assert os.listdir() == []
    monkeypatch.setattr(export, "export", to_file := mock.Mock(return_value=b""))
    monkeypatch.setattr(export, "relative_difference", lambda *_: 0.0)
    assert start(done.run, "model.pt2", "--weights", "last")[0] == 0
    ensemble, _, metadata = to_file.call_args.args
    assert metadata["run"] == {
        "name": "a run",
        "weights": "last",
        "epochs": [2, 2],
        "averaged": False,
    } and ensemble.epochs == [2, 2]
