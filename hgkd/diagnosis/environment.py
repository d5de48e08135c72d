"""Is this machine fit for a training: versions, devices, write permission, disk, and whether the images can be read.

The combinations known to fail were found by trying them; the pinned set that is tested is ``constraints.txt``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from hgkd.config.short_options import amp_dtype
from hgkd.data import UnlabelledImages
from hgkd.errors import Refusal, first_line
from hgkd.sparse import choice, self_check, sparsify
from hgkd.sparse.choice import kernels_mode

_NEEDED = ("torch", "torchvision", "timm", "mmengine", "numpy", "pillow", "safetensors", "scikit-learn", "tensorboard")
_SAMPLE = 32


@dataclass(frozen=True)
class Check:
    """One check of the environment, and its result.

    Attributes:
        name: of the check.
        state: 'ok', 'warning' (a training runs, but not as well as it could) or 'failure'.
        found: what was found.
        fix: what to do about it; empty when nothing is wrong.
    """

    name: str
    state: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        return f"[{self.state:^7}] {self.name}: {self.found}" + (f"\n          fix: {self.fix}" if self.fix else "")


def check_environment(
    work_dir: str | os.PathLike[str] = "work_dirs",
    data_root: str | os.PathLike[str] | None = None,
    planned_mb: float = 1000.0,
) -> list[Check]:
    """All checks; a training can be expected to work when none of them is a failure.

    Args:
        work_dir: where checkpoints will lie; made when absent, as a training would.
        data_root: folder of the training images; None: not checked.
        planned_mb: space that checkpoints and logs will need, in MB (2**20 bytes); ``--dry-run`` tells it.
    """
    checks = [check_versions(), check_torchvision(), check_pkg_resources(), check_mm_forks(), check_devices()]
    checks += [check_sparse_backend(), check_kernels()]
    checks += [check_work_dir(work_dir, planned_mb)]
    return checks if data_root is None else [*checks, check_images(data_root)]


def exit_code(checks: Iterable[Check]) -> int:
    """0 when no check is a failure, else 1."""
    return int(any(check.state == "failure" for check in checks))


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_versions() -> Check:
    """Python and the packages that hgkd needs."""
    names = ("onedl-mmengine" if name == "mmengine" and _installed("onedl-mmengine") else name for name in _NEEDED)
    versions = {name: _installed(name) for name in names}
    missing = [name for name, version in versions.items() if version is None]
    found = f"Python {sys.version.split()[0]}, " + ", ".join(f"{n} {v or 'absent'}" for n, v in versions.items())
    if missing:
        return Check("versions", "failure", found, f"pip install -c constraints.txt {' '.join(missing)}")
    return Check("versions", "ok", found)


def check_torchvision(load: Callable[[str], object] = importlib.import_module) -> Check:
    """torchvision's compiled operators fit torch."""
    try:
        load("torchvision")
        torch.ops.torchvision.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    except (ImportError, RuntimeError, AttributeError) as error:
        fix = "install torch and torchvision together, both the registry's ordinary builds; a CPU-only torch has no partner"
        return Check("torch and torchvision", "failure", first_line(error), fix)
    return Check("torch and torchvision", "ok", "compiled operators work")


def check_pkg_resources(load: Callable[[str], object] = importlib.import_module) -> Check:
    """mmengine imports pkg_resources, which setuptools has dropped."""
    try:
        load("pkg_resources")
    except ImportError as error:
        return Check("setuptools", "failure", str(error), "pip install 'setuptools<80'")
    return Check("setuptools", "ok", f"{_installed('setuptools')}, has pkg_resources")


