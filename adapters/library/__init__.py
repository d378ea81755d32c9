"""``harness.adapt`` and the adapted model: checked, saved, loaded, merged, converted to and from PEFT."""
