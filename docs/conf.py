"""How sphinx builds the pages: ``make docs``.

The source folder is the repository, so that pages beside code, such as examples/paper/README.md, are pages of the
site with their own pictures, and every relative link works on a code host too. Nothing is fetched, when pages are
built or when they are read: formulas become MathML.
"""

from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name, walk_packages
from types import FunctionType
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from sphinx.application import Sphinx

import lightning_qk

project = "lightning-qk"
author = "The lightning-qk developers"
copyright = author
version = release = lightning_qk.__version__

root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "docs/how-to/*.md",
    "docs/api/*.md",
    "examples/**/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = ["docs/_build/**", "**/.cache/**", ".venv/**", "runs/**"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
add_module_names = False

# A name of ours that a docstring refers to has to exist; those of torch and Lightning are not looked up.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!lightning_qk).*")]

html_theme = "furo"
html_title = "lightning-qk"
html_math_renderer = "mathml"
html_css_files = ["site.css"]
html_static_path = ["static"]
html_copy_source = False
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"

_HOOKS = {name for base in (Callback, LightningModule, LightningDataModule) for name in dir(base)}


def _skip(app: Sphinx, kind: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what nobody calls: Lightning's hooks, and fields that the text on their class explains."""
    hook = name in _HOOKS and callable(value)
    field = type(value).__name__ == "_tuplegetter"
    return True if hook or field else None


def _exists(app: Sphinx, env: Any, node: Any, text: nodes.Element) -> nodes.Element | None:
    """A name that exists but has no place in the reference stays plain text; others are warned about."""
    target = str(node.get("reftarget", ""))
    if not target.startswith("lightning_qk."):
        return None
    try:
        resolve_name(target)
    except (ImportError, AttributeError):
        return None
    return text


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>\n')
    raise nodes.SkipNode


def _front_door(app: Sphinx, error: Exception | None) -> None:
    """The first page, where people look for it."""
    if error is None and app.builder.name == "html":
        go = f'<meta http-equiv="refresh" content="0; url={root_doc}.html">'
        Path(app.outdir, "index.html").write_text(f"<!doctype html>{go}\n", encoding="utf-8")


def _new_names(app: Sphinx) -> None:
    """Pages show arguments by their new names; the old ones are in signatures too, for jsonargparse.

    Before autodoc reads anything: it takes defaults from the source, whose arguments have to be those of a
    signature, and only then asks for changes.
    """
    for module in walk_packages(lightning_qk.__path__, "lightning_qk."):
        try:
            found_here = list(vars(import_module(module.name)).values())
        except ModuleNotFoundError:  # what an extra brings, such as triton
            continue
        for found in found_here:
            function = vars(found).get("__init__") if isinstance(found, type) else found
            while isinstance(function, FunctionType) and hasattr(function, "__wrapped__"):
                vars(function).pop("__signature__", None)
                function = function.__wrapped__


def setup(app: Sphinx) -> dict[str, bool]:
    """What sphinx calls."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("builder-inited", _new_names)
    app.connect("autodoc-skip-member", _skip)
    app.connect("missing-reference", _exists)
    app.connect("build-finished", _front_door)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
