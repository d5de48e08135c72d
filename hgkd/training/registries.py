"""Children of mmengine's remaining registries.

With ``default_scope='hgkd'`` mmengine looks for a child of that scope in every registry it builds from, and warns where there
is none. ``hgkd.registry`` has those that hold classes of ours for users to name; the others get an empty child here.
"""

from mmengine.registry import Registry, root

OPTIM_WRAPPERS = Registry("optim wrapper", parent=root.OPTIM_WRAPPERS, scope="hgkd", locations=["hgkd.training"])
TRANSFORMS = Registry("transform", parent=root.TRANSFORMS, scope="hgkd", locations=["hgkd.openmmlab"])

for _root in [entry for entry in vars(root).values() if isinstance(entry, Registry)]:
    if "hgkd" not in _root.children:
        # a place to import from, or mmengine warns that hgkd is not installed
        Registry(_root.name, parent=_root, scope="hgkd", locations=["hgkd.registry"])
