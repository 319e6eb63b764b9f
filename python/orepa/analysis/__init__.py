"""Measures the branches of a trained model: their similarity, their scales, their part in the squeezed kernel."""

from .measure import Analysis, BranchAnalysis, LayerAnalysis, ScaleStatistics, analyze

__all__ = ["Analysis", "BranchAnalysis", "LayerAnalysis", "ScaleStatistics", "analyze"]
