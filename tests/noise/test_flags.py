"""The noise flags: which go together, and what is filled in."""

import pytest

import Train_cifar

HUMAN = ["--noise_mode", "human", "--noise_key", "worse_label"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (HUMAN[:2], "needs --noise_key: choose one of worse_label, aggre_label, random_label1, random_label2, random_"),
        ([*HUMAN[:2], "--dataset", "cifar100"], "--noise_mode human needs --noise_key: choose one of noisy_label ("),
        (HUMAN[2:], "--noise_key worse_label: only with --noise_mode human, one of worse_label, aggre_label"),
        ([*HUMAN[:2], "--noise_key", "noisy_coarse_label"], "invalid choice: 'noisy_coarse_label' (choose from"),
        ([*HUMAN[:2], "--noise_key", "clean_label"], "invalid choice: 'clean_label'"),
        ([*HUMAN, "--r", "0.5"], "--r 0.5: --noise_mode human has the rate of its labels"),
        ([*HUMAN, "--noise_definition", "with_self"], "--noise_definition with_self: only with --noise_mode sym"),
        (["--noise_mode", "asym", "--noise_definition", "with_self"], "only with --noise_mode sym"),
        (["--noise_mode", "idn", "--noise_definition", "exclude_self"], "only with --noise_mode sym"),
        (["--noise_definition", "other"], "invalid choice: 'other'"),
        (["--noise_file", "a/CIFAR-10_human.pt"], "a .pt file needs --noise_mode human and --noise_key"),
    ],
)
def test_flags_that_have_no_meaning_together_are_refused(capsys, flags, words):
    """Else a flag is taken and has no effect: its user believes in a noise that is not there."""
    with pytest.raises(SystemExit) as ended:
        Train_cifar.parse_args(flags)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert error.startswith("Train_cifar.py: error: ") and words in error


@pytest.mark.parametrize(
    ("flags", "r", "definition"),
    [
        ([], 0.5, "with_self"),
        (["--r", "0"], 0, "with_self"),
        (["--noise_definition", "exclude_self"], 0.5, "exclude_self"),
        (["--noise_mode", "asym"], 0.5, None),
        (["--noise_mode", "idn", "--r", "0.4"], 0.4, None),
        (HUMAN, None, None),
    ],
)
def test_what_is_not_given_is_filled_in(flags, r, definition):
    """Else args.json says of a run what it did not do, or the default rate of 50 % is another."""
    args = Train_cifar.parse_args(flags)
    assert (args.r, args.noise_definition) == (r, definition)
    assert args.noise_seed == 123 and args.noise_file is None
