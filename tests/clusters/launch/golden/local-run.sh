#!/bin/bash
exec PYTHON -m harness run /home/me/grid.yaml --profile /shared/runs/grid/launch/profile.yaml --output /shared/runs
