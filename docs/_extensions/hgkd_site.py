"""Sphinx extension of this site: generated pages, references between docstrings, and nothing from the network.

Sphinx reads a folder that the extension fills (docs/_build/source), with docs/ as the place of its configuration.
"""

from __future__ import annotations

import builtins
import importlib
import re
from pathlib import Path
from typing import Any

import api_pages
import generated
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.util import logging

_ABSENT = object()
_FETCHED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"'](?:https?:)?//[^\"']+")


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("missing-reference", _resolve)
    app.connect("autodoc-process-signature", _without_factories)
    app.connect("build-finished", _check)
    for name in api_pages.undocumented():
        logging.getLogger(__name__).warning("public name without a docstring: %s", name)
    generated.assemble(Path(app.srcdir))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _without_factories(*event: Any) -> tuple[str | None, str | None] | None:
    """A signature whose defaults are Python: what a dataclass makes anew for each object is shown as ``...``."""
    signature, returned = event[-2:]
    return (signature.replace("<factory>", "..."), returned) if signature and "<factory>" in signature else None


def _resolve(app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.TextElement) -> nodes.Node | None:
    """A name of the code that Sphinx does not know: a link to its page, its bare name where it exists, else None (an error)."""
    if node.get("refdomain") != "py":
        return None
    target, module, cls = str(node["reftarget"]), node.get("py:module"), node.get("py:class")
    around = [scope for scope in (f"{module}.{cls}" if module and cls else None, module) if scope]
    for name in (*(f"{scope}.{target}" for scope in around), target, f"builtins.{target}"):
        found = _found(name)
        if found is _ABSENT:
            continue
        entry = api_pages.known().get(_defined_at(found, name))
        if entry is not None:
            domain = env.domains.python_domain
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", entry.path, node, content)
        return content
    # a type that a signature shows is no reference that somebody wrote, and may be of anywhere
    return content if not node.rawsource or _is_known_below(str(module), target) else None


def _found(name: str) -> object:
    """The object at a dotted path, or ``_ABSENT``."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            fields = getattr(value, "__dataclass_fields__", {})
            annotations = getattr(value, "__annotations__", {})
            if not hasattr(value, part):
                return value if part in fields or part in annotations else _ABSENT
            value = getattr(value, part)
        return value
    return _ABSENT


def _defined_at(value: object, name: str) -> str:
    module, qualified = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return f"{module}.{qualified}" if module and qualified else name


def _is_known_below(module: str, target: str) -> bool:
    """Whether a bare name means something in the modules below a package, as in the docstring of what it exports."""
    if "." in target or not module.startswith("hgkd"):
        return False
    homes = {entry.home.rpartition(".")[0] for entry in api_pages.known().values() if entry.path.startswith(f"{module}.")}
    return any(hasattr(importlib.import_module(home), target) for home in homes) or hasattr(builtins, target)


def _check(app: Sphinx, error: Exception | None) -> None:
    """The site is complete on a machine without network: no page fetches anything."""
    if error is not None or app.builder.name != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        found = _FETCHED.search(page.read_text(encoding="utf-8"))
        if found is not None:
            raise ExtensionError(f"{page.relative_to(app.outdir)} loads from the network: {found[0]}")
