"""The server's addresses: pages, runs, notes, episodes, labels, exports; each a few lines around what knows how.

`docs/studio.md` lists them for users of the interface.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from . import episode_routes, export_routes, label_routes, note_routes, run_routes
from .replies import add_handlers
from .runs import Catalogue
from .security import Address, Guard

STATIC = Path(__file__).parent / "static"
PAGES = ("/", "/run", "/compare", "/episodes", "/episode", "/labels", "/label")


def create_app(root: str | Path, address: Address | None = None, token: str | None = None) -> ASGIApp:
    """The studio over a folder of runs.

    Args:
        root: the folder; also a run by itself.
        address: where it will listen, which requests must name.
        token: what requests must carry; None where only this machine can ask.
    """
    return Guard(open_app(root), address or Address(), token)


def open_app(root: str | Path) -> FastAPI:
    """The same without its guard."""
    app = FastAPI(title="Tether studio", docs_url=None, redoc_url=None, openapi_url="/api/openapi.json")
    app.state.catalogue = Catalogue(Path(root).resolve())
    add_handlers(app)
    for routes in (run_routes, note_routes, episode_routes, label_routes, export_routes):
        app.include_router(routes.router)
    for page in PAGES:
        app.add_api_route(page, _index, include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC))
    return app


def _index() -> Response:
    return FileResponse(STATIC / "index.html")
