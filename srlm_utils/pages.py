"""HTML pages that open anywhere: one look in light and dark, no script, no request, everything escaped."""

import base64
import re
from functools import lru_cache
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from srlm_utils.paths import PACKAGE

__all__ = ["Markup", "escape", "image", "inline", "render", "table"]


@lru_cache(maxsize=1)
def _templates() -> Environment:
    return Environment(autoescape=True, loader=FileSystemLoader(PACKAGE))


def render(template: str, **values) -> str:
    """A page from a template beside this file; it extends page.html.jinja, which takes `title` and `nav`."""
    return _templates().get_template(template).render(**values)


def image(png: Path) -> str:
    """A PNG as a data URI: the page needs no second file."""
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"


def inline(text: str) -> Markup:
    """An escaped text, what stands between backticks in it as code: notebooks show the same text as Markdown."""
    return Markup(re.sub(r"`([^`\n]+)`", r"<code>\1</code>", str(escape(text))))


def table(frame: pd.DataFrame, **how) -> Markup:
    """An escaped HTML table."""
    return Markup(frame.to_html(border=0, escape=True, **how))
