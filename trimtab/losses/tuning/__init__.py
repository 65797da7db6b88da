"""Losses of fine-tuning: variants of next-token cross-entropy, each equal to it at a neutral setting."""
