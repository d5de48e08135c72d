# ruff: noqa: T201
"""Kill a training with SIGKILL again and again at random moments, and compare its end with the unbroken run's.

    python tests/training/kill_at_random.py --kills 20

Not collected by pytest: it takes minutes. It prints a line a kill and exits with 0 when the two are equal bit for bit.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_runs import SPARK, same, tiny, write_images  # noqa: E402

from hgkd.weights import find_last_checkpoint  # noqa: E402
from hgkd.weights.files import read_checkpoint  # noqa: E402

EPOCHS = 30


def start(images, work_dir):
    work_dir.mkdir(exist_ok=True)
    options = tiny(images, epochs=EPOCHS, batch_size=4, workers=1, **{"default_hooks.checkpoint.every_steps": 1})
    command = [sys.executable, str(ROOT / "tools/train.py"), str(SPARK), "--work-dir", str(work_dir), "--resume"]
    command += ["--cfg-options", *[f"{k}={v}" for k, v in options.items()]]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(work_dir / "output.txt", "a") as output:
        return subprocess.Popen(command, env=env, cwd=work_dir, stdout=output, stderr=output)


def position(work_dir):
    last = find_last_checkpoint(work_dir)
    return 0 if last is None else int(read_checkpoint(last)["meta"]["iter"])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        images, run, unbroken = write_images(Path(folder) / "images"), Path(folder) / "run", Path(folder) / "unbroken"
        assert start(images, unbroken).wait() == 0
        done = 0
        for kill in range(args.kills):
            process, before = start(images, run), position(run)
            # wait for the first step of this start, then strike anywhere in the next moments
            while process.poll() is None and position(run) <= before:
                time.sleep(0.5)  # reading a checkpoint costs time that the run needs
            time.sleep(draw.uniform(0.0, 1.0))
            process.kill()
            process.wait()
            done = position(run)
            print(f"kill {kill + 1}: at step {done} of {4 * EPOCHS}", flush=True)
            assert done >= before, "steps were lost"
            if done >= 4 * EPOCHS:
                break
        assert start(images, run).wait() == 0
        name = f"epoch_{EPOCHS}.pth"
        ours, theirs = read_checkpoint(run / name), read_checkpoint(unbroken / name)
        equal = [same(ours[part], theirs[part]) for part in ("state_dict", "optimizer", "param_schedulers")]
        equal.append(ours["message_hub"]["runtime_info"]["best_score"] == theirs["message_hub"]["runtime_info"]["best_score"])
        print(f"weights, optimiser, schedule, best score equal to the unbroken run: {equal}")
        return int(not all(equal))


if __name__ == "__main__":
    sys.exit(main())
