"""kernels: what a recipe may import from `kernels`, for people and agents who rewrite one."""

from __future__ import annotations

import json

import click

from core import importable

EPILOG = """\b
Examples:
  autoresearch kernels
  autoresearch kernels > kernels.md
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="For programs: JSON on stdout, errors too.")
def kernels(as_json: bool) -> None:
    """What a train.py of `cuda` or `rtx` may import from `kernels`.

    Shapes and equations of the fused functions, and how to write each half of a layer, or the loss, out in plain
    PyTorch in order to change what is inside. Markdown; in this repository it is kernels/README.md.
    """
    text = importable.text()
    click.echo(json.dumps({"kernels": text}) if as_json else text, nl=as_json)
