"""`python -m tether` is the command line."""

from tether.cli import script

script()
