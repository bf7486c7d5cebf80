"""Safety and capability measures of a causal language model, and reports of them."""

from ogpsa_trl.evaluation.equal_safety import (
    Spread,
    at_safety,
    paired_difference,
    tradeoff_figure,
)
from ogpsa_trl.evaluation.figures import comparison_figure
from ogpsa_trl.evaluation.likelihoods import CompletionScores, completion_scores
from ogpsa_trl.evaluation.measures import (
    PreferenceScores,
    bits_per_character,
    exact_match,
    mean_divergence,
    mean_log_likelihood_per_token,
    mean_probability,
    preference_accuracy,
)
from ogpsa_trl.evaluation.tables import markdown_table

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