def check_mm_forks(installed: Callable[[str], str | None] = _installed) -> Check:
    """The OneDL forks share folders with OpenMMLab's originals, so both at once damage each other."""
    pairs = [("mmengine", "onedl-mmengine"), ("mmcv-lite", "onedl-mmcv"), ("mmdet", "onedl-mmdetection")]
    pairs += [("mmcv", "mmcv-lite"), ("mmsegmentation", "onedl-mmsegmentation")]
    both = [" and ".join(pair) for pair in pairs if all(map(installed, pair))]
    if both:
        fix = "uninstall both of a pair, then install one of them"
        return Check("OpenMMLab packages", "failure", f"{'; '.join(both)} share their folders", fix)
    return Check("OpenMMLab packages", "ok", "no two that share a folder")


def check_devices() -> Check:
    """Check of the devices that a training will compute on."""
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        precision = "bfloat16" if amp_dtype() is torch.bfloat16 else "float16 with loss scaling"
        return Check("devices", "ok", f"{names}; --amp would be {precision}; several processes talk through NCCL")
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    found = f"no CUDA device: the CPU, {cores} cores, {threads} threads; several processes talk through gloo"
    if torch.version.cuda and shutil.which("nvidia-smi"):
        return Check("devices", "warning", found, "nvidia-smi is there, so look at the driver and CUDA_VISIBLE_DEVICES")
    return Check("devices", "ok", found)


def check_sparse_backend(load: Callable[[str], object] = importlib.import_module) -> Check:
    """The backend that the sparse encoder computes with, why it is this one, and what else there is."""
    backend = inspect.signature(sparsify).parameters["backend"].default
    found = f"{backend}, as it needs no library besides torch"
    try:
        load("spconv.pytorch")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "spconv":
            return Check("sparse backend", "ok", f"{found}; spconv is not installed, and not needed")
        fix = "uninstall spconv, or install a build that fits: pip install 'hgkd[spconv]'"
        return Check("sparse backend", "warning", f"{found}; spconv does not import: {error}", fix)
    return Check("sparse backend", "ok", f"{found}; model.student.backend=spconv would serve, too")


def check_kernels() -> Check:
    """Which kernels compute the sparse encoder on each device, why, and what trainings have measured there."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    lines, wrong = [f"HGKD_KERNELS={kernels_mode()}; a training measures unless kernels=rule is set"], False
    for device in devices or [torch.device("cpu")]:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            lines += self_check.describe(device)
        wrong |= bool(warned)
        measured = [choice.describe(key, found) for key, found in choice.kept(device).items()]
        lines += measured or [f"nothing measured yet in {choice.cache_file(device)}"]
    found = "\n          ".join(lines)
    fix = "the numbers are right with torch's kernels; update Triton and the driver for the fused ones"
    return Check("kernels", "warning" if wrong else "ok", found, fix if wrong else "")


def check_work_dir(work_dir: str | os.PathLike[str], planned_mb: float) -> Check:
    """The work folder can be written to, and its disk has room."""
    folder = Path(work_dir).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        return Check("work folder", "failure", f"{folder}: {error.strerror or error}", "choose another one with --work-dir")
    free = shutil.disk_usage(folder).free / 2**20
    found = f"{folder} can be written to, {free:.0f} MB free, {planned_mb:.0f} MB planned"
    return (
        Check("work folder", "failure", found, "free some space, or choose another disk")
        if free < planned_mb
        else Check("work folder", "ok", found)
    )


def check_images(data_root: str | os.PathLike[str]) -> Check:
    """A sample of the training images, spread over all of them, can be read."""
    try:
        dataset = UnlabelledImages(data_root, image_size=32, max_bad_share=1.0)
        count = min(_SAMPLE, len(dataset))
        for i in range(count):
            dataset[i * len(dataset) // count]
    except Refusal as error:
        return Check("images", "failure", str(error), "set data_root to the folder of the images")
    bad = dataset.bad_files()
    found = f"{len(dataset)} below {dataset.data_root}; {count} looked at, {len(bad)} cannot be read"
    if bad:
        return Check("images", "warning", found, f"repair or remove them, e.g. {bad[0]}")
    return Check("images", "ok", found)
