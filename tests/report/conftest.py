import pytest
from helpers.run_folder import simple_rule


@pytest.fixture(autouse=True)
def rule(monkeypatch):
    """Which labels are listed is `run.label_quality`'s to say and to test: the report's tests take a simple rule. Their
    runs, of made-up accuracies, all have a usable list."""
    monkeypatch.setattr("dividemix.run.scoring.label_quality", simple_rule)
    monkeypatch.setattr("dividemix.run.scoring._LITTLE_SKILL", -1.0)
