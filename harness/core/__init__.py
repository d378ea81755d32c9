"""Basics used by all other packages: errors, records, names, score formulas, plugin registries. No torch, no Ray."""
