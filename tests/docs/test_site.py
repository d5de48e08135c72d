"""The site without Sphinx: links, pictures and indexes of its pages, and its generated pages cover what they are about."""

import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_extensions"))

import api_pages  # noqa: E402
import commands  # noqa: E402
import config_keys  # noqa: E402
import docstrings  # noqa: E402
import generated  # noqa: E402
import outside_pages  # noqa: E402

LINK = re.compile(r"!?\[(?:[^\[\]`]|`[^`\n]*`|\[[^\[\]]*\])*\]\(([^()\s]+)\)")
OUTSIDE = [ROOT / "README.md", *(ROOT / file for file in outside_pages.OUTSIDE)]


def pages() -> list[Path]:
    """The pages that are written by hand."""
    return sorted(page for page in DOCS.rglob("*.md") if page.relative_to(DOCS).parts[0] != "_build")


@cache
def made() -> dict[Path, str]:
    """The pages that are not in Git, where they would lie."""
    return {DOCS / name: text for name, text in generated.texts().items()}


def prose(text: str) -> str:
    """A page without its blocks of code, and without code in its lines."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^(```|~~~).*?^\1[ \t]*$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """What links to a page may name after #: its headings as Git hosts and the site name them."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.MULTILINE):
        words = re.sub(r"\[([^\[\]]*)\]\([^()]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", words.lower().strip()).replace(" ", "-")
        seen = found.get(name, 0)
        found[name] = seen + 1
        names.add(f"{name}-{seen}" if seen else name)
    return names


