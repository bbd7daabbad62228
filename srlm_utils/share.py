"""``srlm share``: a run as one folder of pages that opens in any browser, from disk or from a static server.

Nothing in it asks for another machine, runs a script or names the place where the run was made.
"""

import re
import shutil
from pathlib import Path

import pandas as pd

from srlm_utils import cards, pages, rendered, units
from srlm_utils.artefacts import new_folder, read_json, write_text
from srlm_utils.errors import DataError, MissingInputError, ParamError
from srlm_utils.params import Experiment, read_yaml
from srlm_utils.paths import shown
from srlm_utils.plan import list_steps
from srlm_utils.runner import status_rows

MARK = '<meta name="generator" content="srlm-kit">'  # in every page; tells a shared folder from any other
FRONT = ("agreement", "win_rates")  # figures of the first page
_SHOWN_FIGURES = 4  # of a step's manifest, beside its notebook
_TAGS = {
    "a",
    "b",
    "blockquote",
    "br",
    "caption",
    "code",
    "dd",
    "del",
    "details",
    "div",
    "dl",
    "dt",
    "em",
    "hr",
    "i",
    "img",
}
_TAGS |= {"kbd", "li", "ol", "p", "pre", "s", "small", "span", "strong", "sub", "summary", "sup", "u", "ul"}
_TAGS |= {"table", "tbody", "td", "tfoot", "th", "thead", "tr", *(f"h{i}" for i in range(1, 7))}
_ATTRIBUTES = {"*": ["class", "title", "colspan", "rowspan", "scope"], "a": ["href"], "img": ["alt", "width", "height"]}

# nbconvert's plainest notebook, with the code folded; figures stand in the page
_NOTEBOOK = """{%- extends 'basic/index.html.j2' -%}
{% block input %}<details><summary>code</summary>{{ super() }}</details>{% endblock input %}
{% block in_prompt %}{% endblock %}
{% block empty_in_prompt %}{% endblock %}
"""


def share(run: Path, out: Path) -> list[Path]:
    """Write the pages of `run` to the folder `out`, whole or not at all, and return the files.

    An earlier shared folder is replaced; any other folder that is not empty is refused.
    """
    notebooks = sorted((run / "notebooks").glob("*.ipynb"))
    if not notebooks:
        raise MissingInputError(f"{shown(run)}: no executed notebook here. Run the experiment first: srlm run ...")
    check_replaceable(out, "srlm share")
    with new_folder(out) as tmp:
        _write(run, notebooks, tmp)
    return sorted(p for p in out.rglob("*") if p.is_file())


