"""Fit in with what others use: loggers that mirror a record while it is written."""
