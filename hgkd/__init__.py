"""hgkd: distil a large Vision Transformer into a small convolutional backbone with masked images.

Importing this package stays light: torch only when a submodule asks for it, and never mmdet, mmsegmentation or spconv.
"""

__version__ = "0.1.0"
