"""How long train.py takes from its command to the end of its first step."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kqv.training.start import ARCHITECTURE

PASSED_ON = (*ARCHITECTURE, "dataset", "batch_size", "gradient_accumulation_steps")
PASSED_ON += ("activation_checkpointing", "device", "dtype", "compile")


def measure_start_up(settings, script):
    """
    {"cold s": seconds, "warm s": seconds} to the end of the first step of the training `script`, one batch of
    evaluation on each split before it included: with the compiler's cache empty, and again with what the
    first run left in it. {"failed": its last line} where it fails.
    """
    command = [sys.executable, str(Path(script).resolve()), f"--out_dir={settings.dataset}/out"]
    command += [f"--{name}={getattr(settings, name)}" for name in PASSED_ON]
    command += ["--max_iters=1", "--eval_iters=1"]
    figures = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        for name in ("cold s", "warm s"):
            start = time.perf_counter()
            with subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as process:
                for line in process.stdout:
                    if line.startswith("step 0: loss"):
                        figures[name] = time.perf_counter() - start
                error = process.stderr.read()
            if process.returncode:
                return {"failed": error.strip().splitlines()[-1]}
    return figures
