"""``harness doctor``: whether a machine or cluster can run trials, and what to do where it cannot."""
