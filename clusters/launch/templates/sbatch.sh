#!/bin/bash
#SBATCH --job-name={{ name | quoted }}
#SBATCH --partition={{ slurm.partition | quoted }}
{% for option in ("account", "qos", "constraint", "mem", "time") if slurm[option] %}
#SBATCH --{{ option }}={{ slurm[option] | quoted }}
{% endfor %}
#SBATCH --nodes={{ slurm.nodes }}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={{ slurm.cpus_per_task }}
{% if slurm.gpus_per_node %}
#SBATCH --gpus-per-node={{ slurm.gpus_per_node }}
{% endif %}
#SBATCH --output={{ log | quoted }}
#SBATCH --open-mode=append
#SBATCH --{{ "requeue" if slurm.requeue else "no-requeue" }}
#SBATCH --signal=B:USR1@{{ slurm.grace_s }}
#SBATCH --export={{ exported | join(",") }}
{% for option in slurm.options %}
#SBATCH {{ option }}
{% endfor %}
set -u
{% for line in slurm.setup %}
{{ line }}
{% endfor %}
{% for name, value in env.items() %}
export {{ name }}={{ value | quoted }}
{% endfor %}
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1
{% for name, value in ray_settings.items() %}
export {{ name }}={{ value | quoted }}
{% endfor %}
export SLURM_EXPORT_ENV=ALL  # of this script to its steps: otherwise the names above only
python={{ python | quoted }}
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1))"

# Ray on every node, each with free ports of its own. It is deaf to SIGTERM, so that it outlives the driver.
RAY_ADDRESS=$("$python" -m clusters.launch.ray_node address) || exit 2
RAY_AUTH_TOKEN=$("$python" -c 'import secrets; print(secrets.token_hex(32))')
export RAY_ADDRESS RAY_AUTH_TOKEN
end_ray() { scancel --signal=KILL "$SLURM_JOB_ID.0" 2>/dev/null; }  # the first step; to the job, KILL would cancel it
trap end_ray EXIT
srun --overlap --nodes={{ slurm.nodes }} --ntasks={{ slurm.nodes }} --ntasks-per-node=1 \
  --cpus-per-task={{ slurm.cpus_per_task }}{% if slurm.gpus_per_node %} --gpus-per-node={{ slurm.gpus_per_node }}{% endif %} \
  --output={{ ray_log | quoted }} "$python" -m clusters.launch.ray_node start &
"$python" -m clusters.launch.ray_node wait {{ slurm.nodes }} &
wait -n || exit 2  # the end of the first of the two: Ray ends only if it fails

# Slurm sends SIGUSR1 to this script before the time limit, and SIGTERM to the steps, which is the driver, before it
# preempts the job, or by `scancel --signal=TERM`. Only plain `scancel` sends SIGTERM to this script.
cancelled=
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap 'cancelled=1' TERM
srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" {{ command }} &
driver=$!
while true; do
  wait "$driver"
  code=$?
  kill -0 "$driver" 2>/dev/null || break
done
echo "job $SLURM_JOB_ID: harness ended with exit code $code"
{% if slurm.requeue %}
# 143: the driver got SIGTERM and ended in order. A job that ends within the time of grace is not queued again by Slurm.
if [ "$code" = 143 ] && [ -z "$cancelled" ]; then
  echo "job $SLURM_JOB_ID: queued again, to go on"
  end_ray
  scontrol requeue "$SLURM_JOB_ID" && sleep 60
fi
{% endif %}
exit "$code"
