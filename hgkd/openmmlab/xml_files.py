"""Checks of data sets in PASCAL VOC's format, where mmdet silently leaves out objects whose name is none of the classes."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine import registry as roots

from hgkd.errors import DataError, MissingFileError, abbreviate
from hgkd.openmmlab.data_checks.listed_images import check_images, why_absent


def check_xml_files(dataset: Mapping[str, Any], file: Path, classes: Sequence[str], name: str) -> list[str]:
    """Check the XML files that a list names.

    Returns:
        What should be said, without being an error.

    Raises:
        DataError: one cannot be read, or none holds an object of the classes.
        FileNotFoundError: a file that is listed is missing.
    """
    built = roots.DATASETS.build({**dataset, "lazy_init": True, "pipeline": []})
    try:
        entries = built.load_data_list()
    except FileNotFoundError as error:
        lost = Path(str(error.filename))
        raise MissingFileError(
            "voc-file-missing",
            f"{name}: {lost} does not exist{why_absent(lost.parent, lost.name)}; {file} lists names without suffix, one a line",
        ) from error
    except (ElementTree.ParseError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise DataError(
            "voc-file-unreadable",
            f"{name}: a file that {file} lists is no annotation in PASCAL VOC's format ({type(error).__name__}: {error})",
        ) from error
    found = {label for entry in entries for label in _labels(entry["xml_path"])}
    unknown = sorted(found - set(classes))
    if not any(entry["instances"] for entry in entries):
        raise DataError(
            "voc-classes-absent",
            f"{name}: no object in the {len(entries)} files of {file} is one of the classes {abbreviate(classes)}; they are "
            f"called {abbreviate(unknown)}. Blanks, and upper and lower case, count: set the data set's metainfo.classes",
        )
    remarks = (
        [f"{name}: {abbreviate(unknown)} of {file} are not among the config's classes and will be left out"] if unknown else []
    )
    return remarks + check_images(file, Path(), [str(entry["img_path"]) for entry in entries], name)


def _labels(file: str) -> list[str]:
    return [str(element.text) for element in ElementTree.parse(file).getroot().findall("object/name")]
