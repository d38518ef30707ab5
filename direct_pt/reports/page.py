"""HTML pages out of the templates; they ask nothing of any server (templates/page.html)."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """A page of one of the templates; text is escaped."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["share"] = lambda value: "-" if value is None or value < 0 else f"{value:.3f}"
    return environment.get_template(template).render(**values)
