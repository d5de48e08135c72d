"""Fill the table of docs/reference/teachers.md: timm's networks as teachers, how near to timm's own, what each can do.

    python tools/teachers_table.py [--only vit_small_patch16_dinov3 ...]

Each member has random weights from a seed, drawn wide enough that a wrong position shows, and is compared on random images with
timm's ``forward_intermediates`` (last block, or the level of the name), at the image size in the table. Large members are built
with fewer blocks, which the table says.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import MMLogger

from hgkd.structures import Capabilities, TeacherNeeds
from hgkd.teachers import TimmTeacher
from hgkd.teachers.vit import build_network
from hgkd.writing import filled

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/reference/teachers.md"
_NEAR_0 = ("pos_embed", "cls_token", "reg_token", "freqs", "gamma", "gamma_1", "gamma_2", "position_bias_table")
BEGIN, END = "<!-- tools/teachers_table.py -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Member:
    """A name of the table: its family in words, timm's name, the level that is shown, how it is made smaller."""

    family: str
    name: str
    level: int | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


def _vit(family: str, name: str, size: int = 64, **kwargs: Any) -> Member:
    return Member(family, name, kwargs={"img_size": size, **kwargs})


MEMBERS = (
    _vit("DINOv3", "vit_small_patch16_dinov3"),
    _vit("DINOv3 S+ (gated)", "vit_small_plus_patch16_dinov3"),
    _vit("EUPE", "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"),
    _vit("Perception Encoder, core", "vit_pe_core_tiny_patch16_384.fb"),
    _vit("Perception Encoder, spatial", "vit_pe_spatial_tiny_patch16_512.fb"),
    _vit("Perception Encoder, language", "vit_pe_lang_large_patch14_448.fb", 56, depth=2),
    _vit("EVA-02", "eva02_tiny_patch14_224", 56),
    _vit("EVA-02 CLIP", "eva02_base_patch16_clip_224", depth=4),
    _vit("EVA (absolute positions)", "eva_giant_patch14_224", 56, depth=1),
    _vit("ROPE-ViT, axial", "vit_small_patch16_rope_224"),
    _vit("ROPE-ViT, mixed", "vit_small_patch16_rope_mixed_224"),
    _vit("ROPE-ViT, mixed, absolute too", "vit_small_patch16_rope_mixed_ape_224"),
    _vit("timm's ROPE ViT, register", "vit_medium_patch16_rope_reg1_gap_256"),
    _vit("LingBot-Vision", "vit_small_patch16_lingbot"),
    _vit("Sapiens2", "vit_base_patch16_sapiens2", num_kv_heads=6, depth=4),
    _vit("DINOv2", "vit_small_patch14_dinov2", 56),
    _vit("DINOv2 with registers", "vit_small_patch14_reg4_dinov2", 56),
    _vit("DINO", "vit_small_patch16_224.dino"),
    _vit("MAE (its encoder)", "vit_base_patch16_224.mae", depth=4),
    _vit("AugReg", "vit_tiny_patch16_224.augreg_in21k"),
    _vit("DeiT", "deit_tiny_patch16_224"),
    _vit("DeiT, distilled", "deit_tiny_distilled_patch16_224"),
    _vit("DeiT III", "deit3_small_patch16_224"),
    _vit("CLIP", "vit_xsmall_patch16_clip_224"),
    _vit("CLIP of OpenAI", "vit_base_patch16_clip_quickgelu_224.openai", depth=4),
    _vit("SigLIP", "vit_base_patch16_siglip_224", depth=4),
    _vit("SigLIP2", "vit_base_patch16_siglip_256.v2_webli", depth=4),
    _vit("AIMv2", "aimv2_large_patch14_224", 56, depth=2),
    _vit("TIPSv2", "vit_base_patch14_reg1_tipsv2", 56, depth=4),
    _vit("RADIO", "vit_base_patch16_radio_v3", depth=4),
    _vit("InternViT", "vit_intern300m_patch14_448", 56, depth=2),
    _vit("FlexiViT", "flexivit_small"),
    _vit("ViT without class token", "vit_wee_patch16_reg1_gap_256"),
    _vit("ViT of parallel blocks", "vit_pwee_patch16_reg1_gap_256"),
    _vit("ViT of differential attention", "vit_dwee_patch16_reg1_gap_256"),
    _vit("BEiT", "beit_base_patch16_224", depth=4),
    _vit("BEiTv2", "beitv2_base_patch16_224", depth=4),
    Member("ViT, relative positions", "vit_relpos_small_patch16_224"),
    Member("ViT, shared relative positions", "vit_srelpos_small_patch16_224"),
    Member("SAM", "samvit_base_patch16_224", kwargs={"depth": 3}),
    Member("hybrid ViT", "vit_tiny_r_s16_p8_224"),
    Member("ViTamin", "vitamin_small_224"),
    Member("NaFlexViT", "naflexvit_base_patch16_gap", kwargs={"depth": 4}),
    Member("XCiT", "xcit_nano_12_p16_224"),
    Member("Swin", "swin_tiny_patch4_window7_224"),
    Member("Swin, a finer level", "swin_tiny_patch4_window7_224", -2),
    Member("Swin v2", "swinv2_tiny_window8_256"),
    Member("Hiera", "hiera_tiny_224"),
    Member("Hiera of SAM 2", "hieradet_small"),
    Member("MViTv2", "mvitv2_tiny"),
    Member("PVTv2", "pvt_v2_b0"),
    Member("CAFormer", "caformer_s18"),
    Member("FastViT", "fastvit_t8"),
    Member("ConvNeXt of DINOv3", "convnext_tiny.dinov3_lvd1689m"),
    Member("ConvNeXt of EUPE, a finer level", "convnext_tiny.eupe_lvd1689m", -2),
    Member("ConvNeXt V2", "convnextv2_atto"),
    Member("ResNet", "resnet18"),
    Member("RegNet", "regnety_002"),
    Member("EfficientNet", "efficientnet_b0"),
    Member("MobileNet v4", "mobilenetv4_conv_small"),
)


