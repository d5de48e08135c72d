"""Whole detectors and segmentors as graphs (ONNX, OpenVINO) with their post-processing, compared with mmdet's and mmseg's own
inference before they are called done.

``parts`` says what can leave, ``graphs`` is the function of a picture, ``pictures`` the run's test pipeline, ``proof`` the
comparison, ``writers`` the two targets, ``running`` an exported folder as a model that ``hgkd test`` measures.
"""

from hgkd.openmmlab.deployment.running import ExportedModel, is_exported_model
from hgkd.openmmlab.deployment.writers import write_onnx, write_openvino

__all__ = ["ExportedModel", "is_exported_model", "write_onnx", "write_openvino"]
