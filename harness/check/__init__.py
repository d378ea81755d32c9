"""``harness check``: the contract tests of every plugin."""
