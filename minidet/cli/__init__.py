"""The command: every subcommand in a file of its own, which parses, calls and prints."""

from minidet.cli.command import main

__all__ = ["main"]
