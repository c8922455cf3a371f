"""The comparison of two ways over seeds."""

from benchmarks import accuracy_pairs


def test_mean_difference_and_its_standard_error():
    """By hand: differences 1, 3, 2 have mean 2 and standard error 1 / sqrt(3)."""
    pairs = [
        {"fast": {"best_acc": 50 + d, "last10_acc": 40.0}, "reference": {"best_acc": 50.0, "last10_acc": 40 + e}}
        for d, e in zip((1, 3, 2), (-1, 1, 0), strict=True)
    ]
    best, last = accuracy_pairs.summary(pairs).splitlines()
    assert "+2.00 +- 0.58" in best and "n = 3" in best and "MORE THAN TWO STANDARD ERRORS" in best
    assert "+0.00 +- 0.58" in last and "MORE THAN" not in last
    assert "MORE THAN" not in accuracy_pairs.summary(pairs[:1])


def test_pairs_of_any_two_ways(tmp_path, monkeypatch, capsys):
    """Else a comparison runs the first way twice, under other noise in each, or prints the difference turned round."""
    runs = []

    def run(folder, flags):
        runs.append((folder.name, flags))
        return {"best_acc": 60.0 if "blind" in flags else 58.5, "last10_acc": 50.0}

    monkeypatch.setattr(accuracy_pairs, "run", run)
    flags = ["--seeds", "2", "--ways", "blind=--recipe blind", "paper=", "--out_dir", str(tmp_path)]
    accuracy_pairs.main([*flags, "--", "--r", "0.2"])
    assert [name for name, _ in runs] == ["blind_seed1", "paper_seed1", "blind_seed2", "paper_seed2"]
    common = ["--r", "0.2", "--noise_seed", "123", "--seed", "2"]
    assert runs[2][1] == [*common, "--recipe", "blind"] and runs[3][1] == common
    assert "blind 60.00, paper 58.50; difference +1.50" in capsys.readouterr().out
