"""The data of the in-run k-NN: labelled images to remember, then labelled images to classify."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mmengine.logging import print_log
from torch.utils.data import ConcatDataset

from hgkd.data.images import shared_images
from hgkd.errors import InvalidValueError
from hgkd.registry import DATASETS


@DATASETS.register_module()
class BankAndQuery(ConcatDataset[Any]):
    """Two labelled data sets one after the other, tagged with split 'bank' and 'query'.

    mmengine's ``ConcatDataset`` takes its own ``BaseDataset`` only, and does not compare classes.

    Args:
        bank: config of the data set whose labels the k-NN knows, e.g. ``dict(type='LabelledImages', data_root=...)``.
        query: config of the data set that it must classify.

    Raises:
        ValueError: the two do not have the same classes, so their labels mean different things.
    """

    def __init__(self, bank: Mapping[str, Any], query: Mapping[str, Any]) -> None:
        parts = [
            DATASETS.build({"_scope_": "hgkd", **cfg, "split": split}) for cfg, split in ((bank, "bank"), (query, "query"))
        ]
        known, asked = parts[0].classes, parts[1].classes
        if known != asked:
            differ = sorted(set(known) ^ set(asked))[:5]
            raise InvalidValueError(
                "bank-and-query-classes-differ",
                f"the class folders of {parts[0].data_root} ({len(known)}) and {parts[1].data_root} ({len(asked)}) differ, "
                f"e.g. {', '.join(differ)}; the k-NN needs the same classes in both",
            )
        shared = shared_images(*parts)
        if shared:
            print_log(
                f"{shared} of the {len(parts[1])} images that the k-NN must classify are in its memory, too, so its results "
                "are too good",
                logger="current",
                level=logging.WARNING,
            )
        super().__init__(parts)
        self.metainfo: dict[str, Any] = {"classes": tuple(known)}
