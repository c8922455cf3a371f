"""What a run did, for people. `report` makes the pages and lists of a run and of several, from `issues` (which labels
look wrong), `figures`, `page` and `compare`; `clean_labels` writes corrected labels."""

from dividemix.report.compare import mean_and_deviation
from dividemix.report.report import of_finished

__all__ = [
    "mean_and_deviation",
    "of_finished",
]
