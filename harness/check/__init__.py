"""The contract tests of plugins, which ``harness check`` runs."""
