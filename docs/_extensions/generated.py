"""The pages that are made when the site is built: reference from the code, and files that lie elsewhere in the repository."""

from __future__ import annotations

from pathlib import Path

import api_pages
import commands
import config_keys
import outside_pages

ROOT = Path(__file__).parents[2]
_NO_PAGES = ("_build", "_extensions", "conf.py")


def texts(root: Path = ROOT) -> dict[str, str]:
    """File below docs/ -> its text, of all generated pages."""
    found = {f"reference/api/{name}.rst": text for name, text in api_pages.texts().items()}
    found["reference/config_keys.md"] = config_keys.page()
    found["reference/commands.md"] = commands.page()
    return found | outside_pages.texts(root)


def assemble(target: Path, root: Path = ROOT) -> dict[str, bytes]:
    """Fill a folder with what Sphinx reads: the pages of docs/ with their links led within the site, and the generated ones.

    A notebook named as the page of Markdown beside it becomes ``NAME_notebook``: two sources cannot make one page. A file that
    is as it should be is left alone, so that Sphinx reads again only what has changed.

    Returns:
        File below ``target`` -> content.
    """
    docs = root / "docs"
    files = {name: text.encode() for name, text in texts(root).items()}
    for file in sorted(docs.rglob("*")):
        name = file.relative_to(docs)
        if not file.is_file() or name.parts[0] in _NO_PAGES or "__pycache__" in name.parts:
            continue
        if file.suffix == ".md":
            files[name.as_posix()] = outside_pages.relinked(file.read_text(encoding="utf-8"), file, root).encode()
        elif outside_pages.is_twin(file):
            files[name.with_name(outside_pages.notebook_page(file)).as_posix()] = file.read_bytes()
        else:
            files[name.as_posix()] = file.read_bytes()
    for old in [file for file in target.rglob("*") if file.is_file()]:
        if old.relative_to(target).as_posix() not in files:
            old.unlink()
    for place, content in files.items():
        file = target / place
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_bytes() != content:
            file.write_bytes(content)
    return files
