"""What follows a training run, and the tables of the paper; COMMAND --help lists the flags of each.

python -m dividemix report RUN
python -m dividemix predict RUN IMAGES
python -m dividemix export RUN model.pt2
python -m dividemix reproduce --list
"""

import importlib
import sys

from dividemix.run import Parser, command_line

COMMANDS = {  # name -> (module with its `main`, what Ctrl-C means for the user)
    "report": ("dividemix.report.report", "the same command makes the report"),
    "predict": ("dividemix.deploy.predict", "nothing is written"),
    "export": ("dividemix.deploy.export", "nothing is written"),
    "reproduce": ("reproduce", "the same command continues its runs"),
}

if __name__ == "__main__":
    parser = Parser(prog="python -m dividemix", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=COMMANDS, help="COMMAND --help lists its flags")
    module, stopped_means = COMMANDS[parser.parse_args(sys.argv[1:2]).command]
    del sys.argv[1]
    command_line(importlib.import_module(module).main, stopped_means)
