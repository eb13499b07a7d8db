"""``fused-sam`` and ``python -m fused_sam``: the parser, and errors in one line."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path
from types import ModuleType

from fused_sam import __version__
from fused_sam.cli import doctor, landscape, sharpness, spectrum

COMMANDS: dict[str, ModuleType] = {
    "doctor": doctor,
    "sharpness": sharpness,
    "spectrum": spectrum,
    "landscape": landscape,
}

DESCRIPTION = "FusedSAM: what is installed and whether it works, and measurements of trained models."
EPILOG = """\
A TARGET is module:function, a function of yours without arguments. It returns (model, loss_fn, data):
a torch.nn.Module in the mode it is to be measured in, a function (output, y) -> mean loss of a batch, and
batches (x, y), a list or a DataLoader. Modules are looked for in the current folder first.

  %(prog)s                                   the doctor
  %(prog)s sharpness nets:sgd nets:sam --rho 0.02 0.05 0.1 --m 32
  %(prog)s spectrum nets:sgd nets:sam --plot spectrum.png
  %(prog)s landscape nets:sgd nets:sam --plot landscape.png --json landscape.json
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit status, or 2 for input that it refuses."""
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        return COMMANDS[options.command].run(options)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        # What this package raises is about its arguments. In code of the user's the traceback says more.
        if not _is_ours(error):
            raise
        print(f"{parser.prog} {options.command}: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; without a command the doctor runs."""
    prog = "fused-sam" if Path(sys.argv[0]).name.startswith("fused-sam") else "python -m fused_sam"
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION, epilog=EPILOG, formatter_class=layout)
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(command="doctor")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for name, module in COMMANDS.items():
        summary, _, details = (module.__doc__ or "").partition("\n\n")
        command = commands.add_parser(
            name, help=summary, description=f"{summary}\n\n{details}".strip(), formatter_class=layout
        )
        command.set_defaults(command=name)
        module.add_arguments(command)
    return parser


def _is_ours(error: BaseException) -> bool:
    frames = list(traceback.walk_tb(error.__traceback__))
    return frames[-1][0].f_globals.get("__name__", "").startswith("fused_sam.")
