"""Renders a page as one self-contained HTML file, in which every value is escaped."""

from collections.abc import Callable, Mapping
import pathlib

import jinja2

from checkpoints_io.unseen import visible


def rendered(name: str, filters: Mapping[str, Callable[..., object]], **given: object) -> str:
    """Renders a template of this folder with these values; control characters become visible."""
    here = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
    written = lambda x: visible(x) if type(x) is str else f"{x:,}" if type(x) is int else x
    environment = jinja2.Environment(
        loader=here, autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=written
    )
    environment.filters |= filters
    return environment.get_template(name).render(given)


def is_page(content: bytes | None) -> bool:
    """Whether a page may overwrite a file: there is none, or it is a page."""
    return content is None or content.lstrip()[:14].lower() == b"<!doctype html"
