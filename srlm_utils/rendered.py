"""Executed notebooks made fit to be read elsewhere: on GitHub, in a shared folder, on another machine."""

import base64
import io
import json
import re
import sys
import tempfile
from pathlib import Path

from PIL import Image

from srlm_utils.paths import PROJ_ROOT
from srlm_utils.printable import printable_output, without_secrets

MAX_TEXT = 50_000  # characters of one output; GitHub shows no notebook of several MB
_BAR = re.compile(r"^.*\d+%\|.*\|.*\[.*\]\s*$")  # tqdm's, whatever stands before it
_CURSOR = re.compile(r"\x1b\[\d*[A-HJKSTfsu]")
_WIDGET = "application/vnd.jupyter.widget-view+json"
_CELL = re.compile(  # where a kernel keeps a cell's source
    rf"(?:{re.escape(tempfile.gettempdir())}|/tmp|(?:/private)?/var)(?:/[\w.-]{{1,100}}){{0,8}}/ipykernel_\d+/"
)


def tidy(notebook: str) -> str:
    """An executed notebook that needs no widget, holds no debris of progress bars and no machine's paths.

    Figures get a palette of 256 colours, as those of the report (`plots.save`); texts of more than `MAX_TEXT`
    characters lose their middle.
    """
    nb = json.loads(notebook)
    nb["metadata"].pop("widgets", None)
    for cell in nb["cells"]:
        if "outputs" in cell:
            cell["outputs"] = printable_output([o for o in _merged(cell["outputs"]) if _shown(o)])
    return forget_machine(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", quote=_in_json)


def _merged(outputs: list[dict]) -> list[dict]:
    """Outputs with what was printed piece by piece in one piece: a bar may be redrawn in many."""
    out: list[dict] = []
    for o in outputs:
        if o["output_type"] == "stream" and out and out[-1].get("name") == o["name"]:
            out[-1]["text"] = _text(out[-1]["text"]) + _text(o["text"])
        else:
            out.append(o)
    return out


def _shown(output: dict) -> bool:
    """Mend one output in place; False where nothing is left of it."""
    if output["output_type"] == "stream":
        output["text"] = _cut(_without_bars(_text(output["text"])))
        return bool(output["text"].strip())
    data = output.get("data", {})
    if _WIDGET in data:  # what stands beside it is its name
        return False
    for kind in ("text/plain", "text/html", "text/markdown"):
        if kind in data and len(_text(data[kind])) > MAX_TEXT:
            if kind == "text/html" and "text/plain" in data:
                del data[kind]  # half a table is none
            else:
                data[kind] = _cut(_text(data[kind]))
    if png := data.get("image/png"):
        data["image/png"] = _smaller(_text(png))
    return True


def _text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def _without_bars(text: str) -> str:
    """Text without progress bars, nor the lines that one was drawn over. Other lines keep their carriage returns, which
    `printable` makes visible: what a model wrote cannot hide what stands before it."""
    lines = []
    for line in text.split("\n"):
        drawn = [_CURSOR.sub("", piece) for piece in line.rstrip("\r").split("\r")]
        if any(_BAR.match(piece) for piece in drawn):
            drawn = [piece for piece in drawn if piece and not _BAR.match(piece)][-1:]
        if drawn:
            lines.append("\r".join(drawn))
    return "\n".join(lines)


def _cut(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2 - 50  # what says so counts too
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


def palette(image: Image.Image) -> Image.Image:
    """A figure in 256 colours, a third of its file. Small marks keep theirs: a median cut may drop them."""
    return image.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE)


def _smaller(png: str) -> str:
    small = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        if image.mode == "P":
            return png
        palette(image).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def forget_machine(text: str, private: tuple[str, ...] = (), quote=str) -> str:
    """`text` without what belongs to this machine alone.

    Paths below the repository become relative; the environment's folder and the home folder get short names; of the
    `private` paths the last part stays; secrets of the environment become the names of their variables. `quote` is how
    the text writes a string.
    """
    text = _CELL.sub("", without_secrets(text, quote))
    places = [(f"{PROJ_ROOT}/", ""), (sys.prefix, ".venv"), (sys.base_prefix, "python")]
    places += [(p, f".../{Path(p).name}") for p in sorted(private, key=len, reverse=True)]
    places += [(str(PROJ_ROOT), "."), (str(Path.home()), "~")]
    for place, name in places:
        if len(place) > 1:  # never "/"
            text = re.sub(rf"{re.escape(quote(place))}(?![\w-])" if name != "" else re.escape(quote(place)), name, text)
    return text


def absolute_paths(*values) -> tuple[str, ...]:
    """Absolute paths among parameters, however they are nested: `private` of `forget_machine`."""
    found: list[str] = []
    for value in values:
        if isinstance(value, dict):
            found += absolute_paths(*value.values())
        elif isinstance(value, list):
            found += absolute_paths(*value)
        elif isinstance(value, str):  # a colon separates a judge from its mode
            found += [part for part in value.split(":") if re.match(r"/[^/]", part)]
    return tuple(found)
