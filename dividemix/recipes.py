"""The paper's hyper-parameters and results as data, and the values from which Train_folder.py chooses for own images.

Source: Li, Socher, Hoi, ICLR 2020: Table 7 and Sec. 4.1 (settings), Tables 1 to 5 (results); for Clothing1M and
WebVision the flags' defaults are those of the authors' scripts. Test accuracies are in per cent: best = the highest of
all epochs, last = the mean of the last 10 epochs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dividemix.engine import MixMatch


@dataclass(frozen=True)
class Recipe:
    dataset: str
    mode: str
    r: float
    lambda_u: float  # weight of the unlabeled loss
    p_threshold: float = 0.5  # clean probability above which a sample is labeled
    loss_window: int = 1  # epochs of normalised loss that are averaged before the mixture is fitted
    best: float | None = None
    last: float | None = None
    ce_best: float | None = None  # plain cross-entropy, one network
    ablations: Mapping[str, float] = field(default_factory=dict)  # Table 5: `--ablation` -> best, where a source has it

    @property
    def name(self) -> str:
        return f"{self.dataset} {self.mode} {self.r:.0%}"

    @property
    def wrong(self) -> float:
        """The share of wrong labels under symmetric noise: a label that is drawn at random may be the true one."""
        return self.r * (1 - 1 / (100 if self.dataset == "cifar100" else 10))


ROWS = (
    Recipe("cifar10", "sym", 0.2, lambda_u=0, best=96.1, last=95.7, ce_best=86.8, ablations={"divide_mixmatch": 94.1}),
    Recipe("cifar10", "sym", 0.5, lambda_u=25, best=94.6, last=94.4, ce_best=79.4),
    Recipe("cifar10", "sym", 0.8, lambda_u=25, best=93.2, last=92.9, ce_best=62.9),
    Recipe("cifar10", "sym", 0.9, lambda_u=50, p_threshold=0.6, loss_window=5, best=76.0, last=75.4, ce_best=42.7),
    Recipe("cifar10", "asym", 0.4, lambda_u=0, best=93.4, last=92.1, ce_best=85.0, ablations={"divide_mixmatch": 86.5}),
    Recipe("cifar100", "sym", 0.2, lambda_u=25, best=77.3, last=76.9, ce_best=62.0),
    Recipe("cifar100", "sym", 0.5, lambda_u=150, best=74.6, last=74.2, ce_best=46.7),
    Recipe("cifar100", "sym", 0.8, lambda_u=150, best=60.2, last=59.6, ce_best=19.9),
    Recipe("cifar100", "sym", 0.9, lambda_u=150, p_threshold=0.6, loss_window=5, best=31.5, last=31.0, ce_best=10.1),
)

# The other flags of Train_cifar.py that these results were made with
CIFAR_SETTING = {"num_epochs": 300, "arch": "preresnet18", "width": 64, "batch_size": 64, "limit_train": None}
CIFAR_SETTING |= {"recipe": "paper", "lr": 0.02, "lr_drop": 150, "val_fraction": 0.0, "ema": None}
CIFAR_WEIGHT_DECAY = 5e-4
# A row leaves the other settings of the method at their defaults: a new field of MixMatch is compared, too.
METHOD_SETTING = {name: item.default for name, item in MixMatch.__dataclass_fields__.items() if name != "num_class"}


def setting(row: Recipe, method: str = "dividemix") -> dict[str, Any]:
    """All flags that a row's result was made with; for cross-entropy only those that it uses."""
    if method == "ce":
        return CIFAR_SETTING | {"conf_penalty": "auto"}
    of_row = {name: getattr(row, name) for name in ("lambda_u", "p_threshold", "loss_window")}
    of_row |= {"division": "global", "augment": "weak"}
    of_row |= {"noise_definition": "with_self"} if row.mode == "sym" else {}
    return CIFAR_SETTING | METHOD_SETTING | {"conf_penalty": "auto", "warm_up": warm_up(row.dataset)} | of_row


