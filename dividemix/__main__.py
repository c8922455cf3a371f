"""DivideMix: train on noisy labels, list the labels that look wrong, use the trained networks.

  train cifar|clothing1m|webvision|folder   train, as the scripts Train_*.py
  issues DATA                               which labels of your own images look wrong: a list and a report
  predict RUN DIR                           classify new images
  export RUN FILE.pt2                       one file that needs only PyTorch
  report RUN                                report.html of finished runs; corrected labels
  reproduce                                 the paper's tables

examples:
  dividemix issues ./flowers
  dividemix train cifar --data_path ./cifar-10 --download --r 0.5

COMMAND --help lists the flags of a command."""

import importlib
import sys

SCRIPTS = {"cifar": "Train_cifar", "clothing1m": "Train_clothing1M", "webvision": "Train_webvision"}
SCRIPTS |= {"folder": "Train_folder"}
CONTINUES, NOTHING = "the same command continues after the last finished epoch", "nothing is written"
COMMANDS = {  # name -> (module with its `main`, what Ctrl-C means for the user)
    **{f"train {name}": (script, CONTINUES) for name, script in SCRIPTS.items()},
    "issues": ("dividemix.api", CONTINUES),
    "predict": ("dividemix.deploy.predict", NOTHING),
    "export": ("dividemix.deploy.export", NOTHING),
    "report": ("dividemix.report.report", "the same command makes the report"),
    "reproduce": ("reproduce", "the same command continues its runs"),
}


def main() -> None:
    program = "python -m dividemix" if sys.argv[0].endswith("__main__.py") else "dividemix"
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & {*words[: 1 + (words[0] == "train")]}:
        return print(f"usage: {program} COMMAND ...\n\n{__doc__}".replace("\n  dividemix ", f"\n  {program} "))
    name = " ".join(words[: 1 + (words[0] == "train")])
    if name not in COMMANDS:
        names = [f"train {'|'.join(SCRIPTS)}", *(name for name in COMMANDS if not name.startswith("train "))]
        print(f"{program}: error: '{name}': expected one of {', '.join(names)}", file=sys.stderr)
        sys.exit(2)
    from dividemix.run import command_line  # imports torch: --help need not wait for it

    module, stopped_means = COMMANDS[name]
    sys.argv = [f"{program} {name}", *words[len(name.split()) :]]
    command_line(importlib.import_module(module).main, stopped_means)


if __name__ == "__main__":
    main()
