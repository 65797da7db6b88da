"""Losses of representations: functions of embeddings that contrast, regularise or align them."""
