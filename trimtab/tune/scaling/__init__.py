"""Sizes and rates that were not trained: forecasts of instability, and the check of a parametrisation."""
