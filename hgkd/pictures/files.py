"""Image files in, pictures and their page out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin
from torch.utils.data import Dataset

from hgkd.data.folders import IMAGE_EXTENSIONS, printable
from hgkd.data.images import find_images, read_crops
from hgkd.errors import DataError, MissingFileError
from hgkd.pictures.columns import Columns, picture_grid
from hgkd.pictures.report import Picture, Section, write_report
from hgkd.writing import written_whole

PAGE = "pictures.html"  # not report.html, which a demo or comparison may have written into the folder
_CAPTION = "Description"  # PNG's own keyword for it


def find_files(sources: Sequence[str | os.PathLike[str]], limit: int | None = None, arrays: bool = False) -> list[Path]:
    """Image files among ``sources``: files as they are, folders searched at any depth, by name; at most ``limit``.

    Args:
        arrays: NumPy arrays (.npy) are images, too.

    Raises:
        FileNotFoundError: a source does not exist.
        DataError: there is no image.
    """
    found: list[Path] = []
    for source in map(lambda path: Path(path).expanduser(), sources):
        if source.is_dir():
            found += [source / name for name in find_images(str(source), arrays)]
        elif source.is_file():
            found.append(source)
        else:
            raise MissingFileError("image-missing", f"image or folder {source} does not exist")
    if not found:
        raise DataError(
            "no-images",
            f"no images in {', '.join(map(str, sources))}; looked for files ending in {', '.join(IMAGE_EXTENSIONS)}",
        )
    return found[:limit]


def save_picture(columns: Columns, folder: str | os.PathLike[str], name: str, caption: str) -> Path:
    """Write ``folder/<name>.png``, and the folder's page anew with all pictures that such calls have put there.

    A caption stands inside its picture's file. Returns the picture's path.

    Raises:
        WriteError: the disk does not take it; a picture that was there is untouched.
    """
    folder = Path(folder)
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt(_CAPTION, printable(caption))  # it names files
    path = folder / f"{name}.png"
    picture = Image.fromarray(picture_grid(columns))
    with written_whole(path) as stream:
        picture.save(stream, format="PNG", pnginfo=notes)
    write_page(folder)
    return path


def write_page(folder: str | os.PathLike[str], title: str = "hgkd pictures") -> Path:
    """``folder/PAGE`` with every PNG of the folder under its name, oldest first."""
    sections = []
    for file in sorted(Path(folder).glob("*.png"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
        with Image.open(file) as picture:
            caption = str(picture.info.get(_CAPTION, ""))
        sections.append(Section(printable(file.stem), [Picture(file, caption)]))
    return write_report(Path(folder) / PAGE, title, sections)


class ImageFiles(Dataset[dict[str, Any]]):
    """Given files as a data set for ``hgkd.evaluation.extract``; an unreadable one raises DataError."""

    def __init__(
        self,
        files: Sequence[Path],
        image_size: int | Sequence[int],
        value_range: Sequence[float] | None = None,
        in_chans: int | None = None,
    ) -> None:
        self.files = list(files)
        self.image_size = image_size
        self.value_range = value_range
        self.in_chans = in_chans

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        crops = read_crops([self.files[index]], self.image_size, self.value_range, self.in_chans)
        return {"inputs": crops[0], "label": -1, "index": index}
