"""The report of a run: `report` makes its page and lists, of one run and of several, from `issues` (which labels look
wrong), `figures`, `page` and `compare` (several runs); `clean_labels` writes corrected labels."""

from dividemix.report.compare import mean_and_deviation
from dividemix.report.report import of_finished
