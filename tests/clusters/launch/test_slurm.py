"""Batch scripts of run folders with unusual names; a real Slurm reads them in test_slurm_cluster.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusters.launch.launchers import LAUNCHERS
from harness.core.errors import UserError
from tests.support.launching import job, written_profile

pytestmark = pytest.mark.quick
PROFILE = "kind: slurm\nslurm: {partition: gpu}\n"


def test_a_percent_sign_is_no_pattern_of_slurms(tmp_path: Path) -> None:
    made = job(tmp_path, written_profile(tmp_path, PROFILE), run="/runs/50%j of all")
    script = LAUNCHERS["slurm"].render(made)["sbatch.sh"]
    assert "#SBATCH --output='/runs/50%%j of all/launch/slurm-%j.log'\n" in script
    assert "--output='/runs/50%%j of all/launch/ray-%j-%n.log' " in script
    assert "--profile '/runs/50%j of all/launch/profile.yaml' " in script


@pytest.mark.parametrize("name", ["a\nb", "a\\b"])
def test_a_name_that_slurm_cannot_have_is_refused(name: str, tmp_path: Path) -> None:
    made = job(tmp_path, written_profile(tmp_path, PROFILE), run=f"/runs/{name}")
    with pytest.raises(UserError, match=r"which Slurm cannot have in names; rename it$"):
        LAUNCHERS["slurm"].render(made)
