"""Content of a folder of images, by name alone: pictures, tar shards, and files that are neither.

Nothing is dropped without being counted: what belongs to a system (macOS, Windows, a NAS, Jupyter) and the work folders of
trainings, whose pictures are no images of the data, are passed over, and what is no picture is told by its kind.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from PIL import features

from hgkd.errors import DataError

SHARD_EXTENSION = ".tar"
TABLE_EXTENSIONS = (".parquet", ".arrow")
UNFINISHED_EXTENSION = ".tar.partial"
"""Of a shard that is being written: beside others it says that their packing did not come to its end."""

HAS_AVIF = "avif" in features.modules and features.check_module("avif")
HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None  # reads what iPhones write

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k"),
    *((".avif",) if HAS_AVIF else ()),
    *((".heic", ".heif") if HAS_HEIF else ()),
)
ARRAY_EXTENSION = ".npy"
"""Of NumPy arrays, which are images where a data set says how many channels they have."""
EXTENSION_LIST = ", ".join(extension[1:] for extension in IMAGE_EXTENSIONS)

# pictures and what is often taken for them; leaving these out is worth a warning
_OTHER_PICTURES = frozenset(
    f".{kind}"
    for kind in (
        *("arw", "avif", "bpg", "cr2", "cr3", "dcm", "dng", "exr", "hdr", "heic", "heif", "jxl", "jxr", "nef", "npy", "nii"),
        *("orf", "psd", "raf", "raw", "rw2", "tga"),
    )
)
_SYSTEM_NAMES = frozenset(
    {
        *("__macosx", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot"),
        *("$recycle.bin", "system volume information", "recycler", "lost+found", "thumbs.db", "desktop.ini"),
    }
)
RUN_FILES = frozenset({"run.lock", "checkpoints.txt", "last_checkpoint"})
"""Files of which a training's work folder holds one as long as it runs, and from its first checkpoint on."""
_LOG_FOLDER = re.compile(r"\d{8}_\d{6}(_\d+)?")  # mmengine's for one start, in a work folder
_LOG_PART = "vis_data"  # in it: records and pictures
DOTTED = "images with a further dot in their names, as in key.seg.png (to read them, rename them)"
"""A kind of what shards leave out: to the webdataset library all after the first dot is the kind."""

_KINDS_TOLD = 6
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"})
"""Names of the parts of a data set, which are no classes."""
Identity = tuple[int, int]


def is_system(name: str) -> bool:
    """Whether a file or folder of this name is a system's and not the user's: hidden ('.x', macOS's '._x.jpg'), or known."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in _SYSTEM_NAMES


def is_run_folder(folder: str) -> bool:
    """Whether a folder is the work folder of a training, or what one start has written there."""
    # without a list of the folder: a class may have a million images
    names = [name for name in RUN_FILES if os.path.isfile(os.path.join(folder, name))]
    subfolders = [_LOG_PART] if os.path.isdir(os.path.join(folder, _LOG_PART)) else []
    return holds_a_run(folder, subfolders, names)


def holds_a_run(folder: str, subfolders: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a folder with these subfolders and files is the work folder of a training, or what one start has written there.

    A training that failed before its first checkpoint leaves nothing else.
    """
    logs = _LOG_PART in subfolders and _LOG_FOLDER.fullmatch(os.path.basename(folder)) is not None
    return logs or not RUN_FILES.isdisjoint(names)


def is_image_name(name: str) -> bool:
    """Whether a name has the extension of an image or an array, upper or lower case."""
    return name.lower().endswith((*IMAGE_EXTENSIONS, ARRAY_EXTENSION))


