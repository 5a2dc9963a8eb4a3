"""Pages: one file of HTML each, which needs nothing else and lets nothing in."""

from typing import Any


def render_page(package: str, **content: Any) -> str:
    """Render the template page.html of a package, which may use the style sheet and the macros of this one."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), PackageLoader("odconv.app.pages", "")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(**content)
