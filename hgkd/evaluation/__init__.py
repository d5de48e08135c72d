"""How good the frozen features are: k-NN, linear probe, few-shot, health, and the extraction of features from any backbone."""

from hgkd.evaluation.accuracy import PairedTest, bootstrap_interval, paired_test
from hgkd.evaluation.classification import ClassificationMetric
from hgkd.evaluation.extract import FeatureExtractor, FeatureSet, extract, load_extractor
from hgkd.evaluation.fewshot import few_shot
from hgkd.evaluation.knn import FeatureHealthMetric, KNNMetric, knn_accuracy, knn_scores
from hgkd.evaluation.linear import LinearResult, linear_probe
from hgkd.features import effective_rank
from hgkd.structures import ClassSample, FeatureSample

__all__ = [
    "ClassSample",
    "ClassificationMetric",
    "FeatureExtractor",
    "FeatureHealthMetric",
    "FeatureSample",
    "FeatureSet",
    "KNNMetric",
    "LinearResult",
    "PairedTest",
    "bootstrap_interval",
    "effective_rank",
    "extract",
    "few_shot",
    "knn_accuracy",
    "knn_scores",
    "linear_probe",
    "load_extractor",
    "paired_test",
]
