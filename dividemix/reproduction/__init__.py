"""The paper's tables, for reproduce.py: `rows` plans the runs, `jobs` starts them, `results` reads them."""

from dividemix.reproduction import jobs, results, rows
