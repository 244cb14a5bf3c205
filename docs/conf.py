"""Sphinx: `make docs` builds docs/ into build/docs, with warnings as errors and no network."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from fastcl._version import __version__

project = "fastcl"
copyright = "the fastcl authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"fastcl {release}"
html_show_copyright = False
smartquotes = False  # they would change the quotes of code in prose
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True


def as_rst(app, what, name, obj, options, lines):
    """Our docstrings are plain text: paragraphs stay, what is indented is a formula or code."""
    if obj.__doc__ is None:  # torch.nn.Module's, of `forward`: the signature says it
        lines.clear()
        return
    out, literal = [], False
    for line in lines:
        indented = line.startswith("  ")
        if indented and not literal:
            out += ["", "::", ""]
        elif literal and line and not indented:
            out.append("")
        literal = indented or (literal and not line)
        out.append(line if indented else escaped(line))
    lines[:] = [*out, ""]


def escaped(line: str) -> str:
    """`code` in reST's double backticks; elsewhere *, | and _ are what they are."""
    parts = re.split(r"(`+[^`]+`+)", line)
    for i, part in enumerate(parts):
        code = part.strip("`")
        parts[i] = f"``{code}``" if i % 2 else re.sub(r"([\\*|_])", r"\\\1", part)
    return "".join(parts)


def setup(app):
    app.connect("autodoc-process-docstring", as_rst)
