"""Losses of preferences: functions of the log-probabilities that a policy and a reference give to responses."""
