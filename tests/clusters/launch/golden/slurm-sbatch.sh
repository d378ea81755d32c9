#!/bin/bash
#SBATCH --job-name=grid
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --mem=128G
#SBATCH --time=24:00:00
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --output=/shared/runs/grid/launch/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --export=HOME,LANG,PATH,USER,HF_TOKEN
#SBATCH --exclusive
set -u
module load cuda/12
export HF_HOME='/shared/hf cache'
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
export RAY_memory_monitor_refresh_ms=0
export SLURM_EXPORT_ENV=ALL  # of this script to its steps: otherwise the names above only
python=PYTHON
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1))"

# Ray on every node, each with free ports of its own. It is deaf to SIGTERM, so that it outlives the driver.
RAY_ADDRESS=$("$python" -m clusters.launch.ray_node address) || exit 2
RAY_AUTH_TOKEN=$("$python" -c 'import secrets; print(secrets.token_hex(32))')
export RAY_ADDRESS RAY_AUTH_TOKEN
end_ray() { scancel --signal=KILL "$SLURM_JOB_ID.0" 2>/dev/null; }  # the first step; to the job, KILL would cancel it
trap end_ray EXIT
srun --overlap --nodes=2 --ntasks=2 --ntasks-per-node=1 \
  --cpus-per-task=16 --gpus-per-node=4 \
  --output=/shared/runs/grid/launch/ray-%j-%n.log "$python" -m clusters.launch.ray_node start &
"$python" -m clusters.launch.ray_node wait 2 &
wait -n || exit 2  # the end of the first of the two: Ray ends only if it fails

# Slurm sends SIGUSR1 to this script before the time limit, and SIGTERM to the steps, which is the driver, before it
# preempts the job, or by `scancel --signal=TERM`. Only plain `scancel` sends SIGTERM to this script.
cancelled=
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap 'cancelled=1' TERM
srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" PYTHON -m harness run /home/me/grid.yaml --profile /shared/runs/grid/launch/profile.yaml --output /shared/runs &
driver=$!
while true; do
  wait "$driver"
  code=$?
  kill -0 "$driver" 2>/dev/null || break
done
echo "job $SLURM_JOB_ID: harness ended with exit code $code"
# 143: the driver got SIGTERM and ended in order. A job that ends within the time of grace is not queued again by Slurm.
if [ "$code" = 143 ] && [ -z "$cancelled" ]; then
  echo "job $SLURM_JOB_ID: queued again, to go on"
  end_ray
  scontrol requeue "$SLURM_JOB_ID" && sleep 60
fi
exit "$code"
