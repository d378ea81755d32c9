"""What every other package builds on: errors, records, names, formulas, plugin registries. No torch, no Ray."""
