"""The command line: one module per command, with ``add_arguments(parser)``, ``run(options)`` and its help as docstring.

A command imports what it needs in ``run``: `doctor` works with torch alone.
"""
