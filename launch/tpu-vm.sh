#!/bin/bash
# Trains on the TPU slice train, v5litepod-16.
# Written by `leptonx launch tpu-vm`. `FILE create` makes the machines, `FILE copy` copies this folder to them, `FILE run`
# trains, `FILE stop` tells training to save and end, `FILE delete` deletes the machines.
set -uo pipefail

name=train
where=(--zone=us-east5-a)

# Runs a command on every machine of the slice, and fails if it fails on one.
everywhere() {
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

case "${1:-}" in
  create)
    # What each machine does when it boots. The last line says that it is done; `run` waits for it.
    startup=$(mktemp)
    cat > "$startup" <<'STARTUP'
#!/bin/bash
set -e
mkdir -p /opt/train
python3 -m pip install uv
uv venv --allow-existing --python 3.12 /opt/train
uv pip install --python /opt/train 'lepton-xla[tpu,train]'
touch /opt/train/ready
STARTUP
    gcloud compute tpus tpu-vm create "$name" "${where[@]}" \
      --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot \
      --metadata-from-file=startup-script="$startup"
    code=$?
    rm -f "$startup"
    exit $code
    ;;
  copy)
    gcloud compute tpus tpu-vm scp --recurse . "$name":train "${where[@]}" --worker=all
    ;;
  run)
    everywhere 'for ((i = 0; i < 180; i++)); do [ -e /opt/train/ready ] && exit 0; sleep 5; done; echo "setup failed"; exit 1' \
      || exit 1
    # JAX finds the other machines by itself. If one fails or hangs, the others end too, and all are started again from
    # the last checkpoint. Nothing of the attempt before may be left then: it would hold the TPU. Exit code 2 is wrong
    # use, 75 means that training was told to stop, and saved.
    for ((restart = 0; restart <= 3; restart++)); do
      if ((restart > 0)); then
        echo "exit code $code: restart $restart of 3"
        everywhere "pkill -KILL -f '[l]eptonx launch local'; sleep 1"
      fi
      everywhere 'cd train && PATH=/opt/train/bin:$PATH exec leptonx launch local --grace-s 25 --watchdog-s 600 -- python train.py'
      code=$?
      if ((code == 0 || code == 2 || code == 75)); then break; fi
    done
    exit $code
    ;;
  stop)
    everywhere "pkill -TERM -f '[l]eptonx launch local'"
    ;;
  delete)
    gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
    ;;
  *)
    echo "usage: $0 create|copy|run|stop|delete" >&2
    exit 2
    ;;
esac
