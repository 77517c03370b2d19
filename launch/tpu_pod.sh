#!/usr/bin/env bash
# The same command on every host of a Cloud TPU slice:
#   NAME=my-slice ZONE=us-east5-a launch/tpu_pod.sh meta_train --config=... --workdir=...
# JAX finds the other hosts by itself. The workdir is a folder that all hosts see. They need this checkout at FOLDER, with `make install` and jax[tpu] in it.
set -euo pipefail
: "${NAME:?the name of the TPU slice}" "${ZONE:?its zone}"
folder=${FOLDER:-mftjax}
script=$1
shift
words=$(printf ' %q' .venv/bin/python -m "experiments.$script" "$@" --hosts)
exec "${GCLOUD:-gcloud}" compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="cd $folder && $words"
