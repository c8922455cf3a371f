"""The paper's results as data."""

from helpers.nets import ABLATED, TABLE5

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
