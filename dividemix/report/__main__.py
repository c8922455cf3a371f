"""The command `python -m dividemix.report`."""

from dividemix.report.report import main
from dividemix.run import command_line

if __name__ == "__main__":
    command_line(main)
