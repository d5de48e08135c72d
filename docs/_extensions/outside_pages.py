"""Files of the repository outside docs/ that are pages of the site, and links to the others.

The pages of docs/ link to them by relative paths, so that they also lead somewhere where Git shows the pages.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

#: File of the repository -> page of the site that shows it.
OUTSIDE = {
    "configs/README.md": "reference/recipes.md",
    "downstream/README.md": "reference/downstream_recipes.md",
    "downstream/classification/README.md": "reference/classification_recipes.md",
    "CHANGELOG.md": "reference/changelog.md",
    "CONTRIBUTING.md": "background/contributing.md",
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]`]|`[^`\n]*`|\[[^\[\]]*\])*)\]\(([^()\s#]*)(#[^()\s]*)?\)")
_FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)


def texts(root: Path) -> dict[str, str]:
    """Page -> Markdown, of the outside files, with their links as seen from the page."""
    return {
        page: relinked((root / file).read_text(encoding="utf-8"), root / file, root, page) for file, page in OUTSIDE.items()
    }


def relinked(text: str, file: Path, root: Path, page: str | None = None) -> str:
    """A Markdown text whose relative links lead within the site.

    Args:
        text: what ``file`` holds.
        file: that the links are relative to.
        root: of the repository.
        page: where the text is shown, relative to docs/; None: where it lies.

    Returns:
        The text. A link to an outside file that is a page leads to the page; one to any other file outside docs/ is left as
        its words, because the site does not hold it.
    """
    docs = root / "docs"
    here = file.parent if page is None else (docs / page).parent

    def changed(link: re.Match[str]) -> str:
        mark, words, target, anchor = link[1], link[2], link[3], link[4] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return link[0]
        place = Path(os.path.normpath(file.parent / target))
        if not place.exists() and docs not in place.parents:
            return link[0]  # dead: the build says so
        inside = OUTSIDE.get(place.relative_to(root).as_posix()) if root in place.parents else None
        if inside is not None:
            place = docs / inside
        elif docs not in place.parents:
            return words if place != docs and not mark else link[0]
        elif is_twin(place):
            place = place.with_name(notebook_page(place))
        return f"{mark}[{words}]({os.path.relpath(place, here)}{anchor})"

    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(changed, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(changed, text[end:])])


def is_twin(file: Path) -> bool:
    """Whether a file is a notebook named as the page of Markdown beside it, of which the site can have one only."""
    return file.suffix == ".ipynb" and file.with_suffix(".md").exists()


def notebook_page(file: Path) -> str:
    """Name of the page that shows such a notebook."""
    return f"{file.stem}_notebook.ipynb"
