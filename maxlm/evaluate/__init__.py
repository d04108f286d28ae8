"""Evaluation of models by the likelihood that they give to texts."""
