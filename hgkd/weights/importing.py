"""Import of weight files of other projects into timm networks.

SparK's, the official ConvNeXt's (v1, v2), mmpretrain's and its SparK's, torchvision's, transformers', timm's and hgkd's own
files differ in the names of weights (:mod:`hgkd.weights.cnn_names`) and in what lies around them: a container, a prefix,
decoders, classifiers. Both are found from the file; nothing is guessed about weights that then do not fit.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmengine.logging import print_log
from torch import Tensor, nn

from hgkd.errors import WeightsError
from hgkd.weights.cnn_names import KeyStyle, fitted, styles_for
from hgkd.weights.export_folder import read_spec
from hgkd.weights.files import teachers_alone
from hgkd.weights.identify import identify
from hgkd.weights.loading import LoadReport, NoPlainNumbersError, load_strict, match
from hgkd.weights.sizes import other_sizes

_LEAST_SHARE = 0.5
_COUNTER = "num_batches_tracked"  # files of before 2018 lack it; no output depends on it


@dataclass(frozen=True)
class ImportReport:
    """How a file's weights became those of a timm network.

    Attributes:
        style: name of the key style.
        prefix: what stood before every name.
        loaded: the report of the strict loading; its names are timm's, or the file's for what is left over.
        aside: number of the file's weights that belong to other parts (decoder, classifier), by the first part of the name.
        filled: entries that the file lacks and that no output depends on.
    """

    style: str
    prefix: str
    loaded: LoadReport
    aside: Mapping[str, int]
    filled: int

    def __str__(self) -> str:
        aside = ", ".join(f"{count} of {name}" for name, count in self.aside.items())
        return (
            f"{self.loaded}; key style {self.style}"
            + (f" under {self.prefix!r}" if self.prefix else "")
            + (f"; not part of the encoder: {aside}" if aside else "")
            + (f"; {self.filled} counters of batches set to 0" if self.filled else "")
        )


def import_weights(
    network: nn.Module,
    path: str | os.PathLike[str],
    *,
    prefix: str | None = None,
    allow: Sequence[str] = (),
    entry: str | None = None,
    dry: bool = False,
) -> ImportReport:
    """Load a weight file of any known key style into a timm network, all or nothing, and log the report.

    Args:
        network: timm's, without classifier.
        path: .pth, .pt, .bin or .safetensors file, or a folder of ``hgkd export`` that :func:`hgkd.networks.load_backbone`
            reads; or what :func:`hgkd.weights.identify.identify` said of it.
        prefix: what stands before the encoder's names; None finds it.
        allow: beginnings of names that may be missing (timm's names) or left over (the file's, without the prefix).
        entry: see :func:`hgkd.weights.files.tensors_of`.
        dry: only look whether the weights fit, as networks on the meta device need.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: damaged, of no known style, ambiguous, or not fitting; the network is unchanged then.
    """
    file = identify(path)
    if file.path.is_dir():
        read_spec(file)  # refuses what is no such folder
    weights, source = file.tensors(entry), file.source
    style, prefix = find_style(network, weights, source=source, prefix=prefix)
    own = network.state_dict()
    timm_name = {style.rename(key): key for key in own}
    inside = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    classifier = style.classifier(network)
    encoder = {key: value for key, value in inside.items() if not key.startswith(classifier)}
    state = fitted({timm_name.get(key, key): value for key, value in encoder.items()}, own)
    counters = [key for key in own if key.endswith(_COUNTER)]
    filled = counters if not any(key in state for key in counters) else []
    state.update({key: own[key] * 0 for key in filled})
    try:
        if dry:
            loaded = match(network, state, source=source, ignore_missing=allow, ignore_unexpected=allow)
        else:
            loaded = load_strict(network, state, source=source, ignore_missing=allow, ignore_unexpected=allow, tell=False)
    except NoPlainNumbersError:
        raise
    except WeightsError as error:
        sizes = other_sizes(state, own)
        if sizes is not None:
            raise WeightsError(
                "weights-of-other-sizes",
                f"{source} is of another {type(network).__name__}: {sizes}; name the file's own network",
            ) from error
        raise WeightsError(
            "weights-do-not-fit",
            f"{error} (key style {style.name}, prefix {prefix!r}); nothing was loaded. Where this is meant, allow=(...) of "
            "load_backbone, or --allow of hgkd export, takes the beginnings of the names that may be missing or left over; "
            "for a training, write the network's own entries to a file of their own",
        ) from error
    others = [key for key in weights if not key.startswith(prefix)] + [key for key in inside if key.startswith(classifier)]
    heads = [key.partition(".")[0] for key in others]
    report = ImportReport(style.name, prefix, loaded, {head: heads.count(head) for head in dict.fromkeys(heads)}, len(filled))
    print_log(str(report), "current")
    return report


def find_style(
    network: nn.Module, weights: Mapping[str, Tensor], *, source: str, prefix: str | None = None
) -> tuple[KeyStyle, str]:
    """The key style and prefix under which most of a network's weights are found in a file.

    Raises:
        WeightsError: fewer than half are found, or two prefixes serve equally well (a network and its moving average, say;
            of a student and its teacher, equally long, the teacher's is taken).
    """
    found: list[tuple[int, KeyStyle, str]] = []
    for style in styles_for(network):
        names = [style.rename(key) for key in network.state_dict()]
        ends = [key.removesuffix(names[0]) for key in weights if key.endswith(names[0])]
        prefixes = [end for end in ends if not end or end.endswith(".")] if prefix is None else [prefix]
        found += [(sum(start + name in weights for name in names), style, start) for start in prefixes]
    found.sort(key=lambda item: -item[0])
    total = len(network.state_dict())
    if not found or found[0][0] < _LEAST_SHARE * total:
        best = f"; the best fit is {found[0][1].name} with {found[0][0]} of {total}" if found else ""
        known = ", ".join(style.name for style in styles_for(network))
        raise WeightsError(
            "network-not-found-in-file",
            f"{source} holds no {type(network).__name__} in a known key style ({known}){best}; its weights are called "
            f"{', '.join(list(weights)[:3])}. Is it of this architecture?",
        )
    equal = teachers_alone([item[2] for item in found if item[0] == found[0][0] and item[1] is found[0][1]])
    if len(equal) > 1:
        raise WeightsError(
            "network-found-several-times",
            f"{source} holds the network {len(equal)} times, under {', '.join(map(repr, equal))}; name one with prefix=...",
        )
    return found[0][1], equal[0]