def setting_differences(args: Mapping[str, Any], setting: Mapping[str, Any], whose: str = "paper") -> list[str]:
    """The flags of a run that differ from `setting`, as '--lambda_u 25 (paper: 0)'. Flags that the script does not have
    do not differ; nor do those that `--recipe blind` chooses."""
    return [
        f"--{name} {flag_text(args[name])} ({whose}: {flag_text(value)})"
        for name, value in setting.items()
        if name in args and args[name] != value and (args[name] is not None or args.get("recipe") != "blind")
    ]


def flag_text(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def warm_up(dataset: str) -> int:
    """Warm-up epochs of a data set of Train_cifar.py."""
    return 30 if dataset == "cifar100" else 10


def nearest(dataset: str, mode: str, r: float | None, wrong: float | None = None) -> tuple[Recipe, bool]:
    """The row for this setting and True, or the nearest row and False: a row of CIFAR-100 for CIFAR-100, of CIFAR-10
    for every other set, of the same mode where there is one, with the closest rate (the lower one of two equally
    close). wrong: share of wrong labels of noise without an r: the symmetric row with the closest share."""
    rows = [row for row in ROWS if row.dataset == (dataset if dataset == "cifar100" else "cifar10")]
    if wrong is not None:
        symmetric = [row for row in rows if row.mode == "sym"]
        return min(symmetric, key=lambda row: (round(abs(row.wrong - wrong), 6), row.r)), False
    rows = [row for row in rows if row.mode == mode] or rows
    row = min(rows, key=lambda row: (round(abs(row.r - r), 6), row.r))
    return row, (row.dataset, row.mode) == (dataset, mode) and abs(row.r - r) < 1e-9


@dataclass(frozen=True)
class Ablation:
    """What a row of the paper's Table 5 leaves out (`--ablation`)."""

    paper_name: str
    reading: str  # what this code leaves out
    nets: int = 2  # 1: without a peer, the network divides and guesses for itself
    refine: bool = True  # co-refine the labels of the labeled set
    views: int = 2  # M in the paper: augmented views of an image in guesses, refinement and the mixed batch


_ALONE = "one network, which divides and guesses for itself"
_AS_GIVEN = "labels of the labeled set stay as given"
_ONE_VIEW = "one view of an image instead of two in guesses, refinement and the mixed batch"
ABLATIONS = {
    "none": Ablation("DivideMix", "nothing is left out"),
    "no_cotraining": Ablation("DivideMix w/o co-training", _ALONE, nets=1),
    "no_refinement": Ablation("DivideMix w/o label refinement", _AS_GIVEN, refine=False),
    "one_view": Ablation("DivideMix w/o augmentation", _ONE_VIEW, views=1),
    "divide_mixmatch": Ablation("Divide and MixMatch", f"{_ALONE}; {_AS_GIVEN}", nets=1, refine=False),
}


def paper_results(row: Recipe, method: str = "dividemix", ablation: str = "none") -> dict[str, float]:
    """What the paper reports of a row: best and last of the method; only best of cross-entropy (one network) and, where
    Table 5 has it, of an ablation."""
    if method == "ce":
        return {"best": row.ce_best}
    if ablation == "none":
        return {"best": row.best, "last": row.last}
    return {"best": row.ablations[ablation]} if ablation in row.ablations else {}


@dataclass(frozen=True)
class ImageRecipe:
    """A set of large images with real noise. method, images: defaults of the flags of `options.add_method` and
    `options.add_images`. results: the paper's, by their names in an epoch's record."""

    method: dict[str, Any]
    images: dict[str, Any]
    weight_decay: float
    resize: int  # short side of the image before the crop of images["image_size"]
    conf_penalty: bool  # in warm-up
    results: dict[str, float]
    results_with: dict[str, Any] = field(default_factory=dict)  # flags of these results that are not the defaults

    @property
    def setting(self) -> dict[str, Any]:
        """All flags that the paper's results were made with, except lambda_u, which has no effect here."""
        flags = METHOD_SETTING | {"unlabeled_loss": False, "conf_penalty": self.conf_penalty, "val_fraction": 0.0}
        flags |= self.method | self.images | self.results_with
        return {name: value for name, value in flags.items() if name != "lambda_u"}

    def resize_for(self, image_size: int) -> int:
        """`resize` for another crop size, in the same proportion."""
        return round(image_size * self.resize / self.images["image_size"])


_METHOD = {"batch_size": 32, "lr_drop": 40, "num_epochs": 80, "warm_up": 1}
_METHOD |= {"alpha": 0.5, "lambda_u": 0, "p_threshold": 0.5, "division": "global"}
CLOTHING1M = ImageRecipe(
    _METHOD | {"lr": 0.002},
    {"arch": "resnet50", "weights": "imagenet", "image_size": 224, "num_class": 14, "num_batches": 1000},
    weight_decay=1e-3,
    resize=256,
    conf_penalty=True,
    results={"test_acc": 74.76},
)
WEBVISION = ImageRecipe(
    _METHOD | {"lr": 0.01},
    {"arch": "inceptionresnetv2", "weights": "none", "image_size": 299, "num_class": 50},
    weight_decay=5e-4,
    resize=320,
    conf_penalty=False,
    results={"test_acc": 77.32, "test_acc_top5": 91.64, "imagenet_acc": 75.20, "imagenet_acc_top5": 90.84},
    results_with={"num_epochs": 100, "lr_drop": 50},
)


def in_paper(script: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """The paper's row for the data and noise of a run of `script`: its flags, and its results by name. Both are empty
    where the paper has no such row."""
    images = {"Train_clothing1M.py": CLOTHING1M, "Train_webvision.py": WEBVISION}.get(script)
    if images:
        return images.setting, images.results
    r = args.get("r")
    if not isinstance(r, int | float) or args.get("noise_definition") == "exclude_self":
        return {}, {}
    row, exact = nearest(args.get("dataset", ""), args.get("noise_mode", ""), r)
    method = args.get("method", "dividemix")
    return (setting(row, method), paper_results(row, method, args.get("ablation", "none"))) if exact else ({}, {})


# For `reproduce.py --table here`, minutes to hours on a CPU, without results in the paper: flags of Train_cifar.py,
# and the noise
SMALL_SETS = {
    "digits": (
        {"width": 16, "warm_up": 8, "num_epochs": 40},
        (("sym", 0.2), ("sym", 0.5), ("sym", 0.8), ("asym", 0.4)),
    ),
    "fashionmnist": ({"limit_train": 5000, "width": 16, "warm_up": 6, "num_epochs": 40}, (("sym", 0.5),)),
}


@dataclass(frozen=True)
class OwnRecipe:
    """Own images of one kind: the values of the paper's most similar set, from which `defaults.choose` sets flags."""

    name: str
    batch_size: int
    lr: float
    alpha: float
    weight_decay: float
    unlabeled_loss: bool  # False: unlabeled images are only mixed in
    warm_up_steps: int
    divided_steps: int  # after warm-up
    max_epochs: int


OWN_SMALL = OwnRecipe("as CIFAR-10", 64, 0.02, 4, CIFAR_WEIGHT_DECAY, True, 3_900, 70_000, 100)
OWN_PRETRAINED = OwnRecipe("as Clothing1M", 32, 0.002, 0.5, 1e-3, False, 320, 78_000, 80)
OWN_SCRATCH = OwnRecipe("as WebVision", 32, 0.01, 0.5, 5e-4, False, 1_030, 164_000, 80)


# The flags of the division and the unlabeled loss, for own images and for heads on features
OWN_DIVISION: dict[str, Any] = {"lambda_u": 0.0, "p_threshold": 0.5, "loss_window": 1, "division": "per_class"}


@dataclass(frozen=True)
class FeatureRecipe:
    """Heads on stored features."""

    name: str
    batch_size: int
    lr: float
    alpha: float
    weight_decay: float
    warm_up: int  # epochs
    num_epochs: int
    unlabeled_loss: bool = True


FEATURES = FeatureRecipe(
    "for heads on features, see benchmarks/RESULTS.md", 64, 0.02, 4, CIFAR_WEIGHT_DECAY, warm_up=3, num_epochs=12
)
