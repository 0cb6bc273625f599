"""``python -m weightxform info | verify | demo | bench``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# name: what it does, the extra that it needs. Each is a module with add_arguments(parser) and run(args) -> exit status.
COMMANDS: dict[str, tuple[str, str | None]] = {
    "info": ("versions, what was built, and which backend serves each op", None),
    "verify": ("check every op on this machine against float64", None),
    "demo": ("train on real digits beside pure PyTorch, with a report", "demo"),
    "bench": ("time every op beside PyTorch and a copy of the same bytes", "bench"),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m weightxform", description=sys.modules["weightxform"].__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    command = arguments[0] if arguments and arguments[0] in COMMANDS else None
    try:
        for name, (summary, _) in COMMANDS.items():
            subparser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
            if name == command:  # only this one is imported
                module = importlib.import_module(f"weightxform.{name}")
                module.add_arguments(subparser)
                subparser.set_defaults(run=module.run)
        args = parser.parse_args(arguments)
        return args.run(args)
    except ModuleNotFoundError as e:
        extra = COMMANDS[command][1] if command else None
        if extra is None or e.name is None or e.name.startswith("weightxform"):
            raise
        print(f"{command} needs {e.name}: pip install 'weightxform[{extra}]'", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
