"""List the recipes that are shipped.

    hgkd recipes                 all, with what they do
    hgkd recipes resnet50        those whose name has this in it
    hgkd recipes --plans         the comparison plans of 'hgkd compare'
    hgkd recipes --path NAME     the file of one, to read or to copy

A recipe is trained by its name: hgkd train hgkd/hgkd_vit-s14_resnet18_10e_cifar128. A config of your own starts from one with
_base_ = "hgkd::hgkd/hgkd_vit-s14_resnet18_10e_cifar128.py".
"""

from __future__ import annotations

from collections.abc import Sequence

from hgkd.cli.common import command, command_parser
from hgkd.errors import InvalidValueError
from hgkd.recipes import find_recipe, plan_names, recipe_names, summary_of


@command
def main(argv: Sequence[str]) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("pattern", nargs="?", default="", help="part of the name")
    parser.add_argument("--plans", action="store_true", help="comparison plans instead")
    parser.add_argument("--path", metavar="NAME", help="print the file of this recipe")
    args = parser.parse_args(argv)
    if args.path is not None:
        print(find_recipe(args.path).resolve())
        return 0
    known = plan_names() if args.plans else recipe_names()
    found = [name for name in known if args.pattern in name]
    if not found:
        raise InvalidValueError(
            "no-recipe-matches", f"no name has {args.pattern!r} in it; 'hgkd recipes' lists all {len(known)}"
        )
    width = max(map(len, found))
    for name in found:
        print(f"{name:<{width}}  {summary_of(name)}")
    return 0
