"""Safety and capability measures of a causal language model, and reports of them."""

from ogpsa_trl.evaluation.measures import (
    CompletionScores,
    PreferenceScores,
    bits_per_character,
    completion_scores,
    exact_match,
    mean_divergence,
    mean_log_likelihood_per_token,
    mean_probability,
    preference_accuracy,
)
from ogpsa_trl.evaluation.report import comparison_figure, markdown_table
from ogpsa_trl.evaluation.tradeoff import (
    Spread,
    at_safety,
    paired_difference,
    tradeoff_figure,
)

__all__ = [
    "CompletionScores",
    "PreferenceScores",
    "Spread",
    "at_safety",
    "bits_per_character",
    "comparison_figure",
    "completion_scores",
    "exact_match",
    "markdown_table",
    "mean_divergence",
    "mean_log_likelihood_per_token",
    "mean_probability",
    "paired_difference",
    "preference_accuracy",
    "tradeoff_figure",
]
