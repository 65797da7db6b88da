"""Learning rates: the range test, and a search that goes on within a run."""