def teacher_of(member: Member) -> TimmTeacher:
    """The member as a teacher, of random weights."""
    return TimmTeacher(member.name, allow_random=True, level=member.level, **member.kwargs)


def native_grid(teacher: TimmTeacher) -> tuple[int, int]:
    """The grid of tokens that a teacher's network was built for."""
    family: Any = teacher.family
    if hasattr(family, "levels"):
        height, width = family._native_size
        return height // family.patch_size, width // family.patch_size
    grid: tuple[int, int] = family._native_grid
    return grid


@torch.no_grad()
def difference(member: Member) -> tuple[float, tuple[int, int]]:
    """Largest absolute difference between a teacher's tokens and timm's own forward, relative to timm's largest value; grid."""
    torch.manual_seed(0)
    teacher = teacher_of(member)
    reference: Any = build_network(member.name, **member.kwargs).eval()
    for name, value in teacher.network.named_parameters():
        if name.endswith(_NEAR_0) or "rel_pos" in name:
            value.normal_(std=0.5)  # where a wrong one would not show
    own = teacher.network.state_dict()
    reference.load_state_dict(own, strict=False)  # what the teacher took out: norms after the blocks, poolings
    teacher.family = type(teacher.family)(teacher.network, **_again(teacher))  # reads its positions anew
    grid = native_grid(teacher)
    teacher.prepare(grid, teacher.info.patch_size)
    images = torch.rand(1, 3, *teacher.input_size)
    block = teacher.info.depth - 1
    found = teacher(images, None, TeacherNeeds(blocks=(block,))).tokens[block]
    features = reference.forward_intermediates((images - teacher.mean) / teacher.std, intermediates_only=True)
    expected = [feature for feature in features if feature.shape == found.shape][-1]
    return float((found - expected).abs().max() / expected.abs().max()), grid


def _again(teacher: TimmTeacher) -> dict[str, Any]:
    family: Any = teacher.family
    return {"level": family.level, "image_size": family._native_size} if hasattr(family, "levels") else {}


def answers(found: Capabilities) -> str:
    """The cells of a row that say what a teacher can be asked for."""
    yes = {True: "yes", False: "no"}
    cells = (
        yes[not found.no_dropping],
        yes[found.class_token],
        str(found.registers),
        yes[not found.no_attention],
    )
    return " | ".join(cells)


def facts(member: Member) -> str:
    """The cells of a row that need no forward: width, blocks, pixels of a token, capabilities."""
    with torch.device("meta"):
        teacher = teacher_of(member)
    first = "first " if "depth" in member.kwargs else ""
    info = teacher.info
    return f"{first}{info.depth} x {info.width} | {info.patch_size} px | {answers(teacher.capabilities)}"


def row(member: Member) -> str:
    """A row of the table."""
    error, grid = difference(member)
    gc.collect()
    level = "" if member.level is None else f", `level={member.level}`"
    found = f"{error:.0e}" if error else "0"
    return f"| {member.family} | `{member.name}`{level} | {grid[0]} x {grid[1]} | {found} | {facts(member)} |"


HEAD = (
    "| family | name | grid | difference | blocks x width | token | drops patches | class token | registers | attention |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="print the rows of these names, change no file")
    args = parser.parse_args(argv)
    MMLogger.get_current_instance().setLevel("ERROR")
    rows = []
    for member in MEMBERS:
        if args.only is None or member.name in args.only:
            rows.append(row(member))
            print(rows[-1], flush=True)
    if args.only is None:
        table = HEAD + "\n".join(rows) + "\n"
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), BEGIN, END, table, str(PAGE)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
