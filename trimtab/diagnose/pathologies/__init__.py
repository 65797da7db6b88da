"""The pathologies, one a file: a module-level `PATHOLOGY` is all that the doctor needs to know it."""
