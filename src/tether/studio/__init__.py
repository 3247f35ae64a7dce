"""The studio: a web page over a folder of runs, and the place where people say which answer is better.

Reads what runs leave behind, while they train too; writes nothing but answers and notes. Knows no model and no
training.
"""

from .app import create_app
from .server import StudioConfig, serve

__all__ = ["StudioConfig", "create_app", "serve"]
