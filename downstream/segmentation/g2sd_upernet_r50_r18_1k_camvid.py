"""G2SD's specific stage on CamVid, for 2 CPU cores: a second classifier learns the labels of UPerNet R-50.

Train the teacher first (upernet_r50_1k_camvid.py).
"""

_base_ = ["./mgd_upernet_r50_r18_1k_camvid.py"]
model = dict(taps=[], hard_label=True)
