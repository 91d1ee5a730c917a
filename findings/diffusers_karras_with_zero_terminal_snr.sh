#!/usr/bin/env bash
# diffusers 0.42.1: Karras' noise levels on a schedule of zero terminal SNR. Both are options of one
# scheduler and neither warns. The schedule's highest level is 4096, where SDXL's is 14.6, and Karras'
# levels are evenly spaced in sigma^(1/7) from there: most steps are spent where a picture is nothing
# but noise. Models that predict v on such a schedule are drawn in a quarter of the steps.
#
# Seen, 25 steps of SDXL's betas: levels from 4096; 19 of 25 steps are at timesteps above 849, the
# first 15 % of the schedule, with zero terminal SNR, 6 without it, and 4 by timesteps.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 diffusers==0.42.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import diffusers
from diffusers import EulerDiscreteScheduler

betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def early(zero, karras):
    scheduler = EulerDiscreteScheduler(
        **betas, rescale_betas_zero_snr=zero, use_karras_sigmas=karras,
        prediction_type="v_prediction", timestep_spacing="trailing",
    )
    scheduler.set_timesteps(25)
    steps = int((scheduler.timesteps > 849).sum())
    print(f"zero terminal SNR {zero}, Karras {karras}: from {float(scheduler.sigmas[0]):.4g}, "
          f"{steps} of 25 steps above 849")
    return float(scheduler.sigmas[0]), steps


print("diffusers", diffusers.__version__)
(top, steps), (_, usual), (_, plain) = early(True, True), early(False, True), early(True, False)
assert top > 4000 and steps > 15 and usual < 8 and plain < 6
PY
