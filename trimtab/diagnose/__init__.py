"""Understand a run: rules over its signals that name what went wrong, why, and what treats it."""

from trimtab.diagnose.doctor import Diagnosis, Doctor, known_pathologies
from trimtab.diagnose.finding import Finding
from trimtab.diagnose.pathology import Match, Pathology, Signals

__all__ = ["Diagnosis", "Doctor", "Finding", "Match", "Pathology", "Signals", "known_pathologies"]
