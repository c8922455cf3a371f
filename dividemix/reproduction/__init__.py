"""The paper's tables, by reproduce.py: `rows` says which runs they need, `jobs` starts these, and `results` reads
them."""

from dividemix.reproduction import jobs, results, rows

__all__ = [
    "jobs",
    "results",
    "rows",
]
