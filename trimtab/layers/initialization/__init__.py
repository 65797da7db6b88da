"""Initialisation: measured, scaled with the width, and made for graphs."""
