"""The page: one HTML file that needs no network. Its parts lie beside this file; Plotly's script comes with the package `plotly`."""

import html
import json
from importlib.resources import files
from string import Template

from experiments.report.read import Json


def render(report: Json, reload_seconds: float | None = None) -> str:
    """Return the page of a report; with `reload_seconds` it loads itself anew so often."""
    import plotly

    parts = files(__package__)
    refresh = f'<meta http-equiv="refresh" content="{reload_seconds:g}">' if reload_seconds is not None else ""
    return Template((parts / "page.html").read_text(encoding="utf-8")).substitute(
        refresh=refresh,
        title=html.escape(report["title"]),
        style=(parts / "report.css").read_text(encoding="utf-8"),
        script=(parts / "report.js").read_text(encoding="utf-8"),
        # No text of a run may end the script that it lies in.
        data=json.dumps(report, separators=(",", ":"), default=str, allow_nan=False).replace("<", "\\u003c"),
        plotly=(files(plotly) / "package_data" / "plotly.min.js").read_text(encoding="utf-8"),
    )


def data_of(page: str) -> Json:
    """Return the data that a page shows."""
    start = page.index('<script id="data" type="application/json">') + len('<script id="data" type="application/json">')
    found: Json = json.loads(page[start : page.index("</script>", start)])
    return found
