"""How good the frozen features are: k-NN, linear probe, health, and the extraction of features from any backbone."""

from hgkd.evaluation.classification import ClassificationMetric
from hgkd.evaluation.extract import FeatureExtractor, FeatureSet, extract, load_extractor
from hgkd.evaluation.knn import FeatureHealthMetric, KNNMetric, effective_rank, knn_accuracy, knn_scores
from hgkd.evaluation.linear import LinearResult, bootstrap_interval, linear_probe
from hgkd.evaluation.samples import ClassSample, FeatureSample

__all__ = [
    "ClassSample",
    "ClassificationMetric",
    "FeatureExtractor",
    "FeatureHealthMetric",
    "FeatureSample",
    "FeatureSet",
    "KNNMetric",
    "LinearResult",
    "bootstrap_interval",
    "effective_rank",
    "extract",
    "knn_accuracy",
    "knn_scores",
    "linear_probe",
    "load_extractor",
]
