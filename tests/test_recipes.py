"""The paper's results as data."""

from helpers.nets import ABLATED, TABLE5

import Train_cifar
import Train_clothing1M
import Train_webvision
from dividemix import recipes


def test_the_recipes_are_the_papers_table():
    """Else an ablation is compared with a number that nobody published, or with the whole method's."""
    cifar10 = [row for row in recipes.ROWS if row.dataset == "cifar10"]
    assert [row.name for row in cifar10] == [
        f"cifar10 {noise}%" for noise in ("sym 20", "sym 50", "sym 80", "sym 90", "asym 40")
    ]
    assert recipes.ABLATIONS.keys() == ABLATED.keys() == {"none", *TABLE5}
    for name, best in TABLE5.items():
        expected = [{} if value is None else {"best": value} for value in best]
        assert [recipes.paper_results(row, ablation=name) for row in cifar10] == expected
    for row in recipes.ROWS:
        assert recipes.paper_results(row) == {"best": row.best, "last": row.last}
        assert recipes.paper_results(row, "ce") == {"best": row.ce_best}
        assert row.dataset == "cifar10" or recipes.paper_results(row, ablation="divide_mixmatch") == {}


def test_large_image_recipes_are_the_papers():
    """Else the defaults train something else than the paper's, or are compared with a number nobody published."""
    both = {"batch_size": 32, "lr_drop": 40, "num_epochs": 80, "warm_up": 1}
    both |= {"alpha": 0.5, "lambda_u": 0, "p_threshold": 0.5, "division": "global"}
    clothing, web = recipes.CLOTHING1M, recipes.WEBVISION
    assert clothing.method == both | {"lr": 0.002} and web.method == both | {"lr": 0.01}
    assert (clothing.weight_decay, web.weight_decay) == (1e-3, 5e-4)
    assert (clothing.conf_penalty, web.conf_penalty) == (True, False)
    size = {"image_size": 224, "num_class": 14, "num_batches": 1000}
    assert clothing.images == {"arch": "resnet50", "weights": "imagenet"} | size
    assert web.images == {"arch": "inceptionresnetv2", "weights": "none", "image_size": 299, "num_class": 50}
    assert clothing.results == {"test_acc": 74.76}
    top5 = {"test_acc_top5": 91.64, "imagenet_acc_top5": 90.84}
    assert web.results == {"test_acc": 77.32, "imagenet_acc": 75.20} | top5
    assert (clothing.resize_for(224), web.resize_for(299), clothing.resize_for(56)) == (256, 320, 64)


def test_a_division_by_class_is_not_the_papers_setting():
    """Else a number of another method stands beside the paper's as if it were of the same."""
    for script, setting in (
        (Train_cifar, recipes.in_paper("Train_cifar.py", vars(Train_cifar.parse_args([])))[0]),
        (Train_clothing1M, recipes.CLOTHING1M.setting),
        (Train_webvision, recipes.WEBVISION.setting),
    ):
        args = script.parse_args(["--division", "per_class"])
        assert "--division per_class (paper: global)" in recipes.setting_differences(vars(args), setting)
        differences = recipes.setting_differences(vars(script.parse_args([])), setting)
        assert not any(text.startswith("--division") for text in differences)