def dead_links(page: Path, text: str) -> list[str]:
    dead = []
    for target in LINK.findall(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        there = text if place == page else made().get(place)
        if there is None and not place.exists():
            dead.append(target)
        elif anchor:
            if there is None and place.is_file():
                there = place.read_text(encoding="utf-8")
            if anchor not in anchors(there or ""):
                dead.append(target)
    return dead


@pytest.mark.parametrize("page", [*pages(), *OUTSIDE], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures_lead_somewhere(page):
    assert dead_links(page, page.read_text(encoding="utf-8")) == []


def test_links_of_generated_pages_lead_somewhere():
    dead = {page.name: found for page, text in made().items() if page.suffix == ".md" and (found := dead_links(page, text))}
    assert dead == {}


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n[a](absent.md) [b](#a-page) [c](#elsewhere) [d `x`](page.md#a-page)\n```\n[e](in_code.md)\n```\n"
    )
    assert dead_links(page, page.read_text()) == ["absent.md", "#elsewhere"]


@pytest.mark.parametrize("part", ["tutorials", "howto", "reference", "background"])
def test_each_page_is_described_in_the_index_of_its_part(part):
    text = (DOCS / part / "index.md").read_text(encoding="utf-8")
    linked = {(DOCS / part / target.partition("#")[0]).resolve() for target in LINK.findall(text)}
    there = {page for page in pages() if page.parent == DOCS / part and page.name != "index.md"}
    there |= {
        page for page in made() if page.parent == DOCS / part and page.name not in map(Path, outside_pages.OUTSIDE.values())
    }
    shown = {(ROOT / file).resolve(): DOCS / page for file, page in outside_pages.OUTSIDE.items()}
    assert there - {shown.get(page, page) for page in linked} == set()
    (tree,) = re.findall(r"```\{toctree\}\n(.*?)```", text, flags=re.DOTALL)
    assert "*" in tree.splitlines(), "a page that is added is in the tree without a change of the index"


def test_the_four_parts_are_reached_from_the_landing_page():
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    assert {f"{part}/index.md" for part in ("tutorials", "howto", "reference", "background")} <= set(LINK.findall(text))


def test_every_public_name_has_a_docstring():
    assert api_pages.undocumented() == []


def test_every_public_package_has_a_page():
    packages = {f"hgkd.{file.parent.name}" for file in (ROOT / "hgkd").glob("*/__init__.py")} - {"hgkd.cli"}
    assert packages <= set(api_pages.pages())
    assert all(DOCS / f"reference/api/{page}.rst" in made() for page in api_pages.pages())


def test_a_name_without_docstring_is_found(monkeypatch):
    import hgkd.sparse

    def bare():
        pass

    monkeypatch.setattr(hgkd.sparse, "bare", bare, raising=False)
    monkeypatch.setattr(hgkd.sparse, "__all__", [*hgkd.sparse.__all__, "bare"])
    api_pages.entries_of.cache_clear()
    try:
        assert any(name.endswith("bare") for name in api_pages.undocumented())
    finally:
        monkeypatch.undo()
        api_pages.entries_of.cache_clear()


NO_KEYS = {"writer of whole models"}  # an export asks for these by the target's name


def test_every_registered_part_is_on_the_page_of_keys():
    shown = {part for kind in config_keys.KINDS for part in config_keys.parts_of(kind).values()}
    there = {part for name, parts in config_keys.registered().items() if name not in NO_KEYS for part in parts.values()}
    assert len(there) > 50
    assert there == shown


def test_every_key_of_every_part_has_a_meaning():
    parts = [(kind.given, part) for kind in config_keys.KINDS for part in config_keys.parts_of(kind).values()]
    parts += [(frozenset(), function) for _, function in config_keys.TRANSFORMS]
    keys = [(part.__name__, key) for given, part in parts for key in config_keys.keys_of(part, given)]
    assert len(keys) > 200
    assert [f"{part}.{key.name}" for part, key in keys if not key.meaning] == []
    assert [part.__name__ for _, part in parts if not docstrings.summary(part)] == []


def test_every_top_key_has_a_meaning():
    from hgkd.config import checking

    assert set(config_keys.TOP_KEYS) >= checking._RUNNER_KEYS
    assert all(f"| `{key}` |" in made()[DOCS / "reference/config_keys.md"] for key in checking._TOP_KEYS)


def test_every_option_of_every_command_is_on_its_page():
    text = made()[DOCS / "reference/commands.md"]
    for name, parser in commands.parsers().items():
        (section,) = re.findall(rf"^##+ hgkd {re.escape(name)}\n(.*?)(?=^## |^### |\Z)", text, flags=re.M | re.S)
        for action in commands.options_of(parser):
            assert action.help or action.choices, f"hgkd {name}: {action.dest} has no help"
            name = (action.option_strings or [action.metavar or action.dest])[0]
            assert f"`{name.replace('_', '-')}" in section.replace("_", "-").replace("`[", "`")


def test_arguments_are_read_from_docstrings():
    text = """Head.

    Args:
        a, b: first line
            and its second.
        *rest: others.

    Attributes:
        c: not an argument.
    """
    assert docstrings.entries(text) == {"a": "first line and its second.", "b": "first line and its second.", "rest": "others."}
    assert docstrings.markdown("see :class:`~hgkd.a.B` and ``c*d``, e*f") == r"see `B` and `c*d`, e\*f"


def test_links_out_of_the_folder_lead_to_pages_of_the_site():
    page = DOCS / "howto/data.md"
    text = "[r](../../configs/README.md#short-options) [c](../../hgkd/masking.py) [d](export.md) [e](https://e.org)\n"
    assert outside_pages.relinked(text, page, ROOT) == (
        "[r](../reference/recipes.md#short-options) c [d](export.md) [e](https://e.org)\n"
    )


def test_the_folder_that_sphinx_reads(tmp_path):
    root = tmp_path / "repository"
    for name in ("a.md", "a.ipynb", "pictures/p.png", "_build/old.md", "_extensions/x.py", "conf.py"):
        file = root / "docs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("text")
    for name in outside_pages.OUTSIDE:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("# Outside\n")
    target = tmp_path / "source"
    (target / "gone.md").parent.mkdir()
    (target / "gone.md").write_text("a page that is no more")
    files = generated.assemble(target, root)
    assert {file.relative_to(target).as_posix() for file in target.rglob("*") if file.is_file()} == set(files)
    assert {"a.md", "a_notebook.ipynb", "pictures/p.png", "reference/commands.md", "reference/recipes.md"} <= set(files)
    assert not {"a.ipynb", "conf.py", "gone.md", "_build/old.md", "_extensions/x.py"} & set(files)
