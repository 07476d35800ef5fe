"""`python -m training.pocket codec|base|regression …`: makes what data/pocket holds."""

from __future__ import annotations

import importlib
import sys

from duplex.errors import EXIT_BAD_REQUEST, DuplexError

COMMANDS = {
    "codec": "training.pocket.codec_command",
    "base": "training.pocket.base_command",
    "regression": "training.pocket.regression",
}


def main(argv: list[str]) -> int:
    """Exit code of the command that `argv` names first; the rest is its arguments."""
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\n{' | '.join(COMMANDS)} --help tells more.")
        return 0
    if not argv or argv[0] not in COMMANDS:
        found = repr(argv[0]) if argv else "nothing"
        print(f"the first argument must be {' or '.join(COMMANDS)}, found {found}", file=sys.stderr)
        return EXIT_BAD_REQUEST
    try:
        return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
    except DuplexError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