def printable(path: str) -> str:
    """A path for messages: bytes that are not UTF-8 as ``\\xff``, which every log and terminal can show."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


@dataclass
class Content:
    """Files found below a folder; names are relative to it and sorted.

    Attributes:
        images: files named like images.
        shards: tar files.
        tables: Parquet and Arrow files.
        unfinished: shards whose writing did not end.
        left_out: kind (extension in lower case) -> number of files that are none of these.
        system: number of files and folders that belong to a system, the folders not searched.
        runs: number of work folders of trainings, which are not searched.
    """

    images: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    system: int = 0
    runs: int = 0

    def sort(self) -> None:
        """Bring the names into their order."""
        for names in (self.images, self.shards, self.tables):
            names.sort()

    @property
    def misses_pictures(self) -> bool:
        """Whether something left out looks like a picture."""
        return not _OTHER_PICTURES.isdisjoint(self.left_out) or DOTTED in self.left_out

    def told(self) -> str:
        """Sentence about files that were left out; '' when there are none."""
        parts = [f"{count} {kind}" for kind, count in self.left_out.most_common(_KINDS_TOLD)]
        rest = self.left_out.total() - sum(count for _, count in self.left_out.most_common(_KINDS_TOLD))
        parts += [f"{rest} of other kinds"] if rest else []
        parts += [f"{self.system} of a system (hidden, __MACOSX, #recycle and the like)"] if self.system else []
        parts += [f"{self.runs} work folders of trainings"] if self.runs else []
        heif = self.left_out[".heic"] + self.left_out[".heif"]
        return ", ".join(parts) + ("; to read .heic: pip install pillow-heif" if heif else "")


def search(folder: str, passed_over: Iterable[Identity | None] = (), extensions: tuple[str, ...] = IMAGE_EXTENSIONS) -> Content:
    """Everything below ``folder``; links are followed, each folder is entered once, so that cycles end.

    Work folders of trainings below it are not entered: their pictures would be images of the next one, and of its resume.

    Args:
        passed_over: :func:`folder_identity` of folders that are not entered, nor through links to them.
        extensions: of images, in lower case.

    Raises:
        DataError: a folder that cannot be listed, as of its images nothing would be known.
    """
    found = Content()
    seen = set(passed_over)
    for here, subfolders, names in os.walk(folder, followlinks=True, onerror=_cannot_list):
        identity = folder_identity(here)
        if identity is None or identity in seen:
            subfolders.clear()
            continue
        seen.add(identity)
        if here != folder and holds_a_run(here, subfolders, names):
            found.runs += 1
            subfolders.clear()
            continue
        found.system += sum(map(is_system, [*subfolders, *names]))
        # sorted: which of two links to one folder is entered must not depend on the disk
        subfolders[:] = sorted(name for name in subfolders if not is_system(name))
        for name in names:
            if not is_system(name):
                _sort_in(found, os.path.relpath(os.path.join(here, name), folder), name.lower(), extensions)
    found.sort()
    return found


def kind_name(name: str) -> str:
    """The kind of a file that is no image, for messages: its extension in lower case."""
    stem, extension = os.path.splitext(name.lower())
    if stem.endswith(SHARD_EXTENSION):
        extension = SHARD_EXTENSION + extension
    return printable(extension) if extension else "without an extension"


def sort_in(found: Content, path: str, extensions: tuple[str, ...]) -> None:
    """Count a file behind an address, whose folders nobody has walked through, under its kind."""
    plain = path.partition("?")[0]
    if any(map(is_system, plain.split("/"))):
        found.system += 1
    else:
        _sort_in(found, path, plain.rpartition("/")[2].lower(), extensions)


def _sort_in(found: Content, path: str, name: str, extensions: tuple[str, ...]) -> None:
    if name.endswith(extensions):
        found.images.append(path)
    elif name.endswith(SHARD_EXTENSION):
        found.shards.append(path)
    elif name.endswith(TABLE_EXTENSIONS):
        found.tables.append(path)
    elif name.endswith(UNFINISHED_EXTENSION):
        found.unfinished.append(path)
    else:
        found.left_out[kind_name(name)] += 1


def folder_identity(folder: str) -> Identity | None:
    """Device and number of a folder, the same for all links to it; None when it is not there (any more)."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _cannot_list(error: OSError) -> None:
    if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):  # went away meanwhile, or a link in a circle
        return
    raise DataError(
        "folder-not-listable",
        f"folder {printable(str(error.filename))[:200]} cannot be listed ({error.strerror}), so its images would be missing; "
        "give yourself the right to read it (chmod u+rx), move it away, or name the images in a list_file",
    ) from error
