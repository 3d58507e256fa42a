"""Where bundled recipes and assets are: beside the package in a checkout, inside it in a wheel."""

from pathlib import Path


def folder(name: str) -> Path:
    """The folder of bundled `name` ("recipes" or "assets"); it may be absent in a damaged install."""
    here = Path(__file__).resolve().parent
    inside = here / name
    return inside if inside.is_dir() else here.parent / name
