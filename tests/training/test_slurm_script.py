"""The script of docs/howto/several_gpus.md, with stand-ins for SLURM's commands and two processes on the CPU."""

import os
import re
import subprocess
import sys

import pytest
from refusals import refused
from tiny_runs import ROOT, SPARK, tiny, write_images

from hgkd.training.runner import take_slurm_names

PAGE = ROOT / "docs/howto/several_gpus.md"
# two tasks on one machine; with a file `stop`, both get SIGTERM once the first step is logged
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] || { echo "srun would let the others wait for a process that fails" >&2; exit 1; }
shift
tasks=()
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 SLURM_NODELIST=localhost "$@" > task_$task.txt 2>&1 &
    tasks+=($!)
done
if [ -e stop ]; then
    until grep -q 'Epoch(train)' task_0.txt; do
        kill -0 ${tasks[0]} || exit 1
        sleep 0.2
    done
    kill -TERM ${tasks[@]}
fi
failed=0
for task in ${tasks[@]}; do wait $task || failed=1; done
exit $failed
"""
SCONTROL = """#!/bin/bash
case "$1" in
    show) echo localhost ;;
    requeue) echo "$2" >> requeued.txt ;;
esac
"""


def script_of(page, images, options):
    """The script of a page, with its first lines changed as a user would."""
    (text,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    given = " ".join(f"'{key}={value}'" for key, value in options.items())
    for name, value in {"RECIPE": str(SPARK), "WORK": "run", "OPTIONS": f"({given})"}.items():
        text, changed = re.subn(rf"^{name}=.*$", lambda _, line=f"{name}={value}": line, text, flags=re.MULTILINE)
        assert changed == 1, name
    return text


@pytest.mark.slow
def test_the_script_trains_is_stopped_goes_on_and_ends(tmp_path):
    images = write_images(tmp_path / "images")
    options = tiny(images, val_train_root=None, val_test_root=None, batch_size=4, epochs=3, warmup_epochs=0)
    (tmp_path / "train.sh").write_text(script_of(PAGE, images, options))
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "hgkd": f'#!/bin/bash\nexec {sys.executable} -m hgkd "$@"\n',
    }.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "CUDA_VISIBLE_DEVICES": ""}
    env = {**os.environ, **job, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def submit():
        done = subprocess.run(["bash", "train.sh"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        said = (tmp_path / "task_0.txt").read_text() + (tmp_path / "task_1.txt").read_text()
        assert done.returncode == 0, done.stderr + said[-4000:]
        return said

    (tmp_path / "stop").touch()
    said = submit()
    assert "stopped by a signal" in said
    assert "4 a step and process x 2 processes" in said
    assert not (tmp_path / "run/epoch_3.pth").exists()
    assert (tmp_path / "requeued.txt").read_text().split() == [job["SLURM_JOB_ID"]]

    (tmp_path / "stop").unlink()
    submit()
    assert (tmp_path / "run/epoch_3.pth").is_file()
    assert len((tmp_path / "requeued.txt").read_text().split()) == 1, "a training that came to its end is not queued again"


def test_a_process_that_srun_did_not_start_is_told():
    with refused(ValueError, "slurm-variables-missing", "SLURM_PROCID", "MASTER_ADDR", "srun"):
        take_slurm_names({"SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "MASTER_PORT": "29500"})
    names = {"SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_PROCID": "1", "MASTER_PORT": "29500", "MASTER_ADDR": "a"}
    take_slurm_names(names)
    assert (names["RANK"], names["WORLD_SIZE"], names["LOCAL_RANK"]) == ("1", "2", "0")