def check_replaceable(out: Path, command: str) -> None:
    """Raise `DataError` if `out` holds anything but pages that `command` wrote before."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    index = out / "index.html"
    if not index.is_file() or MARK not in index.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise DataError(
            f"{shown(out)} exists and was not written by {command}. Name another folder, or move this one away."
        )


def _write(run: Path, notebooks: list[Path], to: Path) -> None:
    private = rendered.absolute_paths(*cards.recorded(run))

    def write(name: str, text: str) -> None:
        write_text(to / name, rendered.forget_machine(text, private))

    stats = {row["step"]: row for row in status_rows(run)[0]}
    order = step_order(run)
    notebooks = sorted(notebooks, key=lambda p: (order.get(p.stem, len(order)), p.stem))
    exporter, colours = _exporter()
    for i, path in enumerate(notebooks):
        nav = [("all notebooks", "../index.html")]
        nav += [(f"← {notebooks[i - 1].stem}", f"{notebooks[i - 1].stem}.html")] if i else []
        nav += [(f"{p.stem} →", f"{p.stem}.html") for p in notebooks[i + 1 : i + 2]]
        body = pages.Markup(notebook_body(path, exporter))
        page = pages.render("notebook.html.jinja", title=path.stem, nav=nav, notebook=body, colours=colours)
        write(f"notebooks/{path.stem}.html", page)
    report = run / "report" / "report.html"
    if report.is_file():
        back = '<nav><a href="index.html">all pages</a></nav>'
        write("report.html", re.sub(r"<body>", lambda m: m[0] + back, report.read_text(encoding="utf-8"), count=1))
    files = []
    for path, name, text in (
        (run / "report" / "metrics.csv", "metrics.csv", "every figure with its interval and n, a row each"),
        (run / "params.yaml", "params.yaml", "the parameters, for srlm run"),
        *((p, f"figures/{p.name}", "") for p in sorted((run / "report" / "figures").glob("*.csv"))),
    ):
        if path.is_file():
            write(name, path.read_text(encoding="utf-8"))
            files += [(name, text)] if text else []
    pictures = sorted((run / "report" / "figures").glob("*.png"))
    for path in pictures:
        shutil.copyfile(path, to / "figures" / path.name)
        files.append((f"figures/{path.name}", f"its numbers are in {path.stem}.csv beside it"))
    listed = []
    for model in cards.trained_models(run) if (run / "M0" / "model.json").is_file() else []:
        text = cards.from_run(run, model)
        write(f"models/{model}.md", text)
        nav = [("all pages", "../index.html"), ("as a file", f"{model}.md")]
        body = pages.Markup(clean(markdown(text.split("---\n", 2)[2])))  # without the metadata
        write(f"models/{model}.html", pages.render("notebook.html.jinja", title=model, nav=nav, notebook=body))
        listed.append((model, f"models/{model}.html", cards.front(run, model)))
    seeds = {m["params"].get("seed") for m in (read_json(p) for p in (run / "steps").glob("*.json"))}
    index = pages.render(
        "share_index.html.jinja",
        title=f"Self-rewarding run: {run.name}",
        lead=f"{len(stats)} finished steps, {units.duration(sum(r['seconds'] for r in stats.values()))} of work, "
        f"seed {', '.join(map(str, sorted(s for s in seeds if s is not None))) or 'unknown'}. "
        "Notebooks have their code folded; a click on it opens it.",
        report="report.html" if report.is_file() else "",
        figures=[(p.stem.replace("_", " "), pages.image(p)) for p in pictures if p.stem in FRONT],
        steps=_steps_table([p.stem for p in notebooks], stats),
        cards=listed,
        files=files,
        params=(run / "params.yaml").read_text(encoding="utf-8") if (run / "params.yaml").is_file() else "not recorded",
        foot="Made by srlm share: no script, no request to any other machine.",
    )
    write("index.html", index)


def _steps_table(names: list[str], stats: dict[str, dict]) -> pages.Markup:
    """One row per notebook: link, minutes, memory, the first figures of its manifest. Names are escaped here."""
    rows = []
    for name in names:
        s, text = stats.get(name), str(pages.escape(name))
        figures = list(s["figures"].items())[:_SHOWN_FIGURES] if s else []
        rows.append(
            {
                "notebook": f'<a href="notebooks/{text}.html">{text}</a>',
                "time": units.duration(s["seconds"]) if s else "not finished",
                "memory": f"{s['peak_memory_gb']:.1f} GB" if s else "",
                "figures": str(pages.escape(", ".join(f"{k} {v}" for k, v in figures))),
            }
        )
    return pages.Markup(pd.DataFrame(rows).to_html(border=0, index=False, escape=False))


def step_order(run: Path) -> dict[str, int]:
    """Place of each step in the loop; {} for a run whose parameters are gone or of another version."""
    try:
        steps = list_steps(Experiment(read_yaml(run / "params.yaml")))
    except ParamError:
        return {}
    return {step.name: i for i, step in enumerate(steps)}


def _exporter():
    """nbconvert's HTML exporter with folded code and our rule of what HTML may hold; and the code's colours."""
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    exporter = HTMLExporter(template_name="basic", sanitize_html=True, exclude_anchor_links=True)
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    exporter.raw_template = _NOTEBOOK
    exporter.register_filter("clean_html", clean)
    light, dark = (HtmlFormatter(style=style, nobackground=True) for style in ("default", "github-dark"))
    rule = "@media (prefers-color-scheme:{}){{{}}}"
    colours = [rule.format(n, f.get_style_defs(".highlight")) for n, f in (("light", light), ("dark", dark))]
    return exporter, pages.Markup("\n".join(colours))


def clean(html: str) -> str:
    """HTML with the tags and attributes of text, tables and pictures alone; links go to the web or stay in the page."""
    import bleach

    html = re.sub(r"(?is)<(style|script)\b.*?(</\1\s*>|\Z)", "", str(html))
    html = bleach.clean(html, tags=_TAGS, attributes=_ATTRIBUTES, protocols=["http", "https"], strip=True)
    return re.sub(r'<a\b[^>]*\bhref="(?!https?://|#)[^"]*"[^>]*>(.*?)</a>', r"\1", html, flags=re.DOTALL)


def markdown(text: str) -> str:
    """HTML of a card, without marks beside its headings."""
    from nbconvert.filters import markdown2html

    return re.sub(r'<a class="anchor-link"[^>]*>.*?</a>', "", markdown2html(text))


def notebook_body(path: Path, exporter) -> str:
    """An executed notebook as HTML, without the page around it. Figures are named by the heading they stand under."""
    import nbformat

    try:
        nb = nbformat.reads(rendered.tidy(path.read_text(encoding="utf-8")), as_version=4)
    except (ValueError, KeyError, TypeError, AttributeError) as e:  # half of one: its step was killed while it wrote
        raise DataError(
            f"{shown(path)}: not a whole notebook ({type(e).__name__}: {e}). Run its step again, or delete the file."
        ) from e
    heading = path.stem
    for cell in nb.cells:
        if cell.cell_type == "markdown" and (found := re.findall(r"(?m)^#+ (.+)$", cell.source)):
            heading = found[-1]
        cell.metadata["alt"] = heading
        for output in cell.get("outputs", []):
            output.get("metadata", {}).pop("text/html", None)  # "isolated" would make it a frame
    return exporter.from_notebook_node(nb)[0]
